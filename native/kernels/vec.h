// Picks the 16-lane vectors of the ISA this file is compiled for, and what all share.
#pragma once
#if defined(PRONK_BUILD_AMX)
#define PRONK_AMX
#define PRONK_BF16
#include "vec_avx512.h"
#elif defined(PRONK_BUILD_AVX512_BF16)
#define PRONK_BF16
#include "vec_avx512.h"
#elif defined(PRONK_BUILD_AVX512)
#include "vec_avx512.h"
#elif defined(PRONK_BUILD_AVX2)
#include "vec_avx2.h"
#elif defined(PRONK_BUILD_NEON)
#include "vec_neon.h"
#else
#include "vec_generic.h"
#endif

namespace pronk::PRONK_NS {

constexpr int64_t kAhead = 2048;  // bytes of a stream asked for before they are needed

// Asks for memory that will be read soon; any address is harmless. Inlined always: GCC may take a
// function that only prefetches for one without effects and drop the call.
[[gnu::always_inline]] inline void prefetch(const uint8_t* p, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(p + i);
}

// e^x, relative error under 2e-7 (degree-6 minimax of Cephes' expf, after 2^n is split off).
inline F exp(F x) {
    x = min(set(88.0f), max(set(-87.0f), x));  // in this order a NaN stays a NaN on every ISA
    const F n = round(mul(x, set(1.44269504088896341f)));
    F r = fma(n, set(-0.693359375f), x);
    r = fma(n, set(2.12194440e-4f), r);
    F p = set(1.9875691500e-4f);
    p = fma(p, r, set(1.3981999507e-3f));
    p = fma(p, r, set(8.3334519073e-3f));
    p = fma(p, r, set(4.1665795894e-2f));
    p = fma(p, r, set(1.6666665459e-1f));
    p = fma(p, r, set(5.0000001201e-1f));
    p = fma(p, mul(r, r), add(r, set(1.0f)));
    return mul(p, exp2i(n));
}

// 2^x, from 2^-126 on and below 2^127, relative error under 1.1e-4 (degree 3) or 1e-7 (5): minimax
// polynomials of 2^(x - round(x)) that are 1 at 0.
template <int degree>
inline F exp2(F x) {
    x = max(set(-126.0f), x);  // a NaN stays a NaN
    const F n = round(x), r = sub(x, n);
    F p;
    if constexpr (degree == 3) {
        p = fma(set(5.5008929222e-2f), r, set(2.4221095442e-1f));
        p = fma(p, r, set(6.9328290224e-1f));
    } else {
        p = fma(set(1.3264727313e-3f), r, set(9.6715129912e-3f));
        p = fma(p, r, set(5.5507335812e-2f));
        p = fma(p, r, set(2.4022242427e-1f));
        p = fma(p, r, set(6.9314700365e-1f));
    }
    return scale2(fma(p, r, set(1.0f)), n);
}

// tanh, relative error under 5e-7: the odd rational function of Eigen's ptanh; 1 from 8 on.
inline F tanh(F x) {
    x = min(set(7.90531110763549805f), max(set(-7.90531110763549805f), x));  // a NaN stays a NaN
    const F s = mul(x, x);
    F p = set(-2.76076847742355e-16f);
    p = fma(p, s, set(2.00018790482477e-13f));
    p = fma(p, s, set(-8.60467152213735e-11f));
    p = fma(p, s, set(5.12229709037114e-08f));
    p = fma(p, s, set(1.48572235717979e-05f));
    p = fma(p, s, set(6.37261928875436e-04f));
    p = fma(p, s, set(4.89352455891786e-03f));
    F q = set(1.19825839466702e-06f);
    q = fma(q, s, set(1.18534705686654e-04f));
    q = fma(q, s, set(2.26843463243900e-03f));
    q = fma(q, s, set(4.89352518554385e-03f));
    return div(mul(x, p), q);
}

}  // namespace pronk::PRONK_NS
