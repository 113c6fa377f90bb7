// The passes of a transformer block over int8 tokens and 1-, 2- or 4-bit weights, for x86 processors.
//
// kernels.py builds this file with one of its units (folded.h, amx.h, vnni.h), checks it against torch and calls it
// through ctypes. Every function works on a range of its rows, panels or strips, so that threads share the work by
// taking ranges; none keeps or allocates anything shared.
//
// A weight is code * scale + bias, with one scale and one bias for each `group` inputs of an output; for one and two
// bits that is (code + centre) * scale, and no biases are given. A sum of codes times int8 values is exact, and is
// scaled in float32 by the weights' scale and by the token's step. In most units it is of one group (FOLD = 1), so that
// what is rounded is the activations alone, to 127 steps of the largest of their token and group. In folded.h it is of
// FOLD groups: these share a step, and their scales are rounded too.
//
// Shapes: M tokens, K inputs, N outputs, G = K / (group * FOLD).
//   panel   PANEL tokens side by side, P = M / PANEL rounded up: values of sum after sum, each in the unit's order;
//           steps and offsets [G][P][PANEL]. An offset is minus the sum of the values, which stands for a centre of -1;
//           a bias is held against that centre.
//   strip   STRIP outputs side by side, their codes expanded to bytes for some inputs at a time.

#include UNIT  // "folded.h", "amx.h" or "vnni.h"

namespace {

// Token `m` becomes a row of floats, null for one that only fills its panel.
void quantize_row(const Panels& to, long m, const float* x) {
    const long r = m % PANEL, group = to.group;
    for (long g = 0; g < to.groups(); ++g) {
        const long at = to.at(g, m / PANEL);
        int8_t* values = to.values + at * group;
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
            place(values, r, k, _mm512_cvtsepi32_epi8(rounded));
        }
        to.steps[at + r] = largest / STEPS;
        to.offsets[at + r] = -_mm512_reduce_add_epi32(sums);
    }
}

// Strips [first, last) times all tokens; `done(strip, token, sums)` is told of every token's sums [STRIP].
template <class Done>
void multiply(const Panels& x, const Weights& w, const Strips& strips, long first, long last, Done done) {
    const Unit unit;
    const auto panel_done = [&](long strip, long panel, const float* sums) {
        for (long m = panel * PANEL; m < std::min((panel + 1) * PANEL, x.count); ++m, sums += STRIP)
            done(strip, m, sums);
    };
    if (w.bits == 1) product_of<1>(x, w, strips, first, last, panel_done);
    else if (w.bits == 4) product_of<4>(x, w, strips, first, last, panel_done);
    else product_of<2>(x, w, strips, first, last, panel_done);
}

// The first `columns` of COUNT numbers to where they belong; all of them past the caches, if whole lines are written.
template <long COUNT> inline void put(const float* from, long columns, float* to) {
    if (columns == COUNT && reinterpret_cast<uintptr_t>(to) % 64 == 0)
        for (long c = 0; c < COUNT; c += LANES) _mm512_stream_ps(to + c, _mm512_load_ps(from + c));
    else
        std::memcpy(to, from, columns * sizeof(float));
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

// One head of a token, normed and turned.
inline void turn_row(const float* in, const float* weight, float eps, const float* cos, const float* sin, long size,
                     float* out) {
    float squares = 0;
#pragma omp simd reduction(+ : squares)
    for (long k = 0; k < size; ++k) squares += in[k] * in[k];
    const float inverse = 1 / std::sqrt(squares / size + eps);
#pragma omp simd
    for (long k = 0; k < size / 2; ++k) {
        const float a = in[2 * k] * inverse * weight[2 * k], b = in[2 * k + 1] * inverse * weight[2 * k + 1];
        out[2 * k] = a * cos[k] - b * sin[k];
        out[2 * k + 1] = b * cos[k] + a * sin[k];
    }
}

// Floats to the nearest bfloat16, the even one of two.
inline void round_row(const float* in, long count, uint16_t* out) {
#pragma omp simd
    for (long k = 0; k < count; ++k) {
        uint32_t bits;
        std::memcpy(&bits, in + k, 4);
        out[k] = static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    }
}

}  // namespace

extern "C" {

long allowed() { return permitted(); }
long panel_tokens() { return PANEL; }
long strip_outputs() { return STRIP; }
long folded_groups() { return FOLD; }

// Panels [first, last) of x [M, K], rows `stride` floats apart.
void quantize(const float* x, long stride, long count, long inputs, long group, long first, long last, int8_t* values,
              float* steps, int32_t* offsets) {
    const Panels to{values, steps, offsets, count, inputs, group * FOLD};
    for (long m = first * PANEL; m < last * PANEL; ++m) quantize_row(to, m, m < count ? x + m * stride : nullptr);
}

// The same of (1 + scale) * (x - mean) / deviation + shift, each token with its own mean and deviation.
void modulate(const float* x, long stride, const float* scale, const float* shift, float eps, long count, long inputs,
              long group, long first, long last, int8_t* values, float* steps, int32_t* offsets) {
    const Panels to{values, steps, offsets, count, inputs, group * FOLD};
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
    const Panels x{values, steps, offsets, count, inputs, group * FOLD};
    const Weights w{codes, scales, biases, outputs, inputs, group, bits};
    multiply(x, w, Strips{outputs, 1}, first, last, [&](long strip, long m, const float* sums) {
        const long n = strip * STRIP, columns = std::min(STRIP, outputs - n);
        float* to = out + m * stride + n;
        if (gate)
#pragma omp simd
            for (long c = 0; c < columns; ++c) to[c] += gate[n + c] * sums[c];
        else
            put<STRIP>(sums, columns, to);
    });
    _mm_sfence();
}

// The same of a layer that ends in SwiGLU: out = silu(first half of the outputs) * second half.
void gated(int8_t* values, float* steps, int32_t* offsets, long count, long inputs, long group,
           const uint8_t* codes, const float* scales, const float* biases, long outputs, int bits, long first,
           long last, float* out, long stride) {
    constexpr long HALF = STRIP / 2;
    const Panels x{values, steps, offsets, count, inputs, group * FOLD};
    const Weights w{codes, scales, biases, outputs, inputs, group, bits};
    multiply(x, w, Strips{outputs, 2}, first, last, [&](long strip, long m, const float* sums) {
        const long n = strip * HALF, columns = std::min(HALF, outputs / 2 - n);
        alignas(64) float made[HALF];
#pragma omp simd
        for (long c = 0; c < HALF; ++c) made[c] = silu(sums[c]) * sums[HALF + c];
        put<HALF>(made, columns, out + m * stride + n);
    });
    _mm_sfence();
}

// Root-mean-square norm of each head of tokens [first, last), then its pairs turned by the token's angle.
// x [M][heads][size] and out, of floats or (`half`) bfloat16; tokens `stride` and `out_stride` numbers apart, heads of
// out `head_stride`; cos and sin [M][size / 2].
void turn(const float* x, long stride, const float* weight, float eps, const float* cos, const float* sin, long heads,
          long size, long first, long last, int half, void* out, long out_stride, long head_stride) {
    auto row = buffer<float>(size);
    for (long m = first; m < last; ++m)
        for (long h = 0; h < heads; ++h) {
            const long at = m * out_stride + h * head_stride;
            float* to = half ? row.get() : static_cast<float*>(out) + at;
            turn_row(x + m * stride + h * size, weight, eps, cos + m * (size / 2), sin + m * (size / 2), size, to);
            if (half) round_row(to, size, static_cast<uint16_t*>(out) + at);
        }
}

}  // extern "C"
