// Attention of float32, softmax(q k^T scale) v with dropout or without, and its gradients, a few queries at a time: their
// scores never leave the caches, and of causal attention only what is seen is computed, but for blocks on the diagonal.
//
// A piece of the forward pass is some blocks of queries, one of the backward pass some whole heads: the sums over queries
// in the gradients of k and v are made in one order. In these, scores and weights are computed anew.
#include <cmath>

#include "gemm_panels.hpp"
#include "math32.hpp"
#include "philox.hpp"
#include "softmax.hpp"
#include "team.hpp"

using namespace brim;

namespace {

constexpr i64 kPanel = kWidth<float>;
constexpr i64 kBlockNumbers = 32 * 1024;   // of scores, on the thread's stack
constexpr i64 kPackedNumbers = 16 * 1024;  // of packed keys, there too; more are packed beforehand
constexpr i64 kMaxBlock = 96;              // queries; so many repay that sums over queries are read and written again
constexpr i64 kMaxBatchDims = 4;

// Written by overlay/attention.py as an array of int64; steps and rows are in elements. E numbers a query, D a value.
struct Attention {
    i64 heads, batch_shape[kMaxBatchDims];
    i64 q_step[kMaxBatchDims], k_step[kMaxBatchDims], v_step[kMaxBatchDims], g_step[kMaxBatchDims];
    i64 q_row, k_row, v_row, g_row;  // from one row to the next
    i64 T, S, E, D, causal;
    i64 block;      // queries of a block
    i64 per_piece;  // blocks or heads

    i64 score_row() const { return ceil_div(S, kPanel) * kPanel + kPanel / 2; }  // no power of two
    i64 packed(i64 width) const { return ceil_div(S, kPanel) * kPanel * width; }
    i64 seen(i64 query) const { return causal && query + 1 < S ? query + 1 : S; }
};

// Which weights are dropped; the words of a draw are numbered as the weights (heads, T, S).
struct Dropout {
    u64 seed, counter;
    double p;

    bool any() const { return p > 0; }
    float factor() const { return p < 1 ? float(1.0 / (1.0 - p)) : 0.0f; }
};

struct Head {
    const float *q, *k, *v, *g;
};

Head head_of(const Attention& t, const float* q, const float* k, const float* v, const float* g, i64 number) {
    Head head = {q, k, v, g};
    for (i64 axis = kMaxBatchDims - 1; axis >= 0; axis--) {
        const i64 at = number % t.batch_shape[axis];
        number /= t.batch_shape[axis];
        head.q += at * t.q_step[axis], head.k += at * t.k_step[axis], head.v += at * t.v_step[axis];
        if (g != nullptr) head.g += at * t.g_step[axis];
    }
    return head;
}

// As kernel(), of the last columns, fewer than a panel's; what is behind them is neither read nor written.
template <class T, int R>
void last_columns(i64 depth, const T* a, i64 down, i64 along, const T* b, i64 next, i64 columns, T* c, i64 ldc, bool add) {
    using V = typename Wide<T>::Vector;
    constexpr i64 lanes = Wide<T>::lanes;
    i64 have[kVectors];
    for (int v = 0; v < kVectors; v++) {
        const i64 left = columns - v * lanes;
        have[v] = left < 0 ? 0 : left < lanes ? left : lanes;
    }
    V sum[R][kVectors] = {};
    for (i64 k = 0; k < depth; k++) {
        V row[kVectors];
        for (int v = 0; v < kVectors; v++) {
            const T* from = b + k * next + (have[v] > 0 ? v * lanes : 0);
            row[v] = have[v] == lanes ? load(from) : load_part(from, have[v]);
        }
#pragma GCC unroll 16
        for (int i = 0; i < R; i++) {
            const V x = all_lanes(a[i * down + k * along]);
            for (int v = 0; v < kVectors; v++) sum[i][v] = multiply_add<T>(row[v], x, sum[i][v]);
        }
    }
    for (int i = 0; i < R; i++) {
        alignas(64) T made[kVectors * lanes];
        for (int v = 0; v < kVectors; v++) store(made + v * lanes, sum[i][v]);
        for (i64 j = 0; j < columns; j++) c[i * ldc + j] = add ? c[i * ldc + j] + made[j] : made[j];
    }
}

// c (+)= a b for up to kRows rows and any number of columns, b as it lies.
void product(i64 rows, i64 columns, i64 depth, const float* a, i64 down, i64 along, const float* b, i64 next, float* c,
             i64 ldc, bool add) {
    i64 j = 0;
    for (const KernelFn<float> run = kernel_of<float>(rows); j + kPanel <= columns; j += kPanel)
        run(depth, a, down, along, b + j, next, c + j, ldc, add);
    if (j == columns) return;
    i64 i = 0;
    for (; i + 4 <= rows; i += 4)
        last_columns<float, 4>(depth, a + i * down, down, along, b + j, next, columns - j, c + i * ldc + j, ldc, add);
    for (; i < rows; i++)
        last_columns<float, 1>(depth, a + i * down, down, along, b + j, next, columns - j, c + i * ldc + j, ldc, add);
}

// S rows of `width` numbers, as panels of the transposed matrix.
void pack(float* to, const float* rows, i64 row, i64 S, i64 width) {
    for (i64 j = 0; j < S; j += kPanel, to += kPanel * width)
        pack_transposed(to, rows + j * row, row, width, S - j < kPanel ? S - j : kPanel);
}

// The products of up to kRows rows of `width` numbers with the first `columns` packed ones.
void with_packed(i64 rows, i64 columns, i64 width, const float* a, i64 down, const float* packed, float* c, i64 ldc) {
    const KernelFn<float> run = kernel_of<float>(rows);
    for (i64 j = 0; j < columns; j += kPanel, packed += kPanel * width)
        run(width, a, down, 1, packed, kPanel, c + j, ldc, false);
}

bool all_finite(const float* x, i64 rows, i64 row, i64 width) {
    using V = Wide<float>::Vector;
    constexpr i64 lanes = Wide<float>::lanes;
    V lost[2] = {};  // x - x: 0, or NaN
    for (i64 r = 0; r < rows; r++, x += row) {
        i64 j = 0;
        for (; j + 2 * lanes <= width; j += 2 * lanes) {
            const V even = load(x + j), odd = load(x + j + lanes);
            lost[0] += even - even, lost[1] += odd - odd;
        }
        for (; j < width; j += lanes) {
            const V v = width - j < lanes ? load_part(x + j, width - j) : load(x + j);
            lost[0] += v - v;
        }
    }
    const V both = lost[0] + lost[1];
    float sum = 0;
    for (i64 lane = 0; lane < lanes; lane++) sum += both[lane];
    return sum == 0;
}

// The words for the weights of one query after the other.
class Words {
   public:
    // The first `seen` of a query. Of short rows the words of several are drawn at once.
    const u32* of(const Attention& t, const Dropout& dropout, i64 head, i64 query, i64 seen) {
        const i64 at = (head * t.T + query) * t.S;
        if (at < first || at + seen > end) {
            first = at - at % kDrawsPerBlock;
            const i64 wanted = ceil_div(at + seen - first, kWordsAtOnce) * kWordsAtOnce;
            end = first + (wanted > kAtLeast ? wanted : kAtLeast);
            draw_words(words, dropout.seed, dropout.counter, first, end - first);
        }
        return words + (at - first);
    }

   private:
    static constexpr i64 kAtLeast = 4 * kWordsAtOnce;
    u32 words[kBlockNumbers / kRows + 2 * kWordsAtOnce];
    i64 first = 0, end = 0;
};

// x = x * factor where the word is at least the limit, else 0
void drop(float* x, const u32* words, i64 n, const Dropout& dropout) {
    const u64 limit = u64(std::ceil(double(float(dropout.p)) * 0x1p24)) << 8;  // as in dropout.cpp
    if (limit > 0xffffffff) return std::memset(x, 0, size_t(n) * sizeof(float)), void();
    const u32 least = u32(limit);
    const float factor = dropout.factor();
    BRIM_INDEPENDENT
    for (i64 j = 0; j < n; j++) {
        const float scaled = x[j] * factor;
        x[j] = words[j] < least ? 0.0f : scaled;
    }
}

// Rows of weights end with zeros where a neighbour sees more: times a number that is not finite these would be NaN. Then
// queries and keys are taken one by one.
i64 step_of(const Attention& t, bool finite) { return t.causal && !finite ? 1 : i64(kRows); }

// sums = tops + log(sums); by itself, for loops with log32 are vectorised in functions alone
void take_logarithms(float* sums, const float* tops, i64 n) {
    BRIM_INDEPENDENT
    for (i64 i = 0; i < n; i++) sums[i] = tops[i] + log32(sums[i]);
}

void forward_block(const Attention& t, const Head& head, i64 number, Range queries, const float* keys, i64 step, float scale,
                   const Dropout& dropout, Words& words, float* scores, float* y, float* logs) {
    const i64 row = t.score_row();
    float tops[kMaxBlock];
    for (i64 i = queries.begin; i < queries.end; i += step) {
        const i64 rows = queries.end - i < step ? queries.end - i : step, seen = t.seen(i + rows - 1);
        with_packed(rows, seen, t.E, head.q + i * t.q_row, t.q_row, keys, scores, row);
        for (i64 r = 0; r < rows; r++) {
            float* weights = scores + r * row;
            const i64 own = t.seen(i + r);
            const Powers powers = softmax_row(weights, weights, {own, seen}, scale);
            tops[i - queries.begin + r] = powers.top, logs[number * t.T + i + r] = powers.sum;
            if (dropout.any()) drop(weights, words.of(t, dropout, number, i + r, own), own, dropout);
        }
        product(rows, t.D, seen, scores, row, 1, head.v, t.v_row, y + (number * t.T + i) * t.D, t.D, false);
    }
    take_logarithms(logs + number * t.T + queries.begin, tops, queries.end - queries.begin);
}

struct Gradients {
    float *q, *k, *v;  // of one head
};

void backward_block(const Attention& t, const Head& head, i64 number, Range queries, const float* keys, const float* values,
                    i64 step, float scale, const Dropout& dropout, Words& words, float* weights, float* slopes,
                    const Gradients& to) {
    const i64 row = t.score_row();
    for (i64 i = queries.begin; i < queries.end; i += step) {
        const i64 rows = queries.end - i < step ? queries.end - i : step, seen = t.seen(i + rows - 1);
        float *w = weights + (i - queries.begin) * row, *s = slopes + (i - queries.begin) * row;
        with_packed(rows, seen, t.E, head.q + i * t.q_row, t.q_row, keys, w, row);
        with_packed(rows, seen, t.D, head.g + i * t.g_row, t.g_row, values, s, row);
        for (i64 r = 0; r < rows; r++) {
            float *own_w = w + r * row, *own_s = s + r * row;
            const Row own = {t.seen(i + r), seen};
            softmax_row(own_w, own_w, own, scale);
            if (dropout.any()) {
                const u32* draw = words.of(t, dropout, number, i + r, own.seen);
                drop(own_s, draw, own.seen, dropout);
                softmax_grad_row(own_s, own_s, own_w, own, scale);
                drop(own_w, draw, own.seen, dropout);
            } else {
                softmax_grad_row(own_s, own_s, own_w, own, scale);
            }
        }
        product(rows, t.E, seen, s, row, 1, head.k, t.k_row, to.q + i * t.E, t.E, false);
    }
    // Blocks begin at multiples of the step: the first query that sees one of these keys is the first of its own step.
    const i64 keys_seen = t.seen(t.T - 1);
    for (i64 j = 0; j < keys_seen; j += step) {
        const i64 rows = keys_seen - j < step ? keys_seen - j : step, first = t.causal ? j : 0;
        const i64 begin = first < queries.begin ? queries.begin : first, depth = queries.end - begin;
        if (depth <= 0) break;
        const bool add = queries.begin > first;
        const i64 at = (begin - queries.begin) * row + j;
        product(rows, t.D, depth, weights + at, 1, row, head.g + begin * t.g_row, t.g_row, to.v + j * t.D, t.D, add);
        product(rows, t.E, depth, slopes + at, 1, row, head.q + begin * t.q_row, t.q_row, to.k + j * t.E, t.E, add);
    }
}

}  // namespace

// What decides how many queries a block has, and whether keys and values fit into a thread's room for packing them.
BRIM_EXPORT void brim_attention_sizes(i64* sizes) {
    sizes[0] = kRows, sizes[1] = kPanel, sizes[2] = kBlockNumbers, sizes[3] = kPackedNumbers, sizes[4] = kMaxBlock;
}

// `packed`: working memory for all keys, or null where those of a head fit into a thread's.
BRIM_EXPORT void brim_attention_f32(float* y, float* logs, const float* q, const float* k, const float* v, float* packed,
                                    const i64* plan, double scale, i64 seed, i64 counter, double p) {
    const Attention& t = *reinterpret_cast<const Attention*>(plan);
    const Dropout dropout = {u64(seed), u64(counter), p};
    const i64 blocks = ceil_div(t.T, t.block), size = t.packed(t.E);
    if (packed != nullptr)
        parallel(t.heads, [&](i64 number) {
            pack(packed + number * size, head_of(t, q, k, v, nullptr, number).k, t.k_row, t.S, t.E);
        });
    parallel_ranges(t.heads * blocks, t.per_piece, [&](i64 begin, i64 end) {
        alignas(64) float scores[kBlockNumbers];
        alignas(64) float own[kPackedNumbers];
        Words words;
        Head head = {};
        i64 last = -1, step = kRows;
        for (i64 at = begin; at < end; at++) {
            const i64 number = at / blocks;
            float* keys = packed == nullptr ? own : packed + number * size;
            if (number != last) {
                head = head_of(t, q, k, v, nullptr, number);
                if (packed == nullptr) pack(own, head.k, t.k_row, t.S, t.E);
                step = step_of(t, !t.causal || all_finite(head.v, t.S, t.v_row, t.D));
                last = number;
            }
            forward_block(t, head, number, piece_of(t.T, t.block, at % blocks), keys, step, float(scale), dropout, words,
                          scores, y, logs);
        }
    });
}

// `packed`: room for the keys and the values of all heads, or null.
BRIM_EXPORT void brim_attention_grad_f32(float* dq, float* dk, float* dv, const float* g, const float* q, const float* k,
                                         const float* v, float* packed, const i64* plan, double scale, i64 seed,
                                         i64 counter, double p) {
    const Attention& t = *reinterpret_cast<const Attention*>(plan);
    const Dropout dropout = {u64(seed), u64(counter), p};
    const i64 of_keys = t.packed(t.E), of_both = of_keys + t.packed(t.D);
    parallel_ranges(t.heads, t.per_piece, [&](i64 begin, i64 end) {
        alignas(64) float weights[kBlockNumbers];
        alignas(64) float slopes[kBlockNumbers];
        alignas(64) float own[kPackedNumbers];
        Words words;
        for (i64 number = begin; number < end; number++) {
            const Head head = head_of(t, q, k, v, g, number);
            float* keys = packed == nullptr ? own : packed + number * of_both;
            pack(keys, head.k, t.k_row, t.S, t.E);
            pack(keys + of_keys, head.v, t.v_row, t.S, t.D);
            const bool finite = !t.causal ||  // of what weights and slopes are multiplied with
                                (all_finite(head.q, t.T, t.q_row, t.E) && all_finite(head.k, t.S, t.k_row, t.E) &&
                                 all_finite(head.g, t.T, t.g_row, t.D));
            const Gradients to = {dq + number * t.T * t.E, dk + number * t.S * t.E, dv + number * t.S * t.D};
            const i64 keys_seen = t.seen(t.T - 1);
            std::memset(to.k + keys_seen * t.E, 0, size_t((t.S - keys_seen) * t.E) * sizeof(float));
            std::memset(to.v + keys_seen * t.D, 0, size_t((t.S - keys_seen) * t.D) * sizeof(float));
            for (i64 i = 0; i < t.T; i += t.block)
                backward_block(t, head, number, {i, i + t.block < t.T ? i + t.block : t.T}, keys, keys + of_keys,
                               step_of(t, finite), float(scale), dropout, words, weights, slopes, to);
        }
    });
}
