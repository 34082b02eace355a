// A zeroed memory region: on transparent huge pages where the system gives them, or resident
// from the start, so that a budget is paid at load and never exceeded later.
#pragma once
#include <sys/mman.h>

#include <cstdint>
#include <new>
#include <utility>

namespace pronk {

class Region {
  public:
    Region() = default;
    enum class Pages { huge, resident };
    explicit Region(int64_t bytes, Pages pages = Pages::huge) : bytes_(bytes) {
        if (bytes == 0) return;
        void* p =
            mmap(nullptr, static_cast<size_t>(bytes), PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | (pages == Pages::resident ? populate : 0), -1, 0);
        if (p == MAP_FAILED) throw std::bad_alloc();
        data_ = static_cast<uint8_t*>(p);
#if defined(MADV_HUGEPAGE)
        if (pages == Pages::huge) madvise(p, static_cast<size_t>(bytes), MADV_HUGEPAGE);
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

  private:
#if defined(MAP_POPULATE)
    static constexpr int populate = MAP_POPULATE;
#else
    static constexpr int populate = 0;
#endif
    void swap(Region& other) {
        std::swap(data_, other.data_);
        std::swap(bytes_, other.bytes_);
    }
    uint8_t* data_ = nullptr;
    int64_t bytes_ = 0;
};

}  // namespace pronk
