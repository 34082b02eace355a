// A one-layer model run by the executor: the same bits on any number of threads and however its
// tokens are batched; and every argument that could reach outside a region refused.
#include "../executor.h"

#include <algorithm>
#include <functional>
#include <stdexcept>

#include "blocks.h"

namespace pronk::test {

namespace {

constexpr int64_t kHidden = 256, kMlp = 768, kVocab = 50, kTokens = 40, kHeads = 4, kKvHeads = 2,
                  kDim = 16, kAttention = kHeads * kDim, kQkv = (kHeads + 2 * kKvHeads) * kDim,
                  kLayer = 2 * kKvHeads * kBlock * kDim * 2;
constexpr int64_t kWeightBytes = 1 << 22, kArenaBytes = 1 << 20;
constexpr Limits kLimits{kTokens, 4, 2, 3, kVocab};
constexpr Precision kF32 = Precision::f32, kA8 = Precision::a8, kA12 = Precision::a12;
const KvShape kKv{kKvHeads, kDim, KvType::bf16, {{kLayer, 6, {0, false, 0}}}};

class Model {
  public:
    Model(const Kernels& kernels, int threads)
        : executor(threads, kernels.name, kWeightBytes, kArenaBytes, kLimits, kKv),
          kernels_(kernels),
          random_(11) {
        const Ref x = space(kHidden), y = space(kHidden), table = space(kDim), qkv = space(kQkv),
                  heads = space(kHidden);
        const Ref gate_up = space(2 * kMlp), act = space(kMlp), last = space(kHidden);
        const Ref up{gate_up.offset + kMlp * 4, gate_up.stride};
        const MatmulPart embedding = weights(Format::q6_k, kVocab, kHidden, 0);
        logits = space(round_up(kVocab, kPanel));

        Op embed = op(OpKind::embed, {}, x, kHidden);
        embed.parts = {embedding}, embed.scale = 3;
        executor.add(embed);
        Op angles = op(OpKind::rope_table, {}, table, kDim);
        angles.vector = vector(kDim / 2), angles.scalar = 1;
        executor.add(angles);
        executor.chain();
        norm(x, act, kA12, false);
        executor.chain();
        matmul(act,
               {weights(Format::q4_k, kAttention, kHidden, 0),
                weights(Format::q8_0, 2 * kKvHeads * kDim, kHidden, kAttention)},
               kHidden, {}, qkv, kA12, false);
        Op store = op(OpKind::rope_store, qkv, {}, 0);
        store.b = table, store.heads = kHeads;
        executor.add(store);
        Op attention = op(OpKind::attention_parts, qkv, heads, 0);
        attention.b = space(kHeads * (kDim + kPartTail));
        attention.heads = kHeads, attention.attend = {0.25f};
        executor.add(attention);
        attention.kind = OpKind::attention;
        executor.add(attention);
        executor.add(op(OpKind::quantize, heads, act, kAttention, kA12));
        matmul(act, {weights(Format::q5_1, kHidden, kAttention, 0)}, kAttention, x, y, kA12, false);
        norm(y, heads, kF32, false);
        matmul(heads,
               {weights(Format::f16, kMlp, kHidden, 0), weights(Format::bf16, kMlp, kHidden, kMlp)},
               kHidden, {}, gate_up, kF32, false);
        Op gelu = op(OpKind::activate, gate_up, act, kMlp, kA8);
        gelu.fn = Activation::gelu_tanh, gelu.b = up;
        executor.add(gelu);
        matmul(act, {weights(Format::q5_k, kHidden, kMlp, 0)}, kMlp, y, x, kA8, false);
        matmul(act, {weights(Format::q4_0, kHidden, kMlp, 0)}, kMlp, {}, heads, kA8, false);
        Op post = op(OpKind::rms_norm, heads, y, kHidden);
        post.vector = vector(kHidden), post.scalar = 1e-5f, post.b = x;
        executor.add(post);
        Op centered = op(OpKind::layer_norm, y, heads, kHidden);
        centered.vector = vector(kHidden), centered.scalar = 1e-5f;
        executor.add(centered);
        executor.chain();
        Op sum = op(OpKind::add, x, x, kHidden);
        sum.b = heads;
        executor.add(sum);
        executor.chain();
        Op gather = op(OpKind::gather, x, last, kHidden);
        gather.head = true;
        executor.add(gather);
        norm(last, act, kA12, true);
        executor.chain();
        matmul(act, {embedding}, kHidden, {}, logits, kA12, true);
        Op cap = op(OpKind::softcap, logits, logits, kVocab);
        cap.scalar = 2, cap.head = true;
        executor.add(cap);
    }

    // Logits of the given rows after running `count` tokens of the list from `first`.
    std::vector<float> run(const std::vector<int32_t>& ids, const std::vector<int32_t>& positions,
                           const std::vector<int32_t>& sequences, int64_t first, int64_t count,
                           std::vector<int32_t> rows) {
        static const int32_t tables[] = {4, 1, 5, 0, 2, 3};
        executor.run({ids.data() + first, positions.data() + first, sequences.data() + first, count,
                      tables, 1, 2, 3});
        executor.head(rows.data(), static_cast<int64_t>(rows.size()));
        std::vector<float> out(rows.size() * kVocab);
        for (size_t i = 0; i < rows.size(); ++i)
            std::memcpy(&out[i * kVocab],
                        executor.arena() + logits.offset + int64_t(i) * logits.stride, kVocab * 4);
        return out;
    }

    static Op op(OpKind kind, Ref a, Ref out, int64_t cols, Precision precision = Precision::f32) {
        Op result{};
        result.kind = kind, result.a = a, result.out = out, result.cols = cols,
        result.precision = precision;
        result.grain = 3;
        return result;
    }
    Ref space(int64_t floats) {  // wide enough for the row quantized too, in whole blocks
        const Ref ref{arena_, round_up(floats * 4, 64)};
        arena_ += ref.stride * round_up(kTokens, kActRows);
        return ref;
    }
    MatmulPart weights(Format format, int64_t rows, int64_t cols, int32_t column) {
        const Weights w(kernels_, format, rows, cols, Fill::random, random_);
        std::vector<uint8_t> source = w.source;
        const int64_t bytes = packed_bytes(format, rows, cols), stride = row_bytes(format, cols);
        executor.pack(format, weight_, rows, cols, 0, rows - 5, source.data(), (rows - 5) * stride);
        executor.pack(format, weight_, rows, cols, rows - 5, 5, source.data() + (rows - 5) * stride,
                      5 * stride);
        const MatmulPart part{executor.weight(weight_, bytes), format, static_cast<int32_t>(rows),
                              column, nullptr};
        weight_ += round_up(bytes, 64);
        return part;
    }
    const float* vector(int64_t count) {
        std::vector<float> values;
        for (int64_t i = 0; i < count; ++i) values.push_back(random_.uniform());
        executor.write(weight_, values.data(), count);
        const uint8_t* at = executor.weight(weight_, count * 4);
        weight_ += round_up(count * 4, 64);
        return reinterpret_cast<const float*>(at);
    }

    Executor executor;
    Ref logits;

  private:
    void norm(Ref x, Ref out, Precision precision, bool head) {
        Op n = op(OpKind::rms_norm, x, out, kHidden, precision);
        n.vector = vector(kHidden), n.scalar = 1e-5f, n.head = head;
        executor.add(n);
    }
    void matmul(Ref x, std::vector<MatmulPart> parts, int64_t cols, Ref residual, Ref out,
                Precision precision, bool head) {
        Op m = op(OpKind::matmul, x, out, cols, precision);
        m.b = residual, m.parts = std::move(parts), m.head = head;
        executor.add(m);
    }
    const Kernels& kernels_;
    Random random_;
    int64_t arena_ = 0, weight_ = 0;
};

void throws(const Kernels& kernels, const char* what, const std::function<void()>& call) {
    bool thrown = false;
    try {
        call();
    } catch (const std::invalid_argument&) {
        thrown = true;
    }
    check(thrown, "%s executor accepts %s", kernels.name, what);
}

void test_same_bits(const Kernels& kernels) {
    std::vector<int32_t> ids, positions, sequences;
    for (int32_t p = 0; p < 35; ++p)
        ids.push_back(p * 7 % kVocab), positions.push_back(p), sequences.push_back(0);
    for (int32_t p = 0; p < 5; ++p)
        ids.push_back(p + 3), positions.push_back(p), sequences.push_back(1);
    std::vector<float> want;
    for (const int threads : {1, 2, 3}) {
        Model model(kernels, threads);
        const std::vector<float> got = model.run(ids, positions, sequences, 0, 40, {39, 34, 0});
        if (want.empty()) want = got;
        bool finite = true;
        for (float f : got) finite &= std::isfinite(f);
        check(finite, "%s executor: logits are not finite", kernels.name);
        const auto [low, high] = std::minmax_element(got.begin(), got.end());
        check(*low < -0.5f && *low >= -2 && *high > 0.5f && *high <= 2,
              "%s executor: logits between %g and %g are not capped", kernels.name, *low, *high);
        check(same(got.data(), want.data(), int64_t(got.size()) * 4),
              "%s executor: %d threads differ from one", kernels.name, threads);
        // In chunks, and each sequence by itself.
        model.run(ids, positions, sequences, 0, 9, {0});
        model.run(ids, positions, sequences, 9, 25, {0});
        const std::vector<float> cut = model.run(ids, positions, sequences, 34, 1, {0});
        check(same(cut.data(), want.data() + kVocab, kVocab * 4),
              "%s executor: a chunked prompt differs on %d threads", kernels.name, threads);
        const std::vector<float> other = model.run(ids, positions, sequences, 35, 5, {4});
        check(same(other.data(), want.data(), kVocab * 4),
              "%s executor: a sequence by itself differs on %d threads", kernels.name, threads);
    }
}

void test_refusals(const Kernels& kernels) {
    Model model(kernels, 1);
    Executor& e = model.executor;
    const Ref row{0, kHidden * 4};
    const int64_t big = int64_t(1) << 62;
    const auto refuse = [&](const char* what, Op op) { throws(kernels, what, [&] { e.add(op); }); };
    const auto head = [](Op op) {  // the model ends in head ops: what follows must be one
        op.head = true;
        return op;
    };
    const auto norm = [&](Ref a, Ref out, int64_t cols) {
        return head(Model::op(OpKind::rms_norm, a, out, cols));
    };
    refuse("an input past the arena", norm({kArenaBytes - 64, 256}, row, kHidden));
    refuse("a misaligned input", norm({4, 256}, row, kHidden));
    refuse("a misaligned stride", norm({0, 258}, row, kHidden));
    refuse("a stride under the row", norm({0, 128}, row, kHidden));
    refuse("a stride that overflows", norm({0, big}, row, kHidden));
    refuse("an offset that overflows", norm({INT64_MAX - 63, 256}, row, kHidden));
    refuse("a negative offset", norm({-64, 256}, row, kHidden));
    refuse("a missing input", norm({}, row, kHidden));
    refuse("an output past the arena", norm(row, {kArenaBytes, 256}, kHidden));
    refuse("a row of 33", norm(row, row, 33));
    refuse("a negative row", norm(row, row, -32));
    refuse("a row that overflows", norm(row, row, big));
    refuse("a body op after the head", Model::op(OpKind::add, row, row, kHidden));
    refuse("an add without its second input", head(Model::op(OpKind::add, row, row, kHidden)));
    refuse("a matmul without weights", head(Model::op(OpKind::matmul, row, row, kHidden)));
    refuse("attention in the head", head(Model::op(OpKind::attention, row, row, 0)));
    refuse("an embedding in the head", head(Model::op(OpKind::embed, row, row, kHidden)));
    throws(kernels, "a chain to an op that is split by columns", [&] { e.chain(); });
    throws(kernels, "a chain to nothing",
           [&] { Executor(1, kernels.name, 64, 64, kLimits, kKv).chain(); });
    Op second = norm(row, row, kHidden);
    second.b = {kArenaBytes, 256};
    refuse("a norm's residual past the arena", second);
    second.b = row, second.precision = kA12;
    refuse("a norm with a residual, quantized", second);
    second.kind = OpKind::activate, second.b = {kArenaBytes, 256};
    refuse("an activation's second input past the arena", second);
    Op cap = head(Model::op(OpKind::softcap, row, row, kHidden));
    refuse("no cap", cap);
    cap.scalar = NAN;
    refuse("a cap that is no number", cap);
    cap.scalar = 1, cap.cols = kHidden - 8, cap.a.stride = cap.cols * 4;
    refuse("capped rows of half a panel", cap);
    Op odd = norm(row, row, kHidden);
    odd.grain = 0;
    refuse("no grain", odd);
    odd.grain = 1, odd.precision = kA12;
    for (const OpKind kind : {OpKind::gather, OpKind::add}) {
        odd.kind = kind, odd.b = row;
        refuse("floats alone, quantized", odd);
    }
    // Four rows are quantized in a block of sixteen.
    const Ref end{kArenaBytes - 8 * kHidden * 4, kHidden * 4};
    Op half = norm(row, end, kHidden);
    e.add(half);
    half.precision = kA12;
    refuse("quantized rows in half a block", half);

    const auto matmul = [&](const char* what, Format format, int64_t cols, Precision precision,
                            Ref residual, Ref out) {
        Op op = head(Model::op(OpKind::matmul, row, out, cols, precision));
        op.b = residual, op.parts = {{nullptr, format, 16, 0, nullptr}};
        refuse(what, op);
    };
    const Ref out{1 << 16, kHidden * 4};
    matmul("grouped weights on floats", Format::q4_1, kHidden, kF32, {}, out);
    matmul("float weights on integers", Format::f16, kHidden, kA12, {}, out);
    matmul("a row of half a block", Format::q4_k, 128, kA12, {}, out);
    matmul("a product past the arena", Format::q4_k, kHidden, kA12, {}, {kArenaBytes, 64});
    // Sums of a long row wait in the output.
    matmul("a residual in the output", Format::q4_1, kHidden, kA12, out, out);
    matmul("a residual across the output", Format::q4_1, kHidden, kA12,
           {out.offset + 3 * out.stride, out.stride}, out);

    const auto body = [&](const char* what, const std::function<void(Op&)>& change) {
        Executor fresh(1, kernels.name, 1 << 12, 1 << 17, kLimits, kKv);
        Op op = Model::op(OpKind::attention, {0, kQkv * 4}, {1 << 16, kHidden * 4}, 0);
        op.heads = kHeads, op.b = op.a;
        fresh.add(op);
        change(op);
        throws(kernels, what, [&] { fresh.add(op); });
    };
    body("heads that do not divide", [](Op& op) { op.heads = 3; });
    body("heads that overflow", [&](Op& op) { op.heads = big; });
    body("no heads", [](Op& op) { op.heads = 0; });
    body("no room for parts", [](Op& op) { op.b = {}; });
    body("a layer past its block", [](Op& op) { op.layer = 64; });
    body("a negative layer", [](Op& op) { op.layer = -64; });
    body("a layer that overflows", [](Op& op) { op.layer = INT64_MAX - 63; });
    body("an unknown group", [](Op& op) { op.group = 1; });
    body("a negative group", [](Op& op) { op.group = -1; });
    body("a soft cap below zero", [](Op& op) { op.attend.softcap = -1; });
    body("a soft cap that is none", [](Op& op) { op.attend.softcap = NAN; });
    body("queries that grow over no span", [](Op& op) { op.attend.growth_span = 0; });
    body("queries that grow without end", [](Op& op) { op.attend.growth = INFINITY; });
    body("a bias for some of the heads", [](Op& op) { op.slopes = {1, 2, 3}; });
    body("a bias without end", [](Op& op) { op.slopes = {1, 2, 3, INFINITY}; });
    const auto store = [](Op& op) { op.kind = OpKind::rope_store, op.out = {}; };
    body("a norm without weights", [&](Op& op) {
        store(op);
        op.norm = {HeadNorm::head, nullptr, nullptr, 1e-5f};
    });
    body("angles past the arena", [&](Op& op) {
        store(op);
        op.b = {(1 << 17) - 64, 64};
    });

    const std::vector<uint8_t> bytes(34 * 2 * 16);
    const auto pack = [&](const char* what, int64_t offset, int64_t total, int64_t cols,
                          int64_t row0, int64_t rows, int64_t size) {
        throws(kernels, what,
               [&] { e.pack(Format::q8_0, offset, total, cols, row0, rows, bytes.data(), size); });
    };
    pack("too few bytes", 0, 16, 64, 0, 16, 34 * 2 * 16 - 1);
    pack("rows past the matrix", 0, 16, 64, 1, 16, 34 * 2 * 16);
    pack("a row offset that overflows", 0, 16, 64, INT64_MAX, 16, 34 * 2 * 16);
    pack("a matrix past the region", kWeightBytes - 64, 16, 64, 0, 16, 34 * 2 * 16);
    pack("a matrix that overflows", 0, big, 64, 0, 16, 34 * 2 * 16);
    pack("columns that overflow", 0, 16, big, 0, 0, 0);
    pack("half a group", 0, 16, 48, 0, 0, 0);
    throws(kernels, "half a block of 256",
           [&] { e.pack(Format::q6_k, 0, 16, 128, 0, 0, bytes.data(), 0); });
    pack("a misaligned matrix", 4, 16, 64, 0, 16, 34 * 2 * 16);
    throws(kernels, "a vector past the region",
           [&] { e.write(kWeightBytes, reinterpret_cast<const float*>(bytes.data()), 1); });
    throws(kernels, "a weight that overflows", [&] { e.weight(64, INT64_MAX); });

    const auto step = [&](const char* what, int32_t id, int32_t position, int32_t sequence,
                          int64_t count, int32_t block, int64_t width) {
        const std::vector<int32_t> ids(kTokens + 1, id), positions(kTokens + 1, position),
            sequences(kTokens + 1, sequence), tables(6, block);
        throws(kernels, what, [&] {
            e.run({ids.data(), positions.data(), sequences.data(), count, tables.data(), 1, 2,
                   width});
        });
    };
    step("a token past the vocabulary", kVocab, 0, 0, 1, 0, 3);
    step("a negative token", -1, 0, 0, 1, 0, 3);
    step("a position past the table", 0, 96, 0, 1, 0, 3);
    step("a negative position", 0, -1, 0, 1, 0, 3);
    step("an unknown sequence", 0, 0, 2, 1, 0, 3);
    step("no tokens", 0, 0, 0, 0, 0, 3);
    step("too many tokens", 0, 0, 0, kTokens + 1, 0, 3);
    step("a block past the pool", 0, 0, 0, 1, 6, 3);
    step("a negative block", 0, 95, 1, 1, -1, 3);
    step("a table of another width", 0, 0, 0, 1, 0, 2);
    throws(kernels, "logits before a step", [&] {
        const int32_t first = 0;
        e.head(&first, 1);
    });
    throws(kernels, "limits that overflow", [&] {
        Limits limits = kLimits;
        limits.max_blocks = big;
        Executor(1, kernels.name, 64, 64, limits, kKv);
    });
    const auto pool = [&](const char* what, std::vector<KvGroup> groups) {
        throws(kernels, what, [&] {
            Executor(1, kernels.name, 64, 64, kLimits,
                     {kKvHeads, kDim, KvType::bf16, std::move(groups)});
        });
    };
    pool("no KV group", {});
    pool("blocks that overflow", {{kLayer, big, {0, false, 0}}});
    pool("a negative window", {{kLayer, 6, {-1, false, 0}}});
    pool("negative sinks", {{kLayer, 6, {8, false, -1}}});
    pool("chunks of no size", {{kLayer, 6, {0, true, 0}}});
    pool("a sum of pools that overflows",
         std::vector<KvGroup>(8, {kMaxSide - kMaxSide % 64, kMaxSide, {}}));
    throws(kernels, "an unknown ISA", [&] { Executor(1, "x87", 64, 64, kLimits, kKv); });
}

// Of the tables, what a group's tokens see must be blocks, and the rest is not looked at.
void test_tables(const Kernels& kernels) {
    constexpr int64_t blocks = 8, small = 4;
    const Limits limits{kTokens, 4, 2, blocks, kVocab};
    // All before a token; 40 positions of them, and 5 sinks; chunks of 48.
    const KvShape shape{kKvHeads,
                        kDim,
                        KvType::bf16,
                        {{kLayer, 2 * blocks, {0, false, 0}},
                         {kLayer, small, {40, false, 5}},
                         {kLayer, small, {48, true, 0}}}};
    Executor e(1, kernels.name, 1 << 16, 1 << 16, limits, shape);
    check(e.kv_bytes() == (2 * blocks + 2 * small) * kLayer, "%s executor: the sum of pools",
          kernels.name);
    Op op = Model::op(OpKind::add, {0, 256}, {1 << 14, 256}, 64);
    op.b = op.a;
    e.add(op);
    struct Range {
        int64_t group, first, last;
    };
    // Runs tokens first..last of sequence 1, of whose tables only the ranges are blocks.
    const auto run = [&](int64_t first, int64_t last, const std::vector<Range>& ranges) {
        std::vector<int32_t> tables(3 * 2 * blocks, -1), ids, positions, sequences;
        for (const Range& r : ranges)
            for (int64_t i = r.first; i <= r.last; ++i)
                tables[size_t((r.group * 2 + 1) * blocks + i)] = int32_t(i) % small;
        for (int64_t p = first; p <= last; ++p)
            ids.push_back(0), positions.push_back(int32_t(p)), sequences.push_back(1);
        e.run({ids.data(), positions.data(), sequences.data(), last - first + 1, tables.data(), 3,
               2, blocks});
    };
    const auto refuse = [&](const char* what, int64_t first, int64_t last,
                            const std::vector<Range>& ranges) {
        throws(kernels, what, [&] { run(first, last, ranges); });
    };
    // The window of 200 begins at 161, the chunk at 192.
    run(200, 200, {{0, 0, 6}, {1, 0, 0}, {1, 5, 6}, {2, 6, 6}});
    refuse("a block missing", 200, 200, {{0, 0, 2}, {0, 4, 6}, {1, 0, 0}, {1, 5, 6}, {2, 6, 6}});
    refuse("sinks missing", 200, 200, {{0, 0, 6}, {1, 5, 6}, {2, 6, 6}});
    refuse("half a window", 200, 200, {{0, 0, 6}, {1, 0, 0}, {1, 6, 6}, {2, 6, 6}});
    refuse("no chunk", 200, 200, {{0, 0, 6}, {1, 0, 0}, {1, 5, 6}, {2, 5, 5}});
    // The first token of several sees furthest: 147 and 144 here.
    run(186, 200, {{0, 0, 6}, {1, 0, 0}, {1, 4, 6}, {2, 4, 6}});
    refuse("a window of the last alone", 186, 200, {{0, 0, 6}, {1, 0, 0}, {1, 5, 6}, {2, 4, 6}});
    refuse("a chunk of the last alone", 186, 200, {{0, 0, 6}, {1, 0, 0}, {1, 4, 6}, {2, 6, 6}});
    run(0, 3, {{0, 0, 0}, {1, 0, 0}, {2, 0, 0}});
    // Another sequence between them ends a run of tokens.
    const std::vector<int32_t> ids(3), positions{200, 0, 230}, sequences{1, 0, 1};
    std::vector<int32_t> tables(3 * 2 * blocks, 0);
    e.run({ids.data(), positions.data(), sequences.data(), 3, tables.data(), 3, 2, blocks});
    std::fill(tables.begin() + 2 * blocks, tables.end(), small);
    throws(kernels, "a block past a smaller pool", [&] {
        e.run({ids.data(), positions.data(), sequences.data(), 3, tables.data(), 3, 2, blocks});
    });
    std::fill(tables.begin(), tables.end(), 0);
    throws(kernels, "tables of fewer groups", [&] {
        e.run({ids.data(), positions.data(), sequences.data(), 3, tables.data(), 2, 2, blocks});
    });
}

}  // namespace

void test_executor(const Kernels& kernels) {
    test_same_bits(kernels);
    test_refusals(kernels);
    test_tables(kernels);
}

}  // namespace pronk::test
