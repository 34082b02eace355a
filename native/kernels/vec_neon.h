// 16-lane vectors as four NEON registers, with the dot-product instructions of ARMv8.2.
#pragma once
#include <arm_neon.h>

#include <cstdint>
#include <cstring>

#define PRONK_NS neon
#define PRONK_KERNELS kernels_neon
#define PRONK_ISA_NAME "neon"

namespace pronk::neon {

constexpr int kTilePanels = 1, kTile = 4;
constexpr bool kFused = true;  // fma rounds once
constexpr bool kWideSums = false;
constexpr uint8_t kBias8 = 0;

struct F {
    float32x4_t v[4];
};
struct I {
    int32x4_t v[4];
};
struct B {
    uint8x16_t v[4];
};  // 64 bytes

template <class R, class Fn>
inline R each(Fn fn) {
    return {{fn(0), fn(1), fn(2), fn(3)}};
}
inline F set(float x) {
    return each<F>([&](int) { return vdupq_n_f32(x); });
}
inline F load(const float* p) {
    return each<F>([&](int i) { return vld1q_f32(p + 4 * i); });
}
inline void store(float* p, F a) {
    for (int i = 0; i < 4; ++i) vst1q_f32(p + 4 * i, a.v[i]);
}
inline F add(F a, F b) {
    return each<F>([&](int i) { return vaddq_f32(a.v[i], b.v[i]); });
}
inline F sub(F a, F b) {
    return each<F>([&](int i) { return vsubq_f32(a.v[i], b.v[i]); });
}
inline F mul(F a, F b) {
    return each<F>([&](int i) { return vmulq_f32(a.v[i], b.v[i]); });
}
inline F div(F a, F b) {
    return each<F>([&](int i) { return vdivq_f32(a.v[i], b.v[i]); });
}
inline F max(F a, F b) {
    return each<F>([&](int i) { return vmaxq_f32(a.v[i], b.v[i]); });
}
inline F min(F a, F b) {
    return each<F>([&](int i) { return vminq_f32(a.v[i], b.v[i]); });
}
inline F fma(F a, F b, F c) {
    return each<F>([&](int i) { return vfmaq_f32(c.v[i], a.v[i], b.v[i]); });
}
inline F abs(F a) {
    return each<F>([&](int i) { return vabsq_f32(a.v[i]); });
}
inline float hmax(F a) {
    return vmaxvq_f32(vmaxq_f32(vmaxq_f32(a.v[0], a.v[1]), vmaxq_f32(a.v[2], a.v[3])));
}
inline float hsum(F a) {
    return vaddvq_f32(vaddq_f32(vaddq_f32(a.v[0], a.v[1]), vaddq_f32(a.v[2], a.v[3])));
}
// Lanes at or past n become x.
inline F keep_first(F a, int n, float x) {
    const int32_t first[4] = {0, 1, 2, 3};
    const int32x4_t lane = vld1q_s32(first);
    return each<F>([&](int i) {
        return vbslq_f32(vcltq_s32(lane, vdupq_n_s32(n - 4 * i)), a.v[i], vdupq_n_f32(x));
    });
}
inline F load_f16(const uint16_t* p) {
    return each<F>([&](int i) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + 4 * i))); });
}
inline F load_bf16(const uint16_t* p) {
    return each<F>(
        [&](int i) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p + 4 * i), 16)); });
}
inline F load_i8(const int8_t* p) {
    return each<F>([&](int i) {
        const float x[4] = {float(p[4 * i]), float(p[4 * i + 1]), float(p[4 * i + 2]),
                            float(p[4 * i + 3])};
        return vld1q_f32(x);
    });
}
// 16 pairs of bf16 -> the first and the second of each pair.
inline void load_bf16_pairs(const uint16_t* p, F& first, F& second) {
    for (int i = 0; i < 4; ++i) {
        const uint32x4_t x = vreinterpretq_u32_u16(vld1q_u16(p + 8 * i));
        first.v[i] = vreinterpretq_f32_u32(vshlq_n_u32(x, 16));
        second.v[i] = vreinterpretq_f32_u32(vandq_u32(x, vdupq_n_u32(0xffff0000u)));
    }
}
inline I set_i(int32_t x) {
    return each<I>([&](int) { return vdupq_n_s32(x); });
}
inline I load_i(const uint8_t* p) {
    return each<I>([&](int i) { return vreinterpretq_s32_u8(vld1q_u8(p + 16 * i)); });
}
inline F as_float(I a) {
    return each<F>([&](int i) { return vreinterpretq_f32_s32(a.v[i]); });
}
inline F to_float(I a) {
    return each<F>([&](int i) { return vcvtq_f32_s32(a.v[i]); });
}
inline F load_i8(const uint8_t* p) {
    const int8x16_t x = vld1q_s8(reinterpret_cast<const int8_t*>(p));
    const int16x8_t lo = vmovl_s8(vget_low_s8(x)), hi = vmovl_s8(vget_high_s8(x));
    return to_float({{vmovl_s16(vget_low_s16(lo)), vmovl_s16(vget_high_s16(lo)),
                      vmovl_s16(vget_low_s16(hi)), vmovl_s16(vget_high_s16(hi))}});
}
// The low and the high nibbles of 16 bytes.
inline void load_nibbles(const uint8_t* p, F& low, F& high) {
    const uint8x16_t x = vld1q_u8(p);
    const auto widen = [](uint8x16_t b) {
        const uint16x8_t lo = vmovl_u8(vget_low_u8(b)), hi = vmovl_u8(vget_high_u8(b));
        const uint32x4_t v[] = {vmovl_u16(vget_low_u16(lo)), vmovl_u16(vget_high_u16(lo)),
                                vmovl_u16(vget_low_u16(hi)), vmovl_u16(vget_high_u16(hi))};
        return each<F>([&](int i) { return vcvtq_f32_u32(v[i]); });
    };
    low = widen(vandq_u8(x, vdupq_n_u8(15)));
    high = widen(vshrq_n_u8(x, 4));
}
// The upper halves of 32 floats: bf16, where the lower ones are zero.
inline void store_upper(uint16_t* p, F a, F b) {
    const auto half = [](float32x4_t x) { return vshrn_n_u32(vreinterpretq_u32_f32(x), 16); };
    for (int i = 0; i < 4; ++i) {
        vst1_u16(p + 4 * i, half(a.v[i]));
        vst1_u16(p + 16 + 4 * i, half(b.v[i]));
    }
}
template <int n>
inline I shift_left(I a) {
    return each<I>([&](int i) { return vshlq_n_s32(a.v[i], n); });
}
inline I bits_of(I a, int from, int mask) {
    return each<I>([&](int i) {
        const uint32x4_t x = vshlq_u32(vreinterpretq_u32_s32(a.v[i]), vdupq_n_s32(-from));
        return vreinterpretq_s32_u32(vandq_u32(x, vdupq_n_u32(static_cast<uint32_t>(mask))));
    });
}
inline I to_int(F a) {  // nearest, ties to even
    return each<I>([&](int i) { return vcvtnq_s32_f32(a.v[i]); });
}
inline I add(I a, I b) {
    return each<I>([&](int i) { return vaddq_s32(a.v[i], b.v[i]); });
}
inline int32_t hsum(I a) {
    return vaddvq_s32(vaddq_s32(vaddq_s32(a.v[0], a.v[1]), vaddq_s32(a.v[2], a.v[3])));
}
inline void store_i8(int8_t* p, I a) {
    const int16x8_t lo = vcombine_s16(vmovn_s32(a.v[0]), vmovn_s32(a.v[1]));
    const int16x8_t hi = vcombine_s16(vmovn_s32(a.v[2]), vmovn_s32(a.v[3]));
    vst1q_s8(p, vcombine_s8(vmovn_s16(lo), vmovn_s16(hi)));
}
// 2^n for integral n in [-126, 127].
inline F exp2i(F n) {
    const I e = add(to_int(n), set_i(127));
    return each<F>([&](int i) { return vreinterpretq_f32_s32(vshlq_n_s32(e.v[i], 23)); });
}
inline F scale2(F a, F n) { return mul(a, exp2i(n)); }
inline F round(F a) {
    return each<F>([&](int i) { return vrndnq_f32(a.v[i]); });
}
inline B load_b(const uint8_t* p) {
    return each<B>([&](int i) { return vld1q_u8(p + 16 * i); });
}
inline void store_b(uint8_t* p, B b) {
    for (int i = 0; i < 4; ++i) vst1q_u8(p + 16 * i, b.v[i]);
}
inline B low_nibbles(B b) {
    return each<B>([&](int i) { return vandq_u8(b.v[i], vdupq_n_u8(15)); });
}
inline B high_nibbles(B b) {
    return each<B>([&](int i) { return vshrq_n_u8(b.v[i], 4); });
}
inline B flip_signs(B b) {
    return each<B>([&](int i) { return veorq_u8(b.v[i], vdupq_n_u8(128)); });
}
// w | (bits moved up by `shift`, or down, and masked).
template <int shift, int mask>
inline B merge(B w, B bits) {
    return each<B>([&](int i) {
        const uint8x16_t x = vshlq_u8(bits.v[i], vdupq_n_s8(shift));
        return vorrq_u8(w.v[i], vandq_u8(x, vdupq_n_u8(mask)));
    });
}
// acc[lane] += sum over j of w[4 lane + j] * a[j], both signed.
inline I dot4_8bit(I acc, B w, const int8_t* a) {
    int32_t x;
    std::memcpy(&x, a, 4);
    const int8x16_t xs = vreinterpretq_s8_s32(vdupq_n_s32(x));
    return each<I>([&](int i) { return vdotq_s32(acc.v[i], vreinterpretq_s8_u8(w.v[i]), xs); });
}
using N = I;  // sums of nibble products over one group
inline N zero_n() { return set_i(0); }
inline N dot4(N acc, B w, const int8_t* a) { return dot4_8bit(acc, w, a); }
inline I total(N acc) { return acc; }

}  // namespace pronk::neon
