// out[t, n] = sum over k of weight[n, k] * x[t, k], on packed panels of 16 rows.
//
// One tile is a panel by up to kTile tokens. Every token's sum runs over the groups in order
// with the same operations whatever the tile's size, so a result never depends on the batch.
#pragma once
#include "kernels.h"
#include "vec.h"

namespace pronk::PRONK_NS {

struct Act {  // one quantized row of activations (formats.h)
    const int8_t* q[2];
    const float* scale;
    const float* scaled_sum;
    const int32_t* sum[2];
    Act() = default;
    Act(const uint8_t* row, int64_t cols, int planes) {
        const int64_t groups = cols / kGroup;
        q[0] = reinterpret_cast<const int8_t*>(row);
        q[1] = q[0] + cols;
        scale = reinterpret_cast<const float*>(row + planes * cols);
        scaled_sum = scale + groups;
        sum[0] = reinterpret_cast<const int32_t*>(scaled_sum + groups);
        sum[1] = sum[0] + groups;
    }
};

// The integer dot products of one group with one plane of the activations, exact.
template <Format fmt, int M>
inline void tile_group(const uint8_t* quants, const Act* x, int plane, int64_t g, F* dot) {
    const int64_t k = g * kGroup;
    if constexpr (fmt == Format::q8_0) {
        I sum[M];
        for (int m = 0; m < M; ++m) sum[m] = set_i(-kBias8 * (kBias8 ? x[m].sum[plane][g] : 0));
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) {
            const B w = load_b(quants + 64 * i);
#pragma GCC unroll 8
            for (int m = 0; m < M; ++m) sum[m] = dot4_8bit(sum[m], w, x[m].q[plane] + k + 4 * i);
        }
        for (int m = 0; m < M; ++m) dot[m] = to_float(sum[m]);
    } else {
        N sum[M];
        for (int m = 0; m < M; ++m) sum[m] = start(fmt == Format::q4_0 ? -8 * x[m].sum[plane][g] : 0);
#pragma GCC unroll 8
        for (int i = 0; i < 4; ++i) {
            const B w = load_b(quants + 64 * i);
            const B low = low_nibbles(w), high = high_nibbles(w);
#pragma GCC unroll 8
            for (int m = 0; m < M; ++m) {
                sum[m] = dot4(sum[m], low, x[m].q[plane] + k + 4 * i);
                sum[m] = dot4(sum[m], high, x[m].q[plane] + k + 16 + 4 * i);
            }
        }
        for (int m = 0; m < M; ++m) dot[m] = to_float(total(sum[m]));
    }
}

template <Format fmt, int P, int M>
inline void tile_grouped(const uint8_t* panel, int64_t cols, const Act* x, F* acc) {
    const GroupLayout layout = group_layout(fmt);
    const uint8_t* scales = panel;
    const uint8_t* quants = panel + scales_bytes(fmt, cols);
    for (int m = 0; m < M; ++m) acc[m] = set(0.0f);
    for (int64_t g = 0; g < cols / kGroup; ++g) {
        F dot[M];
        tile_group<fmt, M>(quants, x, 0, g, dot);
        if constexpr (P == 2) {
            F low[M];
            tile_group<fmt, M>(quants, x, 1, g, low);
#pragma GCC unroll 8
            for (int m = 0; m < M; ++m) dot[m] = fma(dot[m], set(128.0f), low[m]);
        }
        const F d = load_f16(reinterpret_cast<const uint16_t*>(scales));
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) acc[m] = fma(dot[m], mul(d, set(x[m].scale[g])), acc[m]);
        if constexpr (fmt == Format::q4_1) {
            const F minimum = load_f16(reinterpret_cast<const uint16_t*>(scales) + kPanel);
#pragma GCC unroll 8
            for (int m = 0; m < M; ++m) acc[m] = fma(minimum, set(x[m].scaled_sum[g]), acc[m]);
        }
        scales += layout.scales;
        quants += layout.quants;
    }
}

template <Format fmt, int M>
inline void tile_float(const uint8_t* panel, int64_t cols, const float* const* x, F* acc) {
    for (int m = 0; m < M; ++m) acc[m] = set(0.0f);
    for (int64_t k = 0; k < cols; ++k) {
        F w;
        if constexpr (fmt == Format::f32)
            w = load(reinterpret_cast<const float*>(panel) + k * kPanel);
        else if constexpr (fmt == Format::f16)
            w = load_f16(reinterpret_cast<const uint16_t*>(panel) + k * kPanel);
        else
            w = load_bf16(reinterpret_cast<const uint16_t*>(panel) + k * kPanel);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) acc[m] = fma(w, set(x[m][k]), acc[m]);
    }
}

template <Format fmt, int P, int M>
void tile(const uint8_t* panel, const MatmulPart& part, int64_t cols, int64_t n, Rows x, Rows out,
          Rows residual, int64_t t) {
    F acc[M];
    if constexpr (fmt >= Format::q8_0) {
        Act rows[M];
        for (int m = 0; m < M; ++m) rows[m] = Act(x.row<uint8_t>(t + m), cols, P);
        tile_grouped<fmt, P, M>(panel, cols, rows, acc);
    } else {
        const float* rows[M];
        for (int m = 0; m < M; ++m) rows[m] = x.row<float>(t + m);
        tile_float<fmt, M>(panel, cols, rows, acc);
    }
    const int64_t column = part.column + n;
    for (int m = 0; m < M; ++m) {
        if (part.bias) acc[m] = add(acc[m], load(part.bias + n));
        if (residual.data) acc[m] = add(acc[m], load(residual.row<float>(t + m) + column));
        store(out.row<float>(t + m) + column, acc[m]);
    }
}

template <Format fmt, int P>
void matmul_format(const MatmulPart& part, int64_t cols, Rows x, Rows out, Rows residual,
                   int64_t tokens, int64_t first, int64_t last) {
    const int64_t bytes = panel_bytes(fmt, cols);
    for (int64_t p = first; p < last; ++p) {
        const uint8_t* panel = part.weight + p * bytes;
        int64_t t = 0;
        for (; t + kTile <= tokens; t += kTile)
            tile<fmt, P, kTile>(panel, part, cols, p * kPanel, x, out, residual, t);
        for (; t + 2 <= tokens; t += 2)
            tile<fmt, P, 2>(panel, part, cols, p * kPanel, x, out, residual, t);
        if (t < tokens) tile<fmt, P, 1>(panel, part, cols, p * kPanel, x, out, residual, t);
    }
}

inline void matmul(const MatmulPart& part, int planes, int64_t cols, Rows x, Rows out, Rows residual,
                   int64_t tokens, int64_t first, int64_t last) {
    switch (part.format) {
#define PRONK_CASE(f, p) \
    case Format::f: return matmul_format<Format::f, p>(part, cols, x, out, residual, tokens, first, last);
#define PRONK_GROUPED(f)                                                            \
    case Format::f:                                                                 \
        return (planes == 2 ? matmul_format<Format::f, 2> : matmul_format<Format::f, 1>)( \
            part, cols, x, out, residual, tokens, first, last);
        PRONK_CASE(f32, 0)
        PRONK_CASE(f16, 0)
        PRONK_CASE(bf16, 0)
        PRONK_GROUPED(q8_0)
        PRONK_GROUPED(q4_0)
        PRONK_GROUPED(q4_1)
#undef PRONK_CASE
#undef PRONK_GROUPED
    }
}

}  // namespace pronk::PRONK_NS
