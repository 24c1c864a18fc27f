// Draws a token for each row of logits: temperature, min-p, top-k, top-p, and a race of exponentials (engine/sampler.py
// says why). What the race reads of the random numbers depends on the scores; the numbers themselves do not.
#pragma once

#include "pointwise.h"

struct Draw {
    float temperature, min_p, top_p;  // min_p 0 and top_p 1: nothing is left out
    int64_t top_k;                    // 0: as many as there are
    uint32_t first, second;           // words that name the random numbers
    int32_t greedy;
};

constexpr float NOBODY = -INFINITY;  // the score of a token that is left out

// A bijection of 32 bits: lowbias32, C. Wellons.
static inline vu mixed(vu x) {
    x ^= x >> 16;
    x *= 0x7feb352du;
    x ^= x >> 15;
    x *= 0x846ca68bu;
    return x ^ x >> 16;
}

// Uniform variates of the tokens first .. first + W, in (0, 1).
static inline vf uniforms(const Draw& d, long first) {
    vu ids;
    for (int i = 0; i < W; i++) ids[i] = static_cast<uint32_t>(first + i + 1);
    vu bits = mixed(mixed(ids * 0x9e3779b9u ^ d.first) + d.second) & 0x7fffffffu;
    return (__builtin_convertvector((vi)bits, vf) + 0.5f) * static_cast<float>((1 - 0x1p-22) * 0x1p-31);
}

// The largest of n values, the first of equals; -1 if one is NaN or infinite (minus infinity is not).
static inline long likeliest(const float* x, long n) {
    vf most = splat(-INFINITY);
    vi odd = {};
    long i = 0;
    for (; i + W <= n; i += W) {
        vf v = load(x + i);
        odd |= (v != v) | (v == splat(INFINITY));
        most = larger(v, most);
    }
    float top = largest_lane(most);
    bool bad = false;
    for (int lane = 0; lane < W; lane++) bad |= odd[lane] != 0;
    for (; i < n; i++) top = x[i] > top ? x[i] : top, bad |= x[i] != x[i] || x[i] == INFINITY;
    if (bad || top == -INFINITY) return -1;
    return std::find(x, x + n, top) - x;
}

static inline vf load_scores(const float* scores, long count) {
    vf v = splat(NOBODY);
    for (long i = 0; i < count; i++) v[i] = scores[i];
    return v;
}

static inline void leave_out_below(float* scores, long n, float least) {
    for (long i = 0; i < n; i++) scores[i] = scores[i] < least ? NOBODY : scores[i];
}

// The k-th largest. The k-th largest of what the blocks have at most bounds it from below, and leaves few to order.
static inline float kth_largest(const float* scores, long n, long k) {
    constexpr long BLOCK = 8 * W;
    float* few = scratch<float, 9>(n);
    long blocks = 0;
    for (long i = 0; i + BLOCK <= n; i += BLOCK) {
        vf most = load(scores + i);
        for (long j = W; j < BLOCK; j += W) most = larger(load(scores + i + j), most);
        few[blocks++] = largest_lane(most);
    }
    float bound = NOBODY;
    if (blocks >= k) {
        std::nth_element(few, few + k - 1, few + blocks, std::greater<float>());
        bound = few[k - 1];
    }
    long count = 0;
    for (long i = 0; i < n; i++)
        if (scores[i] >= bound) few[count++] = scores[i];
    std::nth_element(few, few + k - 1, few + count, std::greater<float>());
    return few[k - 1];
}

// A score and its token as one number: larger scores first, then smaller tokens.
static inline uint64_t ranked(float score, long token) {
    uint32_t bits;
    memcpy(&bits, &score, 4);
    bits = bits & 0x80000000u ? bits : ~(bits | 0x80000000u);  // the largest score has the smallest bits
    return static_cast<uint64_t>(bits) << 32 | static_cast<uint32_t>(token);
}

// Keeps the likeliest tokens whose predecessors, in the order of their probability, hold less than top_p of it.
static inline void keep_top_p(float* scores, long n, float top_p) {
    uint64_t* order = scratch<uint64_t, 0>(n);
    long count = 0, kept = 0, sorted = 0;
    double total = 0, held = 0;
    for (long i = 0; i < n; i += W) total += sum(exponential(i + W <= n ? load(scores + i) : load_scores(scores + i, n - i)));
    // All tokens that are less likely than this hold less than 1 - top_p together, so none of them is kept.
    float bound = static_cast<float>(std::log(std::max(1e-37, 0.99 * (1 - static_cast<double>(top_p)) * total / n)));
    for (long i = 0; i < n; i++)
        if (scores[i] >= bound || scores[i] == 0) order[count++] = ranked(scores[i], i);
    while (kept < count && (kept == 0 || held < top_p)) {
        if (kept == sorted) {  // sort some more, as few are kept as a rule
            long more = std::min(count, std::max<long>(64, 4 * sorted));
            if (more < count) std::nth_element(order + sorted, order + more, order + count);
            std::sort(order + sorted, order + more);
            sorted = more;
        }
        held += std::exp(scores[order[kept++] & 0xffffffffu]) / total;
    }
    float* left = scratch<float, 9>(kept);
    for (long i = 0; i < kept; i++) left[i] = scores[order[i] & 0xffffffffu];
    std::fill(scores, scores + n, NOBODY);
    for (long i = 0; i < kept; i++) scores[order[i] & 0xffffffffu] = left[i];
}

// The token whose score minus the logarithm of its exponential variate is the largest, the first of equals.
static inline long win_race(const float* scores, long n, const Draw& d) {
    long winner = -1;
    float best = -INFINITY, threshold = INFINITY;
    auto consider = [&](long i, float uniform) {
        if (scores[i] == NOBODY) return;
        float time = scores[i] - std::log(-std::log1p(-uniform));
        if (time > best) best = time, winner = i, threshold = std::exp(-best) * 1.0001f;
    };
    for (long i = 0; i < n; i += W) {
        int count = static_cast<int>(std::min<long>(W, n - i));
        vf uniform = uniforms(d, i), score = count == W ? load(scores + i) : load_scores(scores + i, count);
        // An exponential variate is at least as large as its uniform one, so only these can be ahead of the best.
        vi ahead = winner < 0 ? ~vi{} : uniform < exponential(score) * threshold;
        for (int lane = 0; lane < count; lane++)
            if (ahead[lane]) consider(i + lane, uniform[lane]);
    }
    return winner;
}

// -> the token, or -1 if a logit is not finite.
static long draw_token(const float* logits, long n, const Draw& d) {
    long top = likeliest(logits, n);
    if (top < 0 || d.greedy) return top;
    float *scores = scratch<float, 4>(n), most = logits[top];
    for (long i = 0; i < n; i++) scores[i] = (logits[i] - most) / d.temperature;
    if (d.min_p > 0) leave_out_below(scores, n, std::log(d.min_p));
    if (d.top_k > 0 && d.top_k < n) leave_out_below(scores, n, kth_largest(scores, n, d.top_k));
    if (d.top_p < 1) keep_top_p(scores, n, d.top_p);
    return win_race(scores, n, d);
}

static void draw_tokens(const float* logits, long rows, long n, const Draw* draws, int64_t* tokens) {
    Team::instance().run(rows, [&](long r) { tokens[r] = draw_token(logits + r * n, n, draws[r]); });
}
