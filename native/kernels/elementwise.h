// Kernels that work on one token's row at a time: norms, activations, quantization, embedding.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>

#include "activations.h"
#include "half.h"
#include "kernels.h"
#include "unpack.h"
#include "vec.h"

namespace pronk::PRONK_NS {

// 16 integral floats to int8; returns their sum.
inline int32_t store_i8_sum(F x, int8_t* q) {
    const I i = to_int(x);
    store_i8(q, i);
    return hsum(i);
}

// One group of 32 floats of row t to integers with their scale and sums (formats.h).
template <Precision to>
inline void quantize_group(F a, F b, int64_t g, int64_t groups, Rows out, int64_t t) {
    const int64_t r = t % kActRows;
    uint8_t* block = out.data + (t - r) * out.stride;
    int8_t* q = reinterpret_cast<int8_t*>(block) + (r * groups + g) * act_group(to);
    float* scale =
        reinterpret_cast<float*>(block + kActRows * groups * act_group(to)) + g * 64 + 4 * r;
    constexpr float range = act_range(to);
    const float top = hmax(max(abs(a), abs(b)));
    // 0, or NaN where one of them is infinite or NaN, which a maximum may pass over.
    const float shown = hsum(add(sub(a, a), sub(b, b)));
    // Below 1e-30 the inverse could overflow.
    const F inverse = set(top > 1e-30f ? range / top : 0.0f);
    const F low = set(-range), high = set(range);
    a = round(min(max(mul(a, inverse), low), high));
    b = round(min(max(mul(b, inverse), low), high));
    int32_t first, second;
    if constexpr (to == Precision::a8) {
        first = store_i8_sum(a, q);
        second = store_i8_sum(b, q + 16);
    } else {
        const F ha = round(mul(a, set(1.0f / kSplit))), hb = round(mul(b, set(1.0f / kSplit)));
        const F down = set(-kSplit);  // what is left is in [-8, 8], and exact
        first = kSplit * store_i8_sum(ha, q) + store_i8_sum(fma(ha, down, a), q + 32);
        second = kSplit * store_i8_sum(hb, q + 16) + store_i8_sum(fma(hb, down, b), q + 48);
    }
    scale[0] = top / range + shown;
    scale[1] = scale[0] * static_cast<float>(first + second);
    std::memcpy(scale + 2, &first, 4);
    std::memcpy(scale + 3, &second, 4);
}

// Writes values of row t, produced 16 at a time by fn(k), as floats or as quantized groups.
template <class Fn>
inline void write_row(int64_t cols, Rows out, int64_t t, Precision to, Fn fn) {
    for (int64_t k = 0; k < cols; k += kGroup) {
        const F a = fn(k), b = fn(k + 16);
        if (to == Precision::a8) {
            quantize_group<Precision::a8>(a, b, k / kGroup, cols / kGroup, out, t);
        } else if (to == Precision::a12) {
            quantize_group<Precision::a12>(a, b, k / kGroup, cols / kGroup, out, t);
        } else {
            store(out.row<float>(t) + k, a);
            store(out.row<float>(t) + k + 16, b);
        }
    }
}

inline void rms_norm(Rows x, const float* weight, float eps, int64_t cols, Rows residual, Rows out,
                     Precision to, int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) {
        const float* row = x.row<float>(t);
        F squares = set(0.0f);
        for (int64_t k = 0; k < cols; k += 16) squares = fma(load(row + k), load(row + k), squares);
        const float mean = hsum(squares) / static_cast<float>(cols);
        const F scale = set(1.0f / std::sqrt(mean + eps));
        const auto normed = [&](int64_t k) {
            return mul(load(weight + k), mul(load(row + k), scale));
        };
        if (residual.data)
            write_row(cols, out, t, Precision::f32,
                      [&](int64_t k) { return add(normed(k), load(residual.row<float>(t) + k)); });
        else
            write_row(cols, out, t, to, normed);
    }
}

inline void layer_norm(Rows x, const float* weight, float eps, int64_t cols, Rows out, Precision to,
                       int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) {
        const float* row = x.row<float>(t);
        F sum = set(0.0f), squares = set(0.0f);
        for (int64_t k = 0; k < cols; k += 16) sum = add(sum, load(row + k));
        const F mean = set(hsum(sum) / static_cast<float>(cols));
        for (int64_t k = 0; k < cols; k += 16) {
            const F d = sub(load(row + k), mean);
            squares = fma(d, d, squares);
        }
        const F scale = set(1.0f / std::sqrt(hsum(squares) / static_cast<float>(cols) + eps));
        write_row(cols, out, t, to, [&](int64_t k) {
            return mul(load(weight + k), mul(sub(load(row + k), mean), scale));
        });
    }
}

inline void quantize(Rows x, int64_t cols, Rows out, Precision to, int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t)
        write_row(cols, out, t, to, [&](int64_t k) { return load(x.row<float>(t) + k); });
}

// Half a group: values below the threshold become zero (a NaN stays), then all are counted. Gives
// how many are left.
inline int sparsify(F& x, const Sparsity& sparsity) {
    float values[16];
    int left = 0;
    store(values, abs(x));
    float kept[16];
    store(kept, x);
    for (int i = 0; i < 16; ++i) {
        if (values[i] < sparsity.threshold) kept[i] = values[i] = 0;
        left += values[i] != 0;
    }
    if (sparsity.counts)
        for (const float value : values) {
            uint32_t bits;
            std::memcpy(&bits, &value, 4);
            __atomic_fetch_add(sparsity.counts + (bits >> kMagnitudeShift), 1, __ATOMIC_RELAXED);
        }
    x = load(kept);
    return left;
}

// A row of an MLP's activations, produced 16 at a time by fn(k), as `sparsity` has them.
template <class Fn>
inline void write_sparse_row(int64_t cols, Rows out, int64_t t, Precision to,
                             const Sparsity& sparsity, Fn fn) {
    int64_t zero_groups = 0;
    int left = 0;
    write_row(cols, out, t, to, [&](int64_t k) {
        F x = fn(k);
        left = sparsify(x, sparsity) + (k % kGroup ? left : 0);
        if (k % kGroup) zero_groups += left == 0;
        return x;
    });
    if (!sparsity.counts) return;
    const auto groups = static_cast<uint64_t>(cols / kGroup);
    __atomic_fetch_add(sparsity.counts + kMagnitudes, groups, __ATOMIC_RELAXED);
    __atomic_fetch_add(sparsity.counts + kMagnitudes + 1, static_cast<uint64_t>(zero_groups),
                       __ATOMIC_RELAXED);
}

template <Activation fn>
inline void activate_rows(Rows gates, Rows ups, int64_t cols, Rows out, Precision to,
                          const Sparsity& sparsity, int64_t first, int64_t last) {
    const auto write = [&](int64_t t, auto values) {
        if (sparsity.threshold > 0 || sparsity.counts)
            write_sparse_row(cols, out, t, to, sparsity, values);
        else
            write_row(cols, out, t, to, values);
    };
    for (int64_t t = first; t < last; ++t) {
        const float* gate = gates.row<float>(t);
        if (ups.data)
            write(t, [&](int64_t k) {
                return mul(activated<fn>(load(gate + k)), load(ups.row<float>(t) + k));
            });
        else
            write(t, [&](int64_t k) { return activated<fn>(load(gate + k)); });
    }
}

inline void activate(Activation fn, Rows gates, Rows ups, int64_t cols, Rows out, Precision to,
                     const Sparsity& sparsity, int64_t first, int64_t last) {
    using Run = void (*)(Rows, Rows, int64_t, Rows, Precision, const Sparsity&, int64_t, int64_t);
    static constexpr Run runs[] = {activate_rows<Activation::silu>, activate_rows<Activation::gelu>,
                                   activate_rows<Activation::gelu_tanh>,
                                   activate_rows<Activation::relu>};
    runs[static_cast<int>(fn)](gates, ups, cols, out, to, sparsity, first, last);
}

inline void softcap(Rows x, float cap, int64_t cols, Rows out, int64_t first, int64_t last) {
    const int64_t pieces = (cols + kCapPiece - 1) / kCapPiece;
    const F top = set(cap), inverse = set(1.0f / cap);
    for (int64_t i = first; i < last; ++i) {
        const int64_t t = i / pieces, from = i % pieces * kCapPiece;
        const int64_t to = std::min(cols, from + kCapPiece);
        for (int64_t k = from; k < to; k += 16)
            store(out.row<float>(t) + k, mul(top, tanh(mul(load(x.row<float>(t) + k), inverse))));
    }
}

inline void add_rows(Rows a, Rows b, int64_t cols, Rows out, int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t)
        write_row(cols, out, t, Precision::f32, [&](int64_t k) {
            return add(load(a.row<float>(t) + k), load(b.row<float>(t) + k));
        });
}

// Row `row` of a packed matrix, as floats.
template <Format fmt>
inline void read_row(const MatmulPart& table, int64_t cols, int64_t row, float* out) {
    const uint8_t* panel = table.weight + row / kPanel * panel_bytes(fmt, cols);
    const int64_t r = row % kPanel;
    if constexpr (!is_grouped(fmt)) {
        const uint16_t* halves = reinterpret_cast<const uint16_t*>(panel) + r;
        const float* floats = reinterpret_cast<const float*>(panel) + r;
        for (int64_t k = 0; k < cols; ++k)
            out[k] = fmt == Format::f32   ? floats[k * kPanel]
                     : fmt == Format::f16 ? f16_to_f32(halves[k * kPanel])
                                          : bf16_to_f32(halves[k * kPanel]);
    } else {
        const uint8_t* plane = low_panel(fmt, table.weight, table.rows, cols, row / kPanel);
        for (int64_t g = 0; g < cols / kGroup; ++g) {
            F d[2], m;
            float scale[2][kPanel], minimum[kPanel] = {};
            const GroupPlace place = place_of(fmt, cols / kGroup, g);
            unpack_scales<fmt>(panel + place.scales, g, d, m);
            for (int h = 0; h < traits(fmt).halves; ++h) store(scale[h], d[h]);
            if constexpr (traits(fmt).minimum) store(minimum, m);
            uint8_t bytes[8][64];
            unrolled<4>([&]<int i>() {
                B low, high;
                unpack_quants<fmt, i>(panel + place.quants, plane, low, high);
                store_b(bytes[i], low);
                store_b(bytes[i + 4], high);
            });
            for (int j = 0; j < kGroup; ++j) {
                const uint8_t u = bytes[j / 4][4 * r + j % 4];
                const int q = traits(fmt).bits == 8 ? static_cast<int8_t>(u ^ kBias8)
                                                    : u - traits(fmt).offset;
                const float of = scale[traits(fmt).halves == 2 ? j / 16 : 0][r];
                out[g * kGroup + j] = of * static_cast<float>(q) + minimum[r];
            }
            plane += low_bytes(fmt);
        }
    }
}

inline void embed(const MatmulPart& table, int64_t cols, float scale, const int32_t* ids, Rows out,
                  int64_t first, int64_t last) {
    using Read = void (*)(const MatmulPart&, int64_t, int64_t, float*);
    static constexpr Read readers[kFormats] = {
        read_row<Format::f32>,  read_row<Format::f16>,  read_row<Format::bf16>,
        read_row<Format::q8_0>, read_row<Format::q4_0>, read_row<Format::q4_1>,
        read_row<Format::q5_0>, read_row<Format::q5_1>, read_row<Format::q4_k>,
        read_row<Format::q5_k>, read_row<Format::q6_k>, read_row<Format::q8_planes>};
    for (int64_t t = first; t < last; ++t) {
        float* row = out.row<float>(t);
        readers[static_cast<int>(table.format)](table, cols, ids[t], row);
        if (scale != 1.0f)
            for (int64_t k = 0; k < cols; ++k) row[k] *= scale;
    }
}

inline void rope_table(const int32_t* positions, const float* frequencies, float scale,
                       int64_t half, Rows out, int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) {
        float* row = out.row<float>(t);
        for (int64_t i = 0; i < half; ++i) {
            // The product is rounded to float32 first, as the reference models do.
            const float angle = static_cast<float>(positions[t]) * frequencies[i];
            row[i] = scale * static_cast<float>(std::cos(static_cast<double>(angle)));
            row[half + i] = scale * static_cast<float>(std::sin(static_cast<double>(angle)));
        }
    }
}

}  // namespace pronk::PRONK_NS
