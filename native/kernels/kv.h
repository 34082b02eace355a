// The paged KV cache: where a head lies in a block, and how keys and values are written.
//
// A block holds kBlock positions of every KV head, keys of every head before values of every head.
// bf16 keys lie [d / 2][position][2], so that 16 positions are scored without a horizontal sum,
// and bf16 values [position / 2][d][2]: either is what a dot product of pairs of bf16 reads.
// float32 keys lie [d][position] and values [position][d].
#pragma once
#include <cstring>

#include "half.h"
#include "kernels.h"
#include "vec.h"

namespace pronk::PRONK_NS {

constexpr int kMaxHeadDim = 256;

// Within a layer's part of a block.
inline uint8_t* kv_head(const KvView& kv, int64_t block, int64_t head, bool value) {
    return kv.base + block * kv.block_stride + (value * kv.kv_heads + head) * kv.head_bytes();
}

// Keys of 32 positions at the pair of dimensions (d, d + 1), 16 positions from `half` on.
template <bool bf16>
inline void load_keys(const uint8_t* keys, int64_t d, int half, F& first, F& second) {
    if constexpr (bf16) {
        load_bf16_pairs(reinterpret_cast<const uint16_t*>(keys) + d * kBlock + 2 * half, first,
                        second);
    } else {
        const float* k = reinterpret_cast<const float*>(keys) + d * kBlock + half;
        first = load(k);
        second = load(k + kBlock);
    }
}

// 16 dimensions from d on of the values at positions (j, j + 1).
template <bool bf16>
inline void load_values(const uint8_t* values, int64_t j, int64_t d, int64_t dim, F& first,
                        F& second) {
    if constexpr (bf16) {
        load_bf16_pairs(reinterpret_cast<const uint16_t*>(values) + j * dim + 2 * d, first, second);
    } else {
        const float* v = reinterpret_cast<const float*>(values) + j * dim + d;
        first = load(v);
        second = load(v + dim);
    }
}

inline void rotate(float* x, const float* table, int64_t half) {
    for (int64_t i = 0; i < half; ++i) {
        const float a = x[i], b = x[i + half], c = table[i], s = table[half + i];
        x[i] = a * c - b * s;
        x[i + half] = b * c + a * s;
    }
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

inline void rope_store(Rows qkv, Rows table, int64_t heads, const KvView& kv, const Tokens& tokens,
                       int64_t first, int64_t last) {
    const int64_t dim = kv.head_dim;
    for (int64_t t = first; t < last; ++t) {
        float* q = qkv.row<float>(t);
        const float* angles = table.row<float>(t);
        for (int64_t h = 0; h < heads + kv.kv_heads; ++h) rotate(q + h * dim, angles, dim / 2);
        const int64_t position = tokens.positions[t];
        const int64_t block = kv.tables[tokens.sequences[t] * kv.max_blocks + position / kBlock];
        for (int64_t h = 0; h < kv.kv_heads; ++h) {
            const float* k = q + (heads + h) * dim;
            (kv.bf16 ? store_half : store_float)(k, k + kv.kv_heads * dim, dim, position % kBlock,
                                                 kv_head(kv, block, h, false),
                                                 kv_head(kv, block, h, true));
        }
    }
}

}  // namespace pronk::PRONK_NS
