// A mixture of experts: which rows go to which expert, worked out once a layer and step.
#pragma once
#include <vector>

#include "kernels/kernels.h"

namespace pronk {

constexpr int64_t kMaxExperts = 4096;  // of a layer

// Rows of the experts lie together in the order of the experts, those of one expert in the order
// of their tokens. An expert's rows start at a multiple of 16: quantized rows come in such blocks.
// The most there can be, for a step of so many tokens:
static inline int64_t expert_rows(int64_t tokens, int64_t choices, int64_t experts) {
    const int64_t pairs = tokens * choices;
    return pairs + (kActRows - 1) * (pairs < experts ? pairs : experts);
}

// An entry of the table in the arena. Three lists side by side, none longer than the rows.
struct alignas(64) PlanEntry {
    int32_t row;                   // of pair i (token * choices + choice); -1: no expert
    int32_t expert, start, count;  // i-th expert that has rows: those from `start` on
    int32_t place;                 // which one its weights are of those that lie in memory
    int32_t active;                // in entry 0: how many experts have rows
};

// Fills the table from routes (see Kernels::route); `scratch` holds an integer per expert, and
// `counts` gets what each was chosen.
void dispatch(Rows routes, int64_t tokens, int64_t choices, int64_t experts, PlanEntry* plan,
              int32_t* scratch, uint64_t* counts);

// Copies a row of floats, or of quantized activations between blocks.
void copy_row(Rows from, int64_t t, Rows to, int64_t row, int64_t cols, Precision precision);

}  // namespace pronk
