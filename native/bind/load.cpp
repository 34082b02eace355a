// Weights from files; and the strings of a header, which are too many for an interpreter.
#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cerrno>
#include <cstring>
#include <string_view>

#include "../executor.h"
#include "../hash.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace pronk;

namespace {

using Matrix = std::tuple<std::string, int64_t, int64_t, int64_t, int, int64_t, int64_t>;

using KeptPart = std::tuple<int64_t, int64_t, int64_t>;

std::vector<Executor::Kept> kept_parts(const std::vector<KeptPart>& parts) {
    std::vector<Executor::Kept> kept;
    kept.reserve(parts.size());
    for (const auto& [offset, at, bytes] : parts) kept.push_back({offset, at, bytes});
    return kept;
}

// The next string of a GGUF array, a length of 8 bytes and its bytes, at `at`, which moves on.
std::string_view next_string(const nb::bytes& raw, size_t& at) {
    uint64_t bytes = 0;
    if (raw.size() - at >= 8) std::memcpy(&bytes, raw.c_str() + at, 8);
    if (raw.size() - at < 8 || bytes > raw.size() - at - 8)
        throw std::invalid_argument("a string runs past the end");
    at += 8 + bytes;
    return {raw.c_str() + at - bytes, bytes};
}

nb::object decode(std::string_view text) {
    PyObject* object =
        PyUnicode_DecodeUTF8(text.data(), static_cast<Py_ssize_t>(text.size()), nullptr);
    if (!object) throw nb::python_error();
    return nb::steal(object);
}

// Collections in the midst of making a hundred thousand objects find nothing.
class NoCollection {
  public:
    NoCollection() : was_(PyGC_Disable()) {}
    NoCollection(const NoCollection&) = delete;
    NoCollection& operator=(const NoCollection&) = delete;
    ~NoCollection() {
        if (was_) PyGC_Enable();
    }

  private:
    int was_;
};

nb::typed<nb::list, nb::str> read_strings(const nb::bytes& raw, size_t count) {
    const NoCollection guard;
    nb::typed<nb::list, nb::str> out;
    for (size_t i = 0, at = 0; i < count; ++i) out.append(decode(next_string(raw, at)));
    return out;
}

// Strings, and each one's place, the last of its kind.
nb::typed<nb::tuple, nb::typed<nb::list, nb::str>, nb::typed<nb::dict, nb::str, int>>
read_vocabulary(const nb::bytes& raw, size_t count) {
    const auto list = read_strings(raw, count);
    nb::typed<nb::dict, nb::str, int> places;
    for (size_t i = 0; i < count; ++i) places[list[i]] = i;
    return nb::make_tuple(list, places);
}

// As merges are written: two halves with a space between, of which the first is not empty.
nb::typed<nb::list, nb::typed<nb::tuple, nb::str, nb::str>> read_pairs(const nb::bytes& raw,
                                                                       size_t count) {
    const NoCollection guard;
    nb::typed<nb::list, nb::typed<nb::tuple, nb::str, nb::str>> out;
    for (size_t i = 0, at = 0; i < count; ++i) {
        const std::string_view text = next_string(raw, at);
        const size_t cut = text.find(' ', 1);
        if (cut == text.npos) throw nb::index_error(std::to_string(i).c_str());
        const nb::tuple pair =
            nb::make_tuple(decode(text.substr(0, cut)), decode(text.substr(cut + 1)));
        // It holds strings alone; the collector would find that out one by one.
        PyObject_GC_UnTrack(pair.ptr());
        out.append(pair);
    }
    return out;
}

}  // namespace

void bind_load(nb::module_& m) {
    m.attr("PACK_VERSION") = kPackVersion;
    m.def(
        "load_weights",
        [](Executor& e, const std::vector<Matrix>& matrices) {
            std::vector<Stored> stored;
            stored.reserve(matrices.size());
            for (const auto& [format, offset, rows, cols, fd, at, pairs] : matrices)
                stored.push_back({parse_format(format), offset, rows, cols, fd, at, pairs});
            nb::gil_scoped_release release;
            double packing = 0;
            const int64_t failed = e.load(stored, packing);
            return std::pair(failed, packing);
        },
        "executor"_a, "matrices"_a,
        "Reads and packs matrices (format, offset, rows, cols, fd, at, pairs); gives the index "
        "of one that its file does not hold, or -1, and the processor seconds of packing.");
    m.def(
        "save_weights",
        [](Executor& e, int fd, const std::vector<KeptPart>& parts) {
            int error = 0;
            std::vector<uint64_t> sums;
            const std::vector<Executor::Kept> kept = kept_parts(parts);
            {
                nb::gil_scoped_release release;
                error = e.save(fd, kept, sums);
            }
            if (error) {
                errno = error;
                PyErr_SetFromErrno(PyExc_OSError);
                throw nb::python_error();
            }
            return sums;
        },
        "executor"_a, "fd"_a, "parts"_a,
        "Writes parts of packed weights (offset, place in the file, bytes); gives their sums.");
    m.def(
        "restore_weights",
        [](Executor& e, int fd, const std::vector<KeptPart>& parts,
           const std::vector<uint64_t>& sums) {
            const std::vector<Executor::Kept> kept = kept_parts(parts);
            nb::gil_scoped_release release;
            return e.restore(fd, kept, sums);
        },
        "executor"_a, "fd"_a, "parts"_a, "sums"_a,
        "Reads parts that save_weights wrote; False, and no weights, if they are not those.");
    m.def(
        "xxh64",
        [](const nb::bytes& data) {
            return xxh64(reinterpret_cast<const uint8_t*>(data.c_str()),
                         static_cast<int64_t>(data.size()));
        },
        "data"_a, "XXH64 of some bytes.");
    m.def("read_strings", &read_strings, "raw"_a, "count"_a, "The strings of a GGUF array.");
    m.def("read_vocabulary", &read_vocabulary, "raw"_a, "count"_a,
          "The strings of a GGUF array, and the place of each.");
    m.def("read_pairs", &read_pairs, "raw"_a, "count"_a,
          "The strings of a GGUF array, each cut at its first space after the first byte; "
          "IndexError, with its index, if one has none.");
    m.def(
        "skip_strings",
        [](const nb::bytes& window, size_t at, uint64_t count, uint64_t end) {
            // A length may lead past the window, and past the end of the file.
            while (count && at <= window.size() && window.size() - at >= 8) {
                uint64_t bytes;
                std::memcpy(&bytes, window.c_str() + at, 8);
                if (bytes > end || at + 8 + bytes > end)
                    throw std::invalid_argument("past the end");
                at += 8 + bytes;
                --count;
            }
            return std::pair(at, count);
        },
        "window"_a, "at"_a, "count"_a, "end"_a,
        "Passes over strings of a GGUF array that begin in a window; gives where the next one "
        "begins and how many are left. `end` is the end of the file, counted from the window's.");
}
