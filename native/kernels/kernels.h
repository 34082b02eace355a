// The kernels an ISA provides. Each works on a half-open range of its own items, so that
// the executor can hand the ranges to any thread; no result depends on how it is split.
#pragma once
#include <cstdint>

#include "formats.h"

namespace pronk {

struct MatmulPart {
    const uint8_t* weight;  // packed
    Format format;
    int32_t rows;       // outputs
    int32_t column;     // first output column
    const float* bias;  // [rows] or null
    float scale = 1;    // of the sums and the bias
};

enum class Activation : int { silu, gelu, gelu_tanh, relu };  // gelu: with erf

constexpr int64_t kCapPiece = 4096;  // columns of a row that softcap takes as one item

struct Rows {  // a matrix in the arena
    uint8_t* data;
    int64_t stride;  // bytes
    template <class T>
    [[gnu::always_inline]] T* row(int64_t i) const {
        return reinterpret_cast<T*>(data + i * stride);
    }
};

enum class KvType : int { f32, bf16, int8 };

// Bytes of the keys, or the values, of one head in a block.
static inline int64_t kv_head_bytes(KvType type, int64_t dim) {
    if (type == KvType::int8) return kBlock * (dim + 4);  // a scale per position
    return kBlock * dim * (type == KvType::bf16 ? 2 : 4);
}

struct KvView {
    uint8_t* base;          // this layer's part of block 0
    int64_t block_stride;   // bytes between blocks
    const int32_t* tables;  // [sequences, max_blocks]
    int64_t max_blocks;
    KvType type;
    int32_t kv_heads, head_dim;
    [[gnu::always_inline]] int64_t head_bytes() const { return kv_head_bytes(type, head_dim); }
};

struct Tokens {  // what a step runs on
    const int32_t* ids;
    const int32_t* positions;
    const int32_t* sequences;
};

struct Kernels {
    const char* name;
    uint8_t bias8;  // added to int8 weights when packing (128 where the ISA wants unsigned)
    // Output columns [16 * first, 16 * last) of one part, for `tokens` rows of x.
    // Grouped weights want x quantized. Neither x nor residual may overlap out: sums wait there.
    void (*matmul)(const MatmulPart& part, int64_t cols, Rows x, Rows out, Rows residual,
                   int64_t tokens, int64_t first, int64_t last);
    // Rows [first, last): out = x * weight / rms(x), and a residual if there is one; then, floats.
    void (*rms_norm)(Rows x, const float* weight, float eps, int64_t cols, Rows residual, Rows out,
                     bool quantized, int64_t first, int64_t last);
    // The same of x less its mean, without a residual.
    void (*layer_norm)(Rows x, const float* weight, float eps, int64_t cols, Rows out,
                       bool quantized, int64_t first, int64_t last);
    void (*quantize)(Rows x, int64_t cols, Rows out, bool quantized, int64_t first, int64_t last);
    // fn(gate) * up, or fn(gate) where `up` has no rows.
    void (*activate)(Activation fn, Rows gate, Rows up, int64_t cols, Rows out, bool quantized,
                     int64_t first, int64_t last);
    // cap * tanh(x / cap). Items are row * pieces + piece, of kCapPiece columns. Rows must hold
    // whole panels.
    void (*softcap)(Rows x, float cap, int64_t cols, Rows out, int64_t first, int64_t last);
    void (*add)(Rows a, Rows b, int64_t cols, Rows out, int64_t first, int64_t last);
    void (*embed)(const uint8_t* weight, Format format, int64_t cols, float scale,
                  const int32_t* ids, Rows out, int64_t first, int64_t last);
    // cos | sin of position * frequency, `half` of each.
    void (*rope_table)(const int32_t* positions, const float* frequencies, int64_t half, Rows out,
                       int64_t first, int64_t last);
    // Rotates q and k of qkv rows in place and stores k and v into the cache.
    void (*rope_store)(Rows qkv, Rows table, int64_t heads, const KvView& kv, const Tokens& tokens,
                       int64_t first, int64_t last);
    // Items are KV head * count + token, of `count` tokens.
    void (*attention)(Rows qkv, int64_t heads, float scale, const KvView& kv, const Tokens& tokens,
                      Rows out, int64_t count, int64_t first, int64_t last);
    // The same in two steps, for few sequences with long pasts. Items are those of chunk * KV heads
    // + KV head, each for all `count` tokens, then of token * heads + head.
    void (*attention_parts)(Rows qkv, int64_t heads, float scale, const KvView& kv,
                            const Tokens& tokens, Rows parts, int64_t count, int64_t chunks,
                            int64_t first, int64_t last);
    void (*attention_join)(Rows parts, int64_t heads, int64_t dim, const Tokens& tokens,
                           int64_t chunks, Rows out, int64_t first, int64_t last);
    // Sums `bytes` of memory: what a read of the weights can reach at best.
    uint64_t (*read)(const uint8_t* data, int64_t bytes);
    // Runs `rounds` of independent dot products; returns multiply and add operations done.
    double (*peak)(int64_t rounds, uint8_t* sink);
};

// Null where this build or this CPU lacks the ISA.
const Kernels* kernels_generic();
const Kernels* kernels_avx2();
const Kernels* kernels_avx512();
const Kernels* kernels_amx();
const Kernels* kernels_neon();

// The ISA named, else the one in PRONK_ISA, else the best the CPU has; throws
// std::invalid_argument when this build or this CPU lacks it.
const Kernels& select_kernels(const char* name);

// Interleaves rows [row0, row0 + rows) of a row-major checkpoint matrix into `packed`.
void pack_rows(Format format, uint8_t bias8, const uint8_t* source, int64_t row0, int64_t rows,
               int64_t cols, uint8_t* packed);

}  // namespace pronk
