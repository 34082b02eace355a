// Row-major checkpoint rows to packed panels (formats.h). Rows past the matrix stay zero.
#include <cstring>

#include "kernels.h"

namespace pronk {

namespace {

uint32_t word_at(const uint8_t* p) {  // four bytes, worked on at once
    uint32_t word;
    std::memcpy(&word, p, 4);
    return word;
}

// The lowest four bits of x, each as a byte.
uint32_t spread_bits(uint32_t x) { return ((x & 15) * 0x00204081u) & 0x01010101u; }

// One group of a row: its quants' lower bits and those above them, words of four consecutive k.
struct Group {
    uint32_t low[8], high[8] = {};
};

void put_quants(Format format, const Group& group, int64_t r, uint8_t* quants) {
    const auto put = [&](int load, uint32_t word) {
        std::memcpy(quants + 64 * load + 4 * r, &word, 4);
    };
    const int bits = traits(format).bits;
    if (bits == 8) {
        for (int i = 0; i < 8; ++i) put(i, group.low[i]);
        return;
    }
    for (int i = 0; i < 4; ++i) put(i, group.low[i] | group.low[i + 4] << 4);
    uint32_t above[2] = {0, 0};
    for (int i = 0; i < 8; ++i) {
        if (bits == 5) above[0] |= group.high[i] << i;
        if (bits == 6) above[i / 4] |= group.high[i] << 2 * (i % 4);
    }
    for (int i = 0; i < bits - 4; ++i) put(4 + i, above[i]);
}

// 32 bytes, plus 128, as two planes of nibbles.
void put_planes(const uint8_t* bytes, int64_t r, uint8_t* quants, uint8_t* plane) {
    Group low, high;
    for (int i = 0; i < 8; ++i) {
        const uint32_t word = word_at(bytes + 4 * i) ^ 0x80808080u;
        high.low[i] = word >> 4 & 0x0f0f0f0fu, low.low[i] = word & 0x0f0f0f0fu;
    }
    put_quants(Format::q4_0, high, r, quants);
    put_quants(Format::q4_0, low, r, plane);
}

// Blocks of 32: f16 d, f16 m if any, 32 bits above the nibbles if any, quants.
void pack_block(Format format, uint8_t bias8, const uint8_t* block, int64_t r, uint8_t* scales,
                uint8_t* quants, uint8_t* plane) {
    std::memcpy(scales + 2 * r, block, 2);
    block += 2;
    if (traits(format).minimum) {
        std::memcpy(scales + 32 + 2 * r, block, 2);
        block += 2;
    }
    Group group;
    if (format == Format::q8_planes) {
        put_planes(block, r, quants, plane);
        return;
    }
    if (traits(format).bits == 8) {
        for (int i = 0; i < 8; ++i) group.low[i] = word_at(block + 4 * i) ^ bias8 * 0x01010101u;
    } else {
        if (traits(format).bits == 5) {
            for (int i = 0; i < 8; ++i) group.high[i] = spread_bits(word_at(block) >> 4 * i);
            block += 4;
        }
        for (int i = 0; i < 4; ++i) {
            const uint32_t word = word_at(block + 4 * i);
            group.low[i] = word & 0x0f0f0f0fu, group.low[i + 4] = word >> 4 & 0x0f0f0f0fu;
        }
    }
    put_quants(format, group, r, quants);
}

// q4_k and q5_k: f16 d, f16 dmin, 12 bytes of 6-bit factors, bits above the nibbles, nibbles.
void pack_super(Format format, const uint8_t* block, int64_t r, uint8_t* scales, uint8_t* quants) {
    std::memcpy(scales + 2 * r, block, 2);
    std::memcpy(scales + 32 + 2 * r, block + 2, 2);
    const uint8_t* packed = block + 4;
    uint32_t words[3] = {0, 0, 0};
    const auto put = [&](int v, uint32_t x) {
        if (v < 15) {
            words[v / 5] |= x << 6 * (v % 5);
        } else {
            for (int w = 0; w < 3; ++w) words[w] |= (x >> 2 * w & 3) << 30;
        }
    };
    for (int g = 0; g < 4; ++g) {
        put(g, packed[g] & 63u);
        put(g + 8, packed[g + 4] & 63u);
        put(g + 4, (packed[g + 8] & 15u) | static_cast<uint32_t>(packed[g] >> 6) << 4);
        put(g + 12, static_cast<uint32_t>(packed[g + 8] >> 4) |
                        static_cast<uint32_t>(packed[g + 4] >> 6) << 4);
    }
    for (int w = 0; w < 3; ++w) std::memcpy(scales + 64 + 64 * w + 4 * r, &words[w], 4);
    const uint8_t* above = block + 16;
    const uint8_t* nibbles = above + (format == Format::q5_k ? 32 : 0);
    for (int g = 0; g < kSuper; ++g, quants += quant_bytes(format)) {
        Group group;
        for (int i = 0; i < 8; ++i) {
            const uint32_t word = word_at(nibbles + g / 2 * 32 + 4 * i);
            group.low[i] = word >> 4 * (g % 2) & 0x0f0f0f0fu;
            if (format == Format::q5_k) group.high[i] = word_at(above + 4 * i) >> g & 0x01010101u;
        }
        put_quants(format, group, r, quants);
    }
}

// q6_k: 128 bytes of nibbles, 64 of the two bits above, 16 int8 factors, f16 d.
void pack_six(const uint8_t* block, int64_t r, uint8_t* scales, uint8_t* quants) {
    std::memcpy(scales + 2 * r, block + 208, 2);
    for (int i = 0; i < 16; ++i) scales[32 + i * kPanel + r] = block[192 + i];
    for (int g = 0; g < kSuper; ++g, quants += quant_bytes(Format::q6_k)) {
        const uint8_t* nibbles = block + g / 4 * 64 + g % 2 * 32;
        const uint8_t* above = block + 128 + g / 4 * 32;
        Group group;
        for (int i = 0; i < 8; ++i) {
            group.low[i] = word_at(nibbles + 4 * i) >> (g % 4 / 2 * 4) & 0x0f0f0f0fu;
            group.high[i] = word_at(above + 4 * i) >> 2 * (g % 4) & 0x03030303u;
        }
        put_quants(Format::q6_k, group, r, quants);
    }
}

}  // namespace

void pack_rows(Format format, uint8_t bias8, const uint8_t* source, int64_t row0, int64_t rows,
               int64_t total, int64_t cols, uint8_t* packed) {
    const Traits t = traits(format);
    const int64_t panel = panel_bytes(format, cols), stride = row_bytes(format, cols);
    for (int64_t i = 0; i < rows; ++i, source += stride) {
        uint8_t* out = packed + (row0 + i) / kPanel * panel;
        const int64_t r = (row0 + i) % kPanel;
        if (!is_grouped(format)) {
            for (int64_t k = 0; k < cols; ++k)
                std::memcpy(out + (k * kPanel + r) * t.block_bytes, source + k * t.block_bytes,
                            static_cast<size_t>(t.block_bytes));
            continue;
        }
        uint8_t* plane =
            packed + (low_panel(format, packed, total, cols, (row0 + i) / kPanel) - packed);
        const int64_t scales = super_bytes(format) * t.block / (kSuper * kGroup);
        const int64_t groups = cols / kGroup, lot = lot_groups(format);
        for (int64_t b = 0; b < cols / t.block; ++b) {
            const uint8_t* block = source + b * t.block_bytes;
            const int64_t g = b * t.block / kGroup;
            const GroupPlace place = place_of(format, groups, g);
            uint8_t* to_scales = out + place.scales + g % lot * kGroup / t.block * scales;
            uint8_t* to_quants = out + place.quants;
            if (format == Format::q6_k)
                pack_six(block, r, to_scales, to_quants);
            else if (t.two_level)
                pack_super(format, block, r, to_scales, to_quants);
            else
                pack_block(format, bias8, block, r, to_scales, to_quants,
                           plane + b * low_bytes(format));
        }
    }
}

}  // namespace pronk
