// Chooses the kernels at run time, so that one build serves every CPU of its architecture.
#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace pronk {

namespace {

#if defined(__x86_64__)
// Whether tiles may be used: the CPU has them, and the system lets this process (all threads that
// it starts from now on) keep their state.
bool has_tiles() {
#if defined(__linux__)
    constexpr unsigned amx = 1u << 22 | 1u << 24 | 1u << 25;  // bf16, tile, int8
    constexpr long request = 0x1023, tile_data = 18;          // ARCH_REQ_XCOMP_PERM
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & amx) != amx) return false;
    return syscall(SYS_arch_prctl, request, tile_data) == 0;
#else
    return false;
#endif
}
#endif

bool cpu_has(const char* name) {
#if defined(__x86_64__)
    if (!std::strcmp(name, "amx")) {
        static const bool tiles = has_tiles();
        return tiles && cpu_has("avx512_bf16");
    }
    if (!std::strcmp(name, "avx512_bf16"))
        return __builtin_cpu_supports("avx512bf16") && cpu_has("avx512");
    if (!std::strcmp(name, "avx512"))
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
               __builtin_cpu_supports("avx512vnni");
    if (!std::strcmp(name, "avx2"))
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
               __builtin_cpu_supports("f16c");
#endif
#if defined(__aarch64__) && defined(__linux__)
    // Not every ARMv8 has the dot product: a Cortex-A72 does not.
    if (!std::strcmp(name, "neon")) return getauxval(AT_HWCAP) & HWCAP_ASIMDDP;
#endif
    return !std::strcmp(name, "generic") || !std::strcmp(name, "neon");
}

}  // namespace

const Kernels& select_kernels(const char* name) {
    using Getter = const Kernels* (*)();
    static const Getter getters[] = {
#if defined(PRONK_HAVE_AMX)
        kernels_amx,
#endif
#if defined(PRONK_HAVE_AVX512_BF16)
        kernels_avx512_bf16,
#endif
#if defined(PRONK_HAVE_AVX512)
        kernels_avx512,
#endif
#if defined(PRONK_HAVE_AVX2)
        kernels_avx2,
#endif
#if defined(PRONK_HAVE_NEON)
        kernels_neon,
#endif
        kernels_generic,
    };
    if (!*name)
        if (const char* wanted = std::getenv("PRONK_ISA")) name = wanted;
    std::string known;
    for (Getter get : getters) {
        const Kernels* kernels = get();
        if (!cpu_has(kernels->name)) continue;
        if (!*name || !std::strcmp(name, kernels->name)) return *kernels;
        known += known.empty() ? kernels->name : std::string(", ") + kernels->name;
    }
    throw std::invalid_argument("PRONK_ISA is '" + std::string(name) +
                                "', but this build on this CPU has: " + known);
}

}  // namespace pronk
