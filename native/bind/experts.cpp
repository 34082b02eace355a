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
               double threshold, int64_t least, int64_t set, Slot out, Slot plan, int64_t grain) {
                Op op = make_op(OpKind::route, plan, sizes, out, grain);
                op.a = at(logits), op.set = set;
                op.routing = {sizes.first, sizes.second, softmax, normalize, threshold, least};
                e.add(std::move(op));
            },
            "logits"_a, "sizes"_a, "softmax"_a, "normalize"_a, "threshold"_a, "least"_a, "set"_a,
            "out"_a, "plan"_a, "grain"_a)
        .def(
            "expert_gather",
            [](Executor& e, Slot x, Slot plan, Sizes sizes, int64_t cols,
               const std::string& precision, Slot out, int64_t grain) {
                Op op = make_op(OpKind::expert_gather, plan, sizes, out, grain);
                op.a = at(x), op.cols = cols, op.precision = parse_precision(precision);
                e.add(std::move(op));
            },
            "x"_a, "plan"_a, "sizes"_a, "cols"_a, "precision"_a, "out"_a, "grain"_a)
        .def(
            "expert_matmul",
            [](Executor& e, Slot x, Slot token, Slot plan, Sizes sizes,
               const std::vector<Part>& parts, int64_t cols, const std::string& precision, Slot out,
               int64_t grain) {
                Op op = make_op(OpKind::expert_matmul, plan, sizes, out, grain);
                op.a = at(x), op.b = at(token), op.cols = cols,
                op.precision = parse_precision(precision);
                for (Part p : parts) {
                    const int64_t rows = std::get<2>(p);
                    if (sizes.first < 1 || rows % sizes.first || std::get<4>(p) >= 0)
                        throw std::invalid_argument("experts do not divide their weights");
                    // In memory are the experts one after the other, or slots for one each.
                    if (e.residency()) std::get<2>(p) = rows / sizes.first;
                    MatmulPart part = make_part(e, p, cols);
                    part.rows = static_cast<int32_t>(rows / sizes.first);
                    op.parts.push_back(part);
                }
                e.add(std::move(op));
            },
            "x"_a, "token"_a, "plan"_a, "sizes"_a, "parts"_a, "cols"_a, "precision"_a, "out"_a,
            "grain"_a, "Products of rows with their experts; `token`: where a lone token's row is.")
        .def(
            "expert_activate",
            [](Executor& e, const std::string& fn, Slot gate, Slot up, Slot routes, Slot plan,
               Sizes sizes, int64_t cols, bool scales_input, Slot out, const std::string& precision,
               int64_t grain) {
                Op op = make_op(OpKind::expert_activate, plan, sizes, out, grain);
                op.fn = parse_activation(fn), op.a = at(gate), op.b = at(up), op.cols = cols;
                op.routes = at(routes), op.scales_input = scales_input,
                op.precision = parse_precision(precision);
                e.add(std::move(op));
            },
            "fn"_a, "gate"_a, "up"_a, "routes"_a, "plan"_a, "sizes"_a, "cols"_a, "scales_input"_a,
            "out"_a, "precision"_a, "grain"_a)
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
        .def("reset_experts", &Executor::reset_experts, "Counts from zero.")
        .def("keep_experts", &Executor::keep_experts, "offset"_a, "slot_bytes"_a, "slots"_a,
             "sets"_a, "experts"_a,
             "Experts lie in slots from an offset on, and in a file; `sets`: of a layer each.")
        .def(
            "open_experts",
            [](Executor& e, int fd, const std::vector<std::pair<int64_t, int64_t>>& pieces,
               const std::vector<uint64_t>& sums) {
                if (!e.residency() || pieces.size() != sums.size())
                    throw std::invalid_argument("no slots, or other pieces than sums");
                std::vector<Residency::Piece> all;
                all.reserve(pieces.size());
                for (size_t i = 0; i < pieces.size(); ++i)
                    all.push_back({pieces[i].first, pieces[i].second, sums[i]});
                e.residency()->open(fd, std::move(all));
            },
            "fd"_a, "pieces"_a, "sums"_a,
            "Experts are read from a file: (its place, bytes) of each piece, set by set.")
        .def_prop_ro(
            "expert_reads",
            [](const Executor& e) {
                const Residency::Counters c =
                    e.residency() ? e.residency()->counters() : Residency::Counters{};
                return std::tuple(c.hits, c.misses, c.bytes);
            },
            "Experts that steps found in a slot, those they had to read, and the bytes of these.")
        .def_prop_ro(
            "experts_held",
            [](const Executor& e) {
                return e.residency() ? e.residency()->held() : std::vector<int64_t>{};
            },
            "What each slot holds, set * experts + expert, or -1.");
}
