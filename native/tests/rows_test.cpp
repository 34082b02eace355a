// Kernels that work row by row, against double precision.
#include <algorithm>
#include <cstdlib>

#include "blocks.h"

namespace pronk::test {

namespace {

constexpr int64_t kRows = 19;  // a block of quantized rows, and some of the next

// Where group g of quantized row t lies: 32 high parts, 32 low ones; and its scale and sums.
struct Group {
    Group(const Buffer& rows, int64_t stride, int64_t cols, int64_t t, int64_t g) {
        const int64_t groups = cols / 32;
        const uint8_t* block = rows.data() + t / 16 * 16 * stride;
        q = reinterpret_cast<const int8_t*>(block) + (t % 16 * groups + g) * 64;
        const uint8_t* s = block + 16 * groups * 64 + (g * 16 + t % 16) * 16;
        std::memcpy(&scale, s, 4);
        std::memcpy(&scaled_sum, s + 4, 4);
        std::memcpy(sums, s + 8, 8);
    }
    const int8_t* q;
    float scale, scaled_sum;
    int32_t sums[2];
};

// How far a quantized group is from `want`, in units of what rounding allows.
double group_error(const Group& group, const double* want, double tolerance) {
    constexpr double range = 127 * 16;
    double top = 0, worst = 0;
    int32_t sums[2] = {0, 0}, integers[32];
    for (int k = 0; k < 32; ++k) {
        top = std::max(top, std::fabs(want[k]));
        if (std::abs(group.q[k]) > 127 || std::abs(group.q[k + 32]) > 8) return INFINITY;
        integers[k] = 16 * group.q[k] + group.q[k + 32];
        if (std::abs(integers[k]) > 127 * 16) return INFINITY;
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
    for (const bool quantized : {false, true}) {
        const int64_t stride = act_row_bytes(cols, quantized) + 64;
        const int64_t rows = quantized ? round_up(kRows, 16) : kRows;
        const Buffer out(rows * stride), whole(rows * stride);
        run({out.data(), stride}, quantized, 18, kRows);
        run({out.data(), stride}, quantized, 0, 2);
        run({out.data(), stride}, quantized, 2, 18);
        run({whole.data(), stride}, quantized, 0, kRows);
        double worst = 0;
        for (int64_t t = 0; t < kRows; ++t) {
            const std::vector<double> expected = want(t);
            if (!quantized)
                worst =
                    std::max(worst, row_error(out.floats() + t * stride / 4, expected, tolerance));
            for (int64_t g = 0; quantized && g < cols / 32; ++g)
                worst = std::max(worst, group_error({out, stride, cols, t, g},
                                                    expected.data() + 32 * g, tolerance));
        }
        const long long n = cols;
        const char* kind = quantized ? "quantized" : "floats";
        check(worst <= 1, "%s %s %lld %s: %.2f of the bound", kernels.name, name, n, kind, worst);
        check(out == whole, "%s %s %lld %s: ranges differ", kernels.name, name, n, kind);
        for (int64_t t = kRows; t < rows; ++t)  // rows that nobody asked for
            for (int64_t g = 0; g < cols / 32; ++g) {
                const Group group(out, stride, cols, t, g);
                check(group.q[0] == -1 && group.q[63] == -1 && group.sums[1] == -1,
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

void test_rms_norm(const Kernels& kernels, int64_t cols, Random& random) {
    const Buffer x(kRows * cols * 4), weight(cols * 4);
    fill_rows(x, cols, 1e6f, random);
    weight.fill(random, 2.0f);
    const float eps = 1e-5f;
    test_both(
        kernels, "rms_norm", cols, 1e-5,
        [&](Rows out, bool quantized, int64_t first, int64_t last) {
            kernels.rms_norm({x.data(), cols * 4}, weight.floats(), eps, cols, out, quantized,
                             first, last);
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
        [&](Rows out, bool quantized, int64_t first, int64_t last) {
            kernels.silu_mul({gate.data(), cols * 4}, {up.data(), cols * 4}, cols, out, quantized,
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
            [&](Rows out, bool quantized, int64_t first, int64_t last) {
                kernels.quantize({x.data(), cols * 4}, cols, out, quantized, first, last);
            },
            [&](int64_t t) {
                const float* row = x.floats() + t * cols;
                return std::vector<double>(row, row + cols);
            });
    }
}

// What is not finite must show in its group's scale, and nowhere else.
void test_not_finite(const Kernels& kernels, Random& random) {
    const int64_t cols = 64, stride = act_row_bytes(cols, true);
    const Buffer x(cols * 4), q(16 * stride);
    int hidden = 0, spread = 0;
    for (const float bad : {INFINITY, -INFINITY, NAN, -NAN})
        for (int k = 0; k <= 32; ++k) {
            x.fill(random);
            for (int i = 0; i < 32; ++i)
                if (i == k || k == 32) x.floats()[i] = bad;
            kernels.quantize({x.data(), cols * 4}, cols, {q.data(), stride}, true, 0, 1);
            hidden += std::isfinite(Group(q, stride, cols, 0, 0).scale);
            spread += !std::isfinite(Group(q, stride, cols, 0, 1).scale);
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
        const Buffer out(6 * cols * 4);
        const Rows rows{out.data(), cols * 4};
        kernels.embed(w.packed.data(), format, cols, ids, rows, 0, 6);
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
    }
    return x;
}

void test_head_norm(const Kernels& kernels, int heads, int kv_heads, int dim, Random& random) {
    const int64_t count = 5, width = (heads + 2 * kv_heads) * dim;
    const Buffer before(count * width * 4), table(count * dim * 4);
    const Buffer q(heads * dim * 4), k(kv_heads * dim * 4);
    before.fill(random, 3.0f);
    table.fill(random);
    q.fill(random, 2.0f);
    k.fill(random, 2.0f);
    const int64_t block = 2 * kv_heads * kv_head_bytes(KvType::f32, dim);
    const int32_t blocks[] = {0}, sequences[count] = {}, positions[] = {0, 1, 2, 3, 4};
    for (const auto kind : {HeadNorm::none, HeadNorm::head, HeadNorm::full, HeadNorm::l2})
        for (const bool turns : {true, false}) {
            const Buffer qkv(count * width * 4), alone(count * width * 4), pool(block);
            std::memcpy(qkv.data(), before.data(), static_cast<size_t>(qkv.size()));
            std::memcpy(alone.data(), before.data(), static_cast<size_t>(qkv.size()));
            const HeadNorm norm{kind, q.floats(), k.floats(), 1e-3f};
            const KvView kv{pool.data(), block, blocks, 1, KvType::f32, kv_heads, dim};
            const auto angles = [&](int64_t t) {
                return Rows{turns ? table.data() + t * dim * 4 : nullptr, dim * 4};
            };
            for (int64_t t = 0; t < count; ++t)
                kernels.rope_store({alone.data() + t * width * 4, width * 4}, angles(t), heads,
                                   norm, kv, {nullptr, positions + t, sequences}, 0, 1);
            const Buffer stored(block);
            const KvView other{stored.data(), block, blocks, 1, KvType::f32, kv_heads, dim};
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
            const char* how = turns ? "turned" : "as they are";
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
        test_rms_norm(kernels, cols, random);
        test_silu_mul(kernels, cols, random);
        test_quantize(kernels, cols, random);
        test_add(kernels, cols, random);
    }
    test_not_finite(kernels, random);
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
