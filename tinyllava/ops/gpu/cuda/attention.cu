// Attention of many tokens, softmax(q k^T / sqrt(k)) v, on tensor cores, without the (n, m) matrix of scores in memory.
//
// One pass over the keys, in tiles of TILE (Dao et al. 2022, FlashAttention): each query carries the greatest score so
// far and the sum of exp(score - greatest), and shrinks what it has mixed so far when a greater score comes.
//
// A block has 4 warps. Each warp owns BANDS bands of 16 queries of one head, and keeps their mixed values (16, WIDTH)
// and their scores against one tile (16, TILE) in registers, laid out as mma.m16n8k16 wants and leaves them:
//
//     lane l holds of a (16, 8) result: rows l / 4 and l / 4 + 8, columns 2 (l % 4) and the next
//     two such results side by side, as halves, are the (16, 16) left factor of the next product
//
// so scores become the left factor of the product with the values where they are. Queries, keys and values are halves
// in shared memory, in rows that are 16 bytes longer than needed: eight rows at the same column then lie in eight
// different groups of banks, and ldmatrix reads them at once. Sums are float32. The values of a tile arrive while its
// scores are computed, the next tile's keys while its values are mixed.
//
// Launch: grid (n_head, ceil(n / (64 * BANDS))), 128 threads, attention_shared(WIDTH, BANDS) bytes. Rows of k and v must
// begin at multiples of 16 bytes, rows of q at multiples of 8, rows of y at multiples of 4.

constexpr int TILE = 64;  // keys
constexpr int WARPS_OF_ATTENTION = 4;

// ---- what has no name in C++

// Four (8, 8) matrices of halves; lane l gives the address of row l % 8 of matrix l / 8. In each register, lane l gets
// the pair at row l / 4, columns 2 (l % 4) and the next; transposed: at column l / 4, rows 2 (l % 4) and the next.
template <bool TRANSPOSED>
INLINE void load_matrices(unsigned (&r)[4], unsigned address) {
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

// 16 bytes from global to shared memory in the background; zeros if they are not to be read.
INLINE void copy_later(unsigned to, const half_t* from, bool read) {
    int size = read ? 16 : 0;
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

// The greatest, or the sum, of the four lanes that share a row.
INLINE float greatest_of_row(float x) {
    x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
    return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}
INLINE float sum_of_row(float x) {
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
}

// ---- the steps

template <int WIDTH>
struct Tile {  // rows of WIDTH halves in shared memory
    static constexpr int ROW_BYTES = 2 * WIDTH + 16;
    static constexpr int BYTES = TILE * ROW_BYTES;
};

// A tile of keys or values, zeros where there are no more than ``left`` rows. Eight threads share a row, 16 bytes each
// at a time: ``from`` and ``to`` are the thread's first ones.
template <int WIDTH>
INLINE void fetch_tile(unsigned to, const half_t* from, int row_stride, int left) {
    int row = threadIdx.x / 8, column = threadIdx.x % 8;
#pragma unroll
    for (int i = 0; i < TILE / 16; i++)
#pragma unroll
        for (int j = 0; j < (WIDTH + 63) / 64; j++)
            if (WIDTH % 64 == 0 || column + 8 * j < WIDTH / 8)
                copy_later(
                    to + 16 * i * Tile<WIDTH>::ROW_BYTES + 128 * j, from + 16 * i * row_stride + 64 * j,
                    row + 16 * i < left
                );
    commit_copies();
}

// The block's queries, scaled and as halves, zeros from n on. They are (n, n_head, WIDTH) floats.
template <int WIDTH, int ROWS>
INLINE void fetch_queries(char* to, const float* q, int first, int n, int row_stride, float scale) {
    constexpr int CHUNKS = WIDTH / 4;  // of 16 bytes, in a row
#pragma unroll
    for (int i = 0; i < ROWS * CHUNKS / 128; i++) {
        int chunk = threadIdx.x + 128 * i, row = chunk / CHUNKS, column = chunk % CHUNKS;
        float4 x = make_float4(0, 0, 0, 0);
        if (first + row < n) x = *(const float4*)(q + (long long)(first + row) * row_stride + 4 * column);
        uint2 halves = make_uint2(to_halves(scale * x.x, scale * x.y), to_halves(scale * x.z, scale * x.w));
        *(uint2*)(to + row * Tile<WIDTH>::ROW_BYTES + 8 * column) = halves;
    }
}

// Scores (16, TILE) of each band: q k^T.
template <int WIDTH, int BANDS>
INLINE void score(float (&s)[BANDS][TILE / 8][4], unsigned queries, unsigned keys) {
#pragma unroll
    for (int band = 0; band < BANDS; band++)
#pragma unroll
        for (int j = 0; j < TILE / 8; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) s[band][j][e] = 0;
#pragma unroll
    for (int step = 0; step < WIDTH / 16; step++) {
        unsigned a[BANDS][4], b[4];
#pragma unroll
        for (int band = 0; band < BANDS; band++)
            load_matrices<false>(a[band], queries + 16 * band * Tile<WIDTH>::ROW_BYTES + 32 * step);
#pragma unroll
        for (int j = 0; j < TILE / 16; j++) {
            load_matrices<false>(b, keys + 16 * j * Tile<WIDTH>::ROW_BYTES + 32 * step);
#pragma unroll
            for (int band = 0; band < BANDS; band++) {
                multiply_add(s[band][2 * j], a[band], b[0], b[1]);
                multiply_add(s[band][2 * j + 1], a[band], b[2], b[3]);
            }
        }
    }
}

// Scores of keys that a query must not see become -infinity: ``last`` is the last key that its band's first row sees,
// which moves by one from row to row if ``slope`` is 1; no row sees beyond ``end``.
INLINE void hide(float (&s)[TILE / 8][4], int first_key, int last, int slope, int end) {
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int j = 0; j < TILE / 8; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
            int key = first_key + 8 * j + 2 * (lane % 4) + e % 2;
            int row = lane / 4 + 8 * (e / 2);
            if (key > min(last + slope * row, end)) s[j][e] = NEGATIVE_INFINITY;
        }
}

// Scores become probabilities but for the division: exp2(s - greatest). What was mixed and summed before shrinks.
template <int WIDTH>
INLINE void soften(float (&s)[TILE / 8][4], float (&greatest)[2], float (&sum)[2], float (&mixed)[WIDTH / 8][4]) {
#pragma unroll
    for (int half = 0; half < 2; half++) {  // of the band's rows: 0-7, 8-15
        float most = greatest[half];
#pragma unroll
        for (int j = 0; j < TILE / 8; j++) most = fmaxf(most, fmaxf(s[j][2 * half], s[j][2 * half + 1]));
        most = greatest_of_row(most);
        float shrink = power_of_two(greatest[half] - most), added = 0;
        greatest[half] = most;
#pragma unroll
        for (int j = 0; j < TILE / 8; j++)
#pragma unroll
            for (int e = 2 * half; e < 2 * half + 2; e++) added += s[j][e] = power_of_two(s[j][e] - most);
        sum[half] = sum[half] * shrink + added;  // this lane's columns only, until the end
#pragma unroll
        for (int j = 0; j < WIDTH / 8; j++) {
            mixed[j][2 * half] *= shrink;
            mixed[j][2 * half + 1] *= shrink;
        }
    }
}

// mixed (16, WIDTH) += p v for each band.
template <int WIDTH, int BANDS>
INLINE void mix(float (&mixed)[BANDS][WIDTH / 8][4], float (&p)[BANDS][TILE / 8][4], unsigned values) {
#pragma unroll
    for (int step = 0; step < TILE / 16; step++) {
        unsigned a[BANDS][4], b[4];
#pragma unroll
        for (int band = 0; band < BANDS; band++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                float* pair = &p[band][2 * step + i / 2][2 * (i % 2)];
                a[band][i] = to_halves(pair[0], pair[1]);
            }
#pragma unroll
        for (int j = 0; j < WIDTH / 16; j++) {
            load_matrices<true>(b, values + 16 * step * Tile<WIDTH>::ROW_BYTES + 32 * j);
#pragma unroll
            for (int band = 0; band < BANDS; band++) {
                multiply_add(mixed[band][2 * j], a[band], b[0], b[1]);
                multiply_add(mixed[band][2 * j + 1], a[band], b[2], b[3]);
            }
        }
    }
}

// One band's rows of y (n, n_head, WIDTH): what was mixed, divided by the sums.
template <int WIDTH>
INLINE void give(float (&mixed)[WIDTH / 8][4], float (&sum)[2], half_t* y, int first, int n, int row_stride) {
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int row = first + lane / 4 + 8 * half;
        float factor = __fdividef(1, sum_of_row(sum[half]));
        if (row >= n) continue;
#pragma unroll
        for (int j = 0; j < WIDTH / 8; j++)
            *(unsigned*)(y + (long long)row * row_stride + 8 * j + 2 * (lane % 4)) =
                to_halves(mixed[j][2 * half] * factor, mixed[j][2 * half + 1] * factor);
    }
}

// q (n, n_head, WIDTH) floats, y the same in halves; k, v (m, n_head_kv, WIDTH) halves with strides in numbers. When causal, the queries
// are the last n of the m positions, and each sees itself and what is before it.
template <int WIDTH, int BANDS>
INLINE void attend_block(
    const float* q, const half_t* k, const half_t* v, half_t* y, int n, int n_head, int n_head_kv, int m,
    int k_row, int k_head, int v_row, int v_head, int causal, float scale
) {
    constexpr int ROWS = 16 * BANDS * WARPS_OF_ATTENTION, ROW_BYTES = Tile<WIDTH>::ROW_BYTES;
    extern __shared__ __align__(16) char room[];
    char *keys = room, *values = keys + Tile<WIDTH>::BYTES, *queries = values + Tile<WIDTH>::BYTES;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, head = blockIdx.x, head_kv = head / (n_head / n_head_kv);
    int first = (gridDim.y - 1 - blockIdx.y) * ROWS;  // the last queries see most: they start first
    int own = first + 16 * BANDS * warp;              // this warp's first query
    int seen = causal ? min(m, m - n + first + ROWS) : m;  // keys that any of the block's queries sees

    // Where this thread's 16 bytes come from and go to, for fetch_tile.
    int row = threadIdx.x / 8, column = threadIdx.x % 8;
    unsigned to_keys = shared_address(keys) + row * ROW_BYTES + 16 * column, to_values = to_keys + Tile<WIDTH>::BYTES;
    int of_keys = row * k_row + 8 * column, of_values = row * v_row + 8 * column;
    k += (long long)head_kv * k_head;
    v += (long long)head_kv * v_head;
    fetch_tile<WIDTH>(to_keys, k + of_keys, k_row, m);
    // exp(x) is exp2(x log2(e)): the factor goes into the queries.
    fetch_queries<WIDTH, ROWS>(queries, q + head * WIDTH, first, n, n_head * WIDTH, scale * 1.44269504f);

    // Where this lane's rows begin for load_matrices: left factors and values take matrices down, then to the right;
    // keys, whose rows are the result's columns, to the right, then down.
    unsigned down = (lane % 16) * ROW_BYTES + 16 * (lane / 16);
    unsigned right = (lane % 8 + 8 * (lane / 16)) * ROW_BYTES + 16 * (lane / 8 % 2);
    unsigned my_queries = shared_address(queries) + 16 * BANDS * warp * ROW_BYTES + down;
    unsigned my_keys = shared_address(keys) + right, my_values = shared_address(values) + down;

    float s[BANDS][TILE / 8][4], mixed[BANDS][WIDTH / 8][4] = {}, greatest[BANDS][2], sum[BANDS][2] = {};
#pragma unroll
    for (int band = 0; band < BANDS; band++) greatest[band][0] = greatest[band][1] = NEGATIVE_INFINITY;

    for (int key = 0; key < seen; key += TILE) {
        await_copies();
        __syncthreads();  // the keys are here, and nobody needs the last values any more
        fetch_tile<WIDTH>(to_values, v + (long long)key * v_row + of_values, v_row, m - key);
        score<WIDTH, BANDS>(s, my_queries, my_keys);
        await_copies();
        __syncthreads();  // the values are here, and nobody needs the keys any more
        int next = key + TILE;
        if (next < seen) fetch_tile<WIDTH>(to_keys, k + (long long)next * k_row + of_keys, k_row, m - next);
        // The first key is seen by every query: from the first tile on, ``greatest`` is a number.
        int last = causal ? m - n + own : m - 1;  // what this warp's first query sees at least
        bool partly = key + TILE - 1 > min(last, m - 1);
#pragma unroll
        for (int band = 0; band < BANDS; band++) {
            if (partly) hide(s[band], key, last + 16 * band * causal, causal, m - 1);
            soften<WIDTH>(s[band], greatest[band], sum[band], mixed[band]);
        }
        mix<WIDTH, BANDS>(mixed, s, my_values);
    }
#pragma unroll
    for (int band = 0; band < BANDS; band++)
        give<WIDTH>(mixed[band], sum[band], y + head * WIDTH, own + 16 * band, n, n_head * WIDTH);
}

#define ATTENTION(NAME, WIDTH, BANDS)                                                                               \
    extern "C" __global__ void __launch_bounds__(128, WIDTH * BANDS > 256 ? 1 : 2) NAME(                            \
        const float* q, const half_t* k, const half_t* v, half_t* y, int n, int n_head, int n_head_kv, int m,        \
        int k_row, int k_head, int v_row, int v_head, int causal, float scale                                      \
    ) {                                                                                                             \
        take_turn();                                                                                                \
        attend_block<WIDTH, BANDS>(                                                                                 \
            q, k, v, y, n, n_head, n_head_kv, m, k_row, k_head, v_row, v_head, causal, scale                        \
        );                                                                                                          \
    }

// Blocks of 128 queries, and of 64 where there are few.
ATTENTION(flash_attention_h64, 64, 2)
ATTENTION(flash_attention_h64_few, 64, 1)
ATTENTION(flash_attention_h128, 128, 2)
ATTENTION(flash_attention_h128_few, 128, 1)
