// Vectors of W float32 lanes, by the compiler's vector extensions: as wide as the CPU that this is compiled for has them.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vf __attribute__((vector_size(W * 4), aligned(4), may_alias));
typedef uint32_t vu __attribute__((vector_size(W * 4), aligned(4), may_alias));
typedef int32_t vi __attribute__((vector_size(W * 4), aligned(4), may_alias));
typedef uint16_t vh __attribute__((vector_size(W * 2), aligned(2), may_alias));

static inline vf splat(float x) { return x - vf{}; }

// a * b + c, rounded once where the CPU can. Said so, since a compiler that chooses would choose otherwise from loop to
// loop, and equal rows would get unequal results.
static inline vf fma(vf a, vf b, vf c) {
#if defined(__AVX512F__)
    return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
    return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

// In a register: g++ would read a vector from memory once for each of its uses.
static inline vf held(vf v) {
#if defined(__AVX512F__)
    asm("" : "+v"(v));
#elif defined(__AVX__)
    asm("" : "+x"(v));
#endif
    return v;
}

static inline vf load(const float* p) { return *reinterpret_cast<const vf*>(p); }
static inline vu load(const uint32_t* p) { return *reinterpret_cast<const vu*>(p); }
static inline void store(float* p, vf v) { *reinterpret_cast<vf*>(p) = v; }
static inline void store(uint32_t* p, vu v) { *reinterpret_cast<vu*>(p) = v; }

// The first `count` lanes; the others are 0.
static inline vf load(const float* p, int count) {
    vf v = {};
    memcpy(&v, p, count * sizeof(float));
    return v;
}
static inline void store(float* p, vf v, int count) { memcpy(p, &v, count * sizeof(float)); }

// bfloat16 is the upper half of a float32.
static inline float widened(uint16_t x) {
    uint32_t bits = static_cast<uint32_t>(x) << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}
static inline vf widened(const uint16_t* p) {
#if defined(__AVX512F__)
    vu bits = (vu)_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__)  // g++ 12 makes four instructions of the conversion
    vu bits = (vu)_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
    vu bits = __builtin_convertvector(*reinterpret_cast<const vh*>(p), vu);
#endif
    return (vf)(bits << 16);
}

// To the nearest bfloat16, ties to even, in the lower half of each lane. NaN stays NaN.
static inline vu narrowed(vf x) {
    vu bits = (vu)x;
    vu rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return x == x ? rounded : (bits >> 16) | 0x40;
}
static inline void store_narrowed(uint16_t* p, vf x) {
    *reinterpret_cast<vh*>(p) = __builtin_convertvector(narrowed(x), vh);
}

static inline vf larger(vf a, vf b) { return a > b ? a : b; }

// Each lane beside the one `STRIDE` away.
template <int STRIDE, size_t... LANE>
static inline vf swapped(vf x, std::index_sequence<LANE...>) {
    return __builtin_shufflevector(x, x, (LANE ^ STRIDE)...);
}

// All lanes joined to one, half by half.
template <int STRIDE = W / 2, class Join>
static inline float joined(vf x, const Join& join) {
    vf both = join(x, swapped<STRIDE>(x, std::make_index_sequence<W>{}));
    if constexpr (STRIDE == 1) return both[0];
    else return joined<STRIDE / 2>(both, join);
}

static inline float sum(vf x) { return joined(x, [](vf a, vf b) { return a + b; }); }
static inline float largest_lane(vf x) { return joined(x, larger); }

// e^x, 2 ulp; 0 below -87, e^88 above 88, NaN for NaN. Range reduction to |r| <= ln2 / 2 and a polynomial of degree 6 (Cody and Waite).
static inline vf exponential(vf x) {
    vf low = splat(-87.0f), high = splat(88.0f);
    vf bounded = x < low ? low : x > high ? high : x;
    vf shifted = fma(bounded, splat(1.44269504f), splat(12582912.0f));  // 1.5 * 2^23: the sum's low bits are the nearest integer
    vf n = shifted - 12582912.0f;
    vf r = fma(n, splat(2.12194440e-4f), fma(n, splat(-0.693359375f), bounded));
    vf p = splat(1.9875691500e-4f);
    p = fma(p, r, splat(1.3981999507e-3f));
    p = fma(p, r, splat(8.3334519073e-3f));
    p = fma(p, r, splat(4.1665795894e-2f));
    p = fma(p, r, splat(1.6666665459e-1f));
    p = fma(p, r, splat(5.0000001201e-1f));
    p = fma(p, r * r, r) + 1.0f;
    vf power = (vf)((((vi)shifted << 23)) + (127 << 23));
    vf result = p * power;
    return x < low ? vf{} : result;
}

// 2^x for x <= 0, within 1e-7 of it; 0 below -126, NaN for NaN. A polynomial in |f| <= 1 / 2 that is exact at Chebyshev's
// nodes.
static inline vf power_of_two(vf x) {
    vf shifted = x + 12582912.0f;  // as above
    vf f = x - (shifted - 12582912.0f);
    vf p = splat(1.5453163e-4f);
    p = fma(p, f, splat(1.3390863e-3f));
    p = fma(p, f, splat(9.6180831e-3f));
    p = fma(p, f, splat(5.5503570e-2f));
    p = fma(p, f, splat(0.24022651f));
    p = fma(p, f, splat(0.69314718f));
    p = fma(p, f, splat(1.0f));
    vf result = p * (vf)(((vu)shifted << 23) + (127u << 23));
    return x < splat(-126.0f) ? vf{} : result;
}

template <int STRIDE, size_t... LANE>
static inline void exchange(vu& a, vu& b, std::index_sequence<LANE...>) {
    vu low = __builtin_shufflevector(a, b, (LANE & STRIDE ? W + LANE - STRIDE : LANE)...);
    b = __builtin_shufflevector(a, b, (LANE & STRIDE ? W + LANE : LANE + STRIDE)...);
    a = low;
}

// rows[i] lane j <-> rows[j] lane i, by exchanging ever smaller blocks.
template <int STRIDE = W / 2>
static inline void transpose(vu (&rows)[W]) {
    for (int i = 0; i < W; i++)
        if (!(i & STRIDE)) exchange<STRIDE>(rows[i], rows[i + STRIDE], std::make_index_sequence<W>{});
    if constexpr (STRIDE > 1) transpose<STRIDE / 2>(rows);
}
