// The sum of one chunk for a tile of up to 16 queries, in AMX tiles.
//
// A row of a tile is the same bits whatever the other rows are and however many: so one token
// decodes exactly as it would among others. Queries are split into two planes of bf16, so that
// only keys and values are rounded to bf16, and weights, each by half a unit in its last place.
#pragma once
#include "attend.h"
#include "tiles.h"

namespace pronk::PRONK_NS {

// Tiles 0 to 3 are sums, 4 and 5 rows of queries or weights, 6 and 7 keys or values.
inline void configure_tiles(int rows) {
    TileShapes shapes;
    for (int i = 0; i < 8; ++i) shapes.set(i, i < 6 ? rows : 16, 64);
    configure(shapes);
}

// Two planes of [row][dim], `plane` elements apart: the scaled query in bf16, and what is left.
inline void split_query(const float* q, float scale, int64_t dim, int64_t plane, uint16_t* packed) {
    const F s = set(scale * kLog2e);
    for (int64_t d = 0; d < dim; d += 32) {
        const F a = mul(load(q + d), s), b = mul(load(q + d + 16), s);
        store_bf16(packed + d, a, b);
        const F ra = sub(a, load_bf16(packed + d)), rb = sub(b, load_bf16(packed + d + 16));
        store_bf16(packed + plane + d, ra, rb);
    }
}

// Scores of `count` blocks (1 or 2) against the tile's queries.
template <int count>
inline void score_blocks(const uint8_t* k0, const uint8_t* k1, const uint16_t* q, int64_t plane,
                         int64_t dim, float* scores) {
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (count == 2) {
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t d = 0; d < dim; d += 32) {
        _tile_loadd(4, q + d, dim * 2);
        _tile_loadd(5, q + plane + d, dim * 2);
        _tile_loadd(6, k0 + d * 64, 128);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(0, 5, 6);
        _tile_loadd(7, k0 + d * 64 + 64, 128);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(1, 5, 7);
        if constexpr (count == 2) {
            _tile_loadd(6, k1 + d * 64, 128);
            _tile_dpbf16ps(2, 4, 6);
            _tile_dpbf16ps(2, 5, 6);
            _tile_loadd(7, k1 + d * 64 + 64, 128);
            _tile_dpbf16ps(3, 4, 7);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    constexpr int64_t stride = kScoreStride * 4;
    _tile_stored(0, scores, stride);
    _tile_stored(1, scores + 16, stride);
    if constexpr (count == 2) {
        _tile_stored(2, scores + 32, stride);
        _tile_stored(3, scores + 48, stride);
    }
}

// One block of values times its weights, added to `count` (2 or 4) tiles of 16 dimensions.
template <int count>
inline void weigh_block(const float* weights, const uint8_t* values, int64_t dim) {
    const int64_t stride = dim * 4;
    _tile_loadd(4, weights, kScoreStride * 4);
    _tile_loadd(6, values, stride);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, values + 64, stride);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (count == 4) {
        _tile_loadd(6, values + 128, stride);
        _tile_dpbf16ps(2, 4, 6);
        _tile_loadd(7, values + 192, stride);
        _tile_dpbf16ps(3, 4, 7);
    }
}

// The first n positions of a block of values, and zeros: what lies past them may be anything.
inline const uint8_t* copy_values(const uint8_t* values, int64_t n, int64_t dim, uint8_t* copy) {
    const int64_t whole = n / 2 * dim * 4;
    std::memcpy(copy, values, static_cast<size_t>(whole));
    std::memset(copy + whole, 0, static_cast<size_t>(kBlock * dim * 2 - whole));
    for (int64_t d = 0; n % 2 && d < dim; ++d)
        std::memcpy(copy + whole + 4 * d, values + whole + 4 * d, 2);
    return copy;
}

// The sum over the first n positions of a past. `soften` makes weights of a query's scores, and
// zeros up to a number of positions; `first` of the tiles that read the same blocks, this one asks
// for them ahead.
template <class Soften>
inline void sum_amx(const Tile& tile, const uint16_t* q, const Past& past, int n, bool first,
                    Scores& scores, Sums sums, Soften soften) {
    const int64_t dim = past.kv.head_dim, plane = kQueries * dim;
    const int padded = (n + kBlock - 1) / kBlock * kBlock;
    const auto at = [&](int i, bool value) { return past.at(i, value); };
    const auto ask = [&](int i, bool value) {
        if (!first) return;
        if (i < padded)
            prefetch(at(i, value), past.kv.head_bytes());
        else if (!value && i - padded < padded)
            prefetch(at(i - padded, true), past.kv.head_bytes());
    };
    publish();
    ask(0, false);
    ask(kBlock, false);
    for (int i = 0; i < padded; i += 2 * kBlock) {
        ask(i + 2 * kBlock, false);
        ask(i + 3 * kBlock, false);
        const uint8_t* k = at(i, false);
        if (i + kBlock < padded)
            score_blocks<2>(k, at(i + kBlock, false), q, plane, dim, scores.row[0] + i);
        else
            score_blocks<1>(k, k, q, plane, dim, scores.row[0] + i);
    }
    for (int r = 0; r < tile.count; ++r)
        if (!soften(r, padded)) std::memset(scores.row[r], 0, sizeof scores.row[r]);
    alignas(64) uint8_t tail[kBlock * kMaxHeadDim * 2];
    const uint8_t* last = n < padded ? copy_values(at(padded - kBlock, true), n % kBlock, dim, tail)
                                     : at(padded - kBlock, true);
    publish();
    for (int64_t d = 0; d < dim; d += 64) {
        const bool wide = d + 64 <= dim;
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int i = 0; i < padded; i += kBlock) {
            const uint8_t* v = (i + kBlock < padded ? at(i, true) : last) + d * 4;
            if (d == 0) ask(i + 2 * kBlock, true);
            // Weights are bf16: half as far apart as the scores were.
            (wide ? weigh_block<4> : weigh_block<2>)(scores.row[0] + i / 2, v, dim);
        }
        float* out = sums.values + d;
        _tile_stored(0, out, dim * 4);
        _tile_stored(1, out + 16, dim * 4);
        if (wide) {
            _tile_stored(2, out + 32, dim * 4);
            _tile_stored(3, out + 48, dim * 4);
        }
    }
}

// As sum_chunk().
inline void sum_chunk_amx(const Tile& tile, const uint16_t* q, const Past& past, int64_t from,
                          bool first, Scores& scores, Sums sums) {
    const int64_t left = tile.longest() - from;
    const int n = static_cast<int>(left < kChunk ? left : kChunk);
    sum_amx(tile, q, past, n, first, scores, sums, [&](int r, int padded) {
        const int64_t own = tile.length[r] - from;
        if (own <= 0) return false;
        soften_bf16(scores.row[r], static_cast<int>(own < n ? own : n), padded, sums.top[r],
                    sums.total[r]);
        return true;
    });
}

// As sum_shaped().
inline void sum_shaped_amx(const Shape& shape, const Tile& tile, const uint16_t* q,
                           const Past& past, int64_t from, bool first, Scores& scores, Sums sums) {
    const Picked picked(past, tile.blocks(0, tile.count, from),
                        tile.seen(tile.count - 1, from).end);
    if (picked.count == 0) return;
    sum_amx(tile, q, picked.past, picked.count, first, scores, sums, [&](int r, int padded) {
        if (!tile.seen(r, from).any()) return false;
        shape_scores(shape, tile, r, picked, from, scores.row[r]);
        soften_shaped_bf16(scores.row[r], padded, sums.top[r], sums.total[r]);
        return true;
    });
}

}  // namespace pronk::PRONK_NS
