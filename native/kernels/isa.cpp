// Compiled once per ISA: every kernel over that ISA's vectors, behind one table.
#include "attention.h"
#include "bounded.h"
#include "elementwise.h"
#include "kernels.h"
#include "matmul.h"
#include "moe.h"
#include "probe.h"
#include "rope.h"

namespace pronk {

const Kernels* PRONK_KERNELS() {
    namespace ns = PRONK_NS;
    static const Kernels table = {
        PRONK_ISA_NAME,  ns::kBias8,          ns::matmul,         ns::rms_norm,
        ns::layer_norm,  ns::quantize,        ns::activate,       ns::softcap,
        ns::add_rows,    ns::embed,           ns::rope_table,     ns::rope_store,
        ns::attention,   ns::attention_parts, ns::attention_join, ns::route,
        ns::scale,       ns::combine,         ns::plan_bounds,    ns::bound,
        ns::exact_panel, ns::refine,          ns::read,           ns::peak,
    };
    return &table;
}

}  // namespace pronk
