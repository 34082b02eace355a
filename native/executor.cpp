#include "executor.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <thread>
#include <utility>

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

void require_threshold(float threshold) {
    require(std::isfinite(threshold) && threshold >= 0, "a threshold must be 0 or more");
}

// Bytes of the KV pools, of shapes whose products and sum cannot overflow.
int64_t pool_bytes(const Limits& limits, const KvShape& kv) {
    const auto within = [](int64_t x, int64_t least, int64_t most) {
        return x >= least && x <= most;
    };
    constexpr int64_t most_rows = 1 << 20;
    require(within(limits.max_tokens, 1, most_rows) && within(limits.max_rows, 1, most_rows) &&
                within(limits.max_sequences, 1, most_rows) && within(limits.vocab, 1, kMaxSide) &&
                within(limits.max_blocks, 0, kMaxSide) && !kv.groups.empty(),
            "executor limits are out of range");
    int64_t total = 0;
    for (const KvGroup& group : kv.groups) {
        require(within(group.num_blocks, 0, kMaxSide) && within(group.block_bytes, 0, kMaxSide) &&
                    group.block_bytes % 64 == 0 && within(group.window.size, 0, kMaxSide) &&
                    within(group.window.sinks, 0, kMaxSide) &&
                    (group.window.size || !group.window.chunked),
                "a KV group is out of range");
        const int64_t bytes = group.num_blocks * group.block_bytes;
        require(bytes <= INT64_MAX - total, "KV groups are too large");
        total += bytes;
    }
    return total;
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
      team_(threads) {
    int64_t at = 0;
    for (const KvGroup& group : kv_shape_.groups) {
        pools_.push_back(at);
        chunks_.push_back(0);
        at += group.num_blocks * group.block_bytes;
    }
}

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

KvRows Executor::kv_block(int64_t group, int64_t block) {
    require(group >= 0 && group < static_cast<int64_t>(pools_.size()), "no such KV group");
    const KvGroup& own = kv_shape_.groups[static_cast<size_t>(group)];
    require(block >= 0 && block < own.num_blocks, "no such KV block");
    const int64_t size = kv_head_bytes(kv_shape_.type, kv_shape_.head_dim);
    require(size > 0, "heads have no dimensions");
    return {kv_.data() + pools_[static_cast<size_t>(group)] + block * size, own.block_bytes / size,
            size, own.num_blocks * size};
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
                      hi - lo, total_rows, cols, target);
        }
    };
    team_.run(task);
}

void Executor::write(int64_t offset, const float* values, int64_t count) {
    weight(offset, count * 4);
    std::memcpy(weights_.data() + offset, values, static_cast<size_t>(count) * 4);
}

void Executor::add(Op op) {
    if (op.kind >= OpKind::route) {
        require(op.grain >= 1 && op.grain <= kMaxSide, "grain is out of range");
        require(ops_.empty() || !ops_.back().head, "a body op follows a head op");
        check_experts(op);
        const bool reads = op.kind == OpKind::route && residency_;
        if (op.kind == OpKind::route)
            op.layer = static_cast<int64_t>(expert_counts_.size()) / op.experts - 1;
        ops_.push_back(op);
        if (reads) {
            op.kind = OpKind::expert_read, op.grain = 1;
            ops_.push_back(std::move(op));
        }
        times_.clear();
        return;
    }
    const bool attends = op.kind == OpKind::rope_store || op.kind == OpKind::attention_parts ||
                         op.kind == OpKind::attention;
    require(attends || (op.cols >= 1 && op.cols <= kMaxSide), "row length is out of range");
    const bool planar =
        op.kind == OpKind::matmul || op.kind == OpKind::quantize || op.kind == OpKind::rms_norm ||
        op.kind == OpKind::layer_norm || op.kind == OpKind::activate || op.kind == OpKind::bound ||
        op.kind == OpKind::plan_bounds || op.kind == OpKind::lead || op.kind == OpKind::refine;
    require(!is_quantized(op.precision) || planar,
            "an op that writes floats alone is asked to quantize");
    const int64_t count = op.head ? limits_.max_rows : limits_.max_tokens;
    const int64_t out_bytes = act_row_bytes(op.cols, op.precision);
    // Quantized rows come in blocks.
    const int64_t act_count = is_quantized(op.precision) ? round_up(count, kActRows) : count;
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
            if (op.b.offset >= 0) {
                require(!is_quantized(op.precision), "a norm with a residual writes floats");
                check(op.b, count, op.cols * 4, "norm residual");
            }
            [[fallthrough]];
        case OpKind::layer_norm:
        case OpKind::quantize:
            require(op.cols % kGroup == 0, "row length must be a multiple of 32");
            check(op.a, count, op.cols * 4, "input");
            check(op.out, act_count, out_bytes, "output");
            break;
        case OpKind::activate:
            require(op.cols % kGroup == 0, "row length must be a multiple of 32");
            check(op.a, count, op.cols * 4, "gate");
            if (op.b.offset >= 0) check(op.b, count, op.cols * 4, "up");
            check(op.out, act_count, out_bytes, "activation's output");
            require_threshold(op.threshold);
            op.layer = activations_++;
            activity_.reset();  // one an op, or none
            break;
        case OpKind::softcap:
            require(op.scalar > 0, "a cap must be positive");
            check(op.a, count, round_up(op.cols, kPanel) * 4, "softcap input");
            check(op.out, count, round_up(op.cols, kPanel) * 4, "softcap output");
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
            require(!op.gates || (op.parts.size() == 2 && op.parts[0].rows == op.parts[1].rows &&
                                  op.parts[0].rows % kPanel == 0 && op.b.offset < 0 && !op.head),
                    "a gate and what it gates are not two parts of one size");
            for (const MatmulPart& part : op.parts) {
                require(
                    is_grouped(part.format) == is_quantized(op.precision) &&
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
                        op.group >= 0 && op.group < static_cast<int64_t>(pools_.size()) &&
                        op.layer >= 0 && op.layer % 64 == 0 &&
                        op.layer <= kv_shape_.groups[static_cast<size_t>(op.group)].block_bytes -
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
            require(attend.growth_span >= 1 && attend.softcap >= 0 &&
                        std::isfinite(attend.softcap) && std::isfinite(attend.growth),
                    "what attention sees is out of range");
            require(op.slopes.empty() || static_cast<int64_t>(op.slopes.size()) == op.heads,
                    "linear biases are not one a head");
            for (const float slope : op.slopes)
                require(std::isfinite(slope), "a linear bias is not finite");
            op.attend.window = kv_shape_.groups[static_cast<size_t>(op.group)].window;
            break;
        case OpKind::plan_bounds:
        case OpKind::bound:
        case OpKind::lead:
        case OpKind::refine: check_bounded(op); break;
        default: break;  // experts were checked above
    }
    // The head follows the body: run() walks the one, head() the other.
    require(op.head || ops_.empty() || !ops_.back().head, "a body op follows a head op");
    ops_.push_back(std::move(op));
    times_.clear();  // one an op, or none
}

void Executor::chain() {
    const auto by_row = [](const Op& op) {
        switch (op.kind) {
            case OpKind::embed:
            case OpKind::rope_table:
            case OpKind::rms_norm:
            case OpKind::layer_norm:
            case OpKind::quantize:
            case OpKind::activate:
            case OpKind::add:
            case OpKind::gather: return true;
            default: return false;
        }
    };
    const size_t count = ops_.size();
    require(count >= 2 && ops_[count - 1].head == ops_[count - 2].head && by_row(ops_[count - 1]) &&
                by_row(ops_[count - 2]),
            "an op is chained to one that it must wait for");
    ops_.back().chained = true;
}

void Executor::run(const Batch& batch) {
    require(batch.tokens >= 1 && batch.tokens <= limits_.max_tokens, "too many tokens in a step");
    require(batch.sequence_count >= 1 && batch.sequence_count <= limits_.max_sequences,
            "too many sequences in a step");
    require(batch.group_count == static_cast<int64_t>(pools_.size()) &&
                batch.table_width == limits_.max_blocks,
            "block tables have the wrong shape");
    require_range(batch.ids, batch.tokens, limits_.vocab, "token id");
    require_range(batch.positions, batch.tokens, limits_.max_blocks * kBlock, "position");
    require_range(batch.sequences, batch.tokens, batch.sequence_count, "sequence index");
    check_tables(batch);
    for (size_t i = 0; i < chunks_.size(); ++i)
        chunks_[i] = chunks(batch, kv_shape_.groups[i].window);
    require(!residency_ || residency_->opened(), "the file of experts is not open");
    last_tokens_ = batch.tokens;
    walk({{batch.ids, batch.positions, batch.sequences},
          batch.tables,
          nullptr,
          batch.tokens,
          false,
          batch.sequence_count * limits_.max_blocks});
    if (residency_) residency_->check();
}

// What tokens that go through a past together see, from the first that one sees to the last, and
// the sinks must be blocks of the group's pool; nothing else is read.
void Executor::check_tables(const Batch& batch) const {
    const int32_t *positions = batch.positions, *sequences = batch.sequences;
    const int32_t* tables = batch.tables;
    for (const KvGroup& group : kv_shape_.groups) {
        for (int64_t t = 0, end; t < batch.tokens; t = end) {
            for (end = t + 1; end < batch.tokens && sequences[end] == sequences[t] &&
                              positions[end] > positions[end - 1];)
                ++end;
            const int32_t* blocks = tables + sequences[t] * limits_.max_blocks;
            const int64_t from = group.window.first(positions[t]) / kBlock;
            const int64_t sinks = round_up(group.window.before(positions[t]), kBlock) / kBlock;
            require_range(blocks, sinks, group.num_blocks, "KV block");
            require_range(blocks + from, positions[end - 1] / kBlock + 1 - from, group.num_blocks,
                          "KV block");
        }
        tables += batch.sequence_count * limits_.max_blocks;
    }
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

void Executor::head(const int32_t* rows, int64_t count, const Keep* keep) {
    require(count >= 1 && count <= limits_.max_rows, "too many logit rows at once");
    require_range(rows, count, last_tokens_, "logit row");
    if (!plane_bytes_ || count > kBoundedRows) keep = nullptr;
    for (int64_t i = 0; keep && i < count; ++i)
        require(keep[i].count >= 0 && keep[i].count <= kMostKept && keep[i].span >= 0,
                "what is kept of a row is out of range");
    plane_calls_ += keep != nullptr;
    walk({{}, nullptr, rows, count, true, 0, keep});
}

bool Executor::runs(const Op& op, const Step& step) const {
    return op.head == step.head && (op.when == Op::When::always ||
                                    (op.when == Op::When::largest) == (step.keep != nullptr));
}

int64_t Executor::items(const Op& op, const Step& step) const {
    const auto chunks = [&] { return chunks_[static_cast<size_t>(op.group)]; };
    if (op.kind == OpKind::attention_parts) return chunks() * kv_shape_.heads;
    if (op.kind == OpKind::attention)
        return step.count * (chunks() ? op.heads : kv_shape_.heads * shares(op, step));
    if (op.kind >= OpKind::route) return expert_items(op, step);
    if (op.kind == OpKind::softcap) return step.count * ((op.cols + kCapPiece - 1) / kCapPiece);
    const bool by_panel =
        op.kind == OpKind::matmul || op.kind == OpKind::bound || op.kind == OpKind::refine;
    if (!by_panel) return step.count;
    int64_t panels = 0;
    if (op.gates && step.count == 1) return op.parts[0].rows / kPanel;
    for (const MatmulPart& part : op.parts) panels += round_up(part.rows, kPanel) / kPanel;
    return panels;
}

int32_t Executor::shares(const Op& op, const Step& step) const {
    const int64_t group = op.heads / kv_shape_.heads;
    int64_t shares = 1;
    for (; shares < group; ++shares)
        if (group % shares == 0 && step.count * kv_shape_.heads * shares >= team_.size()) break;
    return static_cast<int32_t>(shares);
}

void Executor::walk(const Step& step) {
    using Clock = std::chrono::steady_clock;
    const auto caller = std::this_thread::get_id();
    const size_t count_of_ops = ops_.size();
    const auto count_of = [&](const Op& op) { return runs(op, step) ? items(op, step) : 0; };
    // An op of one item is run by whoever is last in the barrier before it, while the others wait
    // there anyway. To be timed, ops run by themselves.
    const auto run_lone = [&](size_t i) {
        for (; i < count_of_ops; ++i) {
            const Op& op = ops_[i];
            const int64_t count = count_of(op);
            if (count > 1 || (count == 1 && !times_.empty())) break;
            if (count == 0) continue;
            apply(op, step, 0, 1);
            if (op.kind == OpKind::route) run_dispatch(op, step);
        }
        resume_ = i;
    };
    const std::function<void()> task = [&] {
        const bool timed = !times_.empty() && std::this_thread::get_id() == caller;
        Clock::time_point then, worked;
        const auto spend = [&](size_t at, Clock::time_point now) {
            times_[at].total_ns += std::chrono::nanoseconds(now - std::exchange(then, now)).count();
        };
        for (size_t begin = 0; begin < count_of_ops;) {
            const Op& op = ops_[begin];
            size_t end = begin + 1;  // of the chain
            while (end < count_of_ops && ops_[end].chained) ++end;
            const int64_t count = count_of(op);
            if (count == 0) {
                begin = end;
                continue;
            }
            // No result depends on the split, so a small step may be cut finer.
            const int64_t grain = std::clamp<int64_t>(count / (4 * team_.size()), 1, op.grain);
            if (timed) then = Clock::now();
            for (int64_t i; (i = next_.fetch_add(grain, std::memory_order_relaxed)) < count;)
                for (size_t at = begin; at < end; ++at) {
                    apply(ops_[at], step, i, std::min(i + grain, count));
                    if (timed) spend(at, Clock::now());
                }
            if (timed) worked = Clock::now();
            // By then every thread has taken its last item.
            team_.barrier([&] {
                next_.store(0, std::memory_order_relaxed);
                if (op.kind == OpKind::route) run_dispatch(op, step);
                run_lone(end);
            });
            if (timed) {
                for (size_t at = begin; at < end; ++at) ++times_[at].calls;
                spend(end - 1, Clock::now());
                times_[end - 1].wait_ns += std::chrono::nanoseconds(then - worked).count();
            }
            begin = resume_;
        }
    };
    team_.run(task);
}

// Panels of the gate for one token, and those of up that relu lets through: whoever has computed a
// gate's panel knows, so nobody waits. The others become zero, which is what is left of any finite
// value behind a closed gate.
void Executor::gated_matmul(const Op& op, int64_t first, int64_t last) const {
    const Rows a = rows(op.a), out = rows(op.out);
    const MatmulPart &gate = op.parts[0], &up = op.parts[1];
    kernels_.matmul(gate, op.cols, a, op.precision, out, {nullptr, 0}, 1, first, last);
    const auto open = [&](int64_t p) {
        const float* values = out.row<float>(0) + gate.column + p * kPanel;
        bool any = false;
        for (int i = 0; i < kPanel; ++i) any |= !(values[i] <= 0);  // a NaN passes
        return any;
    };
    for (int64_t p = first, end; p < last; p = end) {
        const bool compute = open(p);
        for (end = p + 1; end < last && open(end) == compute;) ++end;
        if (compute)
            kernels_.matmul(up, op.cols, a, op.precision, out, {nullptr, 0}, 1, p, end);
        else
            std::fill_n(out.row<float>(0) + up.column + p * kPanel, (end - p) * kPanel, 0.0f);
    }
}

void Executor::set_thresholds(const std::vector<float>& thresholds) {
    require(static_cast<int64_t>(thresholds.size()) == activations_,
            "there are more or fewer thresholds than activations");
    for (const float threshold : thresholds) require_threshold(threshold);
    for (Op& op : ops_)
        if (op.kind == OpKind::activate) op.threshold = thresholds[static_cast<size_t>(op.layer)];
}

void Executor::watch(bool on) {
    // Zeroed as it is made.
    activity_ =
        on ? std::make_unique<uint64_t[]>(static_cast<size_t>(activations_ * kActivity)) : nullptr;
}

KvView Executor::view(const Op& op, const Step& step) const {
    const auto group = static_cast<size_t>(op.group);
    const int64_t blocks = kv_shape_.groups[group].num_blocks;
    return {kv_.data() + pools_[group] + blocks * op.layer,
            blocks * kv_head_bytes(kv_shape_.type, kv_shape_.head_dim),
            step.tables + op.group * step.group_tables,
            limits_.max_blocks,
            kv_shape_.type,
            kv_shape_.heads,
            kv_shape_.head_dim};
}

void Executor::apply(const Op& op, const Step& step, int64_t first, int64_t last) const {
    const Rows a = rows(op.a), b = rows(op.b), out = rows(op.out);
    const KvView kv = view(op, step);
    const Kernels& k = kernels_;
    switch (op.kind) {
        case OpKind::embed:
            return k.embed(op.parts[0], op.cols, op.scale, step.tokens.ids, out, first, last);
        case OpKind::rope_table:
            return k.rope_table(step.tokens.positions, op.vector, op.scalar, op.cols / 2, out,
                                first, last);
        case OpKind::rms_norm:
            return k.rms_norm(a, op.vector, op.scalar, op.cols, b, out, op.precision, first, last);
        case OpKind::layer_norm:
            return k.layer_norm(a, op.vector, op.scalar, op.cols, out, op.precision, first, last);
        case OpKind::quantize: return k.quantize(a, op.cols, out, op.precision, first, last);
        case OpKind::activate:
            return k.activate(
                op.fn, a, b, op.cols, out, op.precision,
                {op.threshold, activity_ ? activity_.get() + op.layer * kActivity : nullptr}, first,
                last);
        case OpKind::softcap: return k.softcap(a, op.scalar, op.cols, out, first, last);
        case OpKind::add: return k.add(a, b, op.cols, out, first, last);
        case OpKind::rope_store:
            return k.rope_store(a, b, op.heads, op.norm, kv, step.tokens, first, last);
        case OpKind::attention_parts:
        case OpKind::attention: {
            Attend attend = op.attend;
            attend.slopes = op.slopes.empty() ? nullptr : op.slopes.data();
            attend.shares = shares(op, step);
            const int64_t chunks = chunks_[static_cast<size_t>(op.group)];
            if (op.kind == OpKind::attention_parts)
                return k.attention_parts(a, op.heads, attend, kv, step.tokens, b, step.count,
                                         chunks, first, last);
            if (chunks)
                return k.attention_join(b, op.heads, attend.window, kv, step.tokens, chunks, out,
                                        first, last);
            return k.attention(a, op.heads, attend, kv, step.tokens, out, step.count, first, last);
        }
        case OpKind::gather:
            for (int64_t i = first; i < last; ++i)
                std::memcpy(out.row<uint8_t>(i), a.row<uint8_t>(step.rows[i]),
                            static_cast<size_t>(op.cols) * 4);
            return;
        case OpKind::matmul:
            if (op.gates && step.count == 1) return gated_matmul(op, first, last);
            for (const MatmulPart& part : op.parts) {
                const int64_t panels = round_up(part.rows, kPanel) / kPanel;
                if (first < panels && last > 0)
                    k.matmul(part, op.cols, a, op.precision, out, b, step.count,
                             std::max<int64_t>(first, 0), std::min(last, panels));
                first -= panels;
                last -= panels;
            }
            return;
        case OpKind::plan_bounds:
        case OpKind::bound:
        case OpKind::lead:
        case OpKind::refine: return apply_bounded(op, step, first, last);
        default: return apply_experts(op, step, first, last);
    }
}

}  // namespace pronk
