// Kernels that work row by row, against double precision.
#include "rows.h"

namespace pronk::test {

namespace {

// rms_norm, or layer_norm where `centered`.
void test_norm(const Kernels& kernels, bool centered, int64_t cols, Random& random) {
    const Buffer x(kRows * cols * 4), weight(cols * 4), residual(kRows * cols * 4);
    fill_rows(x, cols, 1e6f, random);
    weight.fill(random, 2.0f);
    residual.fill(random);
    if (centered)  // far from zero: a variance from squares alone would be lost
        for (int64_t k = 0; k < cols; ++k) x.floats()[5 * cols + k] = 1000 + random.uniform();
    const float eps = 1e-5f;
    const auto norm = [&](Rows add, Rows out, Precision precision, int64_t first, int64_t last) {
        const Rows rows{x.data(), cols * 4};
        if (centered)
            kernels.layer_norm(rows, weight.floats(), eps, cols, out, precision, first, last);
        else
            kernels.rms_norm(rows, weight.floats(), eps, cols, add, out, precision, first, last);
    };
    const auto want = [&](int64_t t) {
        std::vector<double> row(x.floats() + t * cols, x.floats() + (t + 1) * cols);
        double sum = 0, squares = 0;
        for (const double e : row) sum += e;
        if (centered)
            for (double& e : row) e -= sum / double(cols);
        for (const double e : row) squares += e * e;
        const double scale = 1 / std::sqrt(squares / double(cols) + double(eps));
        for (size_t k = 0; k < row.size(); ++k) row[k] *= scale * weight.floats()[k];
        return row;
    };
    if (!centered) {
        test_both(
            kernels, "rms_norm", cols, 1e-5,
            [&](Rows out, Precision precision, int64_t first, int64_t last) {
                norm({}, out, precision, first, last);
            },
            want);
        // With a residual, which the output may lie on.
        const Buffer out(kRows * cols * 4);
        std::memcpy(out.data(), residual.data(), size_t(out.size()));
        const Rows rows{out.data(), cols * 4};
        norm(rows, rows, Precision::f32, 0, 7);
        norm(rows, rows, Precision::f32, 7, kRows);
        double worst = 0;
        for (int64_t t = 0; t < kRows; ++t) {
            const std::vector<double> normed = want(t);
            for (int64_t k = 0; k < cols; ++k) {
                const double add = residual.floats()[t * cols + k];
                const double error = std::fabs(rows.row<float>(t)[k] - (normed[size_t(k)] + add));
                const double bound = 1e-6 * (std::fabs(normed[size_t(k)]) * 10 + std::fabs(add));
                worst = std::max(worst, std::isnan(error) ? INFINITY : error / (bound + 1e-33));
            }
        }
        check(worst <= 1, "%s rms_norm with a residual %lld: %.2f of the bound", kernels.name,
              static_cast<long long>(cols), worst);
        return;
    }
    // What is left of a float less the mean is as exact as the mean: bounded by the row's largest.
    for (const Precision precision : kPrecisions) {
        const bool quantized = is_quantized(precision);
        const int64_t stride = act_row_bytes(cols, precision);
        const Buffer out(round_up(kRows, 16) * stride), whole(round_up(kRows, 16) * stride);
        norm({}, {whole.data(), stride}, precision, 0, kRows);
        norm({}, {out.data(), stride}, precision, 11, kRows);
        norm({}, {out.data(), stride}, precision, 0, 11);
        check(out == whole, "%s layer_norm %lld: ranges differ", kernels.name,
              static_cast<long long>(cols));
        double worst = 0;
        for (int64_t t = 0; t < kRows; ++t) {
            const std::vector<double> row = want(t);
            double top = 0;
            for (const double e : row) top = std::max(top, std::fabs(e));
            // In a row of 1000 +- 1 a float's last bit is 1e-4 of the spread, and the mean's sum
            // has been rounded many times.
            const double tolerance = t == 5 ? 2e-3 : 1e-5;
            for (int64_t k = 0; k < cols; ++k) {
                double got = out.floats()[t * stride / 4 + k], step = 0;
                if (quantized) {
                    const Group group(out, stride, precision, cols, t, k / 32);
                    got = group.scale * double(group.integer(static_cast<int>(k % 32)));
                    step = group.scale;
                }
                const double error = std::fabs(got - row[size_t(k)]);
                const double bound =
                    tolerance * (std::fabs(row[size_t(k)]) + 0.1 * top) + 0.51 * step + 1e-30;
                worst = std::max(worst, std::isnan(got) ? INFINITY : error / bound);
            }
        }
        check(worst <= 1, "%s layer_norm %lld %s: %.2f of the bound", kernels.name,
              static_cast<long long>(cols), quantized ? "quantized" : "floats", worst);
    }
}

void test_quantize(const Kernels& kernels, int64_t cols, Random& random) {
    const Buffer x(kRows * cols * 4);
    for (const float huge : {1e6f, 1e38f}) {
        fill_rows(x, cols, huge, random);
        for (int64_t k = 0; k < 32; ++k) {  // too small for its scale to have a finite inverse
            x.floats()[3 * cols + k] = random.uniform(1e-38f);
            // Halfway between integers, and between the steps of their high parts.
            x.floats()[5 * cols + k] = static_cast<float>(k % 2 ? k - 8 : 8 - k * 16) / 2;
        }
        x.floats()[5 * cols] = 127 * 16;
        test_both(
            kernels, "quantize", cols, 0,
            [&](Rows out, Precision precision, int64_t first, int64_t last) {
                kernels.quantize({x.data(), cols * 4}, cols, out, precision, first, last);
            },
            [&](int64_t t) {
                const float* row = x.floats() + t * cols;
                return std::vector<double>(row, row + cols);
            });
    }
}

// What is not finite must show in its group's scale, and nowhere else.
void test_not_finite(const Kernels& kernels, Precision to, Random& random) {
    const int64_t cols = 64, stride = act_row_bytes(cols, to);
    const Buffer x(cols * 4), q(16 * stride);
    int hidden = 0, spread = 0;
    for (const float bad : {INFINITY, -INFINITY, NAN, -NAN})
        for (int k = 0; k <= 32; ++k) {
            x.fill(random);
            for (int i = 0; i < 32; ++i)
                if (i == k || k == 32) x.floats()[i] = bad;
            kernels.quantize({x.data(), cols * 4}, cols, {q.data(), stride}, to, 0, 1);
            hidden += std::isfinite(Group(q, stride, to, cols, 0, 0).scale);
            spread += !std::isfinite(Group(q, stride, to, cols, 0, 1).scale);
        }
    check(!hidden, "%s quantize hides %d of inf or NaN", kernels.name, hidden);
    check(!spread, "%s quantize spreads %d of inf or NaN", kernels.name, spread);
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
    for (const Fill fill : {Fill::random, Fill::extreme, Fill::tiny, Fill::zero}) {
        const int64_t vocab = 37, cols = traits(format).block == 256 ? 512 : 96;
        const Weights w(kernels, format, vocab, cols, fill, random);
        const int32_t ids[] = {0, 36, 15, 16, 3, 31};
        const MatmulPart table{w.packed.data(), format, vocab, 0, nullptr};
        const Buffer out(6 * cols * 4);
        const Rows rows{out.data(), cols * 4};
        kernels.embed(table, cols, 1, ids, rows, 0, 6);
        double worst = 0;
        for (int64_t t = 0; t < 6; ++t)
            for (int64_t k = 0; k < cols; ++k) {
                const Element e = w.element(ids[t], k);
                const double error = std::fabs(rows.row<float>(t)[k] - e.value());
                // The product is rounded, then the sum; without a minimum only the product.
                const double bound = std::fabs(e.value()) + std::fabs(e.scale * e.quant);
                worst = std::max(worst, error / (0x1p-24 * bound + 1e-45));
                if (std::isnan(rows.row<float>(t)[k])) worst = INFINITY;
            }
        check(worst <= 1, "%s embed %s fill %d: %.2f of the bound", kernels.name,
              format_name(format), static_cast<int>(fill), worst);
        const Buffer scaled(6 * cols * 4);
        kernels.embed(table, cols, 2.5f, ids, {scaled.data(), cols * 4}, 0, 6);
        bool equal = true;
        for (int64_t i = 0; i < 6 * cols; ++i)
            equal &= scaled.floats()[i] == 2.5f * out.floats()[i];
        check(equal, "%s embed %s scaled", kernels.name, format_name(format));
    }
}

}  // namespace

void test_rows(const Kernels& kernels) {
    Random random(3);
    for (const int64_t cols : {32, 64, 96, 576, 1536}) {
        for (const bool centered : {false, true}) test_norm(kernels, centered, cols, random);
        test_quantize(kernels, cols, random);
        test_add(kernels, cols, random);
    }
    for (const Precision to : {Precision::a8, Precision::a12}) test_not_finite(kernels, to, random);
    for (const Format format : every_format()) test_embed(kernels, format, random);
    test_activations(kernels);
    test_rope(kernels);
    const Buffer memory(1 << 16);
    uint8_t sink[4];
    check(kernels.read(memory.data(), memory.size()) ==
              kernels.read(memory.data() + memory.size() / 2, memory.size() / 2) * 2,
          "%s read does not read all", kernels.name);
    check(kernels.peak(2000, sink) == 2 * kernels.peak(1000, sink), "%s peak counts", kernels.name);
}

}  // namespace pronk::test
