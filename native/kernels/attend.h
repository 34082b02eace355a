// The sum of one chunk of a past for a tile of queries: scores, softmax, weighted values.
//
// A query's sum over a chunk depends on that query and the chunk alone: not on the other queries
// of its tile, nor on their number.
#pragma once
#include <cstring>
#include <limits>

#include "kv.h"

namespace pronk::PRONK_NS {

constexpr int kQueries = 16;  // rows of a tile
constexpr float kLowest = -std::numeric_limits<float>::infinity();
constexpr float kLog2e = 1.44269504088896341f;  // scores count in powers of two

// Queries of one sequence and KV head, in order of their lengths.
struct Tile {
    int count;
    int64_t length[kQueries];  // positions each attends to
    int64_t longest() const { return length[count - 1]; }
};

// Where scores lie, one row of a chunk per query. The padding keeps rows out of each other's sets.
constexpr int kScoreStride = kChunk + 16;
struct Scores {
    alignas(64) float row[kQueries][kScoreStride];
};

// Softmax-weighted sums of values, one per query of a tile: the largest score, the sum of weights
// against it, and the weighted values.
struct Sums {
    float *top, *total;
    float* values;  // [queries][dim]
};

// Turns n > 0 scores of a row into weights against the largest, and the rest into zeros.
inline void soften(float* row, int n, int padded, float& top, float& total) {
    F most[2] = {set(kLowest), set(kLowest)};
    int i = 0;
    for (; i + 32 <= n; i += 32) {
        most[0] = max(load(row + i), most[0]);
        most[1] = max(load(row + i + 16), most[1]);
    }
    for (; i < n; i += 16) most[0] = max(keep_first(load(row + i), n - i, kLowest), most[0]);
    top = hmax(max(most[0], most[1]));
    F sum = set(0.0f);
    for (i = 0; i < n; i += 16) {
        const F p = keep_first(exp2<5>(sub(load(row + i), set(top))), n - i, 0.0f);
        sum = add(sum, p);
        store(row + i, p);
    }
    for (; i < padded; i += 16) store(row + i, set(0.0f));
    total = hsum(sum);
}

// A query for the vector path: scaled, so that a score is a power of two.
inline void pack_query(const float* q, float scale, int64_t dim, float* packed) {
    for (int64_t d = 0; d < dim; d += 16) store(packed + d, mul(load(q + d), set(scale * kLog2e)));
}

// Scores of the 32 positions of a block against R queries.
template <bool bf16, int R>
inline void score_block(const uint8_t* keys, const float* q, int64_t dim, float* scores) {
    F lo[R], hi[R];
    for (int r = 0; r < R; ++r) lo[r] = hi[r] = set(0.0f);
    for (int64_t d = 0; d < dim; d += 2) {
        F a, b, c, e;
        load_keys<bf16>(keys, d, 0, a, b);
        load_keys<bf16>(keys, d, 16, c, e);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            const F q0 = set(q[r * dim + d]), q1 = set(q[r * dim + d + 1]);
            lo[r] = fma(b, q1, fma(a, q0, lo[r]));
            hi[r] = fma(e, q1, fma(c, q0, hi[r]));
        }
    }
    for (int r = 0; r < R; ++r) {
        store(scores + r * kScoreStride, lo[r]);
        store(scores + r * kScoreStride + 16, hi[r]);
    }
}

// sums[r] = weights[r] @ values over n positions from block `blocks[0]` on, V vectors from d on.
template <bool bf16, int R, int V>
inline void weigh(const Past& past, int64_t n, int64_t d, const float* weights, float* sums) {
    const int64_t dim = past.kv.head_dim;
    F sum[R][V];
    for (int r = 0; r < R; ++r)
        for (int i = 0; i < V; ++i) sum[r][i] = set(0.0f);
    for (int64_t start = 0; start < n; start += kBlock, weights += kBlock) {
        const uint8_t* values = past.at(start, true);
        const int64_t count = n - start < kBlock ? n - start : kBlock;
        for (int64_t j = 0; j < count; j += 2) {
            F a[V], b[V];
#pragma GCC unroll 4
            for (int i = 0; i < V; ++i) load_values<bf16>(values, j, d + 16 * i, dim, a[i], b[i]);
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
                const F w = set(weights[r * kScoreStride + j]);
#pragma GCC unroll 4
                for (int i = 0; i < V; ++i) sum[r][i] = fma(w, a[i], sum[r][i]);
            }
            if (j + 1 == count) break;  // what lies past the end may be anything
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
                const F w = set(weights[r * kScoreStride + j + 1]);
#pragma GCC unroll 4
                for (int i = 0; i < V; ++i) sum[r][i] = fma(w, b[i], sum[r][i]);
            }
        }
    }
    for (int r = 0; r < R; ++r)
        for (int i = 0; i < V; ++i) store(sums + r * dim + d + 16 * i, sum[r][i]);
}

template <bool bf16, int R>
inline void score_rows(const Past& past, int64_t n, const float* q, float* scores) {
    for (int64_t start = 0; start < n; start += kBlock)
        score_block<bf16, R>(past.at(start, false), q, past.kv.head_dim, scores + start);
}

template <bool bf16, int R>
inline void weigh_rows(const Past& past, int64_t n, const float* weights, float* sums) {
    const int64_t dim = past.kv.head_dim;
    constexpr int V = kWideSums ? 4 : 1;
    int64_t d = 0;
    for (; d + 16 * V <= dim; d += 16 * V) weigh<bf16, R, V>(past, n, d, weights, sums);
    for (; d < dim; d += 16) weigh<bf16, R, 1>(past, n, d, weights, sums);
}

// Positions [from, from + kChunk), which `past` is, for every query of the tile.
template <bool bf16>
void sum_chunk(const Tile& tile, const float* q, const Past& past, int64_t from, Scores& scores,
               Sums sums) {
    using Score = decltype(&score_rows<bf16, 1>);
    using Weigh = decltype(&weigh_rows<bf16, 1>);
    static constexpr Score score[] = {score_rows<bf16, 1>, score_rows<bf16, 2>, score_rows<bf16, 3>,
                                      score_rows<bf16, 4>};
    static constexpr Weigh weigh[] = {weigh_rows<bf16, 1>, weigh_rows<bf16, 2>, weigh_rows<bf16, 3>,
                                      weigh_rows<bf16, 4>};
    const int64_t dim = past.kv.head_dim;
    for (int r = 0; r < tile.count; r += 4) {
        const int rows = tile.count - r < 4 ? tile.count - r : 4;
        const int64_t left = tile.length[r + rows - 1] - from;
        const int n = static_cast<int>(left < kChunk ? left : kChunk);
        if (n <= 0) continue;
        score[rows - 1](past, n, q + r * dim, scores.row[r]);
        for (int i = r; i < r + rows; ++i) {
            const int64_t own = tile.length[i] - from;
            if (own > 0)
                soften(scores.row[i], static_cast<int>(own < n ? own : n), n, sums.top[i],
                       sums.total[i]);
            else
                std::memset(scores.row[i], 0, sizeof scores.row[i]);
        }
        weigh[rows - 1](past, n, scores.row[r], sums.values + r * dim);
    }
}

}  // namespace pronk::PRONK_NS
