// Weight formats and their packed layout.
//
// A packed matrix is a run of panels of 16 rows, so that one 64-byte load holds four
// consecutive k of each of the 16 rows and feeds one dot-product instruction.
//   float formats: [k][16 rows]
//   group formats: lots, of each the scales of its groups, then their quants: one stream of memory.
//     A lot has as few groups as have scales that fill lines of 64 bytes; a last one that is cut
//     short is padded to a line.
// Quants of a group, `bits` to an element:
//   8 bits: 8 x 64 bytes, byte 4r+j of load i is row r, k = 4i+j
//   4 to 6: 4 x 64 bytes of nibbles, of load i the low one k = 4i+j, the high one k = 16+4i+j; then
//     the bits above the nibble, each where k = 4i+j has byte 4r+j:
//     5 bits: 64 bytes, bit i.   6 bits: 2 x 64 bytes, bits 2(i%4) and up of load i/4.
//   q8_planes: of each byte + 128 the upper nibbles as above; the lower ones, in the same order,
//   lie
//     in a plane of their own behind all panels, so that the upper ones can be read alone
// Scales, each of 16 rows:
//   one level: per group f16 d, then f16 m where the format has minima
//   q4_k, q5_k: per 8 groups f16 d, f16 dmin, then 3 x 32 bits of sixteen 6-bit factors: of d for
//     group 0..7, of dmin for 0..7; five to a word, the last spread over the words' top bits
//   q6_k: per 8 groups f16 d, then int8 factors for each 16 elements
//
// Functions here and in half.h are static: were they shared, the linker could keep the copy that
// was compiled for an ISA the CPU lacks.
#pragma once
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace pronk {

constexpr int kPanel = 16;   // rows per panel
constexpr int kGroup = 32;   // elements that share a scale
constexpr int kBlock = 32;   // positions per KV block
constexpr int kChunk = 512;  // positions that attention sums up before it joins sums
// Packed weights are kept on disk: raise it with every change of what a format packs to.
constexpr int kPackVersion = 2;

constexpr int kPartTail = 16;  // floats after the values of a part: maximum, total, padding

enum class Format : int {
    f32,
    f16,
    bf16,
    q8_0,
    q4_0,
    q4_1,
    q5_0,
    q5_1,
    q4_k,
    q5_k,
    q6_k,
    q8_planes
};
constexpr int kFormats = 12;

struct Traits {
    const char* name;
    int block, block_bytes;  // elements and bytes of the checkpoint's blocks
    int bits;                // of a quant; 0 for floats
    int offset;              // what a stored quant is above its value
    bool minimum;            // value = d * quant + m
    bool two_level;          // scales are a factor times that of 8 groups
    int halves;              // 2 where each 16 elements have a scale
};

static constexpr Traits kTraits[kFormats] = {
    {"f32", 1, 4, 0, 0, false, false, 1},      {"f16", 1, 2, 0, 0, false, false, 1},
    {"bf16", 1, 2, 0, 0, false, false, 1},     {"q8_0", 32, 34, 8, 0, false, false, 1},
    {"q4_0", 32, 18, 4, 8, false, false, 1},   {"q4_1", 32, 20, 4, 0, true, false, 1},
    {"q5_0", 32, 22, 5, 16, false, false, 1},  {"q5_1", 32, 24, 5, 0, true, false, 1},
    {"q4_k", 256, 144, 4, 0, true, true, 1},   {"q5_k", 256, 176, 5, 0, true, true, 1},
    {"q6_k", 256, 210, 6, 32, false, true, 2}, {"q8_planes", 32, 34, 8, 0, false, false, 1},
};
static constexpr const Traits& traits(Format f) { return kTraits[static_cast<int>(f)]; }

static inline Format parse_format(const std::string& name) {
    for (int i = 0; i < kFormats; ++i)
        if (name == traits(static_cast<Format>(i)).name) return static_cast<Format>(i);
    throw std::invalid_argument("unknown weight format: " + name);
}

static constexpr bool is_grouped(Format f) { return traits(f).bits > 0; }

static inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Bytes of one row in the row-major layout of a checkpoint (GGUF blocks).
static inline int64_t row_bytes(Format f, int64_t cols) {
    return cols / traits(f).block * traits(f).block_bytes;
}

constexpr int kSuper = 8;  // groups that share the upper level of two-level scales

// Bytes of 16 rows: of the scales of kSuper groups, and of the quants of one.
static constexpr int64_t super_bytes(Format f) {
    if (f == Format::q6_k) return 32 + kSuper * 2 * kPanel;
    return traits(f).two_level ? 256 : kSuper * (traits(f).minimum ? 64 : 32);
}
static constexpr int64_t quant_bytes(Format f) {
    return 64 * (f == Format::q8_planes ? 4 : traits(f).bits);
}
// The same of a lower plane, where the format has one.
static constexpr int64_t low_bytes(Format f) { return f == Format::q8_planes ? 256 : 0; }

// Groups of a lot.
static constexpr int lot_groups(Format f) {
    int groups = traits(f).two_level ? kSuper : 1;
    while (groups * super_bytes(f) / kSuper % 64) groups *= 2;
    return groups;
}

// Where, in a panel of so many groups, the scales of g's lot begin, and the quants of g.
struct GroupPlace {
    int64_t scales, quants;
};
static inline GroupPlace place_of(Format f, int64_t groups, int64_t g) {
    const int64_t lot = lot_groups(f), within = g % lot, first = g - within;
    const int64_t scales = first * super_bytes(f) / kSuper + first * quant_bytes(f);
    const int64_t left = groups - first < lot ? groups - first : lot;
    return {scales,
            scales + round_up(left * super_bytes(f) / kSuper, 64) + within * quant_bytes(f)};
}

static inline int64_t panel_bytes(Format f, int64_t cols) {
    if (!is_grouped(f)) return kPanel * row_bytes(f, cols);
    const int64_t groups = cols / kGroup;
    return round_up(groups * super_bytes(f) / kSuper, 64) + groups * quant_bytes(f);
}

// So that no product of a shape's sizes overflows.
constexpr int64_t kMaxSide = int64_t(1) << 30;

static inline int64_t packed_bytes(Format f, int64_t rows, int64_t cols) {
    if (rows < 0 || rows > kMaxSide || cols < 0 || cols > kMaxSide)
        throw std::invalid_argument("matrix of an impossible shape");
    return round_up(rows, kPanel) / kPanel * (panel_bytes(f, cols) + cols / kGroup * low_bytes(f));
}

// The lower plane's part of panel p.
static inline const uint8_t* low_panel(Format f, const uint8_t* weight, int64_t rows, int64_t cols,
                                       int64_t p) {
    return weight + round_up(rows, kPanel) / kPanel * panel_bytes(f, cols) +
           p * (cols / kGroup) * low_bytes(f);
}

// Rows of activations: floats, or quantized, each group of 32 integers with a float scale. Those of
// a8 have 8 bits. Those of a12 have 12 and are kept as two int8, kSplit * high + low, so that the
// dot products of int8 serve; kSplit is 16 for a nibble times 16 is still a byte: tiles multiply
// both halves in one instruction.
//
// Quantized rows come in blocks of 16: first the quants, per row and group 32, or 32 high and 32
// low; then per group and row the scale, scale * sum of the integers (floats), and the integers'
// sums over the first and the second 16 elements (int32).
enum class Precision : int { f32, a8, a12 };
constexpr int kSplit = 16;
constexpr int kActRows = 16;

static inline Precision parse_precision(const std::string& name) {
    if (name == "f32") return Precision::f32;
    if (name == "a8") return Precision::a8;
    if (name == "a12") return Precision::a12;
    throw std::invalid_argument("unknown precision of activations: " + name);
}
static constexpr bool is_quantized(Precision p) { return p != Precision::f32; }

// The int8 of a group, and the largest integer.
static constexpr int act_group(Precision p) { return p == Precision::a12 ? 2 * kGroup : kGroup; }
static constexpr int act_range(Precision p) { return p == Precision::a12 ? 127 * kSplit : 127; }

static inline int64_t act_row_bytes(int64_t cols, Precision p) {
    return is_quantized(p) ? cols / kGroup * (act_group(p) + 16) : cols * 4;
}

}  // namespace pronk
