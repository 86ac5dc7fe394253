// linear and linears of reference.py for one token: y = W x + b, with W read in its file's blocks.
//
// The time is that of reading W once. A warp computes MATVEC_ROWS outputs at a time. Its 32 lanes load 32
// neighbouring 16-byte vectors (blocks.cu), a *chunk* of the row; a few CHUNKS are loaded at once, always before
// the arithmetic on the chunks loaded earlier, and the lanes' sums are added at the row's end.
//
// Quantized weights are multiplied as integers, four at a time (dp4a), by x quantized to 16 bits. For a group of
// 16 weights (Group in blocks.cu) and the 16 numbers of x that it multiplies:
//
//     w[i] = d * s * (q[i] - Q_OFFSET) - dmin * m
//     x[i] = x_scale * (256 * high[i] + low[i]),      high -128..127, low 0..255, |256 high + low| <= 32767
//     dot = 256 * (sum of q[i] * high[i]) + (sum of q[i] * low[i]),      x_sum = sum of x[i]
//     sum of w[i] * x[i] = d * s * (x_scale * dot - Q_OFFSET * x_sum) - dmin * m * x_sum
//
// Quantizing x errs by about 2^-16 of the group's largest number at most; rounding it to float16 would err by up
// to 2^-11 of each number. The two sums in dot are exact; dot itself may exceed 2^24 and is then rounded to a
// float. The quantized x lies in the thread block's shared memory:
//
//     | 16 highs | 16 highs | ... |   | 16 lows | 16 lows | ... |   | x_scale, x_sum | x_scale, x_sum | ... |
//
// F32 and F16 weights are multiplied as floats.
//
// MATVEC_ROWS, MATVEC_WARPS and the formats' names are generated: header() in constants.py, put before all
// sources. KERNEL, load_once and other basics: common.cu, the next in order; Quant and Group: blocks.cu.

// One matrix (rows, d_in) with its bias or null, and where its outputs go. This is thread block ``block`` of the
// ``blocks`` that compute them.
struct Product {
    const u8* data;
    const float* bias;
    float* y;
    int rows, block, blocks;
};

// ---- quantized weights

// Where group ``g`` of x lies: permuted so that the groups that 8 neighbouring lanes read, in every format, are in
// different banks of shared memory.
INLINE int swizzle(int g) { return g ^ ((g >> 3 & 1) * 7); }

// 1.5 * 2^23: the last bit of a float from 2^23 to 2^24 is worth 1. So for integers n below 2^22 in magnitude
// (here at most 255 * 255 * 16, in dot), the bits of the float ROUNDER + n are those of ROUNDER plus n. Adding
// ROUNDER rounds a number to an integer, which then stands in the lower bits; and integers added to ROUNDER's bits
// give a float without a conversion.
const float ROUNDER = 12582912.0f;

// Byte 1 (the high ones) or byte 0 (the low ones) of each of four floats' bits.
INLINE unsigned byte_of_each(float a, float b, float c, float d, int byte) {
    const unsigned selector = byte ? 0x51 : 0x40;
    return __byte_perm(__byte_perm(__float_as_uint(a), __float_as_uint(b), selector),
                       __byte_perm(__float_as_uint(c), __float_as_uint(d), selector), 0x5410);
}

INLINE unsigned dot_high(unsigned q, unsigned x, unsigned sum) {  // unsigned times signed bytes
    asm("dp4a.u32.s32 %0, %1, %2, %0;" : "+r"(sum) : "r"(q), "r"(x));
    return sum;
}

INLINE unsigned dot_low(unsigned q, unsigned x, unsigned sum) { return __dp4a(q, x, sum); }  // unsigned bytes

// dot, as defined at the top: a group of weights times its group of x, without scales, offset and minimum.
INLINE float dot(const Group& group, uint4 high, uint4 low) {
    const unsigned highs[4] = {high.x, high.y, high.z, high.w}, lows[4] = {low.x, low.y, low.z, low.w};
    unsigned h = __float_as_uint(ROUNDER), l = h;
    UNROLL for (int i = 0; i < 4; i++) h = dot_high(group.q[i], highs[i], h), l = dot_low(group.q[i], lows[i], l);
    return 256 * (__uint_as_float(h) - ROUNDER) + (__uint_as_float(l) - ROUNDER);
}

template <int FORMAT> struct QuantizedWeights {
    typedef Quant<FORMAT> Q;
    typedef typename Q::Raw Raw;
    typedef typename Q::Cursor Cursor;
    static const int CHUNKS = sizeof(Raw) > 32 ? 1 : 2;
    static INLINE int padded(int d_in) { return (d_in + 127) / 128 * 128; }  // swizzle() permutes within 8 groups
    static INLINE int vectors(int d_in) { return d_in / Q::SIZE * Q::VECTORS; }
    static INLINE Cursor begin(const Product& p, int d_in, int row, int lane) {
        const size_t blocks = d_in / Q::SIZE;
        return Q::begin({p.data, p.rows * blocks}, row * blocks + lane / Q::VECTORS, lane % Q::VECTORS);
    }
    static INLINE Raw load(const Cursor& c, int chunk) { return Q::load(c, chunk); }

    // x (d_in,), d_in a multiple of 32, quantized into shared memory. Four threads share a group, 4 numbers each.
    // A NaN is dropped by fmaxf and its high and low are meaningless, but x_sum becomes NaN, and with it the
    // outputs, as each format has an offset or a minimum, which x_sum is multiplied by.
    static INLINE void stage(const float* x, int d_in, char* shared) {
        unsigned* high = (unsigned*)shared;
        unsigned* low = high + padded(d_in) / 4;
        float2* info = (float2*)(low + padded(d_in) / 4);  // x_scale, x_sum
        for (int i = threadIdx.x; i < d_in / 4; i += 32 * MATVEC_WARPS) {
            const float4 v = ((const float4*)x)[i];
            float largest = fmaxf(fmaxf(fabsf(v.x), fabsf(v.y)), fmaxf(fabsf(v.z), fabsf(v.w)));
            const unsigned lanes = __activemask();
            largest = fmaxf(largest, __shfl_xor_sync(lanes, largest, 1));
            largest = fmaxf(fmaxf(largest, __shfl_xor_sync(lanes, largest, 2)), 1e-30f);  // for all zeros
            const float inverse = __fdividef(32767.0f, largest);
            const float a = v.x * inverse + ROUNDER, b = v.y * inverse + ROUNDER;
            const float c = v.z * inverse + ROUNDER, d = v.w * inverse + ROUNDER;
            float sum = (a - ROUNDER) + (b - ROUNDER) + (c - ROUNDER) + (d - ROUNDER);
            sum += __shfl_xor_sync(lanes, sum, 1);
            sum += __shfl_xor_sync(lanes, sum, 2);
            const int g = swizzle(i / 4), at = 4 * g + i % 4;
            high[at] = byte_of_each(a, b, c, d, 1), low[at] = byte_of_each(a, b, c, d, 0);
            const float x_scale = largest * (1 / 32767.0f);
            if (i % 4 == 0) info[g] = make_float2(x_scale, x_scale * sum);
        }
    }

    // sum[r] += this lane's vector of row r, of a chunk, times x.
    static INLINE void add(const Raw* raw, int chunk, int lane, int d_in, const char* shared, float* sum) {
        Unpacked<Q::GROUPS> v[MATVEC_ROWS];
        float a[MATVEC_ROWS] = {}, b[MATVEC_ROWS] = {};
        UNROLL for (int r = 0; r < MATVEC_ROWS; r++) Q::unpack(raw[r], lane % Q::VECTORS, v[r]);
        UNROLL for (int i = 0; i < Q::GROUPS; i++) {
            // swizzle() permutes groups within 16, so a chunk's offset, a multiple of 32, may be added after it.
            const int g = swizzle(Q::group(lane, i)) + chunk * (32 * Q::GROUPS);
            const uint4 high = ((const uint4*)shared)[g], low = ((const uint4*)(shared + padded(d_in)))[g];
            const float2 info = ((const float2*)(shared + 2 * padded(d_in)))[g];
            const float x_scale = info.x, x_sum = info.y;
            UNROLL for (int r = 0; r < MATVEC_ROWS; r++) {
                const Group& group = v[r].group[i];
                float product = x_scale * dot(group, high, low);
                if (Q::Q_OFFSET) product -= Q::Q_OFFSET * x_sum;
                a[r] += group.s * product;
                if (Q::MINIMUM) b[r] += group.m * x_sum;
            }
        }
        UNROLL for (int r = 0; r < MATVEC_ROWS; r++) {
            sum[r] += v[r].d * a[r];
            if (Q::MINIMUM) sum[r] -= v[r].dmin * b[r];
        }
    }
};

// ---- F32 and F16 weights: 4 or 8 in a vector; d_in is a multiple of 8

INLINE float dot4(float4 x, const float* w) { return x.x * w[0] + x.y * w[1] + x.z * w[2] + x.w * w[3]; }

template <class Vector> struct FloatWeights {
    typedef uint4 Raw;
    typedef const u8* Cursor;
    static const int CHUNKS = 4;
    static INLINE int vectors(int d_in) { return d_in / Vector::COUNT; }
    static INLINE Cursor begin(const Product& p, int d_in, int row, int lane) {
        return p.data + ((size_t)row * vectors(d_in) + lane) * 16;
    }
    static INLINE Raw load(const Cursor& c, int chunk) { return load_once(c + chunk * 512); }

    // x (d_in,) into shared memory, 4 numbers at a time: for F16 first all vectors' first four, then all vectors'
    // last four, so that neighbouring lanes read neighbouring 16 bytes.
    static INLINE void stage(const float* x, int d_in, char* shared) {
        for (int i = threadIdx.x; i < d_in / 4; i += 32 * MATVEC_WARPS)
            ((float4*)shared)[Vector::COUNT == 8 ? i % 2 * (d_in / 8) + i / 2 : i] = ((const float4*)x)[i];
    }

    static INLINE void add(const Raw* raw, int chunk, int lane, int d_in, const char* shared, float* sum) {
        const int t = lane + 32 * chunk;
        UNROLL for (int r = 0; r < MATVEC_ROWS; r++) {
            float w[Vector::COUNT];
            Vector::unpack(raw[r], w);
            float product = dot4(((const float4*)shared)[t], w);
            if (Vector::COUNT == 8) product += dot4(((const float4*)shared)[d_in / 8 + t], w + 4);
            sum[r] += product;
        }
    }
};

// ---- all formats

// The vectors that this lane has loaded ahead: of MATVEC_ROWS rows, CHUNKS chunks from ``chunk`` on.
template <class Weights> struct Prefetch {
    typename Weights::Raw raw[Weights::CHUNKS][MATVEC_ROWS];

    INLINE void load(const typename Weights::Cursor* at, int chunk, int lane, int vectors) {
        UNROLL for (int i = 0; i < Weights::CHUNKS; i++)
            if ((chunk + i) * 32 + lane < vectors)
                UNROLL for (int r = 0; r < MATVEC_ROWS; r++) raw[i][r] = Weights::load(at[r], chunk + i);
    }

    INLINE void add(int chunk, int lane, int vectors, int d_in, const char* shared, float* sum) const {
        UNROLL for (int i = 0; i < Weights::CHUNKS; i++)
            if ((chunk + i) * 32 + lane < vectors) Weights::add(raw[i], chunk + i, lane, d_in, shared, sum);
    }
};

// The rows of one product: the warps of its thread blocks take MATVEC_ROWS rows each, again and again, to the end.
template <class Weights> INLINE void multiply(const Product& p, const float* x, int d_in, char* shared) {
    const int lane = threadIdx.x % 32, vectors = Weights::vectors(d_in);
    const int stride = p.blocks * MATVEC_WARPS * MATVEC_ROWS;
    typename Weights::Cursor at[MATVEC_ROWS];
    auto begin = [&](int row) {
        UNROLL for (int r = 0; r < MATVEC_ROWS; r++)
            at[r] = Weights::begin(p, d_in, min(row + r, p.rows - 1), lane);
    };
    int row = (p.block * MATVEC_WARPS + threadIdx.x / 32) * MATVEC_ROWS, chunk = 0;
    Prefetch<Weights> next;
    begin(row);
    next.load(at, 0, lane, vectors);
    await_previous_kernel();  // no kernel writes weights: they may be loaded before
    Weights::stage(x, d_in, shared);
    __syncthreads();
    float sum[MATVEC_ROWS] = {};
#pragma unroll 2
    while (row < p.rows) {
        const Prefetch<Weights> now = next;
        const int this_row = row, this_chunk = chunk;
        chunk += Weights::CHUNKS;
        if (chunk * 32 >= vectors) chunk = 0, row += stride, begin(row);
        if (row < p.rows) next.load(at, chunk, lane, vectors);
        now.add(this_chunk, lane, vectors, d_in, shared, sum);
        if (chunk > 0) continue;
        UNROLL for (int r = 0; r < MATVEC_ROWS; r++) {
            const float y = sum_of_warp(sum[r]);
            const int to = this_row + r;
            if (lane == 0 && to < p.rows) p.y[to] = y + (p.bias ? p.bias[to] : 0);
            sum[r] = 0;
        }
    }
}

// Up to three products of the same x (d_in,), as of queries, keys and values, their outputs one after another in
// y; the grid's first blocks0 thread blocks compute the first product. Shared memory: as much as the quantized x
// takes (above), or 4 bytes for each number of x where the weights are floats.
KERNEL __launch_bounds__(32 * MATVEC_WARPS, 1) void matvec(
    const float* x, int d_in, float* y,
    const u8* data0, const float* bias0, int rows0, int format0, int blocks0,
    const u8* data1, const float* bias1, int rows1, int format1, int blocks1,
    const u8* data2, const float* bias2, int rows2, int format2, int blocks2) {
    int block = blockIdx.x, format = format0;
    Product p = {data0, bias0, y, rows0, block, blocks0};
    if (block >= blocks0 + blocks1) {
        p = {data2, bias2, y + rows0 + rows1, rows2, block - blocks0 - blocks1, blocks2}, format = format2;
    } else if (block >= blocks0) {
        p = {data1, bias1, y + rows0, rows1, block - blocks0, blocks1}, format = format1;
    }
    if (format == F32) multiply<FloatWeights<Float32x4>>(p, x, d_in, dynamic_shared);
    if (format == F16) multiply<FloatWeights<Float16x8>>(p, x, d_in, dynamic_shared);
#define MULTIPLY(FORMAT) if (format == FORMAT) multiply<QuantizedWeights<FORMAT>>(p, x, d_in, dynamic_shared);
    FOR_EACH_QUANTIZED_FORMAT(MULTIPLY)
}
