// The executor's ops of a mixture of experts.
#include <nanobind/ndarray.h>

#include "slots.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace pronk;

namespace {

using Sizes = std::pair<int64_t, int64_t>;  // experts, and the choices of a token

Op make_op(OpKind kind, const Slot& plan, const Sizes& sizes, const Slot& out, int64_t grain) {
    Op op{kind};
    op.plan = at(plan), op.out = at(out), op.grain = grain;
    op.experts = sizes.first, op.choices = sizes.second;
    return op;
}

}  // namespace

void bind_experts(nb::class_<Executor>& executor) {
    executor
        .def(
            "route",
            [](Executor& e, Slot logits, Sizes sizes, bool softmax, bool normalize,
               double threshold, int64_t least, Slot out, Slot plan, int64_t grain) {
                Op op = make_op(OpKind::route, plan, sizes, out, grain);
                op.a = at(logits);
                op.routing = {sizes.first, sizes.second, softmax, normalize, threshold, least};
                e.add(std::move(op));
            },
            "logits"_a, "sizes"_a, "softmax"_a, "normalize"_a, "threshold"_a, "least"_a, "out"_a,
            "plan"_a, "grain"_a)
        .def(
            "expert_gather",
            [](Executor& e, Slot x, Slot plan, Sizes sizes, int64_t cols, bool quantized, Slot out,
               int64_t grain) {
                Op op = make_op(OpKind::expert_gather, plan, sizes, out, grain);
                op.a = at(x), op.cols = cols, op.quantized = quantized;
                e.add(std::move(op));
            },
            "x"_a, "plan"_a, "sizes"_a, "cols"_a, "quantized"_a, "out"_a, "grain"_a)
        .def(
            "expert_matmul",
            [](Executor& e, Slot x, Slot token, Slot plan, Sizes sizes,
               const std::vector<Part>& parts, int64_t cols, bool quantized, Slot out,
               int64_t grain) {
                Op op = make_op(OpKind::expert_matmul, plan, sizes, out, grain);
                op.a = at(x), op.b = at(token), op.cols = cols, op.quantized = quantized;
                for (const Part& p : parts) {
                    MatmulPart part = make_part(e, p, cols);
                    if (sizes.first < 1 || part.rows % sizes.first || part.bias)
                        throw std::invalid_argument("experts do not divide their weights");
                    part.rows = static_cast<int32_t>(part.rows / sizes.first);
                    op.parts.push_back(part);
                }
                e.add(std::move(op));
            },
            "x"_a, "token"_a, "plan"_a, "sizes"_a, "parts"_a, "cols"_a, "quantized"_a, "out"_a,
            "grain"_a, "Products of rows with their experts; `token`: where a lone token's row is.")
        .def(
            "expert_activate",
            [](Executor& e, const std::string& fn, Slot gate, Slot up, Slot routes, Slot plan,
               Sizes sizes, int64_t cols, bool scales_input, Slot out, bool quantized,
               int64_t grain) {
                Op op = make_op(OpKind::expert_activate, plan, sizes, out, grain);
                op.fn = parse_activation(fn), op.a = at(gate), op.b = at(up), op.cols = cols;
                op.routes = at(routes), op.scales_input = scales_input, op.quantized = quantized;
                e.add(std::move(op));
            },
            "fn"_a, "gate"_a, "up"_a, "routes"_a, "plan"_a, "sizes"_a, "cols"_a, "scales_input"_a,
            "out"_a, "quantized"_a, "grain"_a)
        .def(
            "combine",
            [](Executor& e, Slot y, Slot residual, Slot routes, Slot plan, Sizes sizes,
               int64_t cols, bool scales_input, float scale, Slot out, int64_t grain) {
                Op op = make_op(OpKind::combine, plan, sizes, out, grain);
                op.a = at(y), op.b = at(residual), op.routes = at(routes), op.cols = cols;
                op.scales_input = scales_input, op.scalar = scale;
                e.add(std::move(op));
            },
            "y"_a, "residual"_a, "routes"_a, "plan"_a, "sizes"_a, "cols"_a, "scales_input"_a,
            "scale"_a, "out"_a, "grain"_a)
        .def_prop_ro(
            "expert_counts",
            [](const Executor& e) {
                std::vector<std::vector<uint64_t>> layers;
                const auto& counts = e.expert_counts();
                for (size_t i = 0; i < counts.size(); i += static_cast<size_t>(e.experts()))
                    layers.emplace_back(counts.begin() + static_cast<ptrdiff_t>(i),
                                        counts.begin() + static_cast<ptrdiff_t>(i) + e.experts());
                return layers;
            },
            "How often each expert was chosen, by layer.")
        .def_prop_ro("routed_tokens", &Executor::routed_tokens,
                     "Tokens that chose experts, in each layer that has any.")
        .def("reset_experts", &Executor::reset_experts, "Counts from zero.");
}
