// The paged KV cache: where a head lies in a block, and how keys and values are read.
//
// A block holds kBlock positions of every KV head, keys of every head before values of every head.
// bf16 keys lie [d / 2][position][2], so that 16 positions are scored without a horizontal sum,
// and bf16 values [position / 2][d][2]: either is what a dot product of pairs of bf16 reads.
// float32 keys lie [d][position] and values [position][d]. int8 lies as bf16 does, with a scale per
// position behind it, and is expanded to bf16 a chunk at a time, as int4 is (kv_int4.h).
#pragma once
#include "kernels.h"
#include "vec.h"

namespace pronk::PRONK_NS {

constexpr int kChunkBlocks = kChunk / kBlock;

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

// Where attention reads the blocks of a chunk.
struct Past {
    KvView kv;
    const int32_t* blocks;
    int64_t head;
    const uint8_t* at(int64_t position, bool value) const {
        return kv_head(kv, blocks[position / kBlock], head, value);
    }
};

}  // namespace pronk::PRONK_NS
