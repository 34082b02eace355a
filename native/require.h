// What is refused: std::invalid_argument, which Python sees as a ValueError.
#pragma once
#include <cstdint>
#include <stdexcept>
#include <string>

namespace pronk {

inline void require(bool ok, const char* what) {
    if (!ok) throw std::invalid_argument(what);
}

inline void require_range(const int32_t* values, int64_t count, int64_t limit, const char* what) {
    for (int64_t i = 0; i < count; ++i)
        if (values[i] < 0 || values[i] >= limit)
            throw std::invalid_argument(std::string(what) + " " + std::to_string(values[i]) +
                                        " is not in [0, " + std::to_string(limit) + ")");
}

}  // namespace pronk
