// XXH64 (Yann Collet's xxHash): tells damage, at the speed of memory; no defence against malice.
#pragma once
#include <bit>
#include <cstdint>
#include <cstring>

namespace pronk {

inline uint64_t xxh64(const uint8_t* data, int64_t bytes) {
    constexpr uint64_t p1 = 11400714785074694791u, p2 = 14029467366897019727u,
                       p3 = 1609587929392839161u, p4 = 9650029242287828579u,
                       p5 = 2870177450012600261u;
    const auto word = [](const uint8_t* p) {
        uint64_t x;
        std::memcpy(&x, p, 8);
        return x;
    };
    const auto round = [](uint64_t sum, uint64_t x) { return std::rotl(sum + x * p2, 31) * p1; };
    const uint8_t* end = data + bytes;
    uint64_t h = p5;
    if (bytes >= 32) {
        uint64_t lanes[4] = {p1 + p2, p2, 0, 0 - p1};
        for (; end - data >= 32; data += 32)
            for (int i = 0; i < 4; ++i) lanes[i] = round(lanes[i], word(data + 8 * i));
        h = std::rotl(lanes[0], 1) + std::rotl(lanes[1], 7) + std::rotl(lanes[2], 12) +
            std::rotl(lanes[3], 18);
        for (uint64_t lane : lanes) h = (h ^ round(0, lane)) * p1 + p4;
    }
    h += static_cast<uint64_t>(bytes);
    for (; end - data >= 8; data += 8) h = std::rotl(h ^ round(0, word(data)), 27) * p1 + p4;
    if (end - data >= 4) {
        uint32_t x;
        std::memcpy(&x, data, 4);
        h = std::rotl(h ^ x * p1, 23) * p2 + p3;
        data += 4;
    }
    for (; data < end; ++data) h = std::rotl(h ^ *data * p5, 11) * p1;
    h = (h ^ h >> 33) * p2;
    h = (h ^ h >> 29) * p3;
    return h ^ h >> 32;
}

}  // namespace pronk
