// What bindings of ops share: places in the arena and weights as Python gives them.
#pragma once
#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include "../executor.h"

namespace pronk {

using Slot = std::pair<int64_t, int64_t>;
using Part = std::tuple<std::string, int64_t, int64_t, int64_t, int64_t>;

inline Ref at(const Slot& s) { return {s.first, s.second}; }

inline Activation parse_activation(const std::string& name) {
    if (name == "silu") return Activation::silu;
    if (name == "gelu") return Activation::gelu;
    if (name == "gelu_tanh") return Activation::gelu_tanh;
    if (name == "relu") return Activation::relu;
    throw std::invalid_argument("unknown activation: " + name);
}

inline MatmulPart make_part(const Executor& e, const Part& p, int64_t cols) {
    const auto& [format_name, offset, rows, column, bias] = p;
    const Format format = parse_format(format_name);
    if (rows <= 0 || cols <= 0 || column < 0 || column > kMaxSide || column % kPanel ||
        (is_grouped(format) && cols % kGroup))
        throw std::invalid_argument("matmul part has an impossible shape");
    MatmulPart part;
    part.weight = e.weight(offset, packed_bytes(format, rows, cols));
    part.format = format;
    part.rows = static_cast<int32_t>(rows);
    part.column = static_cast<int32_t>(column);
    part.bias = bias < 0
                    ? nullptr
                    : reinterpret_cast<const float*>(e.weight(bias, round_up(rows, kPanel) * 4));
    return part;
}

}  // namespace pronk

void bind_experts(nanobind::class_<pronk::Executor>& executor);
