#include "executor.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <thread>

namespace pronk {

namespace {

void require(bool ok, const char* what) {
    if (!ok) throw std::invalid_argument(what);
}

void require_range(const int32_t* values, int64_t count, int64_t limit, const char* what) {
    for (int64_t i = 0; i < count; ++i)
        if (values[i] < 0 || values[i] >= limit)
            throw std::invalid_argument(std::string(what) + " " + std::to_string(values[i]) +
                                        " is not in [0, " + std::to_string(limit) + ")");
}

// Bytes of the KV pool, of a shape whose products cannot overflow.
int64_t pool_bytes(const Limits& limits, const KvShape& kv) {
    const auto within = [](int64_t x, int64_t least, int64_t most) {
        return x >= least && x <= most;
    };
    constexpr int64_t most_rows = 1 << 20;
    require(within(limits.max_tokens, 1, most_rows) && within(limits.max_rows, 1, most_rows) &&
                within(limits.max_sequences, 1, most_rows) && within(limits.vocab, 1, kMaxSide) &&
                within(limits.max_blocks, 0, kMaxSide) && within(limits.num_blocks, 0, kMaxSide) &&
                within(kv.block_bytes, 0, kMaxSide) && kv.block_bytes % 64 == 0,
            "executor limits are out of range");
    return limits.num_blocks * kv.block_bytes;
}

}  // namespace

Executor::Executor(int threads, const std::string& isa, int64_t weight_bytes, int64_t arena_bytes,
                   const Limits& limits, const KvShape& kv)
    : kernels_(select_kernels(isa.c_str())),
      limits_(limits),
      kv_shape_(kv),
      weights_(weight_bytes),
      arena_(arena_bytes),
      kv_(pool_bytes(limits, kv)),
      team_(threads) {}

void Executor::populate() {
    const int64_t arena = arena_.pieces(), count = arena + kv_.pieces();
    std::atomic<int64_t> next{0};
    std::atomic<bool> full{false};
    team_.run([&] {
        for (int64_t i; (i = next.fetch_add(1)) < count;)
            if (!(i < arena ? arena_.populate(i) : kv_.populate(i - arena))) full = true;
    });
    if (full) throw std::bad_alloc();
}

Rows Executor::rows(const Ref& ref) const {
    return {ref.offset < 0 ? nullptr : arena_.data() + ref.offset, ref.stride};
}

void Executor::check(const Ref& ref, int64_t rows, int64_t row_bytes, const char* what) const {
    const bool aligned = ref.offset >= 0 && ref.offset % 64 == 0 && ref.stride % 4 == 0;
    if (!aligned || ref.stride < row_bytes || ref.stride > arena_.size() ||
        ref.offset > arena_.size() - (rows - 1) * ref.stride - row_bytes)
        throw std::invalid_argument(std::string(what) + " lies outside the arena");
}

const uint8_t* Executor::weight(int64_t offset, int64_t bytes) const {
    require(offset >= 0 && bytes >= 0 && offset % 64 == 0 && offset <= weights_.size() - bytes,
            "weight lies outside the weight region");
    return weights_.data() + offset;
}

void Executor::pack(Format format, int64_t offset, int64_t total_rows, int64_t cols, int64_t row0,
                    int64_t rows, const uint8_t* source, int64_t source_bytes) {
    require(cols > 0 && cols % traits(format).block == 0 && row0 >= 0 && rows >= 0 &&
                total_rows <= kMaxSide && rows <= total_rows && row0 <= total_rows - rows &&
                cols <= kMaxSide && source_bytes == rows * row_bytes(format, cols),
            "rows to pack do not fit their matrix");
    weight(offset, packed_bytes(format, total_rows, cols));
    uint8_t* target = weights_.data() + offset;
    // Whole panels per item: two threads never write one panel.
    const int64_t first = row0 / kPanel, count = (row0 + rows + kPanel - 1) / kPanel - first;
    std::atomic<int64_t> next{0};
    const std::function<void()> task = [&] {
        for (int64_t i; (i = next.fetch_add(8)) < count;) {
            const int64_t lo = std::max(row0, (first + i) * kPanel);
            const int64_t hi = std::min(row0 + rows, (first + std::min(i + 8, count)) * kPanel);
            pack_rows(format, kernels_.bias8, source + (lo - row0) * row_bytes(format, cols), lo,
                      hi - lo, cols, target);
        }
    };
    team_.run(task);
}

void Executor::write(int64_t offset, const float* values, int64_t count) {
    weight(offset, count * 4);
    std::memcpy(weights_.data() + offset, values, static_cast<size_t>(count) * 4);
}

void Executor::add(Op op) {
    const bool attends = op.kind == OpKind::rope_store || op.kind == OpKind::attention_parts ||
                         op.kind == OpKind::attention;
    require(attends || (op.cols >= 1 && op.cols <= kMaxSide), "row length is out of range");
    const bool planar = op.kind == OpKind::matmul || op.kind == OpKind::quantize ||
                        op.kind == OpKind::rms_norm || op.kind == OpKind::silu_mul;
    require(!op.quantized || planar, "an op that writes floats alone is asked to quantize");
    const int64_t count = op.head ? limits_.max_rows : limits_.max_tokens;
    const int64_t out_bytes = act_row_bytes(op.cols, op.quantized);
    // Quantized rows come in blocks.
    const int64_t act_count = op.quantized ? round_up(count, kActRows) : count;
    const int64_t dim = kv_shape_.head_dim, kv_heads = kv_shape_.heads;
    const Attend& attend = op.attend;
    require(op.grain >= 1 && op.grain <= kMaxSide, "grain is out of range");
    require(!op.head || !(attends || op.kind == OpKind::embed || op.kind == OpKind::rope_table),
            "an op that needs positions or ids belongs to the body");
    switch (op.kind) {
        case OpKind::embed:
            require(op.parts.size() == 1 && op.parts[0].rows >= limits_.vocab,
                    "embedding has fewer rows than the vocabulary");
            check(op.out, count, out_bytes, "embed output");
            break;
        case OpKind::rope_table: check(op.out, count, op.cols * 4, "rope table"); break;
        case OpKind::rms_norm:
        case OpKind::quantize:
            require(op.cols % kGroup == 0, "row length must be a multiple of 32");
            check(op.a, count, op.cols * 4, "input");
            check(op.out, act_count, out_bytes, "output");
            break;
        case OpKind::silu_mul:
            require(op.cols % kGroup == 0, "row length must be a multiple of 32");
            check(op.a, count, op.cols * 4, "gate");
            check(op.b, count, op.cols * 4, "up");
            check(op.out, act_count, out_bytes, "silu_mul output");
            break;
        case OpKind::add:
            require(op.cols % kGroup == 0, "row length must be a multiple of 32");
            check(op.a, count, op.cols * 4, "add input");
            check(op.b, count, op.cols * 4, "add input");
            check(op.out, count, out_bytes, "add output");
            break;
        case OpKind::gather:
            check(op.a, limits_.max_tokens, op.cols * 4, "gather input");
            check(op.out, count, op.cols * 4, "gather output");
            require(op.head, "gather belongs to the head");
            break;
        case OpKind::matmul:
            require(!op.parts.empty(), "matmul without weights");
            for (const MatmulPart& part : op.parts) {
                require(
                    is_grouped(part.format) == op.quantized &&
                        op.cols % traits(part.format).block == 0,
                    "grouped weights need quantized activations in whole blocks, others floats");
                check(op.a, act_count, out_bytes, "matmul input");
                const int64_t end = (part.column + round_up(part.rows, kPanel)) * 4;
                check(op.out, count, end, "matmul output");
                if (op.b.offset < 0) continue;
                check(op.b, count, end, "matmul residual");
                // Sums of a long row wait in the output before the residual is added.
                require(op.b.offset >= op.out.offset + (count - 1) * op.out.stride + end ||
                            op.out.offset >= op.b.offset + (count - 1) * op.b.stride + end,
                        "a matmul's residual overlaps its output");
            }
            break;
        case OpKind::rope_store:
        case OpKind::attention_parts:
        case OpKind::attention:
            require(op.heads > 0 && op.heads <= kMaxSide && kv_heads > 0 &&
                        op.heads % kv_heads == 0 && dim > 0 && dim % 16 == 0 && dim <= 256 &&
                        op.layer >= 0 && op.layer % 64 == 0 &&
                        op.layer <= kv_shape_.block_bytes -
                                        2 * kv_heads * kv_head_bytes(kv_shape_.type, dim),
                    "attention shape does not fit its KV block");
            check(op.a, count, (op.heads + 2 * kv_heads) * dim * 4, "qkv");
            if (op.kind == OpKind::rope_store) {
                if (op.b.offset >= 0) check(op.b, count, dim * 4, "rope table");
                require(op.norm.kind == HeadNorm::none || op.norm.kind == HeadNorm::l2 ||
                            (op.norm.q && op.norm.k),
                        "a norm of queries and keys has no weights");
                break;
            }
            check(op.b, count, op.heads * (dim + kPartTail) * 4, "attention parts");
            if (op.kind == OpKind::attention)
                check(op.out, count, op.heads * dim * 4, "attention output");
            require(attend.window.size >= 0 && attend.window.size <= kMaxSide &&
                        attend.window.sinks >= 0 && attend.window.sinks <= kMaxSide &&
                        attend.growth_span >= 1 && attend.softcap >= 0 &&
                        std::isfinite(attend.softcap) && std::isfinite(attend.growth),
                    "what attention sees is out of range");
            require(op.slopes.empty() || static_cast<int64_t>(op.slopes.size()) == op.heads,
                    "linear biases are not one a head");
            for (const float slope : op.slopes)
                require(std::isfinite(slope), "a linear bias is not finite");
            op.sight = sight(attend.window);
            break;
    }
    // The head follows the body: run() walks the one, head() the other.
    require(op.head || ops_.empty() || !ops_.back().head, "a body op follows a head op");
    ops_.push_back(std::move(op));
    times_.clear();  // one an op, or none
}

void Executor::run(const Batch& batch) {
    require(batch.tokens >= 1 && batch.tokens <= limits_.max_tokens, "too many tokens in a step");
    require(batch.sequence_count >= 1 && batch.sequence_count <= limits_.max_sequences,
            "too many sequences in a step");
    require(batch.table_width == limits_.max_blocks, "block tables have the wrong width");
    require_range(batch.ids, batch.tokens, limits_.vocab, "token id");
    require_range(batch.positions, batch.tokens, limits_.max_blocks * kBlock, "position");
    require_range(batch.sequences, batch.tokens, batch.sequence_count, "sequence index");
    for (int64_t t = 0; t < batch.tokens; ++t)  // where keys and values are stored
        require_range(
            batch.tables + batch.sequences[t] * limits_.max_blocks + batch.positions[t] / kBlock, 1,
            limits_.num_blocks, "KV block");
    for (Sight& sight : sights_) {
        check_tables(batch, sight.window);
        sight.chunks = chunks(batch, sight.window);
    }
    last_tokens_ = batch.tokens;
    walk({{batch.ids, batch.positions, batch.sequences},
          batch.tables,
          nullptr,
          batch.tokens,
          false});
}

// The blocks that tokens see are in the pool; entries of others may be anything.
void Executor::check_tables(const Batch& batch, const Window& window) const {
    for (int64_t t = 0; t < batch.tokens; ++t) {
        const int64_t position = batch.positions[t];
        const int32_t* table = batch.tables + batch.sequences[t] * limits_.max_blocks;
        const int64_t before = (window.before(position) + kBlock - 1) / kBlock;
        const int64_t first = window.first(position) / kBlock;
        require_range(table, before, limits_.num_blocks, "KV block");
        require_range(table + first, position / kBlock + 1 - first, limits_.num_blocks, "KV block");
    }
}

// Which of the sights has a window.
int64_t Executor::sight(const Window& window) {
    for (size_t i = 0; i < sights_.size(); ++i)
        if (sights_[i].window == window) return static_cast<int64_t>(i);
    sights_.push_back({window, 0});
    return static_cast<int64_t>(sights_.size()) - 1;
}

// Few sequences with long pasts leave threads idle unless a past is cut too.
int64_t Executor::chunks(const Batch& batch, const Window& window) const {
    int64_t runs = 1;  // of tokens that go through a past together
    for (int64_t t = 1; t < batch.tokens; ++t) runs += batch.sequences[t] != batch.sequences[t - 1];
    if (runs * kv_shape_.heads >= 4 * team_.size()) return 0;
    int64_t count = 0;
    for (int64_t t = 0; t < batch.tokens; ++t)
        count = std::max(count, window.chunks(batch.positions[t]));
    return count > 1 && batch.tokens * count <= limits_.max_tokens ? count : 0;
}

void Executor::head(const int32_t* rows, int64_t count) {
    require(count >= 1 && count <= limits_.max_rows, "too many logit rows at once");
    require_range(rows, count, last_tokens_, "logit row");
    walk({{}, nullptr, rows, count, true});
}

int64_t Executor::items(const Op& op, const Step& step) const {
    const auto chunks = [&] { return sights_[static_cast<size_t>(op.sight)].chunks; };
    if (op.kind == OpKind::attention_parts) return chunks() * kv_shape_.heads;
    if (op.kind == OpKind::attention) return step.count * (chunks() ? op.heads : kv_shape_.heads);
    if (op.kind != OpKind::matmul) return step.count;
    int64_t panels = 0;
    for (const MatmulPart& part : op.parts) panels += round_up(part.rows, kPanel) / kPanel;
    return panels;
}

void Executor::walk(const Step& step) {
    using Clock = std::chrono::steady_clock;
    const auto caller = std::this_thread::get_id();
    const std::function<void()> task = [&] {
        const bool timed = !times_.empty() && std::this_thread::get_id() == caller;
        Clock::time_point start, worked;
        for (const Op& op : ops_) {
            if (op.head != step.head) continue;
            const int64_t count = items(op, step);
            if (count == 0) continue;
            // No result depends on the split, so a small step may be cut finer.
            const int64_t grain = std::clamp<int64_t>(count / (4 * team_.size()), 1, op.grain);
            if (timed) start = Clock::now();
            for (int64_t i; (i = next_.fetch_add(grain, std::memory_order_relaxed)) < count;)
                apply(op, step, i, std::min(i + grain, count));
            if (timed) worked = Clock::now();
            // By then every thread has taken its last item.
            team_.barrier([&] { next_.store(0, std::memory_order_relaxed); });
            if (timed) {
                const auto end = Clock::now();
                Times& times = times_[static_cast<size_t>(&op - ops_.data())];
                ++times.calls;
                times.total_ns += std::chrono::nanoseconds(end - start).count();
                times.wait_ns += std::chrono::nanoseconds(end - worked).count();
            }
        }
    };
    team_.run(task);
}

void Executor::apply(const Op& op, const Step& step, int64_t first, int64_t last) const {
    const Rows a = rows(op.a), b = rows(op.b), out = rows(op.out);
    const KvView kv{kv_.data() + op.layer, kv_shape_.block_bytes, step.tables,
                    limits_.max_blocks,    kv_shape_.type,        kv_shape_.heads,
                    kv_shape_.head_dim};
    const Kernels& k = kernels_;
    switch (op.kind) {
        case OpKind::embed:
            return k.embed(op.parts[0].weight, op.parts[0].format, op.cols, step.tokens.ids, out,
                           first, last);
        case OpKind::rope_table:
            return k.rope_table(step.tokens.positions, op.vector, op.scalar, op.cols / 2, out,
                                first, last);
        case OpKind::rms_norm:
            return k.rms_norm(a, op.vector, op.scalar, op.cols, out, op.quantized, first, last);
        case OpKind::quantize: return k.quantize(a, op.cols, out, op.quantized, first, last);
        case OpKind::silu_mul: return k.silu_mul(a, b, op.cols, out, op.quantized, first, last);
        case OpKind::add: return k.add(a, b, op.cols, out, first, last);
        case OpKind::rope_store:
            return k.rope_store(a, b, op.heads, op.norm, kv, step.tokens, first, last);
        case OpKind::attention_parts:
        case OpKind::attention: {
            Attend attend = op.attend;
            attend.slopes = op.slopes.empty() ? nullptr : op.slopes.data();
            const int64_t chunks = sights_[static_cast<size_t>(op.sight)].chunks;
            if (op.kind == OpKind::attention_parts)
                return k.attention_parts(a, op.heads, attend, kv, step.tokens, b, step.count,
                                         chunks, first, last);
            if (chunks)
                return k.attention_join(b, op.heads, kv.head_dim, attend.window, step.tokens,
                                        chunks, out, first, last);
            return k.attention(a, op.heads, attend, kv, step.tokens, out, step.count, first, last);
        }
        case OpKind::gather:
            for (int64_t i = first; i < last; ++i)
                std::memcpy(out.row<uint8_t>(i), a.row<uint8_t>(step.rows[i]),
                            static_cast<size_t>(op.cols) * 4);
            return;
        case OpKind::matmul:
            for (const MatmulPart& part : op.parts) {
                const int64_t panels = round_up(part.rows, kPanel) / kPanel;
                if (first < panels && last > 0)
                    k.matmul(part, op.cols, a, out, b, step.count, std::max<int64_t>(first, 0),
                             std::min(last, panels));
                first -= panels;
                last -= panels;
            }
            return;
    }
}

}  // namespace pronk
