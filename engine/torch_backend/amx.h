// The product on processors with AMX: tiles of 16 tokens by 16 outputs, 64 inputs at a time.
//
//   panel   values [G][P][group / TURN][PANEL][TURN]: sixteen tokens, a tile for every TURN inputs
//   strip   codes [WIDE][K / 4][LANES][4], expanded for two groups at a time; signed, the centre already taken off
//
// Whatever is added, it is added in the order of vnni.h: both give the same bits.

#include <sys/syscall.h>
#include <unistd.h>

constexpr long PANEL = 16;   // rows of a tile
constexpr long PANELS = 96;  // of sums at a time, 384 kB: they stay in the second-level cache
constexpr long TURN = 64;    // inputs of one tile

#include "panels.h"

namespace {

// Linux has to be asked before a process may use tiles, for all of its threads.
bool permitted() {
    constexpr int REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
}

// All tiles of this thread as 16 rows of 64 bytes, until the end of a scope.
struct Unit {
    Unit() {
        struct { uint8_t palette = 1, start = 0, none[14] = {}; uint16_t bytes[16] = {}; uint8_t rows[16] = {}; } shape;
        std::fill_n(shape.bytes, 8, 64);
        std::fill_n(shape.rows, 8, 16);
        _tile_loadconfig(&shape);
    }
    ~Unit() { _tile_release(); }
};

// Sixteen inputs of a panel's token `r`, from input `k` of the group at `values` on.
inline void place(int8_t* values, long r, long k, __m128i sixteen) {
    _mm_store_si128(reinterpret_cast<__m128i*>(values + k / TURN * PANEL * TURN + r * TURN + k % TURN), sixteen);
}

// `inputs` of the codes of `columns` outputs, whose rows lie `stride` bytes apart, as a strip. A shift by a different
// number of bits for each byte brings four codes of an output into its lane, a table of all that six bits can be makes
// code - 1 of them; one bit becomes -1 or 1.
template <int BITS>
void expand(const uint8_t* codes, long stride, long columns, long inputs, long room, __m512i* strip) {
    constexpr long WORD = 32 / BITS;  // codes
    alignas(64) int8_t values[64];
    alignas(64) uint8_t shifts[WORD / 4][64];
    for (int i = 0; i < 64; ++i) {
        const int code = i & ((1 << BITS) - 1);
        values[i] = static_cast<int8_t>(BITS == 1 ? 2 * code - 1 : code - 1);
        for (int q = 0; q < WORD / 4; ++q) shifts[q][i] = static_cast<uint8_t>((i & 4) * 8 + (4 * q + (i & 3)) * BITS);
    }
    const __m512i table = _mm512_load_si512(values);
    for (long c = 0; c < WIDE; ++c) {
        const __m512i index = rows(c * LANES, columns, stride);
        __m512i* to = strip + c * room;
        for (long k = 0; k < inputs; k += WORD) {
            const __m512i words = _mm512_i32gather_epi32(index, codes + k * BITS / 8, 1);
            for (long q = 0; q < WORD / 4; ++q)
                *to++ = _mm512_permutexvar_epi8(
                    _mm512_multishift_epi64_epi8(_mm512_load_si512(shifts[q]), words), table);
        }
    }
    asm volatile("" ::: "memory");  // the compiler does not know that tiles read it
}

#define INLINE __attribute__((always_inline)) inline  // what is called reads its addresses from memory again and again

// Tiles by number. Written out, because the compiler's own take no number from a template.
template <int T> inline void clear() { asm volatile("tilezero %%tmm%c0" ::"i"(T)); }
template <int T> inline void load(const void* from) {
    asm volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(T), "r"(from), "r"(TURN));
}
template <int T> inline void store(void* to) {
    asm volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(T), "r"(to), "r"(TURN) : "memory");
}
template <int TO, int VALUES, int CODES> inline void dot() {
    asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(TO), "i"(VALUES), "i"(CODES));
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

// Panels [first, last) times the `columns` outputs from `output` on -> sums [panels * PANEL][STRIP].
template <int BITS, int TURNS>
void strip_of(const Panels& x, const Weights& w, long output, long columns, long first, long last, float* out) {
    constexpr long SIZE = TURNS * TURN;
    const long bytes = x.inputs * BITS / 8;
    auto codes = buffer<__m512i>(SIZE / 2 * WIDE);
    auto sums = buffer<int32_t[PANEL][LANES]>(2);
    const Factors factors(w, output, columns, x.groups());
    for (long g = 0; g < x.groups(); g += 2) {
        const long inputs = std::min(2 * SIZE, x.inputs - g * SIZE);
        expand<BITS>(w.codes + output * bytes + g * SIZE * BITS / 8, bytes, columns, inputs, SIZE / 2, codes.get());
        for (long p = first; p < last; ++p) {
            const auto group = [&](long tokens, long i) {
                const long at = x.at(tokens, p), factor = (g + i) * STRIP;
                return Group{x.values + at * SIZE, x.steps + at, x.offsets + at, codes.get() + i * SIZE / 4,
                             factors.scales.get() + factor, factors.shifts.get() + factor};
            };
            // beside an odd last group itself, which its factors make nothing of
            const Group one = group(g, 0), two = group(std::min(g + 1, x.groups() - 1), 1);
            float* to = out + (p - first) * PANEL * STRIP;
            if (g) Block<BITS == 4, false, TURNS>{one, two, to, sums.get()}.run();
            else Block<BITS == 4, true, TURNS>{one, two, to, sums.get()}.run();
        }
    }
}

template <int BITS>
void strip_of(const Panels& x, const Weights& w, long output, long columns, long first, long last, float* out) {
    if (x.group == TURN) strip_of<BITS, 1>(x, w, output, columns, first, last, out);
    else strip_of<BITS, 2>(x, w, output, columns, first, last, out);
}

}  // namespace
