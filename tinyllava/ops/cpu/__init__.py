"""The CPU backend: the reference's operations in compiled code, on a pool of threads.

How a product with Q4_K weights goes from the file to a number, y = W x:

    quant/plain.py             a block: 256 weights in 144 bytes, as d, dmin, scales, qs; w = d * s * q - dmin * m
    ops/quantized.py           the product's definition: x as integers, integer dot products, scales, minima
    unpack.py                  Q4_K's row in FORMATS: from the block's address to vectors of q, scales and minima
    matmul.py                  linear and linears: W stays in the mapped file; one token goes to GEMV, more to GEMM

One token (decoding), gemv.py:
    quantize_activations.py    quantize_token: x as int8 with a scale for 32 columns, and the sums of its integers;
                               in the layout NIBBLES_K, by which the nibbles of a block need no unpacking
    gemv.py                    GEMV["Q4_K"]: for each row, for each block, dot_256_q4_k: 64 q at a time times 64 of
                               x (dot4), times both scales; minima times the sums of x; the lanes added up at last

A prompt (more than GEMV_TOKENS = 2 tokens), gemm.py:
    matmul.py                  split_outliers: rows of x with huge numbers get a second row for these
    quantize_activations.py    pack_panel: NR tokens as int8 with a scale for 128 columns, in packed blocks
    pack_weights.py            16 rows of W are unpacked and interleaved into packed blocks that stay in cache
    microkernel_k.py           MR rows times NR tokens: dot4 for each group of 32, dot2 for the minima
    gemm.py                    GEMM["Q4_K"]: the loops around that, over panels of W, columns and panels of tokens

Other operations: attention.py, softmax.py, rowwise.py. How kernels are compiled, and how one loop serves many
formats: compile.py. Vector instructions: simd/. Who runs them: thread_pool.py; memory: workspace.py; a step of
decoding is captured as a list of tasks and replayed: capture.py. ops.py joins all as the class NumbaOps.
"""
