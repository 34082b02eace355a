// The executor's list of ops: each is checked as it is added, so that a step checks its batch
// alone.
#include <cmath>
#include <utility>

#include "executor.h"
#include "require.h"

namespace pronk {

namespace {

void require_threshold(float threshold) {
    require(std::isfinite(threshold) && threshold >= 0, "a threshold must be 0 or more");
}

}  // namespace

void Executor::check(const Ref& ref, int64_t rows, int64_t row_bytes, const char* what) const {
    const bool aligned = ref.offset >= 0 && ref.offset % 64 == 0 && ref.stride % 4 == 0;
    if (!aligned || ref.stride < row_bytes || ref.stride > arena_.size() ||
        ref.offset > arena_.size() - (rows - 1) * ref.stride - row_bytes)
        throw std::invalid_argument(std::string(what) + " lies outside the arena");
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
                        op.heads % kv_heads == 0 && dim > 0 && dim % 16 == 0 &&
                        dim <= kMaxHeadDim && op.group >= 0 &&
                        op.group < static_cast<int64_t>(pools_.size()) && op.layer >= 0 &&
                        op.layer % 64 == 0 &&
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

void Executor::set_thresholds(const std::vector<float>& thresholds) {
    require(static_cast<int64_t>(thresholds.size()) == activations_,
            "there are more or fewer thresholds than activations");
    for (const float threshold : thresholds) require_threshold(threshold);
    for (Op& op : ops_)
        if (op.kind == OpKind::activate) op.threshold = thresholds[static_cast<size_t>(op.layer)];
}

}  // namespace pronk
