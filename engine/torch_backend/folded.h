// The product on processors with AMX for weights of one or two bits, with one sum for FOLD groups.
//
// The scales of these groups become whole numbers, 127ths of the largest of them, that their codes are multiplied by:
// off by at most 1/254 of it. A token has one step for all of them. So fewer sums leave their tiles, and six tiles of
// sums, 32 tokens by 48 outputs, need seven tiles of values and codes for six products.
//
//   panel   values [K / segment][P][segment / TURN][2][16][TURN]: a segment is FOLD groups
//   strip   codes of two blocks of COLUMNS * LANES outputs, [2][K / segment][segment / TURN][COLUMNS][16][LANES][4]

constexpr long PANEL = 32;   // rows of two tiles
constexpr long PANELS = 48;  // of sums at a time, where there are more inputs than PART
constexpr long STRIP = 96;
constexpr long FOLD = 4;

#include "panels.h"
#include "tiles.h"

namespace {

constexpr long COLUMNS = 3;  // of LANES outputs: a block, half a strip
constexpr long TURNS = 8;    // tiles of inputs in a segment: groups are of 128
constexpr long SEGMENT = TURNS * TURN;
constexpr long BLOCK = COLUMNS * LANES * SEGMENT;  // bytes of codes
constexpr long PART = 3 * SEGMENT;                 // inputs that are expanded at a time
constexpr long ROOM = 4 * STRIP * PART;            // 0.6 MB for codes: a neighbour may have half of the cache

// How the codes of LANES outputs become bytes: their rows' places, and what to do with a word of them.
template <int BITS> struct Folding {
    const Weights& w;
    const Column column;
    const Words<BITS> words;
    const __m512i rows, scale_rows, mask, place;

    Folding(const Weights& w, const Column& column)
        : w(w), column(column), rows(column.rows(w.bytes())), scale_rows(column.rows(w.groups())),
          mask(_mm512_set1_epi8((1 << BITS) - 1)),
          place(_mm512_broadcast_i32x4(_mm_set_epi32(0x0c0c0c0c, 0x08080808, 0x04040404, 0))) {}

    __m512 scales(long g) const {
        return _mm512_i32gather_ps(scale_rows, w.scales + column.output * w.groups() + g, 4);
    }

    __m512 largest(long segment) const {
        __m512 found = _mm512_set1_ps(1e-37f);
        for (long g = segment * FOLD; g < (segment + 1) * FOLD; ++g)
            found = _mm512_max_ps(found, _mm512_abs_ps(scales(g)));
        return found;
    }

    // What the codes of an output in this group stand for, in the bytes of its lane: -1 or 1 times its scale, of two bits
    // -1, 0 or 1 times. Code 3, which nothing ternary has, counts as 0: the trial sees it.
    __m512i table(long g, __m512 largest) const {
        const __m512 steps = _mm512_div_ps(_mm512_mul_ps(scales(g), _mm512_set1_ps(STEPS)), largest);
        const __m512i plus = _mm512_cvtps_epi32(steps), low = _mm512_set1_epi32(255);
        const __m512i minus = _mm512_sub_epi32(_mm512_setzero_si512(), plus);
        return (minus & low) | _mm512_slli_epi32(plus & low, BITS == 1 ? 8 : 16);
    }

    // A group's codes, from its input `at` of the segment on, into tiles COLUMNS apart.
    void put(long g, __m512i table, long at, int8_t* tiles) const {
        const uint8_t* from = w.codes + column.output * w.bytes() + g * w.group * BITS / 8;
        for (long k = 0; k < w.group; k += words.CODES, at += words.CODES) {
            const __m512i word = _mm512_i32gather_epi32(rows, from + k * BITS / 8, 1);
            auto* to = reinterpret_cast<__m512i*>(tiles + at / TURN * COLUMNS * TILE + at % TURN * LANES);
            for (long q = 0; q < words.CODES / 4; ++q)  // a shuffle reaches the tables of four outputs
                to[q] = _mm512_shuffle_epi8(table, (words.four(word, q) & mask) | place);
        }
    }
};

// `segments` of a strip's codes from segment `start` on, and of what their sums are multiplied by, [segments][STRIP].
template <int BITS>
void expand(const Weights& w, const Strips& strips, long number, long start, long segments, int8_t* codes,
            float* scales) {
    const __m512 unit = _mm512_set1_ps((BITS == 1 ? .5f : 1.f) / STEPS);
    for (long c = 0; c < WIDE; ++c) {
        const Folding<BITS> folding(w, strips.column(number, c));
        for (long s = 0; s < segments; ++s) {
            const __m512 largest = folding.largest(start + s);
            _mm512_store_ps(scales + s * STRIP + c * LANES, _mm512_mul_ps(largest, unit));
            int8_t* tiles = codes + (c / COLUMNS * segments + s) * BLOCK + c % COLUMNS * TILE;
            for (long i = 0; i < FOLD; ++i) {
                const long g = (start + s) * FOLD + i;
                folding.put(g, folding.table(g, largest), i * w.group, tiles);
            }
        }
    }
    asm volatile("" ::: "memory");  // the compiler does not know that tiles read it
}

// A panel's sums of a segment with a block's outputs, on their way to out [PANEL][STRIP].
struct Sums {
    const int32_t (*tiles)[16][LANES];  // two by COLUMNS
    const float *steps, *scales;
    float* out;
    bool first;  // put there, not added

    INLINE void rows(long from, long count) const {
        const __mmask16 kept = first ? 0 : 0xffff;
#pragma GCC unroll 4
        for (long r = from; r < from + count; ++r)
#pragma GCC unroll 3
            for (long c = 0; c < COLUMNS; ++c) {
                float* to = out + r * STRIP + c * LANES;
                const __m512 sums = _mm512_cvtepi32_ps(_mm512_load_si512(tiles[r / 16 * COLUMNS + c][r % 16]));
                const __m512 scale = _mm512_mul_ps(_mm512_set1_ps(steps[r]), _mm512_load_ps(scales + c * LANES));
                _mm512_store_ps(to, _mm512_fmadd_ps(scale, sums, _mm512_maskz_load_ps(kept, to)));
            }
    }
};

// A segment of a panel times a block -> tiles, whose sums of the segment `before` leave meanwhile (WITH), since a
// processor does not look far enough ahead to find that by itself. From `next` on is what will be read soon.
template <bool WITH>
INLINE void segment(const int8_t* values, const int8_t* codes, const int8_t* next, const Sums& before,
                    int32_t (*tiles)[16][LANES]) {
    clear<0>(), clear<1>(), clear<2>(), clear<3>(), clear<4>(), clear<5>();
    for (long t = 0; t < TURNS; ++t, values += 2 * TILE, codes += COLUMNS * TILE) {
        load<6>(values);
        load<7>(codes), dot<0, 6, 7>();
        load<7>(codes + TILE), dot<1, 6, 7>();
        load<7>(codes + 2 * TILE), dot<2, 6, 7>();
        if (WITH) before.rows(t * (PANEL / TURNS), PANEL / TURNS);
#pragma GCC unroll 4
        for (long line = 0; line < 4; ++line) _mm_prefetch(next + (t * 4 + line) * 64, _MM_HINT_T1);
        load<6>(values + TILE);
        dot<5, 6, 7>();  // codes that are still there
        load<7>(codes + TILE), dot<4, 6, 7>();
        load<7>(codes), dot<3, 6, 7>();
    }
    store<0>(tiles[0]), store<1>(tiles[1]), store<2>(tiles[2]);
    store<3>(tiles[3]), store<4>(tiles[4]), store<5>(tiles[5]);
}

// `segments` of panel `p`, from segment `start` on, times a strip -> out [PANEL][STRIP].
INLINE void panel_of(const Panels& x, long p, long start, long segments, const int8_t* codes, const float* scales,
                     long ahead, long further, int32_t (*tiles)[16][LANES], float* out) {
    for (long block = 0; block < 2; ++block, ahead += further) {
        const long column = block * COLUMNS * LANES;
        Sums sums{};
        for (long s = 0; s < segments; ++s, codes += BLOCK) {
            const long at = x.at(start + s, p);
            const int8_t* values = x.values + at * SEGMENT;
            if (s) segment<true>(values, codes, values + ahead, sums, tiles);
            else segment<false>(values, codes, values + ahead, sums, tiles);
            sums = {tiles, x.steps + at, scales + s * STRIP + column, out + column, start + s == 0};
        }
        sums.rows(0, PANEL);
    }
}

// Strips [first, last), whose codes are in the cache together, times panels [from, to).
template <int BITS, class Done>
void strips_of(const Panels& x, const Weights& w, const Strips& strips, long first, long last, long from, long to,
               Done done) {
    const long count = last - first, most = min(PART / SEGMENT, x.groups());
    const bool whole = most == x.groups();  // then no sums wait for others
    const Buffer<int8_t> codes(count * most * 2 * BLOCK);
    const Buffer<float> scales(count * most * STRIP);
    const Buffer<int32_t[16][LANES]> tiles(2 * COLUMNS);
    const Buffer<float> sums((whole ? 1 : (to - from) * count) * PANEL * STRIP);
    const auto codes_of = [&](long i) { return codes + i * most * 2 * BLOCK; };
    const auto scales_of = [&](long i) { return scales + i * most * STRIP; };
    const long share = PANEL * SEGMENT / (2 * count);  // of the next panel, that a block fetches
    for (long start = 0; start < x.groups(); start += most) {
        const long segments = min(most, x.groups() - start);
        for (long i = 0; i < count; ++i) expand<BITS>(w, strips, first + i, start, segments, codes_of(i), scales_of(i));
        for (long p = from; p < to; ++p)
            for (long i = 0; i < count; ++i) {
                float* out = sums + (whole ? 0 : (p - from) * count + i) * PANEL * STRIP;
                panel_of(x, p, start, segments, codes_of(i), scales_of(i), PANEL * SEGMENT + 2 * i * share, share,
                         tiles, out);
                if (start + segments == x.groups()) done(first + i, p, out);
            }
    }
}

template <int BITS, class Done>
void product_of(const Panels& x, const Weights& w, const Strips& strips, long first, long last, Done done) {
    const long fit = ROOM / (STRIP * min(x.inputs, PART)), panels = x.inputs > PART ? PANELS : x.panels();
    if constexpr (BITS < 4)  // kernels.py gives no others
        for (long p = 0; p < x.panels(); p += panels)
            for (long strip = first; strip < last; strip += fit) {
                const long strips_end = min(strip + fit, last), panels_end = min(p + panels, x.panels());
                strips_of<BITS>(x, w, strips, strip, strips_end, p, panels_end, done);
            }
}

}  // namespace
