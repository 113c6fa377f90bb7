// What the units of kernels.cpp share: tokens as the product reads them, and the numbers of a packed layer.
//
// A unit is a file with the product for one kind of processor. It says how many tokens lie side by side (PANEL) and
// includes this.

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>

namespace {

constexpr long LANES = 16;  // 32-bit numbers in a register
constexpr long STRIP = 64;  // outputs side by side: four registers
constexpr long WIDE = STRIP / LANES;
constexpr float STEPS = 127;

template <class T> struct Free { void operator()(T* p) const { std::free(p); } };
template <class T> using Buffer = std::unique_ptr<T[], Free<T>>;
template <class T> Buffer<T> buffer(long count) {
    return Buffer<T>(static_cast<T*>(std::aligned_alloc(64, (count * sizeof(T) + 63) / 64 * 64)));
}

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
    const float* scales;   // [N][G]
    const float* biases;   // the same, null for centred codes
    long outputs;
    int bits;
};

// What the sums of a strip are multiplied by, for each group [G + 1][STRIP]: its scales, and what its biases are away
// from the centre. Outputs that do not exist repeat the last one, a group too many counts as nothing.
struct Factors {
    Buffer<float> scales, shifts;

    Factors(const Weights& w, long output, long columns, long groups)
        : scales(buffer<float>((groups + 1) * STRIP)), shifts(buffer<float>((groups + 1) * STRIP)) {
        std::fill_n(scales.get() + groups * STRIP, STRIP, 0);
        std::fill_n(shifts.get() + groups * STRIP, STRIP, 0);
        for (long g = 0; g < groups; ++g)
            for (long n = 0; n < STRIP; ++n) {
                const long at = (output + std::min(n, columns - 1)) * groups + g;
                scales[g * STRIP + n] = w.scales[at] * (w.bits == 1 ? .5f : 1.f);
                if (w.bits == 4) shifts[g * STRIP + n] = w.biases[at] + w.scales[at];
            }
    }
};

// Where the rows of LANES outputs begin, in bytes.
inline __m512i rows(long output, long columns, long stride) {
    alignas(64) int32_t starts[LANES];
    for (long n = 0; n < LANES; ++n) starts[n] = static_cast<int32_t>(std::min(output + n, columns - 1) * stride);
    return _mm512_load_si512(starts);
}

// A token's sums of a group of inputs with LANES outputs, scaled and added to what was there.
template <bool BIASED>
inline __m512 scaled(__m512i sums, float step, int32_t offset, const float* scales, const float* shifts,
                     __m512 before) {
    if (BIASED) before = _mm512_fmadd_ps(_mm512_set1_ps(step * -offset), _mm512_load_ps(shifts), before);
    const __m512 scale = _mm512_mul_ps(_mm512_set1_ps(step), _mm512_load_ps(scales));
    return _mm512_fmadd_ps(scale, _mm512_cvtepi32_ps(sums), before);
}

}  // namespace
