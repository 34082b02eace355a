// 16-lane vectors as plain arrays: correct anywhere, and what sanitizers see best.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "half.h"

#define PRONK_NS generic
#define PRONK_KERNELS kernels_generic
#define PRONK_ISA_NAME "generic"

namespace pronk::generic {

constexpr int kTilePanels = 1, kTile = 2;
constexpr bool kFused = false;  // fma rounds once
constexpr bool kWideSums = false;
constexpr uint8_t kBias8 = 0;
constexpr int kLanes = 16;

struct F {
    float v[kLanes];
};
struct I {
    int32_t v[kLanes];
};
struct B {
    uint8_t v[4 * kLanes];
};

template <class Fn>
inline F map(Fn fn) {
    F r;
    for (int i = 0; i < kLanes; ++i) r.v[i] = fn(i);
    return r;
}
inline F set(float x) {
    return map([&](int) { return x; });
}
inline F load(const float* p) {
    return map([&](int i) { return p[i]; });
}
inline void store(float* p, F a) { std::memcpy(p, a.v, sizeof a.v); }
inline F add(F a, F b) {
    return map([&](int i) { return a.v[i] + b.v[i]; });
}
inline F sub(F a, F b) {
    return map([&](int i) { return a.v[i] - b.v[i]; });
}
inline F mul(F a, F b) {
    return map([&](int i) { return a.v[i] * b.v[i]; });
}
inline F div(F a, F b) {
    return map([&](int i) { return a.v[i] / b.v[i]; });
}
inline F max(F a, F b) {
    return map([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
inline F min(F a, F b) {
    return map([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
// Two roundings: software fma would be far slower, and no ISA promises another's bits.
inline F fma(F a, F b, F c) {
    return map([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
}
inline F abs(F a) {
    return map([&](int i) { return std::fabs(a.v[i]); });
}
inline float hmax(F a) {
    float m = a.v[0];
    for (int i = 1; i < kLanes; ++i) m = a.v[i] > m ? a.v[i] : m;
    return m;
}
inline float hsum(F a) {
    for (int n = kLanes / 2; n; n /= 2)
        for (int i = 0; i < n; ++i) a.v[i] += a.v[i + n];
    return a.v[0];
}
inline F keep_first(F a, int n, float x) {
    return map([&](int i) { return i < n ? a.v[i] : x; });
}
inline F load_f16(const uint16_t* p) {
    return map([&](int i) { return f16_to_f32(p[i]); });
}
inline F load_bf16(const uint16_t* p) {
    return map([&](int i) { return bf16_to_f32(p[i]); });
}
inline F load_i8(const int8_t* p) {
    return map([&](int i) { return static_cast<float>(p[i]); });
}
// The low and the high nibbles of 16 bytes.
inline void load_nibbles(const uint8_t* p, F& low, F& high) {
    low = map([&](int i) { return static_cast<float>(p[i] & 15); });
    high = map([&](int i) { return static_cast<float>(p[i] >> 4); });
}
// The upper halves of 32 floats: bf16, where the lower ones are zero.
inline void store_upper(uint16_t* p, F a, F b) {
    uint32_t x[2 * kLanes];
    std::memcpy(x, a.v, sizeof a.v);
    std::memcpy(x + kLanes, b.v, sizeof b.v);
    for (int i = 0; i < 2 * kLanes; ++i) p[i] = static_cast<uint16_t>(x[i] >> 16);
}
inline void load_bf16_pairs(const uint16_t* p, F& first, F& second) {
    first = map([&](int i) { return bf16_to_f32(p[2 * i]); });
    second = map([&](int i) { return bf16_to_f32(p[2 * i + 1]); });
}
inline I set_i(int32_t x) {
    I r;
    for (int32_t& e : r.v) e = x;
    return r;
}
inline I load_i(const uint8_t* p) {
    I r;
    std::memcpy(r.v, p, sizeof r.v);
    return r;
}
inline F as_float(I a) {
    F x;
    std::memcpy(x.v, a.v, sizeof x.v);
    return x;
}
inline F to_float(I a) {
    return map([&](int i) { return static_cast<float>(a.v[i]); });
}
inline F load_i8(const uint8_t* p) {
    return map([&](int i) { return static_cast<float>(static_cast<int8_t>(p[i])); });
}
template <int n>
inline I shift_left(I a) {
    for (int32_t& e : a.v) e = static_cast<int32_t>(static_cast<uint32_t>(e) << n);
    return a;
}
inline I bits_of(I a, int from, int mask) {
    for (int32_t& e : a.v) e = static_cast<int32_t>(static_cast<uint32_t>(e) >> from) & mask;
    return a;
}
// Of a NaN or what no int32 holds, the least int32, as x86 has it.
inline int32_t nearest_int(float x) {
    return x >= -0x1p31f && x < 0x1p31f ? static_cast<int32_t>(std::nearbyint(x)) : INT32_MIN;
}
inline int32_t wrapping_add(int32_t a, int32_t b) {
    return static_cast<int32_t>(static_cast<uint32_t>(a) + static_cast<uint32_t>(b));
}
inline I to_int(F a) {
    I r;
    for (int i = 0; i < kLanes; ++i) r.v[i] = nearest_int(a.v[i]);
    return r;
}
inline int32_t hsum(I a) {
    int32_t s = 0;
    for (int32_t e : a.v) s = wrapping_add(s, e);
    return s;
}
inline I add(I a, I b) {
    for (int i = 0; i < kLanes; ++i) a.v[i] = wrapping_add(a.v[i], b.v[i]);
    return a;
}
inline void store_i8(int8_t* p, I a) {
    for (int i = 0; i < kLanes; ++i) p[i] = static_cast<int8_t>(a.v[i]);
}
inline F exp2i(F n) {
    return map([&](int i) {
        return bits_to_float((static_cast<uint32_t>(nearest_int(n.v[i])) + 127u) << 23);
    });
}
inline F scale2(F a, F n) { return mul(a, exp2i(n)); }
inline F round(F a) {
    return map([&](int i) { return std::nearbyint(a.v[i]); });
}
inline B load_b(const uint8_t* p) {
    B b;
    std::memcpy(b.v, p, sizeof b.v);
    return b;
}
inline void store_b(uint8_t* p, B b) { std::memcpy(p, b.v, sizeof b.v); }
inline B low_nibbles(B b) {
    for (uint8_t& e : b.v) e &= 15;
    return b;
}
inline B flip_signs(B b) {
    for (uint8_t& e : b.v) e ^= 128;
    return b;
}
inline B high_nibbles(B b) {
    for (uint8_t& e : b.v) e >>= 4;
    return b;
}
// w | (bits moved up by `shift`, or down, and masked).
template <int shift, int mask>
inline B merge(B w, B bits) {
    for (int i = 0; i < 4 * kLanes; ++i)
        w.v[i] |= (shift >= 0 ? bits.v[i] << (shift & 7) : bits.v[i] >> (-shift & 7)) & mask;
    return w;
}
inline I dot4(I acc, B w, const int8_t* a) {
    for (int i = 0; i < kLanes; ++i)
        for (int j = 0; j < 4; ++j)
            acc.v[i] = wrapping_add(acc.v[i], static_cast<int8_t>(w.v[4 * i + j]) * a[j]);
    return acc;
}
inline I dot4_8bit(I acc, B w, const int8_t* a) { return dot4(acc, w, a); }
using N = I;  // sums of nibble products over one group
inline N zero_n() { return set_i(0); }
inline I total(N acc) { return acc; }

}  // namespace pronk::generic
