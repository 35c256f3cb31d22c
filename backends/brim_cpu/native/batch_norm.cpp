// Batch norm and its gradients over (N, C, S) row-major, S > 1: the numbers of a channel are runs of S.
//
// A channel is gone over twice: once for its moments, once to write, the second time from the caches where it fits. Few
// channels are cut into groups of images.
#include "around_norm.hpp"
#include "columns.hpp"
#include "half.hpp"
#include "team.hpp"

using namespace brim;

namespace {

constexpr i64 kFewChannels = 8, kGathered = 2048, kPageBytes = 4096;
constexpr i64 kAhead = 8;          // images whose short runs are asked for early
constexpr i64 kSmallImage = 128;   // pixels
constexpr i64 kLargestMade = 4096;  // pixels of an image whose gradient is computed, but not stored

// How the work is cut, by shape alone.
struct Cut {
    i64 N, C, S;
    i64 group() const {  // images that a piece takes of one channel
        return C >= kFewChannels || N * C * S < 4 * kGrain ? N : ceil_div(kGrain * 4, S);
    }
    i64 groups() const { return ceil_div(N, group()); }
    // Pieces of whole channels while `moments` and writing go together.
    i64 channels_per_piece() const { return ceil_div(kGrain, N * S < 1 ? 1 : N * S); }
    // Short runs are copied side by side first, so many at a time.
    i64 gathered() const { return S >= kGathered / 2 ? 1 : kGathered / S; }
};

template <class T>
const T* gather(T* block, const T* x, const Cut& cut, i64 c, i64 first, i64 images) {
    const T* from = x + (first * cut.C + c) * cut.S;
    if (images == 1) {
        // In long runs the processor looks ahead by itself; the next image's short one lies on another page.
        const i64 nbytes = cut.S * i64(sizeof(T));
        if (nbytes <= kPageBytes) prefetch(from, nbytes, cut.C * nbytes);
        return from;
    }
    for (i64 n = 0; n < images; n++, from += cut.C * cut.S) {
        prefetch(from, cut.S * i64(sizeof(T)), kAhead * cut.C * cut.S * i64(sizeof(T)));
        std::memcpy(block + n * cut.S, from, size_t(cut.S) * sizeof(T));
    }
    return block;
}

template <class T>
const T* gather(T* block, Given<T> g, const Cut& cut, i64 c, i64 first, i64 images) {
    return gather(block, g.at, cut, c, first, images);
}

// Of a gradient that is computed.
const float* gather(float* block, const Masked& g, const Cut& cut, i64 c, i64 first, i64 images) {
    const i64 step = cut.C * cut.S, ahead = images > 1 ? kAhead : 1;
    for (i64 n = 0; n < images; n++) {
        const i64 at = ((first + n) * cut.C + c) * cut.S;
        if (cut.S * i64(sizeof(float)) <= kPageBytes) g.ask(at + ahead * step, cut.S);
        const Masked from = g.from(at);
        float* to = block + n * cut.S;
        BRIM_INDEPENDENT
        for (i64 i = 0; i < cut.S; i++) to[i] = from(i);
    }
    return block;
}

template <class T>
Moments channel_moments(const T* x, const Cut& cut, i64 c, Range images) {
    T block[kGathered];
    Moments all = {0, 0};
    const i64 step = cut.gathered();
    for (i64 n = images.begin; n < images.end; n += step) {
        const i64 taken = images.end - n < step ? images.end - n : step;
        const Moments part = moments_of(gather(block, x, cut, c, n, taken), taken * cut.S);
        join(all, double((n - images.begin) * cut.S), part, double(taken * cut.S));
    }
    return all;
}

template <class T, class After>
void write_channel(T* out, const T* x, const Cut& cut, i64 c, Range images, T mean, T scale, T bias, bool streamed,
                   const After& after) {
    for (i64 n = images.end - 1; n >= images.begin; n--) {  // what was read last is in the caches still
        const i64 at = (n * cut.C + c) * cut.S;
        if (!streamed) {
            for (i64 k = 0; k < cut.S; k += 64 / i64(sizeof(T))) __builtin_prefetch(out + at - kAhead * cut.C * cut.S + k, 1);
            after.ask(at - kAhead * cut.C * cut.S, cut.S);
        }
        write_run(out + at, cut.S, streamed, [=](T* to, i64 begin, i64 count) {
            const T* from = x + at + begin;
            const After then = after.from(at + begin);
            if (streamed) then.ask(count, count);
            BRIM_INDEPENDENT
            for (i64 i = 0; i < count; i++) to[i] = then(fma_(from[i] - mean, scale, bias), i);
        });
    }
    if (streamed) stream_done();
}

template <class T, class After = AsItIs>
void batch_norm(T* out, T* means, T* vars, Moments* parts, const T* x, Values<T> weight, Values<T> bias, Cut cut,
                T eps, After after = {}) {
    const bool streamed = is_streamed<T>(cut.N * cut.C * cut.S, cut.S);
    const auto finish = [=](i64 c, const Moments& all) {
        means[c] = T(all.mean), vars[c] = T(all.m2 / double(cut.N * cut.S));
    };
    const auto write = [=](i64 c, Range images) {
        const T scale = T(1) / std::sqrt(vars[c] + eps) * weight[c];
        write_channel(out, x, cut, c, images, means[c], scale, bias[c], streamed, after);
    };
    const i64 groups = cut.groups();
    if (groups == 1) {
        parallel_ranges(cut.C, cut.channels_per_piece(), [=](i64 begin, i64 end) {
            for (i64 c = begin; c < end; c++) {
                finish(c, channel_moments(x, cut, c, {0, cut.N}));
                write(c, {0, cut.N});
            }
        });
        return;
    }
    parallel(cut.C * groups, [=](i64 piece) {
        parts[piece] = channel_moments(x, cut, piece / groups, piece_of(cut.N, cut.group(), piece % groups));
    });
    for (i64 c = 0; c < cut.C; c++) {
        Moments all = {0, 0};
        for (i64 g = 0; g < groups; g++) {
            const Range images = piece_of(cut.N, cut.group(), g);
            join(all, double(images.begin * cut.S), parts[c * groups + g], double((images.end - images.begin) * cut.S));
        }
        finish(c, all);
    }
    parallel(cut.C * groups, [=](i64 piece) { write(piece / groups, piece_of(cut.N, cut.group(), piece % groups)); });
}

struct Slopes {
    double level, slope;  // sums of g, and of g (x - mean)
};

template <class T, class Gradient>
Slopes channel_slopes(const Gradient& g, const T* x, const Cut& cut, i64 c, Range images, T mean) {
    T block_g[Gradient::kMade ? kLargestMade : kGathered], block_x[kGathered];
    Slopes all = {0, 0};
    const i64 step = cut.gathered();
    for (i64 n = images.begin; n < images.end; n += step) {
        const i64 taken = images.end - n < step ? images.end - n : step;
        T sums[2];
        const T* gradient = gather(block_g, g, cut, c, n, taken);
        slopes_of(sums, gradient, gather(block_x, x, cut, c, n, taken), mean, taken * cut.S);
        all.level += sums[0], all.slope += sums[1];
    }
    return all;
}

// out = scale (g - level / M - (x - mean) slope / (M (var + eps))), M numbers in the channel
template <class T, class Gradient>
void write_channel_grad(T* out, const Gradient& g, const T* x, const Cut& cut, i64 c, Range images, T mean, T scale, T level,
                        T slope, bool streamed) {
    for (i64 n = images.end - 1; n >= images.begin; n--) {  // what was read last is in the caches still
        const i64 at = (n * cut.C + c) * cut.S;
        if (!streamed)
            for (i64 k = 0; k < cut.S; k += 64 / i64(sizeof(T))) __builtin_prefetch(out + at - kAhead * cut.C * cut.S + k, 1);
        write_run(out + at, cut.S, streamed, [=](T* to, i64 begin, i64 count) {
            const T* from = x + at + begin;
            const Gradient gradient = g.from(at + begin);
            BRIM_INDEPENDENT
            for (i64 i = 0; i < count; i++) to[i] = (gradient(i) - fma_(from[i] - mean, slope, level)) * scale;
        });
    }
    if (streamed) stream_done();
}

template <class T, class Gradient>
void batch_norm_grad(T* out, T* of_weight, T* of_bias, Slopes* parts, Gradient g, const T* x, Values<T> weight,
                     const T* means, const T* vars, Cut cut, T eps) {
    const bool streamed = is_streamed<T>(cut.N * cut.C * cut.S, cut.S);
    const double share = 1.0 / double(cut.N * cut.S);
    const i64 groups = cut.groups();
    // The gradient of the weight may lie where the weight does: it is written by the last who reads that.
    const auto write = [=](i64 c, Range images, const Slopes& all) {
        const T rstd = T(1) / std::sqrt(vars[c] + eps);
        const T level = T(all.level * share), slope = T(all.slope * share * double(rstd) * double(rstd));
        write_channel_grad(out, g, x, cut, c, images, means[c], rstd * weight[c], level, slope, streamed);
    };
    const auto finish = [=](i64 c, const Slopes& all) {
        const T rstd = T(1) / std::sqrt(vars[c] + eps);
        of_weight[c] = T(all.slope * double(rstd)), of_bias[c] = T(all.level);
    };
    if (groups == 1) {
        parallel_ranges(cut.C, cut.channels_per_piece(), [=](i64 begin, i64 end) {
            for (i64 c = begin; c < end; c++) {
                const Slopes all = channel_slopes(g, x, cut, c, {0, cut.N}, means[c]);
                write(c, {0, cut.N}, all);
                finish(c, all);
            }
        });
        return;
    }
    parallel(cut.C * groups, [=](i64 piece) {
        const i64 c = piece / groups;
        parts[piece] = channel_slopes(g, x, cut, c, piece_of(cut.N, cut.group(), piece % groups), means[c]);
    });
    for (i64 c = 0; c < cut.C; c++)
        for (i64 n = 1; n < groups; n++) {
            parts[c * groups].level += parts[c * groups + n].level;
            parts[c * groups].slope += parts[c * groups + n].slope;
        }
    parallel(cut.C * groups, [=](i64 piece) {
        write(piece / groups, piece_of(cut.N, cut.group(), piece % groups), parts[piece / groups * groups]);
    });
    for (i64 c = 0; c < cut.C; c++) finish(c, parts[c * groups]);
}

// Small images, and half width: as the columns of a table with a row for each image, some channels' at a time, kTile
// columns side by side. All rows of a piece stay in the caches while it is gone over.
struct Tiles {
    Cut cut;
    Table table() const { return {cut.N, cut.C * cut.S}; }
    // Enough columns for long loops; no more than make some pieces.
    i64 channels() const {
        const i64 most = kTile / cut.S, least = ceil_div(kTile / 4, cut.S);
        return std::max<i64>(1, std::max(least, std::min(most, cut.C / 16)));
    }
};

// body(columns) for the channels [first, end), kTile columns at a time.
template <class F>
void over_columns(const Cut& cut, i64 first, i64 end, const F& body) {
    for (i64 at = first * cut.S; at < end * cut.S; at += kTile) body(Range{at, std::min(at + kTile, end * cut.S)});
}

// body(channel, first column of it, end of them) for the channels of some columns, which count from 0.
template <class F>
void over_channels(const Cut& cut, Range columns, const F& body) {
    for (i64 at = columns.begin; at < columns.end;) {
        const i64 c = at / cut.S, end = std::min((c + 1) * cut.S, columns.end);
        body(c, at - columns.begin, end - columns.begin);
        at = end;
    }
}

// A value of each channel for each of the columns.
template <class T, class F>
void spread_out(T* values, const Cut& cut, Range columns, const F& value) {
    over_channels(cut, columns, [&](i64 c, i64 begin, i64 end) {
        const T v = value(c);
        for (i64 j = begin; j < end; j++) values[j] = v;
    });
    repeat(values, columns.end - columns.begin, Table{cut.N, cut.C * cut.S});
}

template <class T, class Stored, class After = AsItIs>
void tiled_norm(Stored* out, T* means, T* vars, const Stored* x, Values<T> weight, Values<T> bias, Tiles tiles, T eps,
                After after = {}) {
    const Cut cut = tiles.cut;
    const Table table = tiles.table();
    const Range rows{0, cut.N};
    const double numbers = double(cut.N * cut.S);
    const bool streamed = is_streamed<Stored>(cut.N * cut.C * cut.S, tiles.channels() * cut.S);
    parallel_ranges(cut.C, tiles.channels(), [=](i64 first, i64 end) {
        double offs[kTile] = {}, squares[kTile] = {};  // by channel of the piece
        over_columns(cut, first, end, [&](Range columns) {
            double totals[1][kTile];
            add_rows<1, T>(totals, table, rows, columns, [=](T(&sums)[1][kTile], i64 at, i64 count) {
                const Stored* from = x + at;
                prefetch(from, count * i64(sizeof(Stored)), table.columns * i64(sizeof(Stored)));
                for (i64 j = 0; j < count; j++) sums[0][j] += T(from[j]);
            });
            over_channels(cut, columns, [&](i64 c, i64 begin, i64 end) {
                for (i64 j = begin; j < end; j++) offs[c - first] += totals[0][j];
            });
        });
        for (i64 c = first; c < end; c++) means[c] = T(offs[c - first] / numbers), offs[c - first] = 0;
        over_columns(cut, first, end, [&](Range columns) {
            double totals[2][kTile];
            T centres[kTile];
            spread_out(centres, cut, columns, [=](i64 c) { return means[c]; });
            const T* mean = centres;
            add_rows<2, T>(totals, table, rows, columns, [=](T(&sums)[2][kTile], i64 at, i64 count) {
                const Stored* from = x + at;
                BRIM_INDEPENDENT
                for (i64 j = 0; j < count; j++) {
                    const T apart = T(from[j]) - mean[j];
                    sums[0][j] += apart;
                    sums[1][j] += apart * apart;
                }
            });
            over_channels(cut, columns, [&](i64 c, i64 begin, i64 end) {
                for (i64 j = begin; j < end; j++) offs[c - first] += totals[0][j], squares[c - first] += totals[1][j];
            });
        });
        for (i64 c = first; c < end; c++) {
            const Moments all = corrected(means[c], offs[c - first], squares[c - first], numbers);
            means[c] = T(all.mean), vars[c] = T(all.m2 / numbers);
        }
        over_columns(cut, first, end, [&](Range columns) {
            T centres[kTile], scales[kTile], shifts[kTile];
            spread_out(centres, cut, columns, [=](i64 c) { return means[c]; });
            spread_out(scales, cut, columns, [=](i64 c) { return T(1) / std::sqrt(vars[c] + eps) * weight[c]; });
            spread_out(shifts, cut, columns, [=](i64 c) { return bias[c]; });
            const T *mean = centres, *scale = scales, *shift = shifts;
            write_rows(out, table, rows, columns, streamed, [=](Stored* to, i64 at, i64 column, i64 count) {
                const Stored* from = x + at;
                const T *m = mean + column, *s = scale + column, *b = shift + column;
                const After then = after.from(at);
                BRIM_INDEPENDENT
                for (i64 j = 0; j < count; j++) to[j] = Stored(then(fma_(T(from[j]) - m[j], s[j], b[j]), j));
            });
        });
    });
}

template <class T, class Stored, class Gradient>
void tiled_norm_grad(Stored* out, T* of_weight, T* of_bias, Gradient g, const Stored* x, Values<T> weight,
                     const T* means, const T* vars, Tiles tiles, T eps) {
    const Cut cut = tiles.cut;
    const Table table = tiles.table();
    const Range rows{0, cut.N};
    const double share = 1.0 / double(cut.N * cut.S);
    const bool streamed = is_streamed<Stored>(cut.N * cut.C * cut.S, tiles.channels() * cut.S);
    parallel_ranges(cut.C, tiles.channels(), [=](i64 first, i64 end) {
        double level_sums[kTile] = {}, slope_sums[kTile] = {};  // by channel of the piece
        over_columns(cut, first, end, [&](Range columns) {
            double totals[2][kTile];
            T centres[kTile];
            spread_out(centres, cut, columns, [=](i64 c) { return means[c]; });
            const T* mean = centres;
            add_rows<2, T>(totals, table, rows, columns, [=](T(&sums)[2][kTile], i64 at, i64 count) {
                const Stored* from = x + at;
                const Gradient given = g.from(at);
                g.ask(at + table.columns, count);
                prefetch(from, count * i64(sizeof(Stored)), table.columns * i64(sizeof(Stored)));
                BRIM_INDEPENDENT
                for (i64 j = 0; j < count; j++) {
                    const T gradient = T(given(j));
                    sums[0][j] += gradient;
                    sums[1][j] += gradient * (T(from[j]) - mean[j]);
                }
            });
            over_channels(cut, columns, [&](i64 c, i64 begin, i64 end) {
                for (i64 j = begin; j < end; j++)
                    level_sums[c - first] += totals[0][j], slope_sums[c - first] += totals[1][j];
            });
        });
        const auto rstd = [=](i64 c) { return T(1) / std::sqrt(vars[c] + eps); };
        const double *levels = level_sums, *slopes = slope_sums;
        over_columns(cut, first, end, [&](Range columns) {
            T centres[kTile], scales[kTile], level[kTile], slope[kTile];
            spread_out(centres, cut, columns, [=](i64 c) { return means[c]; });
            spread_out(scales, cut, columns, [=](i64 c) { return rstd(c) * weight[c]; });
            spread_out(level, cut, columns, [=](i64 c) { return T(levels[c - first] * share); });
            spread_out(slope, cut, columns, [=](i64 c) {
                return T(slopes[c - first] * share * double(rstd(c)) * double(rstd(c)));
            });
            const T *mean = centres, *scale = scales, *all_level = level, *all_slope = slope;
            write_rows(out, table, rows, columns, streamed, [=](Stored* to, i64 at, i64 column, i64 count) {
                const Stored* from = x + at;
                const Gradient gradient = g.from(at);
                const T *m = mean + column, *s = scale + column, *l = all_level + column, *k = all_slope + column;
                BRIM_INDEPENDENT
                for (i64 j = 0; j < count; j++)
                    to[j] = Stored((T(gradient(j)) - fma_(T(from[j]) - m[j], k[j], l[j])) * s[j]);
            });
        });
        // Last, because the gradient of the weight may lie where the weight does.
        for (i64 c = first; c < end; c++)
            of_weight[c] = T(slopes[c - first] * double(rstd(c))), of_bias[c] = T(levels[c - first]);
    });
}

// Which way numbers of a type are gone over: runs along each channel take less time where they are long.
template <class Stored>
bool in_tiles(const Cut& cut) {
    return sizeof(Stored) == 2 || (cut.S <= kSmallImage && cut.C >= kFewChannels);
}

}  // namespace

// Bytes of `parts`, in out[0].
BRIM_EXPORT void brim_batch_norm_scratch(i64* out, i64 N, i64 C, i64 S) {
    const i64 groups = Cut{N, C, S}.groups();
    out[0] = groups == 1 ? 0 : C * groups * i64(sizeof(Moments));
}

// T: of means, weights and their gradients; S: of images.
#define BRIM_BATCH_NORM(T, name) \
    BRIM_EXPORT void brim_batch_norm_##name(T* out, T* means, T* vars, void* parts, const T* x, const T* \
        weight, double weight_value, const T* bias, double bias_value, i64 N, i64 C, i64 S, double eps) { \
        const Values<T> scale{weight, T(weight_value)}, shift{bias, T(bias_value)}; \
        const Cut cut{N, C, S}; \
        if (in_tiles<T>(cut)) return tiled_norm<T, T>(out, means, vars, x, scale, shift, {cut}, T(eps)); \
        batch_norm<T>(out, means, vars, static_cast<Moments*>(parts), x, scale, shift, cut, T(eps)); \
    } \
    BRIM_EXPORT void brim_batch_norm_grad_##name(T* out, T* of_weight, T* of_bias, void* parts, const T* g, \
        const T* x, const T* weight, double weight_value, const T* means, const T* vars, i64 N, i64 C, i64 S, \
        double eps) { \
        const Values<T> scale{weight, T(weight_value)}; \
        const Cut cut{N, C, S}; \
        if (in_tiles<T>(cut)) \
            return tiled_norm_grad<T, T>(out, of_weight, of_bias, Given<T>{g}, x, scale, means, vars, {cut}, T(eps)); \
        batch_norm_grad<T>(out, of_weight, of_bias, static_cast<Slopes*>(parts), Given<T>{g}, x, scale, means, vars, cut, \
            T(eps)); \
    }

#define BRIM_BATCH_NORM_HALF(S, name) \
    BRIM_EXPORT void brim_batch_norm_##name(S* out, float* means, float* vars, void*, const S* x, const float* \
        weight, double weight_value, const float* bias, double bias_value, i64 N, i64 C, i64 pixels, double eps) { \
        tiled_norm<float, S>(out, means, vars, x, {weight, float(weight_value)}, {bias, float(bias_value)}, {{N, C, \
            pixels}}, float(eps)); \
    } \
    BRIM_EXPORT void brim_batch_norm_grad_##name(S* out, float* of_weight, float* of_bias, void*, const S* g, \
        const S* x, const float* weight, double weight_value, const float* means, const float* vars, i64 N, i64 C, \
        i64 pixels, double eps) { \
        tiled_norm_grad<float, S>(out, of_weight, of_bias, Given<S>{g}, x, {weight, float(weight_value)}, means, vars, {{N, C, \
            pixels}}, float(eps)); \
    }

BRIM_BATCH_NORM(float, f32)
BRIM_BATCH_NORM(double, f64)
BRIM_BATCH_NORM_HALF(Half<Float16>, f16)
BRIM_BATCH_NORM_HALF(Half<BFloat16>, bf16)

// With what is next to the norm (around_norm.hpp); images of at most kLargestMade pixels where a gradient is computed;
// there g is the one that the ReLU was given, and `result` what it gave.
BRIM_EXPORT void brim_batch_norm_fused_f32(const i64* words, float* out, float* means, float* vars, void* parts,
                                           const float* x, const float* weight, double weight_value, const float* bias,
                                           double bias_value, i64 N, i64 C, i64 S, double eps) {
    const Values<float> scale{weight, float(weight_value)}, shift{bias, float(bias_value)};
    const Cut cut{N, C, S};
    with_followed(words, [=](auto after) {
        if (in_tiles<float>(cut))
            return tiled_norm<float, float>(out, means, vars, x, scale, shift, {cut}, float(eps), after);
        batch_norm<float>(out, means, vars, static_cast<Moments*>(parts), x, scale, shift, cut, float(eps), after);
    });
}

BRIM_EXPORT void brim_batch_norm_grad_fused_f32(float* out, float* of_weight, float* of_bias, void* parts,
                                                const float* g, const float* result, const float* x,
                                                const float* weight, double weight_value, const float* means,
                                                const float* vars, i64 N, i64 C, i64 S, double eps) {
    const Values<float> scale{weight, float(weight_value)};
    const Cut cut{N, C, S};
    const Masked made{g, result};
    if (in_tiles<float>(cut))
        return tiled_norm_grad<float, float>(out, of_weight, of_bias, made, x, scale, means, vars, {cut}, float(eps));
    batch_norm_grad<float>(out, of_weight, of_bias, static_cast<Slopes*>(parts), made, x, scale, means, vars, cut,
                           float(eps));
}
