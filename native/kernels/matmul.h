// out[t, n] = sum over k of weight[n, k] * x[t, k], on packed panels of 16 rows.
//
// One tile is kTilePanels panels by up to kTile tokens. Every token's sum runs over the groups in
// order with the same operations whatever the tile's size, so a result never depends on the batch.
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

// The integer dot products of one group of W panels and M tokens in P planes, exact; from kBase.
template <Format fmt, int P, int W, int M>
inline void tile_group(const uint8_t* const* quants, const Act* x, int64_t g, I (*dot)[W][M]) {
    const int64_t k = g * kGroup;
    const auto each = [](auto fn) {
#pragma GCC unroll 2
        for (int s = 0; s < P; ++s)
#pragma GCC unroll 8
            for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
                for (int p = 0; p < W; ++p) fn(s, p, m);
    };
    if constexpr (fmt == Format::q8_0) {
        each([&](int s, int p, int m) {
            dot[s][p][m] = set_i(kBase - kBias8 * (kBias8 ? x[m].sum[s][g] : 0));
        });
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) {
            B w[W];
#pragma GCC unroll 2
            for (int p = 0; p < W; ++p) w[p] = load_b(quants[p] + 64 * i);
            each([&](int s, int p, int m) {
                dot[s][p][m] = dot4_8bit(dot[s][p][m], w[p], x[m].q[s] + k + 4 * i);
            });
        }
    } else {
        N sum[P][W][M];
        each([&](int s, int p, int m) {
            sum[s][p][m] = start(fmt == Format::q4_0 ? -8 * x[m].sum[s][g] : 0);
        });
#pragma GCC unroll 8
        for (int i = 0; i < 4; ++i) {
            B low[W], high[W];
#pragma GCC unroll 2
            for (int p = 0; p < W; ++p) {
                const B w = load_b(quants[p] + 64 * i);
                low[p] = low_nibbles(w), high[p] = high_nibbles(w);
            }
            each([&](int s, int p, int m) {
                const int8_t* q = x[m].q[s] + k + 4 * i;
                sum[s][p][m] = dot4(dot4(sum[s][p][m], low[p], q), high[p], q + 16);
            });
        }
        each([&](int s, int p, int m) { dot[s][p][m] = total(sum[s][p][m]); });
    }
}

template <Format fmt, int P, int W, int M>
inline void tile_grouped(const uint8_t* panel, int64_t cols, const Act* x, F (*acc)[M]) {
    const GroupLayout layout = group_layout(fmt);
    const int64_t bytes = panel_bytes(fmt, cols);
    const uint8_t *scales[W], *quants[W];
    for (int p = 0; p < W; ++p) {
        scales[p] = panel + p * bytes;
        quants[p] = scales[p] + scales_bytes(fmt, cols);
        for (int m = 0; m < M; ++m) acc[p][m] = set(0.0f);
    }
    for (int64_t g = 0; g < cols / kGroup; ++g) {
        if constexpr (M == 1)  // one token waits for memory, several for arithmetic
            for (int p = 0; p < W; ++p) prefetch(quants[p] + kAhead, layout.quants);
        I dot[P][W][M];
        tile_group<fmt, P, W, M>(quants, x, g, dot);
#pragma GCC unroll 2
        for (int p = 0; p < W; ++p) {
            const F d = load_f16(reinterpret_cast<const uint16_t*>(scales[p]));
#pragma GCC unroll 8
            for (int m = 0; m < M; ++m) {
                F sum = times(dot[0][p][m], d);
                if constexpr (P == 2) sum = fma(sum, set(128.0f), times(dot[1][p][m], d));
                acc[p][m] = fma(sum, set(x[m].scale[g]), acc[p][m]);
            }
            if constexpr (fmt == Format::q4_1) {
                const F minimum = load_f16(reinterpret_cast<const uint16_t*>(scales[p]) + kPanel);
#pragma GCC unroll 8
                for (int m = 0; m < M; ++m)
                    acc[p][m] = fma(minimum, set(x[m].scaled_sum[g]), acc[p][m]);
            }
            scales[p] += layout.scales;
            quants[p] += layout.quants;
        }
    }
}

template <Format fmt>
inline F load_weights(const uint8_t* panel, int64_t k) {
    if constexpr (fmt == Format::f32)
        return load(reinterpret_cast<const float*>(panel) + k * kPanel);
    else if constexpr (fmt == Format::f16)
        return load_f16(reinterpret_cast<const uint16_t*>(panel) + k * kPanel);
    else
        return load_bf16(reinterpret_cast<const uint16_t*>(panel) + k * kPanel);
}

template <Format fmt, int W, int M>
inline void tile_float(const uint8_t* panel, int64_t cols, const float* const* x, F (*acc)[M]) {
    const int64_t bytes = panel_bytes(fmt, cols);
    for (int p = 0; p < W; ++p)
        for (int m = 0; m < M; ++m) acc[p][m] = set(0.0f);
    for (int64_t k = 0; k < cols; ++k) {
        F w[W];
#pragma GCC unroll 2
        for (int p = 0; p < W; ++p) w[p] = load_weights<fmt>(panel + p * bytes, k);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m)
#pragma GCC unroll 2
            for (int p = 0; p < W; ++p) acc[p][m] = fma(w[p], set(x[m][k]), acc[p][m]);
    }
}

// W panels by M tokens, of P planes.
template <Format fmt, int P, int W, int M>
void tile(const uint8_t* panel, const MatmulPart& part, int64_t cols, int64_t n, Rows x, Rows out,
          Rows residual, int64_t t) {
    F acc[W][M];
    if constexpr (fmt >= Format::q8_0) {
        Act rows[M];
        for (int m = 0; m < M; ++m) rows[m] = Act(x.row<uint8_t>(t + m), cols, P);
        tile_grouped<fmt, P, W, M>(panel, cols, rows, acc);
    } else {
        const float* rows[M];
        for (int m = 0; m < M; ++m) rows[m] = x.row<float>(t + m);
        tile_float<fmt, W, M>(panel, cols, rows, acc);
    }
#pragma GCC unroll 2
    for (int p = 0; p < W; ++p) {
        const int64_t row = n + p * kPanel, column = part.column + row;
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
            F y = acc[p][m];
            if (part.bias) y = add(y, load(part.bias + row));
            if (residual.data) y = add(y, load(residual.row<float>(t + m) + column));
            store(out.row<float>(t + m) + column, y);
        }
    }
}

template <Format fmt, int P, int W>
void matmul_panels(const MatmulPart& part, int64_t cols, Rows x, Rows out, Rows residual,
                   int64_t tokens, int64_t p) {
    const uint8_t* panel = part.weight + p * panel_bytes(fmt, cols);
    int64_t t = 0;
    for (; t + kTile <= tokens; t += kTile)
        tile<fmt, P, W, kTile>(panel, part, cols, p * kPanel, x, out, residual, t);
    for (; t + 2 <= tokens; t += 2)
        tile<fmt, P, W, 2>(panel, part, cols, p * kPanel, x, out, residual, t);
    if (t < tokens) tile<fmt, P, W, 1>(panel, part, cols, p * kPanel, x, out, residual, t);
}

template <Format fmt, int P>
void matmul_format(const MatmulPart& part, int64_t cols, Rows x, Rows out, Rows residual,
                   int64_t tokens, int64_t first, int64_t last) {
    int64_t p = first;
    for (; p + kTilePanels <= last; p += kTilePanels)
        matmul_panels<fmt, P, kTilePanels>(part, cols, x, out, residual, tokens, p);
    for (; p < last; ++p) matmul_panels<fmt, P, 1>(part, cols, x, out, residual, tokens, p);
}

inline void matmul(const MatmulPart& part, int planes, int64_t cols, Rows x, Rows out,
                   Rows residual, int64_t tokens, int64_t first, int64_t last) {
    switch (part.format) {
#define PRONK_CASE(f, p) \
    case Format::f:      \
        return matmul_format<Format::f, p>(part, cols, x, out, residual, tokens, first, last);
#define PRONK_GROUPED(f)                                                                         \
    case Format::f:                                                                              \
        return (planes == 2 ? matmul_format<Format::f, 2>                                        \
                            : matmul_format<Format::f, 1>)(part, cols, x, out, residual, tokens, \
                                                           first, last);
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
