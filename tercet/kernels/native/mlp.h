// The two products of a layer's MLP, and the activation between them.
#pragma once

#include "pointwise.h"

struct Mlp {
    Linear gate_up, down;  // the gate's outputs first

    long width() const { return down.k; }
};

#if defined(TERCET_AMX)
// Some rows of W outputs of the gate, and of the same of `up` beside them.
struct Gates {
    alignas(64) float both[2 * ROWS_A][2 * W];
    long rows = 0, done = 0, each;
    uint16_t* to[2];  // of each tile of rows

    void begin(const TiledRows& activated, long row, long column) {
        each = activated.each, rows = std::min(2 * each, activated.rows - row), done = 0;
        to[0] = activated.value(row, column), to[1] = to[0] + 2 * activated.tile_words();
    }
    void activate(long count) {
        for (long end = std::min(rows, done + count); done < end; done++) {
            uint16_t* at = done < each ? to[0] + done * PIECE : to[1] + (done - each) * PIECE;
            store_rounded(at, silu(load(both[done])) * load(both[done] + W));
        }
    }
};

// silu(gate) * up as tiles, so that the gates go through no memory. While some are multiplied, those before are activated.
static TiledRows tiled_gates(const Mlp& mlp, const TiledRows& x) {
    TiledRows activated = tiled_scratch<11>(x.rows, mlp.width());
    const Linear& l = mlp.gate_up;
    long panel_size = l.k / 2 * W, up = mlp.width() / W * panel_size;
    long share = (2 * x.each + x.pieces - 1) / x.pieces;  // of the rows before, for each piece
    parts_of_tiles(mlp.width(), x, 1, [&](long first, long last, long row, long rows) {
        Gates gates[2];
        long turn = 0, end = row + rows;
        for (long panel = first; panel < last; panel++) {
            const uint32_t* from = static_cast<const uint32_t*>(l.weight) + panel * panel_size;
            alignas(64) float bias[2 * W] = {};
            if (l.bias) store(bias, load(l.bias + panel * W)), store(bias + W, load(l.bias + mlp.width() + panel * W));
            for (long at = row; at < end; at += 2 * x.each, turn ^= 1) {
                Gates &now = gates[turn], &before = gates[turn ^ 1];
                auto meanwhile = [&](long) { before.activate(share); };
                now.begin(activated, at, panel * W);
                if (now.rows > x.each)
                    multiply_tiles<2, 2>(x, at, from, up, l.bias ? bias : nullptr, 0, now.both[0], 2 * W, meanwhile);
                else
                    multiply_tiles<2, 1>(x, at, from, up, l.bias ? bias : nullptr, 0, now.both[0], 2 * W, meanwhile);
            }
        }
        gates[turn ^ 1].activate(2 * x.each);
    });
    return activated;
}
#endif

// y [m, n] += what it gives for x [m, k]; between: room for m * 3 * width values.
static void mlp_into(const Mlp& mlp, const float* x, long m, float* y, float* between) {
#if defined(TERCET_AMX)
    if (m > 0 && by_tiles(mlp.gate_up) && by_tiles(mlp.down))
        return tiled_linear_into(mlp.down, tiled_gates(mlp, tiled_rows(x, mlp.gate_up.k, mlp.gate_up.k, m)), y, mlp.down.n, true);
#endif
    float* activated = between + m * 2 * mlp.width();
    linear_into(mlp.gate_up, x, mlp.gate_up.k, m, between, 2 * mlp.width(), false);
    silu_and_mul(between, m, mlp.width(), activated);
    linear_into(mlp.down, activated, mlp.width(), m, y, mlp.down.n, true);
}
