// What every way of multiplying shares, so that all give the same bits: how a row of activations
// is read, what a group adds to a sum, and how a sum becomes an output.
#pragma once
#include "kernels.h"
#include "vec.h"

namespace pronk::PRONK_NS {

struct Act {  // one quantized row of activations (formats.h)
    const int8_t* q;
    const float* scale;  // of group g at 64 g, as the others
    const float* scaled_sum;
    const int32_t* sum[2];
    Act() = default;
    Act(Rows x, Precision of_x, int64_t t, int64_t cols) {
        const int64_t groups = cols / kGroup, r = t % kActRows;
        const uint8_t* block = x.data + (t - r) * x.stride;
        q = reinterpret_cast<const int8_t*>(block + r * groups * act_group(of_x));
        scale = reinterpret_cast<const float*>(block + kActRows * groups * act_group(of_x)) + 4 * r;
        scaled_sum = scale + 1;
        for (int h = 0; h < 2; ++h) sum[h] = reinterpret_cast<const int32_t*>(scale) + 2 + h;
    }
};
constexpr int64_t kActStep = 4 * kActRows;  // floats from one group's scales to the next's

// Integer sums that start at the bits of 1.5 * 2^23 and stay within 2^22 of it are, read as floats,
// that much more, and one multiply-add takes it off: no conversion, and still d * sum is rounded
// once, for 1.5 * 2^23 * d is exact where d has up to 22 bits.
constexpr int32_t kBase = 0x4b400000;
constexpr float kBaseValue = 0x1.8p23f;
template <Format fmt, Precision of>
constexpr bool kBased = kFused && (of == Precision::a8 || traits(fmt).bits <= 5);

// What one group adds to a sum: `sum` is its dot product times d, or that of its halves.
template <Format fmt>
inline F add_group(F acc, F sum, F scale, F minimum, F scaled_sum) {
    acc = fma(sum, scale, acc);
    if constexpr (traits(fmt).minimum) acc = fma(minimum, scaled_sum, acc);
    return acc;
}

// Adds the bias to the sums of rows [row, row + 16) of a part, scales them, adds the residual and
// stores them.
inline void finish_row(const MatmulPart& part, int64_t row, int64_t t, F y, Rows out,
                       Rows residual) {
    const int64_t column = part.column + row;
    if (part.bias) y = add(y, load(part.bias + row));
    if (part.scale != 1.0f) y = mul(y, set(part.scale));
    if (residual.data) y = add(y, load(residual.row<float>(t) + column));
    store(out.row<float>(t) + column, y);
}

}  // namespace pronk::PRONK_NS
