// What Python calls (library.py): each operation alone, each half of a layer, and all layers of a step in one call.

#include <numbers>

#include "attention.h"
#include "communicator.h"
#include "mlp.h"
#include "moe.h"
#include "sampling.h"

struct Layer {
    const float* attention_norm;  // [hidden]
    const float* qk_norm;         // [heads + kv_heads, dim] or null
    const float* mlp_norm;        // [hidden]
    Linear qkv, output;
    Mlp mlp;
    int64_t window;
};

struct Shape {
    int64_t hidden, heads, kv_heads, dim;
    float eps;
    const float *cosine, *sine;  // [max_context, dim / 2]
};

struct Step {
    int64_t rows;
    const int64_t *positions, *slots;  // [rows]
    const Span* spans;
    int64_t num_spans;
    void* cache;  // [layers, blocks, 2, block_size, kv_heads, dim]
    int64_t layer_bytes, block_size;
    int32_t cache_format;
};

static long qkv_width(const Shape* s) { return (s->heads + 2 * s->kv_heads) * s->dim; }

extern "C" {

int lanes() { return W; }

const char* instructions() {
#if defined(TERCET_AMX)
    if (amx()) return "amx_bf16";
#endif
#if defined(__AVX512BF16__)
    return "avx512_bf16";
#elif defined(__AVX512F__)
    return "avx512f";
#elif defined(__AVX2__)
    return "avx2";
#else
    return "baseline";
#endif
}

void set_threads(int threads) { Team::instance().resize(threads); }

void pack(const void* weight, int64_t n, int64_t k, int format, void* panels) {
    if (format == FORMAT_F32)
        pack_panels(static_cast<const float*>(weight), n, k, static_cast<float*>(panels));
    else
        pack_panels(static_cast<const uint16_t*>(weight), n, k, static_cast<uint32_t*>(panels));
}

// panels: zeros.
void pack_quantised_weight(const uint8_t* q, const float* scales, const float* leasts, int64_t n, int64_t k, int format, uint32_t* panels) {
    if (format == FORMAT_Q4)
        pack_quantised<4>(q, scales, leasts, n, k, panels);
    else
        pack_quantised<8>(q, scales, leasts, n, k, panels);
}

void linear_forward(const Linear* l, const float* x, int64_t m, float* y) { linear_into(*l, x, l->k, m, y, l->n, false); }

void rms_norm_forward(const float* x, const float* weight, float eps, int64_t rows, int64_t n, float* y) {
    rms_norm(x, weight, eps, rows, n, y);
}

void silu_and_mul_forward(const float* gate_up, int64_t rows, int64_t n, float* y) { silu_and_mul(gate_up, rows, n, y); }

void rotate_and_write_forward(float* qkv, const float* qk_norm, const Shape* s, const Step* step) {
    Cache cache{step->cache, step->block_size, s->kv_heads, s->dim, step->cache_format};
    rotate_and_write(qkv, qk_norm, s->eps, s->cosine, s->sine, step->positions, step->slots, step->rows, s->heads, cache);
}

void attention_forward(const float* query, int64_t ldq, const Shape* s, const Step* step, int64_t window, float* out) {
    Cache cache{step->cache, step->block_size, s->kv_heads, s->dim, step->cache_format};
    float scale = std::numbers::log2e_v<float> / std::sqrt(static_cast<float>(s->dim));
    attend({query, ldq, cache, s->heads, window, scale, out}, step->spans, step->num_spans);
}

void draw_tokens_forward(const float* logits, int64_t rows, int64_t n, const Draw* draws, int64_t* tokens) {
    draw_tokens(logits, rows, n, draws, tokens);
}

// y [rows, hidden] += what the experts make of x; numbers, weights [rows, k]. Returns wrong_number, and
// computes nothing if there is one.
int64_t experts_forward(const Experts* e, const float* x, int64_t rows, const int64_t* numbers, const float* weights, int64_t k,
                        float* y) {
    int64_t wrong = wrong_number(*e, numbers, rows * k);
    if (wrong < 0) experts_into(*e, x, rows, numbers, weights, k, y);
    return wrong;
}

// y [rows, hidden] += the layer's attention over norm(x), behind its output projection; y may be x. step->cache: this
// layer's. written(i), if given, is called when its K and V are in the cache, and stops it by another value than 0, which
// is returned.
int attention_half(const Layer* layer, const Shape* s, const Step* step, const float* x, float* y, int (*written)(int64_t),
                   int64_t i) {
    long rows = step->rows, width = qkv_width(s), attended_width = s->heads * s->dim;
    float* normed = scratch<float, 6>(rows * (s->hidden + width + attended_width));
    float *qkv = normed + rows * s->hidden, *attended = qkv + rows * width;
    rms_norm(x, layer->attention_norm, s->eps, rows, s->hidden, normed);
    linear_into(layer->qkv, normed, s->hidden, rows, qkv, width, false);
    rotate_and_write_forward(qkv, layer->qk_norm, s, step);
    if (int stop = written ? written(i) : 0) return stop;
    attention_forward(qkv, width, s, step, layer->window, attended);
    linear_into(layer->output, attended, attended_width, rows, y, s->hidden, true);
    return 0;
}

// y [rows, hidden] += the layer's MLP over norm(x); y may be x.
void mlp_half(const Layer* layer, const Shape* s, int64_t rows, const float* x, float* y) {
    float* normed = scratch<float, 6>(rows * (s->hidden + 3 * layer->mlp.width()));
    rms_norm(x, layer->mlp_norm, s->eps, rows, s->hidden, normed);
    mlp_into(layer->mlp, normed, rows, y, normed + rows * s->hidden);
}

// All layers, x [rows, hidden] in place. on_layer(i): as `written` of attention_half. *done counts the layers.
int layers_forward(const Layer* layers, int64_t count, const Shape* s, const Step* step, float* x, int (*on_layer)(int64_t),
                   std::atomic<int64_t>* done) {
    Step here = *step;
    for (int64_t i = 0; i < count; i++) {
        here.cache = static_cast<char*>(step->cache) + i * step->layer_bytes;
        if (int stop = attention_half(&layers[i], s, &here, x, x, on_layer, i)) return stop;
        mlp_half(&layers[i], s, step->rows, x, x);
        done->fetch_add(1, std::memory_order_relaxed);
    }
    return 0;
}
}
