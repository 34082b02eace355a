// Texts cut into pieces as SentencePiece cuts them: against a plain search of all neighbours.
#include "../pieces.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "check.h"

namespace pronk::test {

namespace {

struct Entry {
    std::string text;
    float score;
    PieceKind kind;
};

std::string packed(const std::vector<Entry>& entries) {
    std::string raw;
    for (const Entry& entry : entries) {
        const uint64_t bytes = entry.text.size();
        raw.append(reinterpret_cast<const char*>(&bytes), 8);
        raw += entry.text;
    }
    return raw;
}

Pieces build(const std::vector<Entry>& entries, const PieceOptions& options = {}) {
    std::vector<float> scores;
    std::vector<PieceKind> kinds;
    for (const Entry& entry : entries) {
        scores.push_back(entry.score);
        kinds.push_back(entry.kind);
    }
    return {packed(entries), scores, kinds, options};
}

std::vector<int32_t> encode(const Pieces& pieces, std::string_view text, bool special = true) {
    std::vector<int32_t> out;
    pieces.encode(text, special, out);
    return out;
}

bool refused(auto&& action) {
    try {
        action();
    } catch (const std::invalid_argument&) {
        return true;
    }
    return false;
}

// Joins the best pair of neighbours, the first of equals, until none is left.
std::vector<int32_t> slowly(const std::vector<Entry>& entries, const std::string& text) {
    const auto find = [&](const std::string& piece) {
        const auto at = std::find_if(entries.begin(), entries.end(),
                                     [&](const Entry& e) { return e.text == piece; });
        return at == entries.end() ? -1 : static_cast<int32_t>(at - entries.begin());
    };
    std::vector<std::string> parts;
    for (const char c : text) parts.emplace_back(1, c);
    for (;;) {
        int32_t best = -1;
        size_t place = 0;
        for (size_t i = 1; i < parts.size(); ++i) {
            const int32_t id = find(parts[i - 1] + parts[i]);
            if (id < 0) continue;
            if (best < 0 ||
                entries[static_cast<size_t>(id)].score > entries[static_cast<size_t>(best)].score) {
                best = id;
                place = i;
            }
        }
        if (best < 0) break;
        parts[place - 1] += parts[place];
        parts.erase(parts.begin() + static_cast<std::ptrdiff_t>(place));
    }
    std::vector<int32_t> out;
    for (const std::string& part : parts) out.push_back(find(part));
    return out;
}

void random_words() {
    Random random(7);
    for (int round = 0; round < 50; ++round) {
        std::vector<Entry> entries;
        for (const char c : {'a', 'b', 'c'})
            entries.push_back({std::string(1, c), 0.0f, PieceKind::normal});
        for (int tries = 0; tries < 60; ++tries) {
            std::string text;
            for (int n = 2 + random.below(5); n; --n)
                text += static_cast<char>('a' + random.below(3));
            const bool there = std::any_of(entries.begin(), entries.end(),
                                           [&](const Entry& e) { return e.text == text; });
            // Some scores are equal.
            const auto score = static_cast<float>(-1 - random.below(40));
            if (!there) entries.push_back({text, score, PieceKind::normal});
        }
        const Pieces pieces = build(entries);
        for (int tries = 0; tries < 40; ++tries) {
            std::string text;
            for (int n = 1 + random.below(60); n; --n)
                text += static_cast<char>('a' + random.below(3));
            check(encode(pieces, text) == slowly(entries, text), "pieces of %s", text.c_str());
        }
    }
}

void kinds_of_pieces() {
    using enum PieceKind;
    std::vector<Entry> entries = {
        {"<unk>", 0, unknown},
        {"<s>", 0, control},
        {"\xe2\x96\x81", -9, normal},
        {"a", -1, normal},
        {"b", -2, normal},
        {"\xe2\x96\x81"
         "a",
         -3, normal},
        {"  ", 0, user},
        {"   ", 0, user},
        {"ab", -4, unused},
        {"aba", -5, normal},
        {"<s>>", 0, user},
        {"\n", 0, user},
    };
    const Pieces plain = build(entries, {false, 0, {}});
    using Ids = std::vector<int32_t>;
    check(encode(plain, "") == Ids{}, "no text, no pieces");
    check(encode(plain, "a a") == Ids{3, 5}, "a space is joined");
    check(encode(plain, "a    a") == Ids({3, 7, 5}), "the longest run of spaces, then one");
    check(encode(plain, "a \xe2\x96\x81\xe2\x96\x81\xe2\x96\x81") == Ids({3, 2, 7}),
          "a run as it is spelled");
    check(encode(plain, "a<s>b") == Ids({3, 1, 4}), "a special piece");
    check(encode(plain, "a<s>>b") == Ids({3, 10, 4}), "the longest added piece");
    check(encode(plain, "a<s>b", false) == Ids({3, 0, 4}), "a special piece spelled out");
    check(encode(plain, "ab") == Ids({3, 4}), "an unused piece is taken apart");
    check(encode(plain, "aba") == Ids{9}, "an unused piece leads to another");
    check(encode(plain,
                 "\xc3\xa9\xc3\xa9"
                 "b") == Ids({0, 4}),
          "unknown characters are one");
    check(encode(build(entries, {true, 0, {}}), "a<s>a") == Ids({5, 1, 5}), "a space before each");
    check(encode(build(entries, {false, 0, {1}}),
                 "a<s> \n\xc2\xa0"
                 "b") == Ids({3, 1, 4}),
          "white space is taken");
    check(refused([&] { encode(build(entries), "\xc3\xa9"); }), "nothing stands for it");
    check(refused([&] { encode(plain, "a\xff"); }), "a text that is no UTF-8");
    for (int byte = 0; byte < 256; ++byte) {
        char name[8];
        std::snprintf(name, sizeof name, "<0x%02X>", static_cast<unsigned>(byte));
        entries.push_back({name, 0, PieceKind::byte});
    }
    check(encode(build(entries), "a\xc3\xa9") == Ids({3, 12 + 0xc3, 12 + 0xa9}), "bytes instead");
}

void damage() {
    const std::vector<Entry> good = {{"a", 0, PieceKind::normal}, {"bc", 0, PieceKind::normal}};
    const std::string raw = packed(good);
    const std::vector<PieceKind> kinds(2, PieceKind::normal);
    const std::vector<float> scores(2, 0.0f);
    for (size_t bytes = 0; bytes < raw.size(); ++bytes) {
        const std::string cut(raw, 0, bytes);
        check(refused([&] { Pieces(cut, scores, kinds, {}); }), "cut after %zu bytes", bytes);
    }
    check(refused([&] { Pieces(raw, {0.0f}, kinds, {}); }), "a score for each");
    check(refused([&] { Pieces(raw, {0.0f, NAN}, kinds, {}); }), "scores that are numbers");
    check(refused([&] { Pieces(raw, scores, kinds, {false, 2, {}}); }),
          "an unknown piece there is");
    check(refused([&] { build({{"\xed\xa0\x80", 0, PieceKind::control}}); }), "a surrogate");
    check(refused([&] { build({{"\xc0\x80", 0, PieceKind::control}}); }), "an overlong form");
    check(refused([&] { build({{std::string(3000, 'a'), 0, PieceKind::normal}}); }), "too long");
    const std::vector<Entry> same(3, {"a", 0, PieceKind::normal});
    check(build(same).twice() == 1 && build(good).twice() == -1, "a piece that is there twice");
    check(build({}).size() == 0, "no pieces");
}

}  // namespace

void test_pieces() {
    random_words();
    kinds_of_pieces();
    damage();
}

}  // namespace pronk::test
