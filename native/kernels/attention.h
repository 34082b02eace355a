// Rotary embedding, the paged KV cache, and attention in one pass over its blocks.
//
// A block holds kBlock positions of every KV head. Keys lie position-inner ([d][position], bf16
// in pairs of d) so that 16 positions are scored without a horizontal sum; values lie
// [position][d].
#pragma once
#include <cmath>
#include <cstring>
#include <limits>

#include "half.h"
#include "kernels.h"
#include "vec.h"

namespace pronk::PRONK_NS {

constexpr int kMaxHeadDim = 256;

// Within a layer's part of a block: keys of every head, then values of every head.
inline uint8_t* kv_head(const KvView& kv, int64_t block, int64_t head, bool value) {
    return kv.base + block * kv.block_stride + (value * kv.kv_heads + head) * kv.head_bytes();
}

inline void rotate(float* x, const float* table, int64_t half) {
    for (int64_t i = 0; i < half; ++i) {
        const float a = x[i], b = x[i + half], c = table[i], s = table[half + i];
        x[i] = a * c - b * s;
        x[i + half] = b * c + a * s;
    }
}

inline void rope_store(Rows qkv, Rows table, int64_t heads, const KvView& kv, const Tokens& tokens,
                       int64_t first, int64_t last) {
    const int64_t dim = kv.head_dim;
    for (int64_t t = first; t < last; ++t) {
        float* q = qkv.row<float>(t);
        const float* angles = table.row<float>(t);
        for (int64_t h = 0; h < heads + kv.kv_heads; ++h) rotate(q + h * dim, angles, dim / 2);
        const int64_t position = tokens.positions[t];
        const int64_t block = kv.tables[tokens.sequences[t] * kv.max_blocks + position / kBlock];
        const int64_t slot = position % kBlock;
        for (int64_t h = 0; h < kv.kv_heads; ++h) {
            const float* k = q + (heads + h) * dim;
            const float* v = k + kv.kv_heads * dim;
            uint8_t* keys = kv_head(kv, block, h, false);
            uint8_t* values = kv_head(kv, block, h, true);
            if (kv.bf16) {
                uint16_t* kp = reinterpret_cast<uint16_t*>(keys);
                uint16_t* vp = reinterpret_cast<uint16_t*>(values) + slot * dim;
                for (int64_t d = 0; d < dim; ++d) {
                    kp[(d / 2 * kBlock + slot) * 2 + d % 2] = f32_to_bf16(k[d]);
                    vp[d] = f32_to_bf16(v[d]);
                }
            } else {
                float* kp = reinterpret_cast<float*>(keys);
                for (int64_t d = 0; d < dim; ++d) kp[d * kBlock + slot] = k[d];
                std::memcpy(reinterpret_cast<float*>(values) + slot * dim, v, dim * sizeof(float));
            }
        }
    }
}

// Scores of the 32 positions of a block against one query.
inline void score_block(const uint8_t* keys, bool bf16, const float* q, int64_t dim, F& lo, F& hi) {
    lo = set(0.0f);
    hi = set(0.0f);
    if (bf16) {
        const uint16_t* k = reinterpret_cast<const uint16_t*>(keys);
        for (int64_t d = 0; d < dim; d += 2, k += 2 * kBlock) {
            const F q0 = set(q[d]), q1 = set(q[d + 1]);
            F a, b;
            load_bf16_pairs(k, a, b);
            lo = fma(b, q1, fma(a, q0, lo));
            load_bf16_pairs(k + kBlock, a, b);
            hi = fma(b, q1, fma(a, q0, hi));
        }
    } else {
        const float* k = reinterpret_cast<const float*>(keys);
        for (int64_t d = 0; d < dim; ++d, k += kBlock) {
            lo = fma(load(k), set(q[d]), lo);
            hi = fma(load(k + 16), set(q[d]), hi);
        }
    }
}

// acc += p @ values, over the first n positions of a block. N vectors of the head at once.
template <int N>
inline void weigh_block(const uint8_t* values, bool bf16, const float* p, int n, int64_t dim,
                        float* acc) {
    F sum[N];
    for (int i = 0; i < N; ++i) sum[i] = load(acc + 16 * i);
    for (int j = 0; j < n; ++j) {
        const F w = set(p[j]);
#pragma GCC unroll 4
        for (int i = 0; i < N; ++i) {
            const int64_t at = j * dim + 16 * i;
            const F v = bf16 ? load_bf16(reinterpret_cast<const uint16_t*>(values) + at)
                             : load(reinterpret_cast<const float*>(values) + at);
            sum[i] = fma(w, v, sum[i]);
        }
    }
    for (int i = 0; i < N; ++i) store(acc + 16 * i, sum[i]);
}

inline void attend(const float* q, float scale, const KvView& kv, const int32_t* blocks,
                   int64_t kv_head_index, int64_t length, float* out) {
    const int64_t dim = kv.head_dim;
    const float lowest = -std::numeric_limits<float>::infinity();
    alignas(64) float acc[kMaxHeadDim] = {};
    alignas(64) float p[kBlock];
    float top = lowest, total = 0.0f;
    for (int64_t start = 0; start < length; start += kBlock) {
        const int64_t block = blocks[start / kBlock];
        const int n = static_cast<int>(length - start < kBlock ? length - start : kBlock);
        F lo, hi;
        score_block(kv_head(kv, block, kv_head_index, false), kv.bf16, q, dim, lo, hi);
        lo = keep_first(mul(lo, set(scale)), n, lowest);
        hi = keep_first(mul(hi, set(scale)), n > 16 ? n - 16 : 0, lowest);
        const float block_top = hmax(max(lo, hi));
        if (block_top > top) {  // rescale what is summed so far to the new maximum
            float factor[16];
            store(factor, exp(set(top - block_top)));
            const float f = top == lowest ? 0.0f : factor[0];
            total *= f;
            for (int64_t d = 0; d < dim; d += 16) store(acc + d, mul(load(acc + d), set(f)));
            top = block_top;
        }
        lo = keep_first(exp(sub(lo, set(top))), n, 0.0f);
        hi = keep_first(exp(sub(hi, set(top))), n > 16 ? n - 16 : 0, 0.0f);
        total += hsum(add(lo, hi));
        store(p, lo);
        store(p + 16, hi);
        const uint8_t* values = kv_head(kv, block, kv_head_index, true);
        int64_t d = 0;
        for (; d + 64 <= dim; d += 64)
            weigh_block<4>(values + d * kv.element(), kv.bf16, p, n, dim, acc + d);
        for (; d < dim; d += 16)
            weigh_block<1>(values + d * kv.element(), kv.bf16, p, n, dim, acc + d);
    }
    const F inverse = set(1.0f / total);
    for (int64_t d = 0; d < dim; d += 16) store(out + d, mul(load(acc + d), inverse));
}

inline void attention(Rows qkv, int64_t heads, float scale, const KvView& kv, const Tokens& tokens,
                      Rows out, int64_t first, int64_t last) {
    for (int64_t item = first; item < last; ++item) {
        const int64_t t = item / heads, h = item % heads;
        attend(qkv.row<float>(t) + h * kv.head_dim, scale, kv,
               kv.tables + tokens.sequences[t] * kv.max_blocks, h / (heads / kv.kv_heads),
               tokens.positions[t] + 1, out.row<float>(t) + h * kv.head_dim);
    }
}

}  // namespace pronk::PRONK_NS
