// Attention over a bfloat16 cache by AMX: scores and weighted values are products of tiles (amx.h). Queries and softmax
// weights are rounded to bfloat16, scores, maxima and sums are float32. One row and many are computed the same way.
#pragma once

#include "attention_tile.h"

#if defined(TERCET_AMX)

static inline long pieces_of(long dim) { return (dim + PIECE - 1) / PIECE; }

// Keys as panels [pieces * PIECE / 2][W] of pairs.
static inline void pair_keys(const Place<uint16_t>& place, long offset, long dim, Ahead<uint16_t>& ahead, uint32_t* panels) {
    for (long at = 0; at < place.count(); at += W, panels += pieces_of(dim) * W * W) {
        const uint16_t* keys[W];
        for (int i = 0; i < W; i++) keys[i] = place.keys[at + i] + offset;
        ahead.ask(AT_ONCE);
        long d = 0;
        for (; d + 2 * W <= dim; d += 2 * W) {
            vu pairs[W];
            transpose_pairs(keys, d, pairs);
            for (int j = 0; j < W; j++) store(panels + (d / 2 + j) * W, pairs[j]);
        }
        for (; d < pieces_of(dim) * PIECE; d += 2)
            for (int i = 0; i < W; i++) panels[d / 2 * W + i] = d < dim ? keys[i][d] | static_cast<uint32_t>(keys[i][d + 1]) << 16 : 0;
    }
}

// Values as panels [TILE / 2][W] of pairs of tokens.
static inline void pair_values(const Place<uint16_t>& place, long offset, long dim, Ahead<uint16_t>& ahead, uint32_t* panels) {
    for (long t = 0; t < TILE; t += 2, panels += W) {
        if (t % (2 * AT_ONCE) == 0) ahead.ask(AT_ONCE);
        const uint16_t *first = place.values(t) + offset, *second = place.values(t + 1) + offset;
        long d = 0;
        for (; d + W <= dim; d += W) store(panels + d * TILE / 2, (vu)widened(first + d) >> 16 | (vu)widened(second + d));
        for (; d < dim; d++) panels[d / W * W * TILE / 2 + d % W] = first[d] | static_cast<uint32_t>(second[d]) << 16;
    }
}

// All rows of x times `panels` panels -> y [x.rows, ldy], and rows beyond them up to the last tile's.
static inline void multiply_rows(const TiledRows& x, const uint32_t* w, long panels, float* y, long ldy) {
    long panel = x.pieces * W * W;
    by_panels(0, panels, x.rows > ROWS_A ? 2 : 4, [&](auto np, long p) {
        long r = 0;
        if constexpr (np <= 2)
            for (; r + x.each < x.rows; r += 2 * x.each) multiply_tiles<np, 2>(x, r, w + p * panel, panel, nullptr, 0, y + r * ldy + p * W, ldy);
        if (r < x.rows) multiply_tiles<np, 1>(x, r, w + p * panel, panel, nullptr, 0, y + r * ldy + p * W, ldy);
    });
}

struct Tiled {
    using Stored = uint16_t;
    static constexpr int BLOCK_ROWS = 96;
    struct Held : Tiles {
        explicit Held(long rows) : Tiles(rows_of_tile(rows)) {}
    };

    static TiledRows queries(const Attention& a, long rows, const float* query) {
        return {reinterpret_cast<uint32_t*>(const_cast<float*>(query)), rows, pieces_of(a.cache.dim)};
    }
    static long query_size(const Attention& a, long rows) { return queries(a, rows, nullptr).words(); }
    static long spare(const Attention& a) { return ROWS_A * a.width(); }

    static void pack_query(const Attention& a, long rows, long r, const float* from, float* query) {
        TiledRows tiled = queries(a, rows, query);
        for (long d = 0; d < tiled.pieces * PIECE; d += W) {
            long count = std::clamp<long>(a.cache.dim - d, 0, W);
            store_rounded(tiled.value(r, d), (count == W ? load(from + d) : load(from + d, static_cast<int>(count))) * a.scale);
        }
    }

    static void attend(const Attention& a, const Queries& q, long head, const Place<uint16_t>& place, const Place<uint16_t>* next, Partial out) {
        long dim = a.cache.dim, offset = head * dim, key_words = pieces_of(dim) * TILE * W, value_words = TILE / 2 * a.width();
        TiledRows query = queries(a, q.rows, q.query), weights(nullptr, q.rows, TILE / PIECE);
        uint32_t* keys = scratch<uint32_t, 2>(key_words + value_words + weights.words());
        uint32_t* values = keys + key_words;
        weights.at = values + value_words;
        float* scores = scratch<float, 10>(query.tiles() * query.each * TILE);
        Ahead<uint16_t> ahead{next, offset, dim};
        pair_keys(place, offset, dim, ahead, keys);
        multiply_rows(query, keys, TILE / W, scores, TILE);
        auto weigh = [&](auto n, long r) {
            uint16_t* to[n];
            for (int i = 0; i < n; i++) to[i] = weights.value(r + i, 0);
            ahead.ask(n * AT_ONCE);
            softmax_rows<n>(a, q, place.first, r, scores, out, [&](int i, int t, vf some) {
                store_rounded(to[i] + t / PIECE * weights.each * PIECE + t % PIECE, some);
            });
        };
        long r = 0;
        for (; r + 4 <= q.rows; r += 4) weigh(std::integral_constant<int, 4>{}, r);
        for (; r < q.rows; r++) weigh(std::integral_constant<int, 1>{}, r);
        pair_values(place, offset, dim, ahead, values);
        ahead.ask(TILE);
        multiply_rows(weights, values, a.width() / W, out.values, a.width());
    }
};
#endif
