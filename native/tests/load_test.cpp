// Weights from a file are those packed from memory, on any number of threads; kept and read again
// they are the same bytes, or none.
#include <sys/types.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <stdexcept>

#include "../executor.h"
#include "../hash.h"
#include "check.h"

namespace pronk::test {

namespace {

constexpr int64_t kBytes = 5 << 20;  // of weights: several parts, the last one shorter
constexpr Limits kLimits{1, 1, 1, 0, 1};
const KvShape kKv{1, 16, KvType::f32, {{0, 0, 0, 0, false}}};

class File {
  public:
    File() : file_(std::tmpfile()) {}
    ~File() { std::fclose(file_); }
    File(const File&) = delete;
    File& operator=(const File&) = delete;
    int fd() const { return fileno(file_); }
    void write(const void* data, int64_t bytes, int64_t at) const {
        check(pwrite(fd(), data, static_cast<size_t>(bytes), at) == bytes, "a test file is short");
    }

  private:
    std::FILE* file_;
};

bool zeros(const uint8_t* data, int64_t bytes) {
    for (int64_t i = 0; i < bytes; ++i)
        if (data[i]) return false;
    return true;
}

void test_loading(const Kernels& kernels, int threads) {
    constexpr int64_t rows = 1003, cols = 256, gap = 13;
    Random random(5);
    double seconds = 0;
    for (int i = 0; i < pronk::kFormats; ++i) {
        const auto format = static_cast<Format>(i);
        Executor packed(threads, kernels.name, kBytes, 64, kLimits, kKv);
        Executor loaded(threads, kernels.name, kBytes, 64, kLimits, kKv);
        const Buffer source(rows * row_bytes(format, cols));
        source.fill(random);
        const File file;
        file.write(source.data(), source.size(), gap);
        packed.pack(format, 128, rows, cols, 0, rows, source.data(), source.size());
        const std::vector<Stored> matrix{{format, 128, rows, cols, file.fd(), gap, 0}};
        check(loaded.load(matrix, seconds) == -1, "%s: a matrix is refused", traits(format).name);
        check(same(packed.weight(0, kBytes), loaded.weight(0, kBytes), kBytes),
              "%s: a matrix from a file is another one", traits(format).name);
        check(ftruncate(file.fd(), gap + source.size() - 1) == 0, "no truncation");
        check(loaded.load(matrix, seconds) == 0, "%s: a short file is not told",
              traits(format).name);
    }
    check(seconds >= 0, "packing took %g seconds", seconds);
}

void test_pairs(const Kernels& kernels, int threads) {
    constexpr int64_t heads = 3, dim = 48, rows = heads * dim, cols = 64;
    const int64_t bytes = row_bytes(Format::q4_1, cols);
    const Buffer source(rows * bytes), apart(rows * bytes);
    Random random(6);
    source.fill(random);
    for (int64_t h = 0; h < heads; ++h)
        for (int64_t i = 0; i < dim; ++i)
            std::memcpy(apart.data() + (h * dim + i % 2 * dim / 2 + i / 2) * bytes,
                        source.data() + (h * dim + i) * bytes, static_cast<size_t>(bytes));
    const File file;
    file.write(source.data(), source.size(), 0);
    Executor packed(threads, kernels.name, kBytes, 64, kLimits, kKv);
    Executor loaded(threads, kernels.name, kBytes, 64, kLimits, kKv);
    packed.pack(Format::q4_1, 0, rows, cols, 0, rows, apart.data(), apart.size());
    double seconds = 0;
    check(loaded.load({{Format::q4_1, 0, rows, cols, file.fd(), 0, dim}}, seconds) == -1,
          "paired rows are refused");
    check(same(packed.weight(0, kBytes), loaded.weight(0, kBytes), kBytes),
          "paired rows are not parted");
    const float vector[3] = {1, 2, 3};
    file.write(vector, sizeof vector, 0);
    check(loaded.load({{Format::f32, 64, 1, 3, file.fd(), 0, 0}}, seconds) == -1 &&
              same(loaded.weight(64, 12), vector, 12),
          "a vector is not read as it is");
}

void test_shapes(const Kernels& kernels) {
    Executor executor(1, kernels.name, kBytes, 64, kLimits, kKv);
    const File file;
    const int fd = file.fd();
    const Stored wrong[] = {
        {Format::q4_1, 0, 16, 33, fd, 0, 0},   {Format::q4_k, 0, 16, 32, fd, 0, 0},
        {Format::q4_1, 0, 16, 32, fd, -1, 0},  {Format::q4_1, 0, 16, 32, fd, 0, 8},
        {Format::q4_1, 0, 40, 32, fd, 0, 16},  {Format::q4_1, 0, 1, 32, fd, 0, 0},
        {Format::q4_1, 0, 0, 32, fd, 0, 0},    {Format::f32, 0, kMaxSide, kMaxSide, fd, 0, 0},
        {Format::f32, kBytes, 1, 1, fd, 0, 0}, {Format::f32, 4, 1, 1, fd, 0, 0},
    };
    int i = 0;
    for (const Stored& matrix : wrong) {
        bool refused = false;
        double seconds = 0;
        try {
            executor.load({matrix}, seconds);
        } catch (const std::invalid_argument&) {
            refused = true;
        }
        check(refused, "matrix %d of an impossible shape is loaded", i++);
    }
}

void test_keeping(const Kernels& kernels, int threads) {
    constexpr int64_t bytes = kBytes - 64, parts = 5;
    Executor first(threads, kernels.name, bytes, 64, kLimits, kKv);
    Executor second(threads, kernels.name, bytes, 64, kLimits, kKv);
    const Buffer floats(bytes);
    Random random(7);
    floats.fill(random);
    first.write(0, floats.floats(), bytes / 4);
    const File file;
    std::vector<uint64_t> sums;
    std::vector<Executor::Kept> kept;  // in another order in the file
    for (int64_t i = 0, at = 0; i < parts; ++i) {
        const int64_t offset = (parts - 1 - i) << 20,
                      size = std::min<int64_t>(1 << 20, bytes - offset);
        kept.push_back({offset, at, size});
        at += size;
    }
    const auto restore = [&](size_t from, size_t to) {
        const auto cut = [&](const auto& all) {
            return std::vector(all.begin() + static_cast<ptrdiff_t>(from),
                               all.begin() + static_cast<ptrdiff_t>(to));
        };
        return second.restore(file.fd(), cut(kept), cut(sums));
    };
    check(first.save(file.fd(), kept, sums) == 0 && sums.size() == parts, "weights are not saved");
    std::vector<uint64_t> none;
    check(first.save(-1, kept, none) != 0, "a closed file takes weights");
    check(restore(0, 2) && restore(2, parts), "saved weights are refused");
    check(same(second.weight(0, bytes), floats.data(), bytes), "saved weights are others");
    check(!second.restore(file.fd(), kept, {}), "parts without sums are read");
    for (const Executor::Kept wrong :
         {Executor::Kept{-64, 0, 64}, {bytes, 0, 64}, {0, 0, bytes + 64}}) {
        bool refused = false;
        try {
            second.restore(file.fd(), {wrong}, {0});
        } catch (const std::invalid_argument&) {
            refused = true;
        }
        check(refused, "a part outside the region is read");
    }
    const uint8_t wrong = static_cast<uint8_t>(floats.data()[(1 << 20) - 1] ^ 1);
    file.write(&wrong, 1, bytes - 1);
    check(restore(0, parts - 1), "parts that are whole are refused");
    check(!restore(parts - 1, parts), "a changed byte is not told");
    check(zeros(second.weight(0, bytes), bytes), "damaged weights stay");
}

}  // namespace

void test_load(const Kernels& kernels) {
    for (int threads : {1, 3}) {
        test_loading(kernels, threads);
        test_pairs(kernels, threads);
        test_keeping(kernels, threads);
    }
    test_shapes(kernels);
    Executor(2, kernels.name, kBytes, 1 << 16, kLimits, kKv).populate();
}

}  // namespace pronk::test
