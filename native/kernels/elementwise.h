// Kernels that work on one token's row at a time: norms, activations, quantization, embedding.
#pragma once
#include <cmath>

#include "half.h"
#include "kernels.h"
#include "vec.h"

namespace pronk::PRONK_NS {

// 16 integral floats to int8; returns their sum.
inline int32_t store_plane(F low, F high, int8_t* q) {
    const I a = to_int(low), b = to_int(high);
    store_i8(q, a);
    store_i8(q + 16, b);
    return hsum(add(a, b));
}

// One group of 32 floats to one or two planes of int8 with their scale and sums (formats.h).
inline void quantize_group(F a, F b, int64_t g, int64_t cols, int planes, uint8_t* row) {
    int8_t* q = reinterpret_cast<int8_t*>(row) + g * kGroup;
    float* scale = reinterpret_cast<float*>(row + planes * cols);
    const int64_t groups = cols / kGroup;
    int32_t* sums = reinterpret_cast<int32_t*>(scale + 2 * groups);
    const float range = planes == 2 ? 127.0f * 128.0f : 127.0f;
    const float top = hmax(max(abs(a), abs(b)));
    // Below 1e-30 the inverse could overflow; an infinity or a NaN shows in the scale.
    const F inverse = set(top > 1e-30f ? range / top : 0.0f);
    const F low = set(-range), high = set(range);
    a = round(min(max(mul(a, inverse), low), high));
    b = round(min(max(mul(b, inverse), low), high));
    int32_t sum;
    if (planes == 2) {
        const F ha = round(mul(a, set(1.0f / 128.0f))), hb = round(mul(b, set(1.0f / 128.0f)));
        sums[g] = store_plane(ha, hb, q);
        const F down = set(-128.0f);  // what is left is in [-64, 64], and exact
        sums[groups + g] = store_plane(fma(ha, down, a), fma(hb, down, b), q + cols);
        sum = 128 * sums[g] + sums[groups + g];
    } else {
        sum = sums[g] = store_plane(a, b, q);
    }
    scale[g] = top / range;
    scale[groups + g] = scale[g] * static_cast<float>(sum);
}

// Writes values produced 32 at a time by fn(k) either as floats or as quantized groups.
template <class Fn>
inline void write_row(int64_t cols, uint8_t* row, int planes, Fn fn) {
    float* out = reinterpret_cast<float*>(row);
    for (int64_t k = 0; k < cols; k += kGroup) {
        const F a = fn(k), b = fn(k + 16);
        if (planes) {
            quantize_group(a, b, k / kGroup, cols, planes, row);
        } else {
            store(out + k, a);
            store(out + k + 16, b);
        }
    }
}

inline void rms_norm(Rows x, const float* weight, float eps, int64_t cols, Rows out, int planes,
                     int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) {
        const float* row = x.row<float>(t);
        F squares = set(0.0f);
        for (int64_t k = 0; k < cols; k += 16) squares = fma(load(row + k), load(row + k), squares);
        const float mean = hsum(squares) / static_cast<float>(cols);
        const F scale = set(1.0f / std::sqrt(mean + eps));
        write_row(cols, out.row<uint8_t>(t), planes,
                  [&](int64_t k) { return mul(load(weight + k), mul(load(row + k), scale)); });
    }
}

inline void quantize(Rows x, int64_t cols, Rows out, int planes, int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t)
        write_row(cols, out.row<uint8_t>(t), planes,
                  [&](int64_t k) { return load(x.row<float>(t) + k); });
}

inline void silu_mul(Rows gates, Rows ups, int64_t cols, Rows out, int planes, int64_t first,
                     int64_t last) {
    for (int64_t t = first; t < last; ++t) {
        const float* gate = gates.row<float>(t);
        const float* up = ups.row<float>(t);
        write_row(cols, out.row<uint8_t>(t), planes, [&](int64_t k) {
            const F g = load(gate + k);
            const F sigmoid = div(set(1.0f), add(set(1.0f), exp(sub(set(0.0f), g))));
            return mul(mul(g, sigmoid), load(up + k));
        });
    }
}

inline void add_rows(Rows a, Rows b, int64_t cols, Rows out, int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t)
        write_row(cols, out.row<uint8_t>(t), 0, [&](int64_t k) {
            return add(load(a.row<float>(t) + k), load(b.row<float>(t) + k));
        });
}

inline float read_weight(const uint8_t* panel, Format format, uint8_t bias8, int64_t cols,
                         int64_t r, int64_t k) {
    const uint16_t* halves = reinterpret_cast<const uint16_t*>(panel);
    if (format == Format::f32) return reinterpret_cast<const float*>(panel)[k * kPanel + r];
    if (format == Format::f16) return f16_to_f32(halves[k * kPanel + r]);
    if (format == Format::bf16) return bf16_to_f32(halves[k * kPanel + r]);
    const GroupLayout layout = group_layout(format);
    const int64_t g = k / kGroup, j = k % kGroup;
    halves += g * layout.scales / 2;
    const uint8_t* quants = panel + scales_bytes(format, cols) + g * layout.quants;
    const float d = f16_to_f32(halves[r]);
    if (format == Format::q8_0) {
        const uint8_t q = quants[j / 4 * 64 + r * 4 + j % 4];
        return d * static_cast<float>(static_cast<int8_t>(q ^ bias8));
    }
    const uint8_t byte = quants[j % 16 / 4 * 64 + r * 4 + j % 4];
    const float q = static_cast<float>(j < 16 ? byte & 15 : byte >> 4);
    if (format == Format::q4_0) return d * (q - 8.0f);
    return d * q + f16_to_f32(halves[kPanel + r]);
}

inline void embed(const uint8_t* weight, Format format, uint8_t bias8, int64_t cols,
                  const int32_t* ids, Rows out, int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) {
        const uint8_t* panel = weight + ids[t] / kPanel * panel_bytes(format, cols);
        for (int64_t k = 0; k < cols; ++k)
            out.row<float>(t)[k] = read_weight(panel, format, bias8, cols, ids[t] % kPanel, k);
    }
}

inline void rope_table(const int32_t* positions, const float* frequencies, int64_t half, Rows out,
                       int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) {
        float* row = out.row<float>(t);
        for (int64_t i = 0; i < half; ++i) {
            // The product is rounded to float32 first, as the reference models do.
            const float angle = static_cast<float>(positions[t]) * frequencies[i];
            row[i] = static_cast<float>(std::cos(static_cast<double>(angle)));
            row[half + i] = static_cast<float>(std::sin(static_cast<double>(angle)));
        }
    }
}

}  // namespace pronk::PRONK_NS
