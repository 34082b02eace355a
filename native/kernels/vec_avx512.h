// 16-lane vectors on AVX-512 with VNNI; an AMX build has the same, and tiles besides.
#pragma once
#include <immintrin.h>

#include <cstdint>

#if defined(PRONK_AMX)
#define PRONK_NS amx
#define PRONK_KERNELS kernels_amx
#define PRONK_ISA_NAME "amx"
#else
#define PRONK_NS avx512
#define PRONK_KERNELS kernels_avx512
#define PRONK_ISA_NAME "avx512"
#endif

namespace pronk::PRONK_NS {

constexpr int kTilePanels = 2, kTile = 4;
constexpr uint8_t kBias8 = 128;
// Integer sums start at the bits of 1.5 * 2^23: such a sum, below 2^22 in size, read as a float is
// 1.5 * 2^23 + sum, so that times() needs no conversion. It still rounds d * sum once, for
// 1.5 * 2^23 * d is exact where d comes from 11 bits.
constexpr int32_t kBase = 0x4b400000;

struct F {
    __m512 v;
};
struct I {
    __m512i v;
};
struct B {
    __m512i v;
};  // 64 bytes

inline F set(float x) { return {_mm512_set1_ps(x)}; }
inline F load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void store(float* p, F a) { _mm512_storeu_ps(p, a.v); }
inline F add(F a, F b) { return {_mm512_add_ps(a.v, b.v)}; }
inline F sub(F a, F b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline F mul(F a, F b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline F div(F a, F b) { return {_mm512_div_ps(a.v, b.v)}; }
inline F max(F a, F b) { return {_mm512_max_ps(a.v, b.v)}; }
inline F min(F a, F b) { return {_mm512_min_ps(a.v, b.v)}; }
inline F fma(F a, F b, F c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline F abs(F a) { return {_mm512_abs_ps(a.v)}; }
inline float hmax(F a) { return _mm512_reduce_max_ps(a.v); }
inline float hsum(F a) { return _mm512_reduce_add_ps(a.v); }
// Lanes at or past n become x.
inline F keep_first(F a, int n, float x) {
    const __mmask16 m = n >= 16 ? 0xffff : static_cast<__mmask16>((1u << n) - 1);
    return {_mm512_mask_blend_ps(m, _mm512_set1_ps(x), a.v)};
}
inline F load_f16(const uint16_t* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
inline F load_bf16(const uint16_t* p) {
    const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))};
}
// 16 pairs of bf16 -> the first and the second of each pair.
inline void load_bf16_pairs(const uint16_t* p, F& first, F& second) {
    const __m512i x = _mm512_loadu_si512(p);
    first.v = _mm512_castsi512_ps(_mm512_slli_epi32(x, 16));
    second.v = _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(int(0xffff0000u))));
}
inline I set_i(int32_t x) { return {_mm512_set1_epi32(x)}; }
inline F times(I sum, F d) { return fma({_mm512_castsi512_ps(sum.v)}, d, mul(d, set(-0x1.8p23f))); }
inline I to_int(F a) { return {_mm512_cvtps_epi32(a.v)}; }  // nearest, ties to even
inline int32_t hsum(I a) { return _mm512_reduce_add_epi32(a.v); }
inline I add(I a, I b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline void store_i8(int8_t* p, I a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a.v));
}
// 2^n for integral n in [-126, 127].
inline F exp2i(F n) {
    const __m512i e = _mm512_add_epi32(_mm512_cvtps_epi32(n.v), _mm512_set1_epi32(127));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(e, 23))};
}
inline F round(F a) { return {_mm512_roundscale_ps(a.v, 0)}; }
inline B load_b(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
inline B low_nibbles(B b) { return {_mm512_and_si512(b.v, _mm512_set1_epi8(15))}; }
inline B high_nibbles(B b) {
    return {_mm512_and_si512(_mm512_srli_epi16(b.v, 4), _mm512_set1_epi8(15))};
}
// acc[lane] += sum over j of w[4 lane + j] * a[j]; w unsigned (int8 weights carry kBias8).
inline I dot4(I acc, B w, const int8_t* a) {
    int32_t x;
    __builtin_memcpy(&x, a, 4);
    return {_mm512_dpbusd_epi32(acc.v, w.v, _mm512_set1_epi32(x))};
}
inline I dot4_8bit(I acc, B w, const int8_t* a) { return dot4(acc, w, a); }
// Sums of nibble products over one group, from kBase + x.
using N = I;
inline N start(int32_t x) { return set_i(kBase + x); }
inline I total(N acc) { return acc; }

}  // namespace pronk::PRONK_NS
