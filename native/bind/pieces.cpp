// Pieces of SentencePiece models: from the strings of a header to ids, without an object for each.
#include "../pieces.h"

#include <nanobind/nanobind.h>
#include <nanobind/stl/vector.h>

#include <cstring>

namespace nb = nanobind;
using namespace nb::literals;
using namespace pronk;

namespace {

template <typename T>
std::vector<T> elements(const nb::bytes& raw) {
    if (raw.size() % sizeof(T)) throw std::invalid_argument("bytes of no whole elements");
    std::vector<T> out(raw.size() / sizeof(T));
    if (raw.size()) std::memcpy(out.data(), raw.c_str(), raw.size());
    return out;
}

int32_t checked(const Pieces& pieces, int64_t id) {
    if (id < 0 || id >= static_cast<int64_t>(pieces.size())) throw nb::index_error("no such piece");
    return static_cast<int32_t>(id);
}

}  // namespace

void bind_pieces(nb::module_& m) {
    nb::class_<Pieces>(m, "Pieces", "The pieces of a SentencePiece model of the BPE kind.")
        .def(
            "__init__",
            [](Pieces* self, const nb::bytes& raw, const nb::bytes& scores, const nb::bytes& kinds,
               bool prefix, int32_t unknown, const std::vector<int32_t>& eat) {
                new (self) Pieces({raw.c_str(), raw.size()}, elements<float>(scores),
                                  elements<PieceKind>(kinds), {prefix, unknown, eat});
            },
            "raw"_a, "scores"_a, "kinds"_a, "prefix"_a, "unknown"_a, "eat"_a,
            "From the strings of a GGUF array, float32 scores and a byte per kind; `eat` are those "
            "that take the white space behind them.")
        .def("__len__", &Pieces::size)
        .def_prop_ro("twice", &Pieces::twice, "A piece that is there before, or -1.")
        .def(
            "piece",
            [](const Pieces& self, int64_t id) {
                const std::string_view text = self.piece(checked(self, id));
                return nb::str(text.data(), text.size());
            },
            "id"_a, "The string of a piece.")
        .def(
            "kind",
            [](const Pieces& self, int64_t id) {
                return static_cast<int>(self.kind(checked(self, id)));
            },
            "id"_a, "The kind of a piece, as GGUF counts them.")
        .def(
            "score", [](const Pieces& self, int64_t id) { return self.score(checked(self, id)); },
            "id"_a, "The score of a piece: the best are joined first.")
        .def(
            "find",
            [](const Pieces& self, const nb::str& text) {
                Py_ssize_t bytes = 0;
                const char* data = PyUnicode_AsUTF8AndSize(text.ptr(), &bytes);
                if (!data) throw nb::python_error();
                return self.find({data, static_cast<size_t>(bytes)});
            },
            "text"_a, "The id of a piece, or -1.")
        .def(
            "encode",
            [](const Pieces& self, const nb::str& text, bool special) {
                Py_ssize_t bytes = 0;
                const char* data = PyUnicode_AsUTF8AndSize(text.ptr(), &bytes);
                if (!data) throw nb::python_error();
                std::vector<int32_t> ids;
                {
                    nb::gil_scoped_release release;
                    self.encode({data, static_cast<size_t>(bytes)}, special, ids);
                }
                return ids;
            },
            "text"_a, "special"_a, "Ids of a text; special pieces are read in it only if asked.");
}
