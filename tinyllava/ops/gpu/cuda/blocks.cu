// GGUF's blocks of quantized weights, read 16 bytes at a time (layouts: quant/plain.py).
//
// A *piece* is the 16 bytes of small numbers that one thread reads, and what belongs to them: one or two *runs* of 16
// neighbouring weights,
//
//     w[i] = d * s * (q[i] - OFFSET) - dmin * m,      q 16 bytes in 4 words; s, m each run's, d, dmin the block's.
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
    float s, m;
};

template <int RUNS> struct Piece {
    Run run[RUNS];
    float d, dmin;
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

// Byte 0 to 3 of a word as a float: the byte becomes the last digits of 2^23. (Conversions are slow here.)
INLINE float byte_to_float(unsigned word, int byte) {
    return __uint_as_float(__byte_perm(word, 0x4b000000, 0x7440 | byte)) - 8388608.0f;
}

// s and m of sub-blocks 2c and 2c + 1 from the first 16 bytes of a Q4_K or Q5_K block (k_scales in quant/plain.py),
// two 6-bit numbers at a time.
INLINE void k_scales(uint4 head, int c, Piece<2>& y) {
    const int shift = 16 * (c & 1);
    const unsigned a = head.y >> shift, b = head.z >> shift, rest = head.w >> shift;
    const unsigned s = c < 2 ? a & 0x3f3f : (rest & 0x0f0f) | (a >> 2 & 0x3030);
    const unsigned m = c < 2 ? b & 0x3f3f : (rest >> 4 & 0x0f0f) | (b >> 2 & 0x3030);
    y.d = to_float(head.x & 0xffff), y.dmin = to_float(head.x >> 16);
    y.run[0].s = byte_to_float(s, 0), y.run[0].m = byte_to_float(m, 0);
    y.run[1].s = byte_to_float(s, 1), y.run[1].m = byte_to_float(m, 1);
}

// For each format: SIZE weights of a block, in PIECES; the RUNS of a piece, the OFFSET of their numbers and whether they
// have a MINIMUM; which unit of 16 weights run ``i`` of piece t is. begin() finds piece j of a block, load() asks for
// it, or for that of the ``step``th 32 pieces later, and unpack() says what it means.
template <int FORMAT> struct Quant;

template <> struct Quant<Q4_0> {
    static const int RUNS = 2, OFFSET = 8, SIZE = 32, PIECES = 1;
    static const bool MINIMUM = false;
    struct Cursor { const u8* q; const half_t* d; };
    struct Raw { uint4 q; half_t d; };
    static INLINE int unit(int t, int i) { return 2 * t + i; }
    static INLINE Cursor begin(Blocks w, size_t block, int) {
        return {w.data + block * 16, (const half_t*)(w.data + w.count * 16) + block};
    }
    static INLINE Raw load(const Cursor& c, int step) { return {load_once(c.q + step * 512), __ldg(c.d + step * 32)}; }
    static INLINE void unpack(const Raw& raw, int, Piece<2>& y) {
        nibbles(raw.q, y.run[0], y.run[1]);
        y.run[0].s = y.run[1].s = 1, y.d = to_float(raw.d);
    }
};

template <> struct Quant<Q8_0> {
    static const int RUNS = 1, OFFSET = 128, SIZE = 32, PIECES = 2;
    static const bool MINIMUM = false;
    struct Cursor { const u8* q; const half_t* d; };
    struct Raw { uint4 q; half_t d; };
    static INLINE int unit(int t, int) { return t; }
    static INLINE Cursor begin(Blocks w, size_t block, int j) {
        return {w.data + block * 32 + j * 16, (const half_t*)(w.data + w.count * 32) + block};
    }
    static INLINE Raw load(const Cursor& c, int step) { return {load_once(c.q + step * 512), __ldg(c.d + step * 16)}; }
    static INLINE void unpack(const Raw& raw, int, Piece<1>& y) {
        const unsigned words[4] = {raw.q.x, raw.q.y, raw.q.z, raw.q.w};
#pragma unroll
        for (int i = 0; i < 4; i++) y.run[0].q[i] = words[i] ^ 0x80808080;  // signed q becomes q + 128
        y.run[0].s = 1, y.d = to_float(raw.d);
    }
};

// 128 bytes of nibbles are 4 chunks of 32 bytes; chunk c has sub-block 2c in its low, 2c + 1 in its high nibbles.
// Piece j of a block is half of a chunk.
template <> struct Quant<Q4_K> {
    static const int RUNS = 2, OFFSET = 0, SIZE = 256, PIECES = 8, BYTES = 144;
    static const bool MINIMUM = true;
    struct Cursor { const u8 *head, *q; };
    struct Raw { uint4 head, q; };
    static INLINE int unit(int t, int i) { return t / 8 * 16 + t % 8 / 2 * 4 + t % 2 + 2 * i; }
    static INLINE Cursor begin(Blocks w, size_t block, int j) {
        const u8* at = w.data + block * BYTES;
        return {at, at + 16 + j * 16};
    }
    static INLINE Raw load(const Cursor& c, int step) {
        return {__ldg((const uint4*)(c.head + step * (4 * BYTES))), load_once(c.q + step * (4 * BYTES))};
    }
    static INLINE void unpack(const Raw& raw, int j, Piece<2>& y) {
        nibbles(raw.q, y.run[0], y.run[1]);
        k_scales(raw.head, j / 2, y);
    }
};

// As Q4_K; bit i of byte j of qh is the fifth bit of weight j of sub-block i.
template <> struct Quant<Q5_K> {
    static const int RUNS = 2, OFFSET = 0, SIZE = 256, PIECES = 8, BYTES = 176;
    static const bool MINIMUM = true;
    struct Cursor { const u8 *head, *high, *q; };
    struct Raw { uint4 head, high, q; };
    static INLINE int unit(int t, int i) { return Quant<Q4_K>::unit(t, i); }
    static INLINE Cursor begin(Blocks w, size_t block, int j) {
        const u8* at = w.data + block * BYTES;
        return {at, at + 16 + j % 2 * 16, at + 48 + j * 16};
    }
    static INLINE Raw load(const Cursor& c, int step) {
        const int far = step * (4 * BYTES);
        return {__ldg((const uint4*)(c.head + far)), __ldg((const uint4*)(c.high + far)), load_once(c.q + far)};
    }
    static INLINE void unpack(const Raw& raw, int j, Piece<2>& y) {
        nibbles(raw.q, y.run[0], y.run[1]);
        more_bits(raw.high, j / 2 * 2, 0x01010101, y.run[0]);
        more_bits(raw.high, j / 2 * 2 + 1, 0x01010101, y.run[1]);
        k_scales(raw.head, j / 2, y);
    }
};

// 64 bytes of ql hold weights 0..63 of half a block in their low, 64..127 in their high nibbles; 32 bytes of qh
// four planes of 2 bits for the same 128 weights. Each run of 16 has its own scale. Piece j of a block: 16 of ql.
template <> struct Quant<Q6_K> {
    static const int RUNS = 2, OFFSET = 32, SIZE = 256, PIECES = 8;
    static const bool MINIMUM = false;
    struct Cursor { const u8 *q, *high, *scales; const half_t* d; };
    struct Raw { uint4 q, high; u8 s[2]; half_t d; };
    static INLINE int unit(int t, int i) { return t / 8 * 16 + t % 8 / 4 * 8 + t % 4 + 4 * i; }
    static INLINE Cursor begin(Blocks w, size_t block, int j) {
        return {w.data + block * 128 + j * 16,
                w.data + w.count * 128 + block * 64 + j / 4 * 32 + j % 2 * 16,
                w.data + w.count * 192 + block * 16 + j / 4 * 8 + j % 4,
                (const half_t*)(w.data + w.count * 208) + block};
    }
    static INLINE Raw load(const Cursor& c, int step) {
        const u8* scales = c.scales + step * 64;
        return {load_once(c.q + step * 512), __ldg((const uint4*)(c.high + step * 256)),
                {__ldg(scales), __ldg(scales + 4)}, __ldg(c.d + step * 4)};
    }
    static INLINE void unpack(const Raw& raw, int j, Piece<2>& y) {
        const int shift = j % 4 / 2 * 2;
        nibbles(raw.q, y.run[0], y.run[1]);
        more_bits(raw.high, shift, 0x03030303, y.run[0]);
        more_bits(raw.high, shift + 4, 0x03030303, y.run[1]);
        y.run[0].s = byte_to_float(raw.s[0] ^ 0x80, 0) - 128;  // a signed byte
        y.run[1].s = byte_to_float(raw.s[1] ^ 0x80, 0) - 128;
        y.d = to_float(raw.d);
    }
};

// Four weights of a run, from the word that holds their q, rounded as the reference rounds them.
template <int FORMAT, int RUNS> INLINE void weights_of(const Piece<RUNS>& piece, int run, unsigned word, float* w) {
    const float d = __fmul_rn(piece.d, piece.run[run].s);
    const float m = Quant<FORMAT>::MINIMUM ? __fmul_rn(piece.dmin, piece.run[run].m) : 0;
#pragma unroll
    for (int i = 0; i < 4; i++)
        w[i] = __fsub_rn(__fmul_rn(d, byte_to_float(word, i) - Quant<FORMAT>::OFFSET), m);
}

// ---- dequantizing: dequantize() in quant/, to half precision for the matrix units

INLINE uint4 of_neighbour(uint4 v) {
    return make_uint4(__shfl_xor_sync(~0u, v.x, 1), __shfl_xor_sync(~0u, v.y, 1), __shfl_xor_sync(~0u, v.z, 1),
                      __shfl_xor_sync(~0u, v.w, 1));
}

// A run is 32 bytes of halves. Two neighbouring threads write each other's runs by halves, first the one's, then the
// other's: memory takes 32 bytes at a time.
template <int FORMAT> INLINE void dequantize_pieces(Blocks w, size_t first, size_t count, half_t* y) {
    typedef Quant<FORMAT> Q;
    const size_t pieces = count * Q::PIECES, stride = (size_t)gridDim.x * blockDim.x;
    const int odd = threadIdx.x % 2;
    size_t t = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    for (; t - threadIdx.x % 32 < pieces; t += stride) {  // whole warps
        Piece<Q::RUNS> piece;
        const size_t own = min(t, pieces - 1);
        const int j = own % Q::PIECES;
        Q::unpack(Q::load(Q::begin(w, first + own / Q::PIECES, j), 0), j, piece);
#pragma unroll
        for (int i = 0; i < Q::RUNS; i++) {
            uint4 part[2];
#pragma unroll
            for (int k = 0; k < 2; k++) {
                float f[8];
                weights_of<FORMAT>(piece, i, piece.run[i].q[2 * k], f);
                weights_of<FORMAT>(piece, i, piece.run[i].q[2 * k + 1], f + 4);
                part[k] = make_uint4(to_halves(f[0], f[1]), to_halves(f[2], f[3]), to_halves(f[4], f[5]),
                                     to_halves(f[6], f[7]));
            }
            const uint4 other = of_neighbour(pick(odd, part[0], part[1]));  // the even one's second, the odd one's first
#pragma unroll
            for (int k = 0; k < 2; k++) {
                const size_t whose = t - odd + k;
                half_t* to = y + whose / Q::PIECES * Q::SIZE + Q::unit(whose % Q::PIECES, i) * 16 + 8 * odd;
                if (whose < pieces) store_at_once(to, pick(odd == k, part[k], other));
            }
        }
    }
}

// Blocks first .. first + count of a matrix -> y (count * block size) in half precision.
KERNEL void dequantize(const u8* data, size_t n_blocks, int format, size_t first, size_t count, half_t* y) {
    take_turn();
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
        Piece<Q::RUNS> piece;
        const int j = t % Q::PIECES;
        Q::unpack(Q::load(Q::begin(w, (size_t)id * (d / Q::SIZE) + t / Q::PIECES, j), 0), j, piece);
#pragma unroll
        for (int i = 0; i < Q::RUNS; i++) {
            float f[16];
#pragma unroll
            for (int k = 0; k < 4; k++) weights_of<FORMAT>(piece, i, piece.run[i].q[k], f + 4 * k);
#pragma unroll
            for (int k = 0; k < 16; k++) y[Q::unit(t, i) * 16 + k] = f[k];
        }
    }
}

KERNEL void embed(const u8* data, size_t n_blocks, int format, const int* ids, int d, float* y) {
    take_turn();
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
