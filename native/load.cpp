// Weights from files into their region, on all threads: read a few panels, pack them, go on. A
// thread's buffers stay in its cache, and nothing larger is allocated.
#include <algorithm>
#include <cerrno>
#include <cstring>
#include <ctime>
#include <memory>
#include <stdexcept>

#include "executor.h"
#include "file.h"
#include "hash.h"

namespace pronk {

namespace {

constexpr int64_t kChunkBytes = 1 << 17;  // read at once

// Time on a processor, so that neither a slow disk nor other processes count.
double thread_seconds() {
    timespec now{};
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

// Rows 2i and 2i+1 of a head are rows i and i + half of it.
void part_pairs(const uint8_t* in, uint8_t* out, int64_t rows, int64_t pairs, int64_t bytes) {
    for (int64_t r = 0; r < rows; ++r) {
        const int64_t in_head = r % pairs;
        const int64_t to = r - in_head + in_head / 2 + (in_head % 2) * (pairs / 2);
        std::memcpy(out + to * bytes, in + r * bytes, static_cast<size_t>(bytes));
    }
}

bool is_vector(const Stored& s) { return s.rows == 1; }

int64_t stored_row_bytes(const Stored& s) { return row_bytes(s.format, s.cols); }

// Rows at once: whole panels, and whole heads where their rows change places.
int64_t step_of(const Stored& s) {
    const int64_t unit = s.pairs ? s.pairs : kPanel;
    return std::max<int64_t>(1, kChunkBytes / (unit * stored_row_bytes(s))) * unit;
}

struct Piece {
    int64_t matrix, row0;
};

}  // namespace

int64_t Executor::load(const std::vector<Stored>& stored, double& packing) {
    std::vector<Piece> pieces;
    int64_t most = 0;
    for (size_t i = 0; i < stored.size(); ++i) {
        const Stored& s = stored[i];
        const bool sides = s.rows > 0 && s.rows <= kMaxSide && s.cols > 0 && s.cols <= kMaxSide;
        if (!sides || s.at < 0 || s.pairs < 0 || s.pairs % kPanel ||
            (s.pairs && s.rows % s.pairs) || (is_vector(s) && s.format != Format::f32) ||
            s.cols % traits(s.format).block)
            throw std::invalid_argument("a matrix to load has an impossible shape");
        weight(s.offset, is_vector(s) ? s.cols * 4 : packed_bytes(s.format, s.rows, s.cols));
        if (is_vector(s)) {
            pieces.push_back({static_cast<int64_t>(i), 0});
            continue;
        }
        const int64_t step = step_of(s);
        for (int64_t row = 0; row < s.rows; row += step)
            pieces.push_back({static_cast<int64_t>(i), row});
        most = std::max(most, std::min(step, s.rows) * stored_row_bytes(s));
    }
    const int64_t threads = team_.size();
    const auto buffers =
        std::make_unique_for_overwrite<uint8_t[]>(static_cast<size_t>(2 * most * threads));
    std::atomic<int64_t> next{0}, seat{0}, failed{-1};
    std::vector<double> seconds(static_cast<size_t>(threads));
    team_.run([&] {
        const int64_t mine = seat.fetch_add(1);
        uint8_t* const read = buffers.get() + 2 * most * mine;
        double spent = 0;
        for (int64_t i; (i = next.fetch_add(1)) < static_cast<int64_t>(pieces.size());) {
            const Piece piece = pieces[static_cast<size_t>(i)];
            const Stored& s = stored[static_cast<size_t>(piece.matrix)];
            uint8_t* const target = weights_.data() + s.offset;
            const int64_t rows = std::min(step_of(s), s.rows - piece.row0);
            const int64_t bytes = stored_row_bytes(s);
            if (!read_all(s.fd, is_vector(s) ? target : read, rows * bytes,
                          s.at + piece.row0 * bytes)) {
                failed = piece.matrix;
                next = static_cast<int64_t>(pieces.size());
                break;
            }
            if (is_vector(s)) continue;
            const double start = thread_seconds();
            const uint8_t* source = read;
            if (s.pairs) {
                part_pairs(read, read + most, rows, s.pairs, bytes);
                source = read + most;
            }
            pack_rows(s.format, kernels_.bias8, source, piece.row0, rows, s.rows, s.cols, target);
            spent += thread_seconds() - start;
        }
        seconds[static_cast<size_t>(mine)] = spent;
    });
    packing = 0;
    for (double s : seconds) packing += s;
    return failed;
}

int Executor::save(int fd, const std::vector<Kept>& parts, std::vector<uint64_t>& sums) const {
    sums.clear();
    // On the caller's thread: the others may be in the middle of a step.
    for (const Kept& part : parts) {
        const uint8_t* data = weight(part.offset, part.bytes);
        sums.push_back(xxh64(data, part.bytes));
        if (!write_all(fd, data, part.bytes, part.at)) return errno ? errno : EIO;
    }
    return 0;
}

bool Executor::restore(int fd, const std::vector<Kept>& parts, const std::vector<uint64_t>& sums) {
    if (sums.size() != parts.size()) return false;
    for (const Kept& part : parts) weight(part.offset, part.bytes);
    const auto count = static_cast<int64_t>(parts.size());
    std::atomic<int64_t> next{0};
    std::atomic<bool> good{true};
    team_.run([&] {
        for (int64_t i; good && (i = next.fetch_add(1)) < count;) {
            const Kept& part = parts[static_cast<size_t>(i)];
            uint8_t* const data = weights_.data() + part.offset;
            if (!read_all(fd, data, part.bytes, part.at) ||
                xxh64(data, part.bytes) != sums[static_cast<size_t>(i)])
                good = false;
        }
    });
    if (!good) weights_.clear();
    return good;
}

}  // namespace pronk
