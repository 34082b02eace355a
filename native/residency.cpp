#include "residency.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <string>

#include "file.h"
#include "hash.h"

namespace pronk {

namespace {

// Uses are halved when experts have been chosen so often, on average.
constexpr int64_t kMemory = 16;

}  // namespace

Residency::Residency(uint8_t* memory, int64_t slot_bytes, int64_t slots, int64_t sets,
                     int64_t experts)
    : memory_(memory), slot_bytes_(slot_bytes), sets_(sets), experts_(experts) {
    slots_.resize(static_cast<size_t>(slots));
    places_.assign(static_cast<size_t>(sets * experts), -1);
    uses_.assign(static_cast<size_t>(sets * experts), 0);
    missing_.reserve(static_cast<size_t>(experts));
}

Residency::~Residency() {
    if (fd_ >= 0) close(fd_);
}

void Residency::open(int fd, std::vector<Piece> pieces) {
    const size_t all = places_.size();
    if (opened()) throw std::invalid_argument("the file of experts is open already");
    if (pieces.empty() || pieces.size() % all)
        throw std::invalid_argument("experts have different numbers of pieces");
    const size_t each = pieces.size() / all;
    for (size_t i = 0, at = 0; i < pieces.size(); ++i) {
        const Piece& piece = pieces[i];
        if (i % each == 0) at = 0;
        if (piece.at < 0 || piece.bytes < 1 ||
            piece.bytes > slot_bytes_ - static_cast<int64_t>(at) || piece.bytes % 64)
            throw std::invalid_argument("an expert does not fit its slot");
        at += static_cast<size_t>(piece.bytes);
    }
    fd_ = fcntl(fd, F_DUPFD_CLOEXEC, 0);
    if (fd_ < 0) throw std::invalid_argument("the file of experts is not open");
    pieces_ = std::move(pieces);
    pieces_each_ = static_cast<int64_t>(each);
    // The budget is paid here, not while tokens wait.
    for (int64_t at = 0; at < slots() * slot_bytes_; at += 4096)
        *static_cast<volatile uint8_t*>(memory_ + at) = 0;
}

void Residency::age(int64_t chosen) {
    chosen_ += chosen;
    if (chosen_ < kMemory * sets_ * experts_) return;
    chosen_ = 0;
    for (uint32_t& uses : uses_) uses /= 2;
}

int64_t Residency::vacate(int64_t set) const {
    int64_t best = -1, best_far = 0;
    uint32_t best_uses = 0;
    for (int64_t i = 0; i < slots(); ++i) {
        const Slot& slot = slots_[static_cast<size_t>(i)];
        if (slot.expert < 0) return i;
        if (slot.needed == calls_) continue;
        const uint32_t uses = uses_[static_cast<size_t>(slot.set * experts_ + slot.expert)];
        const int64_t ahead = slot.set - set - 1, far = ahead < 0 ? ahead + sets_ : ahead;
        if (best < 0 || uses < best_uses || (uses == best_uses && far > best_far))
            best = i, best_uses = uses, best_far = far;
    }
    return best;
}

void Residency::admit(int64_t set, PlanEntry* plan) {
    const int32_t active = plan[0].active;
    const size_t first = static_cast<size_t>(set * experts_);
    ++calls_;
    missing_.clear();
    int64_t chosen = 0;
    for (int32_t i = 0; i < active; ++i) {
        PlanEntry& entry = plan[i];
        const size_t id = first + static_cast<size_t>(entry.expert);
        uses_[id] += static_cast<uint32_t>(entry.count);
        chosen += entry.count;
        entry.place = places_[id];
        if (entry.place < 0) continue;
        slots_[static_cast<size_t>(entry.place)].needed = calls_;
        ++counters_.hits;
    }
    for (int32_t i = 0; i < active; ++i) {
        PlanEntry& entry = plan[i];
        if (entry.place >= 0) continue;
        const int64_t id = static_cast<int64_t>(first) + entry.expert, place = vacate(set);
        Slot& slot = slots_[static_cast<size_t>(place)];
        if (slot.expert >= 0) places_[static_cast<size_t>(slot.set * experts_ + slot.expert)] = -1;
        slot = {static_cast<int32_t>(set), entry.expert, calls_};
        entry.place = places_[static_cast<size_t>(id)] = static_cast<int32_t>(place);
        missing_.push_back({id, place});
        ++counters_.misses;
        for (int64_t p = 0; p < pieces_each_; ++p)
            counters_.bytes +=
                static_cast<uint64_t>(pieces_[static_cast<size_t>(id * pieces_each_ + p)].bytes);
    }
    age(chosen);
}

void Residency::read(int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
        const Missing& one = missing_[static_cast<size_t>(i / pieces_each_)];
        const Piece* const pieces = pieces_.data() + one.id * pieces_each_;
        const int64_t which = i % pieces_each_;
        uint8_t* target = memory_ + one.slot * slot_bytes_;
        for (int64_t p = 0; p < which; ++p) target += pieces[p].bytes;
        const Piece& piece = pieces[which];
        Failure failure = none;
        if (!read_all(fd_, target, piece.bytes, piece.at)) {
            failure = errno ? system : short_file;
            error_ = errno;
        } else if (xxh64(target, piece.bytes) != piece.sum) {
            failure = damaged;
        }
        if (failure == none) continue;
        // The step goes on to its end, on numbers that do no harm.
        std::memset(target, 0, static_cast<size_t>(piece.bytes));
        failure_ = failure;
    }
}

void Residency::check() {
    const int failure = failure_.exchange(none);
    if (failure == none) return;
    for (Slot& slot : slots_) slot = {};
    places_.assign(places_.size(), -1);
    throw ExpertReadError(failure == short_file ? "the file has become shorter"
                          : failure == damaged  ? "their sum is another"
                                                : std::strerror(error_));
}

std::vector<int64_t> Residency::held() const {
    std::vector<int64_t> ids;
    for (const Slot& slot : slots_)
        ids.push_back(slot.expert < 0 ? -1 : slot.set * experts_ + slot.expert);
    return ids;
}

}  // namespace pronk
