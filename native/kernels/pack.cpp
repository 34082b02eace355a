// Row-major checkpoint rows to packed panels (formats.h). Rows past the matrix stay zero.
#include <cstring>

#include "kernels.h"

namespace pronk {

namespace {

void pack_group(Format format, uint8_t bias8, const uint8_t* block, int64_t r, uint8_t* scales,
                uint8_t* quants) {
    std::memcpy(scales + 2 * r, block, 2);
    block += 2;
    if (format == Format::q4_1) {
        std::memcpy(scales + 32 + 2 * r, block, 2);
        block += 2;
    }
    const int words = format == Format::q8_0 ? 8 : 4;
    const uint32_t flip = format == Format::q8_0 ? bias8 * 0x01010101u : 0;
    for (int i = 0; i < words; ++i) {
        uint32_t word;
        std::memcpy(&word, block + 4 * i, 4);
        word ^= flip;
        std::memcpy(quants + 64 * i + 4 * r, &word, 4);
    }
}

}  // namespace

void pack_rows(Format format, uint8_t bias8, const uint8_t* source, int64_t row0, int64_t rows,
               int64_t cols, uint8_t* packed) {
    const int64_t panel = panel_bytes(format, cols), stride = row_bytes(format, cols);
    for (int64_t i = 0; i < rows; ++i, source += stride) {
        uint8_t* out = packed + (row0 + i) / kPanel * panel;
        const int64_t r = (row0 + i) % kPanel;
        if (is_grouped(format)) {
            const GroupLayout layout = group_layout(format);
            const int64_t block = row_bytes(format, kGroup);
            uint8_t* quants = out + scales_bytes(format, cols);
            for (int64_t g = 0; g < cols / kGroup; ++g)
                pack_group(format, bias8, source + g * block, r, out + g * layout.scales,
                           quants + g * layout.quants);
        } else {
            const int64_t element = row_bytes(format, 1);
            for (int64_t k = 0; k < cols; ++k)
                std::memcpy(out + (k * kPanel + r) * element, source + k * element, element);
        }
    }
}

}  // namespace pronk
