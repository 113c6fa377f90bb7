// The product on processors with AMX: tiles of 16 tokens by 16 outputs, 64 inputs at a time.
//
//   panel   values [G][P][group / TURN][PANEL][TURN]: sixteen tokens, a tile for every TURN inputs
//   strip   codes [WIDE][K / 4][LANES][4], expanded for two groups at a time; signed, the centre already taken off
//
// Whatever is added, it is added in the order of vnni.h: both give the same bits.

constexpr long PANEL = 16;   // rows of a tile
constexpr long PANELS = 96;  // of sums at a time, 384 kB: they stay in the second-level cache
constexpr long STRIP = 64;
constexpr long FOLD = 1;

#include "panels.h"
#include "tiles.h"

namespace {

// `inputs` of the codes of a strip, from `start` on, columns `room` apart. A table of all that six bits can be makes
// code - 1 of them; one bit becomes -1 or 1.
template <int BITS>
void expand(const Weights& w, const Strips& strips, long number, long start, long inputs, long room, __m512i* strip) {
    alignas(64) int8_t values[64];
    for (int i = 0; i < 64; ++i) {
        const int code = i & ((1 << BITS) - 1);
        values[i] = static_cast<int8_t>(BITS == 1 ? 2 * code - 1 : code - 1);
    }
    const __m512i table = _mm512_load_si512(values);
    const Words<BITS> words;
    for (long c = 0; c < WIDE; ++c) {
        const Column column = strips.column(number, c);
        const __m512i index = column.rows(w.bytes());
        const uint8_t* codes = w.codes + column.output * w.bytes() + start * BITS / 8;
        __m512i* to = strip + c * room;
        for (long k = 0; k < inputs; k += words.CODES) {
            const __m512i word = _mm512_i32gather_epi32(index, codes + k * BITS / 8, 1);
            for (long q = 0; q < words.CODES / 4; ++q) *to++ = _mm512_permutexvar_epi8(words.four(word, q), table);
        }
    }
    asm volatile("" ::: "memory");  // the compiler does not know that tiles read it
}

// One group of a panel's tokens and of a strip's weights.
struct Group {
    const int8_t* values;
    const float* steps;
    const int32_t* offsets;
    const __m512i* codes;
    const float *scales, *shifts;
};

// Two groups of a panel times a strip, scaled and put (FIRST) or added to out [PANEL][STRIP].
template <bool BIASED, bool FIRST, int TURNS> struct Block {
    static constexpr long SIZE = TURNS * TURN, ROWS = PANEL / TURNS, LINES = PANEL / WIDE;
    const Group one, two;
    float* const out;
    int32_t (*const sums)[PANEL][LANES];  // two

    // The sums of column `c`, LANES outputs, come into being in tiles T and T + 1, while those of the column before it
    // leave theirs and are scaled: an operation of one beside one of the other, since a processor does not look far
    // enough ahead to find them by itself.
    template <int T> INLINE void column(long c) const {
        if (c < WIDE) clear<T>(), clear<T + 1>();
#pragma GCC unroll 4
        for (long t = 0; t < TURNS; ++t) {
            if (c < WIDE) {
                multiply<T, 4, 6>(one, c, t);
                multiply<T + 1, 5, 7>(two, c, t);
            }
            if (c == 0) continue;
            if (t == 0) store<2 - T>(sums[0]), store<3 - T>(sums[1]);
            finish(c - 1, t * ROWS);
        }
    }

    template <int TO, int VALUES, int CODES> static INLINE void multiply(const Group& group, long c, long t) {
        const int8_t* next = group.values + PANEL * SIZE + (c * TURNS + t) * LINES * TURN;  // the next panel's
#pragma GCC unroll 4
        for (long line = 0; line < LINES; ++line) _mm_prefetch(next + line * TURN, _MM_HINT_T0);
        load<VALUES>(group.values + t * PANEL * TURN);
        load<CODES>(group.codes + (2 * c * TURNS + t) * LANES);
        dot<TO, VALUES, CODES>();
    }

    INLINE void finish(long c, long first) const {
#pragma GCC unroll 16
        for (long r = first; r < first + ROWS; ++r) {
            float* to = out + r * STRIP + c * LANES;
            const __m512 before = FIRST ? _mm512_setzero_ps() : _mm512_load_ps(to);
            _mm512_store_ps(to, added(two, 1, c, r, added(one, 0, c, r, before)));
        }
    }

    INLINE __m512 added(const Group& group, long i, long c, long r, __m512 before) const {
        return scaled<BIASED>(_mm512_load_si512(sums[i][r]), group.steps[r], group.offsets[r], group.scales + c * LANES,
                              group.shifts + c * LANES, before);
    }

    INLINE void run() const {
        for (long c = 0; c < WIDE; c += 2) column<0>(c), column<2>(c + 1);
        column<0>(WIDE);
    }
};

// Panels [first, last) times a strip -> sums [panels * PANEL][STRIP].
template <int BITS, int TURNS>
void strip_of(const Panels& x, const Weights& w, const Strips& strips, long strip, long first, long last, float* out) {
    constexpr long SIZE = TURNS * TURN;
    const Buffer<__m512i> codes(SIZE / 2 * WIDE);
    const Buffer<int32_t[PANEL][LANES]> sums(2);
    const Factors factors(w, strips, strip);
    for (long g = 0; g < x.groups(); g += 2) {
        const long inputs = min(2 * SIZE, x.inputs - g * SIZE);
        expand<BITS>(w, strips, strip, g * SIZE, inputs, SIZE / 2, codes);
        for (long p = first; p < last; ++p) {
            const auto group = [&](long tokens, long i) {
                const long at = x.at(tokens, p), factor = (g + i) * STRIP;
                return Group{x.values + at * SIZE, x.steps + at, x.offsets + at, codes + i * SIZE / 4,
                             factors.scales + factor, factors.shifts + factor};
            };
            // beside an odd last group itself, which its factors make nothing of
            const Group one = group(g, 0), two = group(min(g + 1, x.groups() - 1), 1);
            float* to = out + (p - first) * PANEL * STRIP;
            if (g) Block<BITS == 4, false, TURNS>{one, two, to, sums}.run();
            else Block<BITS == 4, true, TURNS>{one, two, to, sums}.run();
        }
    }
}

template <int BITS, class Done>
void product_of(const Panels& x, const Weights& w, const Strips& strips, long first, long last, Done done) {
    strip_by_strip(x, first, last, [&](long strip, long from, long to, float* sums) {
        if (x.group == TURN) strip_of<BITS, 1>(x, w, strips, strip, from, to, sums);
        else strip_of<BITS, 2>(x, w, strips, strip, from, to, sums);
    }, done);
}

}  // namespace
