// Attention of some rows over one tile of keys of one KV head.
#pragma once

#include "linear.h"
#include "pointwise.h"

constexpr int TILE = 64;
constexpr int VALUES = TILE + 2;  // rows of a panel of values: panels a power of two apart would share the same lines of the cache
constexpr int FEW_ROWS = ROWS;    // that take the values from where they lie
constexpr int AT_ONCE = 4;        // tokens that are asked for in one go: more would wait for each other

struct Attention {
    const float* query;  // [T, >= heads * dim], rows ldq apart
    long ldq;
    Cache cache;
    long heads;
    long window;  // tokens that a token sees, itself included; 0: all before it
    float scale;  // of the scores, which are logarithms to base 2
    float* out;  // [T, heads * dim]

    long group() const { return heads / cache.kv_heads; }
    long width() const { return (cache.dim + W - 1) / W * W; }
};

// The rows of one KV head: tokens that follow each other, of each the query heads of that KV head.
struct Queries {
    const float* query;    // scaled, packed
    long rows, group;      // rows of a token
    long first_position;   // of the first token

    long position(long r) const { return first_position + r / group; }
    long low(const Attention& a, long r) const { return a.window ? position(r) - a.window + 1 : 0; }  // the first key that it sees
};

// What a tile gives: of each row the largest score, the sum of the weights, and the weighted values.
struct Partial {
    float *largest, *total, *values;
    Partial(float* at, long rows) : largest(at), total(at + rows), values(at + 2 * rows) {}
    Partial(float* largest, float* total, float* values) : largest(largest), total(total), values(values) {}
    Partial from(long row, long width) const { return {largest + row, total + row, values + row * width}; }
};

static inline vf loaded(const float* p) { return load(p); }
static inline vf loaded(const uint16_t* p) { return widened(p); }
static inline float value(float x) { return x; }
static inline float value(uint16_t x) { return widened(x); }

// Where the tokens first .. last of a sequence lie, at most TILE.
template <class T>
struct Place {
    long first, last, to_values;  // from a token's keys to its values
    const T* keys[TILE];          // of all KV heads; beyond the last token they are zeros

    long count() const { return last - first; }
    const T* values(long t) const { return t < count() ? keys[t] + to_values : keys[t]; }

    void find(const Cache& cache, const int64_t* table, long from, long to) {
        const long token = cache.kv_heads * cache.dim;
        first = from, last = to, to_values = token << cache.shift;
        long t = 0;
        for (; t < count();) {
            long offset = (first + t) & (cache.block_size - 1), end = std::min(count(), t + cache.block_size - offset);
            const T* at = static_cast<const T*>(cache.memory) + 2 * to_values * table[(first + t) >> cache.shift] + offset * token;
            for (; t < end; at += token) keys[t++] = at;
        }
        const T* zeros = reinterpret_cast<const T*>(scratch<float, 8>(token));  // never written to
        for (; t < TILE; t++) keys[t] = zeros;
    }
};

// Asks for what the same head will read of the next tile, little by little: memory then works as evenly as the CPU does.
template <class T>
struct Ahead {
    const Place<T>* place;  // null: there is none
    long offset, dim, at = 0;

    void ask(long tokens) {
        if (!place) return;
        for (long end = std::min(place->count(), at + tokens); at < end; at++)
            for (long d = 0; d < dim; d += 64 / sizeof(T)) {
                __builtin_prefetch(place->keys[at] + offset + d);
                __builtin_prefetch(place->keys[at] + place->to_values + offset + d);
            }
    }
};

// Values d .. d + 2 W of W keys, two in 32 bits: rows[i] lane t <- values d + 2 i and d + 2 i + 1 of key t.
static inline void transpose_pairs(const uint16_t* const (&keys)[W], long d, vu (&rows)[W]) {
    for (int t = 0; t < W; t++) rows[t] = load(reinterpret_cast<const uint32_t*>(keys[t] + d));
    transpose(rows);
}

// dim values of W keys each -> panel [dim][W]. The first of dim that are done.
static inline long transpose_keys(const float* const (&keys)[W], long dim, float* panel) {
    long d = 0;
    for (; d + W <= dim; d += W) {
        vu rows[W];
        for (int t = 0; t < W; t++) rows[t] = (vu)load(keys[t] + d);
        transpose(rows);
        for (int j = 0; j < W; j++) store(panel + (d + j) * W, (vf)rows[j]);
    }
    return d;
}
static inline long transpose_keys(const uint16_t* const (&keys)[W], long dim, float* panel) {
    long d = 0;
    for (; d + 2 * W <= dim; d += 2 * W) {
        vu rows[W];
        transpose_pairs(keys, d, rows);
        for (int j = 0; j < W; j++) {
            store(panel + (d + 2 * j) * W, (vf)(rows[j] << 16));
            store(panel + (d + 2 * j + 1) * W, (vf)(rows[j] & 0xffff0000u));
        }
    }
    return d;
}

// Keys as panels [dim][W]; what the last panel has beyond them is zeros.
template <class T>
static void pack_keys(const Place<T>& place, long offset, long dim, Ahead<T>& ahead, float* panels) {
    for (long at = 0; at < place.count(); at += W, panels += dim * W) {
        const T* keys[W];
        for (int t = 0; t < W; t++) keys[t] = place.keys[at + t] + offset;
        ahead.ask(AT_ONCE);
        for (long d = transpose_keys(keys, dim, panels); d < dim; d++)
            for (int t = 0; t < W; t++) panels[d * W + t] = value(keys[t][d]);
    }
}

// Values as panels [dim / W][VALUES][W].
template <class T>
static void pack_values(const T* const* rows, long count, long dim, float* panels) {
    for (long t = 0; t < count; t++) {
        const T* from = rows[t];
        long d = 0;
        for (; d + W <= dim; d += W) store(panels + (d / W * VALUES + t) * W, loaded(from + d));
        for (; d < dim; d++) panels[(d / W * VALUES + t) * W + d % W] = value(from[d]);
    }
}

// Values where they lie in the cache, as weights of a tile (gemm.h): few rows do not pay for panels.
template <class T>
struct InCache {
    using Weight = const T*;
    using Input = float;
    template <int NP, int MR>
    static inline void step(vf (&acc)[MR][NP], const Weight* const (&rows)[NP], long i, const float* x, long ldx) {
        multiply(acc, [&](int p) { return loaded(rows[0][i] + p * W); }, [&](int r) { return splat(x[r * ldx + i]); });
    }
};

// scores [rows, TILE] = queries times keys.
template <class T>
static void score_keys(const Queries& q, const Place<T>& place, long offset, long dim, Ahead<T>& ahead, float* panels, float* scores) {
    pack_keys(place, offset, dim, ahead, panels);
    auto write = [&](int row, int column, vf s) { store(scores + row * TILE + column, s); };
    by_panels(0, (place.count() + W - 1) / W, panels_at_once(q.rows), [&](auto np, long p) {
        ahead.ask(2 * AT_ONCE);
        panels_by_rows<F32, np>(panels + p * dim * W, dim * W, q.query, dim, dim, q.rows, 0, p * W, write);
    });
}

// weights [rows, TILE] times values -> out [rows, width].
template <class T>
static void weigh_values(const Place<T>& place, long offset, long dim, Ahead<T>& ahead, const float* weights, long rows, float* panels,
                         float* out) {
    const T* values[TILE];
    long count = place.count(), wide = (dim + W - 1) / W;
    for (long t = 0; t < count; t++) values[t] = place.values(t) + offset;
    auto write = [&](int row, int column, vf s) { store(out + row * wide * W + column, s); };
    bool packed = rows > FEW_ROWS || dim % W;
    if (packed) pack_values(values, count, dim, panels);
    by_panels(0, wide, panels_at_once(rows), [&](auto np, long p) {
        ahead.ask(2 * AT_ONCE);
        if (packed) return panels_by_rows<F32, np>(panels + p * VALUES * W, VALUES * W, weights, TILE, count, rows, 0, p * W, write);
        panels_by_rows<InCache<T>, np>(values, 0, weights, TILE, count, rows, 0, p * W, write);
        for (long t = 0; t < count; t++) values[t] += np * W;
    });
}

// Scores of rows r .. r + N against keys first .. first + TILE -> out's largest and total, and keep(i, t, weights t .. t + W) of row r + i.
// Rows are computed by turns: each has to wait for its own results.
template <int N, class Keep>
static inline void softmax_rows(const Attention& a, const Queries& q, long first, long r, float* scores, Partial out, const Keep& keep) {
    scores += r * TILE;
    vf top[N], total[N] = {};
    for (int i = 0; i < N; i++) {
        float* row = scores + i * TILE;
        long from = std::clamp<long>(q.low(a, r + i) - first, 0, TILE), to = std::clamp<long>(q.position(r + i) + 1 - first, from, TILE);
        for (long t = 0; t < from; t++) row[t] = -INFINITY;
        for (long t = to; t < TILE; t++) row[t] = -INFINITY;
        vf most = splat(-INFINITY);
        for (int t = 0; t < TILE; t += W) most = larger(load(row + t), most);
        out.largest[r + i] = largest_lane(most);
        top[i] = splat(from == to ? INFINITY : out.largest[r + i]);  // that sees none of them: all weights are 0
    }
    for (int t = 0; t < TILE; t += W)
#pragma GCC unroll 16
        for (int i = 0; i < N; i++) {
            vf weight = power_of_two(load(scores + i * TILE + t) - top[i]);
            keep(i, t, weight);
            total[i] += weight;
        }
    for (int i = 0; i < N; i++) out.total[r + i] = sum(total[i]);
}

// Attention in float32, over a cache of T.
template <class T>
struct Wide {
    using Stored = T;
    static constexpr int BLOCK_ROWS = 48;  // query rows (tokens times the query heads of a KV head) that share a tile of one item
    struct Held {  // by the thread, while it attends rows of which each KV head has so many
        explicit Held(long) {}
    };

    static long query_size(const Attention& a, long rows) { return rows * a.cache.dim; }  // floats
    static long spare(const Attention&) { return 0; }  // floats beyond the last row of a result, that may be written to

    // Row r of a KV head's `rows`.
    static void pack_query(const Attention& a, long, long r, const float* from, float* query) {
        for (long d = 0; d < a.cache.dim; d++) query[r * a.cache.dim + d] = from[d] * a.scale;
    }

    // The queries of one KV head over the tile at `place`, while the tile at `next` comes from memory.
    static void attend(const Attention& a, const Queries& q, long head, const Place<T>& place, const Place<T>* next, Partial out) {
        long dim = a.cache.dim, offset = head * dim;
        float* keys = scratch<float, 2>(TILE * (dim + W) + a.width() * VALUES + q.rows * TILE);
        float *values = keys + TILE * (dim + W), *scores = values + a.width() * VALUES;
        Ahead<T> ahead{next, offset, dim};
        score_keys(q, place, offset, dim, ahead, keys, scores);
        for (long r = 0; r < q.rows; r++) {
            ahead.ask(AT_ONCE);
            softmax_rows<1>(a, q, place.first, r, scores, out, [&](int, int t, vf weights) { store(scores + r * TILE + t, weights); });
        }
        weigh_values(place, offset, dim, ahead, scores, q.rows, values, out.values);
        ahead.ask(TILE);
    }
};
