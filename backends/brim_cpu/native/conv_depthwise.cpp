// conv2d and its gradient with respect to the input where every channel has one filter of its own (groups = channels in
// and out): each number is read once for every window element that reaches it, so vectors go along the channels, and
// some pixels of a row are computed together.
//
// Images with channels side by side are read and written where they lie. Of others, some rows of some channels are
// turned first, and the results turned back: that costs less than vectors along rows, of which small images fill a part.
#include "conv.hpp"

namespace brim {
namespace {

constexpr i64 kChannels = 256;         // of a piece: their filters stay in the first cache
constexpr i64 kTurnedChannels = 32;    // of a piece that is turned, or as many
constexpr i64 kTurnedFloats = 16 * 1024;  // as make an image of so many floats
constexpr i64 kTileFloats = 32 * 1024;    // that are turned at once, where that can be
constexpr i64 kNearFloats = 256 * 1024;   // of both images: the second cache holds them
constexpr i64 kResults = 32 * 1024;    // of a piece, where the image has so many

// Asks for floats that are to be read, or written: between the rows of a window, the processor does not look ahead enough.
template <bool write>
inline void ask_for(const float* run, i64 floats) {
    for (i64 at = 0; at < floats; at += 16) __builtin_prefetch(run + at, write);
}

struct Depthwise {
    Axis down, across;
    Images source, result;
    i64 N, C, kw, taps, lanes;
    i64 channels, blocks, rows, row_pieces;
    bool direct, direct_result;  // images lie as the loops want them
    bool far;                    // and come from beyond the second cache
    i64 tile_floats, result_floats, filter_step;

    Depthwise(const Geometry& g, bool backward)
        : down(backward ? g.H : g.P, g.kh, g.sh, g.ph, g.dh, backward),
          across(backward ? g.W : g.Q, g.kw, g.sw, g.pw, g.dw, backward),
          source(backward ? g.out() : g.x()),
          result(backward ? g.x() : g.out()),
          N(g.N),
          C(g.C),
          kw(g.kw),
          taps(g.kh * g.kw),
          lanes(g.lanes) {
        i64 most = kChannels;
        if (!(source.last && result.last))
            most = std::min(most, std::max(kTurnedChannels, kTurnedFloats / (source.H * source.W)));
        blocks = ceil_div(C, most);
        channels = padded(ceil_div(C, blocks));
        blocks = ceil_div(C, channels);
        const bool whole_vectors = C - (blocks - 1) * channels >= kLanes;
        direct = source.last && whole_vectors, direct_result = result.last && whole_vectors;
        far = direct && direct_result && N * C * (source.H * source.W + result.H * result.W) > kNearFloats;
        rows = std::max<i64>(1, std::min(down.count, kResults / (down.step * result.W * channels)));
        if (!direct)
            while (rows > 1 && height(rows) * source.W * channels > kTileFloats) rows = ceil_div(rows, 2);
        row_pieces = ceil_div(down.count, rows);
        rows = ceil_div(down.count, row_pieces);
        tile_floats = direct ? 0 : height(rows) * source.W * channels;
        result_floats = direct_result ? 0 : rows * down.step * result.W * channels;
        filter_step = padded(C);
    }

    // Rows of the source that so many rows of each residue reach.
    i64 height(i64 many) const { return std::min(source.H, down.reach(many)); }
    i64 filter_floats() const { return taps * filter_step; }
    i64 lane_floats() const { return tile_floats + result_floats; }
    i64 scratch_bytes() const { return (filter_floats() + lanes * lane_floats()) * 4; }

    // Filters by residues, then (window element, channel).
    void pack(float* to, const float* w) const {
        std::memset(to, 0, size_t(filter_floats()) * 4);
        for (int n = 0; n < down.step; n++)
            for (int m = 0; m < across.step; m++) {
                const Residue &u = down.residues[n], &v = across.residues[m];
                for (int a = 0; a < u.taps; a++)
                    for (int b = 0; b < v.taps; b++, to += filter_step)
                        for (i64 c = 0; c < C; c++) to[c] = w[c * taps + u.tap[a] * kw + v.tap[b]];
            }
    }

    void run(float* to, const float* from, const float* w, float* scratch) const {
        pack(scratch, w);
        float* work = scratch + filter_floats();
        in_lanes(lanes, N * row_pieces * blocks, [&](i64 which, i64 lane) {
            piece(which, to, from, scratch, work + lane * lane_floats());
        });
    }

    void piece(i64 which, float* to, const float* from, const float* filters, float* work) const {
        const Range some = piece_of(C, channels, which % blocks);
        const Range part = piece_of(down.count, rows, which / blocks % row_pieces);
        const i64 n = which / blocks / row_pieces, many = some.end - some.begin, step = padded(many);
        const float* image = source.at(from, n) + some.begin;
        float *tile = work, *made = work + tile_floats, *into = result.at(to, n) + some.begin;
        const i64 top = part.begin * down.step, bottom = std::min(part.end * down.step, down.size);
        i64 from_step = C, to_step = C, wide = many;
        if (!direct) {
            const i64 first = std::max<i64>(0, part.begin * down.move + down.lowest);
            const i64 end = std::min(source.H, (part.end - 1) * down.move + down.highest + 1);
            if (end > first) {
                if (step != many) std::memset(tile, 0, size_t((end - first) * source.W * step) * 4);
                cut_out(tile, step, source.at(from, n), source, first, end - first, 0, source.W, some.begin, many);
            }
            image = tile - first * source.W * step, from_step = step;
        }
        if (!direct_result) into = made - top * result.W * step, to_step = step;
        if (!(direct || direct_result)) wide = step;
        for (int r = 0; r < down.step; r++) {
            const float* w = filters + some.begin;
            for (int before = 0; before < r; before++) w += down.residues[before].taps * kw * filter_step;
            const i64 end = std::min(part.end, down.residues[r].count);
            for (i64 i = part.begin; i < end; i++)
                line(i, down.residues[r], image, from_step, w, into + (i * down.step + r) * result.W * to_step, to_step,
                     wide);
        }
        if (direct_result) return;
        const i64 pixels = (bottom - top) * result.W;
        if (!result.last)
            turn(result.at(to, n) + (some.begin * result.H + top) * result.W, result.H * result.W, made, step, pixels,
                 many);
        else
            for (i64 i = 0; i < pixels; i++)
                copy_floats(result.at(to, n) + some.begin + (top * result.W + i) * C, made + i * step, many);
    }

    // Row i of one residue; to: the row's first pixel.
    void line(i64 i, const Residue& u, const float* image, i64 from_step, const float* w, float* to, i64 to_step,
              i64 many) const {
        const float* at[kMaxTaps * kMaxTaps];  // of each window element for pixel 0, none where that is outside
        for (int m = 0; m < across.step; m++) {
            const Residue& v = across.residues[m];
            const i64 met = i64(u.taps) * v.taps, move = across.move, W = source.W;
            // Pixels that meet the whole window across; before and after them it is partly outside.
            i64 first = 0, end = v.count;
            if (v.taps > 0) {
                first = std::min(v.count, ceil_div(std::max<i64>(0, -v.at[0]), move));
                end = std::max<i64>(0, ceil_div(std::max<i64>(0, W - v.at[v.taps - 1]), move));
                end = std::max(first, std::min(v.count, end));
            }
            const auto place = [&](i64 j) {
                for (int a = 0; a < u.taps; a++) {
                    const i64 y = i * down.move + u.at[a];
                    for (int b = 0; b < v.taps; b++) {
                        const i64 x = j * move + v.at[b];
                        const bool outside = y < 0 || y >= source.H || x < 0 || x >= W;
                        at[a * v.taps + b] = outside ? nullptr : image + (y * W + x) * from_step;
                    }
                }
            };
            const i64 from_move = move * from_step, to_move = across.step * to_step;
            float* pixel = to + m * to_step;
            const auto border = [&](i64 j) {
                place(j);
                together<1, 4>(at, met, w, from_move, pixel + j * to_move, to_move, many);
            };
            for (i64 j = 0; j < first; j++) border(j);
            if (first < end) {
                place(first);
                i64 j = first;
                const auto inside = [&](auto run, i64 pixels) {
                    if (far && m == 0) {
                        const i64 below = ((i * down.move + down.highest + 1) * W + j * move) * from_step;
                        for (i64 y = 0; y < down.move; y++)
                            ask_for<false>(image + below + y * W * from_step, pixels * from_move);
                        ask_for<true>(pixel + j * to_move + down.step * result.W * to_step, pixels * to_move);
                    }
                    run(pixel + j * to_move);
                    for (i64 t = 0; t < met; t++) at[t] += at[t] ? pixels * from_move : 0;
                    j += pixels;
                };
                while (j + 8 <= end)
                    inside([&](float* p) { together<8, 1>(at, met, w, from_move, p, to_move, many); }, 8);
                if (j + 4 <= end)
                    inside([&](float* p) { together<4, 2>(at, met, w, from_move, p, to_move, many); }, 4);
                if (j + 2 <= end)
                    inside([&](float* p) { together<2, 4>(at, met, w, from_move, p, to_move, many); }, 2);
                if (j < end) together<1, 4>(at, met, w, from_move, pixel + j * to_move, to_move, many);
            }
            for (i64 j = end; j < v.count; j++) border(j);
            w += met * filter_step;
        }
    }

    // T neighbouring pixels, V vectors of channels at a time; the last ones overlap those before them.
    template <int T, int V>
    void together(const float* const* at, i64 met, const float* w, i64 from_move, float* to, i64 to_move,
                  i64 many) const {
        if constexpr (V > 1) {
            if (many < V * kLanes) return together<T, V / 2>(at, met, w, from_move, to, to_move, many);
        }
        for (i64 begin = 0; begin < many; begin += V * kLanes) {
            const i64 c = std::min(begin, many - V * kLanes);
            Floats sum[T][V] = {};
            const float* filter = w + c;
            for (i64 t = 0; t < met; t++, filter += filter_step) {
                Floats right[V];
#pragma GCC unroll 4
                for (int v = 0; v < V; v++) right[v] = load(filter + v * kLanes);
                const float* x = at[t] + c;
                if (!at[t]) {  // zeros lie around the image
#pragma GCC unroll 8
                    for (int i = 0; i < T; i++)
#pragma GCC unroll 4
                        for (int v = 0; v < V; v++) sum[i][v] = fma_(Floats{}, right[v], sum[i][v]);
                    continue;
                }
#pragma GCC unroll 8
                for (int i = 0; i < T; i++)
#pragma GCC unroll 4
                    for (int v = 0; v < V; v++)
                        sum[i][v] = fma_(load(x + i * from_move + v * kLanes), right[v], sum[i][v]);
            }
#pragma GCC unroll 8
            for (int i = 0; i < T; i++)
#pragma GCC unroll 4
                for (int v = 0; v < V; v++) store(to + i * to_move + c + v * kLanes, sum[i][v]);
        }
    }
};

}  // namespace

bool depthwise_suits(const Geometry& g) { return g.groups > 1 && g.groups == g.C && g.groups == g.O; }

i64 depthwise_scratch_bytes(const Geometry& g, bool backward) { return Depthwise(g, backward).scratch_bytes(); }

void depthwise(float* to, const float* from, const float* w, float* scratch, const Geometry& g, bool backward) {
    Depthwise(g, backward).run(to, from, w, scratch);
}

}  // namespace brim
