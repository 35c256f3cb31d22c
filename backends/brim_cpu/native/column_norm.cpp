// Batch norm and its gradients over rows of channels side by side: (N, C) row-major and channels-last images.
//
// Rows are cut into pieces that the caches hold; the moments of the pieces are joined in order.
#include "moments.hpp"
#include "team.hpp"

using namespace brim;

namespace {

constexpr i64 kPieceElements = 32 * 1024, kBlockRows = 32;

struct Table {
    i64 rows, columns;
    i64 step() const { return kPieceElements / columns < 16 ? 16 : kPieceElements / columns; }
    i64 pieces() const { return ceil_div(rows, step()); }
    i64 tiles() const { return ceil_div(columns, kTile); }
};

// terms(sums, r) adds the terms of row r to `Results` rows of sums; blocks of rows are added up in T, these in double.
template <int Results, class T, class F>
void add_rows(double (&totals)[Results][kTile], i64 width, Range rows, const F& terms) {
    T sums[Results][kTile];
    for (int k = 0; k < Results; k++)
        for (i64 j = 0; j < width; j++) totals[k][j] = 0;
    for (i64 begin = rows.begin; begin < rows.end; begin += kBlockRows) {
        const i64 end = begin + kBlockRows < rows.end ? begin + kBlockRows : rows.end;
        for (int k = 0; k < Results; k++)
            for (i64 j = 0; j < width; j++) sums[k][j] = 0;
        for (i64 r = begin; r < end; r++) terms(sums, r);
        for (int k = 0; k < Results; k++)
            for (i64 j = 0; j < width; j++) totals[k][j] += double(sums[k][j]);
    }
}

template <class T>
void piece_moments(Moments* parts, const T* x, const Table& table, Range rows, Range columns) {
    const i64 width = columns.end - columns.begin;
    const double count = double(rows.end - rows.begin);
    const T* from = x + columns.begin;
    double totals[1][kTile], both[2][kTile];
    add_rows<1, T>(totals, width, rows, [=](T(&sums)[1][kTile], i64 r) {
        const T* row = from + r * table.columns;
        for (i64 j = 0; j < width; j++) sums[0][j] += row[j];
    });
    T means[kTile];
    for (i64 j = 0; j < width; j++) means[j] = T(totals[0][j] / count);
    const T* mean = means;
    add_rows<2, T>(both, width, rows, [=](T(&sums)[2][kTile], i64 r) {
        const T* row = from + r * table.columns;
        BRIM_INDEPENDENT
        for (i64 j = 0; j < width; j++) {
            const T apart = row[j] - mean[j];
            sums[0][j] += apart;
            sums[1][j] += apart * apart;
        }
    });
    for (i64 j = 0; j < width; j++) parts[columns.begin + j] = corrected(means[j], both[0][j], both[1][j], count);
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

// Rows of a piece, written a row at a time: compute(block, start of the row, first column, columns).
template <class T, class F>
void write_rows(T* out, const Table& table, Range rows, Range columns, bool streamed, const F& compute) {
    const i64 width = columns.end - columns.begin;
    for (i64 r = rows.begin; r < rows.end; r++) {
        const i64 first = r * table.columns + columns.begin;
        write_run(out + first, width, streamed, [=, &compute](T* to, i64 at, i64 count) { compute(to, first, at, count); });
    }
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
        const T *mean = centres, *scale = scales, *shift = shifts;
        write_rows(out, table, rows, columns, streamed, [=](T* to, i64 row, i64 first, i64 count) {
            const T *from = x + row + first, *m = mean + first, *s = scale + first, *b = shift + first;
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
        const T* mean = means + columns.begin;
        double totals[2][kTile];
        add_rows<2, T>(totals, width, rows, [=](T(&sums)[2][kTile], i64 r) {
            const T *gradient = g + r * table.columns + columns.begin, *from = x + r * table.columns + columns.begin;
            BRIM_INDEPENDENT
            for (i64 j = 0; j < width; j++) {
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
        const T *mean = centres, *scale = scales, *level = levels, *slope = slopes;
        write_rows(out, table, rows, columns, streamed, [=](T* to, i64 row, i64 first, i64 count) {
            const T *gradient = g + row + first, *from = x + row + first;
            const T *m = mean + first, *s = scale + first, *l = level + first, *k = slope + first;
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
