"""The GPU backend, and its guide: how a product with a Q4_K matrix goes from the file to its numbers.

Loading. quant/plain.py declares the block of Q4_K: 256 weights in 144 bytes, with the fields d, dmin, scales and
qs. weights.py copies a matrix's blocks to the device, where they stay as they are (a DeviceMatrix). constants.py
says where each field lies there, and its header() writes that in C++, with the other numbers that the kernels
share with Python. kernels.py compiles one text, once: this header, then cuda/common.cu, then the other cuda/*.cu.

One token: y = W x. CupyOps.linears (ops.py) finds a single row and calls _matvec, which launches the kernel of
cuda/matvec.cu, for up to three matrices at once (q, k and v). Each block of threads quantizes x to 16 bits in
shared memory (QuantizedWeights::stage). Each warp loads rows of W, 16 bytes a lane, cuda/blocks.cu unpacks them to
q, scales and minima (Quant<Q4_K>), and QuantizedWeights::add multiplies q and x as integers, four at a time
(dp4a), applies the scales and subtracts the minima or the format's offset. The lanes' sums are added at the end of
each row. The whole step of a token is captured as a CUDA graph (capture.py), which reads positions from device
memory (position.py).

A prompt: Y = X W^T. CupyOps.linears finds many rows, converts X to float16 and calls _gemm. The kernel
``dequantize`` of cuda/blocks.cu writes some rows of W as float16 at a time, by the same Quant<Q4_K>, and blas.py
multiplies X by them with cuBLAS on tensor cores, with float32 sums.

The rest: cuda/rows.cu has norms, activations and RoPE; cuda/attention.cu attention of many tokens
(FlashAttention) and cuda/attention_token.cu that of one; cuda/common.cu what all kernels use. device.py says
whether there is a GPU at all.
"""
