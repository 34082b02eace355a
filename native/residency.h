// Experts that lie in a file of packed weights, and have a slot in memory while they are hot.
//
// What an expert is worth is how often it was chosen lately, prompts and answers alike: a prompt,
// which needs nearly all experts of a layer once, pushes out none that many tokens went to. Among
// equals, the one whose layer's turn is the longest away makes room.
#pragma once
#include <atomic>
#include <cstdint>
#include <stdexcept>
#include <vector>

#include "experts.h"

namespace pronk {

struct ExpertReadError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

class Residency {
  public:
    // A piece of an expert, of one matrix; those of an expert lie in its slot one after the other.
    struct Piece {
        int64_t at, bytes;  // in the file
        uint64_t sum;
    };
    struct Counters {
        uint64_t hits = 0, misses = 0, bytes = 0;  // of experts that steps needed; bytes read
    };

    // `sets` of `experts` each: a set is what a layer chooses from. `memory` holds the slots.
    Residency(uint8_t* memory, int64_t slot_bytes, int64_t slots, int64_t sets, int64_t experts);
    Residency(const Residency&) = delete;
    Residency& operator=(const Residency&) = delete;
    ~Residency();

    uint8_t* memory() const { return memory_; }
    int64_t slot_bytes() const { return slot_bytes_; }
    int64_t slots() const { return static_cast<int64_t>(slots_.size()); }
    int64_t sets() const { return sets_; }
    int64_t experts() const { return experts_; }

    // The file, of which a descriptor of our own is kept, and its pieces [sets, experts, any].
    void open(int fd, std::vector<Piece> pieces);
    bool opened() const { return fd_ >= 0; }

    // Gives each expert that a step goes to its place, and keeps what has to be read; by one
    // thread. What the table names stays until the next call.
    void admit(int64_t set, PlanEntry* plan);
    // Reads of the last `admit`; any thread may take some.
    int64_t reads() const { return static_cast<int64_t>(missing_.size()) * pieces_each_; }
    void read(int64_t first, int64_t last);
    // Throws if a read has failed since the last call; then nothing is resident any more.
    void check();

    const Counters& counters() const { return counters_; }
    void reset() { counters_ = {}; }
    // The expert in each slot, set * experts + expert, or -1.
    std::vector<int64_t> held() const;

  private:
    struct Slot {
        int32_t set = -1, expert = -1;
        uint64_t needed = 0;  // in this call of `admit`, last
    };
    struct Missing {
        int64_t id, slot;
    };
    int64_t vacate(int64_t set) const;
    void age(int64_t chosen);

    uint8_t* memory_;
    int64_t slot_bytes_, sets_, experts_, pieces_each_ = 0;
    int fd_ = -1;
    std::vector<Piece> pieces_;
    std::vector<Slot> slots_;
    std::vector<int32_t> places_;  // slot of each expert, or -1
    std::vector<uint32_t> uses_;   // of each expert, halved as time goes by
    std::vector<Missing> missing_;
    uint64_t calls_ = 0;
    int64_t chosen_ = 0;  // since uses were halved
    Counters counters_;
    enum Failure { none, short_file, damaged, system };
    std::atomic<int> failure_{none}, error_{0};
};

}  // namespace pronk
