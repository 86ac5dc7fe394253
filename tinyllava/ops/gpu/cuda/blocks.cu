// GGUF's blocks of quantized weights (quant/plain.py), unpacked 16 bytes at a time; the kernels that use nothing
// else, dequantize and embed.
//
// The formats' names and Layouts and FOR_EACH_QUANTIZED_FORMAT are generated: header() in constants.py, put before
// all sources. KERNEL, INLINE, load_once and other basics: common.cu, the next in order.
//
// A thread loads the packed numbers q by a *vector* of 16 bytes. It holds one or two *groups* of 16 consecutive
// weights that share a scale s and a minimum m; d and dmin are the block's:
//
//     w[i] = d * s * (q[i] - Q_OFFSET) - dmin * m
//
//     a block of Q4_K     | d dmin scales[12] | qs: vector 0 | vector 1 | ... | vector 7 |       144 bytes
//     its vector 0          low nibbles: group 0 (weights 0-15), high nibbles: group 2 (weights 32-47)
//
// Where the fields lie on the device (field_places in constants.py): blocks of a multiple of 16 bytes as in the
// file, other formats as one array per field, so that each vector is aligned.
//
//     Q4_K, 144 bytes    | d dmin scales qs | d dmin scales qs | ...
//     Q6_K, 210 bytes    | ql | ql | ...   | qh | qh | ...   | scales | scales | ...   | d | d | ...

// A quantized matrix: its bytes, and its number of blocks, which tells where the array of each field starts.
struct Blocks {
    const u8* data;
    size_t count;
};

// A field of the blocks. Block b has it at byte count * PLANE + b * STRIDE + FIELD_OFFSET of the matrix.
template <int PLANE, int FIELD_OFFSET, int STRIDE> struct Field {
    static INLINE const u8* of(Blocks w, size_t block) {
        return w.data + w.count * PLANE + block * STRIDE + FIELD_OFFSET;
    }
    // Where the same field of the block ``blocks`` blocks further on is.
    static INLINE const u8* skip(const u8* field, int blocks) { return field + blocks * STRIDE; }
    // The value of that field, if it is a single float16 number.
    static INLINE half_t half(const u8* field, int blocks) {
        return __ldg((const half_t*)field + blocks * (STRIDE / 2));
    }
};

struct Group {  // of 16 weights
    unsigned q[4];  // 16 bytes, the first in the lowest bits of q[0]
    float s, m;
};

template <int GROUPS> struct Unpacked {  // what one vector holds
    Group group[GROUPS];
    float d, dmin;
};

INLINE void unpack_nibbles(uint4 bytes, Group& low, Group& high) {
    const unsigned words[4] = {bytes.x, bytes.y, bytes.z, bytes.w};
    UNROLL for (int i = 0; i < 4; i++) {
        low.q[i] = words[i] & 0x0f0f0f0f;
        high.q[i] = words[i] >> 4 & 0x0f0f0f0f;
    }
}

// The bits above the lower four: ``mask`` of each byte shifted right by ``shift``.
INLINE void add_high_bits(uint4 bytes, int shift, unsigned mask, Group& group) {
    const unsigned words[4] = {bytes.x, bytes.y, bytes.z, bytes.w};
    UNROLL for (int i = 0; i < 4; i++) group.q[i] |= (words[i] >> shift & mask) << 4;
}

// Byte 0 to 3 of a word as a float: put into the mantissa of 2^23, which is then subtracted, as conversion
// instructions are slow.
INLINE float byte_to_float(unsigned word, int byte) {
    return __uint_as_float(__byte_perm(word, 0x4b000000, 0x7440 | byte)) - 8388608.0f;
}

// d, dmin, and s and m of the pair c of sub-blocks (2c and 2c + 1, of 32 weights each), from the first 16 bytes of
// a Q4_K or Q5_K block: d, dmin and 12 bytes of 6-bit scales and minima (k_scales in quant/plain.py). Two 6-bit
// numbers at a time.
INLINE void k_scales(uint4 head, int c, Unpacked<2>& y) {
    const int shift = 16 * (c & 1);
    const unsigned a = head.y >> shift, b = head.z >> shift, rest = head.w >> shift;
    const unsigned s = c < 2 ? a & 0x3f3f : (rest & 0x0f0f) | (a >> 2 & 0x3030);
    const unsigned m = c < 2 ? b & 0x3f3f : (rest >> 4 & 0x0f0f) | (b >> 2 & 0x3030);
    y.d = to_float(head.x & 0xffff), y.dmin = to_float(head.x >> 16);
    y.group[0].s = byte_to_float(s, 0), y.group[0].m = byte_to_float(m, 0);
    y.group[1].s = byte_to_float(s, 1), y.group[1].m = byte_to_float(m, 1);
}

// ---- the formats

// Numbers of a format, besides its Layout (SIZE weights a block, its fields), which constants.py generates.
template <int FORMAT, int GROUPS_, int Q_OFFSET_, bool MINIMUM_> struct Traits : Layout<FORMAT> {
    static const int GROUPS = GROUPS_;  // in a vector
    static const int Q_OFFSET = Q_OFFSET_;  // subtracted from each q
    static const bool MINIMUM = MINIMUM_;  // whether there are dmin and m
    static const int VECTORS = Layout<FORMAT>::SIZE / (16 * GROUPS);  // in a block
    static const int BLOCKS = 32 / VECTORS;  // in a chunk: 32 vectors, one for each lane of a warp
};

// Each format has these functions: group(t, i) is the index, among a row's groups of 16 weights, of group i of the
// row's vector t; begin() finds vector j of a block; load() loads it, or the one ``chunk`` chunks of 32 vectors
// further on; unpack() makes q, s, m, d and dmin of what was loaded.
template <int FORMAT> struct Quant;

// Blocks of 32 weights with a single scale.
template <int FORMAT, int GROUPS, int Q_OFFSET> struct Quant32 : Traits<FORMAT, GROUPS, Q_OFFSET, false> {
    typedef Quant32 Q;
    struct Cursor { const u8 *q, *scale; };
    struct Raw { uint4 q; half_t scale; };
    static INLINE int group(int t, int i) { return GROUPS * t + i; }
    static INLINE Cursor begin(Blocks w, size_t block, int j) {
        return {Q::qs::of(w, block) + j * 16, Q::d::of(w, block)};
    }
    static INLINE Raw load(const Cursor& c, int chunk) {
        return {load_once(Q::qs::skip(c.q, chunk * Q::BLOCKS)), Q::d::half(c.scale, chunk * Q::BLOCKS)};
    }
};

template <> struct Quant<Q4_0> : Quant32<Q4_0, 2, 8> {
    static INLINE void unpack(const Raw& raw, int, Unpacked<2>& y) {
        unpack_nibbles(raw.q, y.group[0], y.group[1]);
        y.group[0].s = y.group[1].s = 1, y.d = to_float(raw.scale);
    }
};

template <> struct Quant<Q8_0> : Quant32<Q8_0, 1, 128> {
    static INLINE void unpack(const Raw& raw, int, Unpacked<1>& y) {
        const unsigned words[4] = {raw.q.x, raw.q.y, raw.q.z, raw.q.w};
        UNROLL for (int i = 0; i < 4; i++) y.group[0].q[i] = words[i] ^ 0x80808080;  // signed q becomes q + 128
        y.group[0].s = 1, y.d = to_float(raw.scale);
    }
};

// 128 bytes of nibbles are 4 times 32 bytes; of the c-th 32, the low nibbles are sub-block 2c of 32 weights and
// the high nibbles sub-block 2c + 1. A vector is half of such 32 bytes.
template <> struct Quant<Q4_K> : Traits<Q4_K, 2, 0, true> {
    struct Cursor { const u8 *head, *q; };
    struct Raw { uint4 head, q; };
    static INLINE int group(int t, int i) { return t / 8 * 16 + t % 8 / 2 * 4 + t % 2 + 2 * i; }
    static INLINE Cursor begin(Blocks w, size_t block, int j) {
        return {d::of(w, block), qs::of(w, block) + j * 16};
    }
    static INLINE Raw load(const Cursor& c, int chunk) {
        return {__ldg((const uint4*)d::skip(c.head, chunk * BLOCKS)), load_once(qs::skip(c.q, chunk * BLOCKS))};
    }
    static INLINE void unpack(const Raw& raw, int j, Unpacked<2>& y) {
        unpack_nibbles(raw.q, y.group[0], y.group[1]);
        k_scales(raw.head, j / 2, y);
    }
};

// As Q4_K; bit i of byte j of qh is the fifth bit of weight j of sub-block i.
template <> struct Quant<Q5_K> : Traits<Q5_K, 2, 0, true> {
    struct Cursor { const u8 *head, *high, *q; };
    struct Raw { uint4 head, high, q; };
    static INLINE int group(int t, int i) { return Quant<Q4_K>::group(t, i); }
    static INLINE Cursor begin(Blocks w, size_t block, int j) {
        return {d::of(w, block), qh::of(w, block) + j % 2 * 16, qs::of(w, block) + j * 16};
    }
    static INLINE Raw load(const Cursor& c, int chunk) {
        return {__ldg((const uint4*)d::skip(c.head, chunk * BLOCKS)),
                __ldg((const uint4*)qh::skip(c.high, chunk * BLOCKS)), load_once(qs::skip(c.q, chunk * BLOCKS))};
    }
    static INLINE void unpack(const Raw& raw, int j, Unpacked<2>& y) {
        unpack_nibbles(raw.q, y.group[0], y.group[1]);
        add_high_bits(raw.high, j / 2 * 2, 0x01010101, y.group[0]);
        add_high_bits(raw.high, j / 2 * 2 + 1, 0x01010101, y.group[1]);
        k_scales(raw.head, j / 2, y);
    }
};

// 64 bytes of ql hold weights 0..63 of half a block in their low, 64..127 in their high nibbles; 32 bytes of qh
// hold the two upper bits of the same 128 weights, 32 weights in each pair of bits. Each group has its own scale.
template <> struct Quant<Q6_K> : Traits<Q6_K, 2, 32, false> {
    struct Cursor { const u8 *q, *high, *s, *scale; };
    struct Raw { uint4 q, high; u8 s[2]; half_t scale; };
    static INLINE int group(int t, int i) { return t / 8 * 16 + t % 8 / 4 * 8 + t % 4 + 4 * i; }
    static INLINE Cursor begin(Blocks w, size_t block, int j) {
        return {ql::of(w, block) + j * 16, qh::of(w, block) + j / 4 * 32 + j % 2 * 16,
                scales::of(w, block) + j / 4 * 8 + j % 4, d::of(w, block)};
    }
    static INLINE Raw load(const Cursor& c, int chunk) {
        const u8* s = scales::skip(c.s, chunk * BLOCKS);
        return {load_once(ql::skip(c.q, chunk * BLOCKS)), __ldg((const uint4*)qh::skip(c.high, chunk * BLOCKS)),
                {__ldg(s), __ldg(s + 4)}, d::half(c.scale, chunk * BLOCKS)};
    }
    static INLINE void unpack(const Raw& raw, int j, Unpacked<2>& y) {
        const int shift = j % 4 / 2 * 2;
        unpack_nibbles(raw.q, y.group[0], y.group[1]);
        add_high_bits(raw.high, shift, 0x03030303, y.group[0]);
        add_high_bits(raw.high, shift + 4, 0x03030303, y.group[1]);
        y.group[0].s = byte_to_float(raw.s[0] ^ 0x80, 0) - 128;  // a signed byte
        y.group[1].s = byte_to_float(raw.s[1] ^ 0x80, 0) - 128;
        y.d = to_float(raw.scale);
    }
};

// ---- dequantize

// Vector j of a block, loaded and unpacked.
template <class Q> INLINE void unpack_vector(Blocks w, size_t block, int j, Unpacked<Q::GROUPS>& y) {
    Q::unpack(Q::load(Q::begin(w, block, j), 0), j, y);
}

// Weights 4 k to 4 k + 3 of a group, rounded as the reference rounds them.
template <int FORMAT, int GROUPS> INLINE void dequantize4(const Unpacked<GROUPS>& v, int group, int k, float* w) {
    const float d = __fmul_rn(v.d, v.group[group].s);
    const float m = Quant<FORMAT>::MINIMUM ? __fmul_rn(v.dmin, v.group[group].m) : 0;
    UNROLL for (int i = 0; i < 4; i++)
        w[i] = __fsub_rn(__fmul_rn(d, byte_to_float(v.group[group].q[k], i) - Quant<FORMAT>::Q_OFFSET), m);
}

INLINE uint4 select(bool first, uint4 a, uint4 b) {
    return make_uint4(first ? a.x : b.x, first ? a.y : b.y, first ? a.z : b.z, first ? a.w : b.w);
}

INLINE uint4 of_neighbour(uint4 v) {  // lanes 2 i and 2 i + 1 exchange values
    return make_uint4(__shfl_xor_sync(~0u, v.x, 1), __shfl_xor_sync(~0u, v.y, 1), __shfl_xor_sync(~0u, v.z, 1),
                      __shfl_xor_sync(~0u, v.w, 1));
}

// A group of 16 float16 weights is 32 bytes, which is what a memory transaction moves. So that one is filled by
// one store, two neighbouring threads each write 16 bytes of the one's group, then 16 bytes of the other's.
template <int FORMAT> INLINE void dequantize_vectors(Blocks w, size_t first, size_t count, half_t* y) {
    typedef Quant<FORMAT> Q;
    const size_t vectors = count * Q::VECTORS, stride = (size_t)gridDim.x * blockDim.x;
    const int odd = threadIdx.x % 2;
    size_t t = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    for (; t - threadIdx.x % 32 < vectors; t += stride) {  // whole warps, as the lanes exchange values
        Unpacked<Q::GROUPS> v;
        const size_t own = min(t, vectors - 1);
        unpack_vector<Q>(w, first + own / Q::VECTORS, own % Q::VECTORS, v);
        UNROLL for (int i = 0; i < Q::GROUPS; i++) {
            uint4 part[2];
            UNROLL for (int k = 0; k < 2; k++) {
                float f[8];
                dequantize4<FORMAT>(v, i, 2 * k, f);
                dequantize4<FORMAT>(v, i, 2 * k + 1, f + 4);
                part[k] = make_uint4(pack_halves(f[0], f[1]), pack_halves(f[2], f[3]), pack_halves(f[4], f[5]),
                                     pack_halves(f[6], f[7]));
            }
            // The even thread gives its second part away, the odd one its first.
            const uint4 other = of_neighbour(select(odd, part[0], part[1]));
            UNROLL for (int k = 0; k < 2; k++) {
                const size_t of = t - odd + k;  // the vector whose group is written
                half_t* to = y + of / Q::VECTORS * Q::SIZE + Q::group(of % Q::VECTORS, i) * 16 + 8 * odd;
                if (of < vectors) store_vector(to, select(odd == k, part[k], other));
            }
        }
    }
}

// dequantize() in quant/blocks.py: blocks first .. first + count of a matrix -> y (count * SIZE) in float16, which
// tensor cores multiply.
KERNEL void dequantize(const u8* data, size_t n_blocks, int format, size_t first, size_t count, half_t* y) {
    await_previous_kernel();
#define DEQUANTIZE(FORMAT) if (format == FORMAT) dequantize_vectors<FORMAT>({data, n_blocks}, first, count, y);
    FOR_EACH_QUANTIZED_FORMAT(DEQUANTIZE)
}

// ---- embed

template <int FORMAT> INLINE void embed_row(Blocks w, int id, int d, float* y) {
    typedef Quant<FORMAT> Q;
    for (int t = threadIdx.x; t < d / Q::SIZE * Q::VECTORS; t += blockDim.x) {
        Unpacked<Q::GROUPS> v;
        unpack_vector<Q>(w, (size_t)id * (d / Q::SIZE) + t / Q::VECTORS, t % Q::VECTORS, v);
        UNROLL for (int i = 0; i < Q::GROUPS; i++) {
            float f[16];
            UNROLL for (int k = 0; k < 4; k++) dequantize4<FORMAT>(v, i, k, f + 4 * k);
            UNROLL for (int k = 0; k < 16; k++) y[Q::group(t, i) * 16 + k] = f[k];
        }
    }
}

// embed in reference.py: rows ``ids`` of a table (n_vocab, d) -> y (n, d). One thread block for each row.
KERNEL void embed(const u8* data, size_t n_blocks, int format, const int* ids, int d, float* y) {
    await_previous_kernel();
    const int id = ids[blockIdx.x];
    y += (size_t)blockIdx.x * d;
    if (format == F32)
        for (int i = threadIdx.x; i < d; i += blockDim.x) y[i] = ((float*)data)[(size_t)id * d + i];
    if (format == F16)
        for (int i = threadIdx.x; i < d; i += blockDim.x) y[i] = to_float(((half_t*)data)[(size_t)id * d + i]);
#define EMBED(FORMAT) if (format == FORMAT) embed_row<FORMAT>({data, n_blocks}, id, d, y);
    FOR_EACH_QUANTIZED_FORMAT(EMBED)
}
