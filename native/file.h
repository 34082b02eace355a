// Whole reads and writes of a file at a place.
#pragma once
#include <unistd.h>

#include <cerrno>
#include <cstdint>

namespace pronk {

inline bool read_all(int fd, uint8_t* out, int64_t bytes, int64_t at) {
    while (bytes > 0) {
        const ssize_t got = pread(fd, out, static_cast<size_t>(bytes), static_cast<off_t>(at));
        if (got < 0 && errno == EINTR) continue;
        if (got == 0) errno = 0;  // the file ends here
        if (got <= 0) return false;
        out += got, at += got, bytes -= got;
    }
    return true;
}

inline bool write_all(int fd, const uint8_t* data, int64_t bytes, int64_t at) {
    while (bytes > 0) {
        const ssize_t put = pwrite(fd, data, static_cast<size_t>(bytes), static_cast<off_t>(at));
        if (put < 0 && errno == EINTR) continue;
        if (put <= 0) return false;
        data += put, at += put, bytes -= put;
    }
    return true;
}

}  // namespace pronk
