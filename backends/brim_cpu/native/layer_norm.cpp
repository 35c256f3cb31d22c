// Layer norm over contiguous rows, and its gradients; those of weight and bias are sums over rows, by pieces.
#include "moments.hpp"
#include "team.hpp"

using namespace brim;

namespace {

i64 rows_per_piece(i64 columns) { return ceil_div(2 * kGrain, columns < 1 ? 1 : columns); }

// An array, or a number repeated into `space` by the caller's thread.
template <class T>
const T* filled(const T* at, double value, T*& space, i64 n) {
    if (at) return at;
    T* made = space;
    space += n;
    for (i64 i = 0; i < n; i++) made[i] = T(value);
    return made;
}

template <class T>
void layer_norm(T* out, T* means, T* vars, T* space, const T* x, const T* weight_at, double weight_value,
                const T* bias_at, double bias_value, i64 rows, i64 n, T eps) {
    const T* weight = filled(weight_at, weight_value, space, n);
    const T* bias = filled(bias_at, bias_value, space, n);
    const bool streamed = is_streamed<T>(rows * n, n);
    parallel_ranges(rows, rows_per_piece(n), [=](i64 begin, i64 end) {
        for (i64 r = begin; r < end; r++) {
            const T* row = x + r * n;
            const Moments found = moments_of(row, n);
            const T mean = T(found.mean), var = T(found.m2 / double(n)), rstd = T(1) / std::sqrt(var + eps);
            means[r] = mean, vars[r] = var;
            write_run(out + r * n, n, streamed, [=](T* to, i64 at, i64 count) {
                const T *from = row + at, *w = weight + at, *b = bias + at;
                if (streamed) prefetch(from, count * i64(sizeof(T)), n * i64(sizeof(T)));  // the next row
                BRIM_INDEPENDENT
                for (i64 j = 0; j < count; j++) to[j] = fma_((from[j] - mean) * rstd, w[j], b[j]);
            });
        }
        if (streamed) stream_done();
    });
}

// Sums over the row of g w, and of g w (x - mean); g and g (x - mean) rstd are added to the sums of the columns.
template <class T>
void row_sums(T sums[2], const T* g, const T* x, const T* w, T mean, i64 n) {
    const T *from[3] = {g, x, w}, padding[3] = {0, mean, 0};
    fold<Add<T>, 2, 3>(sums, from, padding, n, [mean](Vector<T>* acc, const Vector<T>* v) {
        const Vector<T> scaled = v[0] * v[2];
        acc[0] += scaled;
        acc[1] += scaled * (v[1] - mean);
    });
}

template <class T>
struct Row {
    T mean, rstd, level, slope;
};

// A part of a row's gradient; what it adds to the gradients of weight and bias.
template <class T>
void write_grad(T* out, T* slopes, T* levels, const T* g, const T* x, const T* w, i64 n, Row<T> row) {
    BRIM_INDEPENDENT
    for (i64 j = 0; j < n; j++) {
        const T given = g[j], apart = x[j] - row.mean;
        slopes[j] += given * (apart * row.rstd);
        levels[j] += given;
        out[j] = (given * w[j] - fma_(apart, row.slope, row.level)) * row.rstd;
    }
}

// parts: for each piece of rows its sums for the weight (n numbers), then for the bias
template <class T>
void layer_norm_grad(T* out, T* of_weight, T* of_bias, T* space, const T* g, const T* x, const T* weight_at,
                     double weight_value, const T* means, const T* vars, i64 rows, i64 n, T eps) {
    const T* weight = filled(weight_at, weight_value, space, n);
    T* const parts = space;
    const bool streamed = is_streamed<T>(rows * n, n);
    const i64 step = rows_per_piece(n), pieces = ceil_div(rows, step);
    parallel(pieces, [=](i64 piece) {
        const Range range = piece_of(rows, step, piece);
        T *slopes = parts + piece * 2 * n, *levels = slopes + n;
        for (i64 j = 0; j < 2 * n; j++) slopes[j] = 0;
        for (i64 r = range.begin; r < range.end; r++) {
            const T *gradient = g + r * n, *row = x + r * n;
            const T mean = means[r], rstd = T(1) / std::sqrt(vars[r] + eps);
            T sums[2];
            row_sums(sums, gradient, row, weight, mean, n);
            const T level = sums[0] / T(n), slope = sums[1] * rstd * rstd / T(n);
            write_run(out + r * n, n, streamed, [=](T* to, i64 at, i64 count) {
                if (streamed) {  // the next row's, while this one's come from the caches
                    prefetch(gradient + at, count * i64(sizeof(T)), n * i64(sizeof(T)));
                    prefetch(row + at, count * i64(sizeof(T)), n * i64(sizeof(T)));
                }
                write_grad(to, slopes + at, levels + at, gradient + at, row + at, weight + at, count,
                           Row<T>{mean, rstd, level, slope});
            });
        }
        if (streamed) stream_done();
    });
    parallel_ranges(n, kTile, [=](i64 begin, i64 end) {
        fold_rows<Add<T>>(of_weight + begin, parts + begin, pieces, 2 * n, end - begin);
        fold_rows<Add<T>>(of_bias + begin, parts + n + begin, pieces, 2 * n, end - begin);
    });
}

}  // namespace

// Numbers of working memory for the gradients, in out[0], besides n for each of weight and bias that is one number.
BRIM_EXPORT void brim_layer_norm_scratch(i64* out, i64 rows, i64 n) {
    out[0] = ceil_div(rows, rows_per_piece(n)) * 2 * n;
}

#define BRIM_LAYER_NORM(T, name) \
    BRIM_EXPORT void brim_layer_norm_##name(T* out, T* means, T* vars, void* space, const T* x, const T* \
        weight, double weight_value, const T* bias, double bias_value, i64 rows, i64 n, double eps) { \
        layer_norm<T>(out, means, vars, static_cast<T*>(space), x, weight, weight_value, bias, bias_value, \
            rows, n, T(eps)); \
    } \
    BRIM_EXPORT void brim_layer_norm_grad_##name(T* out, T* of_weight, T* of_bias, void* space, const T* g, \
        const T* x, const T* weight, double weight_value, const T* means, const T* vars, i64 rows, i64 n, \
        double eps) { \
        layer_norm_grad<T>(out, of_weight, of_bias, static_cast<T*>(space), g, x, weight, weight_value, means, \
            vars, rows, n, T(eps)); \
    }

BRIM_LAYER_NORM(float, f32)
BRIM_LAYER_NORM(double, f64)
