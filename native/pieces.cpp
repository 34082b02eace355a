#include "pieces.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <map>
#include <queue>
#include <stdexcept>

#include "hash.h"

namespace pronk {
namespace {

constexpr std::string_view kSpace = "\xe2\x96\x81";  // U+2581, how pieces spell a space
constexpr size_t kMostBytes = 2048;                  // of a piece that can be joined
// A half-empty table of hashes that are no one's making needs some dozens.
constexpr size_t kMostProbes = 4096;

size_t char_bytes(char c) {
    const auto byte = static_cast<uint8_t>(c);
    return byte < 0x80 ? 1 : byte < 0xe0 ? 2 : byte < 0xf0 ? 3 : 4;
}

// The character that `text` begins with, or -1 if that is no UTF-8.
int32_t code_point(std::string_view text) {
    const auto lead = static_cast<uint8_t>(text[0]);
    if (lead < 0x80) return lead;
    if (lead < 0xc2 || lead > 0xf4) return -1;
    const size_t bytes = char_bytes(text[0]);
    if (bytes > text.size()) return -1;
    int32_t code = lead & (0xff >> (bytes + 1));
    for (size_t i = 1; i < bytes; ++i) {
        const auto byte = static_cast<uint8_t>(text[i]);
        if ((byte & 0xc0) != 0x80) return -1;
        code = code << 6 | (byte & 0x3f);
    }
    const int32_t least = bytes == 2 ? 0x80 : bytes == 3 ? 0x800 : 0x10000;
    if (code < least || code > 0x10ffff || (code >= 0xd800 && code < 0xe000)) return -1;
    return code;
}

bool is_utf8(std::string_view text) {
    for (size_t at = 0; at < text.size(); at += char_bytes(text[at]))
        if (code_point(text.substr(at)) < 0) return false;
    return true;
}

bool is_white(int32_t code) {
    return code == 0x20 || (code >= 9 && code <= 13) || code == 0x85 || code == 0xa0 ||
           code == 0x1680 || (code >= 0x2000 && code <= 0x200a) || code == 0x2028 ||
           code == 0x2029 || code == 0x202f || code == 0x205f || code == 0x3000;
}

std::string replaced(std::string_view text, std::string_view old, std::string_view with) {
    std::string out;
    size_t at = 0;
    for (size_t found; (found = text.find(old, at)) != text.npos; at = found + old.size()) {
        out.append(text, at, found - at);
        out.append(with);
    }
    return out.append(text, at);
}

uint64_t hash(std::string_view text) {
    return xxh64(reinterpret_cast<const uint8_t*>(text.data()), static_cast<int64_t>(text.size()));
}

}  // namespace

Pieces::Pieces(std::string_view raw, std::vector<float> scores, std::vector<PieceKind> kinds,
               const PieceOptions& options)
    : scores_(std::move(scores)),
      kinds_(std::move(kinds)),
      eat_(options.eat),
      unknown_(options.unknown),
      prefix_(options.prefix) {
    const size_t count = kinds_.size();
    if (scores_.size() != count || count > std::numeric_limits<int32_t>::max() / 4)
        throw std::invalid_argument("scores and kinds are not as many as pieces");
    if (raw.size() > std::numeric_limits<uint32_t>::max())
        throw std::invalid_argument("the pieces are too long");
    if (unknown_ < -1 || unknown_ >= static_cast<int64_t>(count))
        throw std::invalid_argument("there is no such unknown piece");
    if (!std::all_of(scores_.begin(), scores_.end(), [](float x) { return !std::isnan(x); }))
        throw std::invalid_argument("a score is no number");
    std::sort(eat_.begin(), eat_.end());
    starts_.reserve(count + 1);
    starts_.push_back(0);
    bytes_.reserve(raw.size() - std::min(raw.size(), 8 * count));
    for (size_t at = 0; starts_.size() <= count;) {
        uint64_t bytes = 0;
        if (raw.size() - at >= 8) std::memcpy(&bytes, raw.data() + at, 8);
        if (raw.size() - at < 8 || bytes > raw.size() - at - 8)
            throw std::invalid_argument("a piece runs past the end");
        const std::string_view text = raw.substr(at + 8, bytes);
        if (!is_utf8(text)) throw std::invalid_argument("a piece is no UTF-8");
        at += 8 + bytes;
        const PieceKind kind = kinds_[starts_.size() - 1];
        if (kind == PieceKind::normal || kind == PieceKind::unused) {
            if (bytes > kMostBytes)
                throw std::invalid_argument("a piece is " + std::to_string(bytes) + " bytes long");
            longest_ = std::max(longest_, static_cast<size_t>(bytes));
        }
        bytes_.append(text);
        starts_.push_back(static_cast<uint32_t>(bytes_.size()));
    }
    index();
    add();
}

std::string_view Pieces::piece(int32_t id) const {
    const auto at = static_cast<size_t>(id);
    return std::string_view(bytes_).substr(starts_[at], starts_[at + 1] - starts_[at]);
}

void Pieces::index() {
    size_t slots = 16;
    while (slots < 2 * size()) slots *= 2;
    slots_.assign(slots, -1);
    for (int32_t id = 0; id < static_cast<int32_t>(size()); ++id) {
        const std::string_view text = piece(id);
        size_t at = hash(text), probes = 0;
        for (; slots_[at & (slots - 1)] >= 0; ++at) {
            if (piece(slots_[at & (slots - 1)]) == text) {
                twice_ = id;
                return;
            }
            if (++probes > kMostProbes) throw std::invalid_argument("pieces are alike in bulk");
        }
        slots_[at & (slots - 1)] = id;
    }
    char name[8];
    for (int byte = 0; byte < 256; ++byte) {
        std::snprintf(name, sizeof name, "<0x%02X>", static_cast<unsigned>(byte));
        byte_[byte] = find(name);
    }
}

int32_t Pieces::find(std::string_view text) const {
    const size_t mask = slots_.size() - 1;
    for (size_t at = hash(text); slots_[at & mask] >= 0; ++at)
        if (piece(slots_[at & mask]) == text) return slots_[at & mask];
    return -1;
}

// A piece that characters can be joined to, or -1.
int32_t Pieces::joined(std::string_view text) const {
    if (text.size() > longest_) return -1;
    const int32_t id = find(text);
    if (id < 0) return -1;
    const PieceKind kind = kinds_[static_cast<size_t>(id)];
    return kind == PieceKind::normal || kind == PieceKind::unused ? id : -1;
}

// SentencePiece writes the runs of spaces that stand for themselves as it writes spaces in other
// pieces, llama.cpp's converter writes them as spaces: both are read.
void Pieces::add() {
    std::map<std::string, int32_t> found;
    for (int32_t id = 0; id < static_cast<int32_t>(size()); ++id) {
        const PieceKind kind = kinds_[static_cast<size_t>(id)];
        const bool user = kind == PieceKind::user;
        if (!user && kind != PieceKind::control && kind != PieceKind::unknown) continue;
        const std::string_view text = piece(id);
        if (text.empty()) continue;
        found[std::string(text)] = id;
        if (!user) continue;
        found.try_emplace(replaced(text, kSpace, " "), id);
        found.try_emplace(replaced(text, " ", kSpace), id);
    }
    added_.reserve(found.size());
    for (const auto& [text, id] : found) {
        added_.push_back({text, id});
        begins_[static_cast<uint8_t>(text[0])] = true;
    }
}

// The longest added piece that `text` begins with.
const Pieces::Added* Pieces::longest(std::string_view text, bool special) const {
    if (!begins_[static_cast<uint8_t>(text[0])]) return nullptr;
    const Added* best = nullptr;
    auto first = added_.begin(), last = added_.end();
    for (size_t i = 0; i < text.size() && first != last; ++i) {
        // All that are left begin with the same i bytes.
        if (first->text.size() == i) ++first;
        const auto byte = static_cast<uint8_t>(text[i]);
        const auto at = [i](const Added& a) { return static_cast<uint8_t>(a.text[i]); };
        first = std::partition_point(first, last, [&](const Added& a) { return at(a) < byte; });
        last = std::partition_point(first, last, [&](const Added& a) { return at(a) == byte; });
        if (first != last && first->text.size() == i + 1 &&
            (special || kinds_[static_cast<size_t>(first->id)] == PieceKind::user))
            best = &*first;
    }
    return best;
}

void Pieces::encode(std::string_view text, bool special, std::vector<int32_t>& out) const {
    if (!is_utf8(text)) throw std::invalid_argument("the text is no UTF-8");
    size_t begin = 0;
    for (size_t at = 0; at < text.size();) {
        const Added* added = longest(text.substr(at), special);
        if (!added) {
            at += char_bytes(text[at]);
            continue;
        }
        stretch(text.substr(begin, at - begin), out);
        out.push_back(added->id);
        at += added->text.size();
        if (std::binary_search(eat_.begin(), eat_.end(), added->id))
            while (at < text.size() && is_white(code_point(text.substr(at))))
                at += char_bytes(text[at]);
        begin = at;
    }
    stretch(text.substr(begin), out);
}

// Text without added pieces.
void Pieces::stretch(std::string_view plain, std::vector<int32_t>& out) const {
    if (plain.empty()) return;
    std::string text = prefix_ ? std::string(kSpace) : std::string();
    text += replaced(plain, " ", kSpace);
    const std::string_view all = text;

    struct Symbol {
        int64_t before, after;
        size_t begin, bytes;  // no bytes: it was joined to the one before
    };
    struct Pair {
        float score;
        int64_t left, right;
        size_t bytes;
        bool operator<(const Pair& other) const {
            return score < other.score || (score == other.score && left > other.left);
        }
    };
    std::vector<Symbol> symbols;
    for (size_t at = 0; at < all.size();) {
        const size_t bytes = char_bytes(all[at]);
        const auto i = static_cast<int64_t>(symbols.size());
        symbols.push_back({i - 1, i + 1, at, bytes});
        at += bytes;
    }
    symbols.back().after = -1;
    const auto symbol = [&](int64_t i) -> Symbol& { return symbols[static_cast<size_t>(i)]; };
    std::priority_queue<Pair> pairs;
    const auto consider = [&](int64_t left, int64_t right) {
        if (left < 0 || right < 0) return;
        const size_t bytes = symbol(left).bytes + symbol(right).bytes;
        const int32_t id = joined(all.substr(symbol(left).begin, bytes));
        if (id >= 0) pairs.push({scores_[static_cast<size_t>(id)], left, right, bytes});
    };
    for (int64_t i = 1; i < static_cast<int64_t>(symbols.size()); ++i) consider(i - 1, i);
    // How pieces came about that may be joined further, but not stand in a text.
    std::map<std::string_view, size_t> halves;
    while (!pairs.empty()) {
        const Pair pair = pairs.top();
        pairs.pop();
        Symbol &left = symbol(pair.left), &right = symbol(pair.right);
        if (!left.bytes || !right.bytes || left.bytes + right.bytes != pair.bytes) continue;
        const std::string_view whole = all.substr(left.begin, pair.bytes);
        if (kinds_[static_cast<size_t>(find(whole))] == PieceKind::unused)
            halves.try_emplace(whole, left.bytes);
        left.bytes = pair.bytes;
        left.after = right.after;
        right.bytes = 0;
        if (right.after >= 0) symbol(right.after).before = pair.left;
        consider(left.before, pair.left);
        consider(pair.left, left.after);
    }
    std::vector<std::string_view> parts;
    for (int64_t i = 0; i >= 0; i = symbol(i).after) {
        parts.push_back(all.substr(symbol(i).begin, symbol(i).bytes));
        while (!parts.empty()) {
            const std::string_view part = parts.back();
            parts.pop_back();
            const auto found = halves.find(part);
            if (found == halves.end()) {
                spell(part, out);
            } else {
                parts.push_back(part.substr(found->second));
                parts.push_back(part.substr(0, found->second));
            }
        }
    }
}

// A piece; or the bytes of a character that is none; or the unknown piece, once for several.
void Pieces::spell(std::string_view text, std::vector<int32_t>& out) const {
    if (const int32_t id = joined(text); id >= 0) {
        out.push_back(id);
        return;
    }
    const auto id_of = [this](char byte) { return byte_[static_cast<uint8_t>(byte)]; };
    if (std::all_of(text.begin(), text.end(), [&](char byte) { return id_of(byte) >= 0; })) {
        for (const char byte : text) out.push_back(id_of(byte));
    } else if (unknown_ < 0) {
        throw std::invalid_argument("no piece stands for a character of the text");
    } else if (out.empty() || out.back() != unknown_) {
        out.push_back(unknown_);
    }
}

}  // namespace pronk
