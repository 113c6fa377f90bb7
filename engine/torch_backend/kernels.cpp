// The passes of a transformer block over int8 tokens and 1-, 2- or 4-bit weights, for x86 processors with AVX-512 VNNI.
//
// kernels.py builds this file, checks it against torch and calls it through ctypes. Every function works on a range of
// its rows, panels or strips, so that threads share the work by taking ranges; none keeps or allocates anything shared.
//
// A weight is code * scale + bias, with one scale and one bias for each `group` inputs of an output; for one and two
// bits that is (code + centre) * scale, and no biases are given. The sums of codes times int8 values are exact; each group's
// sum is scaled in float32 by the weight's scale and by the token's step in this group. So what is rounded is the
// activations alone, to 127 steps of the largest of their token and group.
//
// Shapes: M tokens, K inputs, N outputs, G = K / group.
//   panel   PANEL tokens side by side, P = M / PANEL rounded up. In the order that the product reads them in: values
//           [G][P][group / 4][PANEL][4], steps and offsets [G][P][PANEL]. An offset is minus the sum of the group's
//           values, which stands for a centre of -1; a bias is held against that centre.
//   strip   STRIP outputs side by side. codes [K / 4][STRIP][4], expanded for BLOCK inputs at a time.

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>

namespace {

constexpr long PANEL = 6;     // 6 x 4 registers of sums, 4 of codes and one of values: 29 of 32
constexpr long LANES = 16;    // 32-bit numbers in a register
constexpr long STRIP = 64;    // four registers
constexpr long BLOCK = 512;   // inputs whose expanded codes, 32 kB, stay in the first-level cache beside the tokens
constexpr long PANELS = 256;  // of sums at a time, 384 kB: they stay in the second-level cache
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

// Token `m` becomes a row of floats, null for one that only fills its panel.
void quantize_row(const Panels& to, long m, const float* x) {
    const long r = m % PANEL, group = to.group;
    for (long g = 0; g < to.groups(); ++g) {
        const long at = to.at(g, m / PANEL);
        int8_t* values = to.values + at * group + 4 * r;
        float largest = 0;
        if (x)
#pragma omp simd reduction(max : largest)
            for (long k = 0; k < group; ++k) largest = std::max(largest, std::fabs(x[g * group + k]));
        const __m512 inverse = _mm512_set1_ps(largest > 0 ? STEPS / largest : 0);
        __m512i sums = _mm512_setzero_si512();
        for (long k = 0; k < group; k += LANES) {
            __m512 floats = x ? _mm512_loadu_ps(x + g * group + k) : _mm512_setzero_ps();
            __m512i rounded = _mm512_cvtps_epi32(_mm512_mul_ps(floats, inverse));
            sums = _mm512_add_epi32(sums, rounded);
            alignas(16) int32_t quads[4];
            _mm_store_si128(reinterpret_cast<__m128i*>(quads), _mm512_cvtsepi32_epi8(rounded));
            for (long q = 0; q < 4; ++q) std::memcpy(values + (k / 4 + q) * PANEL * 4, &quads[q], 4);
        }
        to.steps[at + r] = largest / STEPS;
        to.offsets[at + r] = -_mm512_reduce_add_epi32(sums);
    }
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

// `inputs` of the codes of `columns` outputs, whose rows lie `stride` bytes apart, as a strip. Outputs that do not exist
// repeat the last one.
template <int BITS> void expand(const uint8_t* codes, long stride, long columns, long inputs, __m512i* strip) {
    constexpr long WORD = 32 / BITS;  // codes
    for (long c = 0; c < STRIP / LANES; ++c) {
        alignas(64) int32_t rows[LANES];
        for (long n = 0; n < LANES; ++n) rows[n] = static_cast<int32_t>(std::min(c * LANES + n, columns - 1) * stride);
        __m512i index = _mm512_load_si512(rows);
        for (long k = 0; k < inputs; k += WORD) {
            __m512i words = _mm512_i32gather_epi32(index, codes + k * BITS / 8, 1);
            for (long q = 0; q < WORD / 4; ++q, words = _mm512_srli_epi32(words, 4 * BITS))
                strip[(k / 4 + q) * (STRIP / LANES) + c] = spread<BITS>(words);
        }
    }
}

// sums + four products of unsigned and signed bytes in each lane. Written out, because GCC 12 spills all the sums
// around its own intrinsic, which takes three times as long.
inline __m512i dot(__m512i sums, __m512i codes, __m512i values) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(codes), "v"(values));
    return sums;
}

// One group of inputs of a panel times a strip, scaled and put or added to out [PANEL][STRIP]. `shifts` are what the
// group's biases are away from the centre, where BIASED.
template <bool BIASED>
inline void multiply(const int8_t* values, const float* steps, const int32_t* offsets, const __m512i* codes,
                     const float* scales, const float* shifts, long group, bool first, float* out) {
    constexpr long WIDE = STRIP / LANES;
    __m512i sums[PANEL][WIDE];
#pragma GCC unroll 6
    for (long r = 0; r < PANEL; ++r)
#pragma GCC unroll 4
        for (long c = 0; c < WIDE; ++c) sums[r][c] = _mm512_set1_epi32(offsets[r]);
    for (long q = 0; q < group / 4; ++q, codes += WIDE, values += 4 * PANEL)
#pragma GCC unroll 6
        for (long r = 0; r < PANEL; ++r) {
            int32_t quad;
            std::memcpy(&quad, values + 4 * r, 4);
            __m512i four = _mm512_set1_epi32(quad);
#pragma GCC unroll 4
            for (long c = 0; c < WIDE; ++c) sums[r][c] = dot(sums[r][c], codes[c], four);
        }
#pragma GCC unroll 6
    for (long r = 0; r < PANEL; ++r)
#pragma GCC unroll 4
        for (long c = 0; c < WIDE; ++c, out += LANES) {
            __m512 scale = _mm512_mul_ps(_mm512_set1_ps(steps[r]), _mm512_load_ps(scales + c * LANES));
            __m512 before = first ? _mm512_setzero_ps() : _mm512_load_ps(out);
            if (BIASED)
                before = _mm512_fmadd_ps(_mm512_set1_ps(steps[r] * -offsets[r]), _mm512_load_ps(shifts + c * LANES),
                                         before);
            _mm512_store_ps(out, _mm512_fmadd_ps(scale, _mm512_cvtepi32_ps(sums[r][c]), before));
        }
}

struct Weights {
    const uint8_t* codes;  // [N][K * bits / 8]
    const float* scales;   // [N][G]
    const float* biases;   // the same, null for centred codes
    long outputs;
    int bits;
};

// Panels [first, last) times the `columns` outputs from `output` on -> sums [panels * PANEL][STRIP].
template <int BITS>
void strip_of(const Panels& x, const Weights& w, long output, long columns, long first, long last, float* sums) {
    const long groups = x.groups(), bytes = x.inputs * BITS / 8, block = std::max(BLOCK / x.group, 1L) * x.group;
    auto codes = buffer<__m512i>(block * STRIP / 64);
    auto scales = buffer<float>(groups * STRIP), shifts = buffer<float>(BITS == 4 ? groups * STRIP : 0);
    for (long g = 0; g < groups; ++g)
        for (long n = 0; n < STRIP; ++n) {
            const long at = (output + std::min(n, columns - 1)) * groups + g;
            scales[g * STRIP + n] = w.scales[at] * (BITS == 1 ? .5f : 1.f);
            if (BITS == 4) shifts[g * STRIP + n] = w.biases[at] + w.scales[at];
        }
    for (long start = 0; start < x.inputs; start += block) {
        const long inputs = std::min(block, x.inputs - start);
        expand<BITS>(w.codes + output * bytes + start * BITS / 8, bytes, columns, inputs, codes.get());
        for (long p = first; p < last; ++p)
            for (long k = 0; k < inputs; k += x.group) {
                const long g = (start + k) / x.group, at = x.at(g, p);
                multiply<BITS == 4>(x.values + at * x.group, x.steps + at, x.offsets + at,
                                    codes.get() + k / 4 * (STRIP / LANES), scales.get() + g * STRIP,
                                    shifts.get() + g * STRIP, x.group, g == 0, sums + (p - first) * PANEL * STRIP);
            }
    }
}

void strip_of(const Panels& x, const Weights& w, long output, long columns, long first, long last, float* sums) {
    if (w.bits == 1) return strip_of<1>(x, w, output, columns, first, last, sums);
    if (w.bits == 4) return strip_of<4>(x, w, output, columns, first, last, sums);
    strip_of<2>(x, w, output, columns, first, last, sums);
}

// x / (1 + exp(-x)), to 1e-6 of its value; exp(r * ln 2) as a power of two times a polynomial, so that loops vectorise.
inline float silu(float x) {
    float power = std::min(std::max(x * -1.44269504f, -126.f), 126.f), whole = std::nearbyint(power);
    float r = (power - whole) * 0.693147181f;
    float e = 1 + r * (1 + r * (1 / 2.f + r * (1 / 6.f + r * (1 / 24.f + r * (1 / 120.f + r * (1 / 720.f))))));
    int32_t bits = (static_cast<int32_t>(whole) + 127) << 23;
    float two;
    std::memcpy(&two, &bits, 4);
    return x / (1 + e * two);
}

}  // namespace

extern "C" {

long panel_tokens() { return PANEL; }
long strip_outputs() { return STRIP; }

// Panels [first, last) of x [M, K], rows `stride` floats apart.
void quantize(const float* x, long stride, long count, long inputs, long group, long first, long last, int8_t* values,
              float* steps, int32_t* offsets) {
    const Panels to{values, steps, offsets, count, inputs, group};
    for (long m = first * PANEL; m < last * PANEL; ++m) quantize_row(to, m, m < count ? x + m * stride : nullptr);
}

// The same of (1 + scale) * (x - mean) / deviation + shift, each token with its own mean and deviation.
void modulate(const float* x, long stride, const float* scale, const float* shift, float eps, long count, long inputs,
              long group, long first, long last, int8_t* values, float* steps, int32_t* offsets) {
    const Panels to{values, steps, offsets, count, inputs, group};
    auto row = buffer<float>(inputs);
    for (long m = first * PANEL; m < last * PANEL; ++m) {
        const float* in = x + m * stride;
        float sum = 0, squares = 0, *out = m < count ? row.get() : nullptr;
        if (out) {
#pragma omp simd reduction(+ : sum)
            for (long k = 0; k < inputs; ++k) sum += in[k];
            const float mean = sum / inputs;
#pragma omp simd reduction(+ : squares)
            for (long k = 0; k < inputs; ++k) squares += (in[k] - mean) * (in[k] - mean);
            const float inverse = 1 / std::sqrt(squares / inputs + eps);
#pragma omp simd
            for (long k = 0; k < inputs; ++k) out[k] = (1 + scale[k]) * ((in[k] - mean) * inverse) + shift[k];
        }
        quantize_row(to, m, out);
    }
}

// Strips [first, last) of the product of `count` tokens and N outputs, into rows of `out` that lie `stride` apart.
// `gate` null: out = product; else out += gate * product.
void product(int8_t* values, float* steps, int32_t* offsets, long count, long inputs, long group,
             const uint8_t* codes, const float* scales, const float* biases, long outputs, int bits, long first,
             long last, const float* gate, float* out, long stride) {
    const Panels x{values, steps, offsets, count, inputs, group};
    const Weights w{codes, scales, biases, outputs, bits};
    const long panels = x.panels();
    auto sums = buffer<float>(std::min(panels, PANELS) * PANEL * STRIP);
    for (long p = 0; p < panels; p += PANELS)
        for (long n = first * STRIP; n < std::min(last * STRIP, outputs); n += STRIP) {
            const long columns = std::min(STRIP, outputs - n), end = std::min(p + PANELS, panels);
            strip_of(x, w, n, columns, p, end, sums.get());
            for (long m = p * PANEL; m < std::min(end * PANEL, count); ++m) {
                const float* in = sums.get() + (m - p * PANEL) * STRIP;
                float* to = out + m * stride + n;
                if (gate)
#pragma omp simd
                    for (long c = 0; c < columns; ++c) to[c] += gate[n + c] * in[c];
                else
                    std::memcpy(to, in, columns * sizeof(float));
            }
        }
}

// The same of a layer that ends in SwiGLU: out = silu(first half of the outputs) * second half.
void gated(int8_t* values, float* steps, int32_t* offsets, long count, long inputs, long group,
           const uint8_t* codes, const float* scales, const float* biases, long outputs, int bits, long first,
           long last, float* out, long stride) {
    const Panels x{values, steps, offsets, count, inputs, group};
    const Weights w{codes, scales, biases, outputs, bits};
    const long panels = x.panels(), half = outputs / 2, most = std::min(panels, PANELS) * PANEL;
    auto sums = buffer<float>(2 * most * STRIP);
    float *gates = sums.get(), *others = gates + most * STRIP;
    for (long p = 0; p < panels; p += PANELS)
        for (long n = first * STRIP; n < std::min(last * STRIP, half); n += STRIP) {
            const long columns = std::min(STRIP, half - n), end = std::min(p + PANELS, panels);
            strip_of(x, w, n, columns, p, end, gates);
            strip_of(x, w, half + n, columns, p, end, others);
            for (long m = p * PANEL; m < std::min(end * PANEL, count); ++m) {
                const long at = (m - p * PANEL) * STRIP;
                float* to = out + m * stride + n;
#pragma omp simd
                for (long c = 0; c < columns; ++c) to[c] = silu(gates[at + c]) * others[at + c];
            }
        }
}

// Root-mean-square norm of each head of tokens [first, last), then its pairs turned by the token's angle.
// x and out [M][heads][size], tokens `stride` and `out_stride` floats apart, heads of out `head_stride`; cos and sin
// [M][size / 2].
void turn(const float* x, long stride, const float* weight, float eps, const float* cos, const float* sin, long heads,
          long size, long first, long last, float* out, long out_stride, long head_stride) {
    const long half = size / 2;
    for (long m = first; m < last; ++m)
        for (long h = 0; h < heads; ++h) {
            const float *in = x + m * stride + h * size, *c = cos + m * half, *s = sin + m * half;
            float squares = 0, *to = out + m * out_stride + h * head_stride;
#pragma omp simd reduction(+ : squares)
            for (long k = 0; k < size; ++k) squares += in[k] * in[k];
            const float inverse = 1 / std::sqrt(squares / size + eps);
#pragma omp simd
            for (long k = 0; k < half; ++k) {
                const float a = in[2 * k] * inverse * weight[2 * k], b = in[2 * k + 1] * inverse * weight[2 * k + 1];
                to[2 * k] = a * c[k] - b * s[k];
                to[2 * k + 1] = b * c[k] + a * s[k];
            }
        }
}

}  // extern "C"
