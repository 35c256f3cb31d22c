// The gradient of conv2d with respect to the weight where every channel has one filter of its own (groups = channels in
// and out): products of neighbouring channels, summed over pixels, for some window elements at once. Parts of the
// images are summed apart and added in order.
#include "conv.hpp"

namespace brim {
namespace {

constexpr i64 kChannels = 64;           // of a piece
constexpr i64 kTileFloats = 64 * 1024;  // of x in a block of rows, where that can be
constexpr i64 kPieces = 32;             // parts of the images are added until there are so many pieces
constexpr i64 kTogether = 64;           // pixels that are summed in registers at least, where the image has so many

struct DepthwiseSums {
    Geometry g;
    Images x, out;
    i64 taps, channels, blocks, parts, rows, sweeps, tile_w, tile_floats, pixel_floats, sum_floats;

    explicit DepthwiseSums(const Geometry& sizes) : g(sizes), x(g.x()), out(g.out()), taps(g.kh * g.kw) {
        channels = padded(std::min(g.C, kChannels));
        blocks = ceil_div(g.C, channels);
        parts = std::min(g.N, ceil_div(kPieces, blocks));
        tile_w = (g.Q - 1) * g.sw + (g.kw - 1) * g.dw + 1;
        rows = g.P;
        while (rows > 1 && height(rows) * tile_w * channels > kTileFloats) rows = ceil_div(rows, 2);
        sweeps = ceil_div(g.P, rows);
        tile_floats = height(rows) * tile_w * channels;
        pixel_floats = rows * g.Q * channels;
        sum_floats = blocks * taps * channels;
    }

    i64 height(i64 many) const { return (many - 1) * g.sh + (g.kh - 1) * g.dh + 1; }
    i64 lane_floats() const { return tile_floats + pixel_floats; }
    i64 scratch_bytes() const { return (parts * sum_floats + g.lanes * lane_floats()) * 4; }

    void run(float* dw, const float* dout, const float* from, float* scratch) const {
        float* work = scratch + parts * sum_floats;
        in_lanes(g.lanes, parts * blocks, [&](i64 which, i64 lane) {
            const i64 part = which % parts, block = which / parts;
            float* sum = scratch + part * sum_floats + block * taps * channels;
            piece(part, block, sum, dout, from, work + lane * lane_floats());
        });
        for (i64 c = 0; c < g.C; c++) {
            const i64 step = padded(std::min(channels, g.C - c / channels * channels));
            for (i64 tap = 0; tap < taps; tap++) {
                const float* at = scratch + c / channels * taps * channels + tap * step + c % channels;
                float total = at[0];
                for (i64 part = 1; part < parts; part++) total += at[part * sum_floats];
                dw[c * taps + tap] = total;
            }
        }
    }

    // The sums of some channels over one part of the images.
    void piece(i64 part, i64 block, float* sum, const float* dout, const float* from, float* tile) const {
        const Range some = piece_of(g.C, channels, block);
        const i64 many = some.end - some.begin, step = padded(many);
        float* pixels = tile + tile_floats;
        std::memset(sum, 0, size_t(taps * step) * 4);
        // Lanes without a channel are computed, too.
        if (many != step) std::memset(tile, 0, size_t(lane_floats()) * 4);
        for (i64 n = part * g.N / parts; n < (part + 1) * g.N / parts; n++) {
            for (i64 sweep = 0; sweep < sweeps; sweep++) {
                const Range lines = piece_of(g.P, rows, sweep);
                const i64 count = lines.end - lines.begin;
                cut_out(tile, step, x.at(from, n), x, lines.begin * g.sh - g.ph, height(count), -g.pw, tile_w,
                        some.begin, many);
                const float* gradients = pixels;
                i64 gradient_step = step;
                if (out.last && many == step)  // whole vectors are read where they lie
                    gradients = out.at(dout, n) + lines.begin * g.Q * g.C + some.begin, gradient_step = g.C;
                else
                    cut_out(pixels, step, out.at(dout, n), out, lines.begin, count, 0, g.Q, some.begin, many);
                const i64 together = std::max<i64>(1, kTogether / g.Q);
                for (i64 i = 0; i < count; i += together)
                    add(sum, tile + i * g.sh * tile_w * step, gradients + i * g.Q * gradient_step, gradient_step,
                        std::min(together, count - i), step);
            }
        }
    }

    // sum[tap][c] += sum over `count` rows of pixels of x[pixel + tap][c] * dout[pixel][c], `step` channels
    void add(float* sum, const float* x, const float* dout, i64 dout_step, i64 count, i64 step) const {
        if (g.kh == 3 && g.kw == 3) return add_rows<3, 3, 1>(sum, x, dout, dout_step, count, step);
        for (i64 a = 0; a < g.kh; a++) {
            const float* row = x + a * g.dh * tile_w * step;
            i64 b = 0;
            const auto next = [&](auto run, i64 many) {
                run(sum + (a * g.kw + b) * step, row + b * g.dw * step);
                b += many;
            };
            const i64 kw = g.kw;
            while (b + 5 <= kw)
                next([&](float* to, const float* at) { add_rows<1, 5, 2>(to, at, dout, dout_step, count, step); }, 5);
            while (b + 3 <= kw)
                next([&](float* to, const float* at) { add_rows<1, 3, 4>(to, at, dout, dout_step, count, step); }, 3);
            while (b < kw)
                next([&](float* to, const float* at) { add_rows<1, 1, 4>(to, at, dout, dout_step, count, step); }, 1);
        }
    }

    // A rows by B columns of the window, V vectors of channels at a time.
    template <int A, int B, int V>
    void add_rows(float* sum, const float* x, const float* dout, i64 dout_step, i64 count, i64 step) const {
        if constexpr (V > 1) {
            if (step % (V * kLanes) != 0) return add_rows<A, B, V / 2>(sum, x, dout, dout_step, count, step);
        }
        const i64 across = g.dw * step, next = g.sw * step, ahead = count * g.Q * dout_step;
        for (i64 c = 0; c < step; c += V * kLanes) {
            Floats made[A][B][V] = {};
            for (i64 i = 0; i < count; i++) {
                const float *from[A], *gradient = dout + i * g.Q * dout_step + c;
#pragma GCC unroll 3
                for (int a = 0; a < A; a++) from[a] = x + ((i * g.sh + a * g.dh) * tile_w) * step + c;
                for (i64 j = 0; j < g.Q; j++, gradient += dout_step) {
                    Floats right[V];
#pragma GCC unroll 4
                    for (int v = 0; v < V; v++) {
                        right[v] = load(gradient + v * kLanes);
                        __builtin_prefetch(gradient + v * kLanes + ahead);
                    }
#pragma GCC unroll 3
                    for (int a = 0; a < A; a++) {
#pragma GCC unroll 5
                        for (int b = 0; b < B; b++)
#pragma GCC unroll 4
                            for (int v = 0; v < V; v++)
                                made[a][b][v] = fma_(load(from[a] + b * across + v * kLanes), right[v], made[a][b][v]);
                        from[a] += next;
                    }
                }
            }
#pragma GCC unroll 3
            for (int a = 0; a < A; a++)
#pragma GCC unroll 5
                for (int b = 0; b < B; b++)
#pragma GCC unroll 4
                    for (int v = 0; v < V; v++) {
                        float* to = sum + (a * B + b) * step + c + v * kLanes;
                        store(to, load(to) + made[a][b][v]);
                    }
        }
    }
};

}  // namespace

i64 depthwise_weight_scratch_bytes(const Geometry& g) { return DepthwiseSums(g).scratch_bytes(); }

void depthwise_grad_weight(float* dw, const float* dout, const float* x, float* scratch, const Geometry& g) {
    DepthwiseSums(g).run(dw, dout, x, scratch);
}

}  // namespace brim
