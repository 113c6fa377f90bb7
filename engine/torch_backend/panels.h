// What the units of kernels.cpp share: tokens as the product reads them, and the numbers of a packed layer.
//
// A unit is a file with the product for one kind of processor. It says how many tokens and outputs lie side by side
// (PANEL, STRIP) and how many groups share a sum (FOLD), and includes this. Nothing in all of them is from C++'s own
// library: where the compiler is zig's it would have to be built first, which takes a minute.

#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

namespace {

template <class T> constexpr T min(T a, T b) { return b < a ? b : a; }
template <class T> constexpr T max(T a, T b) { return a < b ? b : a; }

constexpr long LANES = 16;  // 32-bit numbers in a register
constexpr long WIDE = STRIP / LANES;
constexpr float STEPS = 127;

// Memory that begins with a line of the caches, until the end of a scope.
template <class T> struct Buffer {
    T* const first;

    explicit Buffer(long count) : first(static_cast<T*>(aligned_alloc(64, (count * sizeof(T) + 63) / 64 * 64))) {}
    Buffer(const Buffer&) = delete;
    ~Buffer() { free(first); }
    operator T*() const { return first; }
};

struct Panels {
    int8_t* values;
    float* steps;
    int32_t* offsets;
    long count, inputs, group;

    long panels() const { return (count + PANEL - 1) / PANEL; }
    long groups() const { return inputs / group; }
    long at(long g, long p) const { return (g * panels() + p) * PANEL; }
};

struct Weights {
    const uint8_t* codes;  // [N][K * bits / 8]
    const float* scales;   // [N][K / group]
    const float* biases;   // the same, null for centred codes
    long outputs, inputs, group;
    int bits;

    long groups() const { return inputs / group; }
    long bytes() const { return inputs * bits / 8; }
};

// LANES outputs of a strip: the first of them, and where those of their kind end; what lies behind repeats the last.
struct Column {
    long output, end;

    // Where their rows begin, which are `stride` apart.
    __m512i rows(long stride) const {
        alignas(64) int32_t starts[LANES];
        for (long n = 0; n < LANES; ++n) starts[n] = static_cast<int32_t>(min(n, end - 1 - output) * stride);
        return _mm512_load_si512(starts);
    }
};

// Which outputs the strips of a layer have: STRIP after another or, of a layer in two halves, STRIP / 2 of each.
struct Strips {
    long outputs, halves;

    Column column(long strip, long c) const {
        const long wide = WIDE / halves, end = outputs / halves * (c / wide + 1);
        return {min(end - outputs / halves + strip * wide * LANES + c % wide * LANES, end - 1), end};
    }
};

// What the sums of a strip are multiplied by, for each group [G + 1][STRIP]: its scales, and what its biases are away
// from the centre. A group too many counts as nothing.
struct Factors {
    Buffer<float> scales, shifts;

    Factors(const Weights& w, const Strips& strips, long strip)
        : scales((w.groups() + 1) * STRIP), shifts((w.groups() + 1) * STRIP) {
        const long groups = w.groups();
        memset(scales + groups * STRIP, 0, STRIP * sizeof(float));
        memset(shifts + groups * STRIP, 0, STRIP * sizeof(float));
        for (long n = 0; n < STRIP; ++n) {
            const Column column = strips.column(strip, n / LANES);
            const long first = min(column.output + n % LANES, column.end - 1) * groups;
            for (long g = 0; g < groups; ++g) {
                scales[g * STRIP + n] = w.scales[first + g] * (w.bits == 1 ? .5f : 1.f);
                if (w.bits == 4) shifts[g * STRIP + n] = w.biases[first + g] + w.scales[first + g];
            }
        }
    }
};

// A token's sums of a group of inputs with LANES outputs, scaled and added to what was there.
template <bool BIASED>
inline __m512 scaled(__m512i sums, float step, int32_t offset, const float* scales, const float* shifts,
                     __m512 before) {
    if (BIASED) before = _mm512_fmadd_ps(_mm512_set1_ps(step * -offset), _mm512_load_ps(shifts), before);
    const __m512 scale = _mm512_mul_ps(_mm512_set1_ps(step), _mm512_load_ps(scales));
    return _mm512_fmadd_ps(scale, _mm512_cvtepi32_ps(sums), before);
}

// Strips [first, last) times all panels, PANELS of them at a time, by `strip_of`; `done(strip, panel, sums)` is told of
// every panel's sums [PANEL][STRIP].
template <class StripOf, class Done>
void strip_by_strip(const Panels& x, long first, long last, StripOf strip_of, Done done) {
    const Buffer<float> sums(min(x.panels(), PANELS) * PANEL * STRIP);
    for (long p = 0; p < x.panels(); p += PANELS)
        for (long strip = first; strip < last; ++strip) {
            const long end = min(p + PANELS, x.panels());
            strip_of(strip, p, end, sums);
            for (long panel = p; panel < end; ++panel) done(strip, panel, sums + (panel - p) * PANEL * STRIP);
        }
}

}  // namespace
