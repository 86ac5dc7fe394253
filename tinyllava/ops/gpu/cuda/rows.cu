// Norms, activations, RoPE and the small steps between matrix products (reference.py). Floats in, floats out.

// What only goes on into products in half precision is written as such: y's numbers are halves where ``half`` says so.
INLINE void store(void* y, size_t i, float value, int half) {
    if (half) ((half_t*)y)[i] = to_half(value);
    else ((float*)y)[i] = value;
}

// rms_norm: x (n, d) -> y. One block for each row.
KERNEL void rms_norm(const float* x, const float* weight, void* y, int d, float eps, int half) {
    take_turn();
    __shared__ float room[32];
    const size_t first = (size_t)blockIdx.x * d;
    float sum = 0;
    for (int i = threadIdx.x; i < d; i += blockDim.x) sum += x[first + i] * x[first + i];
    const float scale = rsqrtf(sum_of_block(sum, room) / d + eps);
    for (int i = threadIdx.x; i < d; i += blockDim.x) store(y, first + i, x[first + i] * scale * weight[i], half);
}

// The same by fours, all asked for before the first is used; d is a multiple of 4 and at most 32 * blockDim.x.
KERNEL void rms_norm_fours(const float4* x, const float4* weight, void* y, int d, float eps, int half) {
    take_turn();
    __shared__ float room[32];
    float4 v[8], w[8];
    float sum = 0;
    x += (size_t)blockIdx.x * (d / 4);
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const int at = threadIdx.x + blockDim.x * i;
        v[i] = w[i] = make_float4(0, 0, 0, 0);
        if (4 * at < d) v[i] = x[at], w[i] = weight[at];
    }
#pragma unroll
    for (int i = 0; i < 8; i++) sum += v[i].x * v[i].x + v[i].y * v[i].y + v[i].z * v[i].z + v[i].w * v[i].w;
    const float scale = rsqrtf(sum_of_block(sum, room) / d + eps);
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const int at = threadIdx.x + blockDim.x * i;
        if (4 * at >= d) continue;
        const float a = v[i].x * scale * w[i].x, b = v[i].y * scale * w[i].y;
        const float c = v[i].z * scale * w[i].z, e = v[i].w * scale * w[i].w;
        const size_t to = (size_t)blockIdx.x * (d / 4) + at;
        if (half) ((uint2*)y)[to] = make_uint2(to_halves(a, b), to_halves(c, e));
        else ((float4*)y)[to] = make_float4(a, b, c, e);
    }
}

// layer_norm: the same with the mean taken away first; the variance in a second pass, which loses no digits.
KERNEL void layer_norm(const float* x, const float* weight, const float* bias, float* y, int d, float eps) {
    take_turn();
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

INLINE float activated(float x, int kind) {
    if (kind == GELU_ERF) return x * normcdff(x);
    if (kind == GELU_TANH) return 0.5f * x * (1 + tanhf(0.7978845608f * (x + 0.044715f * x * x * x)));
    return x * sigmoid(kind == GELU_QUICK ? 1.702f * x : x);
}

KERNEL void activation(const float* x, void* y, size_t count, int kind, int half) {
    take_turn();
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) store(y, i, activated(x[i], kind), half);
}

KERNEL void swiglu(const float* gate, const float* up, float* y, size_t count) {
    take_turn();
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) y[i] = gate[i] * sigmoid(gate[i]) * up[i];
}

// The same in fours, to halves; count is a multiple of 4.
KERNEL void swiglu_halves(const float4* gate, const float4* up, uint2* y, size_t count) {
    take_turn();
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (4 * i >= count) return;
    const float4 g = gate[i], u = up[i];
    y[i] = make_uint2(to_halves(g.x * sigmoid(g.x) * u.x, g.y * sigmoid(g.y) * u.y),
                      to_halves(g.z * sigmoid(g.z) * u.z, g.w * sigmoid(g.w) * u.w));
}

// y (n, d) += bias (d,), for products that a library made. Grid (columns by 256, n).
KERNEL void add_bias(float* y, const float* bias, int d) {
    take_turn();
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < d) y[(size_t)blockIdx.y * d + i] += bias[i];
}

// Floats to half precision for the matrix units, four at a time; count is a multiple of 4.
KERNEL void halve(const float4* x, uint2* y, size_t count) {
    take_turn();
    const size_t i = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (4 * i >= count) return;
    const float4 v = x[i];
    y[i] = make_uint2(to_halves(v.x, v.y), to_halves(v.z, v.w));
}

// rope: x (n, h, k), cos and sin (.., pairs) from row ``start`` on -> y. Grid (threads of a token by 256, n): a thread
// for each pair, or for a feature that is left alone.
KERNEL void rope(const float* x, const float* cos, const float* sin, float* y, const int* position, int start,
                 int n_head, int k, int pairs, int neighbours) {
    take_turn();
    const int i = blockIdx.x * blockDim.x + threadIdx.x, each = k - pairs;  // threads for each head
    if (i >= n_head * each) return;
    const int head = i / each, j = i - head * each;
    const size_t at = ((size_t)blockIdx.y * n_head + head) * k;
    if (j >= pairs) {
        y[at + j + pairs] = x[at + j + pairs];
        return;
    }
    const int first = neighbours ? 2 * j : j, second = neighbours ? 2 * j + 1 : j + pairs;
    const size_t row = (size_t)(filled(position, start) + blockIdx.y) * pairs + j;
    const float a = x[at + first], b = x[at + second], c = cos[row], s = sin[row];
    y[at + first] = a * c - b * s;
    y[at + second] = a * s + b * c;
}

// append_kv: rows of keys and values (n, g, k) into what is held of them (g, n_ctx, k), from place ``start`` on. Grid
// (numbers of a row by 1024, n, 2), 256 threads. Four numbers a thread, of one head if k is a multiple of 4.
KERNEL void append_kv(const float* k_rows, const float* v_rows, void* k_held, void* v_held, const int* position,
                   int start, int n_head, int n_ctx, int k, int half) {
    take_turn();
    const float* rows = (blockIdx.z ? v_rows : k_rows) + (size_t)blockIdx.y * n_head * k;
    void* held = blockIdx.z ? v_held : k_held;
    const size_t place = filled(position, start) + blockIdx.y;
    const int i = 4 * (blockIdx.x * 256 + threadIdx.x), head = i / k;
    if (i >= n_head * k) return;
    const size_t to = ((size_t)head * n_ctx + place) * k + i - head * k;
    if (k % 4 == 0 && (size_t)rows % 16 == 0) {
        const float4 v = *(const float4*)(rows + i);
        if (half) *(uint2*)((half_t*)held + to) = make_uint2(to_halves(v.x, v.y), to_halves(v.z, v.w));
        else *(float4*)((float*)held + to) = v;
        return;
    }
    for (int j = i; j < min(i + 4, n_head * k); j++)
        store(held, ((size_t)(j / k) * n_ctx + place) * k + j % k, rows[j], half);
}

// advance: the device's own count of places.
KERNEL void advance(int* position, int n) {
    take_turn();
    *position += n;
}
