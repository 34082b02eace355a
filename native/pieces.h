// The pieces of a SentencePiece model of the BPE kind, and texts cut into them. Joining takes no
// list of merges: neighbours join where what they spell is a piece, the best score first, so
// that the pieces' own bytes and one hash table are all there is in memory.
#pragma once
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace pronk {

enum class PieceKind : uint8_t { normal = 1, unknown, control, user, unused, byte };

struct PieceOptions {
    bool prefix = false;       // a space before each stretch of text
    int32_t unknown = -1;      // the piece for characters that have none, or -1
    std::vector<int32_t> eat;  // added pieces that take the white space behind them
};

class Pieces {
  public:
    // As GGUF keeps strings: a length of 8 bytes, then the bytes. Throws std::invalid_argument
    // where `raw` ends early, a score is no number, or a piece is no UTF-8 or too long.
    Pieces(std::string_view raw, std::vector<float> scores, std::vector<PieceKind> kinds,
           const PieceOptions& options);

    size_t size() const { return kinds_.size(); }
    std::string_view piece(int32_t id) const;  // an id in [0, size())
    PieceKind kind(int32_t id) const { return kinds_[static_cast<size_t>(id)]; }
    float score(int32_t id) const { return scores_[static_cast<size_t>(id)]; }
    int32_t find(std::string_view text) const;  // -1 if there is none
    int32_t twice() const { return twice_; }    // a piece that is there before, or -1

    // Appends the ids of a text of UTF-8. Pieces of the kind `user` stand wherever they are
    // spelled, those of the kinds `control` and `unknown` only if `special`. Throws
    // std::invalid_argument for a character that nothing stands for.
    void encode(std::string_view text, bool special, std::vector<int32_t>& out) const;

  private:
    struct Added {
        std::string text;
        int32_t id;
    };

    const Added* longest(std::string_view text, bool special) const;
    int32_t joined(std::string_view text) const;
    void stretch(std::string_view text, std::vector<int32_t>& out) const;
    void spell(std::string_view text, std::vector<int32_t>& out) const;
    void add();
    void index();

    std::string bytes_;
    std::vector<uint32_t> starts_;  // size() + 1 places in bytes_
    std::vector<float> scores_;
    std::vector<PieceKind> kinds_;
    std::vector<int32_t> slots_;  // open addressing, a power of two, half empty; -1 is free
    std::vector<Added> added_;    // sorted by bytes
    std::vector<int32_t> eat_;    // sorted
    bool begins_[256] = {};       // whether an added piece begins with a byte
    int32_t byte_[256];           // the piece of each byte, or -1
    size_t longest_ = 0;          // bytes of the longest piece that can be joined
    int32_t unknown_, twice_ = -1;
    bool prefix_;
};

}  // namespace pronk
