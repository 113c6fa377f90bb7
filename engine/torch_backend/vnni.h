// The product on processors with AVX-512 VNNI: sixteen sums a register, four inputs at a time.
//
//   panel   values [G][P][group / 4][PANEL][4]: six tokens, whose groups of four inputs lie side by side
//   strip   codes [K / 4][STRIP][4], expanded for BLOCK inputs at a time; unsigned, so a centre of -1 is in the offsets

constexpr long PANEL = 6;     // 6 x 4 registers of sums, 4 of codes and one of values: 29 of 32
constexpr long STRIP = 64;
constexpr long FOLD = 1;
constexpr long PANELS = 256;  // of sums at a time, 384 kB: they stay in the second-level cache
constexpr long BLOCK = 512;   // inputs whose expanded codes, 32 kB, stay in the first-level cache beside the tokens

#include "panels.h"

namespace {

bool permitted() { return true; }

struct Unit {};  // nothing to set up

// Sixteen inputs of a panel's token `r`, from input `k` of the group at `values` on.
inline void place(int8_t* values, long r, long k, __m128i sixteen) {
    alignas(16) int32_t quads[4];
    _mm_store_si128(reinterpret_cast<__m128i*>(quads), sixteen);
    for (long q = 0; q < 4; ++q) memcpy(values + (k / 4 + q) * PANEL * 4 + 4 * r, &quads[q], 4);
}

// The lowest four codes of 16 words -> the four bytes of 16 lanes, by halving twice: four codes to two pairs, pairs to
// bytes. One bit becomes 0 or 2, so that the centre is -1 for that width too.
template <int BITS> __m512i spread(__m512i words) {
    constexpr int PAIR = (1 << 2 * BITS) - 1, ONE = (1 << BITS) - 1;
    const __m512i low = _mm512_set1_epi32(PAIR), high = _mm512_set1_epi32(PAIR << 16);
    __m512i pairs = (words & low) | (_mm512_slli_epi32(words, 16 - 2 * BITS) & high);
    __m512i bytes = (pairs | _mm512_slli_epi32(pairs, 8 - BITS)) & _mm512_set1_epi32(ONE * 0x01010101);
    return BITS == 1 ? _mm512_slli_epi32(bytes, 1) : bytes;
}

// `inputs` of the codes of a strip, from `start` on.
template <int BITS>
void expand(const Weights& w, const Strips& strips, long number, long start, long inputs, __m512i* strip) {
    constexpr long WORD = 32 / BITS;  // codes
    for (long c = 0; c < WIDE; ++c) {
        const Column column = strips.column(number, c);
        const __m512i index = column.rows(w.bytes());
        const uint8_t* codes = w.codes + column.output * w.bytes() + start * BITS / 8;
        for (long k = 0; k < inputs; k += WORD) {
            __m512i words = _mm512_i32gather_epi32(index, codes + k * BITS / 8, 1);
            for (long q = 0; q < WORD / 4; ++q, words = _mm512_srli_epi32(words, 4 * BITS))
                strip[(k / 4 + q) * WIDE + c] = spread<BITS>(words);
        }
    }
}

// sums + four products of unsigned and signed bytes in each lane. Written out, because GCC 12 spills all the sums
// around its own intrinsic, which takes three times as long.
inline __m512i dot(__m512i sums, __m512i codes, __m512i values) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(codes), "v"(values));
    return sums;
}

// One group of inputs of a panel times a strip, scaled and put or added to out [PANEL][STRIP].
template <bool BIASED>
inline void multiply(const int8_t* values, const float* steps, const int32_t* offsets, const __m512i* codes,
                     const float* scales, const float* shifts, long group, bool first, float* out) {
    __m512i sums[PANEL][WIDE];
#pragma GCC unroll 6
    for (long r = 0; r < PANEL; ++r)
#pragma GCC unroll 4
        for (long c = 0; c < WIDE; ++c) sums[r][c] = _mm512_set1_epi32(offsets[r]);
    for (long q = 0; q < group / 4; ++q, codes += WIDE, values += 4 * PANEL)
#pragma GCC unroll 6
        for (long r = 0; r < PANEL; ++r) {
            int32_t quad;
            memcpy(&quad, values + 4 * r, 4);
            __m512i four = _mm512_set1_epi32(quad);
#pragma GCC unroll 4
            for (long c = 0; c < WIDE; ++c) sums[r][c] = dot(sums[r][c], codes[c], four);
        }
#pragma GCC unroll 6
    for (long r = 0; r < PANEL; ++r)
#pragma GCC unroll 4
        for (long c = 0; c < WIDE; ++c, out += LANES) {
            const __m512 before = first ? _mm512_setzero_ps() : _mm512_load_ps(out);
            _mm512_store_ps(out, scaled<BIASED>(sums[r][c], steps[r], offsets[r], scales + c * LANES,
                                                shifts + c * LANES, before));
        }
}

// Panels [first, last) times a strip -> sums [panels * PANEL][STRIP].
template <int BITS>
void strip_of(const Panels& x, const Weights& w, const Strips& strips, long strip, long first, long last, float* sums) {
    const long block = max(BLOCK / x.group, 1L) * x.group;
    const Buffer<__m512i> codes(block * STRIP / 64);
    const Factors factors(w, strips, strip);
    for (long start = 0; start < x.inputs; start += block) {
        const long inputs = min(block, x.inputs - start);
        expand<BITS>(w, strips, strip, start, inputs, codes);
        for (long p = first; p < last; ++p)
            for (long k = 0; k < inputs; k += x.group) {
                const long g = (start + k) / x.group, at = x.at(g, p);
                multiply<BITS == 4>(x.values + at * x.group, x.steps + at, x.offsets + at, codes + k / 4 * WIDE,
                                    factors.scales + g * STRIP, factors.shifts + g * STRIP, x.group,
                                    g == 0, sums + (p - first) * PANEL * STRIP);
            }
    }
}

template <int BITS, class Done>
void product_of(const Panels& x, const Weights& w, const Strips& strips, long first, long last, Done done) {
    strip_by_strip(x, first, last, [&](long strip, long from, long to, float* sums) {
        strip_of<BITS>(x, w, strips, strip, from, to, sums);
    }, done);
}

}  // namespace
