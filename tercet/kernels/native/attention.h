// Paged attention of any number of sequences, each with one row (decode) or many (a chunk of a prompt).
//
// Keys are taken in tiles of TILE, aligned to the sequence's first token; each tile has a softmax of its own, and tiles
// are merged in order by their log-sum-exp. So a row's result depends on its own sequence alone: not on the batch, the
// chunk that it is in, or the number of threads.
#pragma once

#include "linear.h"
#include "pointwise.h"

constexpr int TILE = 64;
constexpr int VALUES = TILE + 2;  // rows of a panel of values: panels a power of two apart would share the same lines of the cache
constexpr int BLOCK_ROWS = 48;  // query rows (tokens times the query heads of a KV head) that share a tile of one item
constexpr int FEW_ROWS = 4;      // that take the values from where they lie
constexpr long MOST_PARTIALS = 8 << 20;  // floats

struct Span {  // one sequence's part of the batch
    int64_t row, rows;          // its rows of the batch, the last tokens of its context
    int64_t context;            // tokens in the cache, these included
    const int64_t* table;       // its blocks
};

struct Attention {
    const float* query;  // [T, >= heads * dim], rows ldq apart
    long ldq;
    Cache cache;
    long heads;
    long window;  // tokens that a token sees, itself included; 0: all before it
    float scale;
    float* out;  // [T, heads * dim]

    long group() const { return heads / cache.kv_heads; }
};

struct Item {  // query tokens first .. last of a span, all their heads
    const Span* span;
    long first, last;

    long tokens() const { return last - first; }
    long position(long token) const { return span->context - span->rows + token; }
    long low(const Attention& a) const {  // the first key that any of them sees
        return a.window ? std::max<long>(0, position(first) - a.window + 1) : 0;
    }
    long high() const { return position(last - 1) + 1; }
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

static inline long slot_of(const Span& span, const Cache& cache, long position) {
    return (span.table[position >> cache.shift] << cache.shift) + (position & (cache.block_size - 1));
}

constexpr long AHEAD = 32;  // tokens

// The first head asks for what all heads of a token will read: one after the other they would each wait for it.
static inline void prefetch(const Item& item, const Attention& a, long head, long position, bool value) {
    if (head || position >= item.span->context) return;
    const Cache& cache = a.cache;
    long size = cache.format == FORMAT_F32 ? 4 : 2;
    const char* memory = static_cast<const char*>(cache.memory) + cache.token(slot_of(*item.span, cache, position), value) * size;
    for (long line = 0; line < cache.kv_heads * cache.dim * size; line += 64) __builtin_prefetch(memory + line);
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
    for (; d + 2 * W <= dim; d += 2 * W) {  // two values in 32 bits
        vu rows[W];
        for (int t = 0; t < W; t++) rows[t] = load(reinterpret_cast<const uint32_t*>(keys[t] + d));
        transpose(rows);
        for (int j = 0; j < W; j++) {
            store(panel + (d + 2 * j) * W, (vf)(rows[j] << 16));
            store(panel + (d + 2 * j + 1) * W, (vf)(rows[j] & 0xffff0000u));
        }
    }
    return d;
}

// The keys first .. last as panels [dim][W]; what the last panel has beyond them is zeros.
template <class T>
static void pack_keys(const Item& item, const Attention& a, long head, long first, long last, float* panels) {
    const long dim = a.cache.dim, offset = head * dim;
    const T* memory = static_cast<const T*>(a.cache.memory);
    const T* zeros = reinterpret_cast<const T*>(scratch<float, 8>(dim));  // never written to
    for (long at = first; at < last; at += W, panels += dim * W) {
        const T* keys[W];
        for (int t = 0; t < W; t++) prefetch(item, a, head, at + AHEAD + t, false);
        for (int t = 0; t < W; t++)
            keys[t] = at + t < last ? memory + a.cache.token(slot_of(*item.span, a.cache, at + t), false) + offset : zeros;
        for (long d = transpose_keys(keys, dim, panels); d < dim; d++)
            for (int t = 0; t < W; t++) panels[d * W + t] = value(keys[t][d]);
    }
}

// Where each of the keys first .. last has its values.
template <class T>
static void find_values(const Item& item, const Attention& a, long head, long first, long last, const T** rows) {
    const T* memory = static_cast<const T*>(a.cache.memory) + head * a.cache.dim;
    for (long t = 0; t < last - first; t++) {
        prefetch(item, a, head, first + t + AHEAD, true);
        rows[t] = memory + a.cache.token(slot_of(*item.span, a.cache, first + t), true);
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
        vf a[NP];
        for (int p = 0; p < NP; p++) a[p] = loaded(rows[0][i] + p * W);
#pragma GCC unroll 16
        for (int r = 0; r < MR; r++) {
            vf b = splat(x[r * ldx + i]);
            for (int p = 0; p < NP; p++) acc[r][p] = fma(a[p], b, acc[r][p]);
        }
    }
};

// weights [rows, TILE] times the values of `count` keys -> out [rows, ldo].
template <class T>
static void weigh_values(const Item& item, const Attention& a, long head, long first, long last, const float* weights, long rows,
                         float* panels, float* out, long ldo) {
    const T* values[TILE];
    long dim = a.cache.dim, count = last - first, wide = (dim + W - 1) / W;
    find_values(item, a, head, first, last, values);
    auto write = [&](int row, int column, vf s) { store(out + row * ldo + column, s); };
    if (rows > FEW_ROWS || dim % W) {
        pack_values(values, count, dim, panels);
        return by_panels(0, wide, panels_at_once(rows), [&](auto np, long p) {
            panels_by_rows<F32, np>(panels + p * VALUES * W, VALUES * W, weights, TILE, count, rows, 0, p * W, write);
        });
    }
    by_panels(0, wide, panels_at_once(rows), [&](auto np, long p) {
        panels_by_rows<InCache<T>, np>(values, 0, weights, TILE, count, rows, 0, p * W, write);
        for (long t = 0; t < count; t++) values[t] += np * W;
    });
}

// Scores of one row against keys first .. first + TILE -> weights in place; -> sum. Only keys low .. high count.
static inline float softmax_row(float* scores, long first, long low, long high, float* largest) {
    long from = std::max<long>(0, low - first), to = std::max<long>(from, std::min<long>(TILE, high - first));
    for (long t = 0; t < from; t++) scores[t] = -INFINITY;
    for (long t = to; t < TILE; t++) scores[t] = -INFINITY;
    vf most = splat(-INFINITY);
    for (int t = 0; t < TILE; t += W) most = larger(load(scores + t), most);
    float top = largest_lane(most);
    *largest = top;
    if (from == to) return 0;
    vf total = {};
    for (int t = 0; t < TILE; t += W) {
        vf weight = exponential(load(scores + t) - top);
        store(scores + t, weight);
        total += weight;
    }
    return sum(total);
}

// The keys of one tile, for the item's rows of one KV head.
static void attend_tile(const Item& item, const Attention& a, const float* query, long head, long tile, Partial out) {
    long dim = a.cache.dim, group = a.group(), rows = item.tokens() * group, first = tile * TILE;
    long last = std::min(first + TILE, item.high()), panels = (last - first + W - 1) / W, wide = (dim + W - 1) / W;
    float* keys = scratch<float, 2>(TILE * (dim + W) + wide * VALUES * W + rows * TILE);
    float *values = keys + TILE * (dim + W), *scores = values + wide * VALUES * W;
    bool f32 = a.cache.format == FORMAT_F32;
    (f32 ? pack_keys<float> : pack_keys<uint16_t>)(item, a, head, first, last, keys);
    by_panels(0, panels, panels_at_once(rows), [&](auto np, long p) {
        panels_by_rows<F32, np>(keys + p * dim * W, dim * W, query, dim, dim, rows, 0, p * W,
                                [&](int row, int column, vf s) { store(scores + row * TILE + column, s); });
    });
    for (long r = 0; r < rows; r++) {
        long position = item.position(item.first + r / group);
        long low = a.window ? position - a.window + 1 : 0;
        out.total[r] = softmax_row(scores + r * TILE, first, low, position + 1, out.largest + r);
    }
    (f32 ? weigh_values<float> : weigh_values<uint16_t>)(item, a, head, first, last, scores, rows, values, out.values, wide * W);
}

// Rows of a partial and of the packed query: by KV head, then token, then query head of that KV head.
static void attend_tile(const Item& item, const Attention& a, const float* query, long tile, Partial out) {
    long rows = item.tokens() * a.group(), width = (a.cache.dim + W - 1) / W * W;
    for (long head = 0; head < a.cache.kv_heads; head++) {
        Partial part = out.from(head * rows, width);
        attend_tile(item, a, query + head * rows * a.cache.dim, head, tile, part);
    }
}

// Adds a tile's partial result to what the tiles before it gave.
static inline void merge(Partial sofar, Partial tile, long rows, long width) {
    for (long r = 0; r < rows; r++) {
        if (tile.total[r] == 0) continue;  // it sees no key of this tile
        float top = std::max(sofar.largest[r], tile.largest[r]);
        float old = std::exp(sofar.largest[r] - top), fresh = std::exp(tile.largest[r] - top);
        float *to = sofar.values + r * width, *from = tile.values + r * width;
        for (long d = 0; d < width; d += W) store(to + d, load(to + d) * old + load(from + d) * fresh);
        sofar.total[r] = sofar.total[r] * old + tile.total[r] * fresh;
        sofar.largest[r] = top;
    }
}

static inline void begin(Partial sofar, long rows, long width) {
    for (long r = 0; r < rows; r++) sofar.largest[r] = -INFINITY, sofar.total[r] = 0;
    memset(sofar.values, 0, rows * width * sizeof(float));
}

// Calls row(r, token of the batch, query head) for each row, in the order above.
template <class Row>
static inline void for_rows(const Item& item, const Attention& a, const Row& row) {
    long r = 0, group = a.group();
    for (long head = 0; head < a.cache.kv_heads; head++)
        for (long token = item.first; token < item.last; token++)
            for (long g = 0; g < group; g++) row(r++, item.span->row + token, head * group + g);
}

static inline void finish(const Item& item, const Attention& a, Partial sofar, long width) {
    long dim = a.cache.dim;
    for_rows(item, a, [&](long r, long token, long head) {
        float* to = a.out + (token * a.heads + head) * dim;
        for (long d = 0; d < dim; d++) to[d] = sofar.values[r * width + d] / sofar.total[r];
    });
}

static inline void pack_query(const Item& item, const Attention& a, float* query) {
    long dim = a.cache.dim;
    for_rows(item, a, [&](long r, long token, long head) {
        const float* from = a.query + token * a.ldq + head * dim;
        for (long d = 0; d < dim; d++) query[r * dim + d] = from[d] * a.scale;
    });
}

// The items of a batch, and where each one's tiles begin in one line of all tiles.
struct Items {
    std::vector<Item> all;
    std::vector<long> tiles{0};
    long most_rows = 0;

    Items(const Attention& a, const Span* spans, long count) {
        long tokens = std::max<long>(1, BLOCK_ROWS / a.group());
        for (long s = 0; s < count; s++)
            for (long first = 0; first < spans[s].rows; first += tokens) {
                Item item{spans + s, first, std::min<long>(spans[s].rows, first + tokens)};
                all.push_back(item);
                tiles.push_back(tiles.back() + (item.high() + TILE - 1) / TILE - item.low(a) / TILE);
                most_rows = std::max(most_rows, item.tokens() * a.heads);
            }
    }
    long rows(const Attention& a, long i) const { return all[i].tokens() * a.heads; }
    long of_tile(long number) const { return std::upper_bound(tiles.begin(), tiles.end(), number) - tiles.begin() - 1; }
    long tile(const Attention& a, long i, long number) const { return all[i].low(a) / TILE + number - tiles[i]; }
};

static void attend(const Attention& a, const Span* spans, long count) {
    Items items(a, spans, count);
    Team& team = Team::instance();
    long width = (a.cache.dim + W - 1) / W * W, size = items.most_rows * (width + 2), query_size = items.most_rows * a.cache.dim;
    long number_of_items = static_cast<long>(items.all.size()), number_of_tiles = items.tiles.back();
    // A few long contexts are divided by tiles, whose partial results are merged afterwards; of many, each item merges its own.
    bool divided = team.threads() > 1 && number_of_items < 4 * team.threads() && number_of_tiles * size <= MOST_PARTIALS;
    float* partials = divided ? scratch<float, 3>(number_of_tiles * size) : nullptr;
    if (divided)
        team.run(number_of_tiles, [&](long number) {
            long i = items.of_tile(number);
            float* query = scratch<float, 4>(query_size);
            pack_query(items.all[i], a, query);
            attend_tile(items.all[i], a, query, items.tile(a, i, number), Partial(partials + number * size, items.rows(a, i)));
        });
    team.run(number_of_items, [&](long i) {
        long rows = items.rows(a, i);
        float* memory = scratch<float, 5>(2 * size + query_size);
        float* query = memory + 2 * size;
        Partial sofar(memory, rows), own(memory + size, rows);
        if (!divided) pack_query(items.all[i], a, query);
        begin(sofar, rows, width);
        for (long number = items.tiles[i]; number < items.tiles[i + 1]; number++) {
            if (!divided) attend_tile(items.all[i], a, query, items.tile(a, i, number), own);
            merge(sofar, divided ? Partial(partials + number * size, rows) : own, rows, width);
        }
        finish(items.all[i], a, sofar, width);
    });
}
