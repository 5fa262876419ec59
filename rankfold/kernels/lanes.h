// 32 stored numbers at a time, as float32 in vector registers: AVX-512, AVX2, or what the compiler makes of it.
//
// `expand32` spreads the next values over the lanes whose mask bits are set, `load32` takes 32 in a row. Both read a
// whole register, past the last value that they use: the caller sees to it that the memory is there.

#pragma once

#include <cstdint>
#include <cstring>
#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif
constexpr int STEP = 32, PARTS = STEP / LANES;
using V = float __attribute__((vector_size(LANES * 4)));
using Bits = uint32_t __attribute__((vector_size(LANES * 4)));
struct bf16 { uint16_t bits; };

inline V load(const float* p) { V v; std::memcpy(&v, p, sizeof v); return v; }
inline void store(float* p, V v) { std::memcpy(p, &v, sizeof v); }
inline float sum(V v) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)v);
#else
    return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
#endif
}
inline float widen(float x) { return x; }
inline float widen(bf16 x) { uint32_t b = uint32_t(x.bits) << 16; float f; std::memcpy(&f, &b, 4); return f; }
inline void narrow(float x, float& y) { y = x; }
inline void narrow(float x, bf16& y) {  // to nearest, ties to even; NaN stays NaN
    uint32_t b; std::memcpy(&b, &x, 4);
    y.bits = x != x ? 0x7FC0 : uint16_t((b + 0x7FFF + (b >> 16 & 1)) >> 16);
}

// --- 32 stored values, or those of them whose bits are set, as float32 in PARTS vectors ---------------------------

// With 16-bit expansion, 32 bfloat16 come as one register: its even places, then its odd ones.
template <class T> constexpr bool TURNED = false;
#if defined(__AVX512VBMI2__) && defined(__AVX512BW__)
template <> constexpr bool TURNED<bf16> = true;
#endif
template <class T> inline int64_t lane(int64_t place) {  // where the inputs of a place lie in a scratch row
    return TURNED<T> ? (place & ~31) | (place >> 1 & 15) | (place & 1) << 4 : place;
}

// Expanding straight from memory is many times slower than from a register on some processors: keep the load apart.
#define APART(v) asm("" : "+v"(v))

#if defined(__AVX512F__)
inline __m512 wide(const float* p) { return _mm512_loadu_ps(p); }
inline __m512 wide(const bf16* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
template <class T> inline V expand(uint32_t mask, const T* p) {
    __m512 v = wide(p);
    APART(v);
    return (V)_mm512_maskz_expand_ps(__mmask16(mask), v);
}
#elif defined(__AVX2__)
struct Table {
    uint64_t order[256] = {};
    constexpr Table() {
        for (int m = 0; m < 256; ++m)
            for (int i = 0, n = 0; i < 8; ++i)
                if (m >> i & 1) order[m] |= uint64_t(n++) << 8 * i;
    }
};
constexpr Table TABLE;
inline __m256 wide(const float* p) { return _mm256_loadu_ps(p); }
inline __m256 wide(const bf16* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
template <class T> inline V expand(uint32_t mask, const T* p) {
    const __m256i place = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    __m256i order = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)&TABLE.order[mask & 255]));
    __m256i taken = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(int(mask)), place), place);
    return (V)_mm256_and_ps(_mm256_permutevar8x32_ps(wide(p), order), _mm256_castsi256_ps(taken));
}
#else
template <class T> inline V wide(const T* p) { V v; for (int i = 0; i < LANES; ++i) v[i] = widen(p[i]); return v; }
template <class T> inline V expand(uint32_t mask, const T* p) {
    V v = {};
    for (int i = 0; i < LANES; ++i) if (mask >> i & 1) v[i] = widen(*p++);
    return v;
}
#endif

template <class T> inline void expand32(uint32_t mask, const T*& p, V* out) {
#if defined(__AVX512VBMI2__) && defined(__AVX512BW__)
    if constexpr (TURNED<T>) {
        __m512i packed = _mm512_loadu_si512(p);
        APART(packed);
        Bits v = (Bits)_mm512_maskz_expand_epi16(mask, packed);
        out[0] = (V)(v << 16), out[1] = (V)(v & 0xFFFF0000u);
        p += __builtin_popcount(mask);
        return;
    }
#endif
    for (int i = 0; i < PARTS; ++i, mask = LANES < 32 ? mask >> LANES : 0) {
        out[i] = expand(mask, p);
        p += __builtin_popcount(mask & ((1u << LANES) - 1));
    }
}
template <class T> inline void load32(const T* p, V* out) {
    if constexpr (TURNED<T>) {
        Bits v; std::memcpy(&v, p, sizeof v);
        out[0] = (V)(v << 16), out[1] = (V)(v & 0xFFFF0000u);
    } else {
        for (int i = 0; i < PARTS; ++i) out[i] = (V)wide(p + i * LANES);
    }
}

}  // namespace
