// What the units with AMX share: its tiles of 16 rows of 64 bytes, tokens and codes as they read them.

#include <sys/syscall.h>
#include <unistd.h>

#define INLINE __attribute__((always_inline)) inline  // what is called reads its addresses from memory again and again

namespace {

constexpr long TURN = 64;         // inputs of one tile
constexpr long TILE = 16 * TURN;  // bytes

// Linux has to be asked before a process may use tiles, for all of its threads.
bool permitted() {
    constexpr int REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
}

// All tiles of this thread as 16 rows of 64 bytes, until the end of a scope.
struct Unit {
    Unit() {
        struct { uint8_t palette = 1, start = 0, none[14] = {}; uint16_t bytes[16] = {}; uint8_t rows[16] = {}; } shape;
        for (int t = 0; t < 8; ++t) shape.bytes[t] = 64, shape.rows[t] = 16;
        _tile_loadconfig(&shape);
    }
    ~Unit() { _tile_release(); }
};

// Sixteen inputs of a panel's token `r`, from input `k` of the tokens' group at `values` on.
inline void place(int8_t* values, long r, long k, __m128i sixteen) {
    _mm_store_si128(reinterpret_cast<__m128i*>(values + k / TURN * PANEL * TURN + r * TURN + k % TURN), sixteen);
}

// Sixteen outputs' words of codes, taken apart: a shift by a different number of bits for each byte brings four codes
// of an output into its lane. Bits above a code are others'.
template <int BITS> struct Words {
    static constexpr long CODES = 32 / BITS;
    __m512i shifts[CODES / 4];

    Words() {
        alignas(64) uint8_t bytes[64];
        for (int q = 0; q < CODES / 4; ++q) {
            for (int i = 0; i < 64; ++i) bytes[i] = static_cast<uint8_t>((i & 4) * 8 + (4 * q + (i & 3)) * BITS);
            shifts[q] = _mm512_load_si512(bytes);
        }
    }

    __m512i four(__m512i words, long q) const { return _mm512_multishift_epi64_epi8(shifts[q], words); }
};

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

}  // namespace
