// The largest logits of a row without reading all of the head's weights (q8_planes).
//
// A weight is d * (16 h + l - 128) with nibbles h and l. With l at its middle, 7.5, the upper plane
// alone gives a logit that errs by at most the sum over the groups of |d| * 7.5 * |x|, for |x| the
// sum of a group's magnitudes: a bound on every logit from half of the bytes. The groups with the
// largest |x| then have their l read, where a row's bound still reaches the least that counts, and
// what still does so at the end is multiplied as it would be without bounds: the same bits.
//
// Bounds are floats too, so all that rounding can do is added to them: the terms of a sum are at
// most 128 * |d| * |x|, and no sum here or in the product itself has more than 3 (groups + 4)
// roundings.
#pragma once
#include <limits>

#include "kernels.h"
#include "matmul.h"

namespace pronk::PRONK_NS {

constexpr float kUnread = 7.5f;  // farthest that a nibble is from its middle

// Per row of x: what the unread nibbles of each group can add to d, and the groups, largest first.
template <Precision of>
void plan_bounds_of(Rows x, int64_t cols, Rows plan, int64_t first, int64_t last) {
    const int64_t groups = cols / kGroup;
    for (int64_t t = first; t < last; ++t) {
        const Act act(x, of, t, cols);
        const BoundPlan row(plan, t, cols);
        for (int64_t g = 0; g < groups; ++g) {
            const int8_t* q = act.q + g * act_group(of);
            int32_t magnitude = 0;
            for (int k = 0; k < kGroup; ++k) {
                const int32_t value = of == Precision::a8 ? q[k] : kSplit * q[k] + q[k + kGroup];
                magnitude += value < 0 ? -value : value;
            }
            row.reach[g] = kUnread * static_cast<float>(magnitude) * act.scale[g * kActStep];
            int64_t i = g;
            // A reach that is NaN stays where it is.
            for (; i > 0 && row.reach[row.order[i - 1]] < row.reach[g]; --i)
                row.order[i] = row.order[i - 1];
            row.order[i] = static_cast<int32_t>(g);
        }
    }
}

inline int32_t sum_of(const Act& x, int64_t g) {
    return x.sum[0][g * kActStep] + x.sum[1][g * kActStep];
}

inline F panel_scales(const uint8_t* panel, int64_t groups, int64_t g) {
    F d[2], none;
    const uint8_t* scales = panel + place_of(Format::q8_planes, groups, g).scales;
    unpack_scales<Format::q8_planes>(scales, g, d, none);
    return d[0];
}

inline int live_rows(const MatmulPart& part, int64_t p) {
    return static_cast<int>(std::min<int64_t>(kPanel, part.rows - p * kPanel));
}

// One panel by M tokens.
template <Precision of, int M>
void bound_tile(const MatmulPart& part, int64_t cols, int64_t p, Rows x, Rows plan, Rows out,
                int64_t t) {
    constexpr Format fmt = Format::q8_planes;
    const int64_t groups = cols / kGroup, bytes = panel_bytes(fmt, cols);
    const uint8_t* panel = part.weight + p * bytes;
    Act act[M];
    const float* reach[M];
    for (int m = 0; m < M; ++m)
        act[m] = Act(x, of, t + m, cols), reach[m] = BoundPlan(plan, t + m, cols).reach;
    F middle[M], most[M];
    unrolled<M>([&]<int m>() { middle[m] = most[m] = set(0.0f); });
    for (int64_t g = 0; g < groups; ++g) {
        const uint8_t* quants = panel + place_of(fmt, groups, g).quants;
        I dot[1][1][M];
        tile_group<Format::q4_1, of, 1, M>(&quants, &quants, act, g, dot);
        const F d = panel_scales(panel, groups, g), size = abs(d);
        unrolled<M>([&]<int m>() __attribute__((always_inline)) {
            // Twice the sum of (16 h + 7.5 - 128) x.
            const I twice = add(shift_left<5>(dot[0][0][m]), set_i(-241 * sum_of(act[m], g)));
            const F half = set(0.5f * act[m].scale[g * kActStep]);
            middle[m] = fma(mul(to_float(twice), d), half, middle[m]);
            most[m] = fma(size, set(reach[m][g]), most[m]);
        });
    }
    const F slack = set(1 + static_cast<float>(groups + 8) * 0x1p-24f * (1024 / kUnread));
    const int live = live_rows(part, p);
    constexpr float least = std::numeric_limits<float>::lowest();
    for (int m = 0; m < M; ++m) {
        // Where products are subnormal, roundings are not in proportion.
        const F bound = add(middle[m], fma(most[m], slack, set(1e-30f)));
        store(out.row<float>(t + m) + p * kPanel, bound);
        const float peak = hmax(keep_first(middle[m], live, least));
        BoundPlan(plan, t + m, cols).peaks[p] = peak > least ? peak : least;
    }
}

template <Precision of>
void bound_of(const MatmulPart& part, int64_t cols, Rows x, Rows plan, Rows out, int64_t tokens,
              int64_t first, int64_t last) {
    for (int64_t p = first; p < last; ++p) {
        int64_t t = 0;
        for (; t + kTile <= tokens; t += kTile)
            bound_tile<of, kTile>(part, cols, p, x, plan, out, t);
        for (; t + 2 <= tokens; t += 2) bound_tile<of, 2>(part, cols, p, x, plan, out, t);
        if (t < tokens) bound_tile<of, 1>(part, cols, p, x, plan, out, t);
    }
}

template <Precision of>
void exact_panel_of(const MatmulPart& part, int64_t cols, Rows x, Rows out, int64_t t, int64_t p) {
    tile<Format::q8_planes, of, 1, 1>(part, cols, p, x, out, {}, t, 0);
}

// Whether one of `live` rows with these bounds may reach the threshold; what is not finite may.
inline bool reaches(const float* bounds, int live, float scale, float threshold) {
    const F bound =
        keep_first(mul(load(bounds), set(scale)), live, std::numeric_limits<float>::lowest());
    return !(hmax(bound) < threshold) | (hsum(sub(bound, bound)) != 0);
}

// The lower plane's groups of one panel and row, until its bounds are below the threshold.
template <Precision of>
bool refine_panel(const MatmulPart& part, int64_t cols, const Act& x, const BoundPlan& plan,
                  int64_t p, float* bounds, int live, int64_t& read) {
    constexpr Format fmt = Format::q8_planes;
    const int64_t groups = cols / kGroup;
    const uint8_t* panel = part.weight + p * panel_bytes(fmt, cols);
    const uint8_t* plane = low_panel(fmt, part.weight, part.rows, cols, p);
    F bound = load(bounds);
    for (int64_t i = 0; i < groups; ++i) {
        const int64_t g = plan.order[i];
        const uint8_t* quants = plane + g * low_bytes(fmt);
        I dot[1][1][1];
        tile_group<Format::q4_1, of, 1, 1>(&quants, &quants, &x, g, dot);
        read += low_bytes(fmt);
        const I twice = add(shift_left<1>(dot[0][0][0]), set_i(-15 * sum_of(x, g)));
        const F d = panel_scales(panel, groups, g);
        bound = fma(mul(to_float(twice), d), set(0.5f * x.scale[g * kActStep]), bound);
        bound = fma(abs(d), set(-plan.reach[g]), bound);
        store(bounds, bound);
        if (!reaches(bounds, live, part.scale, *plan.threshold)) return false;
    }
    return true;
}

template <Precision of>
int64_t refine_of(const MatmulPart& part, int64_t cols, Rows x, Rows plan, Rows out, int64_t tokens,
                  int64_t first, int64_t last) {
    constexpr Format fmt = Format::q8_planes;
    constexpr int64_t kAtOnce = 16, kSure = 2;  // panels, and groups of each, asked for together
    const F none = set(-std::numeric_limits<float>::infinity());
    const int64_t groups = cols / kGroup;
    int64_t read = 0;
    for (int64_t t = 0; t < tokens; ++t) {
        const Act act(x, of, t, cols);
        const BoundPlan row(plan, t, cols);
        float* const logits = out.row<float>(t);
        for (int64_t start = first; start < last; start += kAtOnce) {
            int64_t kept[kAtOnce], count = 0;
            for (int64_t p = start; p < std::min(start + kAtOnce, last); ++p) {
                const int live = live_rows(part, p);
                if (!reaches(logits + p * kPanel, live, part.scale, *row.threshold)) {
                    store(logits + p * kPanel, none);
                    continue;
                }
                kept[count++] = p;
                const uint8_t* panel = part.weight + p * panel_bytes(fmt, cols);
                const uint8_t* plane = low_panel(fmt, part.weight, part.rows, cols, p);
                for (int64_t i = 0; i < std::min(kSure, groups); ++i) {
                    prefetch(panel + place_of(fmt, groups, row.order[i]).scales, 2 * kPanel);
                    prefetch(plane + row.order[i] * low_bytes(fmt), low_bytes(fmt));
                }
            }
            for (int64_t i = 0; i < count; ++i) {
                const int64_t p = kept[i];
                const int live = live_rows(part, p);
                if (refine_panel<of>(part, cols, act, row, p, logits + p * kPanel, live, read))
                    exact_panel_of<of>(part, cols, x, out, t, p);
                else
                    store(logits + p * kPanel, none);
            }
        }
    }
    return read;
}

inline void plan_bounds(Rows x, Precision of_x, int64_t cols, Rows plan, int64_t first,
                        int64_t last) {
    const auto run =
        of_x == Precision::a8 ? plan_bounds_of<Precision::a8> : plan_bounds_of<Precision::a12>;
    run(x, cols, plan, first, last);
}

inline void bound(const MatmulPart& part, int64_t cols, Rows x, Precision of_x, Rows plan, Rows out,
                  int64_t tokens, int64_t first, int64_t last) {
    const auto run = of_x == Precision::a8 ? bound_of<Precision::a8> : bound_of<Precision::a12>;
    run(part, cols, x, plan, out, tokens, first, last);
}

inline void exact_panel(const MatmulPart& part, int64_t cols, Rows x, Precision of_x, Rows out,
                        int64_t t, int64_t p) {
    const auto run =
        of_x == Precision::a8 ? exact_panel_of<Precision::a8> : exact_panel_of<Precision::a12>;
    run(part, cols, x, out, t, p);
}

inline int64_t refine(const MatmulPart& part, int64_t cols, Rows x, Precision of_x, Rows plan,
                      Rows out, int64_t tokens, int64_t first, int64_t last) {
    const auto run = of_x == Precision::a8 ? refine_of<Precision::a8> : refine_of<Precision::a12>;
    return run(part, cols, x, plan, out, tokens, first, last);
}

}  // namespace pronk::PRONK_NS
