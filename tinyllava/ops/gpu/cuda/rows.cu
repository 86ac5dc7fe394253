// Norms, activations, RoPE and the small operations between matrix products (formulas: reference.py). Thread
// blocks of ROW_THREADS threads; float32 in, and out except where ``half`` asks for float16 (store in common.cu).

// rms_norm: x (n, d) -> y. One thread block for each row.
KERNEL void rms_norm(const float* x, const float* weight, void* y, int d, float eps, int half) {
    await_previous_kernel();
    const size_t first = (size_t)blockIdx.x * d;
    float sum = 0;
    for (int i = threadIdx.x; i < d; i += blockDim.x) sum += x[first + i] * x[first + i];
    const float scale = rsqrtf(sum_of_block(sum) / d + eps);
    for (int i = threadIdx.x; i < d; i += blockDim.x) store(y, first + i, x[first + i] * scale * weight[i], half);
}

// The same with 16-byte loads, all issued before the first is used; d % 4 == 0, d <= 32 * ROW_THREADS.
KERNEL void rms_norm_vec4(const float4* x, const float4* weight, void* y, int d, float eps, int half) {
    await_previous_kernel();
    float4 v[8], w[8];
    float sum = 0;
    x += (size_t)blockIdx.x * (d / 4);
    UNROLL for (int i = 0; i < 8; i++) {
        const int at = threadIdx.x + blockDim.x * i;
        v[i] = w[i] = make_float4(0, 0, 0, 0);
        if (4 * at < d) v[i] = x[at], w[i] = weight[at];
    }
    UNROLL for (int i = 0; i < 8; i++)
        sum += v[i].x * v[i].x + v[i].y * v[i].y + v[i].z * v[i].z + v[i].w * v[i].w;
    const float scale = rsqrtf(sum_of_block(sum) / d + eps);
    UNROLL for (int i = 0; i < 8; i++) {
        const int at = threadIdx.x + blockDim.x * i;
        if (4 * at >= d) continue;
        const float4 normed = make_float4(v[i].x * scale * w[i].x, v[i].y * scale * w[i].y,
                                          v[i].z * scale * w[i].z, v[i].w * scale * w[i].w);
        store4(y, 4 * ((size_t)blockIdx.x * (d / 4) + at), normed, half);
    }
}

// layer_norm: x (n, d) -> y. One thread block for each row. The variance in a second pass, from x - mean.
KERNEL void layer_norm(const float* x, const float* weight, const float* bias, float* y, int d, float eps) {
    await_previous_kernel();
    x += (size_t)blockIdx.x * d, y += (size_t)blockIdx.x * d;
    float sum = 0;
    for (int i = threadIdx.x; i < d; i += blockDim.x) sum += x[i];
    const float mean = sum_of_block(sum) / d;
    sum = 0;
    for (int i = threadIdx.x; i < d; i += blockDim.x) sum += (x[i] - mean) * (x[i] - mean);
    const float scale = rsqrtf(sum_of_block(sum) / d + eps);
    for (int i = threadIdx.x; i < d; i += blockDim.x) y[i] = (x[i] - mean) * scale * weight[i] + bias[i];
}

// ---- elementwise: one thread for each number, or for four

INLINE size_t thread_of_grid() { return (size_t)blockIdx.x * blockDim.x + threadIdx.x; }

INLINE float sigmoid(float x) { return 1 / (1 + expf(-x)); }

INLINE float activated(float x, int kind) {
    if (kind == GELU_ERF) return x * normcdff(x);
    if (kind == GELU_TANH) return 0.5f * x * (1 + tanhf(0.7978845608f * (x + 0.044715f * x * x * x)));
    return x * sigmoid(kind == GELU_QUICK ? 1.702f * x : x);
}

KERNEL void activation(const float* x, void* y, size_t count, int kind, int half) {
    await_previous_kernel();
    const size_t i = thread_of_grid();
    if (i < count) store(y, i, activated(x[i], kind), half);
}

KERNEL void swiglu(const float* gate, const float* up, float* y, size_t count) {
    await_previous_kernel();
    const size_t i = thread_of_grid();
    if (i < count) y[i] = gate[i] * sigmoid(gate[i]) * up[i];
}

// The same to float16, four numbers a thread; count is a multiple of 4.
KERNEL void swiglu_float16(const float4* gate, const float4* up, uint2* y, size_t count) {
    await_previous_kernel();
    const size_t i = thread_of_grid();
    if (4 * i >= count) return;
    const float4 g = gate[i], u = up[i];
    y[i] = pack_halves(make_float4(g.x * sigmoid(g.x) * u.x, g.y * sigmoid(g.y) * u.y, g.z * sigmoid(g.z) * u.z,
                                   g.w * sigmoid(g.w) * u.w));
}

// float32 to float16 for tensor cores, four numbers a thread; count is a multiple of 4.
KERNEL void to_float16(const float4* x, uint2* y, size_t count) {
    await_previous_kernel();
    const size_t i = thread_of_grid();
    if (4 * i < count) y[i] = pack_halves(x[i]);
}

// y (n, d) += bias (d,), after a product by cuBLAS. Grid (columns by ROW_THREADS, n).
KERNEL void add_bias(float* y, const float* bias, int d) {
    await_previous_kernel();
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < d) y[(size_t)blockIdx.y * d + i] += bias[i];
}

// ---- positions

// rope: x (n, h, k), cos and sin (.., pairs) from row ``start`` on -> y. Grid (threads of a token by ROW_THREADS,
// n): a thread for each pair, or for a feature that is not rotated. ``adjacent``: pairs are features
// 2 j and 2 j + 1 (kind "norm"), else j and j + pairs ("neox").
KERNEL void rope(const float* x, const float* cos, const float* sin, float* y, const int* position, int start,
                 int n_head, int head_dim, int pairs, int adjacent) {
    await_previous_kernel();
    const int i = blockIdx.x * blockDim.x + threadIdx.x, each = head_dim - pairs;  // threads for each head
    if (i >= n_head * each) return;
    const int head = i / each, j = i - head * each;
    const size_t at = ((size_t)blockIdx.y * n_head + head) * head_dim;
    if (j >= pairs) {
        y[at + j + pairs] = x[at + j + pairs];
        return;
    }
    const int first = adjacent ? 2 * j : j, second = adjacent ? 2 * j + 1 : j + pairs;
    const size_t row = (size_t)(position_of(position, start) + blockIdx.y) * pairs + j;
    const float a = x[at + first], b = x[at + second], c = cos[row], s = sin[row];
    y[at + first] = a * c - b * s;
    y[at + second] = a * s + b * c;
}

// append_kv: keys and values (n, g, k) of new tokens into the caches (g, n_ctx, k), from position ``start`` on.
// Grid (numbers of a token by 4 * ROW_THREADS, n, 2 for keys and values). Four numbers a thread, in one store if k
// is a multiple of 4, as they are of one head then.
KERNEL void append_kv(const float* new_k, const float* new_v, void* k_cache, void* v_cache, const int* position,
                      int start, int n_head, int n_ctx, int head_dim, int half) {
    await_previous_kernel();
    const float* x = (blockIdx.z ? new_v : new_k) + (size_t)blockIdx.y * n_head * head_dim;
    void* cache = blockIdx.z ? v_cache : k_cache;
    const size_t row = position_of(position, start) + blockIdx.y;
    const int i = 4 * (blockIdx.x * ROW_THREADS + threadIdx.x), head = i / head_dim;
    if (i >= n_head * head_dim) return;
    if (head_dim % 4 == 0 && (size_t)x % 16 == 0) {
        const size_t to = ((size_t)head * n_ctx + row) * head_dim + i - head * head_dim;
        store4(cache, to, *(const float4*)(x + i), half);
        return;
    }
    for (int j = i; j < min(i + 4, n_head * head_dim); j++)
        store(cache, ((size_t)(j / head_dim) * n_ctx + row) * head_dim + j % head_dim, x[j], half);
}

// advance: the device's copy of a position.
KERNEL void advance(int* position, int n) {
    await_previous_kernel();
    *position += n;
}
