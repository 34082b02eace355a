// Checkpoint matrices of every format for the tests, and what ggml defines their blocks to mean.
#pragma once
#include <vector>

#include "check.h"

namespace pronk::test {

inline const char* format_name(Format f) { return traits(f).name; }

inline std::vector<Format> every_format() {
    std::vector<Format> all;
    for (int i = 0; i < kFormats; ++i) all.push_back(static_cast<Format>(i));
    return all;
}

// unit: scales of one and small factors, so that sums are integers; else as the names say.
enum class Fill { random, extreme, tiny, zero, unit };

struct Element {  // value = scale * quant + minimum; of float formats the scale alone
    double scale, minimum;
    int quant;
    double value() const { return scale * quant + minimum; }
};

// Row-major checkpoint rows, their elements one by one, and the same rows packed.
struct Weights {
    Weights(const Kernels& kernels, Format format, int64_t rows, int64_t cols, Fill fill,
            Random& random);
    Element element(int64_t row, int64_t col) const;

    Format format;
    int64_t rows, cols;
    std::vector<uint8_t> source;
    Buffer packed;
};

}  // namespace pronk::test
