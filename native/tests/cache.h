// What the tests of attention share: what a cache keeps of what is stored in it.
#pragma once
#include <algorithm>

#include "check.h"

namespace pronk::test {

inline const char* const kv_names[] = {"f32", "bf16", "int8", "int4", "int4 not rotated"};
constexpr KvType kv_types[] = {KvType::f32, KvType::bf16, KvType::int8, KvType::int4,
                               KvType::int4_plain};

// Whether a kernel rounds the softmax to bf16 before it weighs values of bf16.
inline bool rounds_weights(const Kernels& kernels, KvType kv) {
    const bool amx = !std::strcmp(kernels.name, "amx");
    return (amx || !std::strcmp(kernels.name, "avx512_bf16")) && kv != KvType::f32;
}

// The Hadamard transform of each n elements, n the largest power of two in their number.
inline void rotate(std::vector<double>& row) {
    const size_t n = row.size() & -row.size();
    const std::vector<double> x = row;
    for (size_t i = 0; i < row.size(); ++i) {
        row[i] = 0;
        for (size_t j = 0; j < n; ++j)
            row[i] += (__builtin_popcountll(i % n & j) % 2 ? -1 : 1) * x[i / n * n + j];
        row[i] /= std::sqrt(double(n));
    }
}

// A query as a kernel takes it: AMX tiles take two planes of bf16, the vectors of what multiplies
// bf16 one, turned as the keys are.
inline std::vector<double> taken(const Kernels& kernels, KvType kv, int dim, float softmax_scale,
                                 const float* q) {
    std::vector<double> row(q, q + dim);
    const bool tiles = !std::strcmp(kernels.name, "amx") && dim % 32 == 0;
    if (tiles || !rounds_weights(kernels, kv)) return row;
    if (kv == KvType::int4) rotate(row);
    const float scale = softmax_scale * 1.44269504088896341f;
    for (double& x : row) x = double(to_bfloat(float(x) * scale)) / double(scale);
    if (kv == KvType::int4) rotate(row);
    return row;
}

// What an int4 cache holds of a row, which is as near to it as a step allows.
inline std::vector<double> kept_int4(const KvView& kv, int64_t block, int64_t position,
                                     int64_t head, const float* row) {
    const int64_t dim = kv.head_dim, slot = position % kBlock, group = dim % 32 ? 16 : 32;
    const uint8_t* at = kv.base + head * kv.plane + block * kv.head_bytes();
    std::vector<double> exact(row, row + dim), found;
    if (kv.type == KvType::int4) rotate(exact);
    for (int64_t d = 0; d < dim; ++d) {
        const bool value = head >= kv.kv_heads;
        const int64_t byte = value ? slot / 2 * dim + d / 16 * 16 + d % 8 * 2 + slot % 2
                                   : d / 4 * 2 * kBlock + slot * 2 + d % 2;
        const bool high = value ? d % 16 >= 8 : d % 4 >= 2;
        uint16_t half;
        std::memcpy(&half, at + kBlock * dim / 2 + 2 * (d / group * kBlock + slot), 2);
        const double scale = bfloat_value(half), q = (high ? at[byte] >> 4 : at[byte] & 15) - 8;
        // The largest of a group is 8 steps of the sign of -scale; that of the other sign is cut.
        const double off = std::fabs(scale * q - exact[size_t(d)]);
        const bool cut = q == 7 && exact[size_t(d)] / scale > 7;
        if (!(off <= std::fabs(scale) * (cut ? 1.26 : 0.5001) + 1e-6))
            check(false, "int4 keeps %g of %g, scale %g", scale * q, exact[size_t(d)], scale);
        found.push_back(double(to_bfloat(float(scale * q))));
    }
    if (kv.type == KvType::int4) rotate(found);
    return found;
}

// What the cache keeps of a row of keys, or behind those of all heads of values.
inline std::vector<double> kept(const KvView& kv, int64_t block, int64_t position, int64_t head,
                                const float* row) {
    if (kv.type >= KvType::int4) return kept_int4(kv, block, position, head, row);
    std::vector<double> out(row, row + kv.head_dim);
    float top = 0;
    for (int i = 0; i < kv.head_dim; ++i) top = std::max(top, std::fabs(row[i]));
    for (double& x : out) {
        const float f = float(x);
        if (kv.type == KvType::bf16) x = double(to_bfloat(f));
        if (kv.type == KvType::int8)
            x = double(to_bfloat(std::nearbyint(f * (127.0f / top)) * (top / 127.0f)));
    }
    return out;
}

}  // namespace pronk::test
