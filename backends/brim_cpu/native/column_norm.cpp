// Batch norm and its gradients over rows of channels side by side: (N, C) row-major and channels-last images.
//
// Rows are cut into pieces that the caches hold; the moments of the pieces are joined in order.
#include <initializer_list>

#include "moments.hpp"
#include "team.hpp"

using namespace brim;

namespace {

constexpr i64 kPieceElements = 32 * 1024, kBlockRows = 32;

struct Table {
    i64 rows, columns;
    // Short rows are worked on several at a time, as one row: loops of few numbers cost more than what they compute.
    i64 together() const { return columns > kTile / 4 ? 1 : kTile / 2 / columns; }
    i64 step() const { return kPieceElements / columns < 16 ? 16 : kPieceElements / columns / together() * together(); }
    i64 pieces() const { return ceil_div(rows, step()); }
    i64 tiles() const { return ceil_div(columns, kTile); }
};

// body(first number, how many) for the rows of a piece; where several rows are one, its columns repeat.
template <class F>
void over_rows(const Table& table, Range rows, Range columns, const F& body) {
    const i64 width = columns.end - columns.begin, together = table.together();
    i64 r = rows.begin;
    for (; r + together <= rows.end; r += together) body(r * table.columns + columns.begin, together * width);
    for (; r < rows.end; r++) body(r * table.columns + columns.begin, width);
}

// Repeats the first `width` numbers for rows that are worked on together.
template <class T>
void repeat(T* values, i64 width, const Table& table) {
    for (i64 j = width; j < table.together() * width; j++) values[j] = values[j - width];
}

// terms(sums, first, count) adds the terms of numbers side by side to `Results` rows of sums, which are added up in T
// for some rows at a time, then in double.
template <int Results, class T, class F>
void add_rows(double (&totals)[Results][kTile], const Table& table, Range rows, Range columns, const F& terms) {
    const i64 width = columns.end - columns.begin, all = table.together() * width;
    T sums[Results][kTile];
    i64 added = 0;
    for (int k = 0; k < Results; k++)
        for (i64 j = 0; j < all; j++) totals[k][j] = 0, sums[k][j] = 0;
    const auto carry = [&] {
        for (int k = 0; k < Results; k++)
            for (i64 j = 0; j < all; j++) totals[k][j] += double(sums[k][j]), sums[k][j] = 0;
        added = 0;
    };
    over_rows(table, rows, columns, [&](i64 first, i64 count) {
        terms(sums, first, count);
        if (++added == kBlockRows) carry();
    });
    carry();
    for (int k = 0; k < Results; k++)
        for (i64 j = width; j < all; j++) totals[k][j % width] += totals[k][j];
}

template <class T>
void piece_moments(Moments* parts, const T* x, const Table& table, Range rows, Range columns) {
    const i64 width = columns.end - columns.begin;
    const double numbers = double(rows.end - rows.begin);
    double totals[1][kTile], both[2][kTile];
    add_rows<1, T>(totals, table, rows, columns, [=](T(&sums)[1][kTile], i64 first, i64 count) {
        const T* from = x + first;
        for (i64 j = 0; j < count; j++) sums[0][j] += from[j];
    });
    T means[kTile];
    for (i64 j = 0; j < width; j++) means[j] = T(totals[0][j] / numbers);
    repeat(means, width, table);
    const T* mean = means;
    add_rows<2, T>(both, table, rows, columns, [=](T(&sums)[2][kTile], i64 first, i64 count) {
        const T* from = x + first;
        BRIM_INDEPENDENT
        for (i64 j = 0; j < count; j++) {
            const T apart = from[j] - mean[j];
            sums[0][j] += apart;
            sums[1][j] += apart * apart;
        }
    });
    for (i64 j = 0; j < width; j++) parts[columns.begin + j] = corrected(means[j], both[0][j], both[1][j], numbers);
}

// body(rows, columns, number of the piece of rows) for all pieces and tiles
template <class F>
void over_pieces(const Table& table, const F& body) {
    const i64 tiles = table.tiles();
    parallel(table.pieces() * tiles, [&](i64 which) {
        const i64 piece = which / tiles;
        body(piece_of(table.rows, table.step(), piece), piece_of(table.columns, kTile, which % tiles), piece);
    });
}

// The rows of a piece: compute(block, first number, first column, count).
template <class T, class F>
void write_rows(T* out, const Table& table, Range rows, Range columns, bool streamed, const F& compute) {
    over_rows(table, rows, columns, [&](i64 first, i64 all) {
        write_run(out + first, all, streamed, [&](T* to, i64 at, i64 count) { compute(to, first + at, at, count); });
    });
    if (streamed) stream_done();
}

template <class T>
void column_norm(T* out, T* means, T* vars, Moments* parts, const T* x, Values<T> weight, Values<T> bias,
                 Table table, T eps) {
    const bool streamed = is_streamed<T>(table.rows * table.columns, table.columns);
    over_pieces(table, [=](Range rows, Range columns, i64 piece) {
        piece_moments(parts + piece * table.columns, x, table, rows, columns);
    });
    parallel_ranges(table.columns, 64, [=](i64 begin, i64 end) {
        for (i64 piece = 0; piece < table.pieces(); piece++) {
            const Range rows = piece_of(table.rows, table.step(), piece);
            for (i64 c = begin; piece > 0 && c < end; c++)
                join(parts[c], double(rows.begin), parts[piece * table.columns + c], double(rows.end - rows.begin));
        }
        for (i64 c = begin; c < end; c++) means[c] = T(parts[c].mean), vars[c] = T(parts[c].m2 / double(table.rows));
    });
    over_pieces(table, [=](Range rows, Range columns, i64) {
        const i64 width = columns.end - columns.begin;
        T scales[kTile], shifts[kTile], centres[kTile];
        for (i64 j = 0; j < width; j++) {
            const i64 c = columns.begin + j;
            centres[j] = means[c], scales[j] = T(1) / std::sqrt(vars[c] + eps) * weight[c], shifts[j] = bias[c];
        }
        for (T* values : {centres, scales, shifts}) repeat(values, width, table);
        const T *mean = centres, *scale = scales, *shift = shifts;
        write_rows(out, table, rows, columns, streamed, [=](T* to, i64 first, i64 column, i64 count) {
            const T *from = x + first, *m = mean + column, *s = scale + column, *b = shift + column;
            BRIM_INDEPENDENT
            for (i64 j = 0; j < count; j++) to[j] = fma_(from[j] - m[j], s[j], b[j]);
        });
    });
}

struct Slopes {
    double level, slope;  // sums of g, and of g (x - mean)
};

template <class T>
void column_norm_grad(T* out, T* of_weight, T* of_bias, Slopes* parts, const T* g, const T* x, Values<T> weight,
                      const T* means, const T* vars, Table table, T eps) {
    const bool streamed = is_streamed<T>(table.rows * table.columns, table.columns);
    const double share = 1.0 / double(table.rows);
    over_pieces(table, [=](Range rows, Range columns, i64 piece) {
        const i64 width = columns.end - columns.begin;
        double totals[2][kTile];
        T centres[kTile];
        for (i64 j = 0; j < width; j++) centres[j] = means[columns.begin + j];
        repeat(centres, width, table);
        const T* mean = centres;
        add_rows<2, T>(totals, table, rows, columns, [=](T(&sums)[2][kTile], i64 first, i64 count) {
            const T *gradient = g + first, *from = x + first;
            BRIM_INDEPENDENT
            for (i64 j = 0; j < count; j++) {
                sums[0][j] += gradient[j];
                sums[1][j] += gradient[j] * (from[j] - mean[j]);
            }
        });
        Slopes* to = parts + piece * table.columns + columns.begin;
        for (i64 j = 0; j < width; j++) to[j] = {totals[0][j], totals[1][j]};
    });
    parallel_ranges(table.columns, 64, [=](i64 begin, i64 end) {
        for (i64 piece = 1; piece < table.pieces(); piece++)
            for (i64 c = begin; c < end; c++) {
                parts[c].level += parts[piece * table.columns + c].level;
                parts[c].slope += parts[piece * table.columns + c].slope;
            }
    });
    over_pieces(table, [=](Range rows, Range columns, i64) {
        const i64 width = columns.end - columns.begin;
        T scales[kTile], levels[kTile], slopes[kTile], centres[kTile];
        for (i64 j = 0; j < width; j++) {
            const i64 c = columns.begin + j;
            const T rstd = T(1) / std::sqrt(vars[c] + eps);
            centres[j] = means[c], scales[j] = rstd * weight[c], levels[j] = T(parts[c].level * share);
            slopes[j] = T(parts[c].slope * share * double(rstd) * double(rstd));
        }
        for (T* values : {centres, scales, levels, slopes}) repeat(values, width, table);
        const T *mean = centres, *scale = scales, *level = levels, *slope = slopes;
        write_rows(out, table, rows, columns, streamed, [=](T* to, i64 first, i64 column, i64 count) {
            const T *gradient = g + first, *from = x + first;
            const T *m = mean + column, *s = scale + column, *l = level + column, *k = slope + column;
            BRIM_INDEPENDENT
            for (i64 j = 0; j < count; j++) to[j] = (gradient[j] - fma_(from[j] - m[j], k[j], l[j])) * s[j];
        });
    });
    // Last, because the gradient of the weight may lie where the weight does.
    for (i64 c = 0; c < table.columns; c++) {
        const T rstd = T(1) / std::sqrt(vars[c] + eps);
        of_weight[c] = T(parts[c].slope * double(rstd)), of_bias[c] = T(parts[c].level);
    }
}

}  // namespace

// Bytes of `parts`, in out[0].
BRIM_EXPORT void brim_column_norm_scratch(i64* out, i64 rows, i64 columns) {
    out[0] = Table{rows, columns}.pieces() * columns * i64(sizeof(Moments));
}

#define BRIM_COLUMN_NORM(T, name) \
    BRIM_EXPORT void brim_column_norm_##name(T* out, T* means, T* vars, void* parts, const T* x, const T* \
        weight, double weight_value, const T* bias, double bias_value, i64 rows, i64 columns, double eps) { \
        column_norm<T>(out, means, vars, static_cast<Moments*>(parts), x, {weight, T(weight_value)}, {bias, \
            T(bias_value)}, {rows, columns}, T(eps)); \
    } \
    BRIM_EXPORT void brim_column_norm_grad_##name(T* out, T* of_weight, T* of_bias, void* parts, const T* g, \
        const T* x, const T* weight, double weight_value, const T* means, const T* vars, i64 rows, i64 columns, \
        double eps) { \
        column_norm_grad<T>(out, of_weight, of_bias, static_cast<Slopes*>(parts), g, x, {weight, \
            T(weight_value)}, means, vars, {rows, columns}, T(eps)); \
    }

BRIM_COLUMN_NORM(float, f32)
BRIM_COLUMN_NORM(double, f64)
