// Weight formats and their packed layout.
//
// A packed matrix is a run of panels of 16 rows, so that one 64-byte load holds four
// consecutive k of each of the 16 rows and feeds one dot-product instruction.
//   float formats: [k][16 rows]
//   group formats: scales of every group (padded to 64 bytes), then the quants of every group.
//     q8_0: f16 d[16];            quants 8 x 64 bytes: byte 4r+j of load i is row r, k = 4i+j
//     q4_0: f16 d[16];            quants 4 x 64 bytes: low nibble k = 4i+j, high nibble k = 16+4i+j
//     q4_1: f16 d[16], f16 m[16]; quants as q4_0
//
// Functions here and in half.h are static: were they shared, the linker could keep the copy that
// was compiled for an ISA the CPU lacks.
#pragma once
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace pronk {

constexpr int kPanel = 16;     // rows per panel
constexpr int kGroup = 32;     // elements that share a scale
constexpr int kBlock = 32;     // positions per KV block
constexpr int kChunk = 512;    // positions that attention sums up before it joins sums
constexpr int kPartTail = 16;  // floats after the values of a part: maximum, total, padding

enum class Format : int { f32, f16, bf16, q8_0, q4_0, q4_1 };

static inline Format parse_format(const std::string& name) {
    static const char* names[] = {"f32", "f16", "bf16", "q8_0", "q4_0", "q4_1"};
    for (int i = 0; i < 6; ++i)
        if (name == names[i]) return static_cast<Format>(i);
    throw std::invalid_argument("unknown weight format: " + name);
}

static inline bool is_grouped(Format f) { return f >= Format::q8_0; }

static inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Bytes of one row in the row-major layout of a checkpoint (GGUF blocks).
static inline int64_t row_bytes(Format f, int64_t cols) {
    switch (f) {
        case Format::f32: return cols * 4;
        case Format::f16:
        case Format::bf16: return cols * 2;
        case Format::q8_0: return cols / kGroup * 34;
        case Format::q4_0: return cols / kGroup * 18;
        case Format::q4_1: return cols / kGroup * 20;
    }
    return 0;
}

struct GroupLayout {
    int64_t scales;  // bytes of scales per group of 16 rows
    int64_t quants;  // bytes of quants per group of 16 rows
};

static inline GroupLayout group_layout(Format f) {
    if (f == Format::q8_0) return {32, 512};
    if (f == Format::q4_0) return {32, 256};
    return {64, 256};
}

static inline int64_t scales_bytes(Format f, int64_t cols) {
    return round_up(cols / kGroup * group_layout(f).scales, 64);
}

static inline int64_t panel_bytes(Format f, int64_t cols) {
    if (!is_grouped(f)) return kPanel * row_bytes(f, cols);
    return scales_bytes(f, cols) + cols / kGroup * group_layout(f).quants;
}

// So that no product of a shape's sizes overflows.
constexpr int64_t kMaxSide = int64_t(1) << 30;

static inline int64_t packed_bytes(Format f, int64_t rows, int64_t cols) {
    if (rows < 0 || rows > kMaxSide || cols < 0 || cols > kMaxSide)
        throw std::invalid_argument("matrix of an impossible shape");
    return round_up(rows, kPanel) / kPanel * panel_bytes(f, cols);
}

// Quantized activations, in one or two planes of int8: q = plane 0, or 128 * plane 0 + plane 1.
// One row is the planes, then per group float scale, float scale * sum(q), and for each plane
// the int32 sum of its elements. No planes: plain floats.
static inline int64_t act_row_bytes(int64_t cols, int planes) {
    if (planes == 0) return cols * 4;
    return round_up(planes * cols + cols / kGroup * (8 + 4 * planes), 64);
}

}  // namespace pronk
