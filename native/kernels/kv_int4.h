// An int4 KV cache: rows are rotated, quantized in groups, and expanded to bf16 to be read.
//
// An outlier of a row would take the steps of its whole group: the rotation spreads it over many
// elements (QuaRot, arXiv:2404.00456). It is orthonormal, so that a rotated query has the scores
// with rotated keys that it has with keys, and what rotated values sum to is rotated back once.
//
// A byte holds two elements of one position, so that threads may store neighbouring positions:
// keys lie [d / 4][position][2], with d + 2 and d + 3 above d and d + 1, and values
// [position / 2][d / 16][8][position % 2], with d + 8 above d. Each half expands to the order of
// bf16. Behind them lie bf16 scales: [group][position].
#pragma once
#include <cmath>
#include <cstring>

#include "half.h"
#include "kv.h"
#include "kv_int8.h"

namespace pronk::PRONK_NS {

// Signs of the Hadamard matrix of 16 rows: (-1)^(number of bits that i and j share).
struct Hadamard16 {
    alignas(64) float row[16][16];
    constexpr Hadamard16() : row() {
        for (int i = 0; i < 16; ++i)
            for (int j = 0; j < 16; ++j) {
                const int both = i & j;
                row[i][j] = (both ^ both >> 1 ^ both >> 2 ^ both >> 3) & 1 ? -1.0f : 1.0f;
            }
    }
};
inline constexpr Hadamard16 kHadamard;

// The Hadamard transform of each `n` of `dim` elements, n the largest power of two that divides
// dim (16 or more). It is orthonormal, and its own inverse.
inline void hadamard(float* x, int64_t dim) {
    const int64_t n = dim & -dim;
    for (int64_t half = 16; half < n; half *= 2)
        for (int64_t d = 0; d < dim; d += 16) {
            if (d & half) continue;
            const F a = load(x + d), b = load(x + d + half);
            store(x + d, add(a, b));
            store(x + d + half, sub(a, b));
        }
    const F unit = set(1.0f / std::sqrt(static_cast<float>(n)));
    for (int64_t d = 0; d < dim; d += 16) {
        F sum = set(0.0f);
        for (int j = 0; j < 16; ++j) sum = fma(set(x[d + j]), load(kHadamard.row[j]), sum);
        store(x + d, mul(sum, unit));
    }
}

// A scale of 5 significant bits, the nearest; a NaN stays a NaN. Times a whole number of up to 3
// bits, or 8, it is a bf16: expanding rounds nothing.
inline uint16_t short_scale(float scale) {
    uint32_t x;
    std::memcpy(&x, &scale, 4);
    if (std::isnan(scale)) return 0x7fc0;
    return static_cast<uint16_t>((x + 0x3ffff + (x >> 19 & 1)) >> 19 << 3);
}

// What int4 keeps of a group: x is about scale * (q - 8). An infinity or a NaN makes the scale NaN.
inline uint16_t quantize_nibbles(const float* x, int64_t group, int8_t* q) {
    F top = load(x), bottom = top, odd = set(0.0f);
    for (int64_t d = 0; d < group; d += 16) {
        const F v = load(x + d);
        top = max(top, v);
        bottom = min(bottom, v);
        odd = fma(v, set(0.0f), odd);
    }
    // The largest gets the ninth step, which one sign has and the other has not.
    const float most = hmax(top), least = -hmax(sub(set(0.0f), bottom));
    const uint16_t kept = short_scale((most > -least ? most : least) / -8.0f + hsum(odd));
    const float scale = bf16_to_f32(kept);
    const F inverse = set(std::fabs(scale) > 1e-30f ? 1.0f / scale : 0.0f);
    for (int64_t d = 0; d < group; d += 16) {
        const F steps = fma(load(x + d), inverse, set(8.0f));
        store_i8(q + d, to_int(min(set(15.0f), max(set(0.0f), steps))));
    }
    return kept;
}

inline void quantize_rotated(const float* x, int64_t dim, bool rotate, int8_t* q,
                             uint16_t* scales) {
    float turned[kMaxHeadDim];
    std::memcpy(turned, x, static_cast<size_t>(dim) * sizeof(float));
    if (rotate) hadamard(turned, dim);
    const int64_t group = kv_group(dim);
    for (int64_t d = 0; d < dim; d += group, scales += kBlock)
        *scales = quantize_nibbles(turned + d, group, q + d);
}

template <bool rotate>
inline void store_int4(const float* k, const float* v, int64_t dim, int64_t slot, uint8_t* keys,
                       uint8_t* values) {
    int8_t q[kMaxHeadDim];
    const auto pair = [&](int64_t d, int64_t above) {
        return static_cast<uint8_t>(q[d] | q[d + above] << 4);
    };
    const int64_t quants = kBlock * dim / 2;
    quantize_rotated(k, dim, rotate, q, reinterpret_cast<uint16_t*>(keys + quants) + slot);
    for (int64_t d = 0; d < dim; d += 4) {
        uint8_t* out = keys + d / 4 * 2 * kBlock + 2 * slot;
        out[0] = pair(d, 2), out[1] = pair(d + 1, 2);
    }
    quantize_rotated(v, dim, rotate, q, reinterpret_cast<uint16_t*>(values + quants) + slot);
    uint8_t* out = values + slot / 2 * dim + slot % 2;
    for (int64_t d = 0; d < dim; d += 16, out += 16)
        for (int i = 0; i < 8; ++i) out[2 * i] = pair(d + i, 8);
}

// 32 bytes to bf16: the low nibbles and the high ones, less 8, times the scales of the first 16 and
// of the others.
inline void expand_nibbles(const uint8_t* q, F s0, F s1, uint16_t* low, uint16_t* high) {
    const F zero0 = mul(s0, set(-8.0f)), zero1 = mul(s1, set(-8.0f));
    F a, b, c, e;
    load_nibbles(q, a, b);
    load_nibbles(q + 16, c, e);
    store_upper(low, fma(a, s0, zero0), fma(c, s1, zero1));
    store_upper(high, fma(b, s0, zero0), fma(e, s1, zero1));
}

// The keys and the values of a head in a block, from int4 to bf16.
inline void expand_int4(const uint8_t* keys, const uint8_t* values, int64_t dim, uint16_t* out,
                        uint16_t* values_out) {
    const int64_t group = kv_group(dim), quants = kBlock * dim / 2;
    const uint8_t* q = keys;
    const uint16_t* scales = reinterpret_cast<const uint16_t*>(keys + quants);
    for (int64_t d = 0; d < dim; d += group, scales += kBlock) {
        float twice[2 * kBlock];  // of pairs, which are elements of one position
        for (int i = 0; i < 2 * kBlock; ++i) twice[i] = bf16_to_f32(scales[i / 2]);
        for (int64_t end = d + group, e = d; e < end; e += 4, q += 2 * kBlock, out += 4 * kBlock)
            for (int i = 0; i < 2 * kBlock; i += 32)
                expand_nibbles(q + i, load(twice + i), load(twice + i + 16), out + i,
                               out + 2 * kBlock + i);
    }
    q = values;
    out = values_out;
    scales = reinterpret_cast<const uint16_t*>(values + quants);
    for (int64_t j = 0; j < kBlock; j += 2)
        for (int64_t d = 0; d < dim; d += group) {
            const uint16_t* s = scales + d / group * kBlock + j;
            const float s0 = bf16_to_f32(s[0]), s1 = bf16_to_f32(s[1]);
            float pair[16];  // pairs are elements of two positions
            for (int i = 0; i < 16; i += 2) pair[i] = s0, pair[i + 1] = s1;
            const F scale = load(pair), zero = mul(scale, set(-8.0f));
            for (int64_t e = 0; e < group; e += 16, q += 16, out += 32) {
                F a, b;
                load_nibbles(q, a, b);
                store_upper(out, fma(a, scale, zero), fma(b, scale, zero));
            }
        }
}

}  // namespace pronk::PRONK_NS
