// attention of reference.py where it is not worth or not possible to use the matrix units.
//
// attend_token: one token, q (1, h, k), heads of 64 or 128 features. The time is that of reading the keys and values
// once, so they are shared out among many blocks: block (i, head) reads CHUNK keys at i * CHUNK, and then those that all
// the head's blocks have left,
//
//     partial[head][i] = | sum of p v, k numbers | largest score | sum of p |,      p = exp(score - largest),
//
// and the last block of a head to finish adds the partial sums up, always in the same order.

const int CHUNK = 64;
const int TOKEN_THREADS = 128;

struct Half8 {
    static const int COUNT = 8;
    static INLINE void floats(uint4 v, float* f) {
        const unsigned words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int i = 0; i < 4; i++) f[2 * i] = to_float(words[i] & 0xffff), f[2 * i + 1] = to_float(words[i] >> 16);
    }
};

struct Float4 {
    static const int COUNT = 4;
    static INLINE void floats(uint4 v, float* f) {
        f[0] = __uint_as_float(v.x), f[1] = __uint_as_float(v.y);
        f[2] = __uint_as_float(v.z), f[3] = __uint_as_float(v.w);
    }
};

// partial (blocks, k + 2) of one head -> y (k,). Only the block that comes last gets here.
template <int K> INLINE void combine(const float* partial, int blocks, float* y) {
    if (threadIdx.x >= K) return;
    float largest = -1e30f, sum = 0, mixed = 0;
    for (int first = 0; first < blocks; first += 16) {
        float most[16], sums[16], mix[16], now = largest;
#pragma unroll
        for (int i = 0; i < 16; i++) {  // past the first-level cache: other processors wrote them
            const float* of = partial + min(first + i, blocks - 1) * (K + 2);
            most[i] = __ldcg(of + K), sums[i] = __ldcg(of + K + 1), mix[i] = __ldcg(of + threadIdx.x);
        }
#pragma unroll
        for (int i = 0; i < 16; i++) now = fmaxf(now, most[i]);
        const float shrink = __expf(largest - now);
        largest = now, sum *= shrink, mixed *= shrink;
#pragma unroll
        for (int i = 0; i < 16; i++) {
            const float factor = first + i < blocks ? __expf(most[i] - now) : 0;
            sum += sums[i] * factor, mixed += mix[i] * factor;
        }
    }
    y[threadIdx.x] = mixed / sum;
}

// k, v: this head's rows, K numbers each, side by side. A row is read by LANES lanes, 16 bytes each; each such group of
// lanes keeps the largest score it has seen, and its earlier sums shrink as that grows.
template <int K, class Piece> INLINE void attend_chunks(const float* q, const uint4* k, const uint4* v, int m,
                                                        float scale, float* partial) {
    const int EACH = Piece::COUNT, LANES = K / EACH;
    const int GROUPS = TOKEN_THREADS / LANES, KEYS = CHUNK / GROUPS;  // of lanes; keys of a chunk for each group
    __shared__ float mixed[GROUPS][K], most[GROUPS], sums[GROUPS];
    const int lane = threadIdx.x % LANES, group = threadIdx.x / LANES;
    float part[EACH], f[EACH], mix[EACH] = {}, sum = 0, largest = -1e30f;
#pragma unroll
    for (int i = 0; i < EACH; i++) part[i] = q[lane * EACH + i] * scale;
    for (int first = blockIdx.x * CHUNK + group; first - group < m; first += gridDim.x * CHUNK) {
        uint4 keys[KEYS], values[KEYS];
        float score[KEYS];
#pragma unroll
        for (int i = 0; i < KEYS; i++) {
            const size_t at = (size_t)min(first + i * GROUPS, m - 1) * LANES + lane;
            keys[i] = k[at], values[i] = v[at];
        }
        float now = largest;
#pragma unroll
        for (int i = 0; i < KEYS; i++) {
            Piece::floats(keys[i], f);
            float product = 0;
#pragma unroll
            for (int j = 0; j < EACH; j++) product += part[j] * f[j];
#pragma unroll
            for (int lanes = LANES / 2; lanes > 0; lanes /= 2) product += __shfl_xor_sync(~0u, product, lanes);
            score[i] = first + i * GROUPS < m ? product : NEGATIVE_INFINITY;
            now = fmaxf(now, score[i]);
        }
        const float shrink = __expf(largest - now);
        largest = now, sum *= shrink;
#pragma unroll
        for (int j = 0; j < EACH; j++) mix[j] *= shrink;
#pragma unroll
        for (int i = 0; i < KEYS; i++) {
            const float p = __expf(score[i] - now);
            sum += p;
            Piece::floats(values[i], f);
#pragma unroll
            for (int j = 0; j < EACH; j++) mix[j] += p * f[j];
        }
    }
#pragma unroll
    for (int j = 0; j < EACH; j++) mixed[group][lane * EACH + j] = mix[j];
    if (lane == 0) most[group] = largest, sums[group] = sum;
    __syncthreads();
    if (threadIdx.x >= K) return;
    for (int i = 0; i < GROUPS; i++) largest = fmaxf(largest, most[i]);
    float y = 0, all = 0;
#pragma unroll
    for (int i = 0; i < GROUPS; i++) {
        const float factor = __expf(most[i] - largest);
        y += mixed[i][threadIdx.x] * factor, all += sums[i] * factor;
    }
    partial[threadIdx.x] = y;
    if (threadIdx.x == 0) partial[K] = largest, partial[K + 1] = all;
}

// k, v (g, n_ctx, k) and how many places of them count: m, or *position + 1. done (h,) counts blocks; 0 between calls.
template <int K, class Piece> INLINE void attend_token(const float* q, const void* k, const void* v, float* y,
                                                       float* partial, int* done, const int* position, int m,
                                                       int group, int n_ctx, float scale) {
    m = position ? *position + 1 : m;
    const int head = blockIdx.y, blocks = min(gridDim.x, (m + CHUNK - 1) / CHUNK);
    if (blockIdx.x >= blocks) return;
    __shared__ bool last;
    partial += (size_t)head * gridDim.x * (K + 2);
    const size_t row = (size_t)(head / group) * n_ctx * (K / Piece::COUNT);
    attend_chunks<K, Piece>(q + head * K, (const uint4*)k + row, (const uint4*)v + row, m, scale,
                            partial + blockIdx.x * (K + 2));
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();  // what this block has written is seen by whoever sees it counted
        last = atomicAdd(done + head, 1) == blocks - 1;
        __threadfence();
    }
    __syncthreads();
    if (!last) return;
    combine<K>(partial, blocks, y + head * K);
    if (threadIdx.x == 0) done[head] = 0;
}

#define ATTEND_TOKEN(NAME, K, PIECE)                                                                              \
    KERNEL void NAME(const float* q, const void* k, const void* v, float* y, float* partial, int* done,           \
                     const int* position, int m, int group, int n_ctx, float scale) {                             \
        take_turn();                                                                                              \
        attend_token<K, PIECE>(q, k, v, y, partial, done, position, m, group, n_ctx, scale);                      \
    }
ATTEND_TOKEN(attend_token_h64, 64, Half8)
ATTEND_TOKEN(attend_token_h128, 128, Half8)
ATTEND_TOKEN(attend_token_f64, 64, Float4)
ATTEND_TOKEN(attend_token_f128, 128, Float4)

// attend_any: any n, any head up to 256 features, keys in float32 or half precision: q (n, h, k) -> y (n, h, k).
// A warp for each query of each head (grid x: pairs of them by fours) walks over 32 keys at a time, each lane with
// the score of one key; then each lane mixes up to 8 features, and earlier sums shrink as the largest score grows.
KERNEL __launch_bounds__(128) void attend_any(
    const float* q, const void* k, const void* v, float* y, const int* position, int n, int n_head, int group, int m,
    int width, int k_row, int k_head, int v_row, int v_head, int half, int causal, float scale) {
    take_turn();
    __shared__ float query[4][256];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, i = blockIdx.x * 4 + warp;
    if (i >= n * n_head) return;
    m = position ? *position + n : m;
    const int head = i % n_head, token = i / n_head, seen = causal ? m - n + token + 1 : m;
    for (int j = lane; j < width; j += 32) query[warp][j] = q[(size_t)i * width + j] * scale;
    __syncwarp();
    const size_t k_at = (size_t)(head / group) * k_head, v_at = (size_t)(head / group) * v_head;
    float largest = NEGATIVE_INFINITY, sum = 0, mixed[8] = {};
    for (int first = 0; first < seen; first += 32) {
        float score = NEGATIVE_INFINITY;
        if (first + lane < seen) {
            const size_t at = k_at + (size_t)(first + lane) * k_row;
            score = 0;
            for (int j = 0; j < width; j++)
                score += query[warp][j] * (half ? to_float(((const half_t*)k)[at + j]) : ((const float*)k)[at + j]);
        }
        float most = score;
        for (int lanes = 16; lanes > 0; lanes /= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, lanes));
        most = fmaxf(most, largest);
        const float shrink = expf(largest - most), p = expf(score - most);
        largest = most;
        sum = sum * shrink + sum_of_warp(p);
        for (int j = 0; j < 8; j++) mixed[j] *= shrink;
        for (int key = 0; key < 32 && first + key < seen; key++) {
            const float share = __shfl_sync(~0u, p, key);
            const size_t at = v_at + (size_t)(first + key) * v_row;
#pragma unroll
            for (int j = 0; j < 8; j++)
                if (lane + 32 * j < width)
                    mixed[j] += share * (half ? to_float(((const half_t*)v)[at + lane + 32 * j])
                                              : ((const float*)v)[at + lane + 32 * j]);
        }
    }
#pragma unroll
    for (int j = 0; j < 8; j++)
        if (lane + 32 * j < width) y[(size_t)i * width + lane + 32 * j] = mixed[j] / sum;
}
