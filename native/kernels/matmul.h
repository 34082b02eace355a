// out[t, n] = sum over k of weight[n, k] * x[t, k], on packed panels of 16 rows.
//
// One tile is kTilePanels panels by up to kTile tokens. Every token's sum runs over the groups in
// order with the same operations whatever the tile's size, so a result never depends on the batch.
#pragma once
#include <type_traits>

#include "kernels.h"
#include "matmul_row.h"
#if defined(PRONK_AMX)
#include "matmul_tiles.h"
#endif
#include "unpack.h"
#include "vec.h"

namespace pronk::PRONK_NS {

// fn<p, m>() for every panel and token of a tile.
template <int W, int M, class Fn>
[[gnu::always_inline]] inline void each_sum(Fn fn) {
    unrolled<W * M>([&]<int i>()
                        __attribute__((always_inline)) { fn.template operator()<i / M, i % M>(); });
}

// The integer dot products of one group (or of its halves) of W panels and M tokens, exact, and
// `base` more.
template <Format fmt, Precision of, int W, int M, int32_t base = 0>
[[gnu::always_inline]] inline void tile_group(const uint8_t* const* quants,
                                              const uint8_t* const* planes, const Act* x, int64_t g,
                                              I (*dot)[W][M]) {
    constexpr int H = traits(fmt).halves, S = act_group(of) / kGroup;
    constexpr bool nibbles = traits(fmt).bits == 4;
    using Acc = std::conditional_t<nibbles, N, I>;
    constexpr bool wide = std::is_same_v<Acc, I>;  // sums that can start at what is to be added
    Acc sum[S][H][W][M];
    I start[H][M];
    unrolled<H * M>([&]<int i>() __attribute__((always_inline)) {
        constexpr int h = i / M, m = i % M;
        int32_t at = base;
        if constexpr (kOffset<fmt> != 0) {
            int32_t of_x = x[m].sum[h][g * kActStep];
            if constexpr (H == 1) of_x += x[m].sum[1][g * kActStep];
            at -= kOffset<fmt> * of_x;
        }
        start[h][m] = set_i(at);
    });
    each_sum<W, M>([&]<int p, int m>() __attribute__((always_inline)) {
        unrolled<S * H>([&]<int i>() __attribute__((always_inline)) {
            constexpr int s = i / H, h = i % H;
            if constexpr (!wide)
                sum[s][h][p][m] = zero_n();
            else
                sum[s][h][p][m] = s == S - 1 ? start[h][m] : set_i(0);
        });
    });
    unrolled<4>([&]<int i>() __attribute__((always_inline)) {
        B low[W], high[W];
        unrolled<W>([&]<int p>() __attribute__((always_inline)) {
            unpack_quants<fmt, i>(quants[p], planes[p], low[p], high[p]);
        });
        unrolled<S>([&]<int s>() __attribute__((always_inline)) {
            each_sum<W, M>([&]<int p, int m>() __attribute__((always_inline)) {
                const int8_t* q = x[m].q + g * act_group(of) + s * kGroup + 4 * i;
                auto& a = sum[s][0][p][m];
                auto& b = sum[s][H - 1][p][m];
                if constexpr (nibbles) {
                    a = dot4(a, low[p], q);
                    b = dot4(b, high[p], q + 16);
                } else {
                    a = dot4_8bit(a, low[p], q);
                    b = dot4_8bit(b, high[p], q + 16);
                }
            });
        });
    });
    each_sum<W, M>([&]<int p, int m>() __attribute__((always_inline)) {
        unrolled<H>([&]<int h>() __attribute__((always_inline)) {
            const auto of_half = [&](int s) {
                if constexpr (wide)
                    return sum[s][h][p][m];
                else
                    return total(sum[s][h][p][m]);
            };
            I all = of_half(S - 1);
            if constexpr (S == 2) all = add(shift_left<4>(of_half(0)), all);
            if constexpr (!wide) all = add(all, start[h][m]);
            dot[h][p][m] = all;
        });
    });
}

// The groups of a token that are not zero throughout, in order; the sum of the others is zero.
struct Groups {
    static constexpr int64_t kMost = 2048;
    int32_t at[kMost];
    int64_t count = 0;
};

// All groups, or those of `listed`. Weights are asked for so many bytes `ahead`, unless it is 0.
template <Format fmt, Precision of, int W, int M, bool all = true>
[[gnu::always_inline]] inline void tile_grouped(const uint8_t* panel, const uint8_t* plane,
                                                int64_t cols, const Act* x, F (*acc)[M],
                                                int64_t ahead, const Groups* listed = nullptr) {
    constexpr int H = traits(fmt).halves;
    constexpr int64_t kListAhead = kAhead / quant_bytes(fmt);
    const int64_t bytes = panel_bytes(fmt, cols), groups = cols / kGroup;
    each_sum<W, M>([&]<int p, int m>() { acc[p][m] = set(0.0f); });
    const int64_t count = all ? groups : listed->count, share = bytes / groups;
    for (int64_t i = 0; i < count; ++i) {
        const int64_t g = all ? i : listed->at[i];
        const GroupPlace place = place_of(fmt, groups, g);
        const uint8_t *scales[W], *quants[W], *planes[W];
        for (int p = 0; p < W; ++p) {
            scales[p] = panel + p * bytes + place.scales;
            quants[p] = panel + p * bytes + place.quants;
            planes[p] = plane + (p * groups + g) * low_bytes(fmt);
        }
        if (all && ahead) {
            int64_t at = g * share + ahead;
            if (at >= bytes) at += (W - 1) * bytes;  // in the panels behind these
            for (int p = 0; p < W; ++p) {
                prefetch(panel + p * bytes + at, share);
                prefetch(planes[p] + (at - g * share) * low_bytes(fmt) / share, low_bytes(fmt));
            }
        }
        if constexpr (!all) {
            int64_t after = i + kListAhead, panels = 0;  // in the panels behind these, at the end
            for (; after >= count; after -= count) panels += W;
            const GroupPlace next = place_of(fmt, groups, listed->at[after]);
            for (int p = 0; p < W; ++p)
                prefetch(panel + (panels + p) * bytes + next.quants, quant_bytes(fmt));
        }
        I dot[H][W][M];
        constexpr bool based = kBased<fmt, of>;
        tile_group<fmt, of, W, M, based ? kBase : 0>(quants, planes, x, g, dot);
        unrolled<W>([&]<int p>() __attribute__((always_inline)) {
            F d[2], minimum;
            unpack_scales<fmt>(scales[p], g, d, minimum);
            F minus[H];
            for (int h = 0; h < H; ++h) minus[h] = mul(d[h], set(-kBaseValue));
            unrolled<M>([&]<int m>() __attribute__((always_inline)) {
                F sum;
                if constexpr (based) {
                    sum = fma(as_float(dot[0][p][m]), d[0], minus[0]);
                    if constexpr (H == 2)
                        sum = add(sum, fma(as_float(dot[1][p][m]), d[1], minus[1]));
                } else {
                    sum = mul(to_float(dot[0][p][m]), d[0]);
                    if constexpr (H == 2) sum = fma(to_float(dot[1][p][m]), d[1], sum);
                }
                acc[p][m] = add_group<fmt>(acc[p][m], sum, set(x[m].scale[g * kActStep]), minimum,
                                           set(x[m].scaled_sum[g * kActStep]));
            });
        });
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

// W panels from the first on by M tokens.
template <Format fmt, Precision of, int W, int M>
void tile(const MatmulPart& part, int64_t cols, int64_t first, Rows x, Rows out, Rows residual,
          int64_t t, int64_t ahead) {
    const uint8_t* panel = part.weight + first * panel_bytes(fmt, cols);
    F acc[W][M];
    if constexpr (is_grouped(fmt)) {
        Act rows[M];
        for (int m = 0; m < M; ++m) rows[m] = Act(x, of, t + m, cols);
        const uint8_t* plane = low_panel(fmt, part.weight, part.rows, cols, first);
        tile_grouped<fmt, of, W, M>(panel, plane, cols, rows, acc, ahead);
    } else {
        const float* rows[M];
        for (int m = 0; m < M; ++m) rows[m] = x.row<float>(t + m);
        tile_float<fmt, W, M>(panel, cols, rows, acc);
    }
#pragma GCC unroll 2
    for (int p = 0; p < W; ++p) {
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m)
            finish_row(part, (first + p) * kPanel, t + m, acc[p][m], out, residual);
    }
}

template <Format fmt, Precision of, int W>
void matmul_panels(const MatmulPart& part, int64_t cols, Rows x, Rows out, Rows residual,
                   int64_t from, int64_t tokens, int64_t p) {
    // The first tokens read the panels from memory: one stream a CPU foresees by itself, and two
    // better if told. The last ones ask for the next panels.
    const auto ahead = [&](int64_t t, int M) {
        if (t == from) return W == 1 ? int64_t(0) : kAhead;
        return t + M < tokens ? int64_t(0) : panel_bytes(fmt, cols);
    };
    int64_t t = from;
    if constexpr (of == Precision::a8) {
        constexpr int M = kTilePanels * kTile;  // of a panel's sums as many as of a tile's
        for (int i = 0; i < W; ++i)
            for (t = from; t + M <= tokens; t += M)
                tile<fmt, of, 1, M>(part, cols, p + i, x, out, residual, t,
                                    t == from ? 0 : ahead(t, 2 * M - 1));
    }
    for (; t + kTile <= tokens; t += kTile)
        tile<fmt, of, W, kTile>(part, cols, p, x, out, residual, t, ahead(t, kTile));
    for (; t + 2 <= tokens; t += 2)
        tile<fmt, of, W, 2>(part, cols, p, x, out, residual, t, ahead(t, 2));
    if (t < tokens) tile<fmt, of, W, 1>(part, cols, p, x, out, residual, t, ahead(t, 1));
}

// Skipping pays where few groups are left: memory is read best in one go.
constexpr int64_t kSparse = 4;

// One token whose groups are mostly zero; false where they are not, and nothing is done.
template <Format fmt, Precision of, int W>
bool matmul_sparse(const MatmulPart& part, int64_t cols, Rows x, Rows out, Rows residual,
                   int64_t first, int64_t last) {
    const int64_t groups = cols / kGroup, most = groups / kSparse;
    if (groups > Groups::kMost * kSparse) return false;
    const Act row(x, of, 0, cols);
    Groups listed;
    for (int64_t g = 0; g < groups; ++g) {
        if (row.scale[g * kActStep] == 0.0f) continue;
        if (listed.count == most) return false;
        listed.at[listed.count++] = static_cast<int32_t>(g);
    }
    int64_t p = first;
    const auto run = [&]<int w>() {
        F acc[w][1];
        const uint8_t* panel = part.weight + p * panel_bytes(fmt, cols);
        const uint8_t* plane = low_panel(fmt, part.weight, part.rows, cols, p);
        tile_grouped<fmt, of, w, 1, false>(panel, plane, cols, &row, acc, 0, &listed);
        for (int i = 0; i < w; ++i) finish_row(part, (p + i) * kPanel, 0, acc[i][0], out, residual);
        p += w;
    };
    while (p + W <= last) run.template operator()<W>();
    while (p < last) run.template operator()<1>();
    return true;
}

// Up to so many tokens wait for weights rather than for products: a panel at a time, one stream.
template <Precision of>
constexpr int64_t few_tokens(int64_t cols) {
    return of == Precision::a8 && cols <= 1024 ? 4 : 2;  // rows that stay in the first cache
}

template <Format fmt, Precision of>
void matmul_format(const MatmulPart& part, int64_t cols, Rows x, Rows out, Rows residual,
                   int64_t tokens, int64_t first, int64_t last) {
    constexpr int W = traits(fmt).halves == 2 ? 1 : kTilePanels;  // halves take registers twice
    int64_t tiled = 0;
    if constexpr (is_grouped(fmt))
        if (tokens == 1 && part.sparse &&
            matmul_sparse<fmt, of, W>(part, cols, x, out, residual, first, last))
            return;
#if defined(PRONK_AMX)
    if constexpr (of == Precision::a12) {
        const int64_t rest = tokens % kActRows;
        tiled = rest <= kVectorTokens ? tokens - rest : tokens;
        if (tiled) matmul_tiles<fmt>(part, cols, x, out, residual, tiled, first, last);
    }
#endif
    if (tiled == tokens) return;
    int64_t p = first;
    for (; tokens - tiled > few_tokens<of>(cols) && p + W <= last; p += W)
        matmul_panels<fmt, of, W>(part, cols, x, out, residual, tiled, tokens, p);
    for (; p < last; ++p) matmul_panels<fmt, of, 1>(part, cols, x, out, residual, tiled, tokens, p);
}

template <Precision of>
void matmul_rows(const MatmulPart& part, int64_t cols, Rows x, Rows out, Rows residual,
                 int64_t tokens, int64_t first, int64_t last) {
    const auto run = [&]<Format fmt>() {
        matmul_format<fmt, of>(part, cols, x, out, residual, tokens, first, last);
    };
    if constexpr (of == Precision::f32) {
        switch (part.format) {
            case Format::f32: return run.template operator()<Format::f32>();
            case Format::f16: return run.template operator()<Format::f16>();
            default: return run.template operator()<Format::bf16>();
        }
    } else {
        switch (part.format) {
            case Format::q4_0: return run.template operator()<Format::q4_0>();
            case Format::q4_1: return run.template operator()<Format::q4_1>();
            case Format::q5_0: return run.template operator()<Format::q5_0>();
            case Format::q5_1: return run.template operator()<Format::q5_1>();
            case Format::q4_k: return run.template operator()<Format::q4_k>();
            case Format::q5_k: return run.template operator()<Format::q5_k>();
            case Format::q6_k: return run.template operator()<Format::q6_k>();
            case Format::q8_planes: return run.template operator()<Format::q8_planes>();
            default: return run.template operator()<Format::q8_0>();
        }
    }
}

inline void matmul(const MatmulPart& part, int64_t cols, Rows x, Precision of_x, Rows out,
                   Rows residual, int64_t tokens, int64_t first, int64_t last) {
    using Run = void (*)(const MatmulPart&, int64_t, Rows, Rows, Rows, int64_t, int64_t, int64_t);
    static constexpr Run runs[] = {matmul_rows<Precision::f32>, matmul_rows<Precision::a8>,
                                   matmul_rows<Precision::a12>};
    runs[static_cast<int>(of_x)](part, cols, x, out, residual, tokens, first, last);
}

}  // namespace pronk::PRONK_NS
