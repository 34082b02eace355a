// The native module: one binding file per topic.
#include <nanobind/nanobind.h>

namespace nb = nanobind;

void bind_executor(nb::module_& m);
void bind_device(nb::module_& m);
void bind_load(nb::module_& m);
void bind_pieces(nb::module_& m);

NB_MODULE(_native, m) {
    m.doc() = "Pronk's native core: packed weights, kernels per ISA, and the program executor.";
    bind_executor(m);
    bind_device(m);
    bind_load(m);
    bind_pieces(m);
}
