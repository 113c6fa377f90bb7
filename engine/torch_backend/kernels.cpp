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

// Floats to the nearest bfloat16, the even one of two.
inline void round_row(const float* in, long count, uint16_t* out) {
#pragma omp simd
    for (long k = 0; k < count; ++k) {
        uint32_t bits;
        memcpy(&bits, in + k, 4);
        out[k] = static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    }
}

inline void widen_row(const uint16_t* in, long count, float* out) {
#pragma omp simd
    for (long k = 0; k < count; ++k) {
        const uint32_t bits = static_cast<uint32_t>(in[k]) << 16;
        memcpy(out + k, &bits, 4);
    }
}

// Into the cache, for a later turn.
template <class Number> inline void fetch(const Number* from, long count) {
    for (long k = 0; k < count; k += 64 / sizeof(Number))
        _mm_prefetch(reinterpret_cast<const char*>(from + k), _MM_HINT_T0);
}

// Tokens whose first `width` inputs lie in one place, as floats or (`half`) bfloat16, and others in another.
struct Rows {
    const void* first;
    long first_stride;
    bool half;
    long width;
    const float* rest;
    long stride;

    // `count` inputs of a token from input `start` on: where they lie, or in `room`.
    const float* floats(long m, long start, long count, float* room) const {
        if (start >= width) return rest + m * stride + start - width;
        const long at = m * first_stride + start, here = min(count, width - start);
        if (!half && here == count) return static_cast<const float*>(first) + at;
        if (half) widen_row(static_cast<const uint16_t*>(first) + at, here, room);
        else memcpy(room, static_cast<const float*>(first) + at, here * sizeof(float));
        if (here < count) memcpy(room + here, rest + m * stride, (count - here) * sizeof(float));
        return room;
    }

    // Of the first place, for a later turn.
    void fetch_ahead(long m, long start, long count) const {
        const long at = m * first_stride + start;
        if (half) fetch(static_cast<const uint16_t*>(first) + at, count);
        else fetch(static_cast<const float*>(first) + at, count);
    }
};

constexpr long PAGE = 1024;  // floats: at its end a processor stops fetching by itself

// A token's place in its panel is filled: `floats(start)` says where a group of its inputs lies, null for no token.
template <class Floats> void quantize_row(const Panels& to, long m, Floats floats) {
    const long r = m % PANEL, group = to.group;
    for (long g = 0; g < to.groups(); ++g) {
        const long at = to.at(g, m / PANEL);
        const float* x = floats(g * group);
        int8_t* values = to.values + at * group;
        __m512 most = _mm512_setzero_ps();
        if (x) {
            fetch(x + PAGE, group);
            // of two operands of which one is no number the second is taken
            for (long k = 0; k < group; k += LANES) most = _mm512_max_ps(_mm512_abs_ps(_mm512_loadu_ps(x + k)), most);
        }
        const float largest = _mm512_reduce_max_ps(most);
        const __m512 inverse = _mm512_set1_ps(largest > 0 ? STEPS / largest : 0);
        __m512i sums = _mm512_setzero_si512();
        for (long k = 0; k < group; k += LANES) {
            __m512 floats = x ? _mm512_loadu_ps(x + k) : _mm512_setzero_ps();
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
        for (long m = panel * PANEL; m < min((panel + 1) * PANEL, x.count); ++m, sums += STRIP)
            done(strip, m, sums);
    };
    if (w.bits == 1) product_of<1>(x, w, strips, first, last, panel_done);
    else if (w.bits == 4) product_of<4>(x, w, strips, first, last, panel_done);
    else product_of<2>(x, w, strips, first, last, panel_done);
}

// The first `columns` of COUNT numbers to where they belong; all of them past the caches, if whole lines are written.
template <long COUNT, class Number> inline void put(const Number* from, long columns, Number* to) {
    constexpr long LINE = 64 / sizeof(Number);
    if (COUNT % LINE == 0 && columns == COUNT && reinterpret_cast<uintptr_t>(to) % 64 == 0)
        for (long c = 0; c < COUNT; c += LINE)
            _mm512_stream_si512(reinterpret_cast<__m512i*>(to + c), _mm512_load_si512(from + c));
    else
        memcpy(to, from, columns * sizeof(Number));
}

// Rows [first, last) of the weights, LANES codes at a time looked up among all that a code can stand for.
template <int BITS> void expand_rows(const Weights& w, long first, long last, bool half, void* out) {
    const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512 codes = _mm512_cvtepi32_ps(_mm512_and_si512(lanes, _mm512_set1_epi32((1 << BITS) - 1)));
    const __m512i shifts = _mm512_mullo_epi32(_mm512_and_si512(lanes, _mm512_set1_epi32(32 / BITS - 1)),
                                              _mm512_set1_epi32(BITS));
    constexpr float CENTRE = BITS == 1 ? -.5f : -1.f;
    for (long n = first; n < last; ++n)
        for (long g = 0; g < w.groups(); ++g) {
            const float scale = w.scales[n * w.groups() + g];
            const float bias = w.biases ? w.biases[n * w.groups() + g] : CENTRE * scale;
            alignas(64) float table[LANES];
            _mm512_store_ps(table, _mm512_fmadd_ps(codes, _mm512_set1_ps(scale), _mm512_set1_ps(bias)));
            uint16_t rounded[LANES];
            if (half) round_row(table, LANES, rounded), widen_row(rounded, LANES, table);
            const __m512 values = _mm512_load_ps(table);
            const uint8_t* from = w.codes + n * w.bytes() + g * w.group * BITS / 8;
            for (long k = 0; k < w.group; k += LANES) {
                uint64_t word = 0;
                memcpy(&word, from + k * BITS / 8, LANES * BITS / 8);
                __m512i index = _mm512_set1_epi32(static_cast<int32_t>(word));
                if (BITS == 4) index = _mm512_inserti64x4(index, _mm256_set1_epi32(static_cast<int32_t>(word >> 32)), 1);
                // an index counts modulo LANES, and `values` repeats itself
                const __m512 found = _mm512_permutexvar_ps(_mm512_srlv_epi32(index, shifts), values);
                const long at = n * w.inputs + g * w.group + k;
                if (half)
                    _mm256_storeu_si256(reinterpret_cast<__m256i*>(static_cast<uint16_t*>(out) + at),
                                        _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(found), 16)));
                else
                    _mm512_storeu_ps(static_cast<float*>(out) + at, found);
            }
        }
}

// x / (1 + exp(-x)), to 1e-6 of its value; exp(r * ln 2) as a power of two times a polynomial, so that loops vectorise.
inline float silu(float x) {
    float power = min(max(x * -1.44269504f, -126.f), 126.f), whole = nearbyintf(power);
    float r = (power - whole) * 0.693147181f;
    float e = 1 + r * (1 + r * (1 / 2.f + r * (1 / 6.f + r * (1 / 24.f + r * (1 / 120.f + r * (1 / 720.f))))));
    int32_t bits = (static_cast<int32_t>(whole) + 127) << 23;
    float two;
    memcpy(&two, &bits, 4);
    return x / (1 + e * two);
}

// One head of a token, normed and turned.
inline void turn_row(const float* in, const float* weight, float eps, const float* cos, const float* sin, long size,
                     float* out) {
    const auto first = [](long count) { return static_cast<__mmask16>((1u << min(count, LANES)) - 1); };
    const __m512i twice = _mm512_srli_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0), 1);
    __m512 squares = _mm512_setzero_ps();
    for (long k = 0; k < size; k += LANES) {
        const __m512 x = _mm512_maskz_loadu_ps(first(size - k), in + k);
        squares = _mm512_fmadd_ps(x, x, squares);
    }
    const __m512 inverse = _mm512_set1_ps(1 / sqrtf(_mm512_reduce_add_ps(squares) / size + eps));
    for (long k = 0; k < size; k += LANES) {
        const __mmask16 there = first(size - k), pairs = first((size - k) / 2) & 0xff;
        const __m512 normed = _mm512_mul_ps(_mm512_maskz_loadu_ps(there, in + k), inverse);
        const __m512 x = _mm512_mul_ps(normed, _mm512_maskz_loadu_ps(there, weight + k));
        const __m512 c = _mm512_permutexvar_ps(twice, _mm512_maskz_loadu_ps(pairs, cos + k / 2));
        const __m512 s = _mm512_permutexvar_ps(twice, _mm512_maskz_loadu_ps(pairs, sin + k / 2));
        const __m512 other = _mm512_mul_ps(_mm512_permute_ps(x, 0b10110001), s);  // of each pair
        _mm512_mask_storeu_ps(out + k, there, _mm512_fmaddsub_ps(x, c, other));
    }
}

}  // namespace

extern "C" {

long allowed() { return permitted(); }
long panel_tokens() { return PANEL; }
long strip_outputs() { return STRIP; }
long folded_groups() { return FOLD; }

// Panels [first, last) of tokens [M, K] as Rows has them.
void quantize(const void* x, long x_stride, int half, long width, const float* rest, long stride, long count,
              long inputs, long group, long first, long last, int8_t* values, float* steps, int32_t* offsets) {
    const Rows rows{x, x_stride, half != 0, width, rest, stride};
    const Panels to{values, steps, offsets, count, inputs, group * FOLD};
    const Buffer<float> room(to.group);
    for (long m = first * PANEL; m < last * PANEL; ++m)
        quantize_row(to, m, [&](long start) {
            return m < count ? rows.floats(m, start, to.group, room) : nullptr;
        });
}

// The same of (1 + scale) * (x - mean) / deviation + shift, each token with its own mean and deviation.
void modulate(const float* x, long stride, const float* scale, const float* shift, float eps, long count, long inputs,
              long group, long first, long last, int8_t* values, float* steps, int32_t* offsets) {
    const Panels to{values, steps, offsets, count, inputs, group * FOLD};
    const Buffer<float> row(inputs);
    for (long m = first * PANEL; m < last * PANEL; ++m) {
        const float* in = x + m * stride;
        float sum = 0, squares = 0, *out = m < count ? row.first : nullptr;
        if (out) {
#pragma omp simd reduction(+ : sum)
            for (long k = 0; k < inputs; ++k) sum += in[k];
            const float mean = sum / inputs;
#pragma omp simd reduction(+ : squares)
            for (long k = 0; k < inputs; ++k) squares += (in[k] - mean) * (in[k] - mean);
            const float inverse = 1 / sqrtf(squares / inputs + eps);
#pragma omp simd
            for (long k = 0; k < inputs; ++k) out[k] = (1 + scale[k]) * ((in[k] - mean) * inverse) + shift[k];
        }
        quantize_row(to, m, [&](long start) { return out ? out + start : nullptr; });
    }
}

// Strips [first, last) of the product of `count` tokens and N outputs, into rows of `out` that lie `stride` numbers
// apart. `gate` null: out = product, as floats or (`half`) bfloat16; else out, of floats, += gate * product.
void product(int8_t* values, float* steps, int32_t* offsets, long count, long inputs, long group,
             const uint8_t* codes, const float* scales, const float* biases, long outputs, int bits, long first,
             long last, const float* gate, int half, void* out, long stride) {
    const Panels x{values, steps, offsets, count, inputs, group * FOLD};
    const Weights w{codes, scales, biases, outputs, inputs, group, bits};
    multiply(x, w, Strips{outputs, 1}, first, last, [&](long strip, long m, const float* sums) {
        const long n = strip * STRIP, columns = min(STRIP, outputs - n);
        float* to = static_cast<float*>(out) + m * stride + n;
        if (gate) {
#pragma omp simd
            for (long c = 0; c < columns; ++c) to[c] += gate[n + c] * sums[c];
        } else if (half) {
            alignas(64) uint16_t rounded[STRIP];
            round_row(sums, STRIP, rounded);
            put<STRIP>(rounded, columns, static_cast<uint16_t*>(out) + m * stride + n);
        } else {
            put<STRIP>(sums, columns, to);
        }
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
        const long n = strip * HALF, columns = min(HALF, outputs / 2 - n);
        alignas(64) float made[HALF];
#pragma omp simd
        for (long c = 0; c < HALF; ++c) made[c] = silu(sums[c]) * sums[HALF + c];
        put<HALF>(made, columns, out + m * stride + n);
    });
    _mm_sfence();
}

// Rows [first, last) of the weights themselves [N, K], as floats or (`half`) bfloat16.
void dense(const uint8_t* codes, const float* scales, const float* biases, long inputs, long group, int bits, int half,
           long first, long last, void* out) {
    const Weights w{codes, scales, biases, last, inputs, group, bits};
    if (bits == 1) expand_rows<1>(w, first, last, half != 0, out);
    else if (bits == 4) expand_rows<4>(w, first, last, half != 0, out);
    else expand_rows<2>(w, first, last, half != 0, out);
}

// Root-mean-square norm of each head of tokens [first, last), then its pairs turned by the token's angle.
// x [M][heads][size] and out, each of floats or (`half`, `half_out`) bfloat16; tokens `stride` and `out_stride` numbers
// apart, heads of out `head_stride`; cos and sin [M][size / 2].
void turn(const void* x, int half, long stride, const float* weight, float eps, const float* cos, const float* sin,
          long heads, long size, long first, long last, int half_out, void* out, long out_stride, long head_stride) {
    const Buffer<float> room(size), row(size);
    const Rows rows{x, stride, half != 0, heads * size, nullptr, 0};
    for (long m = first; m < last; ++m)
        for (long h = 0; h < heads; ++h) {
            const long at = m * out_stride + h * head_stride;
            float* to = half_out ? row : static_cast<float*>(out) + at;
            rows.fetch_ahead(m + 1, h * size, size);
            const float* in = rows.floats(m, h * size, size, room);
            turn_row(in, weight, eps, cos + m * (size / 2), sin + m * (size / 2), size, to);
            if (half_out) round_row(to, size, static_cast<uint16_t*>(out) + at);
        }
}

}  // extern "C"
