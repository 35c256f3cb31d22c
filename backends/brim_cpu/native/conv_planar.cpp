// conv2d and its gradient with respect to the input where few channels of a result see the same channels of the source
// (a first layer's gradient, groups of few channels) and rows are met without a stride: many pixels of a row at once,
// where conv.cpp would leave most of a vector of channels empty.
//
// A piece is some rows of one image, laid out as planes with zeros around them.
#include "conv.hpp"

namespace brim {
namespace {

constexpr i64 kTileFloats = 64 * 1024;  // of the source in a piece, where that can be
constexpr i64 kPixels = 512;            // of a piece, where the image has so many
constexpr i64 kMostTerms = 2048;        // more are not added up one after another
constexpr int kVectors = kLanes == 16 ? 2 : 1;

struct Planar {
    Images source, result;
    i64 N, groups, terms, columns, kh, kw, dh, dw, move, lowest_y, lowest_x, lanes;
    bool backward;
    i64 rows, pieces, tile_h, tile_w, plane, tile_floats, result_floats, filter_floats;

    Planar(const Geometry& g, bool backward)
        : source(backward ? g.out() : g.x()),
          result(backward ? g.x() : g.out()),
          N(g.N),
          groups(g.groups),
          terms(source.C / g.groups),
          columns(result.C / g.groups),
          kh(g.kh),
          kw(g.kw),
          dh(g.dh),
          dw(g.dw),
          move(backward ? 1 : g.sh),
          lowest_y(backward ? g.ph - (g.kh - 1) * g.dh : -g.ph),
          lowest_x(backward ? g.pw - (g.kw - 1) * g.dw : -g.pw),
          lanes(g.lanes),
          backward(backward) {
        tile_w = result.W + (kw - 1) * dw;
        rows = std::max<i64>(1, std::min(result.H, ceil_div(kPixels, result.W)));
        while (rows > 1 && height(rows) * tile_w * source.C > kTileFloats) rows = ceil_div(rows, 2);
        pieces = ceil_div(result.H, rows);
        rows = ceil_div(result.H, pieces);
        tile_h = height(rows);
        plane = tile_h * tile_w;
        tile_floats = (source.C * plane + kVectors * kLanes + 15) / 16 * 16;  // the last row is read beyond its end
        result_floats = result.last ? (result.C * rows * result.W + 15) / 16 * 16 : 0;
        filter_floats = (groups * terms * kh * kw * columns + 15) / 16 * 16;
    }

    i64 height(i64 many) const { return (many - 1) * move + (kh - 1) * dh + 1; }
    i64 lane_floats() const { return tile_floats + result_floats; }
    i64 scratch_bytes() const { return (filter_floats + lanes * lane_floats()) * 4; }

    // Filters as [group][term][window element][column]; backward: turned around, from outputs to inputs.
    void pack(float* to, const float* w) const {
        const i64 taps = kh * kw, per_term = backward ? columns * taps : taps;
        const i64 per_column = backward ? taps : terms * taps;
        parallel_ranges(groups * terms, ceil_div(kGrain, taps * columns), [&](i64 begin, i64 end) {
            for (i64 at = begin; at < end; at++) {
                const float* from = w + at / terms * terms * columns * taps + at % terms * per_term;
                float* into = to + at * taps * columns;
                for (i64 c = 0; c < columns; c++)
                    for (i64 t = 0; t < taps; t++)
                        into[t * columns + c] = from[c * per_column + (backward ? taps - 1 - t : t)];
            }
        });
    }

    void run(float* to, const float* from, const float* w, float* scratch) const {
        pack(scratch, w);
        in_lanes(lanes, N * pieces, [&](i64 which, i64 lane) {
            float* work = scratch + filter_floats + lane * lane_floats();
            piece(which / pieces, piece_of(result.H, rows, which % pieces), to, from, scratch, work);
        });
    }

    void piece(i64 n, Range lines, float* to, const float* from, const float* filters, float* tile) const {
        const i64 count = lines.end - lines.begin;
        lay_out(tile, source.at(from, n), lines.begin * move + lowest_y, height(count));
        float* image = result.at(to, n);
        float* made = result.last ? tile + tile_floats : image + lines.begin * result.W;
        const i64 step = result.last ? count * result.W : result.H * result.W;
        for (i64 group = 0; group < groups; group++) {
            const float* w = filters + group * terms * kh * kw * columns;
            for (i64 row = 0; row < count; row++) {
                const float* x = tile + group * terms * plane + row * move * tile_w;
                line(x, w, made + group * columns * step + row * result.W, step);
            }
        }
        if (result.last)
            turn(image + lines.begin * result.W * result.C, result.C, made, step, result.C, count * result.W);
    }

    // Rows [y, y + h) of an image as planes of tile_w columns from lowest_x on.
    void lay_out(float* tile, const float* image, i64 y, i64 h) const {
        const i64 first = std::min(std::max<i64>(0, -lowest_x), tile_w);
        const i64 end = std::max(first, std::min(tile_w, source.W - lowest_x));
        for (i64 row = 0; row < h; row++) {
            const bool empty = y + row < 0 || y + row >= source.H || first == end;
            const i64 left = empty ? tile_w : first, at = (y + row) * source.W + lowest_x + first;
            float* line = tile + row * tile_w;
            for (i64 c = 0; c < source.C; c++, line += plane) {
                for (i64 i = 0; i < left; i++) line[i] = 0;
                if (empty) continue;
                if (!source.last) copy_floats(line + first, image + c * source.H * source.W + at, end - first);
                for (i64 i = end; i < tile_w; i++) line[i] = 0;
            }
            if (!empty && source.last)
                turn(tile + row * tile_w + first, plane, image + at * source.C, source.C, end - first, source.C);
        }
    }

    void line(const float* x, const float* w, float* to, i64 step) const {
        switch (columns) {
            case 1: return line_of<1>(x, w, to, step);
            case 2: return line_of<2>(x, w, to, step);
#if defined(__AVX__)
            case 3: return line_of<3>(x, w, to, step);
            case 4: return line_of<4>(x, w, to, step);
#endif
#if defined(__AVX512F__)
            case 5: return line_of<5>(x, w, to, step);
            case 6: return line_of<6>(x, w, to, step);
            case 7: return line_of<7>(x, w, to, step);
            case 8: return line_of<8>(x, w, to, step);
#endif
        }
    }

    template <int O>
    void line_of(const float* x, const float* w, float* to, i64 step) const {
        i64 j = 0;
        if (kVectors > 1)
            for (; j + kLanes < result.W; j += kVectors * kLanes)
                some<O, kVectors>(x + j, w, to + j, step, result.W - j);
        for (; j < result.W; j += kLanes) some<O, 1>(x + j, w, to + j, step, result.W - j);
    }

    template <int O, int V>
    void some(const float* x, const float* w, float* to, i64 step, i64 pixels) const {
        Floats sum[O][V] = {};
        for (i64 k = 0; k < terms; k++, x += plane) {
            for (i64 a = 0; a < kh; a++) {
                for (i64 b = 0; b < kw; b++, w += O) {
                    const float* at = x + a * dh * tile_w + b * dw;
                    Floats right[V];
#pragma GCC unroll 2
                    for (int v = 0; v < V; v++) right[v] = load(at + v * kLanes);
#pragma GCC unroll 8
                    for (int o = 0; o < O; o++)
#pragma GCC unroll 2
                        for (int v = 0; v < V; v++) sum[o][v] = fma_(splat(w[o]), right[v], sum[o][v]);
                }
            }
        }
#pragma GCC unroll 8
        for (int o = 0; o < O; o++) {
#pragma GCC unroll 2
            for (int v = 0; v < V; v++) {
                const i64 left = pixels - v * kLanes;
                if (left >= kLanes)
                    store(to + o * step + v * kLanes, sum[o][v]);
                else if (left > 0)
                    store_part(to + o * step + v * kLanes, sum[o][v], left);
            }
        }
    }
};

}  // namespace

bool planar_suits(const Geometry& g, bool backward) {
    const i64 columns = (backward ? g.C : g.O) / g.groups, terms = (backward ? g.O : g.C) / g.groups;
    return g.sw == 1 && (g.sh == 1 || !backward) && columns * 2 <= kLanes && terms * g.kh * g.kw <= kMostTerms &&
           (backward ? g.W : g.Q) * 2 >= kLanes;
}

i64 planar_scratch_bytes(const Geometry& g, bool backward) { return Planar(g, backward).scratch_bytes(); }

void planar(float* to, const float* from, const float* w, float* scratch, const Geometry& g, bool backward) {
    Planar(g, backward).run(to, from, w, scratch);
}

}  // namespace brim
