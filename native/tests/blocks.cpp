// The blocks' layouts are those of ggml's quantization formats, read here one element at a time and
// without the kernels' tables, so that packing and unpacking have something to agree with.
#include "blocks.h"

namespace pronk::test {

namespace {

// Sizes and places in bytes; -1 where a format has no such field.
struct Layout {
    int elements, bytes, d, m;
    int factors, factor_bytes;  // scales of the second level
    bool signed_factors;
};

Layout layout(Format format) {
    switch (format) {
        case Format::f32: return {1, 4, -1, -1, -1, 0, false};
        case Format::f16:
        case Format::bf16: return {1, 2, -1, -1, -1, 0, false};
        case Format::q8_planes:
        case Format::q8_0: return {32, 34, 0, -1, -1, 0, false};
        case Format::q4_0: return {32, 18, 0, -1, -1, 0, false};
        case Format::q4_1: return {32, 20, 0, 2, -1, 0, false};
        case Format::q5_0: return {32, 22, 0, -1, -1, 0, false};
        case Format::q5_1: return {32, 24, 0, 2, -1, 0, false};
        case Format::q4_k: return {256, 144, 0, 2, 4, 12, false};
        case Format::q5_k: return {256, 176, 0, 2, 4, 12, false};
        case Format::q6_k: return {256, 210, 208, -1, 192, 16, true};
    }
    return {};
}

double half_at(const uint8_t* p) { return half_value(static_cast<uint16_t>(p[0] | p[1] << 8)); }

constexpr uint16_t kOne = 0x3c00, kSubnormals[] = {0x0001, 0x8001, 0x03ff, 0x0200};

uint16_t random_half(Fill fill, Random& random) {
    switch (fill) {
        case Fill::unit: return kOne;
        case Fill::zero: return 0;
        case Fill::tiny: return kSubnormals[random.below(4)];
        case Fill::extreme: return random.below(2) ? 0x7bff : 0xfbff;  // +-65504
        case Fill::random: break;
    }
    return static_cast<uint16_t>(random.below(2) << 15 | (5 + random.below(12)) << 10 |
                                 random.below(1024));
}

uint8_t random_byte(Format format, bool edge, Random& random) {
    if (!edge) return static_cast<uint8_t>(random.below(256));
    static const uint8_t bytes[] = {0x80, 0x7f, 0x81, 0x80}, nibbles[] = {0xff, 0x00, 0xf0, 0x0f};
    return (traits(format).bits == 8 ? bytes : nibbles)[random.below(4)];
}

void fill_block(Format format, Fill fill, Random& random, uint8_t* block) {
    const Layout l = layout(format);
    // Some blocks of every kind of matrix are all zero, and some have one byte throughout.
    if (!random.below(6)) fill = fill == Fill::unit ? fill : Fill::zero;
    const bool edge = fill == Fill::extreme || (fill == Fill::unit && random.below(2));
    const bool constant = edge && random.below(2);
    const uint8_t byte = random_byte(format, edge, random);
    for (int i = 0; i < l.bytes; ++i)
        block[i] = fill == Fill::zero ? 0 : constant ? byte : random_byte(format, edge, random);
    for (int i = 0; i < l.factor_bytes; ++i) {
        uint8_t& factor = block[l.factors + i];
        if (fill == Fill::extreme && l.signed_factors)
            factor = random.below(2) ? 0x80 : 0x7f;
        else if (fill == Fill::unit)  // at most 3
            factor = static_cast<uint8_t>(l.signed_factors ? random.below(7) - 3
                                          : i < 8          ? random.below(4)
                                                           : random.bits() & 0x33);
    }
    for (const int at : {l.d, l.m})
        if (at >= 0) {
            const uint16_t h = random_half(fill, random);
            std::memcpy(block + at, &h, 2);
        }
}

// ggml's get_scale_min_k4: factor j of d and of dmin.
void scale_min_k4(int j, const uint8_t* q, int& d, int& m) {
    if (j < 4) {
        d = q[j] & 63;
        m = q[j + 4] & 63;
    } else {
        d = (q[j + 4] & 0xf) | (q[j - 4] >> 6) << 4;
        m = (q[j + 4] >> 4) | (q[j] >> 6) << 4;
    }
}

// Element j of a block of 32.
Element small_element(Format format, const uint8_t* b, int j) {
    const double d = half_at(b);
    const auto nibble = [&](const uint8_t* qs) { return j < 16 ? qs[j] & 15 : qs[j - 16] >> 4; };
    const auto fifth = [&](const uint8_t* qh) { return (qh[j / 8] >> j % 8 & 1) * 16; };
    switch (format) {
        case Format::q8_planes:
        case Format::q8_0: return {d, 0, static_cast<int8_t>(b[2 + j])};
        case Format::q4_0: return {d, 0, nibble(b + 2) - 8};
        case Format::q4_1: return {d, half_at(b + 2), nibble(b + 4)};
        case Format::q5_0: return {d, 0, nibble(b + 6) + fifth(b + 2) - 16};
        default: return {d, half_at(b + 2), nibble(b + 8) + fifth(b + 4)};
    }
}

// Element j of a block of 256.
Element large_element(Format format, const uint8_t* b, int j) {
    if (format == Format::q6_k) {
        const int n = j / 128, quarter = j % 128 / 32, l = j % 32;
        const uint8_t *ql = b + 64 * n, *qh = b + 128 + 32 * n;
        const int8_t* scales = reinterpret_cast<const int8_t*>(b + 192) + 8 * n;
        const int byte = ql[l + quarter % 2 * 32];
        const int low = quarter < 2 ? byte & 15 : byte >> 4;
        const int quant = (low | (qh[l] >> 2 * quarter & 3) << 4) - 32;
        return {half_at(b + 208) * scales[l / 16 + 2 * quarter], 0, quant};
    }
    const int chunk = j / 64, upper = j % 64 / 32, l = j % 32;
    const uint8_t* qs = b + (format == Format::q5_k ? 48 : 16) + 32 * chunk;
    int quant = upper ? qs[l] >> 4 : qs[l] & 15, factor, minimum;
    if (format == Format::q5_k && (b[16 + l] & 1 << (2 * chunk + upper))) quant += 16;
    scale_min_k4(2 * chunk + upper, b + 4, factor, minimum);
    return {half_at(b) * factor, -half_at(b + 2) * minimum, quant};
}

}  // namespace

Weights::Weights(const Kernels& kernels, Format format, int64_t rows, int64_t cols, Fill fill,
                 Random& random)
    : format(format),
      rows(rows),
      cols(cols),
      source(static_cast<size_t>(rows * cols / layout(format).elements * layout(format).bytes)),
      packed(packed_bytes(format, rows, cols)) {
    const Layout l = layout(format);
    for (size_t at = 0; at < source.size(); at += static_cast<size_t>(l.bytes)) {
        uint8_t* block = &source[at];
        if (format == Format::f16) {
            const uint16_t h = random_half(fill, random);
            std::memcpy(block, &h, 2);
        } else if (l.elements == 1) {
            const float f = random.uniform();
            uint8_t bytes[4];
            std::memcpy(bytes, &f, 4);
            std::memcpy(block, bytes + 4 - l.bytes, static_cast<size_t>(l.bytes));
        } else {
            fill_block(format, fill, random, block);
        }
    }
    std::memset(packed.data(), 0, static_cast<size_t>(packed.size()));  // as the region is
    const int64_t cut = rows / 3, stride = cols / l.elements * l.bytes;
    // Rows arrive in pieces.
    pack_rows(format, kernels.bias8, source.data(), 0, cut, rows, cols, packed.data());
    pack_rows(format, kernels.bias8, source.data() + cut * stride, cut, rows - cut, rows, cols,
              packed.data());
}

Element Weights::element(int64_t row, int64_t col) const {
    const Layout l = layout(format);
    const int64_t index = row * cols + col;  // blocks never straddle rows
    const uint8_t* block = source.data() + index / l.elements * l.bytes;
    if (l.elements == 256) return large_element(format, block, static_cast<int>(index % 256));
    if (l.elements == 32) return small_element(format, block, static_cast<int>(index % 32));
    if (format == Format::f16) return {half_at(block), 0, 1};
    if (format == Format::bf16)
        return {bfloat_value(static_cast<uint16_t>(block[0] | block[1] << 8)), 0, 1};
    float f;
    std::memcpy(&f, block, 4);
    return {f, 0, 1};
}

}  // namespace pronk::test
