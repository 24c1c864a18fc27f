// Linear layers over packed weights.
#pragma once

#include <algorithm>
#include <type_traits>

#include "amx.h"
#include "team.h"

enum Format : int { FORMAT_F32 = 0, FORMAT_BF16 = 1, FORMAT_Q4 = 2, FORMAT_Q8 = 3 };

struct Linear {
    const void* weight;  // panels, the last one filled up with zeros
    const float* bias;   // [n] or null
    long n, k;
    int format;
};

constexpr long BLOCK_BYTES = 192 << 10;  // of the rows of x that stay in the cache while panels pass by

static inline void pack_panels(const uint16_t* weight, long n, long k, uint32_t* panels) {
    for (long o = 0; o < n; o++)
        for (long i = 0; i < k; i += 2)
            panels[(o / W * (k / 2) + i / 2) * W + o % W] = weight[o * k + i] | static_cast<uint32_t>(weight[o * k + i + 1]) << 16;
}

static inline void pack_panels(const float* weight, long n, long k, float* panels) {
    for (long o = 0; o < n; o++)
        for (long i = 0; i < k; i++) panels[(o / W * k + i) * W + o % W] = weight[o * k + i];
}

// q [n, k] and scales, leasts [n, k / QUANT] -> panels of Quantised<BITS>.
template <int BITS>
static void pack_quantised(const uint8_t* q, const float* scales, const float* leasts, long n, long k, uint32_t* panels) {
    using P = Quantised<BITS>;
    long blocks = k / QUANT;
    for (long o = 0; o < n; o++)
        for (long b = 0; b < blocks; b++) {
            uint32_t* block = panels + (o / W * blocks + b) * P::SIZE + o % W;
            memcpy(block, scales + o * blocks + b, 4);
            memcpy(block + W, leasts + o * blocks + b, 4);
            for (int i = 0; i < QUANT; i++)
                block[(2 + i / P::EACH) * W] |= static_cast<uint32_t>(q[o * k + b * QUANT + i]) << i % P::EACH * BITS;
        }
}

#if defined(__AVX512BF16__)
// Rows of x as bfloat16, [m, k].
static inline const uint32_t* narrowed_rows(const float* x, long ldx, long k, long m) {
    uint32_t* to = scratch<uint32_t, 1>(m * k / 2 + W);
    Team::instance().run(m, [&](long r) {
        uint16_t* row = reinterpret_cast<uint16_t*>(to) + r * k;
        long i = 0;
        for (; i + W <= k; i += W) store_narrowed(row + i, load(x + r * ldx + i));
        for (; i < k; i++) row[i] = static_cast<uint16_t>(narrowed(splat(x[r * ldx + i]))[0]);
    });
    return to;
}
#endif

// How many panels a tile has when m rows are tiled: as many as there are registers for (see `multiply`), up to four.
static inline long panels_at_once(long m) {
    long tiles = std::max<long>(1, (m + ROWS - 1) / ROWS), rows = std::max<long>(1, (m + tiles - 1) / tiles), panels = 4;
    while (panels > 2 && panels * rows + std::min(panels, rows) + 1 > REGISTERS) panels--;
    return panels;
}

// Calls each(NP, panel) for panels first .. last, `most` at a time.
template <class Each>
static inline void by_panels(long first, long last, long most, const Each& each) {
    for (; most == 4 && last - first >= 4; first += 4) each(std::integral_constant<int, 4>{}, first);
    for (; most >= 3 && last - first >= 3; first += 3) each(std::integral_constant<int, 3>{}, first);
    for (; last - first >= 2; first += 2) each(std::integral_constant<int, 2>{}, first);
    if (first < last) each(std::integral_constant<int, 1>{}, first);
}

// Calls part(first panel, end, row, rows) for all panels of a matrix, in pieces of which all but the last can be taken
// `most` panels at once, and all blocks of `rows` rows of x, on the team.
template <class Part>
static void parts_by_blocks(long n, long m, long rows, long most, const Part& part) {
    long panels = (n + W - 1) / W, blocks = (m + rows - 1) / rows;
    long grain = std::max<long>(1, panels / most / (4 * Team::instance().threads())) * most;  // panels of one item
    long items = (panels + grain - 1) / grain;
    Team::instance().run(items * blocks, [&](long item) {
        long row = item / items * rows, first = item % items * grain;
        part(first, std::min(panels, first + grain), row, std::min(rows, m - row));
    });
}

// Calls tiles(NP, panel, row, rows) for all panels of a matrix, `most` at once, and all blocks of its rows of x, on the team.
template <class Each>
static void panels_by_blocks(long n, long k, long m, long most, const Each& tiles) {
    long rows = std::max<long>(ROWS, BLOCK_BYTES / (k * 4) / ROWS * ROWS);
    parts_by_blocks(n, m, rows, most, [&](long first, long last, long row, long count) {
        by_panels(first, last, most, [&](auto np, long panel) { tiles(np, panel, static_cast<int>(row), static_cast<int>(count)); });
    });
}

// One panel of Quantised<BITS> -> f32 panel [k][W].
template <int BITS>
static inline void widen_panel(const uint32_t* panel, long k, float* wide) {
    using P = Quantised<BITS>;
    for (long b = 0; b < k / QUANT; b++, panel += P::SIZE) {
        vf scale = (vf)load(panel), least = (vf)load(panel + W);
        for (int i = 0; i < QUANT; i++, wide += W) {
            vu q = load(panel + (2 + i / P::EACH) * W) >> (i % P::EACH * BITS) & ((1u << BITS) - 1);
            store(wide, fma(__builtin_convertvector((vi)q, vf), scale, least));
        }
    }
}

constexpr int DIRECT_ROWS = 4;  // more: quantised weights are widened once for a block of rows, not once for each tile

template <int BITS, class Out>
static void quantised_linear(const Linear& l, const float* x, long ldx, long m, const Out& out) {
    long panel_size = l.k / QUANT * Quantised<BITS>::SIZE;
    const uint32_t* weight = static_cast<const uint32_t*>(l.weight);
    // Rows that take the weights as they are need a register more for each panel, for what is left of a word.
    long most = m <= DIRECT_ROWS ? std::clamp<long>((REGISTERS - 2) / (std::max<long>(1, m) + 1), 2, 4) : panels_at_once(m);
    panels_by_blocks(l.n, l.k, m, most, [&](auto np, long panel, int row, int count) {
        const uint32_t* from = weight + panel * panel_size;
        if (m <= DIRECT_ROWS) {
            panels_by_rows<Quantised<BITS>, np>(from, panel_size, x + row * ldx, ldx, l.k / QUANT, count, row, panel * W, out);
            return;
        }
        float* wide = scratch<float, 1>(np * l.k * W);
        for (int p = 0; p < np; p++) widen_panel<BITS>(from + p * panel_size, l.k, wide + p * l.k * W);
        panels_by_rows<F32, np>(wide, l.k * W, x + row * ldx, ldx, l.k, count, row, panel * W, out);
    });
}

// x [m, k], rows ldx apart. out(row, first column, sums) gets W columns at a time.
template <class Out>
static void linear(const Linear& l, const float* x, long ldx, long m, const Out& out) {
    if (l.format == FORMAT_F32) {
        const float* weight = static_cast<const float*>(l.weight);
        return panels_by_blocks(l.n, l.k, m, panels_at_once(m), [&](auto np, long panel, int row, int count) {
            panels_by_rows<F32, np>(weight + panel * l.k * W, l.k * W, x + row * ldx, ldx, l.k, count, row, panel * W, out);
        });
    }
    if (l.format == FORMAT_Q4) return quantised_linear<4>(l, x, ldx, m, out);
    if (l.format == FORMAT_Q8) return quantised_linear<8>(l, x, ldx, m, out);
    const uint32_t* weight = static_cast<const uint32_t*>(l.weight);
    long panel_size = l.k / 2 * W;
#if defined(__AVX512BF16__)
    const uint32_t* pairs = narrowed_rows(x, ldx, l.k, m);
    panels_by_blocks(l.n, l.k, m, panels_at_once(m), [&](auto np, long panel, int row, int count) {
        panels_by_rows<Dot, np>(weight + panel * panel_size, panel_size, pairs + row * (l.k / 2), l.k / 2, l.k / 2, count, row, panel * W, out);
    });
#else
    panels_by_blocks(l.n, l.k, m, panels_at_once(m), [&](auto np, long panel, int row, int count) {
        panels_by_rows<Bf16, np>(weight + panel * panel_size, panel_size, x + row * ldx, ldx, l.k / 2, count, row, panel * W, out);
    });
#endif
}

#if defined(TERCET_AMX)
constexpr long TILED_BYTES = 1 << 20;  // of the tiles of x that stay in the cache while panels pass by
constexpr long OWN_TILES = 8;          // of each thread: with fewer, threads divide the panels instead, and read each once

// Whether the tiles of AMX multiply these weights: those of one layer always, or never.
static inline bool by_tiles(const Linear& l) { return l.format == FORMAT_BF16 && l.k % PIECE == 0 && amx(); }

template <int N>
static TiledRows tiled_scratch(long rows, long k) {
    return {scratch<uint32_t, N>(TiledRows(nullptr, rows, k / PIECE).words()), rows, k / PIECE};
}

static TiledRows tiled_rows(const float* x, long ldx, long k, long m) {
    TiledRows tiled = tiled_scratch<1>(m, k);
    Team::instance().run(tiled.tiles(), [&](long t) {
        for (long r = t * tiled.each; r < std::min(m, (t + 1) * tiled.each); r++)
            for (long i = 0; i < k; i += W) store_rounded(tiled.value(r, i), load(x + r * ldx + i));
    });
    return tiled;
}

// Calls part(first panel, end, row, rows) as parts_by_blocks does, with tiles for the rows of x. Of many rows each thread
// has its own in all products of a layer, so that no cache waits for another's.
template <class Part>
static void parts_of_tiles(long n, const TiledRows& x, long most, const Part& part) {
    long threads = Team::instance().threads(), fit = std::max<long>(2, TILED_BYTES / (4 * x.tile_words()));
    long blocks = (x.tiles() + fit - 1) / fit;
    if (x.tiles() >= OWN_TILES * threads) blocks = (blocks + threads - 1) / threads * threads;
    long block = (x.tiles() + 2 * blocks - 1) / (2 * blocks) * 2;
    parts_by_blocks(n, x.rows, block * x.each, most, [&](long first, long last, long row, long rows) {
        Tiles tiles(x.each);
        part(first, last, row, rows);
    });
}

// y [m, ldy] = x wᵀ + b, or added to what is there.
static void tiled_linear_into(const Linear& l, const TiledRows& x, float* y, long ldy, bool add) {
    long panel_size = l.k / 2 * W, most = x.rows > ROWS_A ? 2 : 4;
    auto multiply = [&](auto np, auto mr, long panel, long row) {
        const uint32_t* from = static_cast<const uint32_t*>(l.weight) + panel * panel_size;
        long height = std::min(mr * x.each, x.rows - row), width = std::min<long>(np * W, l.n - panel * W);
        float* to = y + row * ldy + panel * W;
        const float* bias = l.bias ? l.bias + panel * W : nullptr;
        if (height == mr * x.each && width == np * W && !(add && l.bias))
            return multiply_tiles<np, mr>(x, row, from, panel_size, add ? to : bias, add ? ldy : 0, to, ldy);
        alignas(64) float edge[mr * ROWS_A * np * W];
        for (long r = 0; r < height; r++)
            for (long c = 0; c < width; c++) edge[r * np * W + c] = (add ? to[r * ldy + c] : 0) + (bias ? bias[c] : 0);
        multiply_tiles<np, mr>(x, row, from, panel_size, edge, np * W, edge, np * W);
        for (long r = 0; r < height; r++) memcpy(to + r * ldy, edge + r * np * W, width * sizeof(float));
    };
    parts_of_tiles(l.n, x, most, [&](long first, long last, long row, long rows) {
        by_panels(first, last, most, [&](auto np, long panel) {
            long at = row, end = row + rows;
            if constexpr (np <= 2)
                for (; end - at > x.each; at += 2 * x.each) multiply(np, std::integral_constant<int, 2>{}, panel, at);
            if (at < end) multiply(np, std::integral_constant<int, 1>{}, panel, at);
        });
    });
}
#endif

// y [m, ldy] = x wᵀ + b, or added to what is there.
static void linear_into(const Linear& l, const float* x, long ldx, long m, float* y, long ldy, bool add) {
#if defined(TERCET_AMX)
    if (m > 0 && by_tiles(l)) return tiled_linear_into(l, tiled_rows(x, ldx, l.k, m), y, ldy, add);
#endif
    linear(l, x, ldx, m, [&](int row, int column, vf sums) {
        float* to = y + row * ldy + column;
        int count = static_cast<int>(std::min<long>(W, l.n - column));
        if (count == W) {
            if (l.bias) sums += load(l.bias + column);
            store(to, add ? sums + load(to) : sums);
        } else {
            if (l.bias) sums += load(l.bias + column, count);
            store(to, add ? sums + load(to, count) : sums, count);
        }
    });
}
