// Bounds on logits hold, and what reaches a threshold comes out as the product itself gives it.
#include <algorithm>
#include <limits>

#include "blocks.h"

namespace pronk::test {

namespace {

constexpr float kNone = -std::numeric_limits<float>::infinity();

struct Case {
    int64_t rows, cols, tokens;
    Fill fill;
    float scale;
};

// Token t is random, and has outliers, zeros, tiny values or a NaN by its number.
void fill_token(float* x, int64_t cols, int64_t t, Random& random) {
    for (int64_t k = 0; k < cols; ++k) x[k] = t == 2 ? 0 : random.uniform(t == 3 ? 1e-36f : 1.0f);
    if (t == 1) x[random.below(static_cast<int>(cols))] = 60;
    if (t == 5) x[random.below(static_cast<int>(cols))] = NAN;
}

void test_case(const Kernels& kernels, const Case& c, Precision precision, Random& random) {
    const Weights w(kernels, Format::q8_planes, c.rows, c.cols, c.fill, random);
    MatmulPart part{w.packed.data(), Format::q8_planes, static_cast<int32_t>(c.rows), 0, nullptr};
    part.scale = c.scale;
    const Buffer floats(c.tokens * c.cols * 4), quants(kActRows * act_row_bytes(c.cols, precision));
    for (int64_t t = 0; t < c.tokens; ++t)
        fill_token(floats.floats() + t * c.cols, c.cols, t, random);
    const Rows x{quants.data(), act_row_bytes(c.cols, precision)};
    kernels.quantize({floats.data(), c.cols * 4}, c.cols, x, precision, 0, c.tokens);
    const int64_t panels = round_up(c.rows, kPanel) / kPanel, stride = panels * kPanel * 4;
    const Buffer exact(c.tokens * stride), bounded(c.tokens * stride),
        space(c.tokens * BoundPlan::floats(c.rows, c.cols) * 4);
    const Rows all{exact.data(), stride}, out{bounded.data(), stride},
        plan{space.data(), BoundPlan::floats(c.rows, c.cols) * 4};
    kernels.matmul(part, c.cols, x, precision, all, {}, c.tokens, 0, panels);
    kernels.plan_bounds(x, precision, c.cols, plan, 0, c.tokens);
    // In uneven ranges, as threads take them.
    const int64_t cut = panels / 3;
    kernels.bound(part, c.cols, x, precision, plan, out, c.tokens, 0, cut);
    kernels.bound(part, c.cols, x, precision, plan, out, c.tokens, cut, panels);
    for (int64_t t = 0; t < c.tokens; ++t) {
        const float *logits = all.row<float>(t), *bounds = out.row<float>(t);
        bool holds = true;
        for (int64_t r = 0; r < c.rows; ++r) holds &= !(bounds[r] * c.scale < logits[r]);
        check(holds, "%s bound of token %lld, %lld x %lld, fill %d", kernels.name,
              static_cast<long long>(t), static_cast<long long>(c.rows),
              static_cast<long long>(c.cols), static_cast<int>(c.fill));
        std::vector<float> sorted(logits, logits + c.rows);
        std::sort(sorted.begin(), sorted.end(),
                  [](float a, float b) { return a > b || (a == a && b != b); });
        *BoundPlan(plan, t, c.cols).threshold = sorted[static_cast<size_t>(t % 2 ? 0 : 3)];
    }
    const int64_t read =
        kernels.refine(part, c.cols, x, precision, plan, out, c.tokens, 0, cut) +
        kernels.refine(part, c.cols, x, precision, plan, out, c.tokens, cut, panels);
    check(read >= 0 && read <= c.tokens * panels * c.cols / kGroup * 256, "%s bytes read",
          kernels.name);
    for (int64_t t = 0; t < c.tokens; ++t) {
        const float threshold = *BoundPlan(plan, t, c.cols).threshold;
        bool right = true;
        for (int64_t r = 0; r < c.rows; ++r) {
            const float *logit = all.row<float>(t) + r, *found = out.row<float>(t) + r;
            right &=
                *found == kNone ? *logit < threshold || *logit == kNone : same(logit, found, 4);
        }
        check(right, "%s largest logits of token %lld, %lld x %lld, fill %d", kernels.name,
              static_cast<long long>(t), static_cast<long long>(c.rows),
              static_cast<long long>(c.cols), static_cast<int>(c.fill));
        Buffer panel(2 * kPanel * 4);
        MatmulPart last = part;
        last.column = static_cast<int32_t>(kPanel - (panels - 1) * kPanel);
        // Only row t is written.
        kernels.exact_panel(last, c.cols, x, precision, {panel.data() - t * 64, 64}, t, panels - 1);
        check(same(panel.floats() + kPanel, all.row<float>(t) + (panels - 1) * kPanel, 64),
              "%s one panel of a row", kernels.name);
    }
}

void both(const Kernels& kernels, const Case& c, Random& random) {
    for (const Precision precision : {Precision::a8, Precision::a12})
        test_case(kernels, c, precision, random);
}

}  // namespace

void test_bounded(const Kernels& kernels) {
    Random random(23);
    for (const Fill fill : {Fill::random, Fill::extreme, Fill::tiny, Fill::zero, Fill::unit})
        for (const int64_t tokens : {1, 3, 6})
            for (const float scale : {1.0f, 0.3f}) {
                both(kernels, {5, 32, tokens, fill, scale}, random);
                both(kernels, {211, 352, tokens, fill, scale}, random);
            }
    both(kernels, {96, 8192, 2, Fill::random, 1.0f}, random);
}

}  // namespace pronk::test
