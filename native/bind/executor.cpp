// Executor: arrays in, arrays out; the GIL is released while a step runs.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <memory>

#include "slots.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace pronk;

namespace {

using Ids = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Table = nb::ndarray<const int32_t, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using Bytes = nb::ndarray<const uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Floats = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using View = nb::ndarray<nb::numpy, const float, nb::ndim<2>, nb::device::cpu>;
using Vector = nb::ndarray<nb::numpy, const float, nb::ndim<1>, nb::device::cpu>;
using Block = nb::ndarray<nb::numpy, uint8_t, nb::ndim<2>, nb::device::cpu>;
using Counts = nb::ndarray<nb::numpy, uint64_t, nb::ndim<2>, nb::device::cpu>;
// Bytes of a block, blocks, window, sinks, chunked.
using Group = std::tuple<int64_t, int64_t, int64_t, int64_t, bool>;

KvType parse_kv(const std::string& name) {
    if (name == "f32") return KvType::f32;
    if (name == "bf16") return KvType::bf16;
    if (name == "int8") return KvType::int8;
    if (name == "int4") return KvType::int4;
    if (name == "int4_plain") return KvType::int4_plain;
    throw std::invalid_argument("unknown KV type: " + name);
}

const float* vector_at(const Executor& e, int64_t offset, int64_t count) {
    return reinterpret_cast<const float*>(e.weight(offset, count * 4));
}

HeadNorm head_norm(const Executor& e, const std::string& name, std::pair<int64_t, int64_t> weights,
                   int64_t heads, float eps) {
    if (name.empty()) return {};
    if (name == "l2") return {HeadNorm::l2, nullptr, nullptr, eps};
    if (name != "head" && name != "full")
        throw std::invalid_argument("unknown norm of queries and keys: " + name);
    if (heads < 1 || heads > kMaxSide) throw std::invalid_argument("heads are out of range");
    const KvShape& kv = e.kv_shape();
    const bool full = name == "full";
    return {full ? HeadNorm::full : HeadNorm::head,
            vector_at(e, weights.first, kv.head_dim * (full ? heads : 1)),
            vector_at(e, weights.second, kv.head_dim * (full ? int64_t(kv.heads) : 1)), eps};
}

}  // namespace

void bind_executor(nb::module_& m) {
    m.attr("PANEL") = kPanel;
    nb::exception<ExpertReadError>(m, "ExpertReadError", PyExc_OSError);
    m.attr("GROUP") = kGroup;
    m.attr("KV_BLOCK") = kBlock;
    m.attr("KV_CHUNK") = kChunk;
    m.attr("PART_TAIL") = kPartTail;
    m.attr("MOST_KEPT") = kMostKept;
    m.def(
        "bound_plan_bytes",
        [](int64_t rows, int64_t cols) { return BoundPlan::floats(rows, cols) * 4; }, "rows"_a,
        "cols"_a, "Bytes of a row of what bounded products need beside their logits.");
    m.attr("MAGNITUDE_SHIFT") = kMagnitudeShift;
    m.def(
        "packed_bytes",
        [](const std::string& format, int64_t rows, int64_t cols) {
            return packed_bytes(parse_format(format), rows, cols);
        },
        "format"_a, "rows"_a, "cols"_a, "Bytes of a packed matrix.");
    m.def(
        "act_row_bytes",
        [](int64_t cols, const std::string& precision) {
            return act_row_bytes(cols, parse_precision(precision));
        },
        "cols"_a, "precision"_a, "Bytes of a row of activations.");

    nb::class_<Executor> executor(m, "Executor", "Runs a program of ops over one arena.");
    executor
        .def(
            "__init__",
            [](Executor* self, int threads, const std::string& isa, int64_t weight_bytes,
               int64_t arena_bytes, int64_t max_tokens, int64_t max_rows, int64_t max_sequences,
               int64_t max_blocks, int64_t vocab, int32_t kv_heads, int32_t head_dim,
               const std::string& kv_dtype, const std::vector<Group>& kv_groups) {
                if (threads < 1 || threads > 1024 || weight_bytes < 0 || arena_bytes < 0 ||
                    max_blocks < 0)
                    throw std::invalid_argument("executor sizes must not be negative");
                nb::gil_scoped_release release;
                KvShape shape{kv_heads, head_dim, parse_kv(kv_dtype), {}};
                for (const auto& [block_bytes, blocks, window, sinks, chunked] : kv_groups) {
                    if (window < 0 || window > kMaxSide || sinks < 0 || sinks > kMaxSide)
                        throw std::invalid_argument("a window is out of range");
                    shape.groups.push_back(
                        {block_bytes,
                         blocks,
                         {static_cast<int32_t>(window), chunked, static_cast<int32_t>(sinks)}});
                }
                new (self)
                    Executor(threads, isa, weight_bytes, arena_bytes,
                             {max_tokens, max_rows, max_sequences, max_blocks, vocab}, shape);
            },
            nb::kw_only(), "threads"_a, "isa"_a, "weight_bytes"_a, "arena_bytes"_a, "max_tokens"_a,
            "max_rows"_a, "max_sequences"_a, "max_blocks"_a, "vocab"_a, "kv_heads"_a, "head_dim"_a,
            "kv_dtype"_a, "kv_groups"_a,
            "kv_groups: (bytes of a block, blocks, window, sinks, chunked) of each.")
        .def_prop_ro("isa", &Executor::isa)
        .def_prop_ro("threads", &Executor::threads)
        .def_prop_ro("weight_bytes", &Executor::weight_bytes)
        .def_prop_ro("arena_bytes", &Executor::arena_bytes)
        .def_prop_ro("kv_bytes", &Executor::kv_bytes)
        .def_prop_ro("past_bytes", &Executor::past_bytes)
        .def_prop_ro("op_count", &Executor::op_count)
        .def("profile", &Executor::profile, "on"_a,
             "Keeps times of ops from now on, from zero; or no longer.")
        .def_prop_ro(
            "times",
            [](const Executor& e) {
                std::vector<std::tuple<int64_t, int64_t, int64_t>> times;
                for (const Executor::Times& t : e.times())
                    times.emplace_back(t.calls, t.total_ns, t.wait_ns);
                return times;
            },
            "Of each op, as one thread saw it: calls, nanoseconds, and those in the barrier.")
        .def("populate", &Executor::populate, nb::call_guard<nb::gil_scoped_release>(),
             "Makes the KV pool and the arena resident.")
        .def(
            "pack",
            [](Executor& e, const std::string& format, int64_t offset, int64_t total_rows,
               int64_t cols, int64_t row0, Bytes rows) {
                nb::gil_scoped_release release;
                e.pack(parse_format(format), offset, total_rows, cols, row0,
                       static_cast<int64_t>(rows.shape(0)), rows.data(),
                       static_cast<int64_t>(rows.size()));
            },
            "format"_a, "offset"_a, "total_rows"_a, "cols"_a, "row0"_a, "rows"_a)
        .def(
            "write",
            [](Executor& e, int64_t offset, Floats values) {
                e.write(offset, values.data(), static_cast<int64_t>(values.size()));
            },
            "offset"_a, "values"_a)
        .def(
            "embed",
            [](Executor& e, Part table, int64_t cols, float scale, Slot out, int64_t grain) {
                Op op{OpKind::embed};
                op.parts = {make_part(e, table, cols)};
                op.cols = cols, op.scale = scale, op.out = at(out), op.grain = grain;
                e.add(std::move(op));
            },
            "table"_a, "cols"_a, "scale"_a, "out"_a, "grain"_a)
        .def(
            "rope_table",
            [](Executor& e, int64_t frequencies, int64_t head_dim, float scale, Slot out,
               int64_t grain) {
                Op op{OpKind::rope_table};
                op.scalar = scale;
                op.vector = vector_at(e, frequencies, head_dim / 2);
                op.cols = head_dim, op.out = at(out), op.grain = grain;
                e.add(std::move(op));
            },
            "frequencies"_a, "head_dim"_a, "scale"_a, "out"_a, "grain"_a)
        .def(
            "rms_norm",
            [](Executor& e, Slot x, int64_t weight, float eps, int64_t cols, Slot residual,
               Slot out, const std::string& precision, bool head, int64_t grain) {
                Op op{OpKind::rms_norm};
                op.a = at(x), op.vector = vector_at(e, weight, cols), op.scalar = eps;
                op.b = at(residual), op.cols = cols, op.out = at(out),
                op.precision = parse_precision(precision);
                op.head = head, op.grain = grain;
                e.add(std::move(op));
            },
            "x"_a, "weight"_a, "eps"_a, "cols"_a, "residual"_a, "out"_a, "precision"_a, "head"_a,
            "grain"_a)
        .def(
            "layer_norm",
            [](Executor& e, Slot x, int64_t weight, float eps, int64_t cols, Slot out,
               const std::string& precision, bool head, int64_t grain) {
                Op op{OpKind::layer_norm};
                op.a = at(x), op.vector = vector_at(e, weight, cols), op.scalar = eps;
                op.cols = cols, op.out = at(out), op.precision = parse_precision(precision),
                op.head = head;
                op.grain = grain;
                e.add(std::move(op));
            },
            "x"_a, "weight"_a, "eps"_a, "cols"_a, "out"_a, "precision"_a, "head"_a, "grain"_a)
        .def(
            "quantize",
            [](Executor& e, Slot x, int64_t cols, Slot out, const std::string& precision, bool head,
               int64_t grain) {
                Op op{OpKind::quantize};
                op.a = at(x), op.cols = cols, op.out = at(out),
                op.precision = parse_precision(precision);
                op.head = head, op.grain = grain;
                e.add(std::move(op));
            },
            "x"_a, "cols"_a, "out"_a, "precision"_a, "head"_a, "grain"_a)
        .def(
            "matmul",
            [](Executor& e, Slot x, const std::vector<Part>& parts, int64_t cols,
               const std::string& precision, float scale, Slot residual, Slot out, bool head,
               int64_t grain, bool gates, bool sparse) {
                Op op{OpKind::matmul};
                op.a = at(x), op.b = at(residual), op.out = at(out);
                op.cols = cols, op.precision = parse_precision(precision), op.head = head,
                op.grain = grain;
                op.gates = gates;
                for (const Part& p : parts) {
                    op.parts.push_back(make_part(e, p, cols));
                    op.parts.back().scale = scale, op.parts.back().sparse = sparse;
                }
                e.add(std::move(op));
            },
            "x"_a, "parts"_a, "cols"_a, "precision"_a, "scale"_a, "residual"_a, "out"_a, "head"_a,
            "grain"_a, "gates"_a = false, "sparse"_a = false,
            "gates: relu follows the first part, and closes the second. sparse: x is often zero.")
        .def(
            "bounded_matmul",
            [](Executor& e, Slot x, Slot plan, const Part& part, int64_t cols,
               const std::string& precision, float scale, Slot out, int64_t grain) {
                Op op{OpKind::matmul};
                op.a = at(x), op.out = at(out), op.cols = cols,
                op.precision = parse_precision(precision);
                op.head = true, op.grain = grain, op.when = Op::When::all;
                op.parts = {make_part(e, part, cols)};
                op.parts[0].scale = scale;
                e.add(op);
                op.b = at(plan), op.when = Op::When::largest;
                for (const OpKind kind :
                     {OpKind::plan_bounds, OpKind::bound, OpKind::lead, OpKind::refine}) {
                    op.kind = kind;
                    e.add(op);
                }
            },
            "x"_a, "plan"_a, "part"_a, "cols"_a, "precision"_a, "scale"_a, "out"_a, "grain"_a,
            "The product that ends a head, from which the largest logits may be asked for alone.")
        .def(
            "rope_store",
            [](Executor& e, Slot qkv, Slot table, int64_t heads, int64_t group, int64_t layer,
               const std::string& norm, std::pair<int64_t, int64_t> weights, float eps,
               int64_t center, int64_t grain) {
                Op op{OpKind::rope_store};
                op.a = at(qkv), op.b = at(table), op.heads = heads, op.layer = layer;
                op.norm = head_norm(e, norm, weights, heads, eps), op.grain = grain;
                const KvShape& kv = e.kv_shape();
                if (center >= 0) op.norm.center = vector_at(e, center, kv.heads * kv.head_dim);
                op.group = group;
                e.add(std::move(op));
            },
            "qkv"_a, "table"_a, "heads"_a, "group"_a, "layer"_a, "norm"_a, "weights"_a, "eps"_a,
            "center"_a, "grain"_a, "Without a table, where its offset is -1, nothing is turned.")
        .def(
            "attention",
            [](Executor& e, Slot qkv, Slot parts, int64_t heads, int64_t group, int64_t layer,
               float scale, Slot out, int64_t grain, float softcap, std::vector<float> slopes,
               float growth, int32_t growth_span) {
                Op op{OpKind::attention_parts};
                op.a = at(qkv), op.b = at(parts), op.heads = heads, op.layer = layer;
                op.group = group;
                op.attend = {scale, {}, softcap, nullptr, growth, growth_span};
                op.slopes = std::move(slopes), op.out = at(out), op.grain = 1;
                e.add(op);
                op.kind = OpKind::attention, op.grain = grain;
                e.add(std::move(op));
            },
            "qkv"_a, "parts"_a, "heads"_a, "group"_a, "layer"_a, "scale"_a, "out"_a, "grain"_a,
            nb::kw_only(), "softcap"_a = 0.0f, "slopes"_a = std::vector<float>(), "growth"_a = 0.0f,
            "growth_span"_a = 1)
        .def(
            "activate",
            [](Executor& e, const std::string& fn, Slot gate, Slot up, int64_t cols, Slot out,
               const std::string& precision, int64_t grain, float threshold) {
                Op op{OpKind::activate};
                op.threshold = threshold;
                op.fn = parse_activation(fn), op.a = at(gate), op.b = at(up), op.cols = cols;
                op.out = at(out), op.precision = parse_precision(precision), op.grain = grain;
                e.add(std::move(op));
            },
            "fn"_a, "gate"_a, "up"_a, "cols"_a, "out"_a, "precision"_a, "grain"_a,
            "threshold"_a = 0.0f)
        .def("set_thresholds", &Executor::set_thresholds, "thresholds"_a,
             "Below which magnitude the activations of MLPs are zero: one for each `activate`.")
        .def("watch", &Executor::watch, "on"_a,
             "Counts the activations of MLPs from now on, from zero; or no longer.")
        .def(
            "activity",
            [](const Executor& e) {
                const auto ops = static_cast<size_t>(e.activity() ? e.activations() : 0);
                auto copy = std::make_unique<uint64_t[]>(ops * kActivity);
                std::copy_n(e.activity(), ops * kActivity, copy.get());
                nb::capsule owner(copy.get(),
                                  [](void* p) noexcept { delete[] static_cast<uint64_t*>(p); });
                return Counts(copy.release(), {ops, kActivity}, owner);
            },
            "Of each `activate`: its results by magnitude (`MAGNITUDE_SHIFT` bits of a float less, "
            "so the first are zeros), the groups, and those that are zero throughout.")
        .def(
            "softcap",
            [](Executor& e, Slot x, float cap, int64_t cols, Slot out, int64_t grain) {
                Op op{OpKind::softcap};
                op.a = at(x), op.scalar = cap, op.cols = cols, op.out = at(out), op.head = true;
                op.grain = grain;
                e.add(std::move(op));
            },
            "x"_a, "cap"_a, "cols"_a, "out"_a, "grain"_a)
        .def("chain", &Executor::chain,
             "Runs the last op on each row right after the one before it, without a barrier.")
        .def(
            "add",
            [](Executor& e, Slot a, Slot b, int64_t cols, Slot out, int64_t grain) {
                Op op{OpKind::add};
                op.a = at(a), op.b = at(b), op.cols = cols, op.out = at(out), op.grain = grain;
                e.add(std::move(op));
            },
            "a"_a, "b"_a, "cols"_a, "out"_a, "grain"_a)
        .def(
            "gather",
            [](Executor& e, Slot x, int64_t cols, Slot out, int64_t grain) {
                Op op{OpKind::gather};
                op.a = at(x), op.cols = cols, op.out = at(out), op.head = true, op.grain = grain;
                e.add(std::move(op));
            },
            "x"_a, "cols"_a, "out"_a, "grain"_a)
        .def(
            "run",
            [](Executor& e, Ids ids, Ids positions, Ids sequences, Table tables) {
                if (positions.size() != ids.size() || sequences.size() != ids.size())
                    throw std::invalid_argument("ids, positions and sequences differ in length");
                nb::gil_scoped_release release;
                e.run({ids.data(), positions.data(), sequences.data(),
                       static_cast<int64_t>(ids.size()), tables.data(),
                       static_cast<int64_t>(tables.shape(0)), static_cast<int64_t>(tables.shape(1)),
                       static_cast<int64_t>(tables.shape(2))});
            },
            "ids"_a, "positions"_a, "sequences"_a, "tables"_a)
        .def(
            "head",
            [](Executor& e, Ids rows, const std::vector<std::pair<int32_t, float>>& keep) {
                std::vector<Keep> kept;
                for (const auto& [count, span] : keep) kept.push_back({count, span});
                if (!kept.empty() && kept.size() != rows.size())
                    throw std::invalid_argument("what is kept is not one a row");
                nb::gil_scoped_release release;
                e.head(rows.data(), static_cast<int64_t>(rows.size()),
                       kept.empty() ? nullptr : kept.data());
            },
            "rows"_a, "keep"_a = std::vector<std::pair<int32_t, float>>(),
            "keep: how many of a row's largest logits count, within what of the largest.")
        .def_prop_ro(
            "planes",
            [](const Executor& e) {
                const Executor::Planes planes = e.planes();
                return std::make_tuple(planes.calls, planes.read, planes.bytes);
            },
            "Calls of `head` with `keep`, bytes they read of the lower plane, and its bytes.")
        .def(
            "view",
            [](nb::handle_t<Executor> self, Slot source, int64_t rows, int64_t cols) {
                const Executor& e = *nb::inst_ptr<Executor>(self);
                // In this order no product overflows.
                if (source.first < 0 || source.first % 4 || source.second % 4 || rows < 0 ||
                    cols < 0 || source.second > e.arena_bytes() || cols > source.second / 4 ||
                    (source.second && rows > e.arena_bytes() / source.second) ||
                    source.first > e.arena_bytes() - rows * source.second)
                    throw std::invalid_argument("view lies outside the arena");
                return View(e.arena() + source.first,
                            {static_cast<size_t>(rows), static_cast<size_t>(cols)}, self,
                            {source.second / 4, 1});
            },
            "source"_a, "rows"_a, "cols"_a,
            "Float rows of the arena as a read-only array; the next step overwrites them.")
        .def(
            "vector",
            [](nb::handle_t<Executor> self, int64_t offset, int64_t count) {
                if (count < 0 || count > std::numeric_limits<int64_t>::max() / 4)
                    throw std::invalid_argument("a vector is out of range");
                const float* values = vector_at(*nb::inst_ptr<Executor>(self), offset, count);
                return Vector(values, {static_cast<size_t>(count)}, self);
            },
            "offset"_a, "count"_a, "A float vector among the weights, read-only.")
        .def(
            "kv_block",
            [](nb::handle_t<Executor> self, int64_t group, int64_t block) {
                Executor& e = *nb::inst_ptr<Executor>(self);
                const KvRows planes = e.kv_block(group, block);
                return Block(planes.data,
                             {static_cast<size_t>(planes.count), static_cast<size_t>(planes.bytes)},
                             self, {planes.stride, 1});
            },
            "group"_a, "block"_a,
            "The bytes of a KV block, a row of each plane; to be read and written between steps "
            "only.");
    bind_experts(executor);
}
