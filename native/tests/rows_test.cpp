// Kernels that work row by row, against double precision.
#include <algorithm>
#include <cstdlib>

#include "blocks.h"

namespace pronk::test {

namespace {

constexpr Precision kPrecisions[] = {Precision::f32, Precision::a8, Precision::a12};
constexpr int64_t kRows = 19;  // a block of quantized rows, and some of the next

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
double group_error(const Group& group, const double* want, double tolerance) {
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

double row_error(const float* row, const std::vector<double>& want, double tolerance) {
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
void fill_rows(const Buffer& x, int64_t cols, float huge, Random& random) {
    const float scales[] = {1.0f, 0.0f, huge, 1e-12f, 1.0f};
    for (int64_t t = 0; t < kRows; ++t)
        for (int64_t k = 0; k < cols; ++k) {
            const float outlier = t % 5 == 4 && k % 40 == 0 ? huge : 1.0f;
            x.floats()[t * cols + k] = random.uniform(scales[t % 5] * outlier);
        }
}

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

constexpr Activation kActivations[] = {Activation::silu, Activation::gelu, Activation::gelu_tanh,
                                       Activation::relu};

double activated(Activation fn, double x) {
    switch (fn) {
        case Activation::silu: return x / (1 + std::exp(-x));
        case Activation::gelu: return x / 2 * std::erfc(-x / std::sqrt(2));
        case Activation::gelu_tanh: {
            const double y = std::sqrt(2 / std::acos(-1.0)) * (x + 0.044715 * x * x * x);
            return x / (1 + std::exp(-2 * y));
        }
        case Activation::relu: return std::max(x, 0.0);
    }
    return NAN;
}

void test_activate(const Kernels& kernels, Activation fn, int64_t cols, Random& random) {
    const Buffer gate(kRows * cols * 4), up(kRows * cols * 4);
    fill_rows(gate, cols, 100.0f, random);
    up.fill(random, 3.0f);
    for (int64_t k = 0; k < 64 && k < cols; ++k)  // the ends of exp's range, and one group past it
        gate.floats()[k] = k < 32 ? -100.0f : k % 2 ? 100.0f : -87.0f - float(k) / 32;
    char name[32];
    for (const bool gated : {true, false}) {
        std::snprintf(name, sizeof name, "activate %d %s", static_cast<int>(fn),
                      gated ? "gated" : "plain");
        const Rows ups{gated ? up.data() : nullptr, cols * 4};
        const auto run = [&](Rows out, Precision precision, int64_t first, int64_t last) {
            kernels.activate(fn, {gate.data(), cols * 4}, ups, cols, out, precision, {}, first,
                             last);
        };
        const auto want = [&](int64_t t) {
            std::vector<double> row(static_cast<size_t>(cols));
            for (int64_t k = 0; k < cols; ++k)
                row[size_t(k)] = activated(fn, gate.floats()[t * cols + k]) *
                                 (gated ? up.floats()[t * cols + k] : 1.0f);
            return row;
        };
        // silu is as exact as a float in its tail; gelu as the argument of its exp.
        if (fn == Activation::silu || fn == Activation::relu) {
            test_both(kernels, name, cols, 2e-6, run, want);
            continue;
        }
        const Buffer floats(kRows * cols * 4);
        run({floats.data(), cols * 4}, Precision::f32, 8, kRows);
        run({floats.data(), cols * 4}, Precision::f32, 0, 8);
        double worst = 0;
        for (int64_t t = 0; t < kRows; ++t) {
            const std::vector<double> row = want(t);
            for (int64_t k = 0; k < cols; ++k) {
                const double scale = gated ? std::fabs(up.floats()[t * cols + k]) : 1;
                const double size = std::max(1.0f, std::fabs(gate.floats()[t * cols + k]));
                const double error = std::fabs(floats.floats()[t * cols + k] - row[size_t(k)]);
                worst =
                    std::max(worst, std::isnan(error) ? INFINITY : error / (4e-7 * scale * size));
            }
        }
        check(worst <= 1, "%s %s %lld: %.2f of the bound", kernels.name, name,
              static_cast<long long>(cols), worst);
        for (const Precision to : {Precision::a8, Precision::a12}) {
            const int64_t stride = act_row_bytes(cols, to);
            const Buffer direct(round_up(kRows, 16) * stride), after(round_up(kRows, 16) * stride);
            run({direct.data(), stride}, to, 0, 17);
            run({direct.data(), stride}, to, 17, kRows);
            kernels.quantize({floats.data(), cols * 4}, cols, {after.data(), stride}, to, 0, kRows);
            check(direct == after, "%s %s %lld: quantized otherwise", kernels.name, name,
                  static_cast<long long>(cols));
        }
    }
}

// The error over every value that matters, of each function and of tanh, which softcap is.
void test_exactness(const Kernels& kernels) {
    const int64_t cols = 32768;
    const Buffer x(cols * 4), out(cols * 4);
    const Rows rows{x.data(), cols * 4}, to{out.data(), cols * 4};
    for (int64_t k = 0; k < cols; ++k) {  // evenly, and towards zero
        const float at = float(k / 2) / float(cols / 2);
        x.floats()[k] = k % 2 ? (at - 0.5f) * 30 : std::exp2(-30 * at) * (k % 4 ? 1.0f : -1.0f);
    }
    for (const Activation fn : kActivations) {
        kernels.activate(fn, rows, {}, cols, to, Precision::f32, {}, 0, 1);
        double worst = 0;
        for (int64_t k = 0; k < cols; ++k) {
            const double at = x.floats()[k];
            const double error = std::fabs(out.floats()[k] - activated(fn, at));
            worst = std::max(worst, error / std::max(1.0, std::fabs(at)));
            if (std::isnan(out.floats()[k])) worst = INFINITY;
        }
        check(worst < 4e-7, "%s activation %d is wrong by %.2g", kernels.name, static_cast<int>(fn),
              worst);
    }
    double worst = 0;
    kernels.softcap(rows, 1, cols, to, 0, cols / kCapPiece);
    for (int64_t k = 0; k < cols; ++k) {
        const double want = std::tanh(double(x.floats()[k]));
        const double error = std::fabs(out.floats()[k] - want) / (std::fabs(want) + 1e-30);
        worst = std::max(worst, std::isnan(error) ? INFINITY : error);
    }
    check(worst < 5e-7, "%s tanh is wrong by %.2g of it", kernels.name, worst);
    x.floats()[3] = NAN;
    for (const Activation fn : kActivations) {
        kernels.activate(fn, rows, {}, 32, to, Precision::f32, {}, 0, 1);
        check(std::isnan(out.floats()[3]) && !std::isnan(out.floats()[2]),
              "%s activation %d hides a NaN", kernels.name, static_cast<int>(fn));
    }
}

void test_softcap(const Kernels& kernels, int64_t cols, Random& random) {
    const int64_t rows = 3, width = round_up(cols, kPanel) + 16, pieces = (cols + 4095) / 4096;
    const float cap = 30;
    const Buffer x(rows * width * 4), out(rows * width * 4), whole(rows * width * 4);
    x.fill(random, 100.0f);
    const Rows from{x.data(), width * 4};
    kernels.softcap(from, cap, cols, {whole.data(), width * 4}, 0, rows * pieces);
    for (int64_t i = rows * pieces; i-- > 0;)
        kernels.softcap(from, cap, cols, {out.data(), width * 4}, i, i + 1);
    check(out == whole, "%s softcap %lld: pieces differ", kernels.name,
          static_cast<long long>(cols));
    double worst = 0;
    bool outside = true;
    const float fill = out.floats()[width - 1];
    for (int64_t t = 0; t < rows; ++t) {
        for (int64_t k = 0; k < cols; ++k) {
            const double want = cap * std::tanh(x.floats()[t * width + k] / double(cap));
            worst = std::max(
                worst, std::fabs(out.floats()[t * width + k] - want) / (std::fabs(want) * 6e-7));
        }
        for (int64_t k = width - 16; k < width; ++k)
            outside &= same(out.floats() + t * width + k, &fill, 4);
    }
    check(worst <= 1, "%s softcap %lld: %.2f of the bound", kernels.name,
          static_cast<long long>(cols), worst);
    check(outside && std::isnan(fill), "%s softcap %lld wrote past its panels", kernels.name,
          static_cast<long long>(cols));
    kernels.softcap(from, cap, cols, from, 0, rows * pieces);
    bool equal = true;
    for (int64_t t = 0; t < rows; ++t)
        equal &= same(x.floats() + t * width, out.floats() + t * width, cols * 4);
    check(equal, "%s softcap %lld in place differs", kernels.name, static_cast<long long>(cols));
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

void test_rope_table(const Kernels& kernels) {
    const int64_t half = 40;
    const int32_t positions[] = {0, 1, 77, 4095, 131071};
    std::vector<float> frequencies;
    for (int64_t i = 0; i < half; ++i)
        frequencies.push_back(float(std::pow(10000.0, -double(i) / double(half))));
    for (const float scale : {1.0f, 1.75f}) {
        const Buffer out(5 * half * 8);
        kernels.rope_table(positions, frequencies.data(), scale, half, {out.data(), half * 8}, 0,
                           5);
        bool equal = true;
        for (int64_t t = 0; t < 5; ++t)
            for (int64_t i = 0; i < half; ++i) {
                const double angle = float(positions[t]) * frequencies[size_t(i)];
                const double cos = scale * std::cos(angle), sin = scale * std::sin(angle);
                equal &= std::fabs(out.floats()[t * 2 * half + i] - cos) < 2e-7 &&
                         std::fabs(out.floats()[t * 2 * half + half + i] - sin) < 2e-7;
            }
        check(equal, "%s rope_table times %g", kernels.name, double(scale));
    }
}

// Queries and keys normed and turned as rope_store must leave them, in double precision.
std::vector<double> turned(const float* row, const float* angles, int heads, int kv_heads, int dim,
                           const HeadNorm& norm) {
    const int both = heads + kv_heads, half = dim / 2;
    std::vector<double> x(row, row + (both + kv_heads) * dim);
    const auto unit = [&](int at, int count, const float* weight) {
        double squares = 0;
        for (int i = at; i < at + count; ++i) squares += x[size_t(i)] * x[size_t(i)];
        const double scale = 1 / std::sqrt(squares / count + double(norm.eps));
        for (int i = 0; i < count; ++i)
            x[size_t(at + i)] *= scale * (weight ? double(weight[i]) : 1);
    };
    if (norm.kind == HeadNorm::full) {
        unit(0, heads * dim, norm.q);
        unit(heads * dim, kv_heads * dim, norm.k);
    }
    for (int h = 0; h < both; ++h) {
        if (norm.kind == HeadNorm::head) unit(h * dim, dim, h < heads ? norm.q : norm.k);
        for (int i = h * dim; angles && i < h * dim + half; ++i) {
            const double a = x[size_t(i)], b = x[size_t(i + half)];
            const double c = angles[i - h * dim], s = angles[half + i - h * dim];
            x[size_t(i)] = a * c - b * s;
            x[size_t(i + half)] = b * c + a * s;
        }
        if (norm.kind == HeadNorm::l2) unit(h * dim, dim, nullptr);
        for (int i = 0; norm.center && h >= heads && i < dim; ++i)
            x[size_t(h * dim + i)] -= norm.center[(h - heads) * dim + i];
    }
    return x;
}

void test_head_norm(const Kernels& kernels, int heads, int kv_heads, int dim, Random& random) {
    const int64_t count = 5, width = (heads + 2 * kv_heads) * dim;
    const Buffer before(count * width * 4), table(count * dim * 4);
    const Buffer q(heads * dim * 4), k(kv_heads * dim * 4), center(kv_heads * dim * 4);
    before.fill(random, 3.0f);
    table.fill(random);
    q.fill(random, 2.0f);
    k.fill(random, 2.0f);
    center.fill(random, 2.0f);
    const int64_t plane = kv_head_bytes(KvType::f32, dim), block = 2 * kv_heads * plane;
    const int32_t blocks[] = {0}, sequences[count] = {}, positions[] = {0, 1, 2, 3, 4};
    for (const auto kind : {HeadNorm::none, HeadNorm::head, HeadNorm::full, HeadNorm::l2})
        for (const bool turns : {true, false}) {
            const Buffer qkv(count * width * 4), alone(count * width * 4), pool(block);
            std::memcpy(qkv.data(), before.data(), static_cast<size_t>(qkv.size()));
            std::memcpy(alone.data(), before.data(), static_cast<size_t>(qkv.size()));
            const HeadNorm norm{kind, q.floats(), k.floats(), 1e-3f,
                                turns ? center.floats() : nullptr};
            const KvView kv{pool.data(), plane, blocks, 1, KvType::f32, kv_heads, dim};
            const auto angles = [&](int64_t t) {
                return Rows{turns ? table.data() + t * dim * 4 : nullptr, dim * 4};
            };
            for (int64_t t = 0; t < count; ++t)
                kernels.rope_store({alone.data() + t * width * 4, width * 4}, angles(t), heads,
                                   norm, kv, {nullptr, positions + t, sequences}, 0, 1);
            const Buffer stored(block);
            const KvView other{stored.data(), plane, blocks, 1, KvType::f32, kv_heads, dim};
            kernels.rope_store({qkv.data(), width * 4}, angles(0), heads, norm, other,
                               {nullptr, positions, sequences}, 0, count);
            double worst = 0;
            bool kept = true;
            for (int64_t t = 0; t < count; ++t) {
                const float* row = qkv.floats() + t * width;
                const std::vector<double> want =
                    turned(before.floats() + t * width, turns ? table.floats() + t * dim : nullptr,
                           heads, kv_heads, dim, norm);
                for (size_t i = 0; i < want.size(); ++i)
                    worst = std::max(worst,
                                     std::isnan(row[i]) ? INFINITY : std::fabs(row[i] - want[i]));
                for (int64_t d = 0; d < dim; ++d)  // of the first head
                    kept &= stored.floats()[d * kBlock + t] == row[heads * dim + d] &&
                            stored.floats()[(kv_heads * kBlock + t) * dim + d] ==
                                row[(heads + kv_heads) * dim + d];
            }
            const char* how = turns ? "turned, centered" : "as they are";
            check(worst < 1e-5, "%s rope_store norm %d dim %d %s: off by %g", kernels.name, kind,
                  dim, how, worst);
            check(kept, "%s rope_store norm %d dim %d %s: stores something else", kernels.name,
                  kind, dim, how);
            check(alone == qkv && pool == stored, "%s rope_store norm %d dim %d %s: rows differ",
                  kernels.name, kind, dim, how);
        }
}

}  // namespace

void test_rows(const Kernels& kernels) {
    Random random(3);
    for (const int64_t cols : {32, 64, 96, 576, 1536}) {
        for (const bool centered : {false, true}) test_norm(kernels, centered, cols, random);
        for (const Activation fn : kActivations) test_activate(kernels, fn, cols, random);
        test_quantize(kernels, cols, random);
        test_add(kernels, cols, random);
    }
    test_exactness(kernels);
    for (const int64_t cols : {1, 317, 4096, 9000}) test_softcap(kernels, cols, random);
    for (const Precision to : {Precision::a8, Precision::a12}) test_not_finite(kernels, to, random);
    for (const Format format : every_format()) test_embed(kernels, format, random);
    test_rope_table(kernels);
    for (const int dim : {16, 48, 64, 80, 256}) test_head_norm(kernels, 3, 1, dim, random);
    test_head_norm(kernels, 4, 2, 128, random);
    const Buffer memory(1 << 16);
    uint8_t sink[4];
    check(kernels.read(memory.data(), memory.size()) ==
              kernels.read(memory.data() + memory.size() / 2, memory.size() / 2) * 2,
          "%s read does not read all", kernels.name);
    check(kernels.peak(2000, sink) == 2 * kernels.peak(1000, sink), "%s peak counts", kernels.name);
}

}  // namespace pronk::test
