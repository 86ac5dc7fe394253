"""Vectors for kernels: llvm.py (types, and how an instruction is written), intrinsics.py (``simd.`` in kernels:
loads, bits, products), lanes.py (scales spread over lanes), reduce.py (lanes added up), rounding.py (to integers).
"""
