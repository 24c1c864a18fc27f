// A mixture of experts: the MLPs of the experts that a router chose, for each row its own.
//
//   rows of x   k experts of a row   n experts   E hidden size   I intermediate size
//
// An assignment is a row and one of its k experts. Assignments are sorted by expert and divided into blocks, whose rows
// lie side by side in buffers: the inputs of gate_up, those of down, and what down makes. A row of x is then the sum of
// its own assignments, in the order of its k: it does not depend on the other rows.
#pragma once

#include <optional>

#include "mlp.h"

constexpr int64_t ELSEWHERE = -1;  // in place of an expert's number: another rank computes it
constexpr long ROWS_OF_CALL = 1024;  // rows of x whose assignments are in the buffers at once

static inline long panels_of(long n) { return (n + W - 1) / W; }

// The weights of all experts follow each other in whole panels.
struct Experts {
    Linear gate_up;  // of the first expert: a panel of the gate, the same of up, and so on; n = 2 * panels_of(I) * W
    Linear down;     // of the first expert
    int64_t count;

    long hidden() const { return gate_up.k; }
    long width() const { return down.k; }
};

// Assignments of one expert that are multiplied together.
struct Block {
    long expert, rows;
    long at;  // of its first row in the buffers

    long room() const {  // rows of the buffers, with those that fill up the last tile
#if defined(TERCET_AMX)
        TiledRows tiled(nullptr, rows, 0);
        return tiled.tiles() * tiled.each;
#else
        return rows;
#endif
    }
};

static inline bool takes_tiles([[maybe_unused]] const Linear& l) {
#if defined(TERCET_AMX)
    return by_tiles(l);
#else
    return false;
#endif
}

static inline bool takes_pairs([[maybe_unused]] const Linear& l) {
#if defined(__AVX512BF16__)
    return l.format == FORMAT_BF16;
#else
    return false;
#endif
}

static inline long input_bytes(const Linear& l) { return l.k * (takes_pairs(l) ? 2 : 4); }  // of a row

// A block's inputs of a matrix, as its products take them: float32, or bfloat16 in rows or in tiles.
class Inputs {
public:
    Inputs(const Linear& l, char* buffer, const Block& block)
        : l_(l), block_(block), at_(buffer + block.at * input_bytes(l)), tiles_(takes_tiles(l)) {
#if defined(TERCET_AMX)
        tiled_ = {reinterpret_cast<uint32_t*>(at_), block.rows, l.k / PIECE};
#endif
    }

    // Values i, i + 1, .. of a row; those behind the last input are dropped.
    void put(long row, long i, vf values) const {
        int count = static_cast<int>(std::min<long>(W, l_.k - i));
#if defined(TERCET_AMX)
        if (tiles_) return store_rounded(tiled_.value(row, i), values);
#endif
        if (!takes_pairs(l_)) return store(reinterpret_cast<float*>(at_) + row * l_.k + i, values, count);
        uint16_t narrow[W];
        store_narrowed(narrow, values);
        memcpy(reinterpret_cast<uint16_t*>(at_) + row * l_.k + i, narrow, count * sizeof(uint16_t));
    }

    // y [block.room(), NP * W] = the block's rows times NP panels of its expert. y's rows are ldy apart.
    template <int NP>
    void multiply(long panel, float* y, long ldy) const {
        auto out = [&](int row, int column, vf sums) { store(y + row * ldy + column, sums); };
        auto by_rows = [&](auto product, long steps) {
            using P = decltype(product);
            const auto* w = static_cast<const typename P::Weight*>(l_.weight) + first_of(panel) * steps * W;
            const auto* x = reinterpret_cast<const typename P::Input*>(at_);
            long ldx = input_bytes(l_) / static_cast<long>(sizeof *x);
            panels_by_rows<P, NP>(w, steps * W, x, ldx, steps, static_cast<int>(block_.rows), 0, 0, out);
        };
#if defined(TERCET_AMX)
        if (tiles_) return multiply_by_tiles<NP>(panel, y, ldy);
#endif
        if (l_.format == FORMAT_F32) return by_rows(F32{}, l_.k);
#if defined(__AVX512BF16__)
        by_rows(Dot{}, l_.k / 2);
#else
        by_rows(Bf16{}, l_.k / 2);
#endif
    }

    long panels_at_once() const {
        if (tiles_) return block_.rows > 16 ? 2 : 4;
        return ::panels_at_once(block_.rows);
    }

private:
    long first_of(long panel) const { return block_.expert * panels_of(l_.n) + panel; }  // counted over all experts

#if defined(TERCET_AMX)
    template <int NP>
    void multiply_by_tiles(long panel, float* y, long ldy) const {
        const TiledRows& x = tiled_;
        long panel_size = l_.k / 2 * W, row = 0;
        const uint32_t* w = static_cast<const uint32_t*>(l_.weight) + first_of(panel) * panel_size;
        if constexpr (NP <= 2)
            for (; x.rows - row > x.each; row += 2 * x.each)
                multiply_tiles<NP, 2>(x, row, w, panel_size, nullptr, 0, y + row * ldy, ldy);
        for (; row < x.rows; row += x.each)
            multiply_tiles<NP, 1>(x, row, w, panel_size, nullptr, 0, y + row * ldy, ldy);
    }

    TiledRows tiled_{nullptr, 1, 0};
#endif
    const Linear& l_;
    const Block& block_;
    char* at_;
    bool tiles_;
};

// Which block an assignment is in, and which row of the buffers is its own.
struct Assignment {
    long block, at;  // block -1: it is elsewhere
};

// The blocks of some assignments, and a place for each.
struct Sorted {
    std::vector<Block> blocks;
    std::vector<Assignment> places;
    long room = 0;  // rows of the buffers

    Sorted(const Experts& e, const int64_t* numbers, long assignments) : places(assignments, Assignment{-1, 0}) {
        std::vector<long> rows(e.count), next(e.count);  // of each expert: its assignments, the block of the next one
        for (long a = 0; a < assignments; a++)
            if (numbers[a] != ELSEWHERE) rows[numbers[a]]++;
        long most = most_rows(e);
        for (long expert = 0; expert < e.count; expert++) {
            next[expert] = static_cast<long>(blocks.size());
            divide(expert, rows[expert], (rows[expert] + most - 1) / most);
        }
        std::vector<long> filled(blocks.size());
        for (long a = 0; a < assignments; a++) {
            if (numbers[a] == ELSEWHERE) continue;
            long& block = next[numbers[a]];
            if (filled[block] == blocks[block].rows) block++;
            places[a] = {block, blocks[block].at + filled[block]++};
        }
    }

private:
    // Rows of a block, so that its inputs stay in the cache while panels pass by: whole tiles, of AMX by twos.
    static long most_rows(const Experts& e) {
        long bytes = std::max(input_bytes(e.gate_up), input_bytes(e.down)), cached = BLOCK_BYTES, tile = ROWS;
#if defined(TERCET_AMX)
        if (by_tiles(e.gate_up) && by_tiles(e.down)) cached = TILED_BYTES, tile = 2 * ROWS_A;
#endif
        return std::max(tile, cached / bytes / tile * tile);
    }

    void divide(long expert, long rows, long parts) {
        for (long part = 0; part < parts; part++) {
            blocks.push_back({expert, rows * (part + 1) / parts - rows * part / parts, room});
            room += blocks.back().room();
        }
    }
};

// Calls part(block, first panel, end) for all panels of the matrix of each block's expert, on the team: in pieces so
// small that one block alone has work for all threads.
template <class Part>
static void for_pieces(const Linear& l, const std::vector<Block>& blocks, const Part& part) {
    long panels = panels_of(l.n), grain = std::max<long>(1, panels / 4 / (4 * Team::instance().threads())) * 4;
    long pieces = (panels + grain - 1) / grain;
    Team::instance().run(static_cast<long>(blocks.size()) * pieces, [&](long item) {
        const Block& block = blocks[item / pieces];
        long first = item % pieces * grain;
#if defined(TERCET_AMX)
        std::optional<Tiles> tiles;
        if (by_tiles(l)) tiles.emplace(rows_of_tile(block.rows));
#endif
        part(block, first, std::min(panels, first + grain));
    });
}

// x [.., E] -> the inputs of gate_up.
static void gather(const Experts& e, const Sorted& sorted, const float* x, long k, char* inputs) {
    for_rows(static_cast<long>(sorted.places.size()), e.hidden(), [&](long a) {
        Assignment place = sorted.places[a];
        if (place.block < 0) return;
        const Block& block = sorted.blocks[place.block];
        Inputs to(e.gate_up, inputs, block);
        const float* row = x + a / k * e.hidden();
        long i = 0;
        for (; i + W <= e.hidden(); i += W) to.put(place.at - block.at, i, load(row + i));
        if (i < e.hidden()) to.put(place.at - block.at, i, load(row + i, static_cast<int>(e.hidden() - i)));
    });
}

// The inputs of gate_up -> those of down.
static void gates(const Experts& e, const Sorted& sorted, char* inputs, char* activated) {
    for_pieces(e.gate_up, sorted.blocks, [&](const Block& block, long first, long last) {
        Inputs from(e.gate_up, inputs, block), to(e.down, activated, block);
        by_panels(first, last, from.panels_at_once() / 2 * 2, [&](auto np, long panel) {
            if constexpr (np % 2 == 0) {  // no odd ones come: a piece has whole pairs, of which two or one are taken
                float* both = scratch<float, 20>(block.room() * np * W);
                from.multiply<np>(panel, both, np * W);
                for (long row = 0; row < block.rows; row++)
                    for (long p = 0; p < np; p += 2) {
                        const float* gate = both + (row * np + p) * W;
                        to.put(row, (panel + p) / 2 * W, silu(load(gate)) * load(gate + W));
                    }
            }
        });
    });
}

// The inputs of down -> what the experts make of the assignments, [sorted.room, panels_of(E) * W].
static void down(const Experts& e, const Sorted& sorted, char* activated, float* made) {
    long ldy = panels_of(e.hidden()) * W;
    for_pieces(e.down, sorted.blocks, [&](const Block& block, long first, long last) {
        Inputs from(e.down, activated, block);
        by_panels(first, last, from.panels_at_once(), [&](auto np, long panel) {
            from.multiply<np>(panel, made + block.at * ldy + panel * W, ldy);
        });
    });
}

// y [rows, E] += the weighted sum of what was made of each row's assignments, in their order.
static void combine(const Experts& e, const Sorted& sorted, const float* made, const float* weights, long rows, long k,
                    float* y) {
    long n = e.hidden(), ldy = panels_of(n) * W;
    for_rows(rows, n, [&](long r) {
        auto summed = [&](long i) {
            vf sum = {};
            for (long a = r * k; a < (r + 1) * k; a++)
                if (const Assignment& place = sorted.places[a]; place.block >= 0)
                    sum = fma(splat(weights[a]), load(made + place.at * ldy + i), sum);
            return sum;
        };
        float* to = y + r * n;
        long i = 0;
        for (; i + W <= n; i += W) store(to + i, load(to + i) + summed(i));
        int rest = static_cast<int>(n - i);
        if (rest) store(to + i, load(to + i, rest) + summed(i), rest);
    });
}

// Where the first number is that is neither an expert's nor ELSEWHERE; -1 if there is none.
static long wrong_number(const Experts& e, const int64_t* numbers, long assignments) {
    for (long a = 0; a < assignments; a++)
        if (numbers[a] != ELSEWHERE && (numbers[a] < 0 || numbers[a] >= e.count)) return a;
    return -1;
}

// y [rows, E] += what the experts make of x [rows, E]; numbers, weights [rows, k], no number wrong.
static void experts_into(const Experts& e, const float* x, long rows, const int64_t* numbers, const float* weights,
                         long k, float* y) {
    for (long at = 0; at < rows; at += ROWS_OF_CALL) {
        long some = std::min(rows - at, ROWS_OF_CALL);
        Sorted sorted(e, numbers + at * k, some * k);
        char* inputs = scratch<char, 21>(sorted.room * input_bytes(e.gate_up));
        char* activated = scratch<char, 22>(sorted.room * input_bytes(e.down));
        float* made = scratch<float, 23>(sorted.room * panels_of(e.hidden()) * W);
        gather(e, sorted, x + at * e.hidden(), k, inputs);
        gates(e, sorted, inputs, activated);
        down(e, sorted, activated, made);
        combine(e, sorted, made, weights + at * k, some, k, y + at * e.hidden());
    }
}
