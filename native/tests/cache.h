// What the tests of attention share: what a cache keeps of what is stored in it.
#pragma once
#include <algorithm>

#include "check.h"

namespace pronk::test {

inline const char* const kv_names[] = {"f32", "bf16", "int8"};

// Whether a kernel rounds the softmax to bf16 before it weighs values: AMX tiles do.
inline bool rounds_weights(const Kernels& kernels, KvType kv, int dim) {
    return !std::strcmp(kernels.name, "amx") && kv != KvType::f32 && dim % 32 == 0;
}

// What the cache keeps of an element of a row of keys or values.
inline double kept(KvType kv, int dim, const float* row, int d) {
    if (kv == KvType::f32) return double(row[d]);
    if (kv == KvType::bf16) return double(to_bfloat(row[d]));
    float top = 0;
    for (int i = 0; i < dim; ++i) top = std::max(top, std::fabs(row[i]));
    return double(to_bfloat(std::nearbyint(row[d] * (127.0f / top)) * (top / 127.0f)));
}

}  // namespace pronk::test
