// Rotary embedding, and the rows it leaves in the KV cache.
#pragma once
#include <cmath>
#include <cstring>

#include "half.h"
#include "kv.h"
#include "kv_int4.h"
#include "kv_int8.h"

namespace pronk::PRONK_NS {

inline void rotate(float* x, const float* table, int64_t half) {
    int64_t i = 0;
    for (; i + 16 <= half; i += 16) {
        const F a = load(x + i), b = load(x + i + half);
        const F c = load(table + i), s = load(table + half + i);
        store(x + i, sub(mul(a, c), mul(b, s)));
        store(x + i + half, add(mul(b, c), mul(a, s)));
    }
    for (; i < half; ++i) {  // a head of 16 has a half of 8
        const float a = x[i], b = x[i + half], c = table[i], s = table[half + i];
        x[i] = a * c - b * s;
        x[i + half] = b * c + a * s;
    }
}

// Divides `count` elements by their root mean square; a weight, if there is one, multiplies them.
inline void norm_heads(float* x, const float* weight, int64_t count, float eps) {
    F squares = set(0.0f);
    for (int64_t i = 0; i < count; i += 16) squares = fma(load(x + i), load(x + i), squares);
    const F scale = set(1.0f / std::sqrt(hsum(squares) / static_cast<float>(count) + eps));
    for (int64_t i = 0; i < count; i += 16) {
        const F unit = mul(load(x + i), scale);
        store(x + i, weight ? mul(load(weight + i), unit) : unit);
    }
}

inline void center_key(float* key, const float* center, int64_t dim) {
    for (int64_t d = 0; d < dim; d += 16) store(key + d, sub(load(key + d), load(center + d)));
}

inline void store_half(const float* k, const float* v, int64_t dim, int64_t slot, uint8_t* keys,
                       uint8_t* values) {
    uint16_t half[2 * kMaxHeadDim];
    for (int64_t d = 0; d < dim; ++d) half[d] = f32_to_bf16(k[d]);
    for (int64_t d = 0; d < dim; ++d) half[dim + d] = f32_to_bf16(v[d]);
    for (int64_t d = 0; d < dim; d += 2)
        std::memcpy(keys + (d * kBlock + 2 * slot) * 2, half + d, 4);
    uint16_t* vp = reinterpret_cast<uint16_t*>(values) + slot / 2 * 2 * dim + slot % 2;
    for (int64_t d = 0; d < dim; ++d) vp[2 * d] = half[dim + d];
}

inline void store_float(const float* k, const float* v, int64_t dim, int64_t slot, uint8_t* keys,
                        uint8_t* values) {
    float* kp = reinterpret_cast<float*>(keys) + slot;
    for (int64_t d = 0; d < dim; ++d) kp[d * kBlock] = k[d];
    std::memcpy(reinterpret_cast<float*>(values) + slot * dim, v,
                static_cast<size_t>(dim) * sizeof(float));
}

inline void rope_store(Rows qkv, Rows table, int64_t heads, const HeadNorm& norm, const KvView& kv,
                       const Tokens& tokens, int64_t first, int64_t last) {
    const int64_t dim = kv.head_dim, both = heads + kv.kv_heads;
    for (int64_t t = first; t < last; ++t) {
        float* q = qkv.row<float>(t);
        if (norm.kind == HeadNorm::full) {
            norm_heads(q, norm.q, heads * dim, norm.eps);
            norm_heads(q + heads * dim, norm.k, kv.kv_heads * dim, norm.eps);
        }
        for (int64_t h = 0; h < both; ++h) {
            float* x = q + h * dim;
            if (norm.kind == HeadNorm::head)
                norm_heads(x, h < heads ? norm.q : norm.k, dim, norm.eps);
            if (table.data) rotate(x, table.row<float>(t), dim / 2);
            if (norm.kind == HeadNorm::l2) norm_heads(x, nullptr, dim, norm.eps);
            // What all keys of a head have in common adds the same to every score of a query,
            // which softmax does not see: rounded keys are nearer without it.
            if (norm.center && h >= heads) center_key(x, norm.center + (h - heads) * dim, dim);
        }
        const int64_t position = tokens.positions[t];
        const int64_t block = kv.tables[tokens.sequences[t] * kv.max_blocks + position / kBlock];
        for (int64_t h = 0; h < kv.kv_heads; ++h) {
            const float* k = q + (heads + h) * dim;
            static constexpr decltype(&store_float) stores[] = {
                store_float, store_half, store_int8, store_int4<true>, store_int4<false>};
            stores[static_cast<int>(kv.type)](k, k + kv.kv_heads * dim, dim, position % kBlock,
                                              kv_head(kv, block, h, false),
                                              kv_head(kv, block, h, true));
        }
    }
}

}  // namespace pronk::PRONK_NS
