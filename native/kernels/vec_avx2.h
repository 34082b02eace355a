// 16-lane vectors as pairs of AVX2 registers.
#pragma once
#include <immintrin.h>

#include <cstdint>

#define PRONK_NS avx2
#define PRONK_KERNELS kernels_avx2
#define PRONK_ISA_NAME "avx2"

namespace pronk::avx2 {

constexpr int kTilePanels = 1, kTile = 4;
constexpr bool kFused = true;  // fma rounds once
constexpr bool kWideSums = false;
constexpr uint8_t kBias8 = 0;

struct F {
    __m256 lo, hi;
};
struct I {
    __m256i lo, hi;
};
struct N {
    __m256i lo, hi;
};  // 16 lanes of two int16 sums each
struct B {
    __m256i lo, hi;
};  // 64 bytes

inline F set(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline F load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, F a) {
    _mm256_storeu_ps(p, a.lo);
    _mm256_storeu_ps(p + 8, a.hi);
}
inline F add(F a, F b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
inline F sub(F a, F b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
inline F mul(F a, F b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
inline F div(F a, F b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
inline F max(F a, F b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
inline F min(F a, F b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
inline F fma(F a, F b, F c) {
    return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
inline F abs(F a) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return {_mm256_andnot_ps(sign, a.lo), _mm256_andnot_ps(sign, a.hi)};
}
inline float hmax(F a) {
    const __m256 m = _mm256_max_ps(a.lo, a.hi);
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(m), _mm256_extractf128_ps(m, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_shuffle_ps(x, x, 1)));
}
inline float hsum(F a) {
    const __m256 s = _mm256_add_ps(a.lo, a.hi);
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_shuffle_ps(x, x, 1)));
}
// Lanes at or past n become x.
inline F keep_first(F a, int n, float x) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256 fill = _mm256_set1_ps(x);
    const __m256i lo = _mm256_cmpgt_epi32(_mm256_set1_epi32(n), lane);
    const __m256i hi = _mm256_cmpgt_epi32(_mm256_set1_epi32(n - 8), lane);
    return {_mm256_blendv_ps(fill, a.lo, _mm256_castsi256_ps(lo)),
            _mm256_blendv_ps(fill, a.hi, _mm256_castsi256_ps(hi))};
}
inline __m128i load_128(const uint16_t* p) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
}
inline __m256i load_256(const void* p) {
    return _mm256_loadu_si256(static_cast<const __m256i*>(p));
}
inline F load_f16(const uint16_t* p) {
    return {_mm256_cvtph_ps(load_128(p)), _mm256_cvtph_ps(load_128(p + 8))};
}
inline __m256 widen_bf16(__m128i h) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}
inline F load_bf16(const uint16_t* p) {
    return {widen_bf16(load_128(p)), widen_bf16(load_128(p + 8))};
}
inline F load_i8(const int8_t* p) {
    const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(x)),
            _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(x, 8)))};
}
inline void load_nibbles(__m128i x, __m256& low, __m256& high) {
    const __m256i wide = _mm256_cvtepu8_epi32(x);
    low = _mm256_cvtepi32_ps(_mm256_and_si256(wide, _mm256_set1_epi32(15)));
    high = _mm256_cvtepi32_ps(_mm256_srli_epi32(wide, 4));
}
// The low and the high nibbles of 16 bytes.
inline void load_nibbles(const uint8_t* p, F& low, F& high) {
    const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    load_nibbles(x, low.lo, high.lo);
    load_nibbles(_mm_srli_si128(x, 8), low.hi, high.hi);
}
inline void store_upper(uint16_t* p, __m256 a, __m256 b) {
    const __m256i x = _mm256_srli_epi32(_mm256_castps_si256(a), 16);
    const __m256i y = _mm256_srli_epi32(_mm256_castps_si256(b), 16);
    // Packing works within 128-bit halves: the permutation puts the quarters back in order.
    const __m256i h = _mm256_permute4x64_epi64(_mm256_packus_epi32(x, y), 0xd8);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), h);
}
// The upper halves of 32 floats: bf16, where the lower ones are zero.
inline void store_upper(uint16_t* p, F a, F b) {
    store_upper(p, a.lo, a.hi);
    store_upper(p + 16, b.lo, b.hi);
}
// 16 pairs of bf16 -> the first and the second of each pair.
inline void load_bf16_pairs(const uint16_t* p, F& first, F& second) {
    const __m256i lo = load_256(p), hi = load_256(p + 16);
    const __m256i upper = _mm256_set1_epi32(int(0xffff0000u));
    first = {_mm256_castsi256_ps(_mm256_slli_epi32(lo, 16)),
             _mm256_castsi256_ps(_mm256_slli_epi32(hi, 16))};
    second = {_mm256_castsi256_ps(_mm256_and_si256(lo, upper)),
              _mm256_castsi256_ps(_mm256_and_si256(hi, upper))};
}
inline I set_i(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
inline I load_i(const uint8_t* p) { return {load_256(p), load_256(p + 32)}; }
inline F as_float(I a) { return {_mm256_castsi256_ps(a.lo), _mm256_castsi256_ps(a.hi)}; }
inline F to_float(I a) { return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)}; }
inline F load_i8(const uint8_t* p) {
    const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return to_float({_mm256_cvtepi8_epi32(x), _mm256_cvtepi8_epi32(_mm_srli_si128(x, 8))});
}
template <int n>
inline I shift_left(I a) {
    return {_mm256_slli_epi32(a.lo, n), _mm256_slli_epi32(a.hi, n)};
}
inline I bits_of(I a, int from, int mask) {
    const __m128i n = _mm_cvtsi32_si128(from);
    const __m256i m = _mm256_set1_epi32(mask);
    return {_mm256_and_si256(_mm256_srl_epi32(a.lo, n), m),
            _mm256_and_si256(_mm256_srl_epi32(a.hi, n), m)};
}
inline I to_int(F a) {  // nearest, ties to even
    return {_mm256_cvtps_epi32(a.lo), _mm256_cvtps_epi32(a.hi)};
}
inline I add(I a, I b) { return {_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)}; }
inline int32_t hsum(I a) {
    const __m256i s = _mm256_add_epi32(a.lo, a.hi);
    __m128i x = _mm_add_epi32(_mm256_castsi256_si128(s), _mm256_extracti128_si256(s, 1));
    x = _mm_add_epi32(x, _mm_shuffle_epi32(x, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(x, _mm_shuffle_epi32(x, 0xb1)));
}
inline void store_i8(int8_t* p, I a) {
    // Packing works within 128-bit halves: the permutation puts the quarters back in order.
    const __m256i h = _mm256_permute4x64_epi64(_mm256_packs_epi32(a.lo, a.hi), 0xd8);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm_packs_epi16(_mm256_castsi256_si128(h), _mm256_extracti128_si256(h, 1)));
}
// 2^n for integral n in [-126, 127].
inline F exp2i(F n) {
    const I e = add(to_int(n), set_i(127));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(e.lo, 23)),
            _mm256_castsi256_ps(_mm256_slli_epi32(e.hi, 23))};
}
inline F scale2(F a, F n) { return mul(a, exp2i(n)); }
inline F round(F a) {
    constexpr int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {_mm256_round_ps(a.lo, nearest), _mm256_round_ps(a.hi, nearest)};
}
inline B load_b(const uint8_t* p) { return {load_256(p), load_256(p + 32)}; }
inline void store_b(uint8_t* p, B b) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), b.lo);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 32), b.hi);
}
inline B low_nibbles(B b) {
    const __m256i mask = _mm256_set1_epi8(15);
    return {_mm256_and_si256(b.lo, mask), _mm256_and_si256(b.hi, mask)};
}
inline B high_nibbles(B b) {
    return low_nibbles({_mm256_srli_epi16(b.lo, 4), _mm256_srli_epi16(b.hi, 4)});
}
inline B flip_signs(B b) {
    const __m256i top = _mm256_set1_epi8(-128);
    return {_mm256_xor_si256(b.lo, top), _mm256_xor_si256(b.hi, top)};
}
template <int shift, int mask>
inline __m256i merge(__m256i w, __m256i bits) {
    const __m256i x =
        shift >= 0 ? _mm256_slli_epi16(bits, shift & 15) : _mm256_srli_epi16(bits, -shift & 15);
    return _mm256_or_si256(w, _mm256_and_si256(x, _mm256_set1_epi8(mask)));
}
// w | (bits moved up by `shift`, or down, and masked): of each byte, no bits of its neighbour's may
// reach the mask.
template <int shift, int mask>
inline B merge(B w, B bits) {
    return {merge<shift, mask>(w.lo, bits.lo), merge<shift, mask>(w.hi, bits.hi)};
}
inline __m256i broadcast(const int8_t* a) {
    int32_t x;
    __builtin_memcpy(&x, a, 4);
    return _mm256_set1_epi32(x);
}
// Sums of nibble products over one group: each half lane is at most 16 products of 15 * 127.
inline N zero_n() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
inline N dot4(N acc, B w, const int8_t* a) {
    const __m256i x = broadcast(a);
    return {_mm256_add_epi16(acc.lo, _mm256_maddubs_epi16(w.lo, x)),
            _mm256_add_epi16(acc.hi, _mm256_maddubs_epi16(w.hi, x))};
}
inline I total(N acc) {
    const __m256i ones = _mm256_set1_epi16(1);
    return {_mm256_madd_epi16(acc.lo, ones), _mm256_madd_epi16(acc.hi, ones)};
}
// |w| * (a with the sign of w): two products are at most 2 * 128 * 127 and fit int16.
inline __m256i dot4_8bit(__m256i acc, __m256i w, __m256i x) {
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
    return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
inline I dot4_8bit(I acc, B w, const int8_t* a) {
    const __m256i x = broadcast(a);
    return {dot4_8bit(acc.lo, w.lo, x), dot4_8bit(acc.hi, w.hi, x)};
}

}  // namespace pronk::avx2
