// One group of a packed panel into vectors: quants as bytes, scales as floats (formats.h).
#pragma once
#include <utility>

#include "kernels.h"
#include "vec.h"

namespace pronk::PRONK_NS {

// fn<0>(), fn<1>(), ... fn<n - 1>(): what is indexed so stays in registers.
template <int n, class Fn>
[[gnu::always_inline]] inline void unrolled(Fn fn) {
    [&]<int... i>(std::integer_sequence<int, i...>) __attribute__((always_inline)) {
        (fn.template operator()<i>(), ...);
    }(std::make_integer_sequence<int, n>());
}

// How far unpacked quants lie above the values: 8 bits are as the ISA wants them.
template <Format fmt>
constexpr int kOffset = traits(fmt).bits == 8 ? kBias8 : traits(fmt).offset;

// The stored quants of k = 4i..4i+3 and of k = 16+4i..16+4i+3; `plane` has the lower plane's.
template <Format fmt, int i>
inline void unpack_quants(const uint8_t* quants, const uint8_t* plane, B& low, B& high) {
    if constexpr (fmt == Format::q8_planes) {
        const B above = load_b(quants + 64 * i), below = load_b(plane + 64 * i);
        low = merge<4, 240>(low_nibbles(below), above);
        high = merge<0, 240>(high_nibbles(below), above);
        if constexpr (kBias8 == 0) low = flip_signs(low), high = flip_signs(high);
    } else if constexpr (traits(fmt).bits == 8) {
        low = load_b(quants + 64 * i);
        high = load_b(quants + 64 * (i + 4));
    } else {
        const B nibbles = load_b(quants + 64 * i);
        low = low_nibbles(nibbles), high = high_nibbles(nibbles);
        if constexpr (traits(fmt).bits == 5) {
            const B bits = load_b(quants + 256);
            low = merge<4 - i, 16>(low, bits), high = merge<-i, 16>(high, bits);
        }
        if constexpr (traits(fmt).bits == 6) {
            low = merge<4 - 2 * i, 48>(low, load_b(quants + 256));
            high = merge<4 - 2 * i, 48>(high, load_b(quants + 320));
        }
    }
}

// The scales of group g of a panel, one or two halves of it, and its minimum; `scales` are its
// lot's.
template <Format fmt>
inline void unpack_scales(const uint8_t* scales, int64_t g, F* d, F& minimum) {
    g %= lot_groups(fmt);
    constexpr Traits t = traits(fmt);
    const auto half = [](const uint8_t* p) {
        return load_f16(reinterpret_cast<const uint16_t*>(p));
    };
    if constexpr (!t.two_level) {
        const uint8_t* at = scales + g * (t.minimum ? 64 : 32);
        d[0] = half(at);
        if constexpr (t.minimum) minimum = half(at + 32);
        return;
    }
    const uint8_t* super = scales + g / kSuper * super_bytes(fmt);
    const int i = static_cast<int>(g % kSuper);
    if constexpr (fmt == Format::q6_k) {
        for (int h = 0; h < 2; ++h)
            d[h] = mul(half(super), load_i8(super + 32 + (2 * i + h) * kPanel));
    } else {
        const auto word = [&](int w) { return load_i(super + 64 + 64 * w); };
        const auto factor = [&](int v) { return to_float(bits_of(word(v / 5), 6 * (v % 5), 63)); };
        d[0] = mul(half(super), factor(i));
        F m;
        if (i < kSuper - 1)
            m = factor(kSuper + i);
        else
            m = to_float(add(add(bits_of(word(0), 30, 3), shift_left<2>(bits_of(word(1), 30, 3))),
                             shift_left<4>(bits_of(word(2), 30, 3))));
        minimum = sub(set(0.0f), mul(half(super + 32), m));
    }
}

}  // namespace pronk::PRONK_NS
