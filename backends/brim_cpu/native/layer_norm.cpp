// Layer norm over contiguous rows, and its gradients; those of weight and bias are sums over rows, by pieces.
#include <algorithm>

#include "moments.hpp"
#include "team.hpp"
#include "vm_tile.hpp"

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

// Rows that are worked on together between formulas: as many as make long loops of them, at least one.
constexpr i64 kTogether = 1024, kLongestRow = 4096;

i64 rows_together(i64 n) { return n < kTogether ? kTogether / n : 1; }

// Rows as a formula makes them: in `space`, or where the formula itself stores them.
const float* made_rows(const i64* formula, TileProgram& program, const float* stored, float* space, i64 first, i64 count) {
    if (formula) program.run(first, count, space);
    return TileProgram::tiled(formula) ? space : stored + first;
}

// As layer_norm, between two formulas; x: the input where a formula does not make it in a tile.
void layer_norm_fused(float* out, float* means, float* vars, float* space, const float* x, Values<float> scales,
                      Values<float> shifts, i64 rows, i64 n, float eps, const i64* before, const i64* after) {
    const float* weight = filled(scales.at, double(scales.value), space, n);
    const float* bias = filled(shifts.at, double(shifts.value), space, n);
    const bool large = is_streamed<float>(rows * n, n), streamed = large && !after;
    parallel_ranges(rows, rows_per_piece(n), [=](i64 begin, i64 end) {
        TileProgram first(before), last(after);
        alignas(64) float given[kLongestRow], made[kLongestRow];
        for (i64 r = begin, count; r < end; r += count) {
            count = std::min(end - r, rows_together(n));
            const float* from = made_rows(before, first, x, given, r * n, count * n);
            for (i64 k = 0; k < count; k++) {
                const float* row = from + k * n;
                const Moments found = moments_of(row, n);
                const float mean = float(found.mean), var = float(found.m2 / double(n)), rstd = 1.0f / std::sqrt(var + eps);
                means[r + k] = mean, vars[r + k] = var;
                float* const to = after ? made + k * n : out + (r + k) * n;
                write_run(to, n, streamed, [=](float* block, i64 at, i64 numbers) {
                    const float *part = row + at, *w = weight + at, *b = bias + at;
                    if (large && !before) prefetch(part, numbers * i64(sizeof(float)), count * n * i64(sizeof(float)));
                    BRIM_INDEPENDENT
                    for (i64 j = 0; j < numbers; j++) block[j] = fma_((part[j] - mean) * rstd, w[j], b[j]);
                });
            }
            if (after) last.run(r * n, count * n, made);
        }
        if (streamed) stream_done();
    });
}

void layer_norm_grad_fused(float* out, float* of_weight, float* of_bias, float* space, const float* g, const float* x,
                           Values<float> scales, const float* means, const float* vars, i64 rows, i64 n, float eps,
                           const i64* before, const i64* after) {
    const float* weight = filled(scales.at, double(scales.value), space, n);
    float* const parts = space;
    const bool large = is_streamed<float>(rows * n, n), streamed = large && !after;
    const i64 step = rows_per_piece(n), pieces = ceil_div(rows, step);
    parallel(pieces, [=](i64 piece) {
        const Range range = piece_of(rows, step, piece);
        float *slopes = parts + piece * 2 * n, *levels = slopes + n;
        for (i64 j = 0; j < 2 * n; j++) slopes[j] = 0;
        TileProgram first(before), last(after);
        alignas(64) float given[kLongestRow], made[kLongestRow];
        for (i64 r = range.begin, count; r < range.end; r += count) {
            count = std::min(range.end - r, rows_together(n));
            const float* from = made_rows(before, first, g, given, r * n, count * n);
            for (i64 k = 0; k < count; k++) {
                const float *gradient = from + k * n, *row = x + (r + k) * n;
                const float mean = means[r + k], rstd = 1.0f / std::sqrt(vars[r + k] + eps);
                float sums[2];
                row_sums(sums, gradient, row, weight, mean, n);
                const Row<float> found{mean, rstd, sums[0] / float(n), sums[1] * rstd * rstd / float(n)};
                float* const to = after ? made + k * n : out + (r + k) * n;
                write_run(to, n, streamed, [=](float* block, i64 at, i64 numbers) {
                    if (large) {  // the rows that come next
                        const i64 nbytes = numbers * i64(sizeof(float)), ahead = count * n * i64(sizeof(float));
                        if (!before) prefetch(gradient + at, nbytes, ahead);
                        prefetch(row + at, nbytes, ahead);
                    }
                    write_grad(block, slopes + at, levels + at, gradient + at, row + at, weight + at, numbers, found);
                });
            }
            if (after) last.run(r * n, count * n, made);
        }
        if (streamed) stream_done();
    });
    parallel_ranges(n, kTile, [=](i64 begin, i64 end) {
        fold_rows<Add<float>>(of_weight + begin, parts + begin, pieces, 2 * n, end - begin);
        fold_rows<Add<float>>(of_bias + begin, parts + n + begin, pieces, 2 * n, end - begin);
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

// With formulas before and after (vm_tile.hpp), rows of at most kLongestRow numbers; out: null where a formula follows.
BRIM_EXPORT void brim_layer_norm_fused_f32(const i64* before, const i64* after, float* out, float* means, float* vars,
                                           void* space, const float* x, const float* weight, double weight_value,
                                           const float* bias, double bias_value, i64 rows, i64 n, double eps) {
    layer_norm_fused(out, means, vars, static_cast<float*>(space), x, {weight, float(weight_value)},
                     {bias, float(bias_value)}, rows, n, float(eps), before, after);
}

BRIM_EXPORT void brim_layer_norm_grad_fused_f32(const i64* before, const i64* after, float* out, float* of_weight,
                                                float* of_bias, void* space, const float* g, const float* x,
                                                const float* weight, double weight_value, const float* means,
                                                const float* vars, i64 rows, i64 n, double eps) {
    layer_norm_grad_fused(out, of_weight, of_bias, static_cast<float*>(space), g, x, {weight, float(weight_value)}, means,
                          vars, rows, n, float(eps), before, after);
}
