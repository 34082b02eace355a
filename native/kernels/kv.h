// The paged KV cache: where a head lies in a block, and how keys and values are read.
//
// A block is kBlock positions. The keys of a head, of all blocks one behind the other, are a plane
// of a layer, and so are its values; keys of every head lie before values of every head. So a
// sequence whose blocks are neighbours is read as a stream, which the hardware foresees. bf16 keys
// lie [d / 2][position][2], so that 16 positions are scored without a horizontal sum, and bf16
// values [position / 2][d][2]: either is what a dot product of pairs of bf16 reads. float32 keys
// lie [d][position] and values [position][d]. int8 lies as bf16 does, with a scale per position
// behind it, and is expanded to bf16 a chunk at a time, as int4 is (kv_int4.h).
#pragma once
#include <type_traits>

#include "kernels.h"
#include "vec.h"

namespace pronk::PRONK_NS {

constexpr int kChunkBlocks = kChunk / kBlock;

inline uint8_t* kv_head(const KvView& kv, int64_t block, int64_t head, bool value) {
    return kv.base + (value * kv.kv_heads + head) * kv.plane + block * kv.head_bytes();
}

// Two elements of each of 16 positions, or two positions of each of 16 elements.
struct Wide {
    F first, second;
};
inline Wide set_pair(const float* p) { return {set(p[0]), set(p[1])}; }
inline Wide first_of(Wide x) { return {x.first, set(0.0f)}; }
inline F dot2(F acc, Wide x, Wide y) { return fma(x.second, y.second, fma(x.first, y.first, acc)); }

#if defined(PRONK_BF16)
using Pair = P;
template <bool bf16>
using Factor = std::conditional_t<bf16, uint16_t, float>;  // a query's elements, and weights
#else
using Pair = Wide;
template <bool bf16>
using Factor = float;
inline Pair load_pair(const uint16_t* p) {
    Pair x;
    load_bf16_pairs(p, x.first, x.second);
    return x;
}
#endif

// Keys of 16 positions of a block, from `half` on, at dimensions (d, d + 1).
template <bool bf16>
inline auto load_keys(const uint8_t* keys, int64_t d, int half) {
    if constexpr (bf16) {
        return load_pair(reinterpret_cast<const uint16_t*>(keys) + d * kBlock + 2 * half);
    } else {
        const float* k = reinterpret_cast<const float*>(keys) + d * kBlock + half;
        return Wide{load(k), load(k + kBlock)};
    }
}

// 16 dimensions from d on of the values at positions (j, j + 1).
template <bool bf16>
inline auto load_values(const uint8_t* values, int64_t j, int64_t d, int64_t dim) {
    if constexpr (bf16) {
        return load_pair(reinterpret_cast<const uint16_t*>(values) + j * dim + 2 * d);
    } else {
        const float* v = reinterpret_cast<const float*>(values) + j * dim + d;
        return Wide{load(v), load(v + dim)};
    }
}

// Where attention reads the blocks of a chunk.
struct Past {
    KvView kv;
    const int32_t* blocks;
    int64_t head;
    const uint8_t* then;  // what is read after its values, or nullptr
    const uint8_t* at(int64_t position, bool value) const {
        return kv_head(kv, blocks[position / kBlock], head, value);
    }
};

}  // namespace pronk::PRONK_NS
