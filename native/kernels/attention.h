// Attention over the paged KV cache.
//
// Queries that read the same keys (the heads of a group, neighbouring tokens of a sequence) go
// through the past together, in tiles of 16, a chunk of it at a time: so a chunk is read from
// memory once. The sums of chunks are joined in order.
#pragma once
#include <cmath>

#include "attend.h"
#include "kv_past.h"
#if defined(PRONK_AMX)
#include "attend_amx.h"
#endif

namespace pronk::PRONK_NS {

#if defined(PRONK_AMX)
// Holds tiles while some attention may use them.
class Tiles {
  public:
    explicit Tiles(const KvView& kv) : used_(kv.type != KvType::f32 && kv.head_dim % 32 == 0) {}
    Tiles(const Tiles&) = delete;
    Tiles& operator=(const Tiles&) = delete;
    ~Tiles() {
        if (rows_) _tile_release();
    }
    explicit operator bool() const { return used_; }
    void rows(int count) {
        if (count != rows_) configure_tiles(rows_ = count);
    }

  private:
    bool used_;
    int rows_ = 0;
};
#endif

// 16 sums each: the factors that the values of the old and the added sum take.
inline void join_totals(float* top, float* total, const float* chunk_top, const float* chunk_total,
                        float* old, float* added) {
    const F a = load(top), b = load(chunk_top), both = max(a, b);
    const F x = exp2<5>(sub(a, both)), y = exp2<5>(sub(b, both));
    store(top, both);
    store(total, fma(load(chunk_total), y, mul(load(total), x)));
    store(old, x);
    store(added, y);
}

inline void join_values(float* values, const float* chunk, float old, float added, int64_t dim) {
    const F x = set(old), y = set(added);
    for (int64_t d = 0; d < dim; d += 16)
        store(values + d, fma(load(chunk + d), y, mul(load(values + d), x)));
}

inline void divide(const float* values, float total, const KvView& kv, float* out) {
    const F inverse = set(1.0f / total);
    for (int64_t d = 0; d < kv.head_dim; d += 16) store(out + d, mul(load(values + d), inverse));
    if (kv.rotated()) hadamard(out, kv.head_dim);
}

// Tiles of queries of one sequence and KV head on their way through the past.
class Queries {
  public:
    Queries(const KvView& kv, const Attend& attend)
        : kv_(kv),
          attend_(attend),
          shape_(attend),
#if defined(PRONK_AMX)
          tiles_(kv),
#endif
          most_(kElements / kv.head_dim / kQueries < kTiles
                    ? static_cast<int>(kElements / kv.head_dim / kQueries)
                    : kTiles) {
    }

    bool empty() const { return count_ == 0; }
    bool full() const { return count_ == most_ * kQueries; }

    // The query of one head of the token at `position`.
    void add(const float* q, int64_t head, int64_t position, float* out) {
        Tile& tile = tile_[count_ / kQueries];
        const int r = count_ % kQueries;
        float* packed = q_ + count_ / kQueries * kQueries * kv_.head_dim;
        tile.count = r + 1;
        tile.length[r] = position + 1;
        tile.first[r] = attend_.window.first(position);
        tile.sinks[r] = attend_.window.before(position);
        tile.slope[r] = attend_.slopes ? attend_.slopes[head] : 0.0f;
        out_[count_++] = out;
        const float scale = scale_at(position);
        alignas(64) float turned[kMaxHeadDim];
        if (kv_.rotated()) {
            std::memcpy(turned, q, static_cast<size_t>(kv_.head_dim) * sizeof(float));
            hadamard(turned, kv_.head_dim);
            q = turned;
        }
#if defined(PRONK_AMX)
        if (tiles_)
            return split_query(q, scale, kv_.head_dim, kQueries * kv_.head_dim,
                               reinterpret_cast<uint16_t*>(packed) + r * kv_.head_dim);
#endif
        if (kv_.type == KvType::f32)
            return pack_query(q, scale, kv_.head_dim, packed + r * kv_.head_dim);
        pack_query(q, scale, kv_.head_dim,
                   reinterpret_cast<Factor<true>*>(packed) + r * kv_.head_dim);
    }

    // Writes each query's attention to its `out`; `then` are the keys that are read next.
    void finish(const int32_t* blocks, int64_t head, const uint8_t* then) {
        const int tiles = (count_ + kQueries - 1) / kQueries;
        const int64_t longest = tile_[tiles - 1].longest();
        const auto skip = [&](int64_t& from) {  // what of a chunk is wanted, of the first that is
            uint32_t wanted = 0;
            while (from < longest && !(wanted = wants(0, tiles, from))) from = after(from);
            return wanted;
        };
        int64_t from = 0, next;
        for (uint32_t wanted = skip(from), more; wanted; from = next, wanted = more) {
            more = skip(next = after(from));
            const Past past = read_past(
                kv_, blocks + from / kBlock, head, wanted,
                more ? kv_head(kv_, blocks[next / kBlock + std::countr_zero(more)], head, false)
                     : then);
            for (int i = 0, first = 1; i < tiles; ++i)
                if (from < tile_[i].longest() && (!windowed() || wants(i, i + 1, from))) {
                    const bool fresh = from == tile_[i].begin(0);
                    sum(i, past, from, first, fresh);
                    if (!fresh) join(i, from);
                    first = 0;
                }
        }
        for (int i = 0; i < count_; ++i)
            divide(values_ + i * kv_.head_dim, total_[i], kv_, out_[i]);
        count_ = 0;
    }

    // Writes each query's sum over one chunk, of which it sees some, to its `out`: values, then the
    // top and the total.
    void part(const int32_t* blocks, int64_t head, int64_t from, bool another) {
        const int64_t dim = kv_.head_dim;
        const int tiles = (count_ + kQueries - 1) / kQueries;
        const uint32_t wanted = wants(0, tiles, from);
        const int32_t* const chunk = blocks + from / kBlock;
        const uint8_t* const then =
            another ? kv_head(kv_, chunk[std::countr_zero(wanted)], head + 1, false) : nullptr;
        const Past past = read_past(kv_, chunk, head, wanted, then);
        for (int i = 0; i < tiles; ++i) sum(i, past, from, i == 0, true);
        for (int i = 0; i < count_; ++i) {
            std::memcpy(out_[i], values_ + i * dim, static_cast<size_t>(dim) * sizeof(float));
            out_[i][dim] = top_[i];
            out_[i][dim + 1] = total_[i];
        }
        count_ = 0;
    }

  private:
    static constexpr int kTiles = 8;
    static constexpr int64_t kElements = kTiles * kQueries * 64;

    // What the query of a position is multiplied by.
    float scale_at(int64_t position) const {
        if (attend_.growth == 0) return attend_.scale;
        const auto spans = static_cast<double>((position + 1) / attend_.growth_span);
        return attend_.scale *
               static_cast<float>(1 + static_cast<double>(attend_.growth) * std::log1p(spans));
    }

    // The chunk after this one that some query may see: none does between its sinks and its first.
    int64_t after(int64_t from) const {
        const int64_t next = from + kChunk;
        if (next < attend_.window.sinks) return next;
        const int64_t first = tile_[0].first[0] / kChunk * kChunk;
        return next < first ? first : next;
    }

    bool windowed() const { return attend_.window.size != 0; }

    // Which blocks of a chunk some query of tiles i..end sees.
    uint32_t wants(int i, int end, int64_t from) const {
        if (!windowed()) i = end - 1;  // the longest sees what the others do
        uint32_t all = 0;
        for (; i < end; ++i) all |= tile_[i].blocks(0, tile_[i].count, from);
        return all;
    }

    // Into the sums of the tile when it is `fresh`, else beside them.
    void sum(int i, const Past& past, int64_t from, [[maybe_unused]] bool first, bool fresh) {
        const int64_t at = i * kQueries, dim = kv_.head_dim;
        const Sums sums = fresh ? Sums{top_ + at, total_ + at, values_ + at * dim}
                                : Sums{chunk_top_, chunk_total_, chunk_};
#if defined(PRONK_AMX)
        if (tiles_) {
            const auto q = reinterpret_cast<const uint16_t*>(q_ + at * dim);
            tiles_.rows(tile_[i].count);
            if (shape_.plain(tile_[i], from))
                return sum_chunk_amx(tile_[i], q, past, from, first, scores_, sums);
            return sum_shaped_amx(shape_, tile_[i], q, past, from, first, scores_, sums);
        }
#endif
        if (past.kv.type == KvType::bf16)
            sum_vectors<true>(i, past, from, sums);
        else
            sum_vectors<false>(i, past, from, sums);
    }

    template <bool bf16>
    void sum_vectors(int i, const Past& past, int64_t from, Sums sums) {
        const auto q = reinterpret_cast<const Factor<bf16>*>(q_ + i * kQueries * kv_.head_dim);
        if (shape_.plain(tile_[i], from))
            sum_chunk<bf16>(tile_[i], q, past, from, scores_, sums);
        else
            sum_shaped<bf16>(shape_, tile_[i], q, past, from, scores_, sums);
    }

    // Adds the sums of the chunk from `from` on, of which some of the tile's queries may see
    // nothing, and others nothing before it.
    void join(int i, int64_t from) {
        const Tile& tile = tile_[i];
        const int64_t at = i * kQueries, dim = kv_.head_dim;
        alignas(64) float old[kQueries], added[kQueries];
        uint32_t begin = 0, joins = 0;
        for (int r = 0; r < tile.count; ++r) {
            if (!tile.seen(r, from).any())
                chunk_top_[r] = kLowest, chunk_total_[r] = 0.0f;
            else
                (tile.begin(r) == from ? begin : joins) |= 1u << r;
        }
        for (uint32_t left = begin; left; left &= left - 1) {
            const int r = std::countr_zero(left);
            top_[at + r] = kLowest, total_[at + r] = 0.0f;
        }
        join_totals(top_ + at, total_ + at, chunk_top_, chunk_total_, old, added);
        for (int r = 0; r < tile.count; ++r) {
            float* values = values_ + (at + r) * dim;
            if (begin >> r & 1)
                std::memcpy(values, chunk_ + r * dim, static_cast<size_t>(dim) * sizeof(float));
            if (joins >> r & 1) join_values(values, chunk_ + r * dim, old[r], added[r], dim);
        }
    }

    const KvView& kv_;
    const Attend& attend_;
    const Shape shape_;
#if defined(PRONK_AMX)
    Tiles tiles_;
#endif
    const int most_;
    int count_ = 0;
    Tile tile_[kTiles];
    float* out_[kTiles * kQueries];
    alignas(64) float top_[kTiles * kQueries], total_[kTiles * kQueries];
    alignas(64) float chunk_top_[kQueries], chunk_total_[kQueries];
    alignas(64) float q_[kElements];  // as the path packs them
    alignas(64) float values_[kElements];
    alignas(64) float chunk_[kQueries * kMaxHeadDim];
    Scores scores_;
};

// Whether token t + 1 may go through the past with token t.
inline bool goes_on(const Tokens& tokens, int64_t t, int64_t count) {
    return t + 1 < count && tokens.sequences[t + 1] == tokens.sequences[t] &&
           tokens.positions[t + 1] > tokens.positions[t];
}

inline void attention(Rows qkv, int64_t heads, const Attend& attend, const KvView& kv,
                      const Tokens& tokens, Rows out, int64_t count, int64_t first, int64_t last) {
    Queries queries(kv, attend);
    const int64_t group = heads / (kv.kv_heads * attend.shares);
    const auto blocks_of = [&](int64_t t) {
        return kv.tables + tokens.sequences[t] * kv.max_blocks;
    };
    const auto first_keys = [&](int64_t item) -> const uint8_t* {
        const int64_t head = item / count / attend.shares, t = item % count;
        if (head == kv.kv_heads) return nullptr;
        const int64_t position = tokens.positions[t];
        const int64_t from = attend.window.before(position) ? 0 : attend.window.first(position);
        return kv_head(kv, blocks_of(t)[from / kBlock], head, false);
    };
    for (int64_t item = first; item < last; ++item) {
        const int64_t share = item / count, head = share / attend.shares, t = item % count;
        const int32_t* blocks = blocks_of(t);
        for (int64_t h = share * group; h < (share + 1) * group; ++h) {
            queries.add(qkv.row<float>(t) + h * kv.head_dim, h, tokens.positions[t],
                        out.row<float>(t) + h * kv.head_dim);
            if (queries.full()) queries.finish(blocks, head, nullptr);
        }
        const bool joins = item + 1 < last && goes_on(tokens, t, count);
        if (!joins && !queries.empty()) queries.finish(blocks, head, first_keys(item + 1));
    }
}

// The parts of token t: row t * chunks + c holds, for every head, the values summed over the c-th
// chunk that it sees, then the maximum and the total.
inline void attention_parts(Rows qkv, int64_t heads, const Attend& attend, const KvView& kv,
                            const Tokens& tokens, Rows parts, int64_t count, int64_t chunks,
                            int64_t first, int64_t last) {
    Queries queries(kv, attend);
    const Window& window = attend.window;
    const int64_t group = heads / kv.kv_heads, dim = kv.head_dim, width = dim + kPartTail;
    for (int64_t item = first; item < last; ++item) {
        const int64_t head = item % kv.kv_heads, index = item / kv.kv_heads;
        const auto from = [&](int64_t t) {  // of the chunk, or -1 where the token has fewer
            const int64_t position = tokens.positions[t];
            return index < window.chunks(position) ? window.chunk(position, index) * kChunk : -1;
        };
        for (int64_t t = 0; t < count; ++t) {
            const int64_t start = from(t);
            if (start < 0) continue;
            const int32_t* blocks = kv.tables + tokens.sequences[t] * kv.max_blocks;
            float* part = parts.row<float>(t * chunks + index);
            for (int64_t h = head * group; h < (head + 1) * group; ++h) {
                queries.add(qkv.row<float>(t) + h * dim, h, tokens.positions[t], part + h * width);
                if (queries.full()) queries.part(blocks, head, start, false);
            }
            const bool joins = goes_on(tokens, t, count) && from(t + 1) == start;
            if (!joins && !queries.empty())
                queries.part(blocks, head, start, count == 1 && head + 1 < kv.kv_heads);
        }
    }
}

// Joins the parts; items are token * heads + head. The first part is overwritten.
inline void attention_join(Rows parts, int64_t heads, const Window& window, const KvView& kv,
                           const Tokens& tokens, int64_t chunks, Rows out, int64_t first,
                           int64_t last) {
    const int64_t dim = kv.head_dim, width = dim + kPartTail;
    for (int64_t item = first; item < last; ++item) {
        const int64_t t = item / heads, h = item % heads;
        const auto part = [&](int64_t c) { return parts.row<float>(t * chunks + c) + h * width; };
        float* all = part(0);
        alignas(64) float top[kQueries], total[kQueries], old[kQueries], added[kQueries];
        store(top, set(all[dim]));
        store(total, set(all[dim + 1]));
        for (int64_t c = 1; c < window.chunks(tokens.positions[t]); ++c) {
            alignas(64) float chunk_top[kQueries], chunk_total[kQueries];
            store(chunk_top, set(part(c)[dim]));
            store(chunk_total, set(part(c)[dim + 1]));
            join_totals(top, total, chunk_top, chunk_total, old, added);
            join_values(all, part(c), old[0], added[0], dim);
        }
        divide(all, total[0], kv, out.row<float>(t) + h * dim);
    }
}

}  // namespace pronk::PRONK_NS
