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

}  // namespace pronk::PRONK_NS
