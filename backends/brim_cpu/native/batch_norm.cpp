// Batch norm and its gradients over (N, C, S) row-major, S > 1: the numbers of a channel are runs of S.
//
// A channel is gone over twice: once for its moments, once to write, the second time from the caches where it fits. Few
// channels are cut into groups of images.
#include "moments.hpp"
#include "team.hpp"

using namespace brim;

namespace {

constexpr i64 kFewChannels = 8, kGathered = 2048, kPageBytes = 4096;

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
    for (i64 n = 0; n < images; n++, from += cut.C * cut.S)
        std::memcpy(block + n * cut.S, from, size_t(cut.S) * sizeof(T));
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

template <class T>
void write_channel(T* out, const T* x, const Cut& cut, i64 c, Range images, T mean, T scale, T bias, bool streamed) {
    for (i64 n = images.end - 1; n >= images.begin; n--) {  // what was read last is in the caches still
        const i64 at = (n * cut.C + c) * cut.S;
        write_run(out + at, cut.S, streamed, [=](T* to, i64 begin, i64 count) {
            const T* from = x + at + begin;
            BRIM_INDEPENDENT
            for (i64 i = 0; i < count; i++) to[i] = fma_(from[i] - mean, scale, bias);
        });
    }
    if (streamed) stream_done();
}

template <class T>
void batch_norm(T* out, T* means, T* vars, Moments* parts, const T* x, Values<T> weight, Values<T> bias, Cut cut,
                T eps) {
    const bool streamed = is_streamed<T>(cut.N * cut.C * cut.S, cut.S);
    const auto finish = [=](i64 c, const Moments& all) {
        means[c] = T(all.mean), vars[c] = T(all.m2 / double(cut.N * cut.S));
    };
    const auto write = [=](i64 c, Range images) {
        const T scale = T(1) / std::sqrt(vars[c] + eps) * weight[c];
        write_channel(out, x, cut, c, images, means[c], scale, bias[c], streamed);
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

template <class T>
Slopes channel_slopes(const T* g, const T* x, const Cut& cut, i64 c, Range images, T mean) {
    T block_g[kGathered], block_x[kGathered];
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
template <class T>
void write_channel_grad(T* out, const T* g, const T* x, const Cut& cut, i64 c, Range images, T mean, T scale, T level,
                        T slope, bool streamed) {
    for (i64 n = images.end - 1; n >= images.begin; n--) {  // what was read last is in the caches still
        const i64 at = (n * cut.C + c) * cut.S;
        write_run(out + at, cut.S, streamed, [=](T* to, i64 begin, i64 count) {
            const T *gradient = g + at + begin, *from = x + at + begin;
            BRIM_INDEPENDENT
            for (i64 i = 0; i < count; i++) to[i] = (gradient[i] - fma_(from[i] - mean, slope, level)) * scale;
        });
    }
    if (streamed) stream_done();
}

template <class T>
void batch_norm_grad(T* out, T* of_weight, T* of_bias, Slopes* parts, const T* g, const T* x, Values<T> weight,
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

}  // namespace

// Bytes of `parts`, in out[0].
BRIM_EXPORT void brim_batch_norm_scratch(i64* out, i64 N, i64 C, i64 S) {
    const i64 groups = Cut{N, C, S}.groups();
    out[0] = groups == 1 ? 0 : C * groups * i64(sizeof(Moments));
}

#define BRIM_BATCH_NORM(T, name) \
    BRIM_EXPORT void brim_batch_norm_##name(T* out, T* means, T* vars, void* parts, const T* x, const T* \
        weight, double weight_value, const T* bias, double bias_value, i64 N, i64 C, i64 S, double eps) { \
        batch_norm<T>(out, means, vars, static_cast<Moments*>(parts), x, {weight, T(weight_value)}, {bias, \
            T(bias_value)}, {N, C, S}, T(eps)); \
    } \
    BRIM_EXPORT void brim_batch_norm_grad_##name(T* out, T* of_weight, T* of_bias, void* parts, const T* g, \
        const T* x, const T* weight, double weight_value, const T* means, const T* vars, i64 N, i64 C, i64 S, \
        double eps) { \
        batch_norm_grad<T>(out, of_weight, of_bias, static_cast<Slopes*>(parts), g, x, {weight, \
            T(weight_value)}, means, vars, {N, C, S}, T(eps)); \
    }

BRIM_BATCH_NORM(float, f32)
BRIM_BATCH_NORM(double, f64)
