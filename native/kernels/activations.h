// Functions of one value: what stands between the two halves of an MLP.
#pragma once
#include "kernels.h"
#include "vec.h"

namespace pronk::PRONK_NS {

// x / (1 + e^-y)
inline F times_sigmoid(F x, F y) {
    return mul(x, div(set(1.0f), add(set(1.0f), exp(sub(set(0.0f), y)))));
}

// The standard normal distribution above |x|: erfc(|x| / sqrt(2)) / 2, relative error under 1e-6
// where |x| < 5. Minimax polynomial of erfc(z) e^(z^2) in t = 1 / (1 + p z), the form of
// Abramowitz and Stegun 7.1.26 with three more terms.
inline F normal_tail(F x) {
    const F a = abs(x);
    const F t = div(set(1.0f), fma(set(0.23164188861846924f), a, set(1.0f)));
    F p = set(-0.07083120197057724f);
    p = fma(p, t, set(0.24943891167640686f));
    p = fma(p, t, set(-0.20479938387870789f));
    p = fma(p, t, set(0.22828027606010437f));
    p = fma(p, t, set(0.01185863371938467f));
    p = fma(p, t, set(0.10319875180721283f));
    p = fma(p, t, set(0.09032503515481949f));
    p = fma(p, t, set(0.09252903610467911f));
    return mul(mul(p, t), exp(mul(mul(a, a), set(-0.5f))));
}

template <Activation fn>
inline F activated(F x) {
    if constexpr (fn == Activation::silu) {
        return times_sigmoid(x, x);
    } else if constexpr (fn == Activation::gelu) {
        // x times the distribution below x: that is 1 less the tail where x is positive.
        return sub(max(set(0.0f), x), mul(abs(x), normal_tail(x)));
    } else if constexpr (fn == Activation::gelu_tanh) {
        // x / 2 * (1 + tanh(y)) = x * sigmoid(2 y), which is exact in the tail too
        const F cubic = fma(mul(x, x), set(0.044715f), set(1.0f));
        return times_sigmoid(x, mul(mul(x, cubic), set(1.5957691216057308f)));
    } else {
        return max(set(0.0f), x);
    }
}

}  // namespace pronk::PRONK_NS
