// Cross-entropy of rows of scores against classes, and its gradient: no log-probabilities in memory. float32.
// The powers e^(x - top) are computed by both, or stored by the first in the place of the scores and read by the second.
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

// What the losses need of a row: read before its powers may be written over it.
struct Row {
    float picked, differences;  // score of the row's class less the top, the sum of all of them; where they are needed
};

template <bool kept>
void losses_of(float* losses, float* tops, float* totals, float* powers, const float* x, const Classes& classes,
               Range range, i64 columns, i64 ignored, float smoothing) {
    Row found[kBatch];
    for (i64 first = range.begin; first < range.end; first += kBatch) {
        const i64 last = first + kBatch < range.end ? first + kBatch : range.end;
        for (i64 r = first; r < last; r++) {
            const float *from = x + r * columns, top = top_of(from, columns);
            const i64 given = classes.of(r);
            Row& row = found[r - first];
            if (given != ignored && given >= 0 && given < columns) {
                row.picked = from[given] - top;
                if (smoothing != 0) row.differences = differences(from, top, columns);
            }
            totals[r] = exponentials<kept>(kept ? powers + r * columns : nullptr, from, top, columns);
            if (!kept) tops[r] = totals[r] != totals[r] ? largest_of(from, columns) : top;
        }
        logarithms(totals + first, last - first);
        for (i64 r = first; r < last; r++) {
            const i64 given = classes.of(r);
            if (given == ignored) {
                losses[r] = 0;
            } else if (given < 0 || given >= columns) {
                losses[r] = __builtin_nanf("");
            } else {
                const Row& row = found[r - first];
                const float loss = totals[r] - row.picked;
                losses[r] = loss;
                if (smoothing != 0) {
                    const float spread = float(columns) * totals[r] - row.differences;
                    losses[r] = loss * (1.0f - smoothing) + spread * (smoothing / float(columns));
                }
            }
        }
    }
}

}  // namespace

// losses, largest scores and logarithms of sums for each row; range[0], range[1]: the smallest and largest class given
// (0 where all are ignored). The loss of a class that does not exist is NaN. `powers` (rows, columns) takes e^(x - top)
// and may be x; it is null where they are not kept, and where they are, `tops` is not written.
BRIM_EXPORT void brim_cross_entropy_f32(float* losses, float* tops, float* totals, float* powers, i64* range,
                                        const float* x, const void* index, i64 index_bytes, i64 rows, i64 columns,
                                        i64 ignored, float smoothing) {
    const Classes classes = {index, index_bytes == 8};
    i64 low = 0, high = 0;
    for (i64 r = 0; r < rows; r++) {
        const i64 given = classes.of(r), chosen = given == ignored ? 0 : given;
        low = chosen < low ? chosen : low;
        high = chosen > high ? chosen : high;
    }
    range[0] = low, range[1] = high;
    if (low < 0 || high >= columns) stop_calls();
    const auto compute = powers == nullptr ? losses_of<false> : losses_of<true>;
    parallel_ranges(rows, rows_per_piece(columns), [=](i64 begin, i64 end) {
        compute(losses, tops, totals, powers, x, classes, {begin, end}, columns, ignored, smoothing);
    });
}

// out = g (softmax(x) - q), q the smoothed class; 0 for ignored rows. g is `g_step` numbers apart from row to row.
// Where `tops` is null, x are the powers e^(x - top) that the losses kept; out may be x.
BRIM_EXPORT void brim_cross_entropy_grad_f32(float* out, const float* g, const float* x, const void* index,
                                             const float* tops, const float* totals, i64 index_bytes, i64 rows,
                                             i64 columns, i64 ignored, float smoothing, i64 g_step) {
    const Classes classes = {index, index_bytes == 8};
    const float share = smoothing / float(columns);
    const bool powers = tops == nullptr;
    const bool streamed = out != x && is_streamed<float>(rows * columns, columns);
    parallel_ranges(rows, rows_per_piece(columns), [=](i64 begin, i64 end) {
        float shares[kBatch];
        for (i64 r = begin; r < end; r++) {
            const float *from = x + r * columns, top = powers ? 0 : tops[r];
            const i64 given = classes.of(r), chosen = given == ignored ? -1 : given;
            const float kept = given == ignored ? 0 : g[r * g_step], taken = kept * (1.0f - smoothing);
            const i64 in_batch = (r - begin) % kBatch;
            if (in_batch == 0) inverses(shares, totals + r, end - r < kBatch ? end - r : kBatch);
            const float scale = kept * shares[in_batch], shift = -kept * share;
            write_run(out + r * columns, columns, streamed, [=](float* to, i64 at, i64 count) {
                if (powers)
                    map_row(to, from + at, count, [=](auto v) { return fma_(v, scale, shift); });
                else
                    map_row(to, from + at, count, [=](auto v) { return fma_(exp_below(v - top), scale, shift); });
                if (chosen >= at && chosen < at + count) to[chosen - at] -= taken;
            });
        }
        if (streamed) stream_done();
    });
}
