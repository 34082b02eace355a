// A team of threads that walk one list of operations together.
#pragma once
#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

namespace pronk {

inline void cpu_pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

// Waits for a value to change: spins a number of times, then parks (a core at rest costs no power,
// and an oversubscribed machine gets its core back). Returns how long it was parked.
inline std::chrono::microseconds wait_change(const std::atomic<uint32_t>& value, uint32_t old,
                                             int spins) {
    using std::chrono::steady_clock;
    for (int i = 0; i < spins; ++i) {
        if (value.load(std::memory_order_acquire) != old) return {};
        cpu_pause();
    }
    const auto start = steady_clock::now();
    while (value.load(std::memory_order_acquire) == old) value.wait(old);
    return std::chrono::duration_cast<std::chrono::microseconds>(steady_clock::now() - start);
}

class Team {
  public:
    explicit Team(int size) : size_(size) {
        threads_.reserve(static_cast<size_t>(size));
        try {
            for (int i = 1; i < size; ++i) threads_.emplace_back([this] { work(); });
        } catch (const std::system_error&) {
            const size_t started = threads_.size() + 1;
            stop();  // a thread that is not joined would end the process
            throw std::invalid_argument("the system allows " + std::to_string(started) + " of " +
                                        std::to_string(size) + " threads: use fewer");
        }
    }
    Team(const Team&) = delete;
    Team& operator=(const Team&) = delete;
    ~Team() { stop(); }

    int size() const { return size_; }

    // Runs task on every thread, the caller included, and returns when all are done.
    void run(const std::function<void()>& task) {
        task_ = &task;
        start_.fetch_add(1, std::memory_order_release);
        start_.notify_all();
        task();
        barrier([] {});
    }

    // All threads of a running task meet here; the last to arrive first calls `last`.
    template <class Fn>
    void barrier(Fn last) {
        const uint32_t phase = phase_.load(std::memory_order_relaxed);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
            last();
            arrived_.store(0, std::memory_order_relaxed);
            phase_.store(phase + 1, std::memory_order_release);
            phase_.notify_all();
        } else {
            // A long wait inside a task means that a thread has lost its core to another process.
            // While that lasts, spinning only keeps the core it could run on.
            const int hurried = hurried_.load(std::memory_order_relaxed);
            const auto parked = wait_change(phase_, phase, hurried ? kFewSpins : kSpins);
            if (parked > kLong)
                hurried_.store(kHurriedWaits, std::memory_order_relaxed);
            else if (hurried)
                hurried_.store(hurried - 1, std::memory_order_relaxed);
        }
    }

  private:
    // Near a millisecond, for between steps there is work of up to half of one; some ten
    // microseconds; and how many waits the second lasts (a few tokens). A wait that is long takes a
    // scheduler's turn: what a neighbour or a host takes is shorter, and no reason to park.
    static constexpr int kSpins = 20000, kFewSpins = 200, kHurriedWaits = 3000;
    static constexpr std::chrono::microseconds kLong{2000};

    void stop() {
        task_ = nullptr;
        start_.fetch_add(1, std::memory_order_release);
        start_.notify_all();
        for (std::thread& t : threads_) t.join();
    }

    void work() {
        for (uint32_t seen = 0;;) {
            wait_change(start_, seen, kSpins);
            ++seen;
            if (!task_) return;
            (*task_)();
            barrier([] {});
        }
    }

    const int size_;
    const std::function<void()>* task_ = nullptr;
    alignas(64) std::atomic<uint32_t> start_{0};
    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<uint32_t> phase_{0};
    alignas(64) std::atomic<int> hurried_{0};  // waits left with few spins
    std::vector<std::thread> threads_;
};

}  // namespace pronk
