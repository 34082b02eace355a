// Tests every ISA that this build and this CPU have, or the one in PRONK_ISA.
#include <cstdlib>
#include <stdexcept>

#include "check.h"

using namespace pronk;
using namespace pronk::test;

namespace {

void test_isa(const Kernels& kernels) {
    struct Topic {
        const char* name;
        void (*run)(const Kernels&);
    };
    const Topic topics[] = {
        {"matmul", test_matmul},   {"rows", test_rows},         {"attention", test_attention},
        {"windows", test_windows}, {"executor", test_executor}, {"load", test_load},
        {"moe", test_moe},         {"bounded", test_bounded}};
    for (const Topic& topic : topics) {
        const int64_t before = passed, wrong = failed;
        topic.run(kernels);
        std::printf("%-8s %-10s %5lld passed, %lld failed\n", kernels.name, topic.name,
                    static_cast<long long>(passed - before),
                    static_cast<long long>(failed - wrong));
        std::fflush(stdout);
    }
}

}  // namespace

int main() {
    const char* wanted = std::getenv("PRONK_ISA");
    for (const char* name : {"amx", "avx512_bf16", "avx512", "avx2", "neon", "generic"}) {
        if (wanted && *wanted && std::strcmp(wanted, name)) continue;
        try {
            test_isa(select_kernels(name));
        } catch (const std::invalid_argument& error) {
            std::printf("%-8s skipped: %s\n", name, error.what());
        }
    }
    try {
        if (!wanted || !*wanted || !std::strcmp(wanted, "amx"))
            test_same_matmul(select_kernels("amx"), select_kernels("avx512"));
    } catch (const std::invalid_argument&) {
        std::printf("amx and avx512 are not both here to be compared\n");
    }
    check(passed > 0, "no ISA was tested");
    test_pieces();
    test_residency();
    std::printf("%lld passed, %lld failed\n", static_cast<long long>(passed),
                static_cast<long long>(failed));
    return failed != 0;
}
