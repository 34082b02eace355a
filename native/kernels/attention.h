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
constexpr float kLowest = -std::numeric_limits<float>::infinity();

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

// A softmax-weighted sum of values so far: the maximum score, the sum of weights against it, and
// the weighted values.
struct Sum {
    float* acc;
    float top, total;
};

// One query head of one token on its way through the blocks.
struct Query {
    const float* q;
    float* out;
    int64_t length;    // positions it attends to
    float top, total;  // of the current chunk
    alignas(64) float acc[kMaxHeadDim];
    alignas(64) float p[kBlock];
    float all_top, all_total;  // of the chunks before it
    alignas(64) float all[kMaxHeadDim];
};

// Scores of the 32 positions of a block against R queries, into each one's p.
template <int R>
inline void score_block(const uint8_t* keys, bool bf16, Query* rows, int64_t dim) {
    F lo[R], hi[R];
    for (int r = 0; r < R; ++r) lo[r] = hi[r] = set(0.0f);
    if (bf16) {
        const uint16_t* k = reinterpret_cast<const uint16_t*>(keys);
        for (int64_t d = 0; d < dim; d += 2, k += 2 * kBlock) {
            F a, b, c, e;
            load_bf16_pairs(k, a, b);
            load_bf16_pairs(k + kBlock, c, e);
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
                const F q0 = set(rows[r].q[d]), q1 = set(rows[r].q[d + 1]);
                lo[r] = fma(b, q1, fma(a, q0, lo[r]));
                hi[r] = fma(e, q1, fma(c, q0, hi[r]));
            }
        }
    } else {
        const float* k = reinterpret_cast<const float*>(keys);
        for (int64_t d = 0; d < dim; ++d, k += kBlock) {
            const F a = load(k), b = load(k + 16);
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
                lo[r] = fma(a, set(rows[r].q[d]), lo[r]);
                hi[r] = fma(b, set(rows[r].q[d]), hi[r]);
            }
        }
    }
    for (int r = 0; r < R; ++r) {
        store(rows[r].p, lo[r]);
        store(rows[r].p + 16, hi[r]);
    }
}

// Turns the scores of a block into weights against the running maximum; n positions count.
inline void soften(Query& row, float scale, int n, int64_t dim) {
    F lo = keep_first(mul(load(row.p), set(scale)), n, kLowest);
    F hi = keep_first(mul(load(row.p + 16), set(scale)), n > 16 ? n - 16 : 0, kLowest);
    const float top = hmax(max(lo, hi));
    if (top > row.top) {  // rescale what is summed so far to the new maximum
        float factor[16];
        store(factor, exp(set(row.top - top)));
        const float f = row.top == kLowest ? 0.0f : factor[0];
        row.total *= f;
        for (int64_t d = 0; d < dim; d += 16) store(row.acc + d, mul(load(row.acc + d), set(f)));
        row.top = top;
    }
    lo = keep_first(exp(sub(lo, set(row.top))), n, 0.0f);
    hi = keep_first(exp(sub(hi, set(row.top))), n > 16 ? n - 16 : 0, 0.0f);
    row.total += hsum(add(lo, hi));
    store(row.p, lo);
    store(row.p + 16, hi);
}

// acc += p @ values over the first n positions, for V vectors of the head from column d on.
// A row that attends to fewer positions has zeros in its p for the others.
template <int R, int V>
inline void weigh_block(const uint8_t* values, bool bf16, Query* rows, int n, int64_t dim,
                        int64_t d) {
    F sum[R][V];
    for (int r = 0; r < R; ++r)
        for (int i = 0; i < V; ++i) sum[r][i] = load(rows[r].acc + d + 16 * i);
    for (int j = 0; j < n; ++j) {
        F v[V];
#pragma GCC unroll 4
        for (int i = 0; i < V; ++i) {
            const int64_t at = j * dim + d + 16 * i;
            v[i] = bf16 ? load_bf16(reinterpret_cast<const uint16_t*>(values) + at)
                        : load(reinterpret_cast<const float*>(values) + at);
        }
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            const F w = set(rows[r].p[j]);
#pragma GCC unroll 4
            for (int i = 0; i < V; ++i) sum[r][i] = fma(w, v[i], sum[r][i]);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int i = 0; i < V; ++i) store(rows[r].acc + d + 16 * i, sum[r][i]);
}

// Queries of one sequence and KV head, in order of their lengths, over positions [from, to) of one
// chunk: each block is read once for all.
template <int R>
void attend(Query* rows, float scale, const KvView& kv, const int32_t* blocks, int64_t head,
            int64_t from, int64_t to) {
    const int64_t dim = kv.head_dim;
    for (int r = 0; r < R; ++r) {
        rows[r].top = kLowest;
        rows[r].total = 0.0f;
        for (int64_t d = 0; d < dim; d += 16) store(rows[r].acc + d, set(0.0f));
    }
    for (int64_t start = from; start < to; start += kBlock) {
        const int64_t block = blocks[start / kBlock];
        if (start + kBlock < to) {
            const int64_t next = blocks[start / kBlock + 1];
            prefetch(kv_head(kv, next, head, false), kv.head_bytes());
            prefetch(kv_head(kv, next, head, true), kv.head_bytes());
        }
        score_block<R>(kv_head(kv, block, head, false), kv.bf16, rows, dim);
        int n = 0;
        for (int r = 0; r < R; ++r) {
            const int64_t left = rows[r].length - start;
            n = static_cast<int>(left < kBlock ? left : kBlock);
            if (n > 0) {
                soften(rows[r], scale, n, dim);
            } else {  // it has seen all it may: it adds nothing
                store(rows[r].p, set(0.0f));
                store(rows[r].p + 16, set(0.0f));
            }
        }
        const uint8_t* values = kv_head(kv, block, head, true);
        int64_t d = 0;
        for (; d + 64 <= dim; d += 64) weigh_block<R, 4>(values, kv.bf16, rows, n, dim, d);
        for (; d < dim; d += 16) weigh_block<R, 1>(values, kv.bf16, rows, n, dim, d);
    }
}

inline void attend_some(int count, Query* rows, float scale, const KvView& kv,
                        const int32_t* blocks, int64_t head, int64_t from, int64_t to) {
    static constexpr decltype(&attend<1>) attends[] = {attend<1>, attend<2>, attend<3>, attend<4>};
    attends[count - 1](rows, scale, kv, blocks, head, from, to);
}

// Joins the sum of a chunk to that of the chunks before it.
inline void join(Sum& all, const Sum& chunk, int64_t dim) {
    const float top = all.top > chunk.top ? all.top : chunk.top;
    float factors[16];
    store(factors, exp(keep_first(set(all.top - top), 1, chunk.top - top)));
    for (int64_t d = 0; d < dim; d += 16)
        store(all.acc + d,
              fma(load(chunk.acc + d), set(factors[1]), mul(load(all.acc + d), set(factors[0]))));
    all.total = all.total * factors[0] + chunk.total * factors[1];
    all.top = top;
}

inline void finish(const Sum& all, int64_t dim, float* out) {
    const F inverse = set(1.0f / all.total);
    for (int64_t d = 0; d < dim; d += 16) store(out + d, mul(load(all.acc + d), inverse));
}

// Chunk by chunk, joined in order: what the parts of attention_parts give, bit for bit.
inline void attend_all(int count, Query* rows, float scale, const KvView& kv, const int32_t* blocks,
                       int64_t head) {
    const int64_t length = rows[count - 1].length, dim = kv.head_dim;
    Sum sums[4];
    for (int64_t from = 0; from < length; from += kChunk) {
        const int64_t to = length < from + kChunk ? length : from + kChunk;
        attend_some(count, rows, scale, kv, blocks, head, from, to);
        for (int r = 0; r < count; ++r) {
            if (from == 0) {
                sums[r] = {rows[r].all, rows[r].top, rows[r].total};
                std::memcpy(rows[r].all, rows[r].acc, static_cast<size_t>(dim) * sizeof(float));
            } else if (from < rows[r].length) {
                join(sums[r], {rows[r].acc, rows[r].top, rows[r].total}, dim);
            }
        }
    }
    for (int r = 0; r < count; ++r) finish(sums[r], dim, rows[r].out);
}

inline void attention(Rows qkv, int64_t heads, float scale, const KvView& kv, const Tokens& tokens,
                      Rows out, int64_t count, int64_t first, int64_t last) {
    constexpr int most = 4;
    Query rows[most];
    int filled = 0;
    const int64_t group = heads / kv.kv_heads;
    for (int64_t item = first; item < last; ++item) {
        const int64_t head = item / count, t = item % count;
        const int32_t sequence = tokens.sequences[t];
        const int32_t* blocks = kv.tables + sequence * kv.max_blocks;
        for (int64_t h = head * group; h < (head + 1) * group; ++h) {
            rows[filled].q = qkv.row<float>(t) + h * kv.head_dim;
            rows[filled].out = out.row<float>(t) + h * kv.head_dim;
            rows[filled].length = tokens.positions[t] + 1;
            if (++filled == most) {
                attend_all(filled, rows, scale, kv, blocks, head);
                filled = 0;
            }
        }
        // The next token may join if it goes on where this one is, in the same head.
        const bool joins = item + 1 < last && t + 1 < count &&
                           tokens.sequences[t + 1] == sequence &&
                           tokens.positions[t + 1] > tokens.positions[t];
        if (filled && !joins) {
            attend_all(filled, rows, scale, kv, blocks, head);
            filled = 0;
        }
    }
}

// The parts of token t: row t * chunks + c holds, for every head, the values summed over chunk c,
// then the maximum and the total.
inline void attention_parts(Rows qkv, int64_t heads, float scale, const KvView& kv,
                            const Tokens& tokens, Rows parts, int64_t chunks, int64_t first,
                            int64_t last) {
    constexpr int most = 4;
    Query rows[most];
    const int64_t group = heads / kv.kv_heads, dim = kv.head_dim, width = dim + kPartTail;
    for (int64_t item = first; item < last; ++item) {
        const int64_t head = item % kv.kv_heads, row = item / kv.kv_heads;
        const int64_t t = row / chunks, from = row % chunks * kChunk;
        const int64_t length = tokens.positions[t] + 1;
        if (from >= length) continue;
        const int64_t to = length < from + kChunk ? length : from + kChunk;
        for (int64_t g = 0; g < group; g += most) {
            const int n = static_cast<int>(group - g < most ? group - g : most);
            for (int r = 0; r < n; ++r) {
                rows[r].q = qkv.row<float>(t) + (head * group + g + r) * dim;
                rows[r].length = length;
            }
            attend_some(n, rows, scale, kv, kv.tables + tokens.sequences[t] * kv.max_blocks, head,
                        from, to);
            for (int r = 0; r < n; ++r) {
                float* part = parts.row<float>(row) + (head * group + g + r) * width;
                std::memcpy(part, rows[r].acc, static_cast<size_t>(dim) * sizeof(float));
                part[dim] = rows[r].top;
                part[dim + 1] = rows[r].total;
            }
        }
    }
}

// Joins the parts; items are token * heads + head. The first part is overwritten.
inline void attention_join(Rows parts, int64_t heads, int64_t dim, const Tokens& tokens,
                           int64_t chunks, Rows out, int64_t first, int64_t last) {
    const int64_t width = dim + kPartTail;
    for (int64_t item = first; item < last; ++item) {
        const int64_t t = item / heads, h = item % heads;
        const auto part = [&](int64_t c) {
            float* at = parts.row<float>(t * chunks + c) + h * width;
            return Sum{at, at[dim], at[dim + 1]};
        };
        Sum all = part(0);
        for (int64_t c = 1; c * kChunk < tokens.positions[t] + 1; ++c) join(all, part(c), dim);
        finish(all, dim, out.row<float>(t) + h * dim);
    }
}

}  // namespace pronk::PRONK_NS
