// Tables of angles, and queries and keys normed and turned, against double precision.
#include "rows.h"

namespace pronk::test {

namespace {

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

void test_rope(const Kernels& kernels) {
    Random random(5);
    test_rope_table(kernels);
    for (const int dim : {16, 48, 64, 80, 256}) test_head_norm(kernels, 3, 1, dim, random);
    test_head_norm(kernels, 4, 2, 128, random);
}

}  // namespace pronk::test
