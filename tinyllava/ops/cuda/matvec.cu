// linear and linears of reference.py for one token: y = W x + b, straight from W's blocks.
//
// The time is that of reading W once. A warp makes ROWS outputs: its lanes read pieces of 16 bytes side by side and
// add up their shares at the end. Small integers are multiplied as integers, four at a time (dp4a): x is written, for
// each unit of 16 numbers, as
//
//     x[i] = scale * (256 * high[i] + low[i]),      high -128..127, low 0..255, |256 high + low| <= 32767,
//
// an error of at most 2^-16 of the unit's largest number; half precision errs by up to 2^-12 of each. Products and
// sums of a unit are then exact. The numbers of one unit and its scale are in the block's shared memory:
//
//     | 16 highs | 16 highs | ... |   | 16 lows | 16 lows | ... |   | scale, sum of 16 | ... |
//
// Floats are multiplied as floats.

const int WARPS = 8;   // of a block
const int ROWS = 2;    // that a warp makes at a time, so that x is read from shared memory once for both
const int UNROLL = 4;  // pieces of each row that a lane asks for before it uses the first

// One matrix (rows, d_in) with its blocks' count, its bias or null, and where its outputs go.
struct Product {
    const u8* data;
    const float* bias;
    float* y;
    int rows, format;
};

// Unit u's place: pieces of 8 neighbouring lanes must lie in different banks.
template <int SWIZZLE> INLINE int slot(int u) { return u ^ ((u >> 3 & 1) * SWIZZLE); }

INLINE unsigned byte_of_each(int a, int b, int c, int d, int byte) {
    const unsigned selector = byte ? 0x51 : 0x40;  // the second bytes of two words, or their first
    return __byte_perm(__byte_perm(a, b, selector), __byte_perm(c, d, selector), 0x5410);
}

// x (d_in,) into shared memory as integers. Four threads make a unit, 4 numbers each; d_in is a multiple of 32.
template <int SWIZZLE> INLINE void pack(const float* x, int d_in, unsigned* high, unsigned* low, float2* info) {
    for (int i = threadIdx.x; i < d_in / 4; i += 32 * WARPS) {
        const float4 v = ((const float4*)x)[i];
        float most = fmaxf(fmaxf(fabsf(v.x), fabsf(v.y)), fmaxf(fabsf(v.z), fabsf(v.w)));
        const unsigned lanes = __activemask();
        most = fmaxf(most, __shfl_xor_sync(lanes, most, 1));
        most = fmaxf(most, __shfl_xor_sync(lanes, most, 2));
        const float scale = most / 32767.0f, inverse = most > 0 ? 32767.0f / most : 0;
        const int a = __float2int_rn(v.x * inverse), b = __float2int_rn(v.y * inverse);
        const int c = __float2int_rn(v.z * inverse), d = __float2int_rn(v.w * inverse);
        int sum = a + b + c + d;
        sum += __shfl_xor_sync(lanes, sum, 1);
        sum += __shfl_xor_sync(lanes, sum, 2);
        const int u = slot<SWIZZLE>(i / 4), at = 4 * u + i % 4;
        high[at] = byte_of_each(a, b, c, d, 1), low[at] = byte_of_each(a, b, c, d, 0);
        if (i % 4 == 0) info[u] = make_float2(scale, sum);
    }
}

INLINE int dot_high(unsigned q, unsigned x, int sum) {  // unsigned times signed bytes
    asm("dp4a.u32.s32 %0, %1, %2, %0;" : "+r"(sum) : "r"(q), "r"(x));
    return sum;
}

INLINE int dot_low(unsigned q, unsigned x, int sum) {  // unsigned times unsigned bytes
    asm("dp4a.u32.u32 %0, %1, %2, %0;" : "+r"(sum) : "r"(q), "r"(x));
    return sum;
}

// One run times its unit of x.
template <int OFFSET> INLINE float times(const Run& run, uint4 high, uint4 low, float2 info) {
    int h = 0, l = 0;
    h = dot_high(run.q[0], high.x, h), l = dot_low(run.q[0], low.x, l);
    h = dot_high(run.q[1], high.y, h), l = dot_low(run.q[1], low.y, l);
    h = dot_high(run.q[2], high.z, h), l = dot_low(run.q[2], low.z, l);
    h = dot_high(run.q[3], high.w, h), l = dot_low(run.q[3], low.w, l);
    const int sum = (int)info.y;
    const int dot = 256 * h + l - OFFSET * sum;
    return info.x * (run.d * dot - run.m * info.y);
}

template <int FORMAT> INLINE void quantized(const Product& p, const float* x, int d_in, int row, int n, char* room) {
    typedef Quant<FORMAT> Q;
    unsigned* high = (unsigned*)room;
    unsigned* low = high + d_in / 4;
    float2* info = (float2*)(low + d_in / 4);
    pack<Q::SWIZZLE>(x, d_in, high, low, info);
    __syncthreads();
    const int lane = threadIdx.x % 32, blocks = d_in / Q::SIZE, pieces = blocks * Q::PIECES;
    const Blocks w = {p.data, (size_t)p.rows * blocks};
    for (; n > 0; n--, row += WARPS * ROWS) {
        float sum[ROWS] = {};
#pragma unroll UNROLL
        for (int t = lane; t < pieces; t += 32) {
            Run run[ROWS][Q::RUNS];
#pragma unroll
            for (int r = 0; r < ROWS; r++)
                Q::piece(w, (size_t)min(row + r, p.rows - 1) * blocks, t, run[r]);
#pragma unroll
            for (int i = 0; i < Q::RUNS; i++) {
                const int u = slot<Q::SWIZZLE>(Q::unit(t, i));
                const uint4 h = ((uint4*)high)[u], l = ((uint4*)low)[u];
                const float2 unit = info[u];
#pragma unroll
                for (int r = 0; r < ROWS; r++) sum[r] += times<Q::OFFSET>(run[r][i], h, l, unit);
            }
        }
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const float y = sum_of_warp(sum[r]);
            if (lane == 0 && row + r < p.rows) p.y[row + r] = y + (p.bias ? p.bias[row + r] : 0);
        }
    }
}

INLINE float times(float4 x, float a, float b, float c, float d) { return x.x * a + x.y * b + x.z * c + x.w * d; }

// The same for floats: a piece is 8 halves or 4 floats. x lies in shared memory as quarters of a piece, first all
// first ones, so that neighbouring lanes read neighbouring 16 bytes. d_in is a multiple of 8.
template <bool HALF> INLINE void floating(const Product& p, const float* x, int d_in, int row, int n, char* room) {
    const int lane = threadIdx.x % 32, pieces = d_in / (HALF ? 8 : 4);
    float4* quarter = (float4*)room;
    for (int i = threadIdx.x; i < d_in / 4; i += 32 * WARPS)
        quarter[HALF ? i % 2 * pieces + i / 2 : i] = ((const float4*)x)[i];
    __syncthreads();
    for (; n > 0; n--, row += WARPS * ROWS) {
        float sum[ROWS] = {};
        const u8* at[ROWS];
#pragma unroll
        for (int r = 0; r < ROWS; r++) at[r] = p.data + (size_t)min(row + r, p.rows - 1) * pieces * 16;
#pragma unroll UNROLL
        for (int t = lane; t < pieces; t += 32) {
            uint4 w[ROWS];
#pragma unroll
            for (int r = 0; r < ROWS; r++) w[r] = load_once(at[r] + (size_t)t * 16);
            const float4 x0 = quarter[t];
            if (HALF) {
                const float4 x1 = quarter[pieces + t];
#pragma unroll
                for (int r = 0; r < ROWS; r++)
                    sum[r] += times(x0, to_float(w[r].x & 0xffff), to_float(w[r].x >> 16), to_float(w[r].y & 0xffff),
                                    to_float(w[r].y >> 16)) +
                              times(x1, to_float(w[r].z & 0xffff), to_float(w[r].z >> 16), to_float(w[r].w & 0xffff),
                                    to_float(w[r].w >> 16));
            } else {
#pragma unroll
                for (int r = 0; r < ROWS; r++)
                    sum[r] += times(x0, __uint_as_float(w[r].x), __uint_as_float(w[r].y), __uint_as_float(w[r].z),
                                    __uint_as_float(w[r].w));
            }
        }
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const float y = sum_of_warp(sum[r]);
            if (lane == 0 && row + r < p.rows) p.y[row + r] = y + (p.bias ? p.bias[row + r] : 0);
        }
    }
}

// Up to three products of the same x (d_in,), as of queries, keys and values, their outputs one after another in y.
// Block i of a product makes rows i * n * WARPS * ROWS and on. Shared memory: 4 bytes for each number of x.
KERNEL __launch_bounds__(32 * WARPS) void matvec(
    const float* x, int d_in, int n, float* y,
    const u8* data0, const float* bias0, int rows0, int format0,
    const u8* data1, const float* bias1, int rows1, int format1,
    const u8* data2, const float* bias2, int rows2, int format2) {
    extern __shared__ __align__(16) char room[];
    const int step = n * WARPS * ROWS;
    int block = blockIdx.x;
    Product p = {data0, bias0, y, rows0, format0};
    const int blocks0 = (rows0 + step - 1) / step, blocks1 = (rows1 + step - 1) / step;
    if (block >= blocks0 + blocks1) {
        block -= blocks0 + blocks1;
        p.data = data2, p.bias = bias2, p.y = y + rows0 + rows1, p.rows = rows2, p.format = format2;
    } else if (block >= blocks0) {
        block -= blocks0;
        p.data = data1, p.bias = bias1, p.y = y + rows0, p.rows = rows1, p.format = format1;
    }
    const int row = block * step + threadIdx.x / 32 * ROWS;
    if (p.format == F32) floating<false>(p, x, d_in, row, n, room);
    if (p.format == F16) floating<true>(p, x, d_in, row, n, room);
    if (p.format == Q4_0) quantized<Q4_0>(p, x, d_in, row, n, room);
    if (p.format == Q8_0) quantized<Q8_0>(p, x, d_in, row, n, room);
    if (p.format == Q4_K) quantized<Q4_K>(p, x, d_in, row, n, room);
    if (p.format == Q5_K) quantized<Q5_K>(p, x, d_in, row, n, room);
    if (p.format == Q6_K) quantized<Q6_K>(p, x, d_in, row, n, room);
}
