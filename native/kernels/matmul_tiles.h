// matmul for many tokens on AMX: tiles of 16 tokens by one panel of 16 rows.
//
// A tile instruction multiplies 16 tokens by 64 bytes each. One group is 32 elements of 12 bits in
// two int8 halves, that is 64 bytes; against weights that lie there twice, times 16 and as they
// are, one instruction gives the exact sum. What does not fit a byte times 16 takes two.
#pragma once
#include <algorithm>

#include "matmul_row.h"
#include "tiles.h"
#include "unpack.h"

namespace pronk::PRONK_NS {

constexpr int64_t kVectorTokens = 4;  // up to so many, vectors are faster than tiles
constexpr int kBlockGroups = 20;      // most groups unpacked at once: they stay in the first cache

// Groups multiplied before their sums are used: tiles and vectors get in each other's way.
template <Format fmt>
constexpr int kPhase = kBased<fmt, Precision::a12> ? 4 : 2;

// Tiles 0-3 are sums; 4 and 5 activations, 6 and 7 weights.
template <Format fmt>
inline void shape_tiles() {
    constexpr int bits = traits(fmt).bits;
    TileShapes shapes;
    for (int i = 0; i < 4; ++i) shapes.set(i, 16, 64);
    const auto pair = [&](int i, int depth) {  // depth: bytes of a token in the product
        shapes.set(4 + i, 16, depth);
        shapes.set(6 + i, depth / 4, 64);
    };
    pair(0, bits <= 5 ? 64 : bits == 8 ? 32 : 16);
    pair(1, bits == 6 ? 16 : 32);
    configure(shapes);
}

// One group as tiles want it: rows of four consecutive k of 16 rows.
template <Format fmt>
inline void unpack_tile(const uint8_t* quants, const uint8_t* plane, uint8_t* b) {
    constexpr int bits = traits(fmt).bits, up = bits == 4 ? 4 : 3;
    const auto put = [&](int i, B w) {
        const __m512i v = _mm512_sub_epi8(w.v, _mm512_set1_epi8(static_cast<char>(kOffset<fmt>)));
        if constexpr (bits > 5) {
            _mm512_store_si512(b + 64 * i, v);
        } else {
            const __m512i mask = _mm512_set1_epi8(static_cast<char>(0xff << up));
            _mm512_store_si512(b + 64 * i, _mm512_and_si512(_mm512_slli_epi16(v, up), mask));
            _mm512_store_si512(b + 64 * (i + 8), v);
        }
    };
    unrolled<4>([&]<int i>() {
        B low, high;
        unpack_quants<fmt, i>(quants, plane, low, high);
        put(i, low);
        put(i + 4, high);
    });
}

// Sums of one group for 16 tokens: dot [halves][16 tokens][16 rows], high parts apart from low ones
// where bits > 5: [halves][high, low].
template <Format fmt>
inline void multiply_tile(const int8_t* a, int64_t stride, const uint8_t* b, int32_t (*dot)[256]) {
    constexpr int bits = traits(fmt).bits;
    alignas(64) static constexpr int32_t base[16] = {kBase, kBase, kBase, kBase, kBase, kBase,
                                                     kBase, kBase, kBase, kBase, kBase, kBase,
                                                     kBase, kBase, kBase, kBase};
    if constexpr (kBased<fmt, Precision::a12>)
        _tile_loadd(0, base, 0);
    else
        _tile_zero(0);
    _tile_loadd(4, a, stride);
    _tile_loadd(6, b, 64);
    if constexpr (kBased<fmt, Precision::a12>) {
        if constexpr (traits(fmt).minimum)
            _tile_dpbsud(0, 4, 6);
        else
            _tile_dpbssd(0, 4, 6);
        if constexpr (bits == 5) {  // times 8 in there: the high part once more
            _tile_loadd(5, a, stride);
            _tile_loadd(7, b, 64);
            if constexpr (traits(fmt).minimum)
                _tile_dpbsud(0, 5, 7);
            else
                _tile_dpbssd(0, 5, 7);
        }
        _tile_stored(0, dot[0], 64);
    } else {
        _tile_zero(1);
        _tile_dpbssd(0, 4, 6);
        _tile_stored(0, dot[0], 64);
        _tile_loadd(5, a + kGroup, stride);
        _tile_dpbssd(1, 5, 6);
        _tile_stored(1, dot[1], 64);
        if constexpr (bits == 6) {
            _tile_zero(2);
            _tile_zero(3);
            _tile_loadd(4, a + 16, stride);
            _tile_loadd(7, b + 256, 64);
            _tile_dpbssd(2, 4, 7);
            _tile_stored(2, dot[2], 64);
            _tile_loadd(5, a + kGroup + 16, stride);
            _tile_dpbssd(3, 5, 7);
            _tile_stored(3, dot[3], 64);
        }
    }
}

struct Unpacked {  // kBlockGroups groups of a panel
    alignas(64) uint8_t quants[kBlockGroups][1024];
    F d[kBlockGroups][2], minimum[kBlockGroups];
};

// M tokens (8 or 16) of a block against `count` groups from g0 on; `acc` carries on.
template <Format fmt, int M>
[[gnu::always_inline]] inline void multiply_block(const Unpacked& w, const uint8_t* block,
                                                  int64_t groups, int64_t g0, int64_t count,
                                                  F* acc) {
    const int64_t stride = groups * 2 * kGroup;
    const int8_t* quants = reinterpret_cast<const int8_t*>(block) + g0 * 2 * kGroup;
    const float* scales = reinterpret_cast<const float*>(block + kActRows * stride) + g0 * 64;
    alignas(64) int32_t dots[kPhase<fmt>][kBased<fmt, Precision::a12> ? 1 : 4][256];
    for (int64_t i = 0; i < count; i += kPhase<fmt>) {
        const int64_t end = std::min<int64_t>(i + kPhase<fmt>, count);
        for (int64_t g = i; g < end; ++g)
            multiply_tile<fmt>(quants + g * 2 * kGroup, stride, w.quants[g], dots[g - i]);
        for (int64_t g = i; g < end; ++g) {
            const auto& dot = dots[g - i];
            const F minus = mul(w.d[g][0], set(-kBaseValue));
            unrolled<M>([&]<int m>() __attribute__((always_inline)) {
                const auto load_dot = [&](int j) { return I{_mm512_load_si512(dot[j] + 16 * m)}; };
                const auto both = [&](int h) {
                    return to_float(add(shift_left<4>(load_dot(2 * h)), load_dot(2 * h + 1)));
                };
                F sum;
                if constexpr (kBased<fmt, Precision::a12>) {
                    sum = fma({_mm512_castsi512_ps(load_dot(0).v)}, w.d[g][0], minus);
                } else {
                    sum = mul(both(0), w.d[g][0]);
                    if constexpr (traits(fmt).halves == 2) sum = fma(both(1), w.d[g][1], sum);
                }
                acc[m] = add_group<fmt>(acc[m], sum, set(scales[64 * g + 4 * m]), w.minimum[g],
                                        set(scales[64 * g + 4 * m + 1]));
            });
        }
    }
}

template <Format fmt, int M>
inline void multiply_tokens(const Unpacked& w, const MatmulPart& part, int64_t row, int64_t groups,
                            int64_t g0, int64_t count, Rows x, Rows out, Rows residual, int64_t t,
                            int64_t tokens) {
    F acc[M];
    const int64_t column = part.column + row, live = std::min<int64_t>(M, tokens - t);
    unrolled<M>([&]<int m>() {  // between blocks the sums wait in the output
        acc[m] = g0 && m < live ? load(out.row<float>(t + m) + column) : set(0.0f);
    });
    multiply_block<fmt, M>(w, x.data + t * x.stride, groups, g0, count, acc);
    unrolled<M>([&]<int m>() {
        if (m < live) {
            if (g0 + count < groups)
                store(out.row<float>(t + m) + column, acc[m]);
            else
                finish_row(part, row, t + m, acc[m], out, residual);
        }
    });
}

template <Format fmt>
void matmul_tiles(const MatmulPart& part, int64_t cols, Rows x, Rows out, Rows residual,
                  int64_t tokens, int64_t first, int64_t last) {
    const int64_t groups = cols / kGroup, share = panel_bytes(fmt, cols) / groups;
    const int64_t blocks = (groups + kBlockGroups - 1) / kBlockGroups;
    const int64_t block = (groups + blocks - 1) / blocks;
    Unpacked w;
    shape_tiles<fmt>();
    for (int64_t p = first; p < last; ++p) {
        const uint8_t* panel = part.weight + p * panel_bytes(fmt, cols);
        const uint8_t* plane = low_panel(fmt, part.weight, part.rows, cols, p);
        for (int64_t g0 = 0; g0 < groups; g0 += block) {
            const int64_t count = std::min(block, groups - g0);
            for (int64_t g = 0; g < count; ++g) {
                const GroupPlace place = place_of(fmt, groups, g0 + g);
                prefetch(panel + (g0 + g) * share + kAhead, share);
                prefetch(plane + kAhead, low_bytes(fmt));
                unpack_tile<fmt>(panel + place.quants, plane, w.quants[g]);
                plane += low_bytes(fmt);
                unpack_scales<fmt>(panel + place.scales, g0 + g, w.d[g], w.minimum[g]);
            }
            publish();
            int64_t t = 0;
            for (; tokens - t > 8; t += kActRows)
                multiply_tokens<fmt, 16>(w, part, p * kPanel, groups, g0, count, x, out, residual,
                                         t, tokens);
            if (t < tokens)
                multiply_tokens<fmt, 8>(w, part, p * kPanel, groups, g0, count, x, out, residual, t,
                                        tokens);
        }
    }
    _tile_release();
}

}  // namespace pronk::PRONK_NS
