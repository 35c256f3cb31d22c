// Softmax, its logarithm, logsumexp and causal softmax over rows, and the gradients of these: float32.
#include "softmax.hpp"

#include "exponentials.hpp"
#include "team.hpp"

using namespace brim;

namespace {

// Rows that are worth a piece: an exponential counts as several plain operations.
i64 rows_per_piece(i64 columns) { return ceil_div(kGrain / 4, columns < 1 ? 1 : columns); }

Powers softmax_long(float* out, const float* x, Row row, float scale) {
    map_row(out, x, row.seen, [=](auto v) { return v * scale; });
    const float top = top_of(out, row.seen), sum = exponentials<true>(out, out, top, row.seen);
    const float share = 1.0f / sum;  // of 1 to `seen`, or NaN
    map_row(out, out, row.seen, [=](auto v) { return v * share; });
    std::memset(out + row.seen, 0, size_t(row.columns - row.seen) * sizeof(float));
    return {top, sum};
}

void softmax_grad_long(float* out, const float* g, const float* y, Row row, float scale) {
    const float *from[2] = {g, y}, padding[2] = {0, 0};
    float total;
    fold<Add<float>, 1, 2>(&total, from, padding, row.seen, [](Vector<float>* acc, const Vector<float>* v) {
        acc[0] += v[0] * v[1];
    });
    BRIM_INDEPENDENT
    for (i64 j = 0; j < row.seen; j++) out[j] = y[j] * (g[j] - total) * scale;
    std::memset(out + row.seen, 0, size_t(row.columns - row.seen) * sizeof(float));
}

#if defined(__AVX512F__)

// The same for rows of which up to kLanes numbers are seen: they stay in registers, so many vectors. Sums have the order
// of those of long rows.
template <int vectors>
struct ShortRows {
    static constexpr i64 width = kWidth<float>;
    using V = Vector<float>;

    static void read(V* v, const float* x, Row row) {
#pragma GCC unroll 4
        for (int k = 0; k < vectors - 1; k++) v[k] = load(x + k * width);
        v[vectors - 1] = load_part(x + (vectors - 1) * width, row.seen - (vectors - 1) * width, 0.0f);
    }

    static void end_with(V* v, Row row, float padding) {
        v[vectors - 1] = first_lanes(v[vectors - 1], row.seen - (vectors - 1) * width, padding);
    }

    static void write(float* out, V* v, Row row) {
        end_with(v, row, 0.0f);
#pragma GCC unroll 4
        for (int k = 0; k < vectors - 1; k++) store(out + k * width, v[k]);
        V last = v[vectors - 1];
        for (i64 at = (vectors - 1) * width; at < row.columns; at += width, last = V{}) {
            const i64 left = row.columns - at;
            left < width ? store_part(out + at, left, last) : store(out + at, last);
        }
    }

    template <class Op>
    static float folded(const V* v) {
        V all[kPerLanes];
#pragma GCC unroll 4
        for (int k = 0; k < kPerLanes; k++) all[k] = spread(Op::start());
#pragma GCC unroll 4
        for (int k = 0; k < vectors; k++) all[k] = Op::of(all[k], v[k]);
        return fold_vectors<Op, float>(all);
    }

    static Powers softmax(float* out, const float* x, Row row, float scale) {
        V v[vectors];
        read(v, x, row);
#pragma GCC unroll 4
        for (int k = 0; k < vectors; k++) v[k] = v[k] * scale;
        end_with(v, row, -__builtin_inff());
        const float top = folded<LargestNumber<float>>(v);
#pragma GCC unroll 4
        for (int k = 0; k < vectors; k++) v[k] = exp_below(v[k] - top);
        const float sum = folded<Add<float>>(v), share = 1.0f / sum;
#pragma GCC unroll 4
        for (int k = 0; k < vectors; k++) v[k] = v[k] * share;
        write(out, v, row);
        return {top, sum};
    }

    static void gradient(float* out, const float* g, const float* y, Row row, float scale) {
        V v[vectors], w[vectors], products[vectors];
        read(v, g, row), read(w, y, row);
#pragma GCC unroll 4
        for (int k = 0; k < vectors; k++) products[k] = v[k] * w[k];
        const float total = folded<Add<float>>(products);
#pragma GCC unroll 4
        for (int k = 0; k < vectors; k++) v[k] = w[k] * (v[k] - total) * scale;
        write(out, v, row);
    }
};

// body(ShortRows<vectors>) with as many vectors as the row has
template <class F>
auto with_vectors(i64 seen, const F& body) {
    static_assert(kPerLanes == 4, "a case for each number of vectors");
    switch (ceil_div(seen, kWidth<float>)) {
        case 1: return body(ShortRows<1>{});
        case 2: return body(ShortRows<2>{});
        case 3: return body(ShortRows<3>{});
        default: return body(ShortRows<4>{});
    }
}

#endif

// Row r of each (R, C) matrix sees its first r + 1 columns; R = 0: all are seen.
Row row_of(i64 r, i64 R, i64 columns) { return {R > 0 && r % R + 1 < columns ? r % R + 1 : columns, columns}; }

void softmax_rows(float* out, const float* x, i64 begin, i64 end, i64 R, i64 columns, float scale) {
    for (i64 r = begin; r < end; r++) softmax_row(out + r * columns, x + r * columns, row_of(r, R, columns), scale);
}

void softmax_grad_rows(float* out, const float* g, const float* y, i64 begin, i64 end, i64 R, i64 columns, float scale) {
    for (i64 at = begin * columns, r = begin; r < end; r++, at += columns)
        softmax_grad_row(out + at, g + at, y + at, row_of(r, R, columns), scale);
}

void log_softmax_grad_row(float* out, const float* g, const float* y, i64 n, float total) {
    BRIM_INDEPENDENT
    for (i64 j = 0; j < n; j++) out[j] = g[j] - exp32(y[j]) * total;
}

// out = scale e^(x - shift)
void spread_row(float* out, const float* x, i64 n, float shift, float scale) {
    BRIM_INDEPENDENT
    for (i64 j = 0; j < n; j++) out[j] = scale * exp32(x[j] - shift);
}

}  // namespace

namespace brim {

Powers softmax_row(float* out, const float* x, Row row, float scale) {
#if defined(__AVX512F__)
    if (row.seen <= kLanes<float>)
        return with_vectors(row.seen, [&](auto rows) { return rows.softmax(out, x, row, scale); });
#endif
    return softmax_long(out, x, row, scale);
}

void softmax_grad_row(float* out, const float* g, const float* y, Row row, float scale) {
#if defined(__AVX512F__)
    if (row.seen <= kLanes<float>)
        return with_vectors(row.seen, [&](auto rows) { return rows.gradient(out, g, y, row, scale); });
#endif
    softmax_grad_long(out, g, y, row, scale);
}

}  // namespace brim

BRIM_EXPORT void brim_softmax_f32(float* out, const float* x, i64 rows, i64 columns) {
    parallel_ranges(rows, rows_per_piece(columns), [=](i64 begin, i64 end) {
        softmax_rows(out, x, begin, end, 0, columns, 1.0f);
    });
}

BRIM_EXPORT void brim_softmax_grad_f32(float* out, const float* g, const float* y, i64 rows, i64 columns) {
    parallel_ranges(rows, rows_per_piece(columns), [=](i64 begin, i64 end) {
        softmax_grad_rows(out, g, y, begin, end, 0, columns, 1.0f);
    });
}

BRIM_EXPORT void brim_log_softmax_f32(float* out, const float* x, i64 rows, i64 columns) {
    parallel_ranges(rows, rows_per_piece(columns), [=](i64 begin, i64 end) {
        for (i64 at = begin * columns; at < end * columns; at += columns) {
            const float* from = x + at;
            const float top = top_of(from, columns), total = log32(exponentials<false>(nullptr, from, top, columns));
            map_row(out + at, from, columns, [=](auto v) { return v - top - total; });
        }
    });
}

BRIM_EXPORT void brim_log_softmax_grad_f32(float* out, const float* g, const float* y, i64 rows, i64 columns) {
    parallel_ranges(rows, rows_per_piece(columns), [=](i64 begin, i64 end) {
        for (i64 at = begin * columns; at < end * columns; at += columns)
            log_softmax_grad_row(out + at, g + at, y + at, columns, sum_of(g + at, columns));
    });
}

BRIM_EXPORT void brim_causal_softmax_f32(float* out, const float* x, i64 rows, i64 R, i64 columns, float scale) {
    parallel_ranges(rows, rows_per_piece(columns), [=](i64 begin, i64 end) {
        softmax_rows(out, x, begin, end, R, columns, scale);
    });
}

BRIM_EXPORT void brim_causal_softmax_grad_f32(float* out, const float* g, const float* y, i64 rows, i64 R, i64 columns,
                                              float scale) {
    parallel_ranges(rows, rows_per_piece(columns), [=](i64 begin, i64 end) {
        softmax_grad_rows(out, g, y, begin, end, R, columns, scale);
    });
}

BRIM_EXPORT void brim_logsumexp_f32(float* out, const float* x, i64 rows, i64 columns) {
    parallel_ranges(rows, rows_per_piece(columns), [=](i64 begin, i64 end) {
        for (i64 r = begin; r < end; r++) {
            const float* from = x + r * columns;
            const float top = top_of(from, columns), shift = std::isfinite(top) ? top : 0;
            if (top > 0 && shift == 0)
                out[r] = largest_of(from, columns);  // infinity, or NaN where there is one
            else
                out[r] = log32(exponentials<false>(nullptr, from, shift, columns)) + shift;
        }
    });
}

// out = g exp(x - total), a number of g and of total for each row
BRIM_EXPORT void brim_logsumexp_grad_f32(float* out, const float* g, const float* x, const float* total, i64 rows,
                                         i64 columns) {
    parallel_ranges(rows, rows_per_piece(columns), [=](i64 begin, i64 end) {
        for (i64 r = begin; r < end; r++) {
            const float *from = x + r * columns, shift = std::isfinite(total[r]) ? total[r] : 0, scale = g[r];
            float* to = out + r * columns;
            spread_row(to, from, columns, shift, scale);
        }
    });
}
