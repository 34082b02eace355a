// A zeroed memory region on transparent huge pages where the system gives them.
#pragma once
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <cstring>
#include <new>
#include <utility>

namespace pronk {

class Region {
  public:
    // What `populate` and `clear` take at once.
    static constexpr int64_t kPiece = int64_t(2) << 20;

    Region() = default;
    explicit Region(int64_t bytes) : bytes_(bytes) {
        if (bytes == 0) return;
        const int64_t page = sysconf(_SC_PAGESIZE), whole = (bytes + page - 1) / page * page;
        const bool huge = whole >= kPiece;
        const int64_t extra = huge ? kPiece : 0;
        void* p = mmap(nullptr, static_cast<size_t>(whole + extra), PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (p == MAP_FAILED) throw std::bad_alloc();
        data_ = static_cast<uint8_t*>(p);
        if (!huge) return;
        // Begins where a huge page may; what lies around it is given back, so that no huge page
        // reaches past the end.
        const int64_t before =
            (kPiece - static_cast<int64_t>(reinterpret_cast<uintptr_t>(p) % kPiece)) % kPiece;
        if (before) munmap(data_, static_cast<size_t>(before));
        data_ += before;
        if (extra > before) munmap(data_ + whole, static_cast<size_t>(extra - before));
#if defined(MADV_HUGEPAGE)
        madvise(data_, static_cast<size_t>(whole), MADV_HUGEPAGE);
#endif
    }
    Region(Region&& other) noexcept { swap(other); }
    Region& operator=(Region&& other) noexcept {
        swap(other);
        return *this;
    }
    ~Region() {
        if (data_) munmap(data_, static_cast<size_t>(bytes_));
    }
    uint8_t* data() const { return data_; }
    int64_t size() const { return bytes_; }

    int64_t pieces() const { return (bytes_ + kPiece - 1) / kPiece; }
    // Makes a piece resident, so that a budget is paid at load and never exceeded later; threads
    // may take pieces side by side. False if memory ran out.
    bool populate(int64_t piece) const {
        uint8_t* start = data_ + piece * kPiece;
        const int64_t rest = bytes_ - piece * kPiece, count = rest < kPiece ? rest : kPiece;
#if defined(MADV_POPULATE_WRITE)
        if (madvise(start, static_cast<size_t>(count), MADV_POPULATE_WRITE) == 0) return true;
        if (errno == ENOMEM) return false;
#endif
        for (int64_t i = 0; i < count; i += 4096) *static_cast<volatile uint8_t*>(start + i) = 0;
        return true;
    }
    // Zeros everywhere again.
    void clear() const {
#if defined(__linux__)
        if (data_) madvise(data_, static_cast<size_t>(bytes_), MADV_DONTNEED);
#else
        if (data_) std::memset(data_, 0, static_cast<size_t>(bytes_));
#endif
    }

  private:
    void swap(Region& other) {
        std::swap(data_, other.data_);
        std::swap(bytes_, other.bytes_);
    }
    uint8_t* data_ = nullptr;
    int64_t bytes_ = 0;
};

}  // namespace pronk
