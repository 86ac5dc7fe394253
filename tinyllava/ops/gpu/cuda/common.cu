// What all kernels share: float16 numbers, loads and stores, sums over a warp or a thread block. The numbers,
// formats and layouts that Python knows too are put before this file (header() in constants.py), and the other
// sources after it. Nothing is included, so that the run-time compiler needs no path; the few instructions without
// a name in C++ are inline PTX.
//
// Letters in the shapes, as in reference.py: n tokens, m keys, d features, h heads, g kv heads, k head_dim. A
// block of weights is GGUF's; a block of threads is called a thread block.

typedef unsigned char u8;
typedef unsigned short half_t;  // the bits of a float16 number

#define KERNEL extern "C" __global__
#define INLINE __device__ __forceinline__
#define UNROLL _Pragma("unroll")
#define NEGATIVE_INFINITY __int_as_float(0xff800000)

extern __shared__ __align__(16) char dynamic_shared[];  // of the size that the launch asks for

INLINE float to_float(half_t h) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
    return f;
}

INLINE half_t to_half(float f) {
    half_t h;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f));
    return h;
}

// Two floats as two float16 numbers in 32 bits, the first in the lower half; and four in 64 bits.
INLINE unsigned pack_halves(float first, float second) {
    unsigned word;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
    return word;
}
INLINE uint2 pack_halves(float4 v) { return make_uint2(pack_halves(v.x, v.y), pack_halves(v.z, v.w)); }

// What a 16-byte vector load brings, as floats: 8 float16 numbers or 4 float32.
struct Float16x8 {
    static const int COUNT = 8;
    static INLINE void unpack(uint4 v, float* f) {
        const unsigned words[4] = {v.x, v.y, v.z, v.w};
        UNROLL for (int i = 0; i < 4; i++)
            f[2 * i] = to_float(words[i] & 0xffff), f[2 * i + 1] = to_float(words[i] >> 16);
    }
};

struct Float32x4 {
    static const int COUNT = 4;
    static INLINE void unpack(uint4 v, float* f) {
        f[0] = __uint_as_float(v.x), f[1] = __uint_as_float(v.y);
        f[2] = __uint_as_float(v.z), f[3] = __uint_as_float(v.w);
    }
};

// 16 bytes that are read once: not kept in the L1 cache, which other data needs.
INLINE uint4 load_once(const void* address) {
    uint4 v;
    asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(address));
    return v;
}

// 16 bytes by one store instruction, which the compiler must not split.
INLINE void store_vector(void* address, uint4 v) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                 : "memory");
}

// One number, or four neighbouring ones, of an output y that is float16 if ``half``, else float32. An output that
// is only multiplied next is float16, as tensor cores want it.
INLINE void store(void* y, size_t i, float value, int half) {
    if (half) ((half_t*)y)[i] = to_half(value);
    else ((float*)y)[i] = value;
}
INLINE void store4(void* y, size_t i, float4 v, int half) {
    if (half) *(uint2*)((half_t*)y + i) = pack_halves(v);
    else *(float4*)((float*)y + i) = v;
}

INLINE float sum_of_warp(float x) {
    for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(~0u, x, lanes);
    return x;
}

// The sum over all threads of a thread block, returned to each of them.
INLINE float sum_of_block(float x) {
    __shared__ float sums[32];  // of each warp; there are at most 32
    x = sum_of_warp(x);
    __syncthreads();  // every thread has read the sums of an earlier call
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = x;
    __syncthreads();
    return sum_of_warp(threadIdx.x % 32 < blockDim.x / 32 ? sums[threadIdx.x % 32] : 0);
}

// Programmatic dependent launch: a captured token's kernels start before the kernel before them has ended, as
// kernels.py asks for, so that launching costs less. This allows the next kernel to start and waits until the one
// before has ended. Every kernel calls it before it reads or writes what another kernel writes or reads.
INLINE void await_previous_kernel() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// A position in the sequence: read from device memory where a CUDA graph needs today's value at each launch
// (``on_device`` is not null then), else the value that the host passed.
INLINE int position_of(const int* on_device, int from_host) { return on_device ? *on_device : from_host; }
