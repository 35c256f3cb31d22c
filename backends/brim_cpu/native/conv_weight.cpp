// The gradient of conv2d with respect to the weight: sums over pixels of outer products, image after image.
//
// The weight is cut into tiles of some input channels by one panel of output channels, and the images into parts whose
// sums are kept apart and added in order: both by the shape alone. In a tile, rows are (window element, channel).
#include "conv.hpp"

namespace brim {
namespace {

constexpr i64 kPixels = 128;            // of a block of images that is laid out and used at once
constexpr i64 kMore = 2;              // times so many for fewer columns than half a panel
constexpr i64 kTileFloats = 64 * 1024;  // of x in such a block, where that can be
constexpr i64 kPieces = 32;             // parts of the images are added until there are so many pieces
constexpr i64 kSumFloats = 512 * 1024;  // of all parts' sums, but at least one part
constexpr i64 kChannels = 64;           // input channels of a tile of the weight
constexpr i64 kTurned = 128;            // rows that are put into the weight's order together
constexpr i64 kRows = 256;              // rows whose addresses are computed together

// Window elements side by side whose sums are kept in registers, with so many rows of x each: then one number of x meets
// three vectors of gradients. Alone, each product would need a load.
constexpr int kSide = 3, kSideRows = kLanes == 16 ? 8 : 3;

// sum[i][b] += x[i] * g[b] for the window elements [First, End)
template <int First, int End, int R>
inline void meet_side(Floats (&sum)[R][kSide], const float* x, const Floats (&g)[kSide]) {
#pragma GCC unroll 8
    for (int i = 0; i < R; i++) {
        const Floats left = splat(x[i]);
#pragma GCC unroll 3
        for (int b = First; b < End; b++) sum[i][b] = fma_(left, g[b], sum[i][b]);
    }
}

// to[b * tap_step + i * kLanes] (+)= sum over pixels p of x[(p + b) * at.step + i] * gradients[p][:], kLanes columns,
// at least kSide pixels a row.
template <int R>
inline void side_rows(const float* x, const Pixels& at, const float* gradients, float* to, i64 tap_step, bool add) {
    Floats sum[R][kSide] = {};
    for (i64 n = 0; n < at.images; n++) {
        for (i64 r = 0; r < at.rows; r++) {
            const float* from = x + n * at.image_step + r * at.row_step;
            Floats g[kSide] = {load(gradients)};
            meet_side<0, 1>(sum, from, g);
            g[1] = g[0], g[0] = load(gradients + kLanes);
            meet_side<0, 2>(sum, from + at.step, g);
            from += 2 * at.step;
            for (i64 j = 2; j < at.many; j++, from += at.step) {
                g[2] = g[1], g[1] = g[0], g[0] = load(gradients + j * kLanes);
                meet_side<0, 3>(sum, from, g);
            }
            g[2] = g[1], g[1] = g[0];
            meet_side<1, 3>(sum, from, g);
            g[2] = g[1];
            meet_side<2, 3>(sum, from + at.step, g);
            gradients += at.many * kLanes;
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < R; i++)
#pragma GCC unroll 3
        for (int b = 0; b < kSide; b++) {
            float* place = to + b * tap_step + i * kLanes;
            store(place, add ? load(place) + sum[i][b] : sum[i][b]);
        }
}

struct WeightSums {
    Geometry g;
    Images x, out;
    i64 terms, columns, taps;  // terms: input channels of a group; columns: output channels of a group
    i64 blocks, panels, parts;
    bool picked;        // only the pixels that a window of one element meets are laid out
    i64 sh, sw;         // from window to window in what is laid out
    i64 images, image_pieces, rows, tile_h, tile_w, channels, tile_floats, panel_floats, sum_floats, sweeps;

    explicit WeightSums(const Geometry& sizes)
        : g(sizes), x(g.x()), out(g.out()), terms(g.C / g.groups), columns(g.O / g.groups), taps(g.kh * g.kw) {
        blocks = ceil_div(terms, kChannels);
        channels = ceil_div(terms, blocks);
        blocks = ceil_div(terms, channels);
        panels = ceil_div(columns, kPanel);
        sum_floats = g.groups * taps * terms * padded(columns);
        parts = std::min(ceil_div(kPieces, g.groups * blocks * panels), std::max<i64>(1, kSumFloats / sum_floats));
        picked = x.last && taps == 1;
        sh = picked ? 1 : g.sh, sw = picked ? 1 : g.sw;
        tile_w = (g.Q - 1) * sw + (g.kw - 1) * g.dw + 1;
        const i64 pixels = kPixels * std::min<i64>(kMore, kPanel / padded(std::min(columns, kPanel)));
        rows = std::max<i64>(1, std::min(g.P, pixels / g.Q));
        while (rows > 1 && height(rows) * tile_w * channels > kTileFloats) rows = ceil_div(rows, 2);
        sweeps = ceil_div(g.P, rows);
        rows = ceil_div(g.P, sweeps);
        tile_h = height(rows);
        images = sweeps > 1 ? 1 : std::min(pixels / (g.P * g.Q), kTileFloats / (tile_h * tile_w * channels));
        images = std::max<i64>(1, std::min(images, g.N));
        image_pieces = ceil_div(g.N, images);
        parts = std::min(parts, image_pieces);
        tile_floats = (images * tile_h * tile_w * channels + 15) / 16 * 16;
        panel_floats = images * rows * g.Q * padded(std::min(columns, kPanel));
    }

    i64 height(i64 many) const { return (many - 1) * sh + (g.kh - 1) * g.dh + 1; }
    i64 lane_floats() const { return tile_floats + panel_floats; }
    i64 scratch_bytes() const { return (parts * ((sum_floats + 15) / 16 * 16) + g.lanes * lane_floats()) * 4; }

    void run(float* dw, const float* dout, const float* from, float* scratch) const {
        const i64 step = (sum_floats + 15) / 16 * 16;
        float* work = scratch + parts * step;
        in_lanes(g.lanes, parts * g.groups * blocks * panels, [&](i64 which, i64 lane) {
            const i64 part = which % parts, tile = which / parts;
            piece(part, tile, scratch + part * step, dout, from, work + lane * lane_floats());
        });
        parallel(g.groups * panels * ceil_div(terms, 16), [&](i64 which) { collect(which, dw, scratch, step); });
    }

    // The sum of one part of the images over one tile of the weight.
    void piece(i64 part, i64 tile, float* sums, const float* dout, const float* from, float* work) const {
        const i64 panel = tile % panels, block = tile / panels % blocks, group = tile / panels / blocks;
        const Range some = piece_of(terms, channels, block);
        const i64 many = some.end - some.begin, first = panel * kPanel, wide = std::min(kPanel, columns - first);
        const i64 width = padded(wide), m = taps * many;
        float* sum = sums + group * taps * terms * padded(columns) + taps * terms * first;
        float* pixels = work + tile_floats;
        const i64 begin = part * image_pieces / parts, end = (part + 1) * image_pieces / parts;
        bool add = false;
        if (width != wide) std::memset(pixels, 0, size_t(images * rows * g.Q * width) * 4);
        for (i64 piece = begin; piece < end; piece++) {
            const Range these = piece_of(g.N, images, piece);
            for (i64 sweep = 0; sweep < sweeps; sweep++, add = true) {
                const Range lines = piece_of(g.P, rows, sweep);
                const i64 count = lines.end - lines.begin, image_step = height(count) * tile_w * many;
                for (i64 n = these.begin; n < these.end; n++) {
                    const i64 i = n - these.begin;
                    if (picked)
                        pick(work + i * image_step, x.at(from, n) + group * terms + some.begin, lines, many);
                    else
                        cut_out(work + i * image_step, many, x.at(from, n), x, lines.begin * g.sh - g.ph, height(count),
                                -g.pw, tile_w, group * terms + some.begin, many);
                    gradients(pixels + i * count * g.Q * width, width, out.at(dout, n), lines, group * columns + first,
                              wide);
                }
                const Pixels at{these.end - these.begin, image_step, count, sh * tile_w * many, g.Q, sw * many};
                if (width == kLanes && g.kw == kSide && g.dw == 1 && sw == 1 && g.Q >= kSide) {
                    sides(work, many, at, pixels, sum + some.begin * width, add);
                    continue;
                }
                for (i64 row = 0; row < m; row += kRows) {
                    const i64 together = std::min(kRows, m - row);
                    const float* a[kRows];
                    float* to[kRows];
                    for (i64 i = 0; i < together; i++) {
                        const i64 tap = (row + i) / many, k = (row + i) % many;
                        a[i] = work + (tap / g.kw * g.dh * tile_w + tap % g.kw * g.dw) * many + k;
                        to[i] = sum + (tap * terms + some.begin + k) * width;
                    }
                    outer(width / kLanes, together, a, at, pixels, to, 0, add);
                }
            }
        }
    }

    // All products of a block whose results are one vector wide, window row after window row.
    void sides(const float* tile, i64 many, const Pixels& at, const float* pixels, float* sum, bool add) const {
        for (i64 a = 0; a < g.kh; a++) {
            const float* x = tile + a * g.dh * tile_w * many;
            float* to = sum + a * kSide * terms * kLanes;
            const i64 tap_step = terms * kLanes;
            i64 k = 0;
            for (; k + kSideRows <= many; k += kSideRows)
                side_rows<kSideRows>(x + k, at, pixels, to + k * kLanes, tap_step, add);
            if (kSideRows > 4 && k + 4 <= many) side_rows<4>(x + k, at, pixels, to + k * kLanes, tap_step, add), k += 4;
            for (; k < many; k++) side_rows<1>(x + k, at, pixels, to + k * kLanes, tap_step, add);
        }
    }

    // `many` channels of the pixels that windows of one element meet, zeros outside.
    void pick(float* to, const float* image, Range lines, i64 many) const {
        for (i64 i = lines.begin; i < lines.end; i++) {
            const i64 y = i * g.sh - g.ph;
            for (i64 j = 0; j < g.Q; j++, to += many) {
                const i64 at = j * g.sw - g.pw;
                if (y < 0 || y >= g.H || at < 0 || at >= g.W)
                    std::memset(to, 0, size_t(many) * 4);
                else
                    copy_floats(to, image + (y * g.W + at) * g.C, many);
            }
        }
    }

    // Rows of an image of gradients, the channels of one panel side by side.
    void gradients(float* to, i64 width, const float* image, Range lines, i64 first, i64 wide) const {
        const i64 many = (lines.end - lines.begin) * g.Q, at = lines.begin * g.Q;
        if (!out.last)
            turn(to, width, image + first * g.P * g.Q + at, g.P * g.Q, wide, many);
        else
            for (i64 i = 0; i < many; i++) copy_floats(to + i * width, image + (at + i) * g.O + first, wide);
    }

    // Adds up the parts for 16 input channels of one panel, and puts them into the weight's order.
    void collect(i64 which, float* dw, const float* sums, i64 step) const {
        const i64 chunks = ceil_div(terms, 16), panel = which / chunks % panels, group = which / chunks / panels;
        const Range range = piece_of(terms, 16, which % chunks);
        const i64 first = panel * kPanel, wide = std::min(kPanel, columns - first), width = padded(wide);
        const float* from = sums + group * taps * terms * padded(columns) + taps * terms * first;
        float* to = dw + ((group * columns + first) * terms + range.begin) * taps;
        float totals[kTurned * kPanel];  // (channel, window element) by columns
        const i64 all = (range.end - range.begin) * taps;
        for (i64 begin = 0; begin < all; begin += kTurned) {
            const i64 some = std::min(kTurned, all - begin);
            for (i64 i = 0; i < some; i++) {
                const i64 k = range.begin + (begin + i) / taps, tap = (begin + i) % taps;
                const float* row = from + (tap * terms + k) * width;
                float* total = totals + i * width;
                for (i64 c = 0; c < width; c++) total[c] = row[c];
                for (i64 part = 1; part < parts; part++)
                    for (i64 c = 0; c < width; c++) total[c] += row[part * step + c];
            }
            turn(to + begin, terms * taps, totals, width, some, wide);
        }
    }
};

}  // namespace
}  // namespace brim

using namespace brim;

// Bytes of working memory of the function below.
BRIM_EXPORT void brim_conv2d_grad_weight_scratch(i64* bytes, const Geometry* g) {
    *bytes = depthwise_suits(*g) ? depthwise_weight_scratch_bytes(*g) : WeightSums(*g).scratch_bytes();
}

// dw = the gradient of conv2d with respect to the weight, from the gradient dout of its result
BRIM_EXPORT void brim_conv2d_grad_weight(float* dw, const float* dout, const float* x, float* scratch,
                                         const Geometry* g) {
    if (depthwise_suits(*g))
        depthwise_grad_weight(dw, dout, x, scratch, *g);
    else
        WeightSums(*g).run(dw, dout, x, scratch);
}
