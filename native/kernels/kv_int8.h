// An int8 KV cache: rows quantized as they are stored, and expanded to bf16 to be read.
#pragma once
#include <cstring>

#include "half.h"
#include "kv.h"

namespace pronk::PRONK_NS {

// What int8 keeps of a row: x is about scale * q. An infinity or a NaN shows in the scale.
inline float quantize_row(const float* x, int64_t dim, int8_t* q) {
    F most = set(0.0f);
    for (int64_t d = 0; d < dim; d += 16) most = max(most, abs(load(x + d)));
    const float top = hmax(most);
    const F inverse = set(top > 1e-30f ? 127.0f / top : 0.0f);
    for (int64_t d = 0; d < dim; d += 16) store_i8(q + d, to_int(mul(load(x + d), inverse)));
    return top / 127.0f;
}

inline void store_int8(const float* k, const float* v, int64_t dim, int64_t slot, uint8_t* keys,
                       uint8_t* values) {
    int8_t q[kMaxHeadDim];
    const int64_t scales = kBlock * dim + slot * 4;
    const float key_scale = quantize_row(k, dim, q);
    for (int64_t d = 0; d < dim; d += 2) std::memcpy(keys + d * kBlock + 2 * slot, q + d, 2);
    std::memcpy(keys + scales, &key_scale, 4);
    const float value_scale = quantize_row(v, dim, q);
    uint8_t* vp = values + slot / 2 * 2 * dim + slot % 2;
    for (int64_t d = 0; d < dim; ++d) vp[2 * d] = static_cast<uint8_t>(q[d]);
    std::memcpy(values + scales, &value_scale, 4);
}

#if !defined(PRONK_BF16)
inline void store_bf16(uint16_t* p, F a, F b) {
    float x[32];
    store(x, a);
    store(x + 16, b);
    for (int i = 0; i < 32; ++i) p[i] = f32_to_bf16(x[i]);
}
#endif

// The keys and the values of a head in a block, from int8 to bf16.
inline void expand_int8(const uint8_t* keys, const uint8_t* values, int64_t dim, uint16_t* out,
                        uint16_t* values_out) {
    const float* scale = reinterpret_cast<const float*>(keys + kBlock * dim);
    const int8_t* q = reinterpret_cast<const int8_t*>(keys);
    float twice[2 * kBlock];  // of pairs, which are elements of one position
    for (int i = 0; i < 2 * kBlock; ++i) twice[i] = scale[i / 2];
    const F s[4] = {load(twice), load(twice + 16), load(twice + 32), load(twice + 48)};
    for (int64_t d = 0; d < dim; d += 2, q += 2 * kBlock, out += 2 * kBlock)
        for (int i = 0; i < 4; i += 2)
            store_bf16(out + 16 * i, mul(load_i8(q + 16 * i), s[i]),
                       mul(load_i8(q + 16 * i + 16), s[i + 1]));
    scale = reinterpret_cast<const float*>(values + kBlock * dim);
    q = reinterpret_cast<const int8_t*>(values);
    out = values_out;
    for (int64_t j = 0; j < kBlock; j += 2, q += 2 * dim, out += 2 * dim) {
        float pair[16];  // pairs are elements of two positions
        for (int i = 0; i < 16; ++i) pair[i] = scale[j + i % 2];
        const F both = load(pair);
        for (int64_t i = 0; i < 2 * dim; i += 32)
            store_bf16(out + i, mul(load_i8(q + i), both), mul(load_i8(q + i + 16), both));
    }
}

}  // namespace pronk::PRONK_NS
