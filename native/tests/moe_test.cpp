// Experts: how they are chosen, where their rows go, what comes back; and ops that would reach
// outside the arena refused.
#include <algorithm>
#include <cstdio>
#include <numeric>
#include <stdexcept>

#include "../executor.h"
#include "blocks.h"

namespace pronk::test {

namespace {

struct Routed {
    std::vector<int> ids;
    std::vector<double> weights;
};

// What `route` means, the plain way: a sorted list, and sums in its order.
Routed expected(const float* logits, const Routing& how) {
    std::vector<int> order(static_cast<size_t>(how.experts));
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(),
                     [&](int a, int b) { return logits[a] > logits[b]; });
    std::vector<double> scores;
    double all = 0, sum = 0;
    for (int64_t e = 0; e < how.experts; ++e) {
        const double x = logits[e], top = logits[order[0]];
        scores.push_back(how.softmax ? std::exp(x - top) : 1 / (1 + std::exp(-x)));
        all += scores.back();
    }
    Routed result;
    for (int64_t j = 0; j < how.choices; ++j) {
        const int e = order[static_cast<size_t>(j)];
        const bool enough = j >= how.least && how.threshold < 1 && sum >= how.threshold * all;
        result.ids.push_back(enough ? -1 : e);
        result.weights.push_back(enough ? 0 : scores[static_cast<size_t>(e)]);
        sum += result.weights.back();
    }
    for (double& w : result.weights) w /= how.normalize ? sum : how.softmax ? all : 1;
    return result;
}

void test_route(const Kernels& kernels) {
    Random random(5);
    constexpr int64_t rows = 9;
    for (const int64_t experts : {2, 8, 33, 128})
        for (const int64_t choices : {int64_t(1), int64_t(2), std::min<int64_t>(experts, 8)})
            for (int bits = 0; bits < 8; ++bits) {
                const double threshold = bits & 4 ? 0.4 : 1.0;
                const Routing how{experts,        choices,   bool(bits & 1),
                                  bool(bits & 2), threshold, std::min<int64_t>(choices, 2)};
                const int64_t stride = round_up(experts * 4, 64);
                const Buffer logits(rows * stride), out(rows * (choices * 8 + 64));
                logits.fill(random, 4);
                for (int64_t t = 0; t < rows; t += 2)  // ties
                    for (int64_t e = 0; e < experts; ++e) {
                        float& x = logits.floats()[t * stride / 4 + e];
                        x = std::round(x);
                    }
                const Rows to{out.data(), choices * 8 + 64};
                kernels.route({logits.data(), stride}, how, to, 4, rows);
                kernels.route({logits.data(), stride}, how, to, 0, 4);
                bool same_ids = true;
                double worst = 0;
                for (int64_t t = 0; t < rows; ++t) {
                    const Routed want = expected(logits.floats() + t * stride / 4, how);
                    for (size_t j = 0; j < want.ids.size(); ++j) {
                        const float* row = to.row<float>(t);
                        same_ids &= row[j] == static_cast<float>(want.ids[j]);
                        worst =
                            std::max(worst, std::fabs(row[choices + int64_t(j)] - want.weights[j]));
                    }
                }
                check(same_ids, "%s route: other experts than %lld of %lld by %d", kernels.name,
                      static_cast<long long>(choices), static_cast<long long>(experts), bits);
                check(worst < 1e-7, "%s route: weights are off by %g", kernels.name, worst);
            }
    // A NaN shows in the weights, and no id leaves its range.
    const Buffer logits(64), out(64);
    for (int e = 0; e < 4; ++e) logits.floats()[e] = e == 1 ? NAN : -INFINITY;
    kernels.route({logits.data(), 64}, {4, 2, true, true, 1.0, 1}, {out.data(), 64}, 0, 1);
    check(out.floats()[0] == 0 && out.floats()[1] == 1 && std::isnan(out.floats()[2]),
          "%s route: a NaN is lost", kernels.name);
}

void test_dispatch(const Kernels& kernels) {
    Random random(6);
    constexpr int64_t tokens = 37, choices = 3, experts = 11;
    const int64_t most = expert_rows(tokens, choices, experts);
    const Buffer routes(tokens * 32), table(most * int64_t(sizeof(PlanEntry)));
    const Rows in{routes.data(), 32};
    std::vector<uint64_t> counts(experts, 5), want(experts, 5);
    for (int64_t t = 0; t < tokens; ++t) {
        const int first = random.below(4);  // most experts get none, or many
        for (int64_t j = 0; j < choices; ++j) {
            const int64_t id = j == 2 && t % 3 == 0 ? -1 : (first + j * 2) % experts;
            in.row<float>(t)[j] = static_cast<float>(id);
            if (id >= 0) ++want[static_cast<size_t>(id)];
        }
    }
    std::vector<int32_t> scratch(experts);
    PlanEntry* plan = reinterpret_cast<PlanEntry*>(table.data());
    dispatch(in, tokens, choices, experts, plan, scratch.data(), counts.data());
    check(counts == want, "%s dispatch: counts are wrong", kernels.name);
    int64_t end = 0, pairs = 0;
    for (int32_t i = 0; i < plan[0].active; ++i) {
        const PlanEntry& e = plan[i];
        check(e.start == end && e.count > 0 && (!i || e.expert > plan[i - 1].expert),
              "%s dispatch: segment %d is misplaced", kernels.name, i);
        int32_t next = e.start;  // rows in the order of the tokens
        for (int64_t p = 0; p < tokens * choices; ++p)
            if (in.row<float>(p / choices)[p % choices] == static_cast<float>(e.expert))
                check(plan[p].row == next++, "%s dispatch: a row is misplaced", kernels.name);
        check(next == e.start + e.count, "%s dispatch: a segment is miscounted", kernels.name);
        pairs += e.count;
        end = round_up(next, kActRows);
    }
    for (int64_t p = 0; p < tokens * choices; ++p)
        if (in.row<float>(p / choices)[p % choices] < 0)
            check(plan[p].row == -1, "%s dispatch: nobody's choice has a row", kernels.name);
    check(end <= round_up(most, kActRows), "%s dispatch: more rows than planned", kernels.name);
    check(pairs == tokens * choices - 13, "%s dispatch: %lld pairs", kernels.name,
          static_cast<long long>(pairs));
}

void test_copies(const Kernels& kernels) {
    Random random(7);
    constexpr int64_t cols = 96, rows = 20;
    for (const Precision precision : {Precision::f32, Precision::a8, Precision::a12}) {
        constexpr int64_t stride = cols * 4 + 64;
        const Buffer x(rows * cols * 4), from(32 * stride), to(48 * stride), want(48 * stride);
        x.fill(random);
        kernels.quantize({x.data(), cols * 4}, cols, {from.data(), stride}, precision, 0, rows);
        // The same rows, written where they are to go.
        for (int64_t t = 0; t < rows; ++t) {
            const int64_t row = (t * 7 + 3) % 48;
            const Buffer moved(48 * cols * 4);
            std::memcpy(moved.data() + row * cols * 4, x.data() + t * cols * 4, cols * 4);
            kernels.quantize({moved.data(), cols * 4}, cols, {want.data(), stride}, precision, row,
                             row + 1);
            copy_row({from.data(), stride}, t, {to.data(), stride}, row, cols, precision);
        }
        check(to == want, "%s copied rows differ", kernels.name);
    }
}

void test_sums(const Kernels& kernels) {
    Random random(8);
    constexpr int64_t cols = 64, rows = 5;
    const Buffer y(rows * cols * 4), residual(cols * 4), out(cols * 4);
    y.fill(random), residual.fill(random);
    const int32_t chosen[3] = {4, 0, 2};
    const float weights[3] = {0.5f, 0.25f, 0.125f}, factor = 0.75f;
    for (const bool adds : {false, true}) {
        kernels.combine({y.data(), cols * 4}, chosen, weights, 3, factor,
                        adds ? residual.floats() : nullptr, cols, out.floats());
        double worst = 0;
        for (int64_t k = 0; k < cols; ++k) {
            double sum = 0;
            for (int j = 0; j < 3; ++j)
                sum += double(weights[j]) * double(y.floats()[chosen[j] * cols + k]);
            sum = sum * double(factor) + (adds ? double(residual.floats()[k]) : 0);
            worst = std::max(worst, std::fabs(sum - double(out.floats()[k])));
        }
        check(worst < 5e-7, "%s combine is off by %g", kernels.name, worst);
    }
    const Buffer before(rows * cols * 4);
    std::memcpy(before.data(), y.data(), rows * cols * 4);
    kernels.scale({y.data(), cols * 4}, 3.0f, cols, 1, 3);
    bool right = true;
    for (int64_t i = 0; i < rows * cols; ++i) {
        const float by = i / cols == 1 || i / cols == 2 ? 3.0f : 1.0f;
        right &= y.floats()[i] == by * before.floats()[i];
    }
    check(right, "%s scale: other rows, or another product", kernels.name);
}

void test_expert_refusals(const Kernels& kernels) {
    constexpr int64_t tokens = 4, choices = 2, experts = 8, cols = 64;
    const int64_t rows = expert_rows(tokens, choices, experts);
    Executor e(1, kernels.name, 1 << 16, 1 << 18, {tokens, 1, 1, 1, 8},
               {1, 16, KvType::bf16, {{4096, 1, {}}}});
    const int64_t entry = sizeof(PlanEntry), end = 1 << 18;
    const auto op = [&](OpKind kind) {
        Op made{};
        made.kind = kind;
        made.plan = {0, entry}, made.routes = {1 << 15, 64};
        made.a = {1 << 16, 512}, made.b = {1 << 17, 512}, made.out = {3 << 16, 512};
        made.experts = experts, made.choices = choices, made.cols = cols;
        made.routing = {experts, choices, true, true, 1.0, 1};
        made.parts = {{e.weight(0, 64), Format::f32, 16, 0, nullptr}};
        return made;
    };
    const auto refuse = [&](const char* what, OpKind kind, auto change) {
        Op wrong = op(kind);
        change(wrong);
        bool thrown = false;
        try {
            e.add(wrong);
        } catch (const std::invalid_argument&) {
            thrown = true;
        }
        check(thrown, "%s executor accepts %s", kernels.name, what);
    };
    e.add(op(OpKind::route));
    for (const OpKind kind :
         {OpKind::expert_gather, OpKind::expert_matmul, OpKind::expert_activate, OpKind::combine}) {
        e.add(op(kind));
        refuse("a table past the arena", kind,
               [&](Op& o) { o.plan.offset = end - rows * entry + 64; });
        refuse("a table of another stride", kind, [&](Op& o) { o.plan.stride = 128; });
        refuse("no table", kind, [](Op& o) { o.plan = {}; });
        refuse("an odd row", kind, [](Op& o) { o.cols = 48; });
        refuse("no choices", kind, [](Op& o) { o.choices = 0; });
        refuse("more choices than experts", kind, [](Op& o) { o.choices = experts + 1; });
        refuse("other experts", kind, [](Op& o) { o.experts = 16; });
        refuse("experts in the head", kind, [](Op& o) { o.head = true; });
        refuse("no grain", kind, [](Op& o) { o.grain = 0; });
        refuse("rows past the arena", kind, [&](Op& o) { o.a.offset = end - 64; });
        refuse("an output past the arena", kind, [&](Op& o) { o.out.offset = end - 64; });
    }
    refuse("too many experts", OpKind::route, [](Op& o) { o.experts = int64_t(1) << 40; });
    refuse("logits past the arena", OpKind::route, [&](Op& o) { o.a.offset = end; });
    refuse("a routing of other experts", OpKind::route, [](Op& o) { o.routing.experts = 9; });
    refuse("a routing of none", OpKind::route, [](Op& o) { o.routing.least = 0; });
    refuse("a part of a panel", OpKind::expert_matmul, [](Op& o) { o.parts[0].rows = 8; });
    refuse("no weights", OpKind::expert_matmul, [](Op& o) { o.parts.clear(); });
    refuse("grouped weights on floats", OpKind::expert_matmul,
           [](Op& o) { o.parts[0].format = Format::q4_0; });
    refuse("a column past the row", OpKind::expert_matmul, [](Op& o) { o.parts[0].column = 512; });
    refuse("a lone row past the arena", OpKind::expert_matmul, [&](Op& o) { o.b.offset = end; });
    refuse("a sum that is quantized", OpKind::combine, [](Op& o) { o.precision = Precision::a12; });
    refuse("reads of experts that have no file", OpKind::expert_read, [](Op&) {});
    refuse("routes past the arena", OpKind::combine, [&](Op& o) { o.routes.offset = end; });
    check(e.expert_counts().size() == experts, "%s executor: counts of a refused op", kernels.name);
    const auto slots_refused = [&](int64_t offset, int64_t bytes, int64_t slots, auto change,
                                   bool run = false) {
        Executor with(1, kernels.name, 1 << 16, 1 << 18, {tokens, 1, 1, 1, 8},
                      {1, 16, KvType::bf16, {{4096, 1, {}}}});
        try {
            with.keep_experts(offset, bytes, slots, 1, experts);
            Op route = op(OpKind::route), product = op(OpKind::expert_matmul);
            product.parts[0].weight = with.residency()->memory();
            change(route, product);
            with.add(route);
            with.add(product);
            const int32_t zero = 0;
            if (run) with.run({&zero, &zero, &zero, 1, &zero, 1, 1, 1});
        } catch (const std::invalid_argument&) {
            return true;
        }
        return false;
    };
    const auto none = [](Op&, Op&) {};
    check(!slots_refused(0, 4096, 8, none), "%s executor refuses slots", kernels.name);
    check(slots_refused(0, 4096, 8, none, true), "%s executor runs without a file", kernels.name);
    check(slots_refused(1 << 15, 4096, 9, none) && slots_refused(0, 4000, 8, none) &&
              slots_refused(32, 4096, 8, none) && slots_refused(0, int64_t(1) << 60, 8, none),
          "%s executor accepts slots outside the region", kernels.name);
    check(slots_refused(0, 4096, 7, none), "%s executor accepts too few slots", kernels.name);
    check(slots_refused(0, 4096, 8, [](Op& r, Op&) { r.set = 1; }),
          "%s executor accepts a set that there is not", kernels.name);
    check(slots_refused(0, 4096, 8, [](Op&, Op& p) { p.parts[0].weight += 64; }),
          "%s executor accepts an expert past its slot", kernels.name);
}

// Embeddings through one layer of experts; gives the rows of all tokens, run `chunk` at a time.
// With `slots`, experts are read from a file.
std::vector<float> run_layer(const Kernels& kernels, int threads, int64_t tokens, int64_t chunk,
                             int64_t slots = 0) {
    constexpr int64_t hidden = 64, width = 32, experts = 8, choices = 3, vocab = 40;
    const KvShape kv{1, 16, KvType::bf16, {{4096, 2, {}}}};
    Executor e(threads, kernels.name, 1 << 19, 1 << 19, {chunk, chunk, 1, 2, vocab}, kv);
    constexpr int64_t slot_bytes = 3 << 12;
    if (slots) e.keep_experts(1 << 18, slot_bytes, slots, 1, experts);
    std::vector<Executor::Kept> kept[experts];
    Random random(9);
    int64_t weights = 0, arena = 0, in_slot = 0;
    const auto space = [&](int64_t floats, int64_t rows) {
        const Ref ref{arena, round_up(floats * 4, 64)};
        arena += ref.stride * round_up(rows, kActRows);
        return ref;
    };
    const auto part = [&](Format format, int64_t rows, int64_t cols, int32_t column) {
        const Weights w(kernels, format, rows, cols, Fill::random, random);
        e.pack(format, weights, rows, cols, 0, rows, w.source.data(),
               rows * row_bytes(format, cols));
        const uint8_t* at = e.weight(weights, packed_bytes(format, rows, cols));
        weights += round_up(packed_bytes(format, rows, cols), 64);
        return MatmulPart{at, format, static_cast<int32_t>(rows), column, nullptr};
    };
    const auto of_experts = [&](MatmulPart all, int64_t cols) {
        all.rows /= static_cast<int32_t>(experts);
        if (!slots) return all;
        const int64_t bytes = packed_bytes(all.format, all.rows, cols);
        const int64_t first = all.weight - e.weight(0, 0);
        for (int64_t i = 0; i < experts; ++i)
            kept[i].push_back({first + i * bytes, first + i * bytes, bytes});
        all.weight = e.residency()->memory() + in_slot;
        in_slot += bytes;
        return all;
    };
    const int64_t most = expert_rows(chunk, choices, experts);
    const Ref h = space(hidden, chunk), logits = space(16, chunk), routes = space(16, chunk),
              a12 = space(hidden, chunk), x = space(hidden, most), both = space(2 * width, most),
              act = space(width, most), y = space(hidden, most), out = space(hidden, chunk),
              last = space(hidden, chunk), plan = space(16, most);
    const auto add = [&](OpKind kind, Ref a, Ref b, Ref to, int64_t cols, Precision precision,
                         std::vector<MatmulPart> parts = {}, bool head = false) {
        Op op{};
        op.kind = kind, op.a = a, op.b = b, op.out = to, op.cols = cols, op.precision = precision;
        op.parts = std::move(parts), op.head = head, op.grain = 2, op.scalar = 1;
        op.plan = plan, op.routes = routes, op.experts = experts, op.choices = choices;
        op.routing = {experts, choices, true, true, 0.9, 1};
        e.add(std::move(op));
    };
    constexpr Precision kF32 = Precision::f32, kA8 = Precision::a8, kA12 = Precision::a12;
    add(OpKind::embed, {}, {}, h, hidden, kF32, {part(Format::f32, vocab, hidden, 0)});
    add(OpKind::matmul, h, {}, logits, hidden, kF32, {part(Format::f32, experts, hidden, 0)});
    add(OpKind::route, logits, {}, routes, 0, kF32);
    add(OpKind::quantize, h, {}, a12, hidden, kA12);
    add(OpKind::expert_gather, a12, {}, x, hidden, kA12);
    add(OpKind::expert_matmul, x, a12, both, hidden, kA12,
        {of_experts(part(Format::q4_0, experts * width, hidden, 0), hidden),
         of_experts(part(Format::q5_1, experts * width, hidden, width), hidden)});
    const Ref up{both.offset + width * 4, both.stride};
    add(OpKind::expert_activate, both, up, act, width, kA8);
    add(OpKind::expert_matmul, act, {}, y, width, kA8,
        {of_experts(part(Format::q8_0, experts * hidden, width, 0), width)});
    add(OpKind::combine, y, h, out, hidden, kF32);
    add(OpKind::gather, out, {}, last, hidden, kF32, {}, true);
    if (slots) {
        std::FILE* file = std::tmpfile();
        std::vector<Residency::Piece> pieces;
        for (const auto& expert : kept) {
            std::vector<uint64_t> sums;
            check(e.save(fileno(file), expert, sums) == 0, "experts are not saved");
            for (size_t p = 0; p < expert.size(); ++p)
                pieces.push_back({expert[p].at, expert[p].bytes, sums[p]});
        }
        e.residency()->open(fileno(file), pieces);
        std::fclose(file);  // it has a descriptor of its own
    }
    std::vector<float> rows;
    const int32_t tables[] = {0, 1};
    for (int64_t first = 0; first < tokens; first += chunk) {
        std::vector<int32_t> ids, places;
        for (int64_t t = first; t < std::min(first + chunk, tokens); ++t) {
            ids.push_back(static_cast<int32_t>(t * 7 % vocab));
            places.push_back(static_cast<int32_t>(t - first));
        }
        const std::vector<int32_t> sequences(ids.size(), 0);
        e.run({ids.data(), places.data(), sequences.data(), static_cast<int64_t>(ids.size()),
               tables, 1, 1, 2});
        e.head(places.data(), static_cast<int64_t>(places.size()));
        for (size_t t = 0; t < ids.size(); ++t) {
            const float* row =
                reinterpret_cast<const float*>(e.arena() + last.offset + int64_t(t) * last.stride);
            rows.insert(rows.end(), row, row + hidden);
        }
    }
    uint64_t chosen = 0;
    for (const uint64_t count : e.expert_counts()) chosen += count;
    check(e.routed_tokens() == uint64_t(tokens) && chosen >= uint64_t(tokens) &&
              chosen <= uint64_t(tokens * choices),
          "%s experts: counts are wrong", kernels.name);
    return rows;
}

void test_layer(const Kernels& kernels) {
    const std::vector<float> want = run_layer(kernels, 1, 37, 37);
    bool finite = true;
    for (const float value : want) finite &= std::isfinite(value);
    check(finite, "%s experts: results are not finite", kernels.name);
    for (const int threads : {1, 2, 3})
        for (const int64_t chunk : {1, 2, 19, 37})
            for (const int64_t slots : {int64_t(0), std::min<int64_t>(8, 3 * chunk)})
                check(run_layer(kernels, threads, 37, chunk, slots) == want,
                      "%s experts: chunks of %lld on %d threads with %lld slots differ",
                      kernels.name, static_cast<long long>(chunk), threads,
                      static_cast<long long>(slots));
}

}  // namespace

void test_moe(const Kernels& kernels) {
    test_route(kernels);
    test_dispatch(kernels);
    test_copies(kernels);
    test_sums(kernels);
    test_expert_refusals(kernels);
    test_layer(kernels);
}

}  // namespace pronk::test
