// GGUF's blocks of quantized weights, read 16 bytes at a time (layouts: quant/plain.py).
//
// A *piece* is the 16 bytes of small numbers that one thread reads: one or two *runs* of 16 neighbouring weights,
//
//     w[i] = d * (q[i] - offset) - m,      q 16 bytes in 4 words, d and m one number each for a run.
//
// Formats whose blocks are a multiple of 16 bytes lie on the device as in the file. The others' fields lie apart, all
// blocks' first field, then all blocks' second one (upload.py), so that 16 bytes can be loaded at once:
//
//     Q4_K  | d dmin scales[12] qs[128] |  ...             one block after the other, 144 bytes
//     Q5_K  | d dmin scales[12] qh[32] qs[128] |  ...                                  176 bytes
//     Q6_K  | ql[128] | ql[128] ...  | qh[64] | qh[64] ...  | scales[16] ...  | d ...  210 bytes a block in all
//     Q8_0  | qs[32]  | qs[32]  ...  | d | d ...                                        34
//     Q4_0  | qs[16]  | qs[16]  ...  | d | d ...                                        18

enum Format { F32 = 0, F16 = 1, Q4_0 = 2, Q8_0 = 8, Q4_K = 12, Q5_K = 13, Q6_K = 14 };  // ids of the file format

struct Run {
    unsigned q[4];  // 16 bytes, the first in the lowest bits of q[0]
    float d, m;
};

// Where a matrix lies: ``data``, and how many blocks it has, which tells where each field starts.
struct Blocks {
    const u8* data;
    size_t count;
};

INLINE void nibbles(uint4 bytes, Run& low, Run& high) {
    const unsigned words[4] = {bytes.x, bytes.y, bytes.z, bytes.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        low.q[i] = words[i] & 0x0f0f0f0f;
        high.q[i] = words[i] >> 4 & 0x0f0f0f0f;
    }
}

// Puts ``mask`` of each byte, moved right by ``shift``, on top of 4-bit numbers.
INLINE void more_bits(uint4 bytes, int shift, unsigned mask, Run& run) {
    const unsigned words[4] = {bytes.x, bytes.y, bytes.z, bytes.w};
#pragma unroll
    for (int i = 0; i < 4; i++) run.q[i] |= (words[i] >> shift & mask) << 4;
}

// d, m of sub-blocks 2c and 2c + 1 from the first 16 bytes of a Q4_K or Q5_K block (k_scales in quant/plain.py),
// two 6-bit numbers at a time.
INLINE void k_scales(uint4 head, int c, Run& low, Run& high) {
    const int shift = 16 * (c & 1);
    const unsigned a = head.y >> shift, b = head.z >> shift, rest = head.w >> shift;
    const unsigned s = c < 2 ? a & 0x3f3f : (rest & 0x0f0f) | (a >> 2 & 0x3030);
    const unsigned m = c < 2 ? b & 0x3f3f : (rest >> 4 & 0x0f0f) | (b >> 2 & 0x3030);
    const float d = to_float(head.x & 0xffff), dmin = to_float(head.x >> 16);
    low.d = __fmul_rn(d, s & 0xff), low.m = __fmul_rn(dmin, m & 0xff);
    high.d = __fmul_rn(d, s >> 8 & 0xff), high.m = __fmul_rn(dmin, m >> 8 & 0xff);
}

// For each format: RUNS of a piece, the runs' OFFSET, the units of 16 weights that piece t of a row (whose first
// block is ``block``) stands for, and the piece itself. SWIZZLE: see pack() in matvec.cu.
template <int FORMAT> struct Quant;

template <> struct Quant<Q4_0> {
    static const int RUNS = 2, OFFSET = 8, SIZE = 32, PIECES = 1, SWIZZLE = 1;
    static INLINE int unit(int t, int run) { return 2 * t + run; }
    static INLINE void piece(Blocks w, size_t block, int t, Run* run) {
        nibbles(load_once(w.data + (block + t) * 16), run[0], run[1]);
        const half_t* d = (const half_t*)(w.data + w.count * 16);
        run[0].d = run[1].d = to_float(d[block + t]);
        run[0].m = run[1].m = 0;
    }
};

template <> struct Quant<Q8_0> {
    static const int RUNS = 1, OFFSET = 128, SIZE = 32, PIECES = 2, SWIZZLE = 0;
    static INLINE int unit(int t, int) { return t; }
    static INLINE void piece(Blocks w, size_t block, int t, Run* run) {
        const uint4 q = load_once(w.data + block * 32 + t * 16);
        const unsigned words[4] = {q.x, q.y, q.z, q.w};
#pragma unroll
        for (int i = 0; i < 4; i++) run[0].q[i] = words[i] ^ 0x80808080;  // signed q becomes q + 128
        const half_t* d = (const half_t*)(w.data + w.count * 32);
        run[0].d = to_float(d[block + t / 2]);
        run[0].m = 0;
    }
};

// 128 bytes of nibbles are 4 chunks of 32 bytes; chunk c has sub-block 2c in its low, 2c + 1 in its high nibbles.
// Piece t of a block is half of a chunk.
template <> struct Quant<Q4_K> {
    static const int RUNS = 2, OFFSET = 0, SIZE = 256, PIECES = 8, SWIZZLE = 2;
    static INLINE int unit(int t, int run) { return t / 8 * 16 + t % 8 / 2 * 4 + t % 2 + 2 * run; }
    static INLINE void piece(Blocks w, size_t block, int t, Run* run) {
        const u8* at = w.data + (block + t / 8) * 144;
        nibbles(load_once(at + 16 + t % 8 * 16), run[0], run[1]);
        k_scales(*(const uint4*)at, t % 8 / 2, run[0], run[1]);
    }
};

// As Q4_K; bit i of byte j of qh is the fifth bit of weight j of sub-block i.
template <> struct Quant<Q5_K> {
    static const int RUNS = 2, OFFSET = 0, SIZE = 256, PIECES = 8, SWIZZLE = 2;
    static INLINE int unit(int t, int run) { return Quant<Q4_K>::unit(t, run); }
    static INLINE void piece(Blocks w, size_t block, int t, Run* run) {
        const u8* at = w.data + (block + t / 8) * 176;
        const int c = t % 8 / 2;
        nibbles(load_once(at + 48 + t % 8 * 16), run[0], run[1]);
        const uint4 high = *(const uint4*)(at + 16 + t % 2 * 16);
        more_bits(high, 2 * c, 0x01010101, run[0]);
        more_bits(high, 2 * c + 1, 0x01010101, run[1]);
        k_scales(*(const uint4*)at, c, run[0], run[1]);
    }
};

// 64 bytes of ql hold weights 0..63 of half a block in their low, 64..127 in their high nibbles; 32 bytes of qh
// four planes of 2 bits for the same 128 weights. Each run of 16 has its own scale. Piece t of a block: 16 of ql.
template <> struct Quant<Q6_K> {
    static const int RUNS = 2, OFFSET = 32, SIZE = 256, PIECES = 8, SWIZZLE = 4;
    static INLINE int unit(int t, int run) { return t / 8 * 16 + t % 8 / 4 * 8 + t % 4 + 4 * run; }
    static INLINE void piece(Blocks w, size_t block, int t, Run* run) {
        const size_t b = block + t / 8;
        const int half = t % 8 / 4, r = t % 4;
        nibbles(load_once(w.data + b * 128 + t % 8 * 16), run[0], run[1]);
        const uint4 high = *(const uint4*)(w.data + w.count * 128 + b * 64 + half * 32 + r % 2 * 16);
        more_bits(high, r / 2 * 2, 0x03030303, run[0]);
        more_bits(high, r / 2 * 2 + 4, 0x03030303, run[1]);
        const signed char* scales = (const signed char*)(w.data + w.count * 192 + b * 16);
        const float d = to_float(((const half_t*)(w.data + w.count * 208))[b]);
        run[0].d = __fmul_rn(d, scales[half * 8 + r]), run[1].d = __fmul_rn(d, scales[half * 8 + 4 + r]);
        run[0].m = run[1].m = 0;
    }
};

// The weights of a run, rounded as the reference rounds them.
template <int FORMAT> INLINE void weights_of(const Run& run, float* w) {
#pragma unroll
    for (int i = 0; i < 16; i++) {
        const int q = (run.q[i / 4] >> (8 * (i % 4)) & 0xff) - Quant<FORMAT>::OFFSET;
        w[i] = __fsub_rn(__fmul_rn(run.d, q), run.m);
    }
}

// ---- dequantizing: dequantize() in quant/, to half precision for the matrix units

template <int FORMAT> INLINE void dequantize_pieces(Blocks w, size_t first, size_t count, half_t* y) {
    typedef Quant<FORMAT> Q;
    const size_t stride = (size_t)gridDim.x * blockDim.x;
    for (size_t t = (size_t)blockIdx.x * blockDim.x + threadIdx.x; t < count * Q::PIECES; t += stride) {
        Run run[Q::RUNS];
        const size_t block = t / Q::PIECES;
        Q::piece(w, first + block, t % Q::PIECES, run);
#pragma unroll
        for (int i = 0; i < Q::RUNS; i++) {
            float f[16];
            weights_of<FORMAT>(run[i], f);
            uint4* to = (uint4*)(y + block * Q::SIZE + Q::unit(t % Q::PIECES, i) * 16);
            to[0] = make_uint4(to_halves(f[0], f[1]), to_halves(f[2], f[3]), to_halves(f[4], f[5]),
                               to_halves(f[6], f[7]));
            to[1] = make_uint4(to_halves(f[8], f[9]), to_halves(f[10], f[11]), to_halves(f[12], f[13]),
                               to_halves(f[14], f[15]));
        }
    }
}

// Blocks first .. first + count of a matrix -> y (count * block size) in half precision.
KERNEL void dequantize(const u8* data, size_t n_blocks, int format, size_t first, size_t count, half_t* y) {
    const Blocks w = {data, n_blocks};
    if (format == Q4_0) dequantize_pieces<Q4_0>(w, first, count, y);
    if (format == Q8_0) dequantize_pieces<Q8_0>(w, first, count, y);
    if (format == Q4_K) dequantize_pieces<Q4_K>(w, first, count, y);
    if (format == Q5_K) dequantize_pieces<Q5_K>(w, first, count, y);
    if (format == Q6_K) dequantize_pieces<Q6_K>(w, first, count, y);
}

// ---- embed in reference.py: rows ``ids`` of a table (n_vocab, d) -> y (n, d). One block for each row.

template <int FORMAT> INLINE void embed_row(Blocks w, int id, int d, float* y) {
    typedef Quant<FORMAT> Q;
    for (int t = threadIdx.x; t < d / Q::SIZE * Q::PIECES; t += blockDim.x) {
        Run run[Q::RUNS];
        Q::piece(w, (size_t)id * (d / Q::SIZE), t, run);
#pragma unroll
        for (int i = 0; i < Q::RUNS; i++) {
            float f[16];
            weights_of<FORMAT>(run[i], f);
#pragma unroll
            for (int j = 0; j < 16; j++) y[Q::unit(t, i) * 16 + j] = f[j];
        }
    }
}

KERNEL void embed(const u8* data, size_t n_blocks, int format, const int* ids, int d, float* y) {
    const Blocks w = {data, n_blocks};
    const int id = ids[blockIdx.x];
    y += (size_t)blockIdx.x * d;
    if (format == F32)
        for (int i = threadIdx.x; i < d; i += blockDim.x) y[i] = ((const float*)data)[(size_t)id * d + i];
    if (format == F16)
        for (int i = threadIdx.x; i < d; i += blockDim.x) y[i] = to_float(((const half_t*)data)[(size_t)id * d + i]);
    if (format == Q4_0) embed_row<Q4_0>(w, id, d, y);
    if (format == Q8_0) embed_row<Q8_0>(w, id, d, y);
    if (format == Q4_K) embed_row<Q4_K>(w, id, d, y);
    if (format == Q5_K) embed_row<Q5_K>(w, id, d, y);
    if (format == Q6_K) embed_row<Q6_K>(w, id, d, y);
}
