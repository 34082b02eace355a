// What the machine is and what it can do at best.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>
#if defined(__GLIBC__)
#include <malloc.h>
#endif

#include <algorithm>
#include <atomic>
#include <chrono>

#include "../kernels/kernels.h"
#include "../region.h"
#include "../team.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace pronk;

namespace {

double seconds_since(std::chrono::steady_clock::time_point start) {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// A region as weights lie in one, every page of it there.
Region touched(int64_t bytes) {
    Region region(bytes);
    for (int64_t i = 0; i < bytes; i += 4096) region.data()[i] = 1;
    return region;
}

}  // namespace

void bind_device(nb::module_& m) {
    m.def(
        "isa",
        [](const std::string& name) { return std::string(select_kernels(name.c_str()).name); },
        "name"_a = "", "The ISA whose kernels run: the best, or the one named.");
    m.def(
        "read_bandwidth",
        [](int64_t bytes, int threads, const std::string& isa, int passes) {
            if (bytes < 1 || threads < 1 || threads > 1024 || passes < 1)
                throw std::invalid_argument("bytes, threads and passes must be positive");
            nb::gil_scoped_release release;
            const Kernels& kernels = select_kernels(isa.c_str());
            const Region region = touched(bytes);
            Team team(threads);
            const int64_t chunk = 1 << 20;
            double best = 0;
            for (int pass = 0; pass < passes; ++pass) {
                std::atomic<int64_t> next{0};
                std::atomic<uint64_t> sum{0};
                const auto start = std::chrono::steady_clock::now();
                team.run([&] {
                    for (int64_t i; (i = next.fetch_add(chunk)) < bytes;)
                        sum += kernels.read(region.data() + i, std::min(chunk, bytes - i));
                });
                best = std::max(best, static_cast<double>(bytes) / seconds_since(start));
            }
            return best;
        },
        "bytes"_a, "threads"_a, "isa"_a = "", "passes"_a = 1,
        "Bytes per second of reading memory, the best of several passes.");
    m.def(
        "int8_peak",
        [](int64_t rounds, int threads, const std::string& isa) {
            if (rounds < 1 || threads < 1 || threads > 1024)
                throw std::invalid_argument("rounds and threads must be positive");
            nb::gil_scoped_release release;
            const Kernels& kernels = select_kernels(isa.c_str());
            Team team(threads);
            std::atomic<int64_t> ops{0};
            const auto start = std::chrono::steady_clock::now();
            team.run([&] {
                uint8_t sink[4];
                ops += static_cast<int64_t>(kernels.peak(rounds, sink));
            });
            return static_cast<double>(ops.load()) / seconds_since(start);
        },
        "rounds"_a, "threads"_a, "isa"_a = "", "int8 multiply and add operations per second.");
    nb::class_<Region>(m, "Region", "Memory as weights get it, every page of it there.")
        .def("__init__",
             [](Region* self, int64_t bytes) {
                 if (bytes < 1) throw std::invalid_argument("bytes must be positive");
                 new (self) Region(touched(bytes));
             })
        .def_prop_ro("address",
                     [](const Region& r) { return reinterpret_cast<uintptr_t>(r.data()); })
        .def_prop_ro("bytes", &Region::size);
    m.def(
        "trim",
        [] {
#if defined(__GLIBC__)
            malloc_trim(0);
#endif
        },
        "Gives freed heap memory back to the system.");
}
