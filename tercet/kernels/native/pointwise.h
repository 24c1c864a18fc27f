// RMSNorm, rotary embedding with the write of K and V, SwiGLU. All activations are float32.
#pragma once

#include <algorithm>
#include <bit>
#include <functional>

#include "linear.h"
#include "team.h"

constexpr long ROWS_AT_ONCE = 8;  // rows of one item of the team

template <class Row>
static void for_rows(long rows, long width, const Row& row) {
    long grain = width >= 4096 ? 1 : ROWS_AT_ONCE;
    Team::instance().run((rows + grain - 1) / grain, [&](long item) {
        for (long r = item * grain; r < std::min(rows, (item + 1) * grain); r++) row(r);
    });
}

// x / sqrt(mean(x^2) + eps) * weight, of n values; y may be x.
static inline void rms_norm_row(const float* x, const float* weight, float eps, long n, float* y) {
    vf squares = {};
    float rest = 0;
    long i = 0;
    for (; i + W <= n; i += W) squares += load(x + i) * load(x + i);
    for (long j = i; j < n; j++) rest += x[j] * x[j];
    float scale = 1 / std::sqrt((sum(squares) + rest) / n + eps);
    for (i = 0; i + W <= n; i += W) store(y + i, load(x + i) * scale * load(weight + i));
    for (; i < n; i++) y[i] = x[i] * scale * weight[i];
}

static void rms_norm(const float* x, const float* weight, float eps, long rows, long n, float* y) {
    for_rows(rows, n, [&](long r) { rms_norm_row(x + r * n, weight, eps, n, y + r * n); });
}

static inline vf silu(vf x) { return x / (1.0f + exponential(-x)); }

// gate_up [rows, 2n], the gate's columns first -> y [rows, n] = silu(gate) * up.
static void silu_and_mul(const float* gate_up, long rows, long n, float* y) {
    for_rows(rows, n, [&](long r) {
        const float *gate = gate_up + r * 2 * n, *up = gate + n;
        long i = 0;
        for (; i + W <= n; i += W) store(y + r * n + i, silu(load(gate + i)) * load(up + i));
        for (; i < n; i++) y[r * n + i] = gate[i] / (1 + std::exp(-gate[i])) * up[i];
    });
}

struct Cache {
    void* memory;  // one layer's [blocks, 2, block_size, kv_heads, dim]; 2 is K, V
    long block_size, kv_heads, dim;
    int format;
    int shift;  // block_size is 1 << shift

    Cache(void* memory, long block_size, long kv_heads, long dim, int format)
        : memory(memory), block_size(block_size), kv_heads(kv_heads), dim(dim), format(format),
          shift(std::countr_zero(static_cast<unsigned long>(block_size))) {}

    // Where the keys (or values) of a slot begin. slot = block * block_size + offset.
    long token(long slot, bool value) const {
        return (slot + (((slot >> shift) + value) << shift)) * kv_heads * dim;
    }
};

static inline void write_values(const Cache& cache, long at, const float* from, long count) {
    if (cache.format == FORMAT_F32) {
        memcpy(static_cast<float*>(cache.memory) + at, from, count * sizeof(float));
        return;
    }
    uint16_t* to = static_cast<uint16_t*>(cache.memory) + at;
    long i = 0;
    for (; i + W <= count; i += W) store_narrowed(to + i, load(from + i));
    for (; i < count; i++) to[i] = static_cast<uint16_t>(narrowed(splat(from[i]))[0]);
}

// Rotates the pairs (x[i], x[i + dim / 2]).
static inline void rotate(float* x, const float* cosine, const float* sine, long dim) {
    long half = dim / 2, i = 0;
    float *first = x, *second = x + half;
    for (; i + W <= half; i += W) {
        vf a = load(first + i), b = load(second + i), c = load(cosine + i), s = load(sine + i);
        store(first + i, a * c - b * s);
        store(second + i, b * c + a * s);
    }
    for (; i < half; i++) {
        float a = first[i], b = second[i];
        first[i] = a * cosine[i] - b * sine[i];
        second[i] = b * cosine[i] + a * sine[i];
    }
}

// qkv [rows, heads + 2 * kv_heads, dim]: queries and keys are normed (if there is a weight [heads + kv_heads, dim]) and
// rotated in place; keys and values go to the cache, slots[row] = block * block_size + offset.
// cosine, sine [max_context, dim / 2].
static void rotate_and_write(float* qkv, const float* qk_norm, float eps, const float* cosine, const float* sine,
                             const int64_t* positions, const int64_t* slots, long rows, long heads, const Cache& cache) {
    long dim = cache.dim, width = (heads + 2 * cache.kv_heads) * dim;
    for_rows(rows, width, [&](long r) {
        float *row = qkv + r * width, *keys = row + heads * dim;
        const float *c = cosine + positions[r] * (dim / 2), *s = sine + positions[r] * (dim / 2);
        for (long h = 0; h < heads + cache.kv_heads; h++) {
            if (qk_norm) rms_norm_row(row + h * dim, qk_norm + h * dim, eps, dim, row + h * dim);
            rotate(row + h * dim, c, s, dim);
        }
        write_values(cache, cache.token(slots[r], false), keys, cache.kv_heads * dim);
        write_values(cache, cache.token(slots[r], true), keys + cache.kv_heads * dim, cache.kv_heads * dim);
    });
}
