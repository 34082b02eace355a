// The ops of the executor that find the largest logits of a row.
#include <algorithm>
#include <array>
#include <cmath>
#include <functional>
#include <limits>

#include "executor.h"
#include "require.h"

namespace pronk {

namespace {

// The `size` largest of what is added, or as many as there were.
template <class T>
class Largest {
  public:
    explicit Largest(size_t size) : size_(size) {}
    void add(T x) {
        if (count_ < size_) {
            items_[count_++] = x;
            std::push_heap(items_.begin(), end(), std::greater<>());
        } else if (x > items_[0]) {
            std::pop_heap(items_.begin(), end(), std::greater<>());
            items_[count_ - 1] = x;
            std::push_heap(items_.begin(), end(), std::greater<>());
        }
    }
    bool full() const { return count_ == size_; }
    T least() const { return items_[0]; }
    const T* begin() const { return items_.data(); }
    T* end() { return items_.data() + count_; }

  private:
    size_t size_, count_ = 0;
    std::array<T, kMostKept> items_;
};

}  // namespace

void Executor::check_bounded(const Op& op) {
    require(op.head && op.parts.size() == 1 && is_quantized(op.precision) && op.cols % kGroup == 0,
            "bounds belong to the one product of a head");
    const MatmulPart& part = op.parts[0];
    require(part.format == Format::q8_planes && !part.bias && part.column == 0 && part.scale > 0 &&
                std::isfinite(part.scale),
            "bounds need weights in two planes, no bias and a positive scale");
    const int64_t rows = limits_.max_rows;
    check(op.a, round_up(rows, kActRows), act_row_bytes(op.cols, op.precision), "input of bounds");
    check(op.b, rows, BoundPlan::floats(part.rows, op.cols) * 4, "plan of bounds");
    check(op.out, rows, round_up(part.rows, kPanel) * 4, "logits");
    plane_bytes_ = packed_bytes(part.format, part.rows, op.cols) -
                   round_up(part.rows, kPanel) / kPanel * panel_bytes(part.format, op.cols);
}

void Executor::apply_bounded(const Op& op, const Step& step, int64_t first, int64_t last) const {
    const Rows x = rows(op.a), plan = rows(op.b), out = rows(op.out);
    const MatmulPart& part = op.parts[0];
    switch (op.kind) {
        case OpKind::plan_bounds:
            return kernels_.plan_bounds(x, op.precision, op.cols, plan, first, last);
        case OpKind::bound:
            return kernels_.bound(part, op.cols, x, op.precision, plan, out, step.count, first,
                                  last);
        case OpKind::lead:
            for (int64_t t = first; t < last; ++t) lead(op, step, t);
            return;
        default:
            plane_read_.fetch_add(
                kernels_.refine(part, op.cols, x, op.precision, plan, out, step.count, first, last),
                std::memory_order_relaxed);
    }
}

// The least logit of a row that counts: from the panels that have the largest ones, as the upper
// plane has them, multiplied exactly. They are among all, so what counts is no less.
void Executor::lead(const Op& op, const Step& step, int64_t row) const {
    MatmulPart part = op.parts[0];
    const BoundPlan plan(rows(op.b), row, op.cols);
    const Keep keep = step.keep[row];
    const auto wanted = static_cast<size_t>(std::max(keep.count, 1));
    using Peak = std::pair<float, int64_t>;
    Largest<Peak> panels(wanted);
    for (int64_t p = 0; p < round_up(part.rows, kPanel) / kPanel; ++p)
        panels.add({plan.peaks[p], p});
    Largest<float> logits(wanted);
    float top = -std::numeric_limits<float>::infinity();
    bool sound = true;
    for (const auto& [peak, p] : panels) {
        part.column = static_cast<int32_t>(kPanel - p * kPanel);  // into the plan's row
        kernels_.exact_panel(part, op.cols, rows(op.a), op.precision, rows(op.b), row, p);
        for (int64_t r = 0; r < std::min<int64_t>(kPanel, part.rows - p * kPanel); ++r) {
            sound &= std::isfinite(plan.panel[r]);
            if (sound) logits.add(plan.panel[r]), top = std::max(top, plan.panel[r]);
        }
    }
    constexpr float everything = -std::numeric_limits<float>::infinity();
    float threshold = keep.count && sound && logits.full() ? logits.least() : everything;
    if (sound && std::isfinite(keep.span)) {
        // A sampler's own roundings are not to miss what is within the span.
        const double span = static_cast<double>(keep.span) * 1.00001;
        const auto within = static_cast<float>(static_cast<double>(top) - span);
        threshold = std::max(threshold, std::nextafter(within, everything));
    }
    *plan.threshold = threshold;
}

}  // namespace pronk
