// y = x wᵀ with w in panels: W outputs side by side, so that one vector holds the same input of W outputs.
//
//   n outputs   k inputs (even if bf16)   m rows of x
//   bf16 panel  [k / 2][W] of 32 bits: the bfloat16 of input 2i in the lower half, that of 2i + 1 in the upper
//   f32 panel   [k][W]
//   quantised   see Quantised
//
// Each output is summed over k in order by one accumulator, so a row's result does not depend on the other rows.
#pragma once

#include <vector>

#include "vec.h"

// acc += a(p) * b(r), with as few vectors in registers as that takes.
template <int NP, int MR, class A, class B>
static inline void multiply(vf (&acc)[MR][NP], const A& a, const B& b) {
    if constexpr (MR < NP) {
        vf inputs[MR];
        for (int r = 0; r < MR; r++) inputs[r] = held(b(r));
#pragma GCC unroll 16
        for (int p = 0; p < NP; p++) {
            vf weight = MR == 1 ? a(p) : held(a(p));
            for (int r = 0; r < MR; r++) acc[r][p] = fma(weight, inputs[r], acc[r][p]);
        }
    } else {
        vf weights[NP];
        for (int p = 0; p < NP; p++) weights[p] = held(a(p));
#pragma GCC unroll 16
        for (int r = 0; r < MR; r++) {
            vf input = b(r);
            for (int p = 0; p < NP; p++) acc[r][p] = fma(weights[p], input, acc[r][p]);
        }
    }
}

// Weights as float32.
struct F32 {
    using Weight = float;
    using Input = float;
    template <int NP, int MR>
    static inline void step(vf (&acc)[MR][NP], const float* const (&w)[NP], long i, const float* x, long ldx) {
        multiply(acc, [&](int p) { return load(w[p] + i * W); }, [&](int r) { return splat(x[r * ldx + i]); });
    }
};

// bfloat16 weights, widened in registers.
struct Bf16 {
    using Weight = uint32_t;
    using Input = float;
    template <int NP, int MR>
    static inline void step(vf (&acc)[MR][NP], const uint32_t* const (&w)[NP], long i, const float* x, long ldx) {
        multiply(acc, [&](int p) { return (vf)(load(w[p] + i * W) << 16); }, [&](int r) { return splat(x[r * ldx + 2 * i]); });
        multiply(acc, [&](int p) { return (vf)(load(w[p] + i * W) & 0xffff0000u); }, [&](int r) { return splat(x[r * ldx + 2 * i + 1]); });
    }
};

constexpr int QUANT = 32;  // inputs of a quantised block

// Weights of `BITS` bits in blocks of QUANT inputs: w = scale * q + least. A block of a panel is W scales, W leasts, and
// QUANT * BITS / 32 words for each lane, which hold the q of inputs that follow each other, the first in the lowest bits.
template <int BITS>
struct Quantised {
    using Weight = uint32_t;
    using Input = float;
    static constexpr int EACH = 32 / BITS, WORDS = QUANT / EACH, SIZE = (2 + WORDS) * W;
    template <int NP, int MR>
    static inline void step(vf (&acc)[MR][NP], const uint32_t* const (&w)[NP], long i, const float* x, long ldx) {
        for (int word = 0; word < WORDS; word++) {
            vu q[NP];
            for (int p = 0; p < NP; p++) q[p] = load(w[p] + i * SIZE + (2 + word) * W);
            for (int each = 0; each < EACH; each++) {
                vf a[NP];
                for (int p = 0; p < NP; p++) {
                    const float* block = reinterpret_cast<const float*>(w[p] + i * SIZE);
                    a[p] = fma(__builtin_convertvector((vi)(q[p] & ((1u << BITS) - 1)), vf), load(block), load(block + W));
                    q[p] >>= BITS;
                }
#pragma GCC unroll 16
                for (int r = 0; r < MR; r++) {
                    vf b = splat(x[r * ldx + i * QUANT + word * EACH + each]);
                    for (int p = 0; p < NP; p++) acc[r][p] = fma(a[p], b, acc[r][p]);
                }
            }
        }
    }
};

#if defined(__AVX512BF16__)

// bfloat16 weights and inputs, two products an instruction.
struct Dot {
    using Weight = uint32_t;
    using Input = uint32_t;  // pairs
    template <int NP, int MR>
    static inline void step(vf (&acc)[MR][NP], const uint32_t* const (&w)[NP], long i, const uint32_t* x, long ldx) {
        vu a[NP];
        for (int p = 0; p < NP; p++) a[p] = load(w[p] + i * W);
#pragma GCC unroll 16
        for (int r = 0; r < MR; r++) {
            __m512bh b = (__m512bh)_mm512_set1_epi32(static_cast<int>(x[r * ldx + i]));
            for (int p = 0; p < NP; p++) acc[r][p] = (vf)_mm512_dpbf16_ps((__m512)acc[r][p], (__m512bh)a[p], b);
        }
    }
};
#endif

constexpr int REGISTERS = W == 16 ? 32 : 16;
constexpr int ROWS = W == 16 ? 12 : W == 8 ? 6 : 4;  // of a tile: with two panels, as many accumulators as registers hold

// out(row, first column, sums) gets W columns at a time.
template <class P, int NP, int MR, class Out>
static inline void tile(const typename P::Weight* w, long panel, const typename P::Input* x, long ldx, long steps, int row, int column,
                        const Out& out) {
    const typename P::Weight* panels[NP];
    for (int p = 0; p < NP; p++) panels[p] = w + p * panel;
    vf acc[MR][NP] = {};
    for (long i = 0; i < steps; i++) P::template step<NP, MR>(acc, panels, i, x, ldx);
#pragma GCC unroll 16
    for (int r = 0; r < MR; r++)
        for (int p = 0; p < NP; p++) out(row + r, column + p * W, acc[r][p]);
}

template <class P, int NP, int MR, class Out>
static inline void tile_of(int rows, const typename P::Weight* w, long panel, const typename P::Input* x, long ldx, long steps, int row,
                           int column, const Out& out) {
    if constexpr (MR > 0) {
        if (rows == MR) return tile<P, NP, MR>(w, panel, x, ldx, steps, row, column, out);
        tile_of<P, NP, MR - 1>(rows, w, panel, x, ldx, steps, row, column, out);
    }
}

// NP panels for all m rows, in tiles of nearly the same size.
template <class P, int NP, class Out>
static inline void panels_by_rows(const typename P::Weight* w, long panel, const typename P::Input* x, long ldx, long steps, int m, int row,
                                  int column, const Out& out) {
    int tiles = (m + ROWS - 1) / ROWS;
    for (int t = 0, at = 0; t < tiles; t++) {
        int rows = (m - at) / (tiles - t);
        tile_of<P, NP, ROWS>(rows, w, panel, x + at * ldx, ldx, steps, row + at, column, out);
        at += rows;
    }
}

// A buffer of this thread that grows as needed. It begins with a line of the cache, as vectors and tiles do then.
template <class T, int N>
static inline T* scratch(size_t count) {
    constexpr size_t LINE = 64;
    static thread_local std::vector<T> memory;
    if (memory.size() < count + LINE / sizeof(T)) memory.resize(count + LINE / sizeof(T));
    return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(memory.data()) + LINE - 1) / LINE * LINE);
}
