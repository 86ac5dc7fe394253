// Norms, activations, RoPE and the small steps between matrix products (reference.py). Floats in, floats out.

// rms_norm: x (n, d) -> y. One block for each row.
KERNEL void rms_norm(const float* x, const float* weight, float* y, int d, float eps) {
    __shared__ float room[32];
    x += (size_t)blockIdx.x * d, y += (size_t)blockIdx.x * d;
    float sum = 0;
    for (int i = threadIdx.x; i < d; i += blockDim.x) sum += x[i] * x[i];
    const float scale = rsqrtf(sum_of_block(sum, room) / d + eps);
    for (int i = threadIdx.x; i < d; i += blockDim.x) y[i] = x[i] * scale * weight[i];
}

// layer_norm: the same with the mean taken away first; the variance in a second pass, which loses no digits.
KERNEL void layer_norm(const float* x, const float* weight, const float* bias, float* y, int d, float eps) {
    __shared__ float room[32];
    x += (size_t)blockIdx.x * d, y += (size_t)blockIdx.x * d;
    float sum = 0;
    for (int i = threadIdx.x; i < d; i += blockDim.x) sum += x[i];
    const float mean = sum_of_block(sum, room) / d;
    sum = 0;
    for (int i = threadIdx.x; i < d; i += blockDim.x) sum += (x[i] - mean) * (x[i] - mean);
    const float scale = rsqrtf(sum_of_block(sum, room) / d + eps);
    for (int i = threadIdx.x; i < d; i += blockDim.x) y[i] = (x[i] - mean) * scale * weight[i] + bias[i];
}

INLINE float sigmoid(float x) { return 1 / (1 + expf(-x)); }

enum Activation { GELU_ERF, GELU_TANH, GELU_QUICK, SILU };

KERNEL void activation(const float* x, float* y, size_t count, int kind) {
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) return;
    const float v = x[i];
    if (kind == GELU_ERF) y[i] = v * normcdff(v);
    if (kind == GELU_TANH) y[i] = 0.5f * v * (1 + tanhf(0.7978845608f * (v + 0.044715f * v * v * v)));
    if (kind == GELU_QUICK) y[i] = v * sigmoid(1.702f * v);
    if (kind == SILU) y[i] = v * sigmoid(v);
}

KERNEL void swiglu(const float* gate, const float* up, float* y, size_t count) {
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) y[i] = gate[i] * sigmoid(gate[i]) * up[i];
}

// y (n, d) += bias (d,), for products that a library made.
KERNEL void add_bias(float* y, const float* bias, size_t count, int d) {
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) y[i] += bias[i % d];
}

// Floats to half precision for the matrix units, four at a time; count is a multiple of 4.
KERNEL void halve(const float4* x, uint2* y, size_t count) {
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (4 * i >= count) return;
    const float4 v = x[i];
    y[i] = make_uint2(to_halves(v.x, v.y), to_halves(v.z, v.w));
}

// rope: x (n, h, k), cos and sin (.., pairs) from row ``start`` on -> y. A thread for each pair or feature left alone.
KERNEL void rope(const float* x, const float* cos, const float* sin, float* y, const int* position, int start,
                 int count, int n_head, int k, int pairs, int neighbours) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x, each = k - pairs;  // threads for each head
    if (i >= count * n_head * each) return;
    const int head = i / each, j = i % each;  // of all n * h
    const size_t at = (size_t)head * k;
    if (j >= pairs) {
        y[at + j + pairs] = x[at + j + pairs];
        return;
    }
    const int first = neighbours ? 2 * j : j, second = neighbours ? 2 * j + 1 : j + pairs;
    const size_t row = (size_t)(filled(position, start) + head / n_head) * pairs + j;
    const float a = x[at + first], b = x[at + second], c = cos[row], s = sin[row];
    y[at + first] = a * c - b * s;
    y[at + second] = a * s + b * c;
}

// extend: rows of keys and values (n, g, k) into what is held of them (g, n_ctx, k), from place ``start`` on.
KERNEL void extend(const float* k_rows, const float* v_rows, void* k_held, void* v_held, const int* position,
                   int start, int n, int n_head, int n_ctx, int k, int half) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n * n_head * k) return;
    const int row = i / (n_head * k), head = i / k % n_head;
    const size_t to = ((size_t)head * n_ctx + filled(position, start) + row) * k + i % k;
    const float* rows = blockIdx.y ? v_rows : k_rows;
    void* held = blockIdx.y ? v_held : k_held;
    if (half) ((half_t*)held)[to] = to_half(rows[i]);
    else ((float*)held)[to] = rows[i];
}

// move: the device's own count of places.
KERNEL void move(int* position, int n) { *position += n; }
