// Attention that sees a part of the past, and scores that are capped or biased, against double
// precision. What no query of a step may read is gone: its blocks hold NaN, its entries of the
// block table are far outside the pool.
#include <set>

#include "cache.h"

namespace pronk::test {

namespace {

struct Shape {
    int32_t heads, kv_heads, dim;
};

struct How {
    Window window = {};
    float softcap = 0;
    bool biased = false;
    float growth = 0;
    int32_t growth_span = 1;
};

bool sees(const Window& window, int64_t query, int64_t key) {
    if (key > query) return false;
    if (window.size == 0 || key < window.sinks) return true;
    return window.chunked ? key / window.size == query / window.size : query - key < window.size;
}

// A sequence whose keys and values are stored, and which queries of it attend to.
class Sequence {
  public:
    Sequence(const Kernels& kernels, const Shape& shape, KvType kv, int64_t length, float sharpness)
        : kernels_(kernels),
          shape_(shape),
          kv_(kv),
          length_(length),
          width_((shape.heads + 2 * shape.kv_heads) * shape.dim),
          blocks_((length + kBlock - 1) / kBlock),
          qkv_(length * width_ * 4),
          pool_((blocks_ + 3) * 2 * shape.kv_heads * kv_head_bytes(kv, shape.dim)),
          sequences_(static_cast<size_t>(length)) {
        Random random(static_cast<uint64_t>(length * 1000 + shape.dim));
        qkv_.fill(random);
        for (int64_t t = 0; t < length; ++t)
            for (int i = 0; i < shape.heads * shape.dim; ++i)
                qkv_.floats()[t * width_ + i] *= sharpness;
        for (int64_t t = 0; t < length; ++t) positions_.push_back(static_cast<int32_t>(t));
        for (int64_t b = 0; b < blocks_; ++b)  // scattered; some of the pool stays unused
            table_.push_back(static_cast<int32_t>(blocks_ + 2 - b));
        kernels.rope_store({qkv_.data(), width_ * 4}, {nullptr, 0}, shape.heads, {},
                           view(pool_, table_), tokens(0), 0, length);
        for (int64_t t = 0; t < length; ++t)
            for (int h = 0; h < 2 * shape.kv_heads; ++h) {
                const auto row = kept(view(pool_, table_), table_[size_t(t / kBlock)], t, h,
                                      qkv_.floats() + t * width_ + (shape.heads + h) * shape.dim);
                kept_.insert(kept_.end(), row.begin(), row.end());
            }
        for (int h = 0; h < shape.heads; ++h) slopes_.push_back(0.7f / static_cast<float>(1 + h));
    }

    // Attention of tokens [from, to) in every way there is: as said, and all the same bits.
    void test(int64_t from, int64_t to, const How& how) const {
        const int64_t count = to - from, row = shape_.heads * shape_.dim * 4;
        const Buffer together(count * row), alone(count * row), joined(count * row),
            one(count * row);
        run(from, to, how, together.data());
        for (int64_t t = from; t < to; ++t) run(t, t + 1, how, alone.data() + (t - from) * row);
        run_parts(from, to, how, joined.data());
        for (int64_t t = from; t < to; ++t) run_parts(t, t + 1, how, one.data() + (t - from) * row);
        double worst = 0;
        for (int64_t t = from; t < to; t += 1 + count / 12)
            for (int h = 0; h < shape_.heads; ++h)
                worst = std::max(
                    worst, error(t, h, how,
                                 together.floats() + ((t - from) * shape_.heads + h) * shape_.dim));
        char name[160];
        std::snprintf(name, sizeof name,
                      "%s %s heads %d/%d of %d, tokens %lld to %lld, %s %d sinks %d cap %g%s "
                      "growth %g",
                      kernels_.name, kv_names[static_cast<int>(kv_)], shape_.heads, shape_.kv_heads,
                      shape_.dim, static_cast<long long>(from), static_cast<long long>(to),
                      how.window.chunked ? "chunks" : "window", how.window.size, how.window.sinks,
                      double(how.softcap), how.biased ? " biased" : "", double(how.growth));
        check(worst <= 1, "%s: %.2f of the bound", name, worst);
        check(alone == together, "%s: one at a time differs", name);
        check(joined == together, "%s: parts differ", name);
        check(one == together, "%s: parts of one at a time differ", name);
    }

  private:
    KvView view(const Buffer& pool, const std::vector<int32_t>& table) const {
        const int64_t plane = (blocks_ + 3) * kv_head_bytes(kv_, shape_.dim);
        return {pool.data(), plane, table.data(), blocks_, kv_, shape_.kv_heads, shape_.dim};
    }
    Tokens tokens(int64_t from) const {
        return {nullptr, positions_.data() + from, sequences_.data()};
    }
    Attend attend(const How& how) const {
        return {scale(),    how.window,     how.softcap, how.biased ? slopes_.data() : nullptr,
                how.growth, how.growth_span};
    }
    float scale() const { return 1 / std::sqrt(static_cast<float>(shape_.dim)); }

    // The cache with nothing in it but what the tokens see.
    template <class Fn>
    void bare(int64_t from, int64_t to, const Window& window, Fn fn) const {
        std::set<int64_t> seen;
        for (int64_t t = from; t < to; ++t)
            for (int64_t p = 0; p <= t; ++p)
                if (sees(window, t, p)) seen.insert(p / kBlock);
        const Buffer pool(pool_.size());
        std::vector<int32_t> table(table_.size(), -100000000);
        for (const int64_t b : seen) {
            const int64_t at = table[size_t(b)] = table_[size_t(b)];
            const int64_t size = kv_head_bytes(kv_, shape_.dim);
            for (int64_t i = at * size; i < pool_.size(); i += (blocks_ + 3) * size)
                std::memcpy(pool.data() + i, pool_.data() + i, static_cast<size_t>(size));
        }
        fn(view(pool, table));
    }
    Rows queries(int64_t from) const { return {qkv_.data() + from * width_ * 4, width_ * 4}; }

    void run(int64_t from, int64_t to, const How& how, uint8_t* out) const {
        const int64_t count = to - from;
        bare(from, to, how.window, [&](const KvView& kv) {
            kernels_.attention(queries(from), shape_.heads, attend(how), kv, tokens(from),
                               {out, shape_.heads * shape_.dim * 4}, count, 0,
                               count * shape_.kv_heads);
        });
    }

    void run_parts(int64_t from, int64_t to, const How& how, uint8_t* out) const {
        const int64_t count = to - from, stride = shape_.heads * (shape_.dim + kPartTail) * 4;
        int64_t chunks = 0;
        for (int64_t t = from; t < to; ++t) {
            std::set<int64_t> seen;
            for (int64_t p = 0; p <= t; ++p)
                if (sees(how.window, t, p)) seen.insert(p / kChunk);
            std::set<int64_t> named;
            for (int64_t c = 0; c < how.window.chunks(t); ++c) named.insert(how.window.chunk(t, c));
            if (named != seen)
                check(false, "window %d sinks %d: chunks of token %lld", how.window.size,
                      how.window.sinks, static_cast<long long>(t));
            chunks = std::max(chunks, how.window.chunks(t));
        }
        const Buffer parts(count * chunks * stride);
        bare(from, to, how.window, [&](const KvView& kv) {
            for (int64_t i = chunks * shape_.kv_heads; i-- > 0;)
                kernels_.attention_parts(queries(from), shape_.heads, attend(how), kv, tokens(from),
                                         {parts.data(), stride}, count, chunks, i, i + 1);
            kernels_.attention_join({parts.data(), stride}, shape_.heads, how.window, kv,
                                    tokens(from), chunks, {out, shape_.heads * shape_.dim * 4}, 0,
                                    count * shape_.heads);
        });
    }

    // What the cache keeps of the keys of a head at a position, or behind all heads the values.
    const double* row(int64_t position, int64_t head) const {
        return kept_.data() + (position * 2 * shape_.kv_heads + head) * shape_.dim;
    }

    // As a share of what float scores allow.
    double error(int64_t t, int h, const How& how, const float* got) const {
        const int64_t kv = h / (shape_.heads / shape_.kv_heads);
        const double factor =
            1 + double(how.growth) * std::log1p(double((t + 1) / how.growth_span));
        const auto q = taken(kernels_, kv_, shape_.dim, scale() * float(factor),
                             qkv_.floats() + t * width_ + h * shape_.dim);
        std::vector<double> sum(static_cast<size_t>(shape_.dim)), size(sum);
        std::vector<std::pair<int64_t, double>> scores;
        double top = -INFINITY, total = 0, largest = double(how.softcap);
        for (int64_t p = 0; p <= t; ++p) {
            if (!sees(how.window, t, p)) continue;
            const double* k = row(p, kv);
            double score = 0, magnitude = 0, bias = 0;
            for (int d = 0; d < shape_.dim; ++d) {
                const double product = q[size_t(d)] * k[d];
                score += product;
                magnitude += std::fabs(product);
            }
            score *= double(scale()) * factor;
            if (how.softcap > 0)
                score = double(how.softcap) * std::tanh(score / double(how.softcap));
            if (how.biased) bias = double(slopes_[size_t(h)]) * double(p - t);
            scores.emplace_back(p, score + bias);
            top = std::max(top, score + bias);
            largest = std::max(largest, magnitude * double(scale()) * factor + std::fabs(bias));
        }
        for (const auto& [p, score] : scores) {
            const double* v = row(p, shape_.kv_heads + kv);
            const double weight = std::exp(score - top);
            total += weight;
            for (int d = 0; d < shape_.dim; ++d) {
                sum[size_t(d)] += weight * v[d];
                size[size_t(d)] += weight * std::fabs(v[d]);
            }
        }
        const double rounding = rounds_weights(kernels_, kv_) ? std::ldexp(1, -8) : 0;
        double worst = 0;
        for (int d = 0; d < shape_.dim; ++d) {
            const double off = std::fabs(got[d] - sum[size_t(d)] / total);
            const double bound = 2e-6 * (2 + largest) + rounding * size[size_t(d)] / total;
            worst = std::isnan(got[d]) ? INFINITY : std::max(worst, off / bound);
        }
        return worst;
    }

    const Kernels& kernels_;
    Shape shape_;
    KvType kv_;
    int64_t length_, width_, blocks_;
    Buffer qkv_, pool_;
    std::vector<int32_t> table_, positions_, sequences_;
    std::vector<float> slopes_;
    std::vector<double> kept_;
};

void test_type(const Kernels& kernels, KvType kv) {
    const auto last = [](int32_t size, int32_t sinks = 0) {
        return How{{size, false, sinks}, 0, false, 0, 1};
    };
    const auto chunk = [](int32_t size, int32_t sinks = 0) {
        return How{{size, true, sinks}, 0, false, 0, 1};
    };
    const Sequence short_one(kernels, {3, 1, 32}, kv, 130, 1);
    for (const int32_t size : {1, 2, 31, 32, 33, 50, 96, 130, 1000})
        for (const int32_t sinks : {0, 1, 32, 40, 200}) {
            short_one.test(0, 40, last(size, sinks));
            short_one.test(95, 130, last(size, sinks));
            short_one.test(60, 100, chunk(size, sinks));
        }
    const Sequence longer(kernels, {6, 2, 64}, kv, 2 * kChunk + 40, 8);
    for (const int32_t size : {1, 33, 100, 511, 512, 513, 700})
        for (const int32_t sinks : {0, 4, 520, 1100}) {
            longer.test(kChunk - 9, kChunk + 9, last(size, sinks));
            longer.test(2 * kChunk - 5, 2 * kChunk + 40, last(size, sinks));
            longer.test(2 * kChunk - 5, 2 * kChunk + 5, chunk(size, sinks));
        }
    // Tiles whose queries begin in different chunks, and one that ends where others begin.
    const Sequence many(kernels, {1, 1, 16}, kv, 3 * kChunk, 1);
    many.test(3 * kChunk - 150, 3 * kChunk, last(kChunk - 60));
    many.test(2 * kChunk - 90, 2 * kChunk + 60, chunk(kChunk));
    many.test(2 * kChunk - 90, 2 * kChunk + 60, chunk(100, 7));
    many.test(2 * kChunk - 90, 2 * kChunk + 60, last(3));

    const How shaped[] = {{{}, 5, false, 0, 1},
                          {{}, 0, true, 0, 1},
                          {{}, 0, false, 0.5f, 16},
                          {{}, 50, true, 0.1f, 7},
                          {{40, false, 3}, 2, true, 0, 1},
                          {{600, true, 0}, 30, false, 0.3f, 100}};
    for (const How& how : shaped) {
        short_one.test(0, 40, how);
        short_one.test(100, 130, how);
        longer.test(kChunk - 3, kChunk + 4, how);
        longer.test(2 * kChunk + 20, 2 * kChunk + 40, how);
    }
    const Sequence wide(kernels, {4, 1, 256}, kv, kChunk + 50, 2);  // Gemma's
    wide.test(kChunk - 3, kChunk + 20, last(512));
    wide.test(kChunk + 20, kChunk + 50, {{100, false, 0}, 50, false, 0, 1});
    const Sequence crowded(kernels, {20, 1, 80}, kv, 140, 1);  // more heads than a tile has rows
    crowded.test(100, 140, {{50, false, 2}, 0, true, 0, 1});
}

}  // namespace

void test_windows(const Kernels& kernels) {
    for (const KvType kv : kv_types) test_type(kernels, kv);
}

}  // namespace pronk::test
