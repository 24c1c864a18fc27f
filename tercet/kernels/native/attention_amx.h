// Attention over a bfloat16 cache by AMX: scores and weighted values are products of tiles (amx.h). Queries and softmax
// weights are rounded to bfloat16, scores, maxima and sums are float32. One row and many are computed the same way.
#pragma once

#include "attention_tile.h"

#if defined(TERCET_AMX)

// How the rows of one KV head lie in tiles of A, and its keys and values in panels.
struct TiledRows {
    long rows, each, tiles;  // each: of a tile
    long pieces, width;      // of a query, zeros to the end; values of a row of the result

    TiledRows(const Attention& a, long rows) : rows(rows), pieces((a.cache.dim + PIECE - 1) / PIECE), width(a.width()) {
        each = rows_of_tile(rows), tiles = (rows + each - 1) / each;
    }
    long query_words() const { return tiles * each * pieces * W; }
    long panel_words() const { return pieces * W * W; }

    // Where row r of tiles with that many pieces begins; its next piece is each * W words on.
    uint16_t* row(uint32_t* tiled, long r, long pieces_of_row) const {
        return reinterpret_cast<uint16_t*>(tiled + (r / each * each * pieces_of_row + r % each) * W);
    }
};

// dim values -> a row of tiles of A, filled up with zeros.
static inline void tile_row(const float* from, float scale, long dim, long each, uint16_t* to) {
    for (long d = 0; d < dim; d += PIECE, to += each * PIECE)
        for (long j = 0; j < PIECE; j += W) {
            long count = std::clamp<long>(dim - d - j, 0, W);
            store_rounded(to + j, (count == W ? load(from + d + j) : load(from + d + j, static_cast<int>(count))) * scale);
        }
}

// Keys as panels [pieces * PIECE / 2][W] of pairs.
static inline void pair_keys(const Place<uint16_t>& place, long offset, long dim, const TiledRows& t, Ahead<uint16_t>& ahead, uint32_t* panels) {
    for (long at = 0; at < place.count(); at += W, panels += t.panel_words()) {
        const uint16_t* keys[W];
        for (int i = 0; i < W; i++) keys[i] = place.keys[at + i] + offset;
        ahead.ask(AT_ONCE);
        long d = 0;
        for (; d + 2 * W <= dim; d += 2 * W) {
            vu pairs[W];
            transpose_pairs(keys, d, pairs);
            for (int j = 0; j < W; j++) store(panels + (d / 2 + j) * W, pairs[j]);
        }
        for (; d < t.pieces * PIECE; d += 2)
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

// All rows times `panels` panels -> y [rows, ldy], and rows beyond them up to the last tile's.
static inline void multiply_rows(const TiledRows& t, const uint32_t* x, long pieces, const uint32_t* w, long panels, float* y, long ldy) {
    static const float zeros[4 * W] = {};
    long tile = t.each * pieces * W, panel_words = pieces * W * W;
    by_panels(0, panels, t.tiles > 1 ? 2 : 4, [&](auto np, long p) {
        const uint32_t* from = w + p * panel_words;
        long at = 0;
        if constexpr (np <= 2)
            for (; at + 1 < t.tiles; at += 2)
                multiply_tiles<np, 2>(from, panel_words, x + at * tile, tile, t.each, pieces, zeros, 0, y + at * t.each * ldy + p * W, ldy);
        if (at < t.tiles)
            multiply_tiles<np, 1>(from, panel_words, x + at * tile, tile, t.each, pieces, zeros, 0, y + at * t.each * ldy + p * W, ldy);
    });
}

struct Tiled {
    using Stored = uint16_t;
    static constexpr int BLOCK_ROWS = 96;
    struct Held : Tiles {
        explicit Held(long rows) : Tiles(rows_of_tile(rows)) {}
    };

    static long query_size(const Attention& a, long rows) { return TiledRows(a, rows).query_words(); }
    static long spare(const Attention& a) { return ROWS_A * a.width(); }

    static void pack_query(const Attention& a, long rows, long r, const float* from, float* query) {
        TiledRows t(a, rows);
        tile_row(from, a.scale, a.cache.dim, t.each, t.row(reinterpret_cast<uint32_t*>(query), r, t.pieces));
    }

    static void attend(const Attention& a, const Queries& q, long head, const Place<uint16_t>& place, const Place<uint16_t>* next, Partial out) {
        TiledRows t(a, q.rows);
        long offset = head * a.cache.dim, key_words = TILE / W * t.panel_words(), value_words = TILE / 2 * a.width();
        long all = t.tiles * t.each * TILE;
        uint32_t* keys = scratch<uint32_t, 2>(key_words + value_words + all / 2);
        uint32_t *values = keys + key_words, *weights = values + value_words;
        float* scores = scratch<float, 10>(all);
        Ahead<uint16_t> ahead{next, offset, a.cache.dim};
        pair_keys(place, offset, a.cache.dim, t, ahead, keys);
        multiply_rows(t, reinterpret_cast<const uint32_t*>(q.query), t.pieces, keys, TILE / W, scores, TILE);
        for (long r = 0; r < q.rows; r++) {
            ahead.ask(AT_ONCE);
            uint16_t* row = t.row(weights, r, TILE / PIECE);
            auto keep = [&](int at, vf some) { store_rounded(row + at / PIECE * t.each * PIECE + at % PIECE, some); };
            out.total[r] = softmax_row(scores + r * TILE, place.first, q.low(a, r), q.position(r) + 1, out.largest + r, keep);
        }
        pair_values(place, offset, a.cache.dim, ahead, values);
        ahead.ask(TILE);
        multiply_rows(t, weights, TILE / PIECE, values, a.width() / W, out.values, a.width());
    }
};
#endif
