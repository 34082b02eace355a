// Where attention reads a past: in the cache itself, or in what its blocks are expanded to.
#pragma once
#include <bit>

#include "kv_int4.h"
#include "kv_int8.h"

namespace pronk::PRONK_NS {

// A chunk of a past to read, of which the blocks with a bit in `wanted` are, and what is read
// `then` (see Past). Those of int8 and int4 become bf16 in this thread's memory, until it expands
// others.
inline Past read_past(const KvView& kv, const int32_t* blocks, int64_t head, uint32_t wanted,
                      const uint8_t* then) {
    if (!kv_expanded(kv.type)) return {kv, blocks, head, then};
    uint16_t* const memory = past_memory();
    static constexpr int32_t order[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    static_assert(sizeof order / 4 == kChunkBlocks);
    const auto expand = kv.type == KvType::int8 ? expand_int8 : expand_int4;
    const int64_t dim = kv.head_dim, size = kBlock * dim, plane = kChunk * dim;
    for (; wanted; wanted &= wanted - 1) {
        const int i = std::countr_zero(wanted), next = std::countr_zero(wanted & (wanted - 1));
        if (next < kChunkBlocks) {
            prefetch(kv_head(kv, blocks[next], head, false), kv.head_bytes());
            prefetch(kv_head(kv, blocks[next], head, true), kv.head_bytes());
        }
        expand(kv_head(kv, blocks[i], head, false), kv_head(kv, blocks[i], head, true), dim,
               memory + i * size, memory + plane + i * size);
    }
    return {
        {reinterpret_cast<uint8_t*>(memory), 2 * plane, nullptr, 0, KvType::bf16, 1, kv.head_dim},
        order,
        0,
        nullptr};
}

}  // namespace pronk::PRONK_NS
