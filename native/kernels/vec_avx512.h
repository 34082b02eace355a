// 16-lane vectors on AVX-512 with VNNI; another build multiplies pairs of bf16 besides, and one
// with AMX has tiles too.
#pragma once
#include <immintrin.h>

#include <cstdint>

#if defined(PRONK_AMX)
#define PRONK_NS amx
#define PRONK_KERNELS kernels_amx
#define PRONK_ISA_NAME "amx"
#elif defined(PRONK_BF16)
#define PRONK_NS avx512_bf16
#define PRONK_KERNELS kernels_avx512_bf16
#define PRONK_ISA_NAME "avx512_bf16"
#else
#define PRONK_NS avx512
#define PRONK_KERNELS kernels_avx512
#define PRONK_ISA_NAME "avx512"
#endif

namespace pronk::PRONK_NS {

constexpr int kTilePanels = 2, kTile = 4;
constexpr bool kFused = true;     // fma rounds once
constexpr bool kWideSums = true;  // registers for 16 sums of attention and what they add
constexpr uint8_t kBias8 = 128;

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
inline F load_i8(const int8_t* p) {
    const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(x))};
}
// The low and the high nibbles of 16 bytes.
inline void load_nibbles(const uint8_t* p, F& low, F& high) {
    const __m512i x = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    low.v = _mm512_cvtepi32_ps(_mm512_and_si512(x, _mm512_set1_epi32(15)));
    high.v = _mm512_cvtepi32_ps(_mm512_srli_epi32(x, 4));
}
// The upper halves of 32 floats: bf16, where the lower ones are zero.
inline void store_upper(uint16_t* p, F a, F b) {
    const __m512i x = _mm512_castps_si512(a.v), y = _mm512_castps_si512(b.v);
    const __m512i order =
        _mm512_set_epi16(63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33, 31, 29, 27,
                         25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
    _mm512_storeu_si512(p, _mm512_permutex2var_epi16(x, order, y));
}
// 16 pairs of bf16 -> the first and the second of each pair.
inline void load_bf16_pairs(const uint16_t* p, F& first, F& second) {
    const __m512i x = _mm512_loadu_si512(p);
    first.v = _mm512_castsi512_ps(_mm512_slli_epi32(x, 16));
    second.v = _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(int(0xffff0000u))));
}
inline I set_i(int32_t x) { return {_mm512_set1_epi32(x)}; }
inline I load_i(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
inline F as_float(I a) { return {_mm512_castsi512_ps(a.v)}; }
inline F to_float(I a) { return {_mm512_cvtepi32_ps(a.v)}; }
inline F load_i8(const uint8_t* p) {
    return to_float({_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))});
}
template <int n>
inline I shift_left(I a) {
    return {_mm512_slli_epi32(a.v, n)};
}
inline I bits_of(I a, int from, int mask) {
    const __m512i x = _mm512_srl_epi32(a.v, _mm_cvtsi32_si128(from));
    return {_mm512_and_si512(x, _mm512_set1_epi32(mask))};
}
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
inline F scale2(F a, F n) { return {_mm512_scalef_ps(a.v, n.v)}; }  // a * 2^n, integral n
inline F round(F a) { return {_mm512_roundscale_ps(a.v, 0)}; }
inline B load_b(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
inline void store_b(uint8_t* p, B b) { _mm512_storeu_si512(p, b.v); }
inline B low_nibbles(B b) { return {_mm512_and_si512(b.v, _mm512_set1_epi8(15))}; }
inline B high_nibbles(B b) {
    return {_mm512_and_si512(_mm512_srli_epi16(b.v, 4), _mm512_set1_epi8(15))};
}
inline B flip_signs(B b) { return {_mm512_xor_si512(b.v, _mm512_set1_epi8(-128))}; }
// acc[lane] += sum over j of w[4 lane + j] * a[j]; w unsigned (int8 weights carry kBias8).
inline I dot4(I acc, B w, const int8_t* a) {
    int32_t x;
    __builtin_memcpy(&x, a, 4);
    return {_mm512_dpbusd_epi32(acc.v, w.v, _mm512_set1_epi32(x))};
}
inline I dot4_8bit(I acc, B w, const int8_t* a) { return dot4(acc, w, a); }
// w | (bits moved up by `shift`, or down, and masked): of each byte, no bits of its neighbour's may
// reach the mask.
template <int shift, int mask>
inline B merge(B w, B bits) {
    const __m512i x =
        shift >= 0 ? _mm512_slli_epi16(bits.v, shift & 15) : _mm512_srli_epi16(bits.v, -shift & 15);
    return {_mm512_ternarylogic_epi32(w.v, x, _mm512_set1_epi8(mask), 0xf8)};
}
using N = I;  // sums of nibble products over one group
inline N zero_n() { return set_i(0); }
inline I total(N acc) { return acc; }
#if defined(PRONK_BF16)
struct P {
    __m512bh v;
};  // 16 pairs of bf16
inline P load_pair(const uint16_t* p) { return {(__m512bh)_mm512_loadu_si512(p)}; }
// One pair in all lanes.
inline P set_pair(const uint16_t* p) {
    int32_t x;
    __builtin_memcpy(&x, p, 4);
    return {(__m512bh)_mm512_set1_epi32(x)};
}
inline P first_of(P x) {
    return {(__m512bh)_mm512_and_si512((__m512i)x.v, _mm512_set1_epi32(0xffff))};
}
// acc[lane] += x[2 lane] * y[2 lane] + x[2 lane + 1] * y[2 lane + 1]; denormals count as zeros.
inline F dot2(F acc, P x, P y) { return {_mm512_dpbf16_ps(acc.v, x.v, y.v)}; }
// Floats to bf16 (nearest, ties to even), stored; 32 are returned too.
inline void store_bf16(uint16_t* p, F a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(a.v));
}
inline P store_bf16(uint16_t* p, F a, F b) {
    const P h{_mm512_cvtne2ps_pbh(b.v, a.v)};
    _mm512_storeu_si512(p, (__m512i)h.v);
    return h;
}
// acc[lane] += x[2 lane] + x[2 lane + 1]
inline F add_pairs(F acc, P x) { return dot2(acc, x, {(__m512bh)_mm512_set1_epi16(0x3f80)}); }
#endif

}  // namespace pronk::PRONK_NS
