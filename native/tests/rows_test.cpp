// Kernels that work row by row, against double precision.
#include <algorithm>

#include "check.h"

namespace pronk::test {

namespace {

constexpr int64_t kRows = 5;

// How far a quantized row is from `want`, in units of what rounding allows.
double act_error(const uint8_t* row, int planes, const std::vector<double>& want,
                 double tolerance) {
    const int64_t cols = static_cast<int64_t>(want.size()), groups = cols / kGroup;
    const int8_t* q = reinterpret_cast<const int8_t*>(row);
    const float* scale = reinterpret_cast<const float*>(row + planes * cols);
    const double range = planes == 2 ? 127 * 128 : 127;
    double worst = 0;
    for (int64_t g = 0; g < groups; ++g) {
        double top = 0;
        int32_t sums[2] = {0, 0}, stored[2];
        for (int64_t k = g * kGroup; k < (g + 1) * kGroup; ++k) {
            top = std::max(top, std::fabs(want[size_t(k)]));
            for (int plane = 0; plane < planes; ++plane) {
                sums[plane] += q[plane * cols + k];
                if (q[plane * cols + k] == -128) return INFINITY;
            }
        }
        for (int plane = 0; plane < planes; ++plane) {
            std::memcpy(&stored[plane], scale + (2 + plane) * groups + g, 4);
            if (stored[plane] != sums[plane]) return INFINITY;
        }
        const int32_t sum = planes == 2 ? 128 * sums[0] + sums[1] : sums[0];
        const float product = scale[g] * static_cast<float>(sum);
        if (!same(&scale[groups + g], &product, 4)) return INFINITY;
        const double s = top / range;
        worst = std::max(worst, std::fabs(scale[g] - s) / (s * (tolerance + 1e-6) + 1e-33));
        for (int64_t k = g * kGroup; k < (g + 1) * kGroup; ++k) {
            const int whole = planes == 2 ? 128 * q[k] + q[cols + k] : q[k];
            const double error = std::fabs(whole * double(scale[g]) - want[size_t(k)]);
            const double steps = 0.5 + range * (2 * tolerance + 1e-6);
            worst = std::max(worst, error / (s * steps + 1e-30));
        }
    }
    return worst;
}

double row_error(const float* row, const std::vector<double>& want, double tolerance) {
    double worst = 0;
    for (size_t k = 0; k < want.size(); ++k) {
        worst =
            std::max(worst, std::fabs(row[k] - want[k]) / (std::fabs(want[k]) * tolerance + 1e-33));
        if (std::isnan(row[k])) return INFINITY;
    }
    return worst;
}

// Runs a kernel that can write floats or quantized rows both ways, in two ranges, and compares.
template <class Run, class Want>
void test_both(const Kernels& kernels, const char* name, int64_t cols, double tolerance, Run run,
               Want want) {
    for (const int planes : {0, 1, 2}) {
        const int64_t stride = act_row_bytes(cols, planes);
        const Buffer out(kRows * stride);
        const Rows rows{out.data(), stride};
        run(rows, planes, 0, 2);
        run(rows, planes, 2, kRows);
        double worst = 0;
        for (int64_t t = 0; t < kRows; ++t) {
            const std::vector<double> expected = want(t);
            worst = std::max(worst,
                             planes ? act_error(rows.row<uint8_t>(t), planes, expected, tolerance)
                                    : row_error(rows.row<float>(t), expected, tolerance));
        }
        check(worst <= 1, "%s %s %lld in %d planes: %.2f of the bound", kernels.name, name,
              static_cast<long long>(cols), planes, worst);
    }
}

// Row t of a matrix whose rows are ordinary, all zero, huge, tiny, and mixed.
void fill_rows(const Buffer& x, int64_t cols, float huge, Random& random) {
    const float scales[kRows] = {1.0f, 0.0f, huge, 1e-12f, 1.0f};
    for (int64_t t = 0; t < kRows; ++t)
        for (int64_t k = 0; k < cols; ++k) {
            const float outlier = t == 4 && k % 40 == 0 ? huge : 1.0f;
            x.floats()[t * cols + k] = random.uniform(scales[t] * outlier);
        }
}

void test_rms_norm(const Kernels& kernels, int64_t cols, Random& random) {
    const Buffer x(kRows * cols * 4), weight(cols * 4);
    fill_rows(x, cols, 1e6f, random);
    weight.fill(random, 2.0f);
    const float eps = 1e-5f;
    test_both(
        kernels, "rms_norm", cols, 1e-5,
        [&](Rows out, int planes, int64_t first, int64_t last) {
            kernels.rms_norm({x.data(), cols * 4}, weight.floats(), eps, cols, out, planes, first,
                             last);
        },
        [&](int64_t t) {
            std::vector<double> want(static_cast<size_t>(cols));
            double squares = 0;
            for (int64_t k = 0; k < cols; ++k)
                squares += std::pow(double(x.floats()[t * cols + k]), 2);
            const double scale = 1 / std::sqrt(squares / double(cols) + double(eps));
            for (int64_t k = 0; k < cols; ++k)
                want[size_t(k)] = x.floats()[t * cols + k] * scale * weight.floats()[k];
            return want;
        });
}

void test_silu_mul(const Kernels& kernels, int64_t cols, Random& random) {
    const Buffer gate(kRows * cols * 4), up(kRows * cols * 4);
    fill_rows(gate, cols, 100.0f, random);
    up.fill(random, 3.0f);
    for (int64_t k = 0; k < 64 && k < cols; ++k)  // the ends of exp's range, and one group past it
        gate.floats()[k] = k < 32 ? -100.0f : k % 2 ? 100.0f : -87.0f - float(k) / 32;
    test_both(
        kernels, "silu_mul", cols, 2e-6,
        [&](Rows out, int planes, int64_t first, int64_t last) {
            kernels.silu_mul({gate.data(), cols * 4}, {up.data(), cols * 4}, cols, out, planes,
                             first, last);
        },
        [&](int64_t t) {
            std::vector<double> want(static_cast<size_t>(cols));
            for (int64_t k = 0; k < cols; ++k) {
                const double g = gate.floats()[t * cols + k];
                want[size_t(k)] = g / (1 + std::exp(-g)) * up.floats()[t * cols + k];
            }
            return want;
        });
}

void test_quantize(const Kernels& kernels, int planes, int64_t cols, Random& random) {
    const int64_t stride = act_row_bytes(cols, planes);
    const Buffer x(kRows * cols * 4), q(kRows * stride);
    const Rows in{x.data(), cols * 4}, out{q.data(), stride};
    for (const float huge : {1e6f, 1e38f}) {
        fill_rows(x, cols, huge, random);
        for (int64_t k = 0; k < 32; ++k)  // too small for its scale to have a finite inverse
            x.floats()[3 * cols + k] = random.uniform(1e-38f);
        kernels.quantize(in, cols, out, planes, 0, kRows);
        double worst = 0;
        for (int64_t t = 0; t < kRows; ++t) {
            const float* row = x.floats() + t * cols;
            worst = std::max(worst, act_error(q.data() + t * stride, planes, {row, row + cols}, 0));
        }
        check(worst <= 1, "%s quantize %lld in %d planes: %.2f of the bound", kernels.name,
              static_cast<long long>(cols), planes, worst);
    }
    // What is not finite must show, and must not be undefined.
    x.floats()[0] = INFINITY;
    for (int64_t k = 0; k < cols; ++k) x.floats()[cols + k] = NAN;
    kernels.quantize(in, cols, out, planes, 0, 2);
    float scales[2];
    std::memcpy(&scales[0], q.data() + planes * cols, 4);
    std::memcpy(&scales[1], q.data() + stride + planes * cols, 4);
    check(std::isinf(scales[0]) && std::isnan(scales[1]), "%s quantize hides inf or NaN",
          kernels.name);
}

void test_add(const Kernels& kernels, int64_t cols, Random& random) {
    const Buffer x(kRows * cols * 4), y(kRows * cols * 4), sum(kRows * cols * 4);
    x.fill(random);
    y.fill(random);
    const int64_t stride = cols * 4;
    kernels.add({x.data(), stride}, {y.data(), stride}, cols, {sum.data(), stride}, 0, kRows);
    bool equal = true;
    for (int64_t i = 0; i < kRows * cols; ++i)
        equal &= sum.floats()[i] == x.floats()[i] + y.floats()[i];
    check(equal, "%s add %lld", kernels.name, static_cast<long long>(cols));
}

void test_embed(const Kernels& kernels, Format format, Random& random) {
    for (const Fill fill : {Fill::random, Fill::extreme, Fill::tiny}) {
        const int64_t vocab = 37, cols = 96;
        const Weights w(kernels, format, vocab, cols, fill, random);
        const int32_t ids[] = {0, 36, 15, 16, 3, 31};
        const Buffer out(6 * cols * 4);
        kernels.embed(w.packed.data(), format, kernels.bias8, cols, ids, {out.data(), cols * 4}, 0,
                      6);
        double worst = 0;
        for (int64_t t = 0; t < 6; ++t)
            for (int64_t k = 0; k < cols; ++k) {
                const double d = w.scale(ids[t], k / kGroup) * 15, want = w.value(ids[t], k);
                const double bound = 0x1p-23 * (std::fabs(d) + std::fabs(want)) + 1e-40;
                worst = std::max(worst, std::fabs(out.floats()[t * cols + k] - want) / bound);
            }
        check(worst <= 1, "%s embed %s: %.2f of the bound", kernels.name, format_name(format),
              worst);
    }
}

void test_rope_table(const Kernels& kernels) {
    const int64_t half = 40;
    const int32_t positions[] = {0, 1, 77, 4095, 131071};
    std::vector<float> frequencies;
    for (int64_t i = 0; i < half; ++i)
        frequencies.push_back(float(std::pow(10000.0, -double(i) / double(half))));
    const Buffer out(5 * half * 8);
    kernels.rope_table(positions, frequencies.data(), half, {out.data(), half * 8}, 0, 5);
    bool equal = true;
    for (int64_t t = 0; t < 5; ++t)
        for (int64_t i = 0; i < half; ++i) {
            const double angle = float(positions[t]) * frequencies[size_t(i)];
            equal &= std::fabs(out.floats()[t * 2 * half + i] - std::cos(angle)) < 1e-7 &&
                     std::fabs(out.floats()[t * 2 * half + half + i] - std::sin(angle)) < 1e-7;
        }
    check(equal, "%s rope_table", kernels.name);
}

}  // namespace

void test_rows(const Kernels& kernels) {
    Random random(3);
    for (const int64_t cols : {32, 64, 96, 576, 1536}) {
        test_rms_norm(kernels, cols, random);
        test_silu_mul(kernels, cols, random);
        for (const int planes : {1, 2}) test_quantize(kernels, planes, cols, random);
        test_add(kernels, cols, random);
    }
    for (const Format format : kFormats) test_embed(kernels, format, random);
    test_rope_table(kernels);
    const Buffer memory(1 << 16);
    uint8_t sink[4];
    check(kernels.read(memory.data(), memory.size()) ==
              kernels.read(memory.data() + memory.size() / 2, memory.size() / 2) * 2,
          "%s read does not read all", kernels.name);
    check(kernels.peak(2000, sink) == 2 * kernels.peak(1000, sink), "%s peak counts", kernels.name);
}

}  // namespace pronk::test
