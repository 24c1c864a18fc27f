// Products of bfloat16 by AMX: tiles of 16 rows of 16 pairs, of which one instruction multiplies two.
//
//   A  up to ROWS_A rows of x, pairs of inputs that follow each other
//   B  16 pairs of inputs, of W outputs: a piece of a bf16 panel (gemm.h) as it lies in memory
//   C  sums in float32
//
// A row of C is summed over pieces of PIECE inputs in order, so it does not depend on the other rows.
#pragma once

#include "gemm.h"

#if defined(__AMX_BF16__) && defined(__AVX512BF16__)
#define TERCET_AMX

#include <sys/syscall.h>
#include <unistd.h>

constexpr int ROWS_A = 16;
constexpr int PIECE = 32;  // inputs of a tile

// Linux gives a process the tiles if it asks for them, once; its children have them too.
static inline bool amx() {
    constexpr int ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
    static const bool allowed = syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
    return allowed;
}

// To the nearest bfloat16, as store_narrowed, but what is below the normal numbers becomes 0, as a tile takes it.
static inline void store_rounded(uint16_t* p, vf x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh((__m512)x));
}

// Rows of each tile of A when m rows are divided evenly into as few as hold them.
static inline long rows_of_tile(long m) {
    long tiles = (m + ROWS_A - 1) / ROWS_A;
    return (m + tiles - 1) / tiles;
}

// Rows of bfloat16 as tiles of A, [tiles][pieces][each][PIECE]; those that fill up the last tile hold anything.
struct TiledRows {
    uint32_t* at;
    long rows, pieces, each;  // each: rows of a tile

    TiledRows(uint32_t* at, long rows, long pieces) : at(at), rows(rows), pieces(pieces), each(rows_of_tile(rows)) {}
    long tiles() const { return (rows + each - 1) / each; }
    long tile_words() const { return each * pieces * W; }
    long words() const { return tiles() * tile_words(); }
    const uint32_t* tile_of(long r) const { return at + r / each * tile_words(); }
    uint16_t* value(long r, long i) const {  // the values of row r from i on lie there, up to the end of a piece
        return reinterpret_cast<uint16_t*>(at + r / each * tile_words()) + (i / PIECE * each + r % each) * PIECE + i % PIECE;
    }
};

// This thread's tiles, as long as it lives: 0 to 3 are C and 4, 5 are A, all of `rows` rows; 6, 7 are B.
class Tiles {
public:
    explicit Tiles(long rows) {
        struct {
            uint8_t palette = 1, start = 0, reserved[14] = {};
            uint16_t row_bytes[16] = {};
            uint8_t rows[16] = {};
        } shape;
        for (int t = 0; t < 8; t++) shape.row_bytes[t] = 64, shape.rows[t] = static_cast<uint8_t>(t < 6 ? rows : PIECE / 2);
        asm volatile("" : : "m"(shape));  // the intrinsic does not say that it reads it
        _tile_loadconfig(&shape);
    }
    ~Tiles() { _tile_release(); }
    Tiles(const Tiles&) = delete;
    Tiles& operator=(const Tiles&) = delete;
};

// MR tiles of x, the first that of row r, times NP panels, `panel` words apart. Tile (t, p) of the sums begins with what
// lies at first + t * x.each * first_row + p * W, in rows `first_row` apart, or with 0 if that is null, and goes to the like
// place from y on. Between its pieces, of which each takes a while, meanwhile(piece) has the thread's vectors.
// Intrinsics take no tile numbers but literals.
template <int NP, int MR, class Meanwhile>
static inline void multiply_tiles(const TiledRows& x, long r, const uint32_t* w, long panel, const float* first, long first_row, float* y,
                                  long ldy, const Meanwhile& meanwhile) {
    static_assert(MR == 1 || NP <= 2);
    long first_bytes = first_row * 4, y_bytes = ldy * 4, below = x.tile_words();
    const uint32_t* a = x.tile_of(r);
    const float* second = first + x.each * first_row;
    asm volatile("" : : : "memory");  // what was written to x and to `first` is there
    if (first) {
        _tile_loadd(0, first, first_bytes);
        if constexpr (NP > 1) _tile_loadd(1, first + W, first_bytes);
        if constexpr (NP > 2) _tile_loadd(2, first + 2 * W, first_bytes);
        if constexpr (NP > 3) _tile_loadd(3, first + 3 * W, first_bytes);
        if constexpr (MR > 1) _tile_loadd(2, second, first_bytes);
        if constexpr (MR > 1 && NP > 1) _tile_loadd(3, second + W, first_bytes);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (long i = 0; i < x.pieces; i++, a += x.each * W, w += PIECE / 2 * W) {
        _tile_loadd(4, a, 64);
        _tile_loadd(6, w, 64);
        if constexpr (MR > 1) _tile_loadd(5, a + below, 64);
        if constexpr (NP > 1) _tile_loadd(7, w + panel, 64);
        _tile_dpbf16ps(0, 4, 6);
        if constexpr (MR > 1) _tile_dpbf16ps(2, 5, 6);
        if constexpr (NP > 1) _tile_dpbf16ps(1, 4, 7);
        if constexpr (MR > 1 && NP > 1) _tile_dpbf16ps(3, 5, 7);
        if constexpr (NP > 2) _tile_loadd(6, w + 2 * panel, 64);
        if constexpr (NP > 3) _tile_loadd(7, w + 3 * panel, 64);
        if constexpr (NP > 2) _tile_dpbf16ps(2, 4, 6);
        if constexpr (NP > 3) _tile_dpbf16ps(3, 4, 7);
        meanwhile(i);
    }
    float* y_second = y + x.each * ldy;
    _tile_stored(0, y, y_bytes);
    if constexpr (NP > 1) _tile_stored(1, y + W, y_bytes);
    if constexpr (NP > 2) _tile_stored(2, y + 2 * W, y_bytes);
    if constexpr (NP > 3) _tile_stored(3, y + 3 * W, y_bytes);
    if constexpr (MR > 1) _tile_stored(2, y_second, y_bytes);
    if constexpr (MR > 1 && NP > 1) _tile_stored(3, y_second + W, y_bytes);
}

template <int NP, int MR>
static inline void multiply_tiles(const TiledRows& x, long r, const uint32_t* w, long panel, const float* first, long first_row, float* y,
                                  long ldy) {
    multiply_tiles<NP, MR>(x, r, w, panel, first, first_row, y, ldy, [](long) {});
}
#endif
