// A mixture of experts: which of them a token goes to, and the sum of what they give.
#pragma once
#include <cmath>
#include <limits>

#include "kernels.h"
#include "vec.h"

namespace pronk::PRONK_NS {

// In double precision, and every sum in the order of the experts: a threshold is met by the same
// experts on every ISA.
inline void route(Rows logits, const Routing& how, Rows out, int64_t first, int64_t last) {
    const auto key = [](float logit) {  // a NaN is chosen last
        return std::isnan(logit) ? -std::numeric_limits<float>::infinity() : logit;
    };
    for (int64_t t = first; t < last; ++t) {
        const float* row = logits.row<float>(t);
        float *ids = out.row<float>(t), *weights = ids + how.choices;
        double scores[kMaxRouted];
        int64_t chosen = -1;
        for (int64_t j = 0; j < how.choices; ++j) {  // the next in order: high logits, low ids
            int64_t best = -1;
            for (int64_t e = 0; e < how.experts; ++e) {
                const float k = key(row[e]);
                if (chosen >= 0 && (k > key(row[chosen]) || (k == key(row[chosen]) && e <= chosen)))
                    continue;
                if (best < 0 || k > key(row[best])) best = e;
            }
            chosen = best;
            ids[j] = static_cast<float>(chosen);
        }
        const double top = row[static_cast<int64_t>(ids[0])];
        const auto score = [&](int64_t e) {
            const double x = row[e];
            return how.softmax ? std::exp(x - top) : 1 / (1 + std::exp(-x));
        };
        double all = 1;
        if (how.threshold < 1 || (how.softmax && !how.normalize)) {
            all = 0;
            for (int64_t e = 0; e < how.experts; ++e) all += score(e);
        }
        int64_t count = how.choices;
        double sum = 0;
        for (int64_t j = 0; j < count; ++j) {
            scores[j] = score(static_cast<int64_t>(ids[j]));
            sum += scores[j];
            if (how.threshold < 1 && j + 1 >= how.least && sum >= how.threshold * all)
                count = j + 1;
        }
        const double scale = how.normalize ? 1 / sum : how.softmax ? 1 / all : 1;
        for (int64_t j = 0; j < how.choices; ++j) {
            weights[j] = j < count ? static_cast<float>(scores[j] * scale) : 0.0f;
            if (j >= count) ids[j] = -1;
        }
    }
}

inline void scale(Rows x, float factor, int64_t cols, int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) {
        float* row = x.row<float>(t);
        for (int64_t k = 0; k < cols; k += 16) store(row + k, mul(load(row + k), set(factor)));
    }
}

inline void combine(Rows y, const int32_t* rows, const float* weights, int64_t count, float factor,
                    const float* residual, int64_t cols, float* out) {
    for (int64_t k = 0; k < cols; k += 16) {
        F sum = set(0.0f);
        for (int64_t j = 0; j < count; ++j)
            sum = fma(set(weights[j]), load(y.row<float>(rows[j]) + k), sum);
        sum = mul(sum, set(factor));
        store(out + k, residual ? add(load(residual + k), sum) : sum);
    }
}

}  // namespace pronk::PRONK_NS
