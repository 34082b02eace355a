// Slots of experts: which one makes room, against the rule written plainly; what is read is what
// the file holds, and a file that has changed is told.
#include "../residency.h"

#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <map>
#include <memory>
#include <string>
#include <tuple>

#include "../hash.h"
#include "check.h"

namespace pronk::test {

namespace {

constexpr int64_t kSets = 3, kExperts = 10, kEach = 2, kSlotBytes = 512;
constexpr int64_t kSizes[kEach] = {192, 320};

class File {
  public:
    File() : file_(std::tmpfile()), bytes_(kSets * kExperts * kSlotBytes) {
        Random random(11);
        bytes_.fill(random);
        restore();
    }
    ~File() { std::fclose(file_); }
    File(const File&) = delete;
    File& operator=(const File&) = delete;
    int fd() const { return fileno(file_); }
    void restore() const { write(bytes_.data(), bytes_.size(), 0); }
    void write(const uint8_t* data, int64_t bytes, int64_t at) const {
        check(pwrite(fd(), data, static_cast<size_t>(bytes), at) == bytes, "a test file is short");
    }
    void cut(int64_t bytes) const { check(ftruncate(fd(), bytes) == 0, "no truncation"); }
    const uint8_t* at(int64_t place) const { return bytes_.data() + place; }
    // As matrices lie: the first pieces of all experts of a set, then the second ones.
    std::vector<Residency::Piece> pieces() const {
        std::vector<Residency::Piece> all;
        for (int64_t set = 0; set < kSets; ++set)
            for (int64_t e = 0; e < kExperts; ++e)
                for (int64_t p = 0; p < kEach; ++p) {
                    const int64_t place = set * kExperts * kSlotBytes +
                                          (p ? kExperts * kSizes[0] : 0) + e * kSizes[p];
                    all.push_back({place, kSizes[p], xxh64(at(place), kSizes[p])});
                }
        return all;
    }

  private:
    std::FILE* file_;
    Buffer bytes_;
};

struct Needed {
    int64_t set;
    std::vector<std::pair<int32_t, int32_t>> experts;  // and how many tokens went there
};

// Steps that go through the sets: mostly a few experts of some favourites, now and then nearly all.
std::vector<Needed> trace(int steps) {
    Random random(12);
    std::vector<Needed> all;
    for (int step = 0; step < steps; ++step)
        for (int64_t set = 0; set < kSets; ++set) {
            Needed now{set, {}};
            for (int32_t e = 0; e < kExperts; ++e) {
                const bool favourite = (e + set) % 5 == step / 40 % 5;
                const int chance = step % 20 == 7 ? 90 : favourite ? 60 : 8;
                if (random.below(100) < chance)
                    now.experts.push_back({e, step % 20 == 7 ? 1 + random.below(4) : 1});
            }
            if (now.experts.empty()) now.experts.push_back({3, 1});
            all.push_back(std::move(now));
        }
    return all;
}

void admit(Residency& residency, const Needed& now, std::vector<PlanEntry>& plan) {
    for (size_t i = 0; i < now.experts.size(); ++i)
        plan[i].expert = now.experts[i].first, plan[i].count = now.experts[i].second;
    plan[0].active = static_cast<int32_t>(now.experts.size());
    residency.admit(now.set, plan.data());
}

// The rule, plainly: a map of what is held, and sorted candidates.
class Plain {
  public:
    explicit Plain(int64_t slots) : held_(static_cast<size_t>(slots), -1) {}
    void admit(const Needed& now) {
        int64_t chosen = 0;
        std::vector<int64_t> wanted, missing;
        for (const auto& [expert, count] : now.experts) {
            wanted.push_back(now.set * kExperts + expert);
            uses_[wanted.back()] += count;
            chosen += count;
            const bool here = std::find(held_.begin(), held_.end(), wanted.back()) != held_.end();
            ++(here ? hits : misses);
            if (!here) missing.push_back(wanted.back());
        }
        for (const int64_t id : missing) {
            std::vector<std::tuple<int64_t, int64_t, int64_t>> room;  // uses, -distance, slot
            for (int64_t i = 0; i < static_cast<int64_t>(held_.size()); ++i) {
                const int64_t holds = held_[static_cast<size_t>(i)];
                if (holds < 0) {
                    room.push_back({-1, 0, i});
                } else if (std::find(wanted.begin(), wanted.end(), holds) == wanted.end()) {
                    const int64_t turns = (holds / kExperts - now.set + kSets - 1) % kSets;
                    room.push_back({uses_[holds], -turns, i});
                }
            }
            held_[static_cast<size_t>(std::get<2>(*std::min_element(room.begin(), room.end())))] =
                id;
        }
        since_ += chosen;
        if (since_ < 16 * kSets * kExperts) return;
        since_ = 0;
        for (auto& [id, uses] : uses_) uses /= 2;
    }
    const std::vector<int64_t>& held() const { return held_; }
    uint64_t hits = 0, misses = 0;

  private:
    std::vector<int64_t> held_;
    std::map<int64_t, int64_t> uses_;
    int64_t since_ = 0;
};

void test_rule(const File& file, int64_t slots) {
    const Buffer memory(slots * kSlotBytes);
    Residency residency(memory.data(), kSlotBytes, slots, kSets, kExperts);
    residency.open(file.fd(), file.pieces());
    Plain plain(slots);
    std::vector<PlanEntry> plan(kExperts);
    for (const Needed& now : trace(200)) {
        plain.admit(now);
        admit(residency, now, plan);
        check(residency.held() == plain.held(), "%lld slots: another expert makes room",
              static_cast<long long>(slots));
        // Two threads would take these in any order.
        const int64_t half = residency.reads() / 2;
        residency.read(half, residency.reads());
        residency.read(0, half);
        residency.check();
        for (size_t i = 0; i < now.experts.size(); ++i) {
            const uint8_t* slot = memory.data() + plan[i].place * kSlotBytes;
            const int64_t set = now.set * kExperts * kSlotBytes, e = now.experts[i].first;
            check(same(slot, file.at(set + e * kSizes[0]), kSizes[0]) &&
                      same(slot + kSizes[0], file.at(set + kExperts * kSizes[0] + e * kSizes[1]),
                           kSizes[1]),
                  "a slot holds another expert than the table says");
        }
    }
    const Residency::Counters& counted = residency.counters();
    check(counted.hits == plain.hits && counted.misses == plain.misses &&
              counted.bytes == plain.misses * kSlotBytes,
          "hits and misses are miscounted");
    check(slots < kSets * kExperts || plain.misses == kSets * kExperts,
          "experts that all have room are read twice");
    residency.reset();
    check(residency.counters().misses == 0, "counts are not from zero");
}

// Reads two experts anew; gives what is said of them, or nothing if they are read.
std::string failure(Residency& residency) {
    std::vector<PlanEntry> plan(kExperts);
    admit(residency, {1, {{2, 1}, {5, 1}}}, plan);
    residency.read(0, residency.reads());
    try {
        residency.check();
    } catch (const ExpertReadError& error) {
        return error.what();
    }
    return "";
}

void test_failures(const File& file) {
    const Buffer memory(kExperts * kSlotBytes);
    const auto opened = [&] {
        auto made =
            std::make_unique<Residency>(memory.data(), kSlotBytes, kExperts, kSets, kExperts);
        made->open(file.fd(), file.pieces());
        return made;
    };
    const auto good = opened(), damaged = opened(), shorter = opened();
    check(failure(*good).empty(), "a good file is refused");
    const int64_t place = kExperts * kSlotBytes + 2 * kSizes[0] + 7;
    const uint8_t wrong = static_cast<uint8_t>(*file.at(place) ^ 4);
    file.write(&wrong, 1, place);
    check(failure(*good).empty(), "what is in memory is read again");
    check(failure(*damaged) == "their sum is another", "a changed byte is not told");
    bool zeros = true;
    for (int64_t i = 0; i < kSizes[0]; ++i) zeros &= memory.data()[i] == 0;
    check(zeros, "a damaged expert stays in memory");
    check(damaged->held() == std::vector<int64_t>(kExperts, -1), "after damage, experts stay");
    file.restore();
    file.cut(place);
    check(failure(*shorter) == "the file has become shorter", "a short file is not told");
    file.restore();
    check(failure(*shorter).empty() && failure(*damaged).empty(), "a mended file is refused");
}

void test_pieces(const File& file) {
    const Buffer memory(kExperts * kSlotBytes);
    const auto refuse = [&](const char* what, auto change, int fd) {
        Residency residency(memory.data(), kSlotBytes, kExperts, kSets, kExperts);
        std::vector<Residency::Piece> pieces = file.pieces();
        change(pieces);
        bool refused = false;
        try {
            residency.open(fd, std::move(pieces));
        } catch (const std::invalid_argument&) {
            refused = true;
        }
        check(refused && !residency.opened(), "%s is accepted", what);
    };
    const int fd = file.fd();
    refuse("no piece", [](auto& p) { p.clear(); }, fd);
    refuse("a missing piece", [](auto& p) { p.pop_back(); }, fd);
    refuse("a piece before the file", [](auto& p) { p[3].at = -1; }, fd);
    refuse("an empty piece", [](auto& p) { p[3].bytes = 0; }, fd);
    refuse("an odd piece", [](auto& p) { p[3].bytes = 100; }, fd);
    refuse("an expert larger than a slot", [](auto& p) { p[3].bytes = 384; }, fd);
    refuse("a closed file", [](auto&) {}, -1);
}

}  // namespace

void test_residency() {
    const File file;
    for (const int64_t slots : {10, 11, 17, 29, 30}) test_rule(file, slots);
    test_failures(file);
    test_pieces(file);
}

}  // namespace pronk::test
