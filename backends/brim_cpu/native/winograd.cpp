// 3x3 convolutions of stride 1 with fewer multiplications, and both gradients: the minimal filtering of Winograd over
// tiles of F by F results (Lavin and Gray 2015, "Fast Algorithms for Convolutional Neural Networks", arXiv:1509.09308).
//
// A tile of F + 2 by F + 2 pixels and the filters are transformed, multiplied for each of the (F + 2)^2 places
// (products of matrices, tiles by channels), and transformed back: 2.25 times (F = 2) or 4 times (F = 4) fewer
// multiplications. Sums of different sizes cancel, so results are less exact than those of conv.cpp:
// src/brim/precision.py has numbers.
#include "conv.hpp"

namespace brim {
namespace {

constexpr i64 kTiles = 64;               // of a piece at least,
constexpr i64 kMoreTiles = 96;           // at most,
constexpr i64 kTileFloats = 192 * 1024;  // and so many transformed floats, if that is in between
// Transformed for the gradient of the weight at a time: so many floats, which the second cache holds, or as many as
// there are sums, because all of those are read and written each time.
constexpr i64 kSumTileFloats = 256 * 1024;
constexpr i64 kPointers = 128;
constexpr i64 kTerms = 16;      // whose filters a piece transforms; their places are far apart,
constexpr i64 kTermsAhead = 2;  // so lines are asked for before they are written

inline i64 rounded(i64 floats) { return (floats + 15) / 16 * 16; }

// The transforms along one axis. in: pixels; out: results; back: the adjoint of out; kFilter: filters.
template <int F>
struct Transform;

template <>
struct Transform<2> {
    static constexpr float kFilter[4][3] = {{1, 0, 0}, {0.5f, 0.5f, 0.5f}, {0.5f, -0.5f, 0.5f}, {0, 0, 1}};
    static void in(const Floats* d, Floats* to) {
        to[0] = d[0] - d[2], to[1] = d[1] + d[2], to[2] = d[2] - d[1], to[3] = d[1] - d[3];
    }
    static void out(const Floats* m, Floats* to) { to[0] = m[0] + m[1] + m[2], to[1] = m[1] - m[2] - m[3]; }
    static void back(const Floats* y, Floats* to) {
        to[0] = y[0], to[1] = y[0] + y[1], to[2] = y[0] - y[1], to[3] = -y[1];
    }
};

template <>
struct Transform<4> {
    static constexpr float kFilter[6][3] = {{1 / 4.f, 0, 0},
                                            {-1 / 6.f, -1 / 6.f, -1 / 6.f},
                                            {-1 / 6.f, 1 / 6.f, -1 / 6.f},
                                            {1 / 24.f, 1 / 12.f, 1 / 6.f},
                                            {1 / 24.f, -1 / 12.f, 1 / 6.f},
                                            {0, 0, 1}};
    static void in(const Floats* d, Floats* to) {
        const Floats two = splat(2), four = splat(4), p = d[4] - d[2], r = d[3] - d[1];
        const Floats a = fma_(-four, d[2], d[4]), b = fma_(-four, d[1], d[3]);
        to[0] = fma_(four, d[0] - d[2], p), to[1] = a + b, to[2] = a - b;
        to[3] = fma_(two, r, p), to[4] = fma_(-two, r, p), to[5] = fma_(-four, r, d[5] - d[3]);
    }
    static void out(const Floats* m, Floats* to) {
        const Floats a = m[1] + m[2], b = m[1] - m[2], p = m[3] + m[4], q = m[3] - m[4];
        to[0] = m[0] + a + p, to[1] = fma_(splat(2), q, b), to[2] = fma_(splat(4), p, a);
        to[3] = fma_(splat(8), q, b) + m[5];
    }
    static void back(const Floats* y, Floats* to) {
        const Floats two = splat(2), four = splat(4), a = y[0] + y[2], b = y[1] + y[3];
        const Floats p = fma_(four, y[2], y[0]), q = fma_(four, y[3], y[1]);
        to[0] = y[0], to[1] = a + b, to[2] = a - b, to[3] = fma_(two, q, p), to[4] = fma_(-two, q, p), to[5] = y[3];
    }
};

// Both axes of n by n vectors, n becoming m: `one` transforms along an axis.
template <int N, int M, void (*One)(const Floats*, Floats*)>
inline void both_axes(Floats (&from)[N][N], Floats (&to)[M][M]) {
    Floats half[N][M];
#pragma GCC unroll 6
    for (int j = 0; j < N; j++) {
        Floats column[N], made[M];
#pragma GCC unroll 6
        for (int i = 0; i < N; i++) column[i] = from[i][j];
        One(column, made);
#pragma GCC unroll 6
        for (int i = 0; i < M; i++) half[j][i] = made[i];
    }
#pragma GCC unroll 6
    for (int i = 0; i < M; i++) {
        Floats row[N];
#pragma GCC unroll 6
        for (int j = 0; j < N; j++) row[j] = half[j][i];
        One(row, to[i]);
    }
}

// Rows of tiles of images as pieces.
template <int F>
struct Tiling {
    i64 N, H, W;  // results
    i64 down, across, images, rows, image_pieces, row_pieces, most;

    Tiling(i64 N, i64 H, i64 W, i64 channels) : N(N), H(H), W(W), down(ceil_div(H, F)), across(ceil_div(W, F)) {
        const i64 fit = kTileFloats / ((F + 2) * (F + 2) * channels);
        const i64 tiles = std::max(kTiles, std::min(kMoreTiles, fit));
        rows = std::max<i64>(1, std::min(down, tiles / across));
        images = rows == down ? std::max<i64>(1, std::min(N, tiles / (down * across))) : 1;
        rows = ceil_div(down, ceil_div(down, rows));
        image_pieces = ceil_div(N, images);
        row_pieces = ceil_div(down, rows);
        most = images * rows * across;
    }

    i64 height() const { return rows * F + 2; }
    i64 width() const { return across * F + 2; }
};

// Pixels of one image with channels side by side; of rows and columns outside of it, zeros are read.
struct View {
    const float* pixels;  // of row 0, column 0
    const float* zeros;
    i64 height, width, row_step, step;

    const float* at(i64 y, i64 x) const {
        return y < 0 || y >= height || x < 0 || x >= width ? zeros : pixels + y * row_step + x * step;
    }
};

// A piece's part of one image, `many` channels from `first` on: where it lies if vectors can be read there, else copied
// to `copy` (rows [y, y + h), columns [x, x + w)) with `step` floats from pixel to pixel and the rest of each zero.
inline View view(const float* image, const Images& of, i64 y, i64 h, i64 x, i64 w, i64 first, i64 many, float* copy,
                 i64 step, const float* zeros) {
    if (of.last && many % kLanes == 0) return {image + first, zeros, of.H, of.W, of.W * of.C, of.C};
    if (step != many)
        for (i64 i = 0; i < h * w; i++) std::memset(copy + i * step + many, 0, size_t(step - many) * 4);
    cut_out(copy, step, image, of, y, h, x, w, first, many);
    return {copy - (y * w + x) * step, zeros, y + h, x + w, w * step, step};
}

// A row of tiles of N by N pixels, the first at (y, x), one every F columns, transformed: to[place][tile][channel].
template <int F, int N, void (*One)(const Floats*, Floats*)>
void transform_row(float* to, i64 place_step, i64 step, const View& from, i64 y, i64 x, i64 across, i64 channels) {
    constexpr int A = F + 2;
    const i64 ahead = F * from.step;
    for (i64 t = 0; t < across; t++, to += step) {
        const float* at[N][N];
        for (int i = 0; i < N; i++)
            for (int j = 0; j < N; j++) at[i][j] = from.at(y + i, x + t * F + j);
        for (i64 c = 0; c < channels; c += kLanes) {
            Floats d[N][N], v[A][A];
#pragma GCC unroll 6
            for (int i = 0; i < N; i++)
#pragma GCC unroll 6
                for (int j = 0; j < N; j++) d[i][j] = load(at[i][j] + c);
#pragma GCC unroll 6
            for (int i = 0; i < N; i++)
#pragma GCC unroll 6
                for (int j = N - F; j < N; j++) __builtin_prefetch(at[i][j] + ahead + c);
            both_axes<N, A, One>(d, v);
#pragma GCC unroll 6
            for (int i = 0; i < A; i++)
#pragma GCC unroll 6
                for (int j = 0; j < A; j++) store(to + (i * A + j) * place_step + c, v[i][j]);
        }
    }
}

// Floats from place to place: not a multiple of a page, because the places of a tile would evict each other.
inline i64 apart(i64 floats) { return floats / 16 % 2 ? floats : floats + 16; }

template <int F>
struct Winograd {
    static constexpr int A = F + 2, kPlaces = A * A;
    Images source, result;
    i64 N, terms, columns, from_y, from_x, lanes;
    Tiling<F> tiling;
    i64 step, wide;  // floats from tile to tile of transformed pixels and of products
    i64 tile_floats, v_floats, m_floats, result_floats, filter_step, filter_floats;

    Winograd(const Geometry& g, bool backward)
        : source(backward ? g.out() : g.x()),
          result(backward ? g.x() : g.out()),
          N(g.N),
          terms(source.C),
          columns(result.C),
          from_y(backward ? g.ph - 2 : -g.ph),
          from_x(backward ? g.pw - 2 : -g.pw),
          lanes(g.lanes),
          tiling(N, result.H, result.W, source.C + result.C),
          step(padded(terms)),
          wide(padded(columns)) {
        tile_floats = rounded(step + tiling.height() * tiling.width() * step);
        v_floats = kPlaces * apart(tiling.most * step);
        m_floats = kPlaces * apart(tiling.most * wide);
        result_floats = result.last ? 0 : rounded(tiling.rows * F * result.W * columns);
        filter_step = apart(terms * wide);
        filter_floats = kPlaces * filter_step;
    }

    i64 lane_floats() const { return tile_floats + v_floats + m_floats + result_floats; }
    i64 scratch_bytes() const { return (rounded(filter_floats) + lanes * lane_floats()) * 4; }

    // Filters as [place][panel][term][column]; backward: turned around, from outputs to inputs.
    void transform_filters(float* to, const float* w, bool backward) const {
        const i64 per_term = backward ? columns * 9 : 9, per_column = backward ? 9 : terms * 9;
        parallel(ceil_div(terms, kTerms) * ceil_div(columns, kLanes), [&](i64 which) {
            const i64 column = which % ceil_div(columns, kLanes) * kLanes;
            const Range range = piece_of(terms, kTerms, which / ceil_div(columns, kLanes));
            const i64 first = column / kPanel * kPanel, width = padded(std::min(kPanel, columns - first));
            for (i64 k = range.begin; k < range.end; k++) {
                float taps[9][kLanes] = {};
                turn(taps[0], kLanes, w + k * per_term + column * per_column, per_column,
                     std::min<i64>(kLanes, columns - column), 9);
                const auto tap = [&](int i, int j) { return load(taps[backward ? 8 - 3 * i - j : 3 * i + j]); };
                Floats half[A][3];
                for (int i = 0; i < A; i++)
                    for (int j = 0; j < 3; j++) {
                        const float* f = Transform<F>::kFilter[i];
                        half[i][j] = f[0] * tap(0, j) + f[1] * tap(1, j) + f[2] * tap(2, j);
                    }
                float* into = to + terms * first + k * width + column - first;
                for (int i = 0; i < A; i++)
                    for (int j = 0; j < A; j++) {
                        const float* f = Transform<F>::kFilter[j];
                        __builtin_prefetch(into + (i * A + j) * filter_step + kTermsAhead * width, 1);
                        store(into + (i * A + j) * filter_step,
                              f[0] * half[i][0] + f[1] * half[i][1] + f[2] * half[i][2]);
                    }
            }
        });
    }

    void run(float* to, const float* from, const float* w, float* scratch, bool backward) const {
        transform_filters(scratch, w, backward);
        float* work = scratch + rounded(filter_floats);
        in_lanes(lanes, tiling.image_pieces * tiling.row_pieces, [&](i64 which, i64 lane) {
            piece(which, to, from, scratch, work + lane * lane_floats());
        });
    }

    void piece(i64 which, float* to, const float* from, const float* filters, float* work) const {
        const Range rows = piece_of(tiling.down, tiling.rows, which % tiling.row_pieces);
        const Range images = piece_of(N, tiling.images, which / tiling.row_pieces);
        const i64 height = rows.end - rows.begin, per_image = height * tiling.across;
        const i64 tiles = (images.end - images.begin) * per_image;
        float *v = work + tile_floats, *m = v + v_floats, *made = m + m_floats;
        const i64 v_step = apart(tiles * step), m_step = apart(tiles * wide);
        std::memset(work, 0, size_t(step) * 4);
        for (i64 n = images.begin; n < images.end; n++) {
            const View seen = view(source.at(from, n), source, rows.begin * F + from_y, height * F + 2, from_x,
                                   tiling.width(), 0, terms, work + step, step, work);
            float* into = v + (n - images.begin) * per_image * step;
            for (i64 r = 0; r < height; r++)
                transform_row<F, A, Transform<F>::in>(into + r * tiling.across * step, v_step, step, seen,
                                                      (rows.begin + r) * F + from_y, from_x, tiling.across, terms);
        }
        for (i64 place = 0; place < kPlaces; place++)
            multiply(tiles, v + place * v_step, filters + place * filter_step, m + place * m_step);
        const i64 top = rows.begin * F, bottom = std::min(rows.end * F, result.H);
        for (i64 n = images.begin; n < images.end; n++) {
            const float* products = m + (n - images.begin) * per_image * wide;
            if (result.last) {
                put_tiles(result.at(to, n) + top * result.W * columns, bottom - top, products, m_step, height);
            } else {
                put_tiles(made, bottom - top, products, m_step, height);
                put_rows(result.at(to, n), result, top, bottom - top, made);
            }
        }
    }

    // Products of one place: tiles by terms, terms by columns.
    void multiply(i64 tiles, const float* v, const float* filters, float* m) const {
        constexpr i64 kDepth = 256;
        const float* from[kPointers];
        float* to[kPointers];
        for (i64 begin = 0; begin < tiles; begin += kPointers) {
            const i64 some = std::min(kPointers, tiles - begin);
            for (i64 i = 0; i < some; i++) from[i] = v + (begin + i) * step, to[i] = m + (begin + i) * wide;
            for (i64 first = 0; first < columns; first += kPanel) {
                const i64 width = padded(std::min(kPanel, columns - first));
                for (i64 k = 0; k < terms; k += kDepth)
                    product(some, from, &k, 1, std::min(kDepth, terms - k), filters + terms * first + k * width, to,
                            first, k > 0, width);
            }
        }
    }

    // Products of an image's tiles, transformed back, as `height` rows of pixels.
    void put_tiles(float* to, i64 height, const float* m, i64 place_step, i64 rows) const {
        const i64 line = result.W * columns;
        for (i64 r = 0; r < rows; r++) {
            for (i64 t = 0; t < tiling.across; t++, m += wide) {
                const i64 down = std::min<i64>(F, height - r * F), across = std::min<i64>(F, result.W - t * F);
                float* pixels = to + r * F * line + t * F * columns;
                for (i64 c = 0; c < columns; c += kLanes) {
                    Floats p[A][A], y[F][F];
#pragma GCC unroll 6
                    for (int i = 0; i < A; i++)
#pragma GCC unroll 6
                        for (int j = 0; j < A; j++) p[i][j] = load(m + (i * A + j) * place_step + c);
                    both_axes<A, F, Transform<F>::out>(p, y);
                    float* at = pixels + c;
                    if (down == F && across == F && columns - c >= kLanes) {
#pragma GCC unroll 4
                        for (int i = 0; i < F; i++)
#pragma GCC unroll 4
                            for (int j = 0; j < F; j++) {
                                store(at + i * line + j * columns, y[i][j]);
                                __builtin_prefetch(at + i * line + (j + F) * columns, 1);
                            }
                    } else {
                        put_part(at, line, y, down, across, std::min<i64>(kLanes, columns - c));
                    }
                }
            }
        }
    }

    // Of a tile over the edge, or of fewer channels than lanes.
    __attribute__((noinline)) void put_part(float* to, i64 line, const Floats (&y)[F][F], i64 down, i64 across,
                                            i64 many) const {
        for (i64 i = 0; i < down; i++)
            for (i64 j = 0; j < across; j++) store_part(to + i * line + j * columns, y[i][j], many);
    }
};

// The gradient with respect to the weight: transformed pixels times transformed gradients, summed over tiles. All tiles
// of some images are transformed first, then each place of each block of channels is one product over all of them.
template <int F>
struct WinogradSums {
    static constexpr int A = F + 2, kPlaces = A * A;
    Geometry g;
    Images x, out;
    i64 down, across, lines, pieces, blocks, panels, wide;
    i64 v_block, d_block, v_place, d_place, sum_place, copy_size;

    explicit WinogradSums(const Geometry& sizes)
        : g(sizes), x(g.x()), out(g.out()), down(ceil_div(g.P, F)), across(ceil_div(g.Q, F)), wide(padded(g.O)) {
        const i64 all = g.N * down;  // rows of tiles
        const i64 floats = std::max(kSumTileFloats, kPlaces * g.C * wide);
        lines = std::max<i64>(1, std::min(all, floats / (kPlaces * across * (padded(g.C) + wide))));
        pieces = ceil_div(all, lines);
        lines = ceil_div(all, pieces);
        blocks = ceil_div(g.C, kPanel);
        panels = ceil_div(g.O, kPanel);
        v_block = lines * across * std::min(padded(g.C), kPanel), v_place = apart(blocks * v_block);
        d_block = lines * across * std::min(wide, kPanel), d_place = apart(panels * d_block);
        sum_place = apart(g.C * wide);
        copy_size = rounded(((F + 2) * (across * F + 2) + 1) * kPanel);
    }

    i64 scratch_bytes() const {
        return (kPlaces * (v_place + d_place + sum_place) + g.lanes * copy_size) * 4;
    }

    void run(float* dw, const float* dout, const float* from, float* scratch) const {
        float *v = scratch, *d = v + kPlaces * v_place, *sums = d + kPlaces * d_place;
        float* copies = sums + kPlaces * sum_place;
        for (i64 piece = 0; piece < pieces; piece++) {
            const Range some = piece_of(g.N * down, lines, piece);
            const i64 count = some.end - some.begin;
            in_lanes(g.lanes, count * (blocks + panels), [&](i64 which, i64 lane) {
                const i64 line = which / (blocks + panels), block = which % (blocks + panels);
                float* copy = copies + lane * copy_size;
                if (block < blocks)
                    pixels(v + block * v_block, line, some.begin + line, block, from, copy);
                else
                    gradients(d + (block - blocks) * d_block, line, some.begin + line, block - blocks, dout, copy);
            });
            parallel(kPlaces * blocks * panels, [&](i64 which) {
                const i64 panel = which % panels, block = which / panels % blocks, place = which / panels / blocks;
                multiply(sums + place * sum_place, v + place * v_place + block * v_block,
                         d + place * d_place + panel * d_block, block, panel, count * across, piece > 0);
            });
        }
        parallel(ceil_div(g.C, 4) * ceil_div(g.O, kLanes), [&](i64 which) { collect(which, dw, sums); });
    }

    // A row of tiles of one block of channels: which row of which image.
    void pixels(float* to, i64 at, i64 line, i64 block, const float* from, float* copy) const {
        const i64 first = block * kPanel, many = std::min(kPanel, g.C - first), step = padded(many);
        const i64 y = line % down * F - g.ph;
        std::memset(copy, 0, size_t(kPanel) * 4);
        const View seen = view(x.at(from, line / down), x, y, F + 2, -g.pw, across * F + 2, first, many, copy + kPanel,
                               step, copy);
        transform_row<F, A, Transform<F>::in>(to + at * across * step, v_place, step, seen, y, -g.pw, across, many);
    }

    void gradients(float* to, i64 at, i64 line, i64 panel, const float* dout, float* copy) const {
        const i64 first = panel * kPanel, many = std::min(kPanel, g.O - first), step = padded(many);
        const i64 y = line % down * F;
        std::memset(copy, 0, size_t(kPanel) * 4);
        const View seen = view(out.at(dout, line / down), out, y, F, 0, across * F, first, many, copy + kPanel, step,
                               copy);
        transform_row<F, F, Transform<F>::back>(to + at * across * step, d_place, step, seen, y, 0, across, many);
    }

    // The products of one place, of one block of input channels by one panel of output channels.
    void multiply(float* sums, const float* v, const float* d, i64 block, i64 panel, i64 tiles, bool add) const {
        const i64 first = block * kPanel, many = std::min(kPanel, g.C - first), step = padded(many);
        const i64 columns = padded(std::min(kPanel, g.O - panel * kPanel));
        const float* a[kPanel];
        float* to[kPanel];
        for (i64 k = 0; k < many; k++) a[k] = v + k, to[k] = sums + (first + k) * wide + panel * kPanel;
        outer(columns / kLanes, many, a, {1, 0, 1, 0, tiles, step}, d, to, 0, add);
    }

    // Transforms the sums of some filters back and puts them into the weight's order.
    void collect(i64 which, float* dw, const float* sums) const {
        const i64 column = which % ceil_div(g.O, kLanes) * kLanes;
        const Range range = piece_of(g.C, 4, which / ceil_div(g.O, kLanes));
        float made[4 * 9][kLanes];  // (input channel, window element) by outputs
        for (i64 k = range.begin; k < range.end; k++) {
            Floats half[3][A];
            for (int j = 0; j < A; j++) {
                Floats column_sums[A];
                for (int i = 0; i < A; i++) {
                    const float* from = sums + (i * A + j) * sum_place + k * wide + column;
                    __builtin_prefetch(from + 4 * wide);
                    column_sums[i] = load(from);
                }
                for (int p = 0; p < 3; p++) {
                    half[p][j] = Transform<F>::kFilter[0][p] * column_sums[0];
                    for (int i = 1; i < A; i++) half[p][j] += Transform<F>::kFilter[i][p] * column_sums[i];
                }
            }
            for (int p = 0; p < 3; p++)
                for (int q = 0; q < 3; q++) {
                    Floats total = Transform<F>::kFilter[0][q] * half[p][0];
                    for (int j = 1; j < A; j++) total += Transform<F>::kFilter[j][q] * half[p][j];
                    store(made[(k - range.begin) * 9 + p * 3 + q], total);
                }
        }
        turn(dw + (column * g.C + range.begin) * 9, g.C * 9, made[0], kLanes, (range.end - range.begin) * 9,
             std::min<i64>(kLanes, g.O - column));
    }
};

template <int F>
i64 scratch_of(const Geometry& g, i64 which) {
    return which == 2 ? WinogradSums<F>(g).scratch_bytes() : Winograd<F>(g, which == 1).scratch_bytes();
}

}  // namespace
}  // namespace brim

using namespace brim;

// Bytes of working memory of the functions below: conv2d (0), the gradients for the input (1) and the weight (2).
BRIM_EXPORT void brim_winograd_scratch(i64* bytes, const Geometry* g, i64 which) {
    *bytes = g->tile == 2 ? scratch_of<2>(*g, which) : scratch_of<4>(*g, which);
}

static void convolve(float* to, const float* from, const float* w, float* scratch, const Geometry& g, bool backward) {
    if (g.tile == 2)
        Winograd<2>(g, backward).run(to, from, w, scratch, backward);
    else
        Winograd<4>(g, backward).run(to, from, w, scratch, backward);
}

BRIM_EXPORT void brim_winograd(float* out, const float* x, const float* w, float* scratch, const Geometry* g) {
    convolve(out, x, w, scratch, *g, false);
}

BRIM_EXPORT void brim_winograd_grad_input(float* dx, const float* dout, const float* w, float* scratch,
                                          const Geometry* g) {
    convolve(dx, dout, w, scratch, *g, true);
}

BRIM_EXPORT void brim_winograd_grad_weight(float* dw, const float* dout, const float* x, float* scratch,
                                           const Geometry* g) {
    if (g->tile == 2)
        WinogradSums<2>(*g).run(dw, dout, x, scratch);
    else
        WinogradSums<4>(*g).run(dw, dout, x, scratch);
}
