// Cross-entropy of rows of scores against classes, and its gradient: no log-probabilities in memory. float32.
#include "exponentials.hpp"
#include "team.hpp"

using namespace brim;

namespace {

i64 rows_per_piece(i64 columns) { return ceil_div(kGrain / 4, columns < 1 ? 1 : columns); }

// Classes of 4 or 8 bytes.
struct Classes {
    const void* at;
    bool wide;
    i64 of(i64 row) const { return wide ? static_cast<const i64*>(at)[row] : static_cast<const i32*>(at)[row]; }
};

// The sum of x - top.
float differences(const float* x, float top, i64 n) {
    float sum;
    fold<Add<float>, 1, 1>(&sum, &x, &top, n, [top](Vector<float>* acc, const Vector<float>* v) {
        acc[0] += v[0] - top;
    });
    return sum;
}

constexpr i64 kBatch = 64;  // rows of which one number each is computed at once

void logarithms(float* totals, i64 n) {
    BRIM_INDEPENDENT
    for (i64 i = 0; i < n; i++) totals[i] = log32(totals[i]);
}

// e^-total; a total is from 0 to log(columns), or NaN.
void inverses(float* out, const float* totals, i64 n) {
    map_row(out, totals, n, [](auto v) { return exp_below(-v); });
}

}  // namespace

// losses, largest scores and logarithms of sums for each row; range[0], range[1]: the smallest and largest class given
// (0 where all are ignored). The loss of a class that does not exist is NaN.
BRIM_EXPORT void brim_cross_entropy_f32(float* losses, float* tops, float* totals, i64* range, const float* x,
                                        const void* index, i64 index_bytes, i64 rows, i64 columns, i64 ignored,
                                        float smoothing) {
    const Classes classes = {index, index_bytes == 8};
    i64 low = 0, high = 0;
    for (i64 r = 0; r < rows; r++) {
        const i64 given = classes.of(r), chosen = given == ignored ? 0 : given;
        low = chosen < low ? chosen : low;
        high = chosen > high ? chosen : high;
    }
    range[0] = low, range[1] = high;
    parallel_ranges(rows, rows_per_piece(columns), [=](i64 begin, i64 end) {
        for (i64 r = begin; r < end; r++) {
            const float* from = x + r * columns;
            tops[r] = top_of(from, columns), totals[r] = exponentials<false>(nullptr, from, tops[r], columns);
        }
        logarithms(totals + begin, end - begin);
        for (i64 r = begin; r < end; r++) {
            const float *from = x + r * columns, top = tops[r], total = totals[r];
            const i64 given = classes.of(r);
            if (total != total) tops[r] = largest_of(from, columns);
            if (given == ignored) {
                losses[r] = 0;
            } else if (given < 0 || given >= columns) {
                losses[r] = __builtin_nanf("");
            } else {
                const float loss = total - (from[given] - top);
                losses[r] = loss;
                if (smoothing != 0) {
                    const float spread = float(columns) * total - differences(from, top, columns);
                    losses[r] = loss * (1.0f - smoothing) + spread * (smoothing / float(columns));
                }
            }
        }
    });
}

// out = g (softmax(x) - q), q the smoothed class; 0 for ignored rows. g is `g_step` numbers apart from row to row.
BRIM_EXPORT void brim_cross_entropy_grad_f32(float* out, const float* g, const float* x, const void* index,
                                             const float* tops, const float* totals, i64 index_bytes, i64 rows,
                                             i64 columns, i64 ignored, float smoothing, i64 g_step) {
    const Classes classes = {index, index_bytes == 8};
    const float share = smoothing / float(columns);
    const bool streamed = is_streamed<float>(rows * columns, columns);
    parallel_ranges(rows, rows_per_piece(columns), [=](i64 begin, i64 end) {
        float shares[kBatch];
        for (i64 r = begin; r < end; r++) {
            const float *from = x + r * columns, top = tops[r];
            const i64 given = classes.of(r), chosen = given == ignored ? -1 : given;
            const float kept = given == ignored ? 0 : g[r * g_step], taken = kept * (1.0f - smoothing);
            const i64 in_batch = (r - begin) % kBatch;
            if (in_batch == 0) inverses(shares, totals + r, end - r < kBatch ? end - r : kBatch);
            const float scale = kept * shares[in_batch], shift = -kept * share;
            write_run(out + r * columns, columns, streamed, [=](float* to, i64 at, i64 count) {
                map_row(to, from + at, count, [=](auto v) { return fma_(exp_below(v - top), scale, shift); });
                if (chosen >= at && chosen < at + count) to[chosen - at] -= taken;
            });
        }
        if (streamed) stream_done();
    });
}
