// Picks the 16-lane vectors of the ISA this file is compiled for, and what all share.
#pragma once
#if defined(PRONK_BUILD_AMX)
#define PRONK_AMX
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

}  // namespace pronk::PRONK_NS
