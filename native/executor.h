// Runs a Program: a list of ops over one arena, walked by all threads with a barrier between ops.
#pragma once
#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "experts.h"
#include "kernels/kernels.h"
#include "region.h"
#include "residency.h"
#include "team.h"

namespace pronk {

enum class OpKind {
    embed,
    rope_table,
    rms_norm,
    layer_norm,
    quantize,
    matmul,
    rope_store,
    attention_parts,
    attention,
    activate,
    add,
    gather,
    softcap,
    plan_bounds,  // of a head whose largest logits alone are wanted (bounded.cpp)
    bound,
    lead,
    refine,
    route,  // and the table of rows for each expert
    expert_read,
    expert_gather,
    expert_matmul,
    expert_activate,
    combine
};

struct Ref {  // a matrix in the arena: offset and row stride in bytes; offset -1 is none
    int64_t offset = -1;
    int64_t stride = 0;
};

struct Op {
    OpKind kind;
    bool head = false;  // runs on the rows whose logits are asked for, not on every token
    Ref a, b, out;
    int64_t cols = 0;
    float scalar = 0;  // epsilon, the cap, or what the angles' table is multiplied by
    float scale = 1;   // of an embedding; a matmul's is in its parts
    Activation fn = Activation::silu;
    float threshold = 0;  // of an activation: what is less becomes zero; `layer` counts them
    // A matmul of gate and up whose activation is relu: panels of up that a lone token's gates
    // close are not computed.
    bool gates = false;
    Precision precision = Precision::f32;  // of a matmul's input, else of the output
    int64_t group = 0;                     // the layer's KV group
    int64_t layer = 0;                     // offset of the layer within a block of its group
    int64_t heads = 0;
    const float* vector = nullptr;  // norm weight, rope frequencies
    Attend attend = {};             // of attention; its slopes are those below
    std::vector<float> slopes;      // [heads], or none
    HeadNorm norm = {};             // of rope_store
    std::vector<MatmulPart> parts;
    int64_t grain = 1;  // most items a thread takes at once
    // Experts: the table that `route` fills, what it wrote, and their sizes; `layer` counts them.
    Ref plan, routes;
    int64_t experts = 0, choices = 0;
    int64_t set = 0;            // of experts that the layer chooses from
    bool scales_input = false;  // an expert's weight multiplies gate and up, not the output
    Routing routing{};
    // Of a head: whether it runs only if all logits are wanted, or only if the largest are.
    enum class When : int { always, all, largest } when = When::always;
    // Whoever has taken rows of the op before runs this one on them too, without a barrier.
    bool chained = false;
};

// A matrix as it lies in a file, in rows of its format; a single row of f32 is a vector.
struct Stored {
    Format format;
    int64_t offset;  // where it belongs in the weight region
    int64_t rows, cols;
    int fd;
    int64_t at;     // its first byte in the file
    int64_t pairs;  // rows of a head whose two halves alternate in the file; 0: rows as they are
};

// Which logits of a row count: those that may be among so many largest (0: any number), and within
// `span` of the largest.
struct Keep {
    int32_t count;
    float span;
};
constexpr int32_t kMostKept = 64;  // of Keep's count
// Beyond so many rows, all logits are as fast: arithmetic is what takes the time then.
constexpr int64_t kBoundedRows = 4;

struct Limits {
    int64_t max_tokens, max_rows, max_sequences, max_blocks, vocab;
};

// Layers whose tokens see the same positions; their blocks are of one pool.
struct KvGroup {
    int64_t block_bytes;  // of one block, all layers of the group
    int64_t num_blocks;
    Window window;
};

struct KvShape {
    int32_t heads, head_dim;
    KvType type;
    std::vector<KvGroup> groups;
};

// A row of bytes in each of some planes.
struct KvRows {
    uint8_t* data;
    int64_t count, bytes, stride;
};

class Executor {
  public:
    Executor(int threads, const std::string& isa, int64_t weight_bytes, int64_t arena_bytes,
             const Limits& limits, const KvShape& kv);

    const char* isa() const { return kernels_.name; }
    int threads() const { return team_.size(); }
    int64_t weight_bytes() const { return weights_.size(); }
    int64_t arena_bytes() const { return arena_.size(); }
    int64_t kv_bytes() const { return kv_.size(); }
    int64_t past_bytes() const { return pasts_.size(); }
    const KvShape& kv_shape() const { return kv_shape_; }
    // The bytes of a block of a group's pool, as kv.h has them; checked. No step may run meanwhile.
    KvRows kv_block(int64_t group, int64_t block);

    // Makes the KV pool and the arena resident; until then they are where they were used.
    void populate();

    // Weights: offsets are into the weight region; checked.
    void pack(Format format, int64_t offset, int64_t total_rows, int64_t cols, int64_t row0,
              int64_t rows, const uint8_t* source, int64_t source_bytes);
    void write(int64_t offset, const float* values, int64_t count);
    const uint8_t* weight(int64_t offset, int64_t bytes) const;

    // Reads and packs on all threads (load.cpp). Gives the index of a matrix that could not be
    // read, or -1; `packing` gets the processor seconds that packing took, of all threads.
    int64_t load(const std::vector<Stored>& stored, double& packing);
    // Packed weights to and from a file, in parts that have a sum each.
    struct Kept {
        int64_t offset, at, bytes;  // in the weight region, and in the file
    };
    int save(int fd, const std::vector<Kept>& parts, std::vector<uint64_t>& sums) const;  // errno
    // False, and no weights at all, if the file is not what `save` wrote.
    bool restore(int fd, const std::vector<Kept>& parts, const std::vector<uint64_t>& sums);

    // Experts lie in slots from `offset` on, and in a file that is opened later (see Residency).
    void keep_experts(int64_t offset, int64_t slot_bytes, int64_t slots, int64_t sets,
                      int64_t experts);
    Residency* residency() const { return residency_.get(); }

    void add(Op op);  // checks every reference against the arena
    // Chains the last op to the one before it. Both must go row by row, and nothing that the chain
    // writes may lie where one of its ops reads another row.
    void chain();

    struct Batch {
        const int32_t *ids, *positions, *sequences;
        int64_t tokens;
        // [groups, sequences, max_blocks]; only what some token sees need be a block.
        const int32_t* tables;
        int64_t group_count, sequence_count, table_width;
    };
    // Runs the body on all tokens; the final hidden states stay for head().
    void run(const Batch& batch);
    // Runs the head on the given token rows of the last run(). With `keep`, one a row, logits that
    // do not count may be minus infinity; all others are the same bits as without.
    void head(const int32_t* rows, int64_t count, const Keep* keep = nullptr);
    // Bytes that such calls read of the lower plane of the head's weights, of how many they could.
    struct Planes {
        int64_t calls = 0, read = 0, bytes = 0;
    };
    Planes planes() const { return {plane_calls_, plane_read_, plane_bytes_}; }
    const uint8_t* arena() const { return arena_.data(); }

    // What the calling thread saw of one op: its whole time, and its wait in the barrier after it.
    struct Times {
        int64_t calls = 0, total_ns = 0, wait_ns = 0;
    };
    // From now on, times are kept from zero, or no longer.
    void profile(bool on) { times_.assign(on ? ops_.size() : 0, {}); }
    const std::vector<Times>& times() const { return times_; }
    // How often each expert was chosen, [route ops, experts], and by how many tokens.
    const std::vector<uint64_t>& expert_counts() const { return expert_counts_; }
    int64_t experts() const { return moe_experts_; }
    uint64_t routed_tokens() const { return routed_tokens_; }
    void reset_experts();
    // What the activations of MLPs become, one threshold an op.
    void set_thresholds(const std::vector<float>& thresholds);
    // From now on, their magnitudes are counted from zero (kernels.h), or no longer.
    void watch(bool on);
    int64_t activations() const { return activations_; }
    const uint64_t* activity() const { return activity_.get(); }  // [activations, kActivity]
    int64_t op_count() const { return static_cast<int64_t>(ops_.size()); }

  private:
    struct Step {
        Tokens tokens;
        const int32_t* tables;
        const int32_t* rows;
        int64_t count;
        bool head;
        int64_t group_tables;  // entries of the tables of a group
        const Keep* keep = nullptr;
    };
    void walk(const Step& step);
    int64_t chunks(const Batch& batch, const Window& window) const;
    int64_t items(const Op& op, const Step& step) const;
    // Shares of a KV head's queries: more than one where all threads have work only so.
    int32_t shares(const Op& op, const Step& step) const;
    bool runs(const Op& op, const Step& step) const;
    void apply(const Op& op, const Step& step, int64_t first, int64_t last) const;
    // bounded.cpp
    void check_bounded(const Op& op);
    void apply_bounded(const Op& op, const Step& step, int64_t first, int64_t last) const;
    void lead(const Op& op, const Step& step, int64_t row) const;
    // experts.cpp
    void check_experts(const Op& op);
    int64_t expert_items(const Op& op, const Step& step) const;
    void apply_experts(const Op& op, const Step& step, int64_t first, int64_t last) const;
    void run_dispatch(const Op& op, const Step& step);
    PlanEntry* plan(const Op& op) const;
    void check_tables(const Batch& batch) const;
    KvView view(const Op& op, const Step& step) const;
    void gated_matmul(const Op& op, int64_t first, int64_t last) const;
    Rows rows(const Ref& ref) const;
    void check(const Ref& ref, int64_t rows, int64_t row_bytes, const char* what) const;

    const Kernels& kernels_;
    Limits limits_;
    KvShape kv_shape_;
    std::vector<int64_t> pools_;           // where each group's pool begins
    Region weights_, arena_, kv_, pasts_;  // pasts: of each thread (past_memory)
    std::vector<Op> ops_;
    std::vector<int64_t> chunks_;  // a token's past in parts of so many, by group; 0: in one go
    std::vector<Times> times_;     // one an op, or empty
    int64_t last_tokens_ = 0;
    int64_t plane_bytes_ = 0, plane_calls_ = 0;
    mutable std::atomic<int64_t> plane_read_{0};
    int64_t moe_experts_ = 0;  // of each layer that has any
    std::vector<int32_t> scratch_;
    std::vector<uint64_t> expert_counts_;
    uint64_t routed_tokens_ = 0;
    std::unique_ptr<Residency> residency_;
    int64_t activations_ = 0;
    std::unique_ptr<uint64_t[]> activity_;  // while they are watched
    size_t resume_ = 0;                     // the op to go on with; written in a barrier
    struct alignas(64) Share {
        std::atomic<int64_t> taken{0};  // of the items of an op that are a thread's
    };
    std::vector<Share> shares_;  // one a thread
    Team team_;
};

}  // namespace pronk
