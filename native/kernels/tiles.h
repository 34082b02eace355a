// What every use of AMX tiles needs, where GCC's intrinsics do not say enough.
#pragma once
#include <immintrin.h>

#include <cstdint>

#include "vec.h"

namespace pronk::PRONK_NS {

struct alignas(64) TileShapes {  // the operand of ldtilecfg; no tile has a shape at first
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {};  // of a row
    uint8_t rows[16] = {};
    void set(int tile, int count, int row_bytes) {
        rows[tile] = static_cast<uint8_t>(count);
        bytes[tile] = static_cast<uint16_t>(row_bytes);
    }
};

// GCC 12's intrinsic says that it reads eight bytes, and so lets the others' stores be dropped.
inline void configure(const TileShapes& shapes) { __asm__ volatile("ldtilecfg %0" ::"m"(shapes)); }

// Before tiles load what was just stored: the compiler does not know what a tile load reads.
inline void publish() { __asm__ volatile("" ::: "memory"); }

}  // namespace pronk::PRONK_NS
