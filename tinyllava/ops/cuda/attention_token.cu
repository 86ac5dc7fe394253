// attention of reference.py where it is not worth or not possible to use the matrix units.
//
// attend_token: one token, q (1, h, k), heads of 64 or 128 features. The time is that of reading the keys and values
// once, so they are shared out among as many blocks as possible: block (i, head) reads keys i * CHUNK and on,
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

// partial (chunks, k + 2) of one head -> y (k,). Only the block that comes last gets here.
template <int K> INLINE void combine(const float* partial, int chunks, float* y) {
    float largest = NEGATIVE_INFINITY;
    for (int i = 0; i < chunks; i++) largest = fmaxf(largest, __ldcg(partial + i * (K + 2) + K));
    if (threadIdx.x >= K) return;
    float sum = 0, mixed = 0;
    for (int i = 0; i < chunks; i++) {
        const float* of = partial + i * (K + 2);
        const float scale = __expf(__ldcg(of + K) - largest);
        sum += __ldcg(of + K + 1) * scale;
        mixed += __ldcg(of + threadIdx.x) * scale;
    }
    y[threadIdx.x] = mixed / sum;
}

// k, v: this head's rows, K numbers each, side by side.
template <int K, class Piece> INLINE void attend_chunk(const float* q, const uint4* k, const uint4* v, int m,
                                                       float scale, float* partial) {
    const int EACH = Piece::COUNT, LANES = K / EACH;              // lanes that share a key
    const int GROUPS = TOKEN_THREADS / LANES, KEYS = CHUNK / GROUPS;  // of lanes; keys for each group
    __shared__ float room[TOKEN_THREADS / 32], mixed[GROUPS][K];
    const int lane = threadIdx.x % LANES, group = threadIdx.x / LANES, first = blockIdx.x * CHUNK + group;
    uint4 keys[KEYS], values[KEYS];
#pragma unroll
    for (int i = 0; i < KEYS; i++) {
        const size_t at = (size_t)min(first + i * GROUPS, m - 1) * LANES + lane;
        keys[i] = k[at], values[i] = v[at];
    }
    float part[EACH], score[KEYS], largest = NEGATIVE_INFINITY, f[EACH];
#pragma unroll
    for (int i = 0; i < EACH; i++) part[i] = q[lane * EACH + i] * scale;
#pragma unroll
    for (int i = 0; i < KEYS; i++) {
        Piece::floats(keys[i], f);
        float sum = 0;
#pragma unroll
        for (int j = 0; j < EACH; j++) sum += part[j] * f[j];
#pragma unroll
        for (int lanes = LANES / 2; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(~0u, sum, lanes);
        score[i] = first + i * GROUPS < m ? sum : NEGATIVE_INFINITY;
        largest = fmaxf(largest, score[i]);
    }
    for (int lanes = 16; lanes > 0; lanes /= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, lanes));
    if (threadIdx.x % 32 == 0) room[threadIdx.x / 32] = largest;
    __syncthreads();
    for (int warp = 0; warp < TOKEN_THREADS / 32; warp++) largest = fmaxf(largest, room[warp]);
    float sum = 0, mix[EACH] = {};
#pragma unroll
    for (int i = 0; i < KEYS; i++) {
        const float p = __expf(score[i] - largest);
        sum += lane == 0 ? p : 0;
        Piece::floats(values[i], f);
#pragma unroll
        for (int j = 0; j < EACH; j++) mix[j] += p * f[j];
    }
#pragma unroll
    for (int j = 0; j < EACH; j++) mixed[group][lane * EACH + j] = mix[j];
    sum = sum_of_block(sum, room);  // its barriers also finish ``mixed``
    if (threadIdx.x < K) {
        float y = 0;
        for (int i = 0; i < GROUPS; i++) y += mixed[i][threadIdx.x];
        partial[threadIdx.x] = y;
    }
    if (threadIdx.x == 0) partial[K] = largest, partial[K + 1] = sum;
}

// k, v (g, n_ctx, k) and how many places of them count: m, or *position + 1. done (h,) counts blocks; 0 between calls.
template <int K, class Piece> INLINE void attend_token(const float* q, const void* k, const void* v, float* y,
                                                       float* partial, int* done, const int* position, int m,
                                                       int group, int n_ctx, float scale) {
    m = position ? *position + 1 : m;
    const int head = blockIdx.y, chunks = (m + CHUNK - 1) / CHUNK;
    if (blockIdx.x >= chunks) return;
    __shared__ bool last;
    partial += (size_t)head * gridDim.x * (K + 2);
    const size_t row = (size_t)(head / group) * n_ctx * (K / Piece::COUNT);
    attend_chunk<K, Piece>(q + head * K, (const uint4*)k + row, (const uint4*)v + row, m, scale,
                           partial + blockIdx.x * (K + 2));
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) last = atomicAdd(done + head, 1) == chunks - 1;
    __syncthreads();
    if (!last) return;
    __threadfence();
    combine<K>(partial, chunks, y + head * K);
    if (threadIdx.x == 0) done[head] = 0;
}

#define ATTEND_TOKEN(NAME, K, PIECE)                                                                              \
    KERNEL void NAME(const float* q, const void* k, const void* v, float* y, float* partial, int* done,           \
                     const int* position, int m, int group, int n_ctx, float scale) {                             \
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
