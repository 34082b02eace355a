// Activations of MLPs and the cap of logits, against double precision.
#include "rows.h"

namespace pronk::test {

namespace {

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

}  // namespace

void test_activations(const Kernels& kernels) {
    Random random(4);
    for (const int64_t cols : {32, 64, 96, 576, 1536})
        for (const Activation fn : kActivations) test_activate(kernels, fn, cols, random);
    test_exactness(kernels);
    for (const int64_t cols : {1, 317, 4096, 9000}) test_softcap(kernels, cols, random);
}

}  // namespace pronk::test
