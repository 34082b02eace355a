// The sum of one chunk of a past for a tile of queries: scores, softmax, weighted values.
//
// A query's sum over a chunk depends on that query and the chunk alone: not on the other queries
// of its tile, nor on their number. Where all queries of a tile see the chunk up to where they are,
// that is all there is to it. Where a window ends within it for one of them, the blocks that any of
// them sees are taken together, and what a query does not see of them weighs nothing for it: the
// same sums in the same order, and zeros.
//
// Keys and values are read in pairs (kv.h). Where the CPU multiplies pairs of bf16, a cache of bf16
// meets queries that are rounded as its keys are, and weights as its values are.
#pragma once
#include <bit>
#include <cstring>
#include <limits>

#include "kv.h"

namespace pronk::PRONK_NS {

constexpr int kQueries = 16;  // rows of a tile
constexpr float kLowest = -std::numeric_limits<float>::infinity();
constexpr float kLog2e = 1.44269504088896341f;  // scores count in powers of two

// Positions of a chunk that a query sees: those before `sinks`, and from `first` up to `end`.
struct Seen {
    int sinks, first, end;
    bool any() const { return sinks > 0 || first < end; }
    uint32_t blocks() const {  // a bit for each of which it sees some
        const auto below = [](int n) { return (1u << ((n + kBlock - 1) / kBlock)) - 1; };
        const uint32_t before = (1u << (first / kBlock)) - 1;
        return below(sinks) | (first < end ? below(end) & ~before : 0);
    }
};

// Queries of one sequence and KV head, in order of their lengths.
struct Tile {
    int count;
    int64_t length[kQueries];  // of the past that each could attend to
    int64_t first[kQueries];   // from here on it does
    int64_t sinks[kQueries];   // and up to here
    float slope[kQueries];     // against the distance

    int64_t longest() const { return length[count - 1]; }
    // From which chunk on query r has sums.
    int64_t begin(int r) const { return sinks[r] ? 0 : first[r] / kChunk * kChunk; }
    Seen seen(int r, int64_t from) const {
        const auto within = [&](int64_t x) {
            return static_cast<int>(x < from ? 0 : x - from < kChunk ? x - from : kChunk);
        };
        return {within(sinks[r]), within(first[r]), within(length[r])};
    }
    uint32_t blocks(int r, int end, int64_t from) const {  // of queries r..end
        uint32_t all = 0;
        for (; r < end; ++r) all |= seen(r, from).blocks();
        return all;
    }
};

// What becomes of scores before the softmax; they count in powers of two.
struct Shape {
    float softcap;
    bool biased;
    explicit Shape(const Attend& attend)
        : softcap(attend.softcap * kLog2e), biased(attend.slopes != nullptr) {}
    // Whether every query sees the chunk from `from` on up to where it is, and scores stay.
    bool plain(const Tile& tile, int64_t from) const {
        return tile.first[tile.count - 1] <= from && softcap == 0 && !biased;
    }
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

// The largest of n > 0 scores of a row.
inline float top_of(const float* row, int n) {
    F most[2] = {set(kLowest), set(kLowest)};
    int i = 0;
    for (; i + 32 <= n; i += 32) {
        most[0] = max(load(row + i), most[0]);
        most[1] = max(load(row + i + 16), most[1]);
    }
    for (; i < n; i += 16) most[0] = max(keep_first(load(row + i), n - i, kLowest), most[0]);
    return hmax(max(most[0], most[1]));
}

// Turns n > 0 scores of a row into weights against the largest, and the rest into zeros.
inline void soften(float* row, int n, int padded, float& top, float& total) {
    top = top_of(row, n);
    F sum = set(0.0f);
    int i = 0;
    for (; i < n; i += 16) {
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

// What to ask for while a block is read: the one read next, unless it lies right behind this one.
// That one the hardware foresees, and is slower at where it is asked for too.
inline const uint8_t* ahead(const uint8_t* block, const uint8_t* next, int64_t bytes) {
    return next == block + bytes ? nullptr : next;
}

// Scores of the 32 positions of a block against R queries.
template <bool bf16, int R>
inline void score_block(const uint8_t* keys, const uint8_t* next, const Factor<bf16>* q,
                        int64_t dim, float* scores) {
    constexpr int64_t kPair = 2 * kBlock * (bf16 ? 2 : 4);  // bytes of two elements of all keys
    F lo[R], hi[R];  // unrolled, here and below: else GCC keeps such arrays in memory
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) lo[r] = hi[r] = set(0.0f);
    for (int64_t d = 0; d < dim; d += 2) {
        if (bf16 && next) prefetch(next + d / 2 * kPair, kPair);
        const auto a = load_keys<bf16>(keys, d, 0), b = load_keys<bf16>(keys, d, 16);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            const auto both = set_pair(q + r * dim + d);
            lo[r] = dot2(lo[r], a, both);
            hi[r] = dot2(hi[r], b, both);
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
        store(scores + r * kScoreStride, lo[r]);
        store(scores + r * kScoreStride + 16, hi[r]);
    }
}

// sums[r] = weights[r] @ values over n positions from block `blocks[0]` on, V vectors from d on.
template <bool bf16, int R, int V>
inline void weigh(const Past& past, int64_t n, int64_t d, const float* rows, float* sums) {
    constexpr int64_t kStride = kScoreStride * sizeof(float) / sizeof(Factor<bf16>);
    const auto* weights = reinterpret_cast<const Factor<bf16>*>(rows);
    const int64_t dim = past.kv.head_dim;
    F sum[R][V];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int i = 0; i < V; ++i) sum[r][i] = set(0.0f);
    for (int64_t start = 0; start < n; start += kBlock, weights += kBlock) {
        const uint8_t* values = past.at(start, true);
        const uint8_t* next =
            start + kBlock < n ? ahead(values, past.at(start + kBlock, true), past.kv.head_bytes())
                               : past.then;
        const int64_t count = n - start < kBlock ? n - start : kBlock;
        for (int64_t j = 0; j < count; j += 2) {
            decltype(load_values<bf16>(values, j, d, dim)) x[V];
            if (bf16 && next) prefetch(next + (j * dim + 2 * d) * 2, V * 64);
#pragma GCC unroll 4
            for (int i = 0; i < V; ++i) x[i] = load_values<bf16>(values, j, d + 16 * i, dim);
            if (j + 1 == count)  // what lies past the end may be anything
#pragma GCC unroll 4
                for (int i = 0; i < V; ++i) x[i] = first_of(x[i]);
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
                const auto both = set_pair(weights + r * kStride + j);
#pragma GCC unroll 4
                for (int i = 0; i < V; ++i) sum[r][i] = dot2(sum[r][i], x[i], both);
            }
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int i = 0; i < V; ++i) store(sums + r * dim + d + 16 * i, sum[r][i]);
}

template <bool bf16, int R>
inline void score_rows(const Past& past, int64_t n, const Factor<bf16>* q, float* scores) {
    for (int64_t start = 0; start < n; start += kBlock) {
        const bool more = start + kBlock < n;  // behind the last keys come the first values
        const uint8_t* keys = past.at(start, false);
        const uint8_t* next = past.at(more ? start + kBlock : 0, !more);
        score_block<bf16, R>(keys, ahead(keys, next, past.kv.head_bytes()), q, past.kv.head_dim,
                             scores + start);
    }
}

template <bool bf16, int R>
inline void weigh_rows(const Past& past, int64_t n, const float* weights, float* sums) {
    const int64_t dim = past.kv.head_dim;
    constexpr int V = kWideSums ? 4 : 1;
    int64_t d = 0;
    for (; d + 16 * V <= dim; d += 16 * V) weigh<bf16, R, V>(past, n, d, weights, sums);
    for (; d < dim; d += 16) weigh<bf16, R, 1>(past, n, d, weights, sums);
}

// The blocks of a chunk that some queries see, one behind the other, the last up to `count`.
struct Picked {
    Past past;
    int count;
    int32_t index[kChunkBlocks];   // of a block in the chunk
    int32_t blocks[kChunkBlocks];  // as its past has it
    Picked(const Past& chunk, uint32_t wanted, int end) : past(chunk), count(0) {
        past.blocks = blocks;
        int n = 0, last = 0;
        for (; wanted; wanted &= wanted - 1) {
            index[n] = last = std::countr_zero(wanted);
            blocks[n++] = chunk.blocks[last];
        }
        if (n == 0) return;
        const int left = end - last * kBlock;
        count = (n - 1) * kBlock + (left < kBlock ? left : kBlock);
    }
    Picked(const Picked&) = delete;
    Picked& operator=(const Picked&) = delete;
    int padded() const { return (count + kBlock - 1) / kBlock * kBlock; }
};

// Caps and biases the scores of query r, and takes those it does not see out with minus infinity.
inline void shape_scores(const Shape& shape, const Tile& tile, int r, const Picked& picked,
                         int64_t from, float* row) {
    static constexpr float lane[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const Seen seen = tile.seen(r, from);
    const float slope = tile.slope[r] * kLog2e;
    for (int i = 0; i < picked.padded(); i += kBlock) {
        const int start = picked.index[i / kBlock] * kBlock;
        float* scores = row + i;
        for (int half = 0; half < kBlock; half += 16) {
            F x = load(scores + half);
            if (shape.softcap != 0)
                x = mul(set(shape.softcap), tanh(mul(x, set(1.0f / shape.softcap))));
            if (shape.biased) {
                const int64_t distance = from + start + half - (tile.length[r] - 1);
                const F positions = add(set(static_cast<float>(distance)), load(lane));
                x = fma(set(slope), positions, x);
            }
            store(scores + half, x);
        }
        if (start >= seen.first && start + kBlock <= seen.end) continue;
        for (int j = 0; j < kBlock; ++j) {
            const int at = start + j;
            if (at >= seen.sinks && (at < seen.first || at >= seen.end)) scores[j] = kLowest;
        }
    }
}

// 2^(score - top), and exactly zero for a score of minus infinity.
template <int degree>
inline F weight_of(F score, F top) {
    const F seen = max(set(0.0f), add(score, set(1e30f)));  // far above any weight, or zero
    return min(exp2<degree>(sub(score, top)), seen);
}

// As soften(), of scores some of which are minus infinity.
inline void soften_shaped(float* row, int padded, float& top, float& total) {
    F most = set(kLowest);
    for (int i = 0; i < padded; i += 16) most = max(load(row + i), most);
    top = hmax(most);
    F sum = set(0.0f);
    for (int i = 0; i < padded; i += 16) {
        const F p = weight_of<5>(load(row + i), set(top));
        sum = add(sum, p);
        store(row + i, p);
    }
    total = hsum(sum);
}

template <bool bf16>
constexpr auto kSoften = soften;
template <bool bf16>
constexpr auto kSoftenShaped = soften_shaped;

#if defined(PRONK_BF16)
// A query of bf16, for products of pairs.
inline void pack_query(const float* q, float scale, int64_t dim, uint16_t* packed) {
    for (int64_t d = 0; d < dim; d += 16)
        store_bf16(packed + d, mul(load(q + d), set(scale * kLog2e)));
}

// As soften(), with the weights rounded to bf16, row by row over the scores they come from; the
// total is that of the rounded weights. Zeros fill whole blocks.
inline void soften_bf16(float* row, int n, int padded, float& top, float& total) {
    const F t = set(top = top_of(row, n));
    uint16_t* out = reinterpret_cast<uint16_t*>(row);
    F sum = set(0.0f);
    int i = 0;
    for (; i + 32 <= n; i += 32) {
        const F a = exp2<3>(sub(load(row + i), t)), b = exp2<3>(sub(load(row + i + 16), t));
        sum = add_pairs(sum, store_bf16(out + i, a, b));
    }
    if (const int rest = n - i; rest) {
        const F a = exp2<3>(sub(load(row + i), t)), b = exp2<3>(sub(load(row + i + 16), t));
        const F kept = keep_first(b, rest > 16 ? rest - 16 : 0, 0.0f);
        sum = add_pairs(sum, store_bf16(out + i, keep_first(a, rest, 0.0f), kept));
        i += 32;
    }
    for (; i < padded; i += 32) store_bf16(out + i, set(0.0f), set(0.0f));
    total = hsum(sum);
}

// As soften_shaped(), with the weights rounded as soften_bf16() does.
inline void soften_shaped_bf16(float* row, int padded, float& top, float& total) {
    F most = set(kLowest);
    for (int i = 0; i < padded; i += 16) most = max(load(row + i), most);
    top = hmax(most);
    const F t = set(top);
    uint16_t* out = reinterpret_cast<uint16_t*>(row);
    F sum = set(0.0f);
    for (int i = 0; i < padded; i += 32) {
        const F a = weight_of<3>(load(row + i), t), b = weight_of<3>(load(row + i + 16), t);
        sum = add_pairs(sum, store_bf16(out + i, a, b));
    }
    total = hsum(sum);
}

template <>
constexpr auto kSoften<true> = soften_bf16;
template <>
constexpr auto kSoftenShaped<true> = soften_shaped_bf16;
#endif

// Kernels by the number of queries.
template <bool bf16>
constexpr decltype(&score_rows<bf16, 1>) kScore[] = {score_rows<bf16, 1>, score_rows<bf16, 2>,
                                                     score_rows<bf16, 3>, score_rows<bf16, 4>};
template <bool bf16>
constexpr decltype(&weigh_rows<bf16, 1>) kWeigh[] = {weigh_rows<bf16, 1>, weigh_rows<bf16, 2>,
                                                     weigh_rows<bf16, 3>, weigh_rows<bf16, 4>};

// Positions [from, from + kChunk), which `past` is, for every query of the tile.
template <bool bf16>
void sum_chunk(const Tile& tile, const Factor<bf16>* q, const Past& past, int64_t from,
               Scores& scores, Sums sums) {
    const int64_t dim = past.kv.head_dim;
    for (int r = 0; r < tile.count; r += 4) {
        const int rows = tile.count - r < 4 ? tile.count - r : 4;
        const int64_t left = tile.length[r + rows - 1] - from;
        const int n = static_cast<int>(left < kChunk ? left : kChunk);
        if (n <= 0) continue;
        kScore<bf16>[rows - 1](past, n, q + r* dim, scores.row[r]);
        for (int i = r; i < r + rows; ++i) {
            const int64_t own = tile.length[i] - from;
            if (own > 0)
                kSoften<bf16>(scores.row[i], static_cast<int>(own < n ? own : n), n, sums.top[i],
                              sums.total[i]);
            else
                std::memset(scores.row[i], 0, sizeof scores.row[i]);
        }
        kWeigh<bf16>[rows - 1](past, n, scores.row[r], sums.values + r* dim);
    }
}

// The same where scores are shaped, or where not every query sees all of it.
template <bool bf16>
void sum_shaped(const Shape& shape, const Tile& tile, const Factor<bf16>* q, const Past& past,
                int64_t from, Scores& scores, Sums sums) {
    const int64_t dim = past.kv.head_dim;
    for (int r = 0; r < tile.count; r += 4) {
        const int rows = tile.count - r < 4 ? tile.count - r : 4, end = r + rows;
        const Picked picked(past, tile.blocks(r, end, from), tile.seen(end - 1, from).end);
        if (picked.count == 0) continue;
        kScore<bf16>[rows - 1](picked.past, picked.count, q + r* dim, scores.row[r]);
        for (int i = r; i < end; ++i) {
            if (tile.seen(i, from).any()) {
                shape_scores(shape, tile, i, picked, from, scores.row[i]);
                kSoftenShaped<bf16>(scores.row[i], picked.padded(), sums.top[i], sums.total[i]);
            } else {
                std::memset(scores.row[i], 0, sizeof scores.row[i]);
            }
        }
        kWeigh<bf16>[rows - 1](picked.past, picked.count, scores.row[r], sums.values + r* dim);
    }
}

}  // namespace pronk::PRONK_NS
