// The kernels an ISA provides. Each works on a half-open range of its own items, so that
// the executor can hand the ranges to any thread; no result depends on how it is split.
#pragma once
#include <cstdint>

#include "formats.h"

namespace pronk {

struct MatmulPart {
    const uint8_t* weight;  // packed
    Format format;
    int32_t rows;         // outputs
    int32_t column;       // first output column
    const float* bias;    // [rows] or null
    float scale = 1;      // of the sums and the bias
    bool sparse = false;  // groups of x are often all zero: those of a lone token need no weights
};

// What an MLP's activations become, and how they are counted.
struct Sparsity {
    float threshold = 0;         // those of a lesser magnitude are zero
    uint64_t* counts = nullptr;  // [kActivity] or null, for any thread to add to
};
// Magnitudes by the upper bits of a float, so that bin 0 is zero (and what is no normal number);
// then groups of 32, and those of them that are zero throughout.
constexpr int kMagnitudeShift = 19, kMagnitudes = 1 << (31 - kMagnitudeShift);
constexpr int kActivity = kMagnitudes + 2;

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

// int4_plain is int4 without the rotation: to measure what it is worth.
enum class KvType : int { f32, bf16, int8, int4, int4_plain };

// Elements of an int4 row that share a scale.
static inline int64_t kv_group(int64_t dim) { return dim % 32 ? 16 : 32; }

static inline bool kv_expanded(KvType type) { return type >= KvType::int8; }

// Bytes of the keys, or the values, of one head in a block.
static inline int64_t kv_head_bytes(KvType type, int64_t dim) {
    if (type == KvType::int8) return kBlock * (dim + 4);  // a scale per position
    if (kv_expanded(type)) return kBlock * (dim / 2 + 2 * dim / kv_group(dim));
    return kBlock * dim * (type == KvType::bf16 ? 2 : 4);
}

// A chunk of a past whose blocks were expanded: keys and values of one head, in bf16.
constexpr int kMaxHeadDim = 256;
static inline int64_t past_bytes(int64_t dim) { return 2 * kChunk * dim * 2; }
// Where this thread has its own: what an executor lent it for a step, so that it is planned for and
// there before a token waits; else memory of the thread's, for kernels that are called alone.
void lend_past_memory(uint16_t* memory);
uint16_t* past_memory();

struct KvView {
    uint8_t* base;          // this layer's first plane: kv.h tells how they lie
    int64_t plane;          // bytes of one
    const int32_t* tables;  // [sequences, max_blocks]
    int64_t max_blocks;
    KvType type;
    int32_t kv_heads, head_dim;
    [[gnu::always_inline]] int64_t head_bytes() const { return kv_head_bytes(type, head_dim); }
    [[gnu::always_inline]] bool rotated() const { return type == KvType::int4; }
};

constexpr int64_t kMaxRouted = 64;  // most experts of a token

struct Routing {  // how a token's experts are chosen
    int64_t experts, choices;
    bool softmax, normalize;
    double threshold;  // below 1: only as many as make up this share of all scores...
    int64_t least;     // ... and so many at least
};

struct Tokens {  // what a step runs on
    const int32_t* ids;
    const int32_t* positions;
    const int32_t* sequences;
};

// Which earlier positions a token attends to. Those it does not are neither read nor multiplied,
// by whole blocks: their entries of the block table may be anything.
struct Window {
    int32_t size = 0;      // the last so many, its own included; 0: all
    bool chunked = false;  // instead: those of its own chunk, of so many from a multiple on
    int32_t sinks = 0;     // and so many from the first on

    // The first position of those that reach up to the token itself.
    [[gnu::always_inline]] int64_t first(int64_t position) const {
        if (size == 0) return 0;
        if (chunked) return position / size * size;
        return position < size ? 0 : position - size + 1;
    }
    // How many before that are seen, from the first of the sequence on.
    [[gnu::always_inline]] int64_t before(int64_t position) const {
        const int64_t from = first(position);
        return sinks < from ? sinks : from;
    }
    // The kChunk positions of a past are one of its chunks: how many chunks a token sees, and the
    // place of the one that is `index`th among them.
    [[gnu::always_inline]] int64_t chunks(int64_t position) const {
        return position / kChunk - skipped(position) + 1;
    }
    [[gnu::always_inline]] int64_t chunk(int64_t position, int64_t index) const {
        return index * kChunk < before(position) ? index : index + skipped(position);
    }

  private:
    [[gnu::always_inline]] int64_t skipped(int64_t position) const {
        const int64_t sunk = (before(position) + kChunk - 1) / kChunk;
        const int64_t gap = first(position) / kChunk - sunk;
        return gap > 0 ? gap : 0;
    }
};

// How a token attends.
struct Attend {
    float scale;                    // of q @ k
    Window window = {};             // what it sees
    float softcap = 0;              // scores become cap * tanh(score / cap); 0: they do not
    const float* slopes = nullptr;  // [heads] of linear biases by distance, or null
    float growth = 0;  // queries are multiplied by 1 + growth * log(1 + (position + 1) / span)
    int32_t growth_span = 1;
    int32_t shares = 1;  // that the query heads of a KV head are taken in, each by itself
};

// The norms of queries and keys: with weights before they are turned, without them after.
struct HeadNorm {
    enum Kind : int { none, head, full, l2 } kind = none;
    const float *q = nullptr, *k = nullptr;  // weights: [dim] of a head, or of all heads
    float eps = 0;
    const float* center = nullptr;  // [dim] of all KV heads, taken from keys that were rotated
};

// What finding the largest logits of a row needs beside them (bounded.h): a row of floats.
struct BoundPlan {
    float* threshold;  // the least logit that counts
    float* panel;      // [kPanel] logits of one panel
    float* reach;      // [groups]
    int32_t* order;    // [groups]
    float* peaks;      // of each panel the largest logit, as the upper plane alone has it
    BoundPlan(Rows rows, int64_t t, int64_t cols) {
        threshold = rows.row<float>(t), panel = threshold + kPanel, reach = panel + kPanel;
        order = reinterpret_cast<int32_t*>(reach + cols / kGroup);
        peaks = reach + 2 * (cols / kGroup);
    }
    static int64_t floats(int64_t rows, int64_t cols) {
        return 2 * kPanel + 2 * (cols / kGroup) + round_up(rows, kPanel) / kPanel;
    }
};

struct Kernels {
    const char* name;
    uint8_t bias8;  // added to int8 weights when packing (128 where the ISA wants unsigned)
    // Output columns [16 * first, 16 * last) of one part, for `tokens` rows of x.
    // Grouped weights want x quantized. Neither x nor residual may overlap out: sums wait there.
    void (*matmul)(const MatmulPart& part, int64_t cols, Rows x, Precision of_x, Rows out,
                   Rows residual, int64_t tokens, int64_t first, int64_t last);
    // Rows [first, last): out = x * weight / rms(x), and a residual if there is one; then, floats.
    void (*rms_norm)(Rows x, const float* weight, float eps, int64_t cols, Rows residual, Rows out,
                     Precision to, int64_t first, int64_t last);
    // The same of x less its mean, without a residual.
    void (*layer_norm)(Rows x, const float* weight, float eps, int64_t cols, Rows out, Precision to,
                       int64_t first, int64_t last);
    void (*quantize)(Rows x, int64_t cols, Rows out, Precision to, int64_t first, int64_t last);
    // fn(gate) * up, or fn(gate) where `up` has no rows; then what `sparsity` says.
    void (*activate)(Activation fn, Rows gate, Rows up, int64_t cols, Rows out, Precision to,
                     const Sparsity& sparsity, int64_t first, int64_t last);
    // cap * tanh(x / cap). Items are row * pieces + piece, of kCapPiece columns. Rows must hold
    // whole panels.
    void (*softcap)(Rows x, float cap, int64_t cols, Rows out, int64_t first, int64_t last);
    void (*add)(Rows a, Rows b, int64_t cols, Rows out, int64_t first, int64_t last);
    void (*embed)(const MatmulPart& table, int64_t cols, float scale, const int32_t* ids, Rows out,
                  int64_t first, int64_t last);
    // cos | sin of position * frequency, `half` of each, times `scale`.
    void (*rope_table)(const int32_t* positions, const float* frequencies, float scale,
                       int64_t half, Rows out, int64_t first, int64_t last);
    // Norms and rotates q and k of qkv rows in place (rotates them where there is a table) and
    // stores k and v into the cache.
    void (*rope_store)(Rows qkv, Rows table, int64_t heads, const HeadNorm& norm, const KvView& kv,
                       const Tokens& tokens, int64_t first, int64_t last);
    // Items are share of a KV head's queries * count + token, of `count` tokens.
    void (*attention)(Rows qkv, int64_t heads, const Attend& attend, const KvView& kv,
                      const Tokens& tokens, Rows out, int64_t count, int64_t first, int64_t last);
    // The same in two steps, for few sequences with long pasts: `chunks` is the most that a token
    // sees. Items are those of place among these * KV heads + KV head, each for all `count` tokens,
    // then of token * heads + head.
    void (*attention_parts)(Rows qkv, int64_t heads, const Attend& attend, const KvView& kv,
                            const Tokens& tokens, Rows parts, int64_t count, int64_t chunks,
                            int64_t first, int64_t last);
    void (*attention_join)(Rows parts, int64_t heads, const Window& window, const KvView& kv,
                           const Tokens& tokens, int64_t chunks, Rows out, int64_t first,
                           int64_t last);
    // Experts of tokens [first, last) by their logits: out gets their ids, the likeliest first and
    // the lower id of equals (-1: no more), then their weights.
    void (*route)(Rows logits, const Routing& how, Rows out, int64_t first, int64_t last);
    void (*scale)(Rows x, float factor, int64_t cols, int64_t first, int64_t last);
    // One token: out = residual (or none) + factor * the sum of weighted rows of y, in order.
    void (*combine)(Rows y, const int32_t* rows, const float* weights, int64_t count, float factor,
                    const float* residual, int64_t cols, float* out);
    // The steps to the largest logits (bounded.h), on q8_planes: rows [first, last) of x, then
    // panels: bounds of their rows, for `tokens` rows of x, into out.
    void (*plan_bounds)(Rows x, Precision of_x, int64_t cols, Rows plan, int64_t first,
                        int64_t last);
    void (*bound)(const MatmulPart& part, int64_t cols, Rows x, Precision of_x, Rows plan, Rows out,
                  int64_t tokens, int64_t first, int64_t last);
    // The product of row t of x with panel p alone, the bits that `matmul` gives.
    void (*exact_panel)(const MatmulPart& part, int64_t cols, Rows x, Precision of_x, Rows out,
                        int64_t t, int64_t p);
    // Bounds in out become logits where they may reach the thresholds, else minus infinity. Gives
    // the bytes read of the lower plane.
    int64_t (*refine)(const MatmulPart& part, int64_t cols, Rows x, Precision of_x, Rows plan,
                      Rows out, int64_t tokens, int64_t first, int64_t last);
    // Sums `bytes` of memory: what a read of the weights can reach at best.
    uint64_t (*read)(const uint8_t* data, int64_t bytes);
    // Runs `rounds` of independent dot products; returns multiply and add operations done.
    double (*peak)(int64_t rounds, uint8_t* sink);
};

// Null where this build or this CPU lacks the ISA.
const Kernels* kernels_generic();
const Kernels* kernels_avx2();
const Kernels* kernels_avx512();
const Kernels* kernels_avx512_bf16();
const Kernels* kernels_amx();
const Kernels* kernels_neon();

// The ISA named, else the one in PRONK_ISA, else the best the CPU has; throws
// std::invalid_argument when this build or this CPU lacks it.
const Kernels& select_kernels(const char* name);

// Interleaves rows [row0, row0 + rows) of a row-major checkpoint matrix of `total` rows into
// `packed`.
void pack_rows(Format format, uint8_t bias8, const uint8_t* source, int64_t row0, int64_t rows,
               int64_t total, int64_t cols, uint8_t* packed);

}  // namespace pronk
