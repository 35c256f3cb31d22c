// Batch norm and its gradients over rows of channels side by side: (N, C) row-major and channels-last images.
//
// Rows are cut into pieces that the caches hold; the moments of the pieces are joined in order.
#include "around_norm.hpp"
#include "columns.hpp"
#include "half.hpp"
#include "team.hpp"

using namespace brim;

namespace {

template <class T, class Stored>
void piece_moments(Moments* parts, const Stored* x, const Table& table, Range rows, Range columns) {
    const i64 width = columns.end - columns.begin;
    const double numbers = double(rows.end - rows.begin);
    double totals[1][kTile], both[2][kTile];
    add_rows<1, T>(totals, table, rows, columns, [=](T(&sums)[1][kTile], i64 first, i64 count) {
        const Stored* from = x + first;
        for (i64 j = 0; j < count; j++) sums[0][j] += T(from[j]);
    });
    T means[kTile];
    for (i64 j = 0; j < width; j++) means[j] = T(totals[0][j] / numbers);
    repeat(means, width, table);
    const T* mean = means;
    add_rows<2, T>(both, table, rows, columns, [=](T(&sums)[2][kTile], i64 first, i64 count) {
        const Stored* from = x + first;
        BRIM_INDEPENDENT
        for (i64 j = 0; j < count; j++) {
            const T apart = T(from[j]) - mean[j];
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

template <class T, class Stored, class After = AsItIs>
void column_norm(Stored* out, T* means, T* vars, Moments* parts, const Stored* x, Values<T> weight, Values<T> bias,
                 Table table, T eps, After after = {}) {
    const bool streamed = is_streamed<Stored>(table.rows * table.columns, table.columns);
    over_pieces(table, [=](Range rows, Range columns, i64 piece) {
        piece_moments<T>(parts + piece * table.columns, x, table, rows, columns);
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
        write_rows(out, table, rows, columns, streamed, [=](Stored* to, i64 first, i64 column, i64 count) {
            const Stored* from = x + first;
            const T *m = mean + column, *s = scale + column, *b = shift + column;
            const After then = after.from(first);
            BRIM_INDEPENDENT
            for (i64 j = 0; j < count; j++) to[j] = Stored(then(fma_(T(from[j]) - m[j], s[j], b[j]), j));
        });
    });
}

struct Slopes {
    double level, slope;  // sums of g, and of g (x - mean)
};

template <class T, class Stored>
void column_norm_grad(Stored* out, T* of_weight, T* of_bias, Slopes* parts, const Stored* g, const Stored* x, Values<T> weight,
                      const T* means, const T* vars, Table table, T eps) {
    const bool streamed = is_streamed<Stored>(table.rows * table.columns, table.columns);
    const double share = 1.0 / double(table.rows);
    over_pieces(table, [=](Range rows, Range columns, i64 piece) {
        const i64 width = columns.end - columns.begin;
        double totals[2][kTile];
        T centres[kTile];
        for (i64 j = 0; j < width; j++) centres[j] = means[columns.begin + j];
        repeat(centres, width, table);
        const T* mean = centres;
        add_rows<2, T>(totals, table, rows, columns, [=](T(&sums)[2][kTile], i64 first, i64 count) {
            const Stored *gradient = g + first, *from = x + first;
            BRIM_INDEPENDENT
            for (i64 j = 0; j < count; j++) {
                sums[0][j] += T(gradient[j]);
                sums[1][j] += T(gradient[j]) * (T(from[j]) - mean[j]);
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
        write_rows(out, table, rows, columns, streamed, [=](Stored* to, i64 first, i64 column, i64 count) {
            const Stored *gradient = g + first, *from = x + first;
            const T *m = mean + column, *s = scale + column, *l = level + column, *k = slope + column;
            BRIM_INDEPENDENT
            for (i64 j = 0; j < count; j++)
                to[j] = Stored((T(gradient[j]) - fma_(T(from[j]) - m[j], k[j], l[j])) * s[j]);
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

// T: of means, weights and their gradients; S: of images.
#define BRIM_COLUMN_NORM(T, S, name) \
    BRIM_EXPORT void brim_column_norm_##name(S* out, T* means, T* vars, void* parts, const S* x, const T* \
        weight, double weight_value, const T* bias, double bias_value, i64 rows, i64 columns, double eps) { \
        column_norm<T, S>(out, means, vars, static_cast<Moments*>(parts), x, {weight, T(weight_value)}, {bias, \
            T(bias_value)}, {rows, columns}, T(eps)); \
    } \
    BRIM_EXPORT void brim_column_norm_grad_##name(S* out, T* of_weight, T* of_bias, void* parts, const S* g, \
        const S* x, const T* weight, double weight_value, const T* means, const T* vars, i64 rows, i64 columns, \
        double eps) { \
        column_norm_grad<T, S>(out, of_weight, of_bias, static_cast<Slopes*>(parts), g, x, {weight, \
            T(weight_value)}, means, vars, {rows, columns}, T(eps)); \
    }

BRIM_COLUMN_NORM(float, float, f32)
BRIM_COLUMN_NORM(double, double, f64)
BRIM_COLUMN_NORM(float, Half<Float16>, f16)
BRIM_COLUMN_NORM(float, Half<BFloat16>, bf16)

// With what is next to the norm (around_norm.hpp).
BRIM_EXPORT void brim_column_norm_fused_f32(const i64* words, float* out, float* means, float* vars, void* parts,
                                            const float* x, const float* weight, double weight_value,
                                            const float* bias, double bias_value, i64 rows, i64 columns, double eps) {
    with_followed(words, [=](auto after) {
        column_norm<float, float>(out, means, vars, static_cast<Moments*>(parts), x, {weight, float(weight_value)},
                                  {bias, float(bias_value)}, {rows, columns}, float(eps), after);
    });
}
