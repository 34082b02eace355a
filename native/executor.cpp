#include "executor.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <thread>
#include <utility>

#include "require.h"

namespace pronk {

namespace {

// Bytes of what each thread expands a rounded cache to.
int64_t thread_bytes(const KvShape& kv) {
    require(kv.head_dim >= 0 && kv.head_dim <= kMaxHeadDim, "a head is too large");
    return kv_expanded(kv.type) ? past_bytes(kv.head_dim) : 0;
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

// One thread's share of `pasts`, while it is in a step.
struct LentPast {
    LentPast(const Region& pasts, int64_t seat, int64_t seats) {
        uint8_t* const share = pasts.data() + pasts.size() / seats * seat;
        lend_past_memory(pasts.size() ? reinterpret_cast<uint16_t*>(share) : nullptr);
    }
    ~LentPast() { lend_past_memory(nullptr); }
    LentPast(const LentPast&) = delete;
    LentPast& operator=(const LentPast&) = delete;
};

}  // namespace

Executor::Executor(int threads, const std::string& isa, int64_t weight_bytes, int64_t arena_bytes,
                   const Limits& limits, const KvShape& kv)
    : kernels_(select_kernels(isa.c_str())),
      limits_(limits),
      kv_shape_(kv),
      weights_(weight_bytes),
      arena_(arena_bytes),
      kv_(pool_bytes(limits, kv)),
      pasts_(threads * thread_bytes(kv)),
      team_(threads) {
    shares_ = std::vector<Share>(static_cast<size_t>(team_.size()));
    int64_t at = 0;
    for (const KvGroup& group : kv_shape_.groups) {
        pools_.push_back(at);
        chunks_.push_back(0);
        at += group.num_blocks * group.block_bytes;
    }
}

void Executor::populate() {
    const Region* const regions[] = {&arena_, &kv_, &pasts_};
    std::atomic<int64_t> next{0};
    std::atomic<bool> full{false};
    team_.run([&] {
        int64_t i = next.fetch_add(1), before = 0;
        for (const Region* region : regions) {
            for (; i < before + region->pieces(); i = next.fetch_add(1))
                if (!region->populate(i - before)) full = true;
            before += region->pieces();
        }
    });
    if (full) throw std::bad_alloc();
}

Rows Executor::rows(const Ref& ref) const {
    return {ref.offset < 0 ? nullptr : arena_.data() + ref.offset, ref.stride};
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
    std::atomic<int64_t> seat{0};
    const std::function<void()> task = [&] {
        const int64_t place = seat.fetch_add(1, std::memory_order_relaxed), size = team_.size();
        const LentPast lent(pasts_, place, size);
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
            // Its own share first, whose weights are one stream of memory; then of the others'.
            for (int64_t v = 0; v < size; ++v) {
                const int64_t owner = (place + v) % size, last = count * (owner + 1) / size;
                auto& taken = shares_[static_cast<size_t>(owner)].taken;
                for (int64_t i; (i = count * owner / size +
                                     taken.fetch_add(grain, std::memory_order_relaxed)) < last;)
                    for (size_t at = begin; at < end; ++at) {
                        apply(ops_[at], step, i, std::min(i + grain, last));
                        if (timed) spend(at, Clock::now());
                    }
            }
            if (timed) worked = Clock::now();
            // By then every thread has taken its last item.
            team_.barrier([&] {
                for (Share& share : shares_) share.taken.store(0, std::memory_order_relaxed);
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
