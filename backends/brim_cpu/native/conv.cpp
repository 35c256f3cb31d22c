// conv2d and its gradient with respect to the input: products of pixels and packed filters, without a column matrix.
//
// Both are a sweep: pixels of a result meet pixels of a source through window elements. A piece is some rows of some
// images: the part of the source that it reads is laid out with channels side by side and zeros around it, so that a
// window element is one distance from a pixel's address; then every row of the product reads its pixels in place.
#include "conv.hpp"

namespace brim {
namespace {

constexpr i64 kPixels = 192;            // pixels of a piece, more where each is little work
constexpr i64 kWork = 1 << 22;          // multiplications that make a piece worth its overhead
constexpr i64 kTileFloats = 128 * 1024; // of the source in a piece, where that can be
constexpr i64 kPieces = 64;             // fewer pieces are cut along the channels of the result as well
constexpr i64 kDepth = 128;             // terms that are added up in registers: their filters stay in the first cache
constexpr i64 kPointers = 256;          // pixels whose addresses are computed together

struct Sweep {
    Axis down, across;
    Images source, result;
    i64 N, groups, terms, columns;  // terms: source channels of a group; columns: result channels of a group
    i64 kw, taps, lanes;
    bool direct;                                     // the source is read where it lies
    i64 images, rows, image_pieces, row_pieces, splits;  // of a piece; rows counts within a residue
    i64 tile_h, tile_w, tile_floats, result_floats, packed_floats;

    Sweep(const Geometry& g, bool backward)
        : down(backward ? g.H : g.P, g.kh, g.sh, g.ph, g.dh, backward),
          across(backward ? g.W : g.Q, g.kw, g.sw, g.pw, g.dw, backward),
          source(backward ? g.out() : g.x()),
          result(backward ? g.x() : g.out()),
          N(g.N),
          groups(g.groups),
          terms(source.C / g.groups),
          columns(result.C / g.groups),
          kw(g.kw),
          taps(g.kh * g.kw),
          lanes(g.lanes) {
        const i64 reach_h = down.lowest + down.reach(down.count), reach_w = across.lowest + across.reach(across.count);
        direct = source.last && down.lowest >= 0 && across.lowest >= 0 && reach_h <= source.H && reach_w <= source.W;
        tile_w = direct ? source.W : across.reach(across.count);
        const i64 row_pixels = down.step * result.W, products = taps * terms * padded(columns) * groups;
        const i64 pixels = std::min<i64>(std::max(kPixels, kWork * down.step * across.step / products), 16 * kPixels);
        rows = std::max<i64>(1, std::min(down.count, pixels / row_pixels));
        while (rows > 1 && down.reach(rows) * tile_w * source.C > kTileFloats) rows = ceil_div(rows, 2);
        images = 1;
        if (rows == down.count) {
            const i64 floats = std::max(down.reach(rows) * tile_w * source.C, result.H * result.W * result.C);
            images = std::max<i64>(1, std::min(pixels / (result.H * result.W), kTileFloats / floats));
            images = std::min(images, N);
        }
        rows = ceil_div(down.count, ceil_div(down.count, rows));
        images = ceil_div(N, ceil_div(N, images));
        row_pieces = ceil_div(down.count, rows);
        image_pieces = ceil_div(N, images);
        const i64 panels = ceil_div(columns, kPanel);
        splits = result.last ? std::min(panels, ceil_div(kPieces, row_pieces * image_pieces)) : 1;
        tile_h = direct ? source.H : down.reach(rows);
        tile_floats = direct ? 0 : images * tile_h * tile_w * source.C;
        result_floats = result.last ? 0 : images * rows * down.step * result.W * result.C;
        packed_floats = groups * taps * terms * padded(columns);
    }

    i64 lane_floats() const { return (tile_floats + result_floats + 15) / 16 * 16; }
    i64 scratch_bytes() const { return ((packed_floats + 15) / 16 * 16 + lanes * lane_floats()) * 4; }

    // Packed filters: by group, residues, panel of columns; then (window element, term, column), columns a whole number
    // of vectors.
    void pack(float* packed, const float* w, bool backward) const {
        constexpr i64 kTogether = 144;
        const i64 panels = ceil_div(columns, kPanel), blocks = ceil_div(terms * taps, kTogether);
        const i64 per_term = backward ? columns * taps : taps, per_column = backward ? taps : terms * taps;
        parallel(groups * panels * blocks, [&](i64 which) {
            const i64 panel = which / blocks % panels, group = which / blocks / panels;
            const Range range = piece_of(terms * taps, kTogether, which % blocks);
            const i64 first = panel * kPanel, many = std::min(kPanel, columns - first), width = padded(many);
            float* to[kMaxTaps * kMaxTaps];
            places(to, packed + group * taps * terms * padded(columns), first, width);
            float turned[kTogether * kPanel];
            if (width != many) std::memset(turned, 0, sizeof turned);
            const float* from = w + group * terms * columns * taps + first * per_column;
            i64 at = range.begin;
            while (at < range.end) {  // window elements of a term follow each other; forward, terms do too
                const i64 k = at / taps, tap = at % taps;
                const i64 end = backward ? std::min(range.end, (k + 1) * taps) : range.end;
                turn(turned, width, from + k * per_term + tap, per_column, many, end - at);
                for (i64 i = 0; i < end - at; i++)
                    copy_floats(to[(at + i) % taps] + (at + i) / taps * width, turned + i * width, width);
                at = end;
            }
        });
    }

    // Where each window element's first term lies in one group and panel of the packed filters.
    void places(float** to, float* packed, i64 first, i64 width) const {
        for (int n = 0; n < down.step; n++) {
            for (int m = 0; m < across.step; m++) {
                const Residue &u = down.residues[n], &v = across.residues[m];
                const i64 met = i64(u.taps) * v.taps;
                for (i64 a = 0; a < u.taps; a++)
                    for (i64 b = 0; b < v.taps; b++)
                        to[u.tap[a] * kw + v.tap[b]] = packed + (met * first + (a * v.taps + b) * width) * terms;
                packed += met * terms * padded(columns);
            }
        }
    }

    void run(float* to, const float* from, const float* w, float* scratch, bool backward) const {
        pack(scratch, w, backward);
        float* work = scratch + (packed_floats + 15) / 16 * 16;
        in_lanes(lanes, image_pieces * row_pieces * splits, [&](i64 which, i64 lane) {
            piece(which, to, from, scratch, work + lane * lane_floats());
        });
    }

    void piece(i64 which, float* to, const float* from, const float* packed, float* work) const {
        const i64 split = which % splits, panels = ceil_div(columns, kPanel);
        const i64 first_panel = split * panels / splits, end_panel = (split + 1) * panels / splits;
        const Range part = piece_of(down.count, rows, which / splits % row_pieces);
        const Range whole = piece_of(N, images, which / splits / row_pieces);
        const i64 many = whole.end - whole.begin, per_image = tile_h * tile_w * source.C;
        const float* tile = work;
        if (direct) {
            tile = source.at(from, whole.begin) + (part.begin * down.move * tile_w) * source.C;
            tile += (down.lowest * tile_w + across.lowest) * source.C;
        } else {
            for (i64 n = 0; n < many; n++)
                cut_out(work + n * per_image, source.C, source.at(from, whole.begin + n), source,
                        part.begin * down.move + down.lowest, down.reach(part.end - part.begin), across.lowest, tile_w,
                        0, source.C);
        }
        const i64 top = part.begin * down.step, bottom = std::min(part.end * down.step, down.size);
        float* made = result.last ? result.at(to, whole.begin) + top * result.W * result.C : work + tile_floats;
        const i64 made_step = (result.last ? result.H : bottom - top) * result.W * result.C;
        for (int n = 0; n < down.step; n++) {
            const i64 count = std::min(part.end, down.residues[n].count) - part.begin;
            for (int m = 0; m < across.step; m++) {
                const Residue &u = down.residues[n], &v = across.residues[m];
                if (count > 0 && v.count > 0)
                    meet(u, v, many, count, tile, per_image, made + (n * result.W + m) * result.C, made_step, packed,
                         first_panel, end_panel);
                packed += i64(u.taps) * v.taps * terms * padded(columns);
            }
        }
        if (result.last) return;
        for (i64 n = 0; n < many; n++)
            put_rows(result.at(to, whole.begin + n), result, top, bottom - top, made + n * made_step);
    }

    // The pixels of one pair of residues: `count` rows of `many` images.
    void meet(const Residue& u, const Residue& v, i64 many, i64 count, const float* tile, i64 tile_step, float* made,
              i64 made_step, const float* packed, i64 first_panel, i64 end_panel) const {
        i64 offset[kMaxTaps * kMaxTaps];
        const bool joined = groups == 1 && v.dense;  // neighbouring window elements are neighbours in memory
        const i64 across_runs = joined ? std::min(v.taps, 1) : v.taps;
        const i64 runs = u.taps * across_runs, length = joined ? v.taps * terms : terms;
        for (i64 a = 0; a < u.taps; a++)
            for (i64 b = 0; b < across_runs; b++)
                offset[a * across_runs + b] =
                    ((u.at[a] - down.lowest) * tile_w + v.at[b] - across.lowest) * source.C;
        const i64 depth = runs * length, pixels = many * count * v.count;
        const float* from[kPointers];
        float* to[kPointers];
        for (i64 begin = 0; begin < pixels; begin += kPointers) {
            const i64 some = std::min(kPointers, pixels - begin);
            i64 column = begin % v.count, row = begin / v.count % count, image = begin / v.count / count;
            for (i64 i = 0; i < some; i++) {
                from[i] = tile + image * tile_step + (row * down.move * tile_w + column * across.move) * source.C;
                to[i] = made + image * made_step + (row * down.step * result.W + column * across.step) * result.C;
                if (++column < v.count) continue;
                column = 0;
                if (++row == count) row = 0, image++;
            }
            for (i64 group = 0; group < groups; group++) {
                for (i64 panel = first_panel; panel < end_panel; panel++) {
                    const i64 first = panel * kPanel, wide = std::min(kPanel, columns - first);
                    const float* b = packed + group * taps * terms * padded(columns) + depth * first;
                    terms_of(some, from, offset, runs, length, b, to, group * columns + first, wide);
                }
                for (i64 r = 0; r < runs; r++) offset[r] += terms;
            }
            for (i64 r = 0; r < runs; r++) offset[r] -= groups * terms;
        }
    }

    // A panel of the product, kDepth terms after kDepth terms.
    static void terms_of(i64 some, const float* const* from, const i64* offset, i64 runs, i64 length, const float* b,
                         float* const* to, i64 shift, i64 wide) {
        if (runs * length <= kDepth) return product(some, from, offset, runs, length, b, to, shift, false, wide);
        const i64 together = std::max<i64>(1, kDepth / length), width = padded(wide);
        for (i64 r = 0; r < runs; r += together) {
            for (i64 k = 0; k < length; k += kDepth) {
                const i64 start = offset[r] + k, part = std::min(kDepth, length - k);
                product(some, from, together > 1 ? offset + r : &start, std::min(together, runs - r), part,
                        b + (r * length + k) * width, to, shift, r + k > 0, wide);
            }
        }
    }
};

}  // namespace
}  // namespace brim

using namespace brim;

// Bytes of working memory of the two functions below.
BRIM_EXPORT void brim_conv2d_scratch(i64* bytes, const Geometry* g, i64 backward) {
    if (depthwise_suits(*g))
        *bytes = depthwise_scratch_bytes(*g, backward != 0);
    else if (planar_suits(*g, backward != 0))
        *bytes = planar_scratch_bytes(*g, backward != 0);
    else
        *bytes = Sweep(*g, backward != 0).scratch_bytes();
}

static void convolve(float* to, const float* from, const float* w, float* scratch, const Geometry& g, bool backward) {
    if (depthwise_suits(g))
        depthwise(to, from, w, scratch, g, backward);
    else if (planar_suits(g, backward))
        planar(to, from, w, scratch, g, backward);
    else
        Sweep(g, backward).run(to, from, w, scratch, backward);
}

// out = conv2d(x, w)
BRIM_EXPORT void brim_conv2d(float* out, const float* x, const float* w, float* scratch, const Geometry* g) {
    convolve(out, x, w, scratch, *g, false);
}

// dx = the gradient of conv2d with respect to x, from the gradient dout of its result
BRIM_EXPORT void brim_conv2d_grad_input(float* dx, const float* dout, const float* w, float* scratch,
                                        const Geometry* g) {
    convolve(dx, dout, w, scratch, *g, true);
}
