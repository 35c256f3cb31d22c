// Sum, largest, smallest and their positions over axes of row-major arrays, float32 and float64; positions in integers.
//
// Axes side by side are merged, so that every reduction is one of two: of runs, out[a, k] over x[a, r, k, s], r and s
// folded; or of columns, out[a, j] over x[a, r, j], r folded. Long ones are cut into pieces, whose results are folded
// in their order.
#include <limits>

#include "rows.hpp"
#include "team.hpp"

namespace brim {

template <>
struct VectorOf<std::uint8_t> {
    typedef std::uint8_t Type __attribute__((vector_size(kVectorBytes)));
};
template <>
struct VectorOf<i32> {
    typedef i32 Type __attribute__((vector_size(kVectorBytes)));
};
template <>
struct VectorOf<i64> {
    typedef i64 Type __attribute__((vector_size(kVectorBytes)));
};

}  // namespace brim

using namespace brim;

namespace {

// Of integers: there is no infinity to start from.
template <class T>
struct LargerWhole : Larger<T> {
    static constexpr T start() { return std::numeric_limits<T>::min(); }
};

template <class T>
struct SmallerWhole : Smaller<T> {
    static constexpr T start() { return std::numeric_limits<T>::max(); }
};

constexpr i64 kPiece = 64 * 1024;

// ------------------------------------------------------------------------------------------------------------ runs

// Pieces of the runs: only where all that is folded is one run.
i64 run_pieces_of(i64 R, i64 S) { return R == 1 && S > kPiece ? ceil_div(S, kPiece) : 1; }

template <class Op, class T>
void reduce_runs(T* out, T* parts, const T* x, i64 A, i64 R, i64 K, i64 S) {
    const i64 pieces = run_pieces_of(R, S);
    if (pieces > 1) {
        parallel(A * K * pieces, [=](i64 which) {
            const Range range = piece_of(S, kPiece, which % pieces);
            parts[which] = fold_run<Op>(x + which / pieces * S + range.begin, range.end - range.begin);
        });
        for (i64 i = 0; i < A * K; i++) out[i] = fold_run<Op>(parts + i * pieces, pieces);
        return;
    }
    parallel_ranges(A * K, ceil_div(kGrain, R * S), [=](i64 begin, i64 end) {
        for (i64 i = begin; i < end; i++) {
            const T* from = x + (i / K * R * K + i % K) * S;
            typename Op::Wide all = Op::start();
            for (i64 r = 0; r < R; r++) all = Op::of(all, typename Op::Wide(fold_run<Op>(from + r * K * S, S)));
            out[i] = T(all);
        }
    });
}

// --------------------------------------------------------------------------------------------------------- columns

// Few columns are laid side by side, several rows to one, so that a row is long enough.
struct Columns {
    i64 R, J;
    i64 rows() const { return kPiece / J < kLeafRows ? kLeafRows : kPiece / J; }  // of a piece
    i64 pieces() const { return ceil_div(R, rows()); }
    i64 side_by_side() const { return J >= 64 ? 1 : 128 / J; }
};

template <class Op, class T>
void fold_columns(T* out, const T* x, i64 rows, i64 stride, i64 width, i64 side_by_side) {
    const i64 joined = side_by_side > 1 && width == stride ? rows / side_by_side : 0;
    if (joined == 0) return fold_rows<Op>(out, x, rows, stride, width);
    T wide[kTile], last[kTile];
    const i64 all = side_by_side * width;
    fold_rows<Op>(wide, x, joined, all, all);
    fold_rows<Op>(out, wide, side_by_side, width, width);
    fold_rows<Op>(last, x + joined * all, rows - joined * side_by_side, stride, width);
    for (i64 j = 0; j < width; j++) out[j] = Op::of(out[j], last[j]);
}

template <class Op, class T>
void reduce_columns(T* out, T* parts, const T* x, i64 A, i64 R, i64 J) {
    const Columns columns = {R, J};
    const i64 pieces = columns.pieces(), tiles = ceil_div(J, kTile);
    const auto fold_tile = [=](T* to, i64 a, Range rows, i64 tile) {
        const Range range = piece_of(J, kTile, tile);
        fold_columns<Op>(to + range.begin, x + (a * R + rows.begin) * J + range.begin, rows.end - rows.begin, J,
                         range.end - range.begin, columns.side_by_side());
    };
    if (pieces > 1) {
        parallel(A * pieces * tiles, [=](i64 which) {
            const i64 row = which / tiles;
            fold_tile(parts + row * J, row / pieces, piece_of(R, columns.rows(), row % pieces), which % tiles);
        });
        parallel_ranges(A * tiles, ceil_div(kGrain, pieces * J), [=](i64 begin, i64 end) {
            for (i64 i = begin; i < end; i++) {
                const Range range = piece_of(J, kTile, i % tiles);
                const i64 at = i / tiles * J + range.begin;
                const T* from = parts + i / tiles * pieces * J + range.begin;
                fold_rows<Op>(out + at, from, pieces, J, range.end - range.begin);
            }
        });
        return;
    }
    const i64 tile_work = R * (J < kTile ? J : kTile);
    parallel_ranges(A * tiles, ceil_div(kGrain, tile_work), [=](i64 begin, i64 end) {
        for (i64 i = begin; i < end; i++) fold_tile(out + i / tiles * J, i / tiles, {0, R}, i % tiles);
    });
}

// ------------------------------------------------------------------------------------------------------- positions

// The better of two: a NaN before anything else, then by Op.
template <class Op, class T>
bool is_better(T now, T best) {
    return best == best && (now != now || (now != best && Op::of(best, now) == now));
}

// First position of the extreme of a run.
template <class Op, class T>
i64 position_of(const T* x, i64 n) {
    i64 at = 0;
    if (n < 64) {  // the fold of a few costs more than looking at each
        for (i64 i = 1; i < n; i++)
            if (is_better<Op>(x[i], x[at])) at = i;
        return at;
    }
    const T best = fold_run<Op>(x, n);
    for (; at + 64 <= n; at += 64) {
        int hit = 0;
        for (i64 i = 0; i < 64; i++) hit |= (x[at + i] == best) | (x[at + i] != x[at + i]);
        if (hit) break;
    }
    while (at < n - 1 && !(best == best ? x[at] == best : x[at] != x[at])) at++;
    return at;
}

template <class Op, class T>
void positions_in_runs(i64* out, i64* parts, const T* x, i64 A, i64 n) {
    const i64 pieces = run_pieces_of(1, n);
    if (pieces == 1) {
        parallel_ranges(A, ceil_div(kGrain, n), [=](i64 begin, i64 end) {
            for (i64 i = begin; i < end; i++) out[i] = position_of<Op>(x + i * n, n);
        });
        return;
    }
    parallel(A * pieces, [=](i64 which) {
        const Range range = piece_of(n, kPiece, which % pieces);
        parts[which] = range.begin + position_of<Op>(x + which / pieces * n + range.begin, range.end - range.begin);
    });
    for (i64 i = 0; i < A; i++) {
        const T* from = x + i * n;
        i64 best = parts[i * pieces];
        for (i64 k = 1; k < pieces; k++)
            if (is_better<Op>(from[parts[i * pieces + k]], from[best])) best = parts[i * pieces + k];
        out[i] = best;
    }
}

// Where row r has a better number than the best so far.
template <class Op, class T>
void improve(i64* at, T* best, const T* row, i64 r, i64 width) {
    BRIM_INDEPENDENT
    for (i64 j = 0; j < width; j++) {
        const T now = row[j], held = best[j], joined = Op::of(held, now);
        const bool better = (held == held) & (joined != held);
        best[j] = better ? now : held;
        at[j] = better ? r : at[j];
    }
}

template <class Op, class T>
void positions_in_columns(i64* out, const T* x, i64 A, i64 R, i64 J) {
    const i64 tiles = ceil_div(J, kTile);
    parallel_ranges(A * tiles, ceil_div(kGrain, R * (J < kTile ? J : kTile)), [=](i64 begin, i64 end) {
        for (i64 i = begin; i < end; i++) {
            const Range range = piece_of(J, kTile, i % tiles);
            const i64 width = range.end - range.begin;
            const T* from = x + i / tiles * R * J + range.begin;
            i64* to = out + i / tiles * J + range.begin;
            T best[kTile];
            for (i64 j = 0; j < width; j++) best[j] = from[j], to[j] = 0;
            for (i64 r = 1; r < R; r++) improve<Op>(to, best, from + r * J, r, width);
        }
    });
}

}  // namespace

// Numbers of working memory, in out[0] of runs (A, R, K, S), in out[1] of columns (A, R, J).
BRIM_EXPORT void brim_reduce_scratch(i64* out, i64 A, i64 R, i64 K, i64 S) {
    const i64 runs = run_pieces_of(R, S), columns = Columns{R, K * S}.pieces();
    out[0] = runs > 1 ? A * K * runs : 0;
    out[1] = columns > 1 ? A * columns * K * S : 0;
}

#define BRIM_REDUCE(Op, T, name) \
    BRIM_EXPORT void brim_##name##_runs(T* out, T* parts, const T* x, i64 A, i64 R, i64 K, i64 S) { \
        reduce_runs<Op<T>>(out, parts, x, A, R, K, S); \
    } \
    BRIM_EXPORT void brim_##name##_columns(T* out, T* parts, const T* x, i64 A, i64 R, i64 J) { \
        reduce_columns<Op<T>>(out, parts, x, A, R, J); \
    }

#define BRIM_POSITION(Op, T, name) \
    BRIM_EXPORT void brim_##name##_runs(i64* out, i64* parts, const T* x, i64 A, i64 n) { \
        positions_in_runs<Op<T>>(out, parts, x, A, n); \
    } \
    BRIM_EXPORT void brim_##name##_columns(i64* out, const T* x, i64 A, i64 R, i64 J) { \
        positions_in_columns<Op<T>>(out, x, A, R, J); \
    }

BRIM_REDUCE(Add, float, sum_f32)
BRIM_REDUCE(Add, double, sum_f64)
BRIM_REDUCE(Larger, float, max_f32)
BRIM_REDUCE(Larger, double, max_f64)
BRIM_REDUCE(Smaller, float, min_f32)
BRIM_REDUCE(Smaller, double, min_f64)
BRIM_POSITION(Larger, float, argmax_f32)
BRIM_POSITION(Larger, double, argmax_f64)
BRIM_POSITION(Smaller, float, argmin_f32)
BRIM_POSITION(Smaller, double, argmin_f64)
BRIM_POSITION(LargerWhole, std::uint8_t, argmax_u8)
BRIM_POSITION(LargerWhole, i32, argmax_i32)
BRIM_POSITION(LargerWhole, i64, argmax_i64)
BRIM_POSITION(SmallerWhole, std::uint8_t, argmin_u8)
BRIM_POSITION(SmallerWhole, i32, argmin_i32)
BRIM_POSITION(SmallerWhole, i64, argmin_i64)
