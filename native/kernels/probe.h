// What the machine can do at best: the denominators of every "fraction of the limit".
#pragma once
#include <cstring>

#include "kernels.h"
#include "vec.h"
#if defined(PRONK_AMX)
#include "tiles.h"
#endif

namespace pronk::PRONK_NS {

inline uint64_t read(const uint8_t* data, int64_t bytes) {
    const int8_t ones[4] = {1, 1, 1, 1};
    I sum[4] = {set_i(0), set_i(0), set_i(0), set_i(0)};
    for (int64_t i = 0; i + 256 <= bytes; i += 256) {
        for (int j = 0; j < 4; ++j) sum[j] = dot4_8bit(sum[j], load_b(data + i + 64 * j), ones);
    }
    return static_cast<uint64_t>(hsum(add(add(sum[0], sum[1]), add(sum[2], sum[3]))));
}

#if defined(PRONK_AMX)
// Two tiles of each operand against one another in four accumulators: what hides the latency.
inline double peak(int64_t rounds, uint8_t* sink) {
    TileShapes shapes;
    for (int i = 0; i < 8; ++i) shapes.set(i, 16, 64);
    alignas(64) uint8_t tile[16 * 64];
    std::memset(tile, 1, sizeof tile);
    configure(shapes);
    publish();
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    _tile_loadd(4, tile, 64);
    _tile_loadd(5, tile, 64);
    _tile_loadd(6, tile, 64);
    _tile_loadd(7, tile, 64);
    for (int64_t r = 0; r < rounds; ++r) {
        _tile_dpbssd(0, 4, 6);
        _tile_dpbssd(1, 4, 7);
        _tile_dpbssd(2, 5, 6);
        _tile_dpbssd(3, 5, 7);
    }
    _tile_stored(0, tile, 64);
    _tile_release();
    std::memcpy(sink, tile, 4);
    return static_cast<double>(rounds) * 4 * 16 * 16 * 64 * 2;
}
#else
inline double peak(int64_t rounds, uint8_t* sink) {
    // Enough to cover the latency, few enough for registers; unrolled, or the sums go to memory.
    constexpr int chains = kTilePanels * kTile * 3 / 2;
    alignas(64) uint8_t weights[64];
    int8_t x[4 * chains];
    std::memset(weights, 3, sizeof weights);
    std::memset(x, 1, sizeof x);
    N acc[chains];
#pragma GCC unroll 16
    for (int c = 0; c < chains; ++c) acc[c] = zero_n();
    const B w = load_b(weights);
    for (int64_t r = 0; r < rounds; ++r) {
#pragma GCC unroll 16
        for (int c = 0; c < chains; ++c) acc[c] = dot4(acc[c], w, x + 4 * c);
        __asm__ volatile("" ::: "memory");  // keeps the loop from being folded
    }
    uint32_t sum = 0;  // may wrap: only keeps the work from being dropped
#pragma GCC unroll 16
    for (int c = 0; c < chains; ++c) sum += static_cast<uint32_t>(hsum(total(acc[c])));
    std::memcpy(sink, &sum, 4);
    return static_cast<double>(rounds) * chains * 16 * 4 * 2;
}
#endif

}  // namespace pronk::PRONK_NS
