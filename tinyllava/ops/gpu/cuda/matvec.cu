// linear and linears of reference.py for one token: y = W x + b, straight from W's blocks.
//
// The time is that of reading W once. A warp makes ROWS outputs at a time: its lanes read pieces of 16 bytes side by
// side, a few STEPS of 32 pieces at once and always one such group ahead of the arithmetic, and add up their shares at
// the end. Small integers are multiplied as integers, four at a time (dp4a): x is written, for each unit of 16
// numbers, as
//
//     x[i] = scale * (256 * high[i] + low[i]),      high -128..127, low 0..255, |256 high + low| <= 32767,
//
// an error of at most 2^-16 of the unit's largest number; half precision errs by up to 2^-12 of each. Sums of a
// unit's products are then exact. It lies in the block's shared memory:
//
//     | 16 highs | 16 highs | ... |   | 16 lows | 16 lows | ... |   | scale, sum of 16 | ... |
//
// Floats are multiplied as floats.

const int WARPS = 16;  // of a block: as many as a processor holds, so that x is staged once for all
const int ROWS = 2;    // that a warp makes at a time, so that x is read from shared memory once for both

// One matrix (rows, d_in) with its bias or null, and where its outputs go; which of how many blocks makes them.
struct Product {
    const u8* data;
    const float* bias;
    float* y;
    int rows, block, blocks;
};

// ---- quantized weights

// Unit u's place: for every format, the units that 8 neighbouring lanes read lie in different banks.
INLINE int slot(int u) { return u ^ ((u >> 3 & 1) * 7); }

// 1.5 * 2^23: there a float's last digit is 1, so whole numbers counted from its bits on are floats at once.
const float START = 12582912.0f;

INLINE unsigned byte_of_each(float a, float b, float c, float d, int byte) {
    const unsigned selector = byte ? 0x51 : 0x40;  // the second bytes of two words, or their first
    return __byte_perm(__byte_perm(__float_as_uint(a), __float_as_uint(b), selector),
                       __byte_perm(__float_as_uint(c), __float_as_uint(d), selector), 0x5410);
}

INLINE unsigned dot_high(unsigned q, unsigned x, unsigned sum) {  // unsigned times signed bytes
    asm("dp4a.u32.s32 %0, %1, %2, %0;" : "+r"(sum) : "r"(q), "r"(x));
    return sum;
}

INLINE unsigned dot_low(unsigned q, unsigned x, unsigned sum) {  // unsigned times unsigned bytes
    asm("dp4a.u32.u32 %0, %1, %2, %0;" : "+r"(sum) : "r"(q), "r"(x));
    return sum;
}

// A run times its unit of x, without the scales.
INLINE float dot(const Run& run, uint4 high, uint4 low) {
    unsigned h = __float_as_uint(START), l = h;
    h = dot_high(run.q[0], high.x, h), l = dot_low(run.q[0], low.x, l);
    h = dot_high(run.q[1], high.y, h), l = dot_low(run.q[1], low.y, l);
    h = dot_high(run.q[2], high.z, h), l = dot_low(run.q[2], low.z, l);
    h = dot_high(run.q[3], high.w, h), l = dot_low(run.q[3], low.w, l);
    return 256 * (__uint_as_float(h) - START) + (__uint_as_float(l) - START);
}

template <int FORMAT> struct Quantized {
    typedef Quant<FORMAT> Q;
    typedef typename Q::Raw Raw;
    typedef typename Q::Cursor Cursor;
    static const int STEPS = sizeof(Raw) > 32 ? 1 : 2;
    static INLINE int padded(int d_in) { return (d_in + 127) / 128 * 128; }  // slot() moves units within 128 numbers
    static INLINE int pieces(int d_in) { return d_in / Q::SIZE * Q::PIECES; }
    static INLINE Cursor begin(const Product& p, int d_in, int row, int lane) {
        const size_t blocks = d_in / Q::SIZE;
        return Q::begin({p.data, p.rows * blocks}, row * blocks + lane / Q::PIECES, lane % Q::PIECES);
    }
    static INLINE Raw load(const Cursor& c, int step) { return Q::load(c, step); }

    // x (d_in,) into shared memory as integers. Four threads make a unit, 4 numbers each; d_in is a multiple of 32.
    static INLINE void stage(const float* x, int d_in, char* room) {
        unsigned* high = (unsigned*)room;
        unsigned* low = high + padded(d_in) / 4;
        float2* info = (float2*)(low + padded(d_in) / 4);
        for (int i = threadIdx.x; i < d_in / 4; i += 32 * WARPS) {
            const float4 v = ((const float4*)x)[i];
            float most = fmaxf(fmaxf(fabsf(v.x), fabsf(v.y)), fmaxf(fabsf(v.z), fabsf(v.w)));
            const unsigned lanes = __activemask();
            most = fmaxf(most, __shfl_xor_sync(lanes, most, 1));
            most = fmaxf(fmaxf(most, __shfl_xor_sync(lanes, most, 2)), 1e-30f);
            const float inverse = __fdividef(32767.0f, most);
            // Added to START, a number's last 16 bits are those of the whole number that is nearest.
            const float a = v.x * inverse + START, b = v.y * inverse + START;
            const float c = v.z * inverse + START, d = v.w * inverse + START;
            float sum = (a - START) + (b - START) + (c - START) + (d - START);
            sum += __shfl_xor_sync(lanes, sum, 1);
            sum += __shfl_xor_sync(lanes, sum, 2);
            const int u = slot(i / 4), at = 4 * u + i % 4;
            high[at] = byte_of_each(a, b, c, d, 1), low[at] = byte_of_each(a, b, c, d, 0);
            const float scale = most * (1 / 32767.0f);
            if (i % 4 == 0) info[u] = make_float2(scale, scale * sum);
        }
    }

    // sum[r] += this lane's piece of row r, of the ``step``th 32 pieces, times x.
    static INLINE void add(const Raw* raw, int step, int lane, int d_in, const char* room, float* sum) {
        Piece<Q::RUNS> piece[ROWS];
        float a[ROWS] = {}, b[ROWS] = {};
#pragma unroll
        for (int r = 0; r < ROWS; r++) Q::unpack(raw[r], lane % Q::PIECES, piece[r]);
#pragma unroll
        for (int i = 0; i < Q::RUNS; i++) {
            const int u = slot(Q::unit(lane, i)) + step * (32 * Q::RUNS);
            const uint4 high = ((const uint4*)room)[u], low = ((const uint4*)(room + padded(d_in)))[u];
            const float2 info = ((const float2*)(room + 2 * padded(d_in)))[u];
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                const Run& run = piece[r].run[i];
                float product = info.x * dot(run, high, low);
                if (Q::OFFSET) product -= Q::OFFSET * info.y;
                a[r] += run.s * product;
                if (Q::MINIMUM) b[r] += run.m * info.y;
            }
        }
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            sum[r] += piece[r].d * a[r];
            if (Q::MINIMUM) sum[r] -= piece[r].dmin * b[r];
        }
    }
};

// ---- floats: a piece is 8 halves or 4 floats; d_in is a multiple of 8

INLINE float times(float4 x, float a, float b, float c, float d) { return x.x * a + x.y * b + x.z * c + x.w * d; }

template <int FORMAT> struct Floating {
    static const int SIZE = FORMAT == F16 ? 8 : 4;
    typedef uint4 Raw;
    typedef const u8* Cursor;
    static const int STEPS = 4;
    static INLINE int pieces(int d_in) { return d_in / SIZE; }
    static INLINE Cursor begin(const Product& p, int d_in, int row, int lane) {
        return p.data + ((size_t)row * (d_in / SIZE) + lane) * 16;
    }
    static INLINE Raw load(const Cursor& c, int step) { return load_once(c + step * 512); }

    // x (d_in,) into shared memory by fours: of halves, first all first fours of a piece, then all second ones, so
    // that neighbouring lanes read neighbouring 16 bytes.
    static INLINE void stage(const float* x, int d_in, char* room) {
        for (int i = threadIdx.x; i < d_in / 4; i += 32 * WARPS)
            ((float4*)room)[FORMAT == F16 ? i % 2 * (d_in / 8) + i / 2 : i] = ((const float4*)x)[i];
    }

    static INLINE void add(const Raw* raw, int step, int lane, int d_in, const char* room, float* sum) {
        const int t = lane + 32 * step;
        const float4 x = ((const float4*)room)[t];
        if (FORMAT == F16) {
            const float4 more = ((const float4*)room)[d_in / 8 + t];
#pragma unroll
            for (int r = 0; r < ROWS; r++)
                sum[r] += times(x, to_float(raw[r].x & 0xffff), to_float(raw[r].x >> 16), to_float(raw[r].y & 0xffff),
                                to_float(raw[r].y >> 16)) +
                          times(more, to_float(raw[r].z & 0xffff), to_float(raw[r].z >> 16),
                                to_float(raw[r].w & 0xffff), to_float(raw[r].w >> 16));
        } else {
#pragma unroll
            for (int r = 0; r < ROWS; r++)
                sum[r] += times(x, __uint_as_float(raw[r].x), __uint_as_float(raw[r].y), __uint_as_float(raw[r].z),
                                __uint_as_float(raw[r].w));
        }
    }
};

// ---- all formats

// This lane's pieces of a few rows, of STEPS times 32 pieces.
template <class Format> struct Group {
    typename Format::Raw raw[Format::STEPS][ROWS];

    INLINE void load(const typename Format::Cursor* at, int step, int lane, int pieces) {
#pragma unroll
        for (int i = 0; i < Format::STEPS; i++)
            if ((step + i) * 32 + lane < pieces)
#pragma unroll
                for (int r = 0; r < ROWS; r++) raw[i][r] = Format::load(at[r], step + i);
    }

    INLINE void add(int step, int lane, int pieces, int d_in, const char* room, float* sum) const {
#pragma unroll
        for (int i = 0; i < Format::STEPS; i++)
            if ((step + i) * 32 + lane < pieces) Format::add(raw[i], step + i, lane, d_in, room, sum);
    }
};

// The rows of one product: a block's warps take ROWS each, and then those that all blocks' warps have left.
template <class Format> INLINE void multiply(const Product& p, const float* x, int d_in, char* room) {
    const int lane = threadIdx.x % 32, pieces = Format::pieces(d_in), stride = p.blocks * WARPS * ROWS;
    typename Format::Cursor at[ROWS];
    auto begin = [&](int row) {
#pragma unroll
        for (int r = 0; r < ROWS; r++) at[r] = Format::begin(p, d_in, min(row + r, p.rows - 1), lane);
    };
    int row = (p.block * WARPS + threadIdx.x / 32) * ROWS, step = 0;
    Group<Format> next;
    begin(row);
    next.load(at, 0, lane, pieces);
    take_turn();  // the weights are nobody's to write: they may be asked for before
    Format::stage(x, d_in, room);
    __syncthreads();
    float sum[ROWS] = {};
#pragma unroll 2
    while (row < p.rows) {
        const Group<Format> now = next;
        const int this_row = row, this_step = step;
        step += Format::STEPS;
        if (step * 32 >= pieces) step = 0, row += stride, begin(row);
        if (row < p.rows) next.load(at, step, lane, pieces);
        now.add(this_step, lane, pieces, d_in, room, sum);
        if (step > 0) continue;
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const float y = sum_of_warp(sum[r]);
            const int to = this_row + r;
            if (lane == 0 && to < p.rows) p.y[to] = y + (p.bias ? p.bias[to] : 0);
            sum[r] = 0;
        }
    }
}

// Up to three products of the same x (d_in,), as of queries, keys and values, their outputs one after another in y;
// the grid's first blocks0 blocks make the first product. Shared memory: 4 bytes for each number of x.
KERNEL __launch_bounds__(32 * WARPS, 1) void matvec(
    const float* x, int d_in, float* y,
    const u8* data0, const float* bias0, int rows0, int format0, int blocks0,
    const u8* data1, const float* bias1, int rows1, int format1, int blocks1,
    const u8* data2, const float* bias2, int rows2, int format2, int blocks2) {
    extern __shared__ __align__(16) char room[];
    int block = blockIdx.x, format = format0;
    Product p = {data0, bias0, y, rows0, block, blocks0};
    if (block >= blocks0 + blocks1) {
        p = {data2, bias2, y + rows0 + rows1, rows2, block - blocks0 - blocks1, blocks2}, format = format2;
    } else if (block >= blocks0) {
        p = {data1, bias1, y + rows0, rows1, block - blocks0, blocks1}, format = format1;
    }
    if (format == F32) multiply<Floating<F32>>(p, x, d_in, room);
    if (format == F16) multiply<Floating<F16>>(p, x, d_in, room);
    if (format == Q4_0) multiply<Quantized<Q4_0>>(p, x, d_in, room);
    if (format == Q8_0) multiply<Quantized<Q8_0>>(p, x, d_in, room);
    if (format == Q4_K) multiply<Quantized<Q4_K>>(p, x, d_in, room);
    if (format == Q5_K) multiply<Quantized<Q5_K>>(p, x, d_in, room);
    if (format == Q6_K) multiply<Quantized<Q6_K>>(p, x, d_in, room);
}
