// Rows of floats and of quantized activations for the tests, and what their kernels are held to.
#pragma once
#include <algorithm>
#include <cstdlib>

#include "blocks.h"

namespace pronk::test {

// Further parts of test_rows.
void test_activations(const Kernels& kernels);
void test_rope(const Kernels& kernels);

inline constexpr Precision kPrecisions[] = {Precision::f32, Precision::a8, Precision::a12};
inline constexpr int64_t kRows = 19;  // a block of quantized rows, and some of the next

// Where group g of quantized row t lies: 32 integers, or 32 high parts and 32 low ones; and its
// scale and sums.
struct Group {
    Group(const Buffer& rows, int64_t stride, Precision precision, int64_t cols, int64_t t,
          int64_t g)
        : precision(precision) {
        const int64_t groups = cols / 32, step = act_group(precision);
        const uint8_t* block = rows.data() + t / 16 * 16 * stride;
        q = reinterpret_cast<const int8_t*>(block) + (t % 16 * groups + g) * step;
        const uint8_t* s = block + 16 * groups * step + (g * 16 + t % 16) * 16;
        std::memcpy(&scale, s, 4);
        std::memcpy(&scaled_sum, s + 4, 4);
        std::memcpy(sums, s + 8, 8);
    }
    // The integer at k, or 1 past all of them where its parts are out of range.
    int32_t integer(int k) const {
        const int32_t most = act_range(precision);
        if (std::abs(q[k]) > 127) return most + 1;
        if (precision == Precision::a8) return q[k];
        return std::abs(q[k + 32]) > 8 ? most + 1 : 16 * q[k] + q[k + 32];
    }
    Precision precision;
    const int8_t* q;
    float scale, scaled_sum;
    int32_t sums[2];
};

// How far a quantized group is from `want`, in units of what rounding allows.
inline double group_error(const Group& group, const double* want, double tolerance) {
    const double range = act_range(group.precision);
    double top = 0, worst = 0;
    int32_t sums[2] = {0, 0}, integers[32];
    for (int k = 0; k < 32; ++k) {
        top = std::max(top, std::fabs(want[k]));
        integers[k] = group.integer(k);
        if (std::abs(integers[k]) > range) return INFINITY;
        sums[k / 16] += integers[k];
    }
    const float product = group.scale * static_cast<float>(sums[0] + sums[1]);
    if (!same(group.sums, sums, 8) || !same(&group.scaled_sum, &product, 4)) return INFINITY;
    const double s = top / range;
    worst = std::max(worst, std::fabs(group.scale - s) / (s * (tolerance + 1e-6) + 1e-33));
    for (int k = 0; k < 32; ++k) {
        const double error = std::fabs(integers[k] * double(group.scale) - want[k]);
        worst = std::max(worst, error / (s * (0.5 + range * (2 * tolerance + 1e-6)) + 1e-30));
    }
    return worst;
}

inline double row_error(const float* row, const std::vector<double>& want, double tolerance) {
    double worst = 0;
    for (size_t k = 0; k < want.size(); ++k) {
        worst =
            std::max(worst, std::fabs(row[k] - want[k]) / (std::fabs(want[k]) * tolerance + 1e-33));
        if (std::isnan(row[k])) return INFINITY;
    }
    return worst;
}

// Runs a kernel that can write floats or quantized rows both ways, in ranges, and compares.
template <class Run, class Want>
void test_both(const Kernels& kernels, const char* name, int64_t cols, double tolerance, Run run,
               Want want) {
    for (const Precision precision : kPrecisions) {
        const bool quantized = is_quantized(precision);
        const int64_t stride = act_row_bytes(cols, precision) + 64;
        const int64_t rows = quantized ? round_up(kRows, 16) : kRows;
        const Buffer out(rows * stride), whole(rows * stride);
        run({out.data(), stride}, precision, 18, kRows);
        run({out.data(), stride}, precision, 0, 2);
        run({out.data(), stride}, precision, 2, 18);
        run({whole.data(), stride}, precision, 0, kRows);
        double worst = 0;
        for (int64_t t = 0; t < kRows; ++t) {
            const std::vector<double> expected = want(t);
            if (!quantized)
                worst =
                    std::max(worst, row_error(out.floats() + t * stride / 4, expected, tolerance));
            for (int64_t g = 0; quantized && g < cols / 32; ++g)
                worst = std::max(worst, group_error({out, stride, precision, cols, t, g},
                                                    expected.data() + 32 * g, tolerance));
        }
        const long long n = cols;
        const char* kind = quantized ? "quantized" : "floats";
        check(worst <= 1, "%s %s %lld %s: %.2f of the bound", kernels.name, name, n, kind, worst);
        check(out == whole, "%s %s %lld %s: ranges differ", kernels.name, name, n, kind);
        for (int64_t t = kRows; t < rows; ++t)  // rows that nobody asked for
            for (int64_t g = 0; g < cols / 32; ++g) {
                const Group group(out, stride, precision, cols, t, g);
                check(group.q[0] == -1 && group.q[31] == -1 && group.sums[1] == -1,
                      "%s %s %lld %s: wrote row %lld", kernels.name, name, n, kind,
                      static_cast<long long>(t));
            }
    }
}

// Rows in turn ordinary, all zero, huge, tiny, and mixed.
inline void fill_rows(const Buffer& x, int64_t cols, float huge, Random& random) {
    const float scales[] = {1.0f, 0.0f, huge, 1e-12f, 1.0f};
    for (int64_t t = 0; t < kRows; ++t)
        for (int64_t k = 0; k < cols; ++k) {
            const float outlier = t % 5 == 4 && k % 40 == 0 ? huge : 1.0f;
            x.floats()[t * cols + k] = random.uniform(scales[t % 5] * outlier);
        }
}

}  // namespace pronk::test
