// What all kernels share: numbers in half precision, loads, sums over a warp. No header is included, so that the
// run-time compiler needs no path to any; the few instructions without a C++ name are inline PTX.
//
// Letters in the shapes, as in reference.py: n tokens, d features, h heads, g kv heads, k head_dim.

typedef unsigned char u8;
typedef unsigned short half_t;  // the bits of a half-precision number

#define KERNEL extern "C" __global__
#define INLINE __device__ __forceinline__
#define NEGATIVE_INFINITY __int_as_float(0xff800000)

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

// Two floats as two half-precision numbers in one word, the first in its lower half.
INLINE unsigned to_halves(float first, float second) {
    unsigned word;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
    return word;
}

// 16 bytes that will be read once: past the first-level cache, which has better things to hold.
INLINE uint4 load_once(const void* address) {
    uint4 v;
    asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(address));
    return v;
}

// 16 bytes to memory in one piece, whatever the compiler thinks of it.
INLINE void store_at_once(void* address, uint4 v) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                 : "memory");
}

INLINE uint4 pick(bool first, uint4 a, uint4 b) {
    return make_uint4(first ? a.x : b.x, first ? a.y : b.y, first ? a.z : b.z, first ? a.w : b.w);
}

INLINE float sum_of_warp(float x) {
    for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(~0u, x, lanes);
    return x;
}

// The sum over all threads of a block, given to each of them; ``room`` has a float for each of up to 32 warps.
INLINE float sum_of_block(float x, float* room) {
    x = sum_of_warp(x);
    __syncthreads();  // the last sum's readers are done with room
    if (threadIdx.x % 32 == 0) room[threadIdx.x / 32] = x;
    __syncthreads();
    return sum_of_warp(threadIdx.x % 32 < blockDim.x / 32 ? room[threadIdx.x % 32] : 0);
}

// The kernels of a recorded step start before the one before has ended, as cupy_kernels.py asks for, so that launching
// costs less. This lets the next one start, and waits for the end of the one before: each kernel calls it before it
// reads or writes what others write or read.
INLINE void take_turn() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// How many places of a sequence are filled: read from the device's memory when a recorded graph must find out each
// time it runs (``position`` then is not null), else as the host said.
INLINE int filled(const int* position, int said) { return position ? *position : said; }
