// Attention of many tokens, softmax(q k^T / sqrt(k)) v, on tensor cores. The (n, m) scores are never stored.
//
// One pass over the keys, in tiles of FLASH_KEYS, with an online softmax (Dao et al. 2022, FlashAttention): for
// each query, the largest score so far and the sum of exp(score - largest), both of which, and the accumulated
// output, are rescaled when a larger score comes.
//
// A thread block has FLASH_WARPS warps. Each warp owns ROW_TILES tiles of 16 queries of one head, and keeps their
// output accumulators (16, HEAD_DIM) and their scores against one tile of keys (16, FLASH_KEYS) in registers, laid
// out as mma.m16n8k16 reads and writes them:
//
//     lane l holds, of a (16, 8) result: rows l / 4 and l / 4 + 8, columns 2 (l % 4) and the next
//     two such results side by side, as float16, are the (16, 16) left factor of the next product
//
// so scores become the left factor of the product with the values without moving. Queries, keys and values are
// float16 in shared memory, in rows padded by FLASH_PADDING bytes: eight rows at the same column then lie in eight
// different groups of banks, and ldmatrix reads them at once. Sums are float32. The values of a tile are copied
// while its scores are computed, the next tile's keys while its values are accumulated.
//
// Launch: grid (n_head, ceil(n / (16 * ROW_TILES * FLASH_WARPS))), 32 * FLASH_WARPS threads, shared memory for the
// tiles of keys, values and queries. Rows of k and v begin at multiples of 16 bytes, of q at 16, of y at 4.

constexpr int FLASH_THREADS = 32 * FLASH_WARPS;
constexpr int SCORE_TILES = FLASH_KEYS / 8;  // (16, 8) results of a tile of keys

// ---- instructions that have no name in C++

// Four (8, 8) matrices of float16; lane l gives the address of row l % 8 of matrix l / 8. In each register, lane l
// gets the pair at row l / 4, columns 2 (l % 4) and the next; transposed, the pair at column l / 4, rows
// 2 (l % 4) and the next.
template <bool TRANSPOSED> INLINE void load_matrices(unsigned (&r)[4], unsigned address) {
    if (TRANSPOSED)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address));
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address));
}

// c (16, 8) += a (16, 16) b (16, 8)
INLINE void multiply_add(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// An asynchronous copy of 16 bytes from global to shared memory, or zeros there if not ``valid``.
INLINE void copy_async(unsigned to, const half_t* from, bool valid) {
    int size = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(size) : "memory");
}
INLINE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
INLINE void await_copies() { asm volatile("cp.async.wait_group 0;" ::: "memory"); }

INLINE unsigned shared_address(const void* p) { return (unsigned)__cvta_generic_to_shared(p); }

INLINE float power_of_two(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// The maximum and the sum over the four lanes that share a row.
INLINE float max_of_row(float x) {
    x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
    return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}
INLINE float sum_of_row(float x) {
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
}

// ---- the parts of the loop

template <int HEAD_DIM> struct Tile {  // FLASH_KEYS rows of HEAD_DIM float16 numbers in shared memory
    static constexpr int ROW_BYTES = 2 * HEAD_DIM + FLASH_PADDING;
    static constexpr int BYTES = FLASH_KEYS * ROW_BYTES;
};

// Start to copy a tile of keys or values, with zeros from row ``n_rows`` on. Eight threads share a row, 16 bytes
// each at a time: ``from`` and ``to`` are the thread's first ones.
template <int HEAD_DIM> INLINE void load_tile_async(unsigned to, const half_t* from, int row_stride, int n_rows) {
    int row = threadIdx.x / 8, column = threadIdx.x % 8;
    UNROLL for (int i = 0; i < FLASH_KEYS / 16; i++)
        UNROLL for (int j = 0; j < (HEAD_DIM + 63) / 64; j++)
            if (HEAD_DIM % 64 == 0 || column + 8 * j < HEAD_DIM / 8)
                copy_async(to + 16 * i * Tile<HEAD_DIM>::ROW_BYTES + 128 * j, from + 16 * i * row_stride + 64 * j,
                           row + 16 * i < n_rows);
    commit_copies();
}

// The thread block's queries times ``scale``, as float16, zeros from query n on. q is (n, n_head, HEAD_DIM).
template <int HEAD_DIM, int ROWS>
INLINE void load_queries(char* to, const float* q, int first, int n, int row_stride, float scale) {
    constexpr int VECTORS = HEAD_DIM / 4;  // of 16 bytes, in a row
    UNROLL for (int i = 0; i < ROWS * VECTORS / FLASH_THREADS; i++) {
        int at = threadIdx.x + FLASH_THREADS * i, row = at / VECTORS, column = at % VECTORS;
        float4 x = make_float4(0, 0, 0, 0);
        if (first + row < n) x = *(const float4*)(q + (long long)(first + row) * row_stride + 4 * column);
        *(uint2*)(to + row * Tile<HEAD_DIM>::ROW_BYTES + 8 * column) =
            pack_halves(make_float4(scale * x.x, scale * x.y, scale * x.z, scale * x.w));
    }
}

// Scores (16, FLASH_KEYS) of each row tile: q k^T.
template <int HEAD_DIM, int ROW_TILES>
INLINE void compute_scores(float (&s)[ROW_TILES][SCORE_TILES][4], unsigned queries, unsigned keys) {
    UNROLL for (int tile = 0; tile < ROW_TILES; tile++)
        UNROLL for (int j = 0; j < SCORE_TILES; j++)
            UNROLL for (int e = 0; e < 4; e++) s[tile][j][e] = 0;
    UNROLL for (int i = 0; i < HEAD_DIM / 16; i++) {
        unsigned a[ROW_TILES][4], b[4];
        UNROLL for (int tile = 0; tile < ROW_TILES; tile++)
            load_matrices<false>(a[tile], queries + 16 * tile * Tile<HEAD_DIM>::ROW_BYTES + 32 * i);
        UNROLL for (int j = 0; j < FLASH_KEYS / 16; j++) {
            load_matrices<false>(b, keys + 16 * j * Tile<HEAD_DIM>::ROW_BYTES + 32 * i);
            UNROLL for (int tile = 0; tile < ROW_TILES; tile++) {
                multiply_add(s[tile][2 * j], a[tile], b[0], b[1]);
                multiply_add(s[tile][2 * j + 1], a[tile], b[2], b[3]);
            }
        }
    }
}

// Scores of keys that a query must not see become -infinity: ``last`` is the last key that the row tile's first
// row sees, ``slope`` (0 or 1) by how much that grows from row to row; no row sees beyond ``end``.
INLINE void mask_scores(float (&s)[SCORE_TILES][4], int first_key, int last, int slope, int end) {
    int lane = threadIdx.x % 32;
    UNROLL for (int j = 0; j < SCORE_TILES; j++)
        UNROLL for (int e = 0; e < 4; e++) {
            int key = first_key + 8 * j + 2 * (lane % 4) + e % 2;
            int row = lane / 4 + 8 * (e / 2);
            if (key > min(last + slope * row, end)) s[j][e] = NEGATIVE_INFINITY;
        }
}

// Scores become exp2(s - largest), probabilities before the division by their sum; ``sum`` and ``acc`` are
// rescaled to the new largest score.
template <int HEAD_DIM>
INLINE void online_softmax(float (&s)[SCORE_TILES][4], float (&largest)[2], float (&sum)[2],
                           float (&acc)[HEAD_DIM / 8][4]) {
    UNROLL for (int half = 0; half < 2; half++) {  // of the tile's rows: 0-7, 8-15
        float now = largest[half];
        UNROLL for (int j = 0; j < SCORE_TILES; j++) now = fmaxf(now, fmaxf(s[j][2 * half], s[j][2 * half + 1]));
        now = max_of_row(now);
        float rescale = power_of_two(largest[half] - now), added = 0;
        largest[half] = now;
        UNROLL for (int j = 0; j < SCORE_TILES; j++)
            UNROLL for (int e = 2 * half; e < 2 * half + 2; e++) added += s[j][e] = power_of_two(s[j][e] - now);
        sum[half] = sum[half] * rescale + added;  // of this lane's columns only, until write_output
        UNROLL for (int j = 0; j < HEAD_DIM / 8; j++) {
            acc[j][2 * half] *= rescale;
            acc[j][2 * half + 1] *= rescale;
        }
    }
}

// acc (16, HEAD_DIM) += p v for each row tile.
template <int HEAD_DIM, int ROW_TILES>
INLINE void accumulate(float (&acc)[ROW_TILES][HEAD_DIM / 8][4], float (&p)[ROW_TILES][SCORE_TILES][4],
                       unsigned values) {
    UNROLL for (int i = 0; i < FLASH_KEYS / 16; i++) {
        unsigned a[ROW_TILES][4], b[4];
        UNROLL for (int tile = 0; tile < ROW_TILES; tile++)
            UNROLL for (int e = 0; e < 4; e++) {
                float* pair = &p[tile][2 * i + e / 2][2 * (e % 2)];
                a[tile][e] = pack_halves(pair[0], pair[1]);
            }
        UNROLL for (int j = 0; j < HEAD_DIM / 16; j++) {
            load_matrices<true>(b, values + 16 * i * Tile<HEAD_DIM>::ROW_BYTES + 32 * j);
            UNROLL for (int tile = 0; tile < ROW_TILES; tile++) {
                multiply_add(acc[tile][2 * j], a[tile], b[0], b[1]);
                multiply_add(acc[tile][2 * j + 1], a[tile], b[2], b[3]);
            }
        }
    }
}

// One row tile's rows of y (n, n_head, HEAD_DIM): what was accumulated, divided by the sums.
template <int HEAD_DIM>
INLINE void write_output(float (&acc)[HEAD_DIM / 8][4], float (&sum)[2], half_t* y, int first, int n, int stride) {
    int lane = threadIdx.x % 32;
    UNROLL for (int half = 0; half < 2; half++) {
        int row = first + lane / 4 + 8 * half;
        float factor = __fdividef(1, sum_of_row(sum[half]));
        if (row >= n) continue;
        UNROLL for (int j = 0; j < HEAD_DIM / 8; j++)
            *(unsigned*)(y + (long long)row * stride + 8 * j + 2 * (lane % 4)) =
                pack_halves(acc[j][2 * half] * factor, acc[j][2 * half + 1] * factor);
    }
}

// q (n, n_head, HEAD_DIM) float32, y the same in float16; k, v (m, n_head_kv, HEAD_DIM) float16 with strides in
// numbers. When causal, the queries are the last n of the m positions, and each sees itself and what is before it.
template <int HEAD_DIM, int ROW_TILES> INLINE void attend_block(
    const float* q, const half_t* k, const half_t* v, half_t* y, int n, int n_head, int n_head_kv, int m,
    int k_row, int k_head, int v_row, int v_head, int causal, float scale
) {
    constexpr int ROWS = 16 * ROW_TILES * FLASH_WARPS, ROW_BYTES = Tile<HEAD_DIM>::ROW_BYTES;
    char *keys = dynamic_shared, *values = keys + Tile<HEAD_DIM>::BYTES, *queries = values + Tile<HEAD_DIM>::BYTES;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, head = blockIdx.x, head_kv = head / (n_head / n_head_kv);
    int first = (gridDim.y - 1 - blockIdx.y) * ROWS;  // the last queries see most keys: they start first
    int own = first + 16 * ROW_TILES * warp;          // this warp's first query
    int n_visible = causal ? min(m, m - n + first + ROWS) : m;  // keys that any of these queries sees

    // Where this thread's 16 bytes come from and go to, for load_tile_async.
    int row = threadIdx.x / 8, column = threadIdx.x % 8;
    unsigned to_keys = shared_address(keys) + row * ROW_BYTES + 16 * column;
    unsigned to_values = to_keys + Tile<HEAD_DIM>::BYTES;
    int of_keys = row * k_row + 8 * column, of_values = row * v_row + 8 * column;
    k += (long long)head_kv * k_head;
    v += (long long)head_kv * v_head;
    load_tile_async<HEAD_DIM>(to_keys, k + of_keys, k_row, m);
    // exp(x) is exp2(x log2(e)): the factor goes into the queries.
    load_queries<HEAD_DIM, ROWS>(queries, q + head * HEAD_DIM, first, n, n_head * HEAD_DIM, scale * 1.44269504f);

    // Which row this lane gives load_matrices. Of queries and values, the second (8, 8) matrix is below the first
    // and the other two are to the right; of keys, whose rows are the result's columns, it is the other way round.
    unsigned down = (lane % 16) * ROW_BYTES + 16 * (lane / 16);
    unsigned right = (lane % 8 + 8 * (lane / 16)) * ROW_BYTES + 16 * (lane / 8 % 2);
    unsigned my_queries = shared_address(queries) + 16 * ROW_TILES * warp * ROW_BYTES + down;
    unsigned my_keys = shared_address(keys) + right, my_values = shared_address(values) + down;

    float s[ROW_TILES][SCORE_TILES][4], acc[ROW_TILES][HEAD_DIM / 8][4] = {};
    float largest[ROW_TILES][2], sum[ROW_TILES][2] = {};
    UNROLL for (int tile = 0; tile < ROW_TILES; tile++) largest[tile][0] = largest[tile][1] = NEGATIVE_INFINITY;

    for (int key = 0; key < n_visible; key += FLASH_KEYS) {
        await_copies();
        __syncthreads();  // the keys have arrived, and no warp needs the last values any more
        load_tile_async<HEAD_DIM>(to_values, v + (long long)key * v_row + of_values, v_row, m - key);
        compute_scores<HEAD_DIM, ROW_TILES>(s, my_queries, my_keys);
        await_copies();
        __syncthreads();  // the values have arrived, and no warp needs the keys any more
        int next = key + FLASH_KEYS;
        if (next < n_visible)
            load_tile_async<HEAD_DIM>(to_keys, k + (long long)next * k_row + of_keys, k_row, m - next);
        // Every query sees the first key: from the first tile on, ``largest`` is finite.
        int last = causal ? m - n + own : m - 1;  // the last key that this warp's first query sees
        bool masked = key + FLASH_KEYS - 1 > min(last, m - 1);
        UNROLL for (int tile = 0; tile < ROW_TILES; tile++) {
            if (masked) mask_scores(s[tile], key, last + 16 * tile * causal, causal, m - 1);
            online_softmax<HEAD_DIM>(s[tile], largest[tile], sum[tile], acc[tile]);
        }
        accumulate<HEAD_DIM, ROW_TILES>(acc, s, my_values);
    }
    UNROLL for (int tile = 0; tile < ROW_TILES; tile++)
        write_output<HEAD_DIM>(acc[tile], sum[tile], y + head * HEAD_DIM, own + 16 * tile, n, n_head * HEAD_DIM);
}

#define FLASH_ATTENTION(NAME, HEAD_DIM, ROW_TILES)                                                                \
    KERNEL void __launch_bounds__(FLASH_THREADS, HEAD_DIM * ROW_TILES > 256 ? 1 : 2) NAME(                        \
        const float* q, const half_t* k, const half_t* v, half_t* y, int n, int n_head, int n_head_kv, int m,     \
        int k_row, int k_head, int v_row, int v_head, int causal, float scale                                     \
    ) {                                                                                                           \
        await_previous_kernel();                                                                                  \
        attend_block<HEAD_DIM, ROW_TILES>(                                                                        \
            q, k, v, y, n, n_head, n_head_kv, m, k_row, k_head, v_row, v_head, causal, scale                      \
        );                                                                                                        \
    }

// flash_attention_<head_dim>_<row tiles>: 128 queries a thread block, or 64 if the prompt is short.
FLASH_ATTENTION(flash_attention_64_2, 64, 2)
FLASH_ATTENTION(flash_attention_64_1, 64, 1)
FLASH_ATTENTION(flash_attention_128_2, 128, 2)
FLASH_ATTENTION(flash_attention_128_1, 128, 1)
