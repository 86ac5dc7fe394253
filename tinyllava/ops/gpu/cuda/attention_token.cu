// attention of reference.py where tensor cores are not worth it or not possible.
//
// attend_token: one token, q (1, h, k), heads of 64 or 128 features. The time is that of reading the keys and
// values once, so they are split among many thread blocks (split-KV; Dao et al. 2023, Flash-Decoding): block (i,
// head) reads DECODE_KEYS keys at i * DECODE_KEYS, and again, until all are read. Each writes
//
//     partial[head][i] = | sum of p v, k numbers | largest score | sum of p |,      p = exp(score - largest),
//
// and the last block of a head to finish adds up the partial sums, always in the same order.

const float LOWEST = -1e30f;  // a largest score before there is one; minus infinity would give inf - inf

// partial (blocks, k + 2) of one head -> y (k,). Only the thread block that finishes last calls it.
template <int HEAD_DIM> INLINE void combine(const float* partial, int blocks, float* y) {
    if (threadIdx.x >= HEAD_DIM) return;
    float largest = LOWEST, sum = 0, acc = 0;
    for (int first = 0; first < blocks; first += 16) {
        float largests[16], sums[16], accs[16], now = largest;
        UNROLL for (int i = 0; i < 16; i++) {  // not from the L1 cache: other multiprocessors wrote them
            const float* of = partial + min(first + i, blocks - 1) * (HEAD_DIM + 2);
            largests[i] = __ldcg(of + HEAD_DIM), sums[i] = __ldcg(of + HEAD_DIM + 1);
            accs[i] = __ldcg(of + threadIdx.x);
        }
        UNROLL for (int i = 0; i < 16; i++) now = fmaxf(now, largests[i]);
        const float rescale = __expf(largest - now);
        largest = now, sum *= rescale, acc *= rescale;
        UNROLL for (int i = 0; i < 16; i++) {
            const float factor = first + i < blocks ? __expf(largests[i] - now) : 0;
            sum += sums[i] * factor, acc += accs[i] * factor;
        }
    }
    y[threadIdx.x] = acc / sum;
}

// k, v: this head's rows of HEAD_DIM numbers each, one after the other. A group of LANES lanes reads a row, 16
// bytes each. The softmax is computed online: each group keeps the largest score so far, and rescales its sums
// when it grows.
template <int HEAD_DIM, class Vector>
INLINE void attend_keys(const float* q, const uint4* k, const uint4* v, int m, float scale, float* partial) {
    const int EACH = Vector::COUNT, LANES = HEAD_DIM / EACH;
    const int GROUPS = DECODE_THREADS / LANES, KEYS = DECODE_KEYS / GROUPS;  // that a group reads at a time
    __shared__ float accs[GROUPS][HEAD_DIM], largests[GROUPS], sums[GROUPS];
    const int lane = threadIdx.x % LANES, group = threadIdx.x / LANES;
    float query[EACH], f[EACH], acc[EACH] = {}, sum = 0, largest = LOWEST;
    UNROLL for (int i = 0; i < EACH; i++) query[i] = q[lane * EACH + i] * scale;
    for (int first = blockIdx.x * DECODE_KEYS + group; first - group < m; first += gridDim.x * DECODE_KEYS) {
        uint4 keys[KEYS], values[KEYS];
        float score[KEYS];
        UNROLL for (int i = 0; i < KEYS; i++) {
            const size_t at = (size_t)min(first + i * GROUPS, m - 1) * LANES + lane;
            keys[i] = k[at], values[i] = v[at];
        }
        float now = largest;
        UNROLL for (int i = 0; i < KEYS; i++) {
            Vector::unpack(keys[i], f);
            float product = 0;
            UNROLL for (int j = 0; j < EACH; j++) product += query[j] * f[j];
            UNROLL for (int half = LANES / 2; half > 0; half /= 2) product += __shfl_xor_sync(~0u, product, half);
            score[i] = first + i * GROUPS < m ? product : NEGATIVE_INFINITY;
            now = fmaxf(now, score[i]);
        }
        const float rescale = __expf(largest - now);
        largest = now, sum *= rescale;
        UNROLL for (int j = 0; j < EACH; j++) acc[j] *= rescale;
        UNROLL for (int i = 0; i < KEYS; i++) {
            const float p = __expf(score[i] - now);
            sum += p;
            Vector::unpack(values[i], f);
            UNROLL for (int j = 0; j < EACH; j++) acc[j] += p * f[j];
        }
    }
    UNROLL for (int j = 0; j < EACH; j++) accs[group][lane * EACH + j] = acc[j];
    if (lane == 0) largests[group] = largest, sums[group] = sum;
    __syncthreads();
    if (threadIdx.x >= HEAD_DIM) return;
    for (int i = 0; i < GROUPS; i++) largest = fmaxf(largest, largests[i]);
    float y = 0, all = 0;
    UNROLL for (int i = 0; i < GROUPS; i++) {
        const float factor = __expf(largests[i] - largest);
        y += accs[i][threadIdx.x] * factor, all += sums[i] * factor;
    }
    partial[threadIdx.x] = y;
    if (threadIdx.x == 0) partial[HEAD_DIM] = largest, partial[HEAD_DIM + 1] = all;
}

// k, v (g, n_ctx, k), of which the first m positions are filled, or *position + 1. n_query: heads for each kv
// head. done (h,) counts the thread blocks that have finished; it is 0 between calls.
template <int HEAD_DIM, class Vector>
INLINE void attend_token(const float* q, const void* k, const void* v, float* y, float* partial, int* done,
                         const int* position, int m, int n_query, int n_ctx, float scale) {
    m = position ? *position + 1 : m;
    const int head = blockIdx.y, blocks = min(gridDim.x, (m + DECODE_KEYS - 1) / DECODE_KEYS);
    if (blockIdx.x >= blocks) return;
    __shared__ bool last;
    partial += (size_t)head * gridDim.x * (HEAD_DIM + 2);
    const size_t row = (size_t)(head / n_query) * n_ctx * (HEAD_DIM / Vector::COUNT);
    attend_keys<HEAD_DIM, Vector>(q + head * HEAD_DIM, (const uint4*)k + row, (const uint4*)v + row, m, scale,
                                  partial + blockIdx.x * (HEAD_DIM + 2));
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();  // who sees this block counted also sees what it has written
        last = atomicAdd(done + head, 1) == blocks - 1;
        __threadfence();
    }
    __syncthreads();
    if (!last) return;
    combine<HEAD_DIM>(partial, blocks, y + head * HEAD_DIM);
    if (threadIdx.x == 0) done[head] = 0;
}

#define ATTEND_TOKEN(NAME, HEAD_DIM, VECTOR)                                                                    \
    KERNEL void NAME(const float* q, const void* k, const void* v, float* y, float* partial, int* done,         \
                     const int* position, int m, int n_query, int n_ctx, float scale) {                         \
        await_previous_kernel();                                                                                \
        attend_token<HEAD_DIM, VECTOR>(q, k, v, y, partial, done, position, m, n_query, n_ctx, scale);          \
    }
ATTEND_TOKEN(attend_token_float16_64, 64, Float16x8)
ATTEND_TOKEN(attend_token_float16_128, 128, Float16x8)
ATTEND_TOKEN(attend_token_float32_64, 64, Float32x4)
ATTEND_TOKEN(attend_token_float32_128, 128, Float32x4)

// attend_any: any n, any head up to MAX_HEAD_DIM features, keys in float32 or float16: q (n, h, k) -> y (n, h, k).
// A warp for each query of each head, four in a thread block. It takes 32 keys at a time: each lane computes the
// score of one key, then accumulates up to 8 features of the output.
KERNEL __launch_bounds__(128) void attend_any(
    const float* q, const void* k, const void* v, float* y, const int* position, int n, int n_head, int n_query,
    int m, int head_dim, int k_row, int k_head, int v_row, int v_head, int half, int causal, float scale) {
    await_previous_kernel();
    const int FEATURES = MAX_HEAD_DIM / 32;  // of the output, for each lane
    __shared__ float query[4][MAX_HEAD_DIM];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, i = blockIdx.x * 4 + warp;
    if (i >= n * n_head) return;
    m = position ? *position + n : m;
    const int head = i % n_head, token = i / n_head, n_visible = causal ? m - n + token + 1 : m;
    for (int j = lane; j < head_dim; j += 32) query[warp][j] = q[(size_t)i * head_dim + j] * scale;
    __syncwarp();
    auto load = [&](const void* x, size_t i) { return half ? to_float(((half_t*)x)[i]) : ((float*)x)[i]; };
    const size_t k_at = (size_t)(head / n_query) * k_head, v_at = (size_t)(head / n_query) * v_head;
    float largest = NEGATIVE_INFINITY, sum = 0, acc[FEATURES] = {};
    for (int first = 0; first < n_visible; first += 32) {
        float score = NEGATIVE_INFINITY;
        if (first + lane < n_visible) {
            const size_t at = k_at + (size_t)(first + lane) * k_row;
            score = 0;
            for (int j = 0; j < head_dim; j++) score += query[warp][j] * load(k, at + j);
        }
        float now = score;
        for (int lanes = 16; lanes > 0; lanes /= 2) now = fmaxf(now, __shfl_xor_sync(~0u, now, lanes));
        now = fmaxf(now, largest);
        const float rescale = expf(largest - now), p = expf(score - now);
        largest = now;
        sum = sum * rescale + sum_of_warp(p);
        for (int j = 0; j < FEATURES; j++) acc[j] *= rescale;
        for (int key = 0; key < 32 && first + key < n_visible; key++) {
            const float p_key = __shfl_sync(~0u, p, key);
            const size_t at = v_at + (size_t)(first + key) * v_row;
            UNROLL for (int j = 0; j < FEATURES; j++)
                if (lane + 32 * j < head_dim) acc[j] += p_key * load(v, at + lane + 32 * j);
        }
    }
    UNROLL for (int j = 0; j < FEATURES; j++)
        if (lane + 32 * j < head_dim) y[(size_t)i * head_dim + lane + 32 * j] = acc[j] / sum;
}
