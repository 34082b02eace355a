// What the native tests share: counting checks, reproducible numbers, exact-size buffers.
#pragma once
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "../kernels/kernels.h"

namespace pronk::test {

inline int64_t passed = 0, failed = 0;

[[gnu::format(printf, 2, 3)]] inline void check(bool ok, const char* format, ...) {
    ++(ok ? passed : failed);
    if (ok || failed > 40) return;
    std::va_list args;
    va_start(args, format);
    std::printf("FAILED ");
    std::vprintf(format, args);
    std::printf("\n");
    va_end(args);
}

class Random {
  public:
    explicit Random(uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15u + 1) {}
    uint32_t bits() {
        state_ = state_ * 6364136223846793005u + 1442695040888963407u;
        return static_cast<uint32_t>(state_ >> 32);
    }
    int below(int n) { return static_cast<int>(bits() % static_cast<uint32_t>(n)); }
    float uniform(float scale = 1.0f) {  // in [-scale, scale)
        return scale * (static_cast<float>(bits() >> 8) * 0x1p-23f - 1.0f);
    }

  private:
    uint64_t state_;
};

// Heap memory of exactly the size asked for, aligned as the arena is: a sanitizer sees every
// byte read or written past it. Filled with 0xff, which is NaN as any float.
class Buffer {
  public:
    explicit Buffer(int64_t bytes)
        : bytes_(bytes),
          data_(static_cast<uint8_t*>(
              ::operator new(static_cast<size_t>(bytes), std::align_val_t(64)))) {
        std::memset(data_.get(), 0xff, static_cast<size_t>(bytes));
    }
    uint8_t* data() const { return data_.get(); }
    float* floats() const { return reinterpret_cast<float*>(data_.get()); }
    int64_t size() const { return bytes_; }
    void fill(Random& random, float scale = 1.0f) const {
        for (int64_t i = 0; i < bytes_ / 4; ++i) floats()[i] = random.uniform(scale);
    }
    bool operator==(const Buffer& other) const {
        return bytes_ == other.bytes_ &&
               !std::memcmp(data(), other.data(), static_cast<size_t>(bytes_));
    }

  private:
    struct Free {
        void operator()(uint8_t* p) const { ::operator delete(p, std::align_val_t(64)); }
    };
    int64_t bytes_;
    std::unique_ptr<uint8_t, Free> data_;
};

inline bool same(const void* a, const void* b, int64_t bytes) {
    return !std::memcmp(a, b, static_cast<size_t>(bytes));
}

// Half precision written anew, so that the kernels' conversions have something to agree with.
inline double half_value(uint16_t h) {
    const int exponent = (h >> 10) & 31, mantissa = h & 0x3ff;
    const double magnitude =
        exponent ? std::ldexp(1024 + mantissa, exponent - 25) : std::ldexp(mantissa, -24);
    return h & 0x8000 ? -magnitude : magnitude;
}
inline double bfloat_value(uint16_t h) {
    const uint32_t bits = static_cast<uint32_t>(h) << 16;
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
}
inline float to_bfloat(float f) {  // nearest, ties to even
    uint32_t x;
    std::memcpy(&x, &f, 4);
    const uint32_t rest = x & 0xffff;
    x &= 0xffff0000u;
    if (rest > 0x8000 || (rest == 0x8000 && (x & 0x10000))) x += 0x10000;
    std::memcpy(&f, &x, 4);
    return f;
}

void test_matmul(const Kernels& kernels);
void test_same_matmul(const Kernels& one, const Kernels& other);
void test_rows(const Kernels& kernels);
void test_attention(const Kernels& kernels);
void test_windows(const Kernels& kernels);
void test_executor(const Kernels& kernels);
void test_residency();
void test_load(const Kernels& kernels);
void test_moe(const Kernels& kernels);
void test_bounded(const Kernels& kernels);
void test_pieces();

}  // namespace pronk::test
