// The ops of the executor that send tokens to experts and join what comes back.
#include "experts.h"

#include <algorithm>
#include <cstring>

#include "executor.h"
#include "require.h"

namespace pronk {

void dispatch(Rows routes, int64_t tokens, int64_t choices, int64_t experts, PlanEntry* plan,
              int32_t* scratch, uint64_t* counts) {
    std::fill_n(scratch, experts, 0);
    for (int64_t t = 0; t < tokens; ++t)
        for (int64_t j = 0; j < choices; ++j) {
            const float id = routes.row<float>(t)[j];
            const bool chosen = id >= 0 && id < static_cast<float>(experts);
            const int32_t expert = chosen ? static_cast<int32_t>(id) : -1;
            // For now the expert, and the place among its rows.
            plan[t * choices + j].row = expert;
            if (chosen) ++scratch[expert];
        }
    int32_t active = 0, start = 0;
    for (int64_t e = 0; e < experts; ++e) {
        const int32_t count = scratch[e];
        counts[e] += static_cast<uint64_t>(count);
        scratch[e] = start;
        if (!count) continue;
        plan[active].expert = static_cast<int32_t>(e);
        plan[active].start = start, plan[active].count = count;
        plan[active].place = static_cast<int32_t>(e);
        ++active;
        start += static_cast<int32_t>(round_up(count, kActRows));
    }
    plan[0].active = active;
    for (int64_t i = 0; i < tokens * choices; ++i)
        if (plan[i].row >= 0) plan[i].row = scratch[plan[i].row]++;
}

void copy_row(Rows from, int64_t t, Rows to, int64_t row, int64_t cols, Precision precision) {
    if (!is_quantized(precision)) {
        std::memcpy(to.row<uint8_t>(row), from.row<uint8_t>(t), static_cast<size_t>(cols) * 4);
        return;
    }
    const int64_t groups = cols / kGroup, bytes = groups * act_group(precision);
    const int64_t t0 = t % kActRows, row0 = row % kActRows;
    const uint8_t* source = from.row<uint8_t>(t - t0);
    uint8_t* target = to.row<uint8_t>(row - row0);
    std::memcpy(target + row0 * bytes, source + t0 * bytes, static_cast<size_t>(bytes));
    source += kActRows * bytes + t0 * 16;
    target += kActRows * bytes + row0 * 16;
    for (int64_t g = 0; g < groups; ++g)
        std::memcpy(target + g * 16 * kActRows, source + g * 16 * kActRows, 16);
}

namespace {

int64_t panels_of(const Op& op) {  // of one expert
    int64_t panels = 0;
    for (const MatmulPart& part : op.parts) panels += part.rows / kPanel;
    return panels;
}

}  // namespace

PlanEntry* Executor::plan(const Op& op) const {
    return reinterpret_cast<PlanEntry*>(arena_.data() + op.plan.offset);
}

void Executor::check_experts(const Op& op) {
    require(!op.head, "experts belong to the body");
    require(op.experts >= 1 && op.experts <= kMaxExperts && op.choices >= 1 &&
                op.choices <= std::min(kMaxRouted, op.experts),
            "experts, or the choices of a token, are out of range");
    require(moe_experts_ == 0 || moe_experts_ == op.experts, "layers differ in their experts");
    const int64_t tokens = limits_.max_tokens;
    const int64_t rows = expert_rows(tokens, op.choices, op.experts);
    const int64_t blocks = round_up(rows, kActRows);
    const auto routes = [&](const Ref& ref) { check(ref, tokens, 2 * op.choices * 4, "routes"); };
    check(op.plan, rows, sizeof(PlanEntry), "table of experts");
    require(op.plan.stride == sizeof(PlanEntry), "table of experts has another stride");
    require(
        op.kind == OpKind::route || (op.cols >= 1 && op.cols <= kMaxSide && op.cols % kGroup == 0),
        "row length must be a multiple of 32");
    const int64_t row_bytes = act_row_bytes(op.cols, op.precision);
    switch (op.kind) {
        case OpKind::route:
            require(op.routing.least >= 1 && op.routing.least <= op.choices &&
                        op.routing.experts == op.experts && op.routing.choices == op.choices,
                    "routing is out of range");
            check(op.a, tokens, op.experts * 4, "router logits");
            routes(op.out);
            require(
                !residency_ || (op.experts == residency_->experts() && op.set >= 0 &&
                                op.set < residency_->sets() &&
                                residency_->slots() >= std::min(op.experts, tokens * op.choices)),
                "there are fewer slots than a step may go to experts");
            break;
        case OpKind::expert_read:
            require(bool(residency_), "experts that are in memory cannot be read");
            break;
        case OpKind::expert_gather:
            check(op.a, is_quantized(op.precision) ? round_up(tokens, kActRows) : tokens, row_bytes,
                  "input");
            check(op.out, is_quantized(op.precision) ? blocks : rows, row_bytes, "rows of experts");
            break;
        case OpKind::expert_matmul:
            require(!op.parts.empty(), "matmul without weights");
            for (const MatmulPart& part : op.parts) {
                require(is_grouped(part.format) == is_quantized(op.precision) &&
                            op.cols % traits(part.format).block == 0 && part.rows % kPanel == 0 &&
                            part.format != Format::q8_planes,
                        "experts need whole panels, and activations of their kind");
                const uint8_t* const slot = residency_ ? residency_->memory() : nullptr;
                require(!slot || (part.weight >= slot &&
                                  part.weight + packed_bytes(part.format, part.rows, op.cols) <=
                                      slot + residency_->slot_bytes()),
                        "an expert lies outside its slot");
                check(op.out, rows, (part.column + part.rows) * 4, "output of experts");
            }
            check(op.a, is_quantized(op.precision) ? blocks : rows, row_bytes, "rows of experts");
            if (op.b.offset >= 0)
                check(op.b, is_quantized(op.precision) ? round_up(tokens, kActRows) : tokens,
                      row_bytes, "input");
            break;
        case OpKind::expert_activate:
            check(op.a, rows, op.cols * 4, "gate");
            check(op.b, rows, op.cols * 4, "up");
            check(op.out, is_quantized(op.precision) ? blocks : rows, row_bytes,
                  "activation of experts");
            routes(op.routes);
            break;
        default:
            require(!is_quantized(op.precision),
                    "an op that writes floats alone is asked to quantize");
            check(op.a, rows, op.cols * 4, "output of experts");
            if (op.b.offset >= 0) check(op.b, tokens, op.cols * 4, "residual");
            check(op.out, tokens, op.cols * 4, "combined output");
            routes(op.routes);
            break;
    }
    if (op.kind != OpKind::route) return;
    moe_experts_ = op.experts;
    scratch_.resize(static_cast<size_t>(op.experts));
    expert_counts_.resize(expert_counts_.size() + static_cast<size_t>(op.experts));
}

int64_t Executor::expert_items(const Op& op, const Step& step) const {
    switch (op.kind) {
        case OpKind::expert_gather:  // one token's row is read where it is
            return step.count == 1 ? 0 : step.count * op.choices;
        case OpKind::expert_read: return residency_->reads();
        case OpKind::expert_matmul: return plan(op)->active * panels_of(op);
        case OpKind::expert_activate: return step.count * op.choices;
        default: return step.count;
    }
}

void Executor::run_dispatch(const Op& op, const Step& step) {
    dispatch(rows(op.out), step.count, op.choices, op.experts, plan(op), scratch_.data(),
             expert_counts_.data() + op.layer * op.experts);
    if (op.layer == 0) routed_tokens_ += static_cast<uint64_t>(step.count);
    if (residency_) residency_->admit(op.set, plan(op));
}

void Executor::keep_experts(int64_t offset, int64_t slot_bytes, int64_t slots, int64_t sets,
                            int64_t experts) {
    require(ops_.empty() && !residency_, "slots of experts come before all ops");
    require(slot_bytes >= 64 && slot_bytes % 64 == 0 && sets >= 1 && sets <= 1 << 20 &&
                experts >= 1 && experts <= kMaxExperts && slots >= 1 && slots <= sets * experts &&
                slots <= weights_.size() / slot_bytes,
            "slots of experts are out of range");
    weight(offset, slots * slot_bytes);
    residency_ =
        std::make_unique<Residency>(weights_.data() + offset, slot_bytes, slots, sets, experts);
}

void Executor::reset_experts() {
    std::fill(expert_counts_.begin(), expert_counts_.end(), 0);
    routed_tokens_ = 0;
    if (residency_) residency_->reset();
}

void Executor::apply_experts(const Op& op, const Step& step, int64_t first, int64_t last) const {
    const Rows a = rows(op.a), b = rows(op.b), out = rows(op.out), routes = rows(op.routes);
    const PlanEntry* const entries = plan(op);
    switch (op.kind) {
        case OpKind::route: return kernels_.route(a, op.routing, out, first, last);
        case OpKind::expert_read: return residency_->read(first, last);
        case OpKind::expert_gather:
            for (int64_t i = first; i < last; ++i)
                if (entries[i].row >= 0)
                    copy_row(a, i / op.choices, out, entries[i].row, op.cols, op.precision);
            return;
        case OpKind::expert_matmul: {
            const int64_t panels = panels_of(op);
            const bool single = step.count == 1 && b.data;
            while (first < last) {
                const PlanEntry& entry = entries[first / panels];
                const int64_t begin = first / panels * panels;
                const int64_t end = std::min(begin + panels, last);
                const Rows x = single ? b : Rows{a.row<uint8_t>(entry.start), a.stride};
                const Rows y{out.row<uint8_t>(entry.start), out.stride};
                int64_t at = begin;
                for (MatmulPart part : op.parts) {
                    const int64_t count = part.rows / kPanel;
                    const int64_t from = std::max(first - at, int64_t(0));
                    const int64_t to = std::min(end - at, count);
                    part.weight +=
                        entry.place * (residency_ ? residency_->slot_bytes()
                                                  : count * panel_bytes(part.format, op.cols));
                    if (from < to)
                        kernels_.matmul(part, op.cols, x, op.precision, y, {nullptr, 0},
                                        entry.count, from, to);
                    at += count;
                }
                first = end;
            }
            return;
        }
        case OpKind::expert_activate:
            for (int64_t i = first; i < last; ++i) {
                const int64_t row = entries[i].row;
                if (row < 0) continue;
                if (op.scales_input) {
                    const float weight =
                        routes.row<float>(i / op.choices)[op.choices + i % op.choices];
                    kernels_.scale(a, weight, op.cols, row, row + 1);
                    kernels_.scale(b, weight, op.cols, row, row + 1);
                }
                kernels_.activate(op.fn, a, b, op.cols, out, op.precision, {}, row, row + 1);
            }
            return;
        default:
            for (int64_t t = first; t < last; ++t) {
                int32_t chosen[kMaxRouted];
                float weights[kMaxRouted];
                int64_t count = 0;
                for (int64_t j = 0; j < op.choices; ++j) {
                    const int32_t row = entries[t * op.choices + j].row;
                    if (row < 0) continue;
                    chosen[count] = row;
                    weights[count++] =
                        op.scales_input ? 1.0f : routes.row<float>(t)[op.choices + j];
                }
                kernels_.combine(a, chosen, weights, count, op.scalar,
                                 b.data ? b.row<float>(t) : nullptr, op.cols, out.row<float>(t));
            }
            return;
    }
}

}  // namespace pronk
