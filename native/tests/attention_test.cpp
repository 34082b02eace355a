// rope_store and attention over a paged cache, against double precision.
#include <algorithm>

#include "cache.h"

namespace pronk::test {

namespace {

struct Case {
    int32_t heads, kv_heads, dim;
    KvType kv;
    float scale;  // of the queries: large ones make the softmax sharp
};

// Two sequences of different lengths in one step, their blocks scattered over the pool.
class Setup {
  public:
    Setup(const Case& c, int lengths[2])
        : c_(c),
          width_((c.heads + 2 * c.kv_heads) * c.dim),
          layer_(2 * c.kv_heads * kv_head_bytes(c.kv, c.dim)),
          pool(2 * kPool * layer_),
          tables(2 * kBlocks, -1) {
        int32_t free = 0;
        for (int s = 0; s < 2; ++s)
            for (int p = 0; p < lengths[s]; ++p) {
                int32_t& entry = tables[size_t(s * kBlocks + p / kBlock)];
                if (entry < 0) entry = (free++ * 5 + 3) % kPool;
                sequences.push_back(s);
                positions.push_back(p);
            }
    }
    int64_t tokens() const { return static_cast<int64_t>(positions.size()); }
    int64_t width() const { return width_; }
    KvView view() const {  // the second of two layers
        return {pool.data() + kPool * layer_,
                kPool * kv_head_bytes(c_.kv, c_.dim),
                tables.data(),
                kBlocks,
                c_.kv,
                c_.kv_heads,
                c_.dim};
    }
    int64_t block(int64_t token) const {
        return tables[size_t(sequences[size_t(token)] * kBlocks +
                             positions[size_t(token)] / kBlock)];
    }
    Tokens at(int64_t token) const {
        return {nullptr, positions.data() + token, sequences.data() + token};
    }

  private:
    static constexpr int kBlocks = 40, kPool = 47;
    Case c_;
    int64_t width_, layer_;

  public:
    Buffer pool;
    std::vector<int32_t> tables, positions, sequences;
};

double rotation_error(const Case& c, const float* before, const float* after, const float* angles) {
    double worst = 0;
    const int half = c.dim / 2;
    for (int h = 0; h < c.heads + 2 * c.kv_heads; ++h)
        for (int d = 0; d < c.dim; ++d) {
            const float* x = before + h * c.dim;
            double want = x[d];
            if (h < c.heads + c.kv_heads) {
                const double cos = angles[d % half], sin = angles[half + d % half];
                want = d < half ? x[d] * cos - x[d + half] * sin : x[d] * cos + x[d - half] * sin;
            }
            worst = std::max(worst, std::fabs(after[h * c.dim + d] - want) / 1e-6);
        }
    return worst;
}

// What the cache keeps of keys and values, of every token the keys of all heads first.
std::vector<double> kept_rows(const Case& c, const Setup& setup, const Buffer& qkv) {
    std::vector<double> all;
    for (int64_t t = 0; t < setup.tokens(); ++t)
        for (int h = 0; h < 2 * c.kv_heads; ++h) {
            const auto row = kept(setup.view(), setup.block(t), setup.positions[size_t(t)], h,
                                  qkv.floats() + t * setup.width() + (c.heads + h) * c.dim);
            all.insert(all.end(), row.begin(), row.end());
        }
    return all;
}

// Error of one head of one token, as a share of what float scores allow, and the rounding of
// weights where there is any.
double attention_error(const Kernels& kernels, const Case& c, const Setup& setup, const Buffer& qkv,
                       const std::vector<double>& kept, int64_t t, int h, const float* got,
                       float softmax_scale) {
    const double rounding = rounds_weights(kernels, c.kv) ? std::ldexp(1, -8) : 0;
    const int64_t kv = h / (c.heads / c.kv_heads);
    const auto q =
        taken(kernels, c.kv, c.dim, softmax_scale, qkv.floats() + t * setup.width() + h * c.dim);
    std::vector<double> scores, sum(static_cast<size_t>(c.dim)), size(static_cast<size_t>(c.dim));
    double top = -INFINITY, total = 0, largest = 0;
    const int64_t start = t - setup.positions[size_t(t)];
    for (int64_t s = start; s <= t; ++s) {
        const double* k = kept.data() + (s * 2 * c.kv_heads + kv) * c.dim;
        double dot = 0, magnitude = 0;
        for (int d = 0; d < c.dim; ++d) {
            dot += q[size_t(d)] * k[d];
            magnitude += std::fabs(q[size_t(d)] * k[d]);
        }
        scores.push_back(dot * double(softmax_scale));
        top = std::max(top, scores.back());
        largest = std::max(largest, magnitude * double(softmax_scale));
    }
    for (int64_t s = start; s <= t; ++s) {
        const double* v = kept.data() + ((s * 2 + 1) * c.kv_heads + kv) * c.dim;
        const double p = std::exp(scores[size_t(s - start)] - top);
        total += p;
        for (int d = 0; d < c.dim; ++d) {
            sum[size_t(d)] += p * v[d];
            size[size_t(d)] += p * std::fabs(v[d]);
        }
    }
    double worst = 0;
    for (int d = 0; d < c.dim; ++d) {
        const double error = std::fabs(got[d] - sum[size_t(d)] / total);
        const double bound = 2e-6 * (2 + largest) + rounding * size[size_t(d)] / total;
        worst = std::isnan(got[d]) ? INFINITY : std::max(worst, error / bound);
    }
    return worst;
}

void test_case(const Kernels& kernels, const Case& c, int first_length, int second_length) {
    Random random(static_cast<uint64_t>(c.dim * 1000 + first_length));
    int lengths[2] = {first_length, second_length};
    const Setup setup(c, lengths);
    const int64_t n = setup.tokens(), stride = setup.width() * 4, out_stride = c.heads * c.dim * 4;
    const Buffer before(n * stride), qkv(n * stride), table(n * c.dim * 4), out(n * out_stride);
    before.fill(random);
    for (int64_t t = 0; t < n; ++t) {
        for (int i = 0; i < c.heads * c.dim; ++i) before.floats()[t * setup.width() + i] *= c.scale;
        for (int i = 0; i < c.dim / 2; ++i) {
            const double angle = setup.positions[size_t(t)] * std::pow(0.9, i);
            table.floats()[t * c.dim + i] = static_cast<float>(std::cos(angle));
            table.floats()[t * c.dim + c.dim / 2 + i] = static_cast<float>(std::sin(angle));
        }
    }
    std::memcpy(qkv.data(), before.data(), static_cast<size_t>(n * stride));
    const Rows rows{qkv.data(), stride}, angles{table.data(), c.dim * 4};
    const float scale = 1 / std::sqrt(static_cast<float>(c.dim));
    kernels.rope_store(rows, angles, c.heads, {}, setup.view(), setup.at(0), 0, n / 2);
    kernels.rope_store(rows, angles, c.heads, {}, setup.view(), setup.at(0), n / 2, n);
    kernels.attention(rows, c.heads, {scale}, setup.view(), setup.at(0), {out.data(), out_stride},
                      n, 0, n * c.kv_heads);
    const std::vector<double> kept = kept_rows(c, setup, qkv);
    double rotation = 0, worst = 0;
    for (int64_t t = 0; t < n; ++t) {
        rotation = std::max(
            rotation, rotation_error(c, before.floats() + t * setup.width(),
                                     qkv.floats() + t * setup.width(), table.floats() + t * c.dim) /
                          std::max(1.0f, c.scale));
        for (int h = 0; h < c.heads; ++h)
            worst =
                std::max(worst, attention_error(kernels, c, setup, qkv, kept, t, h,
                                                out.floats() + (t * c.heads + h) * c.dim, scale));
    }
    const char* kv = kv_names[static_cast<int>(c.kv)];
    check(rotation <= 1, "%s rope_store dim %d %s", kernels.name, c.dim, kv);
    check(worst <= 1, "%s attention dim %d heads %d/%d %s lengths %d, %d: %.2f of the bound",
          kernels.name, c.dim, c.heads, c.kv_heads, kv, first_length, second_length, worst);

    // The same tokens one at a time: the same cache and the same outputs, bit for bit.
    const Setup again(c, lengths);
    const Buffer one(stride), alone(n * out_stride);
    for (int64_t t = 0; t < n; ++t) {
        std::memcpy(one.data(), before.data() + t * stride, static_cast<size_t>(stride));
        kernels.rope_store({one.data(), stride}, {table.data() + t * c.dim * 4, c.dim * 4}, c.heads,
                           {}, again.view(), again.at(t), 0, 1);
        for (int h = c.kv_heads; h-- > 0;)
            kernels.attention({one.data(), stride}, c.heads, {scale}, again.view(), again.at(t),
                              {alone.data() + t * out_stride, out_stride}, 1, h, h + 1);
    }
    check(again.pool == setup.pool && alone == out,
          "%s attention dim %d %s: one token at a time differs", kernels.name, c.dim, kv);

    // The query heads of a KV head one by one: the same bits.
    Attend shared{scale};
    shared.shares = c.heads / c.kv_heads;
    const Buffer split(n * out_stride);
    for (int64_t i = n * c.heads; i-- > 0;)
        kernels.attention(rows, c.heads, shared, setup.view(), setup.at(0),
                          {split.data(), out_stride}, n, i, i + 1);
    check(split == out, "%s attention dim %d %s: heads one by one differ", kernels.name, c.dim, kv);

    // In parts that are joined: the same bits.
    const int64_t chunks = std::max(first_length, second_length) / kChunk + 1;
    const int64_t part_stride = c.heads * (c.dim + kPartTail) * 4;
    const Buffer parts(n * chunks * part_stride), joined(n * out_stride);
    const Rows part_rows{parts.data(), part_stride};
    kernels.attention_parts(rows, c.heads, {scale}, setup.view(), setup.at(0), part_rows, n, chunks,
                            0, chunks * c.kv_heads);
    kernels.attention_join(part_rows, c.heads, {}, setup.view(), setup.at(0), chunks,
                           {joined.data(), out_stride}, 0, n * c.heads);
    check(joined == out, "%s attention dim %d %s lengths %d, %d: parts differ", kernels.name, c.dim,
          kv, first_length, second_length);
}

// What is no number in a row of keys or values is none in what attention gives.
void test_no_number(const Kernels& kernels, KvType kv) {
    const Case c{1, 1, 64, kv, 1.0f};
    for (const float bad : {INFINITY, -INFINITY, NAN})
        for (const int at : {64, 100, 127, 128, 150, 191}) {  // of the key, then of the value
            Random random(9);
            int lengths[2] = {1, 0};
            const Setup setup(c, lengths);
            const Buffer qkv(setup.width() * 4), out(c.dim * 4);
            qkv.fill(random);
            qkv.floats()[at] = bad;
            const Rows rows{qkv.data(), setup.width() * 4};
            kernels.rope_store(rows, {nullptr, 0}, 1, {}, setup.view(), setup.at(0), 0, 1);
            kernels.attention(rows, 1, {0.125f}, setup.view(), setup.at(0), {out.data(), c.dim * 4},
                              1, 0, 1);
            bool seen = false;
            for (int d = 0; d < c.dim; ++d) seen |= !std::isfinite(out.floats()[d]);
            check(seen, "%s %s hides %g at %d", kernels.name, kv_names[static_cast<int>(kv)],
                  double(bad), at);
        }
}

}  // namespace

void test_attention(const Kernels& kernels) {
    test_no_number(kernels, KvType::int4);
    test_no_number(kernels, KvType::int4_plain);
    for (const KvType kv : kv_types) {
        for (const int32_t dim : {16, 64, 80, 96, 128}) {
            for (const int length : {1, 2, 15, 16, 17, 31, 32, 33, 64, 65})
                test_case(kernels, {3, 1, dim, kv, 1.0f}, length, 1 + length / 3);
            test_case(kernels, {4, 2, dim, kv, 1.0f}, 100, 37);
            test_case(kernels, {2, 2, dim, kv, 40.0f}, 100, 5);
        }
        test_case(kernels, {1, 1, 256, kv, 1.0f}, 40, 3);
        test_case(kernels, {6, 1, 16, kv, 10.0f}, 2 * kChunk + 7, 3);
        test_case(kernels, {3, 3, 32, kv, 1.0f}, kChunk + 1, kChunk);
        test_case(kernels, {20, 1, 32, kv, 1.0f}, 70, 9);  // more heads than a tile has rows
    }
}

}  // namespace pronk::test
