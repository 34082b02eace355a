// matmul against double precision, exact where the sums are integers, and the same bits however
// many tokens share a call and however the panels are split.
#include <algorithm>

#include "blocks.h"

namespace pronk::test {

namespace {

struct Activations {  // token rows as a matmul wants them
    Activations(Precision precision, int64_t tokens, int64_t cols, Fill fill, Random& random)
        : precision(precision),
          quantized(is_quantized(precision)),
          cols(cols),
          stride(round_up(act_row_bytes(cols, precision), 64) + 64),
          // What a last block has no tokens for stays NaN and -1.
          buffer((quantized ? round_up(tokens, 16) : tokens) * stride) {
        for (int64_t t = 0; t < tokens; ++t) quantized ? quants(t, fill, random) : reals(t, random);
    }
    Rows rows() const { return {buffer.data(), stride}; }
    // The integer (or the float) of token t at k.
    double value(int64_t t, int64_t k) const {
        if (!quantized) return rows().row<float>(t)[k];
        const int8_t* q = group(t, k / 32) + k % 32;
        return precision == Precision::a8 ? q[0] : 16 * q[0] + q[32];
    }
    double scale(int64_t t, int64_t g) const { return quantized ? double(*scales(t, g)) : 1.0; }

    Precision precision;
    bool quantized;
    int64_t cols, stride;
    Buffer buffer;

  private:
    int64_t step() const { return precision == Precision::a8 ? 32 : 64; }
    uint8_t* block(int64_t t) const { return buffer.data() + t / 16 * 16 * stride; }
    int8_t* group(int64_t t, int64_t g) const {
        return reinterpret_cast<int8_t*>(block(t)) + (t % 16 * (cols / 32) + g) * step();
    }
    float* scales(int64_t t, int64_t g) const {
        return reinterpret_cast<float*>(block(t) + 16 * (cols / 32) * step()) +
               (g * 16 + t % 16) * 4;
    }
    void reals(int64_t t, Random& random) {
        for (int64_t k = 0; k < cols; ++k) rows().row<float>(t)[k] = random.uniform();
    }
    void quants(int64_t t, Fill fill, Random& random) {
        for (int64_t g = 0; g < cols / 32; ++g) {
            int8_t* q = group(t, g);
            int32_t sums[2] = {0, 0};
            // A whole group of one sign drives the narrow sums to their bounds.
            const int kind = random.below(6);
            for (int k = 0; k < 32; ++k) {
                int high = random.below(255) - 127, low = random.below(17) - 8;
                if (kind < 2) high = kind == 0 ? 127 : -127, low = kind == 0 ? 8 : -8;
                if (kind == 2) high = k % 2 ? 127 : -127, low = k % 2 ? -8 : 8;
                if (kind == 3) high = 0;
                q[k] = static_cast<int8_t>(high);
                if (precision == Precision::a12) q[k + 32] = static_cast<int8_t>(low);
                sums[k / 16] += static_cast<int32_t>(value(t, g * 32 + k));
            }
            float* s = scales(t, g);
            s[0] = fill == Fill::unit ? 1.0f : std::fabs(random.uniform());
            s[1] = s[0] * static_cast<float>(sums[0] + sums[1]);
            std::memcpy(s + 2, sums, 8);
        }
    }
};

struct Sum {
    double value = 0, magnitude = 0;
    void add(double term) {
        value += term;
        magnitude += std::fabs(term);
    }
};

// One row of weights, decoded, times one token.
Sum reference(Format format, const std::vector<Element>& row, const Activations& x, int64_t t) {
    const int64_t unit = !x.quantized ? 1 : format == Format::q6_k ? 16 : 32;
    Sum sum;
    for (int64_t from = 0; from < x.cols; from += unit) {
        double dot = 0, total = 0;
        for (int64_t k = from; k < from + unit; ++k) {
            dot += row[size_t(k)].quant * x.value(t, k);
            total += x.value(t, k);
        }
        const double scale = x.scale(t, from / 32);
        sum.add(row[size_t(from)].scale * scale * dot);
        sum.add(row[size_t(from)].minimum * scale * total);
    }
    return sum;
}

struct Shape {
    int64_t rows, cols;
    Fill fill = Fill::random;
    bool extras = false;               // a bias and a residual
    std::vector<int64_t> counts = {};  // of tokens to be tried besides kTokens
    float scale = 1;
};

constexpr int64_t kTokens = 37, kColumn = 16;

class Case {
  public:
    Case(const Kernels& kernels, Format format, Precision precision, const Shape& shape)
        : kernels_(kernels),
          shape_(shape),
          random_(static_cast<uint64_t>(shape.rows * 7919 + shape.cols * 31) +
                  static_cast<uint64_t>(format)),
          width_(round_up(shape.rows, kPanel)),
          stride_((kColumn + width_ + 16) * 4),
          w_(kernels, format, shape.rows, shape.cols, shape.fill, random_),
          x_(precision, kTokens, shape.cols, shape.fill, random_),
          bias_(width_ * 4),
          residual_(kTokens * stride_),
          out_(kTokens * stride_) {
        std::snprintf(name_, sizeof name_, "%s matmul %s a%d %lldx%lld fill %d", kernels.name,
                      format_name(format), precision == Precision::a8 ? 8 : 12,
                      static_cast<long long>(shape.rows), static_cast<long long>(shape.cols),
                      static_cast<int>(shape.fill));
        bias_.fill(random_);
        residual_.fill(random_);
        run(out_, kTokens, 0, panels());
    }
    const Buffer& out() const { return out_; }
    const char* name() const { return name_; }

    void check_values() const {
        const bool quantized = x_.quantized;
        const double steps =
            static_cast<double>(quantized ? shape_.cols / kGroup * 3 : shape_.cols) + 4;
        double worst = 0;
        int64_t integers = 0, wrong = 0;
        std::vector<Element> row(static_cast<size_t>(shape_.cols));
        for (int64_t n = 0; n < shape_.rows; ++n) {
            for (int64_t k = 0; k < shape_.cols; ++k) row[size_t(k)] = w_.element(n, k);
            for (int64_t t = 0; t < kTokens; ++t) {
                const float got = at(out_, t)[n];
                Sum want = reference(w_.format, row, x_, t);
                if (want.magnitude < 0x1p24) {
                    ++integers;
                    wrong += static_cast<double>(got) != want.value;
                }
                if (shape_.extras) want.add(bias_.floats()[n]);
                want.value *= shape_.scale, want.magnitude *= std::fabs(shape_.scale);
                if (shape_.extras) {
                    want.add(at(residual_, t)[n]);
                }
                const double bound = steps * 0x1p-24 * want.magnitude + 1e-40;
                worst = std::max(worst, std::fabs(got - want.value) / bound);
                if (std::isnan(got)) worst = INFINITY;
            }
        }
        check(worst <= 1, "%s: %.2f of the bound", name_, worst);
        if (shape_.fill == Fill::unit && quantized && !shape_.extras)
            check(integers > 0 && !wrong, "%s: %lld of %lld integers are not exact", name_,
                  static_cast<long long>(wrong), static_cast<long long>(integers));
    }

    void check_bounds() const {
        bool outside = true;
        for (int64_t t = 0; t < kTokens; ++t)
            for (const float* p : {at(out_, t) - kColumn, at(out_, t) + width_})
                for (int i = 0; i < 16; ++i) outside &= untouched(p + i);
        check(outside, "%s: wrote outside its columns", name_);
    }

    void check_counts() const {
        for (const int64_t count : shape_.counts) {
            const Buffer some(kTokens * stride_);
            run(some, count, 0, panels());
            check(same(some.data(), out_.data(), count * stride_), "%s: %lld tokens differ from 37",
                  name_, static_cast<long long>(count));
            bool outside = true;
            for (int64_t i = count * stride_ / 4; i < some.size() / 4; ++i)
                outside &= untouched(some.floats() + i);
            check(outside, "%s: %lld tokens write the rows of others", name_,
                  static_cast<long long>(count));
        }
    }

    void check_splits() const {
        const Buffer one(kTokens * stride_), two(kTokens * stride_);
        for (int64_t p = panels(); p-- > 0;) run(one, kTokens, p, p + 1);
        check(one == out_, "%s: single panels differ", name_);
        const int64_t cut = (panels() + 1) / 3;
        run(two, kTokens, cut, panels());
        run(two, kTokens, 0, cut);
        check(two == out_, "%s: panels split at %lld differ", name_, static_cast<long long>(cut));
    }

  private:
    int64_t panels() const { return width_ / kPanel; }
    float* at(const Buffer& b, int64_t t) const { return b.floats() + t * stride_ / 4 + kColumn; }
    static bool untouched(const float* p) {
        static const uint8_t fill[4] = {0xff, 0xff, 0xff, 0xff};
        return same(p, fill, 4);
    }
    void run(const Buffer& out, int64_t count, int64_t first, int64_t last) const {
        const MatmulPart part{w_.packed.data(),
                              w_.format,
                              static_cast<int32_t>(shape_.rows),
                              kColumn,
                              shape_.extras ? bias_.floats() : nullptr,
                              shape_.scale};
        const Rows add{shape_.extras ? residual_.data() : nullptr, stride_};
        kernels_.matmul(part, shape_.cols, x_.rows(), x_.precision, {out.data(), stride_}, add,
                        count, first, last);
    }
    const Kernels& kernels_;
    const Shape& shape_;
    Random random_;
    int64_t width_, stride_;
    Weights w_;
    Activations x_;
    Buffer bias_, residual_, out_;
    char name_[96];
};

std::vector<Shape> shapes(Format format) {
    // Tails of every kind: by vectors (1 to 4), by half a tile (5 to 8), by a tile (9 to 15).
    const std::vector<int64_t> ends = {1, 2, 3, 5, 8, 9, 15, 16, 17, 20, 21, 25, 32, 36};
    std::vector<int64_t> every;
    for (int64_t count = 1; count < kTokens; ++count) every.push_back(count);
    std::vector<Shape> all;
    const bool large = traits(format).block == 256;
    if (large) {
        all = {{1, 256},
               {33, 512, Fill::random, true, ends},
               {24, 1792, Fill::random, false, ends},
               {20, 768, Fill::random, true, every}};
    } else {
        all = {{1, 32},
               {16, 64, Fill::random, false, ends},
               {33, 576, Fill::random, true, ends},
               {24, 1536, Fill::random, false, ends},
               {40, 96, Fill::random, false, every},
               {20, 704, Fill::random, true, every}};
    }
    for (const Fill fill : {Fill::extreme, Fill::tiny, Fill::zero, Fill::unit})
        all.push_back({40, large ? 256 : 160, fill, false, {4, 8}});
    for (const Fill fill : {Fill::extreme, Fill::unit})
        all.push_back({17, 768, fill, fill == Fill::extreme, {4, 8}});
    for (const bool extras : {false, true})  // long enough for sums that wait in the output
        all.push_back({33, large ? 768 : 704, Fill::random, extras, ends, -0.22f});
    if (!is_grouped(format)) all.push_back({17, 41, Fill::random, true, ends});
    return all;
}

template <class Fn>
void each_case(Fn fn) {
    for (const Format format : every_format())
        for (const Shape& shape : shapes(format)) {
            if (!is_grouped(format)) {
                fn(format, Precision::f32, shape);
                continue;
            }
            fn(format, Precision::a8, shape);
            fn(format, Precision::a12, shape);
        }
}

}  // namespace

void test_matmul(const Kernels& kernels) {
    each_case([&](Format format, Precision precision, const Shape& shape) {
        const Case c(kernels, format, precision, shape);
        c.check_values();
        c.check_bounds();
        c.check_counts();
        c.check_splits();
    });
}

void test_same_matmul(const Kernels& one, const Kernels& other) {
    each_case([&](Format format, Precision precision, const Shape& shape) {
        const Case a(one, format, precision, shape), b(other, format, precision, shape);
        check(a.out() == b.out(), "%s: differs from %s", a.name(), other.name);
    });
}

}  // namespace pronk::test
