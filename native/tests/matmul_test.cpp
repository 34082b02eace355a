// matmul against double precision, exact where the sums are integers, and the same bits however
// many tokens share a call and however the panels are split.
#include <algorithm>

#include "check.h"

namespace pronk::test {

namespace {

constexpr uint16_t kOne = 0x3c00, kSubnormals[] = {0x0001, 0x8001, 0x03ff, 0x0200};

uint16_t random_scale(Fill fill, Random& random) {
    switch (fill) {
        case Fill::unit: return kOne;
        case Fill::zero: return 0;
        case Fill::tiny: return kSubnormals[random.below(4)];
        case Fill::extreme: return random.below(2) ? 0x7bff : 0xfbff;  // +-65504
        case Fill::random: break;
    }
    return static_cast<uint16_t>(random.below(2) << 15 | (5 + random.below(12)) << 10 |
                                 random.below(1024));
}

uint8_t random_byte(Format format, Fill fill, Random& random) {
    const bool edge = fill == Fill::extreme || (fill == Fill::unit && random.below(2));
    if (!edge) return static_cast<uint8_t>(random.below(256));
    static const uint8_t bytes[] = {0x80, 0x7f, 0x81, 0x80}, nibbles[] = {0xff, 0x00, 0xf0, 0x0f};
    return (format == Format::q8_0 ? bytes : nibbles)[random.below(4)];
}

struct Activations {  // token rows as a matmul wants them, in any number of planes
    Activations(int planes, int64_t tokens, int64_t cols, Fill fill, Random& random)
        : planes(planes),
          cols(cols),
          stride(round_up(act_row_bytes(cols, planes), 64)),
          buffer(tokens * stride) {
        for (int64_t t = 0; t < tokens; ++t) planes ? quants(t, fill, random) : reals(t, random);
    }
    void reals(int64_t t, Random& random) {
        for (int64_t k = 0; k < cols; ++k) rows().row<float>(t)[k] = random.uniform();
    }
    void quants(int64_t t, Fill fill, Random& random) {
        int8_t* q = rows().row<int8_t>(t);
        float* scale = reinterpret_cast<float*>(q + planes * cols);
        const int64_t groups = cols / kGroup;
        for (int64_t g = 0; g < groups; ++g) {
            int32_t sums[2] = {0, 0};
            for (int plane = 0; plane < planes; ++plane) {
                // A whole group of one sign drives the narrow sums to their bounds.
                const int kind = random.below(4);
                for (int64_t k = g * kGroup; k < (g + 1) * kGroup; ++k) {
                    const int x = kind == 0 ? 127 : kind == 1 ? -127 : random.below(255) - 127;
                    q[plane * cols + k] = static_cast<int8_t>(x);
                    sums[plane] += x;
                }
                std::memcpy(scale + (2 + plane) * groups + g, &sums[plane], 4);
            }
            const int32_t sum = planes == 2 ? 128 * sums[0] + sums[1] : sums[0];
            scale[g] = fill == Fill::unit ? 1.0f : std::fabs(random.uniform());
            scale[groups + g] = scale[g] * static_cast<float>(sum);
        }
    }
    Rows rows() const { return {buffer.data(), stride}; }
    double value(int64_t t, int64_t k) const {
        if (!planes) return rows().row<float>(t)[k];
        const int8_t* q = rows().row<int8_t>(t);
        return planes == 2 ? 128 * q[k] + q[cols + k] : q[k];
    }
    double scale(int64_t t, int64_t g) const {
        return reinterpret_cast<float*>(rows().row<int8_t>(t) + planes * cols)[g];
    }
    int planes;
    int64_t cols, stride;
    Buffer buffer;
};

struct Sum {
    double value, magnitude;
};

Sum reference(const Weights& w, const Activations& x, int64_t row, int64_t t) {
    Sum sum{0, 0};
    if (!x.planes) {
        for (int64_t k = 0; k < w.cols; ++k) {
            const double term = w.value(row, k) * x.value(t, k);
            sum.value += term;
            sum.magnitude += std::fabs(term);
        }
        return sum;
    }
    for (int64_t g = 0; g < w.cols / kGroup; ++g) {
        double dot = 0, total = 0;
        for (int64_t k = g * kGroup; k < (g + 1) * kGroup; ++k) {
            dot += w.quant(row, k) * x.value(t, k);
            total += x.value(t, k);
        }
        const double a = w.scale(row, g) * x.scale(t, g) * dot;
        const double b = w.minimum(row, g) * x.scale(t, g) * total;
        sum.value += a + b;
        sum.magnitude += std::fabs(a) + std::fabs(b);
    }
    return sum;
}

void test_case(const Kernels& kernels, Format format, int planes, int64_t rows, int64_t cols,
               Fill fill, bool extras, bool every_count) {
    Random random(static_cast<uint64_t>(rows * 7919 + cols * 31 + static_cast<int>(format)));
    constexpr int64_t tokens = 19, column = 16;
    const Weights w(kernels, format, rows, cols, fill, random);
    const Activations x(planes, tokens, cols, fill, random);
    const int64_t width = round_up(rows, kPanel), stride = (column + width + 16) * 4;
    const Buffer bias(width * 4), residual(tokens * stride);
    bias.fill(random);
    residual.fill(random);
    const MatmulPart part{w.packed.data(), format, static_cast<int32_t>(rows), column,
                          extras ? bias.floats() : nullptr};
    const Rows add{extras ? residual.data() : nullptr, stride};
    const int64_t panels = width / kPanel;
    const auto run = [&](const Buffer& out, int64_t count, int64_t first, int64_t last) {
        kernels.matmul(part, planes, cols, x.rows(), {out.data(), stride}, add, count, first, last);
    };
    const Buffer out(tokens * stride), untouched(tokens * stride);
    run(out, tokens, 0, panels);

    const char* name = format_name(format);
    double worst = 0;
    bool outside = true, exact = true;
    for (int64_t t = 0; t < tokens; ++t) {
        const float* got = out.floats() + t * stride / 4 + column;
        for (int64_t n = 0; n < rows; ++n) {
            Sum want = reference(w, x, n, t);
            exact &= want.magnitude >= 0x1p24 || static_cast<double>(got[n]) == want.value;
            if (extras) {
                const double b = bias.floats()[n], r = residual.floats()[t * stride / 4 + 16 + n];
                want.value += b + r;
                want.magnitude += std::fabs(b) + std::fabs(r);
            }
            const double steps = static_cast<double>(x.planes ? cols / kGroup * 3 : cols) + 4;
            const double bound = steps * 0x1p-24 * want.magnitude + 1e-40;
            worst = std::max(worst, std::fabs(got[n] - want.value) / bound);
            if (std::isnan(got[n])) worst = INFINITY;
        }
        outside &= same(out.data() + t * stride, untouched.data(), column * 4) &&
                   same(out.data() + (t + 1) * stride - 64, untouched.data(), 64);
    }
    const long long r = rows, c = cols;
    check(worst <= 1, "%s matmul %s/%d %lldx%lld fill %d: %.2f of the bound", kernels.name, name,
          planes, r, c, static_cast<int>(fill), worst);
    check(outside, "%s matmul %s/%d %lldx%lld: wrote outside its columns", kernels.name, name,
          planes, r, c);
    if (fill == Fill::unit && x.planes && !extras)
        check(exact, "%s matmul %s/%d %lldx%lld: integers are not exact", kernels.name, name,
              planes, r, c);

    for (int64_t count = 1; count < tokens; count += every_count ? 1 : 7) {
        const Buffer some(tokens * stride);
        run(some, count, 0, panels);
        check(same(some.data(), out.data(), count * stride),
              "%s matmul %s/%d %lldx%lld: %lld tokens differ from 19", kernels.name, name, planes,
              r, c, static_cast<long long>(count));
    }
    const Buffer split(tokens * stride);
    for (int64_t p = panels; p-- > 0;) run(split, tokens, p, p + 1);
    check(split == out, "%s matmul %s/%d %lldx%lld: split panels differ", kernels.name, name,
          planes, r, c);
}

}  // namespace

Weights::Weights(const Kernels& kernels, Format format, int64_t rows, int64_t cols, Fill fill,
                 Random& random)
    : format(format),
      rows(rows),
      cols(cols),
      source(static_cast<size_t>(rows * row_bytes(format, cols))),
      packed(packed_bytes(format, rows, cols)) {
    const auto put = [&](int64_t at, uint16_t h) { std::memcpy(&source[size_t(at)], &h, 2); };
    if (is_grouped(format)) {
        const int64_t size = row_bytes(format, kGroup), head = format == Format::q4_1 ? 4 : 2;
        for (int64_t at = 0; at < static_cast<int64_t>(source.size()); at += size) {
            // Some groups of every kind of matrix are all zero.
            const Fill kind = random.below(6) || fill == Fill::unit ? fill : Fill::zero;
            put(at, random_scale(kind, random));
            if (head == 4) put(at + 2, random_scale(kind, random));
            for (int64_t i = head; i < size; ++i)
                source[size_t(at + i)] = kind == Fill::zero ? 0 : random_byte(format, kind, random);
        }
    } else {
        for (int64_t i = 0; i < rows * cols; ++i) {
            const float f = random.uniform();
            uint32_t bits;
            std::memcpy(&bits, &f, 4);
            if (format == Format::f32) std::memcpy(&source[size_t(4 * i)], &bits, 4);
            if (format == Format::f16) put(2 * i, random_scale(fill, random));
            if (format == Format::bf16) put(2 * i, static_cast<uint16_t>(bits >> 16));
        }
    }
    std::memset(packed.data(), 0, static_cast<size_t>(packed.size()));  // as the region is
    const int64_t cut = rows / 3;                                       // rows arrive in pieces
    pack_rows(format, kernels.bias8, source.data(), 0, cut, cols, packed.data());
    pack_rows(format, kernels.bias8, source.data() + cut * row_bytes(format, cols), cut, rows - cut,
              cols, packed.data());
}

const uint8_t* Weights::block(int64_t row, int64_t group) const {
    return source.data() + row * row_bytes(format, cols) + group * row_bytes(format, kGroup);
}

static uint16_t read_half(const uint8_t* p) {
    uint16_t h;
    std::memcpy(&h, p, 2);
    return h;
}

double Weights::scale(int64_t row, int64_t group) const {
    return is_grouped(format) ? half_value(read_half(block(row, group))) : 1.0;
}

double Weights::minimum(int64_t row, int64_t group) const {
    return format == Format::q4_1 ? half_value(read_half(block(row, group) + 2)) : 0.0;
}

int Weights::quant(int64_t row, int64_t col) const {
    const uint8_t* b = block(row, col / kGroup) + (format == Format::q4_1 ? 4 : 2);
    const int64_t j = col % kGroup;
    if (format == Format::q8_0) return static_cast<int8_t>(b[j]);
    const int nibble = j < 16 ? b[j] & 15 : b[j - 16] >> 4;
    return format == Format::q4_0 ? nibble - 8 : nibble;
}

double Weights::value(int64_t row, int64_t col) const {
    if (is_grouped(format))
        return scale(row, col / kGroup) * quant(row, col) + minimum(row, col / kGroup);
    const uint8_t* p = source.data() + (row * cols + col) * row_bytes(format, 1);
    if (format == Format::f16) return half_value(read_half(p));
    if (format == Format::bf16) return bfloat_value(read_half(p));
    float f;
    std::memcpy(&f, p, 4);
    return f;
}

void test_matmul(const Kernels& kernels) {
    const int64_t shapes[][2] = {{1, 32}, {16, 64}, {24, 96}, {33, 576}, {40, 1536}};
    for (const Format format : kFormats) {
        for (int planes = is_grouped(format); planes <= 2 * is_grouped(format); ++planes) {
            for (const auto& [rows, cols] : shapes) {
                test_case(kernels, format, planes, rows, cols, Fill::random, false, false);
                test_case(kernels, format, planes, rows, cols, Fill::random, true, false);
            }
            for (const Fill fill : {Fill::extreme, Fill::tiny, Fill::zero, Fill::unit})
                test_case(kernels, format, planes, 40, 160, fill, false, false);
            test_case(kernels, format, planes, 20, 96, Fill::random, true, true);
        }
    }
    test_case(kernels, Format::f32, 0, 17, 41, Fill::random, true, false);
    test_case(kernels, Format::f16, 0, 17, 41, Fill::random, true, false);
}

}  // namespace pronk::test
