// Convolutions: their sizes, which window element meets which pixel, and the innermost products.
#pragma once
#include <atomic>

#include "images.hpp"
#include "team.hpp"

namespace brim {

// Sizes of out(N, O, P, Q) = conv(x(N, C, H, W), w(O, C / groups, kh, kw)); filled in by overlay/conv.py.
struct Geometry {
    i64 N, C, H, W, O, P, Q, kh, kw, sh, sw, ph, pw, dh, dw, groups;
    i64 x_last, out_last;  // whether channels lie side by side
    i64 lanes;             // working memory is there for so many threads
    i64 tile;              // results a side that winograd.cpp computes together: 2 or 4

    Images x() const { return {C, H, W, x_last != 0}; }
    Images out() const { return {O, P, Q, out_last != 0}; }
};

// conv_planar.cpp: whether it is the one for these sizes, and the same as conv.cpp's.
bool planar_suits(const Geometry& g, bool backward);
i64 planar_scratch_bytes(const Geometry& g, bool backward);
void planar(float* to, const float* from, const float* w, float* scratch, const Geometry& g, bool backward);

// conv_depthwise.cpp: the same; conv_depthwise_weight.cpp: the gradient of the weight for the same sizes.
bool depthwise_suits(const Geometry& g);
i64 depthwise_scratch_bytes(const Geometry& g, bool backward);
void depthwise(float* to, const float* from, const float* w, float* scratch, const Geometry& g, bool backward);
i64 depthwise_weight_scratch_bytes(const Geometry& g);
void depthwise_grad_weight(float* dw, const float* dout, const float* x, float* scratch, const Geometry& g);

// As `parallel`, on at most `lanes` threads; work(which, lane) has the lane's working memory to itself.
template <class F>
inline void in_lanes(i64 lanes, i64 count, const F& work) {
    std::atomic<i64> next{0};
    parallel(std::min(lanes, count), [&](i64 lane) {
        for (;;) {
            const i64 which = next.fetch_add(1, std::memory_order_relaxed);
            if (which >= count) return;
            work(which, lane);
        }
    });
}

constexpr int kMaxTaps = 32;    // of a window along one axis
constexpr int kMaxStride = 8;  // overlay/conv.py asks for no more

// Result pixels first, first + step, ... along one axis, and the window elements that reach them.
struct Residue {
    i64 count = 0;
    int taps = 0;
    int tap[kMaxTaps] = {};  // window element
    i64 at[kMaxTaps] = {};   // where it reads: source pixel i * move + at for the i-th result pixel; ascending
    bool dense = true;       // `at` goes up by one
};

// How the pixels of the result go over the source along one axis. Forward: every pixel meets the whole window. Backward
// with stride s: the pixels of one residue by s meet the same part of the window, and move over the source one by one.
struct Axis {
    Residue residues[kMaxStride];
    int step = 1;
    i64 move, count = 0;          // count: the largest of the residues'
    i64 lowest = 0, highest = 0;  // of all `at`
    i64 size;                     // of the result

    Axis(i64 size, i64 kernel, i64 stride, i64 padding, i64 dilation, bool backward)
        : step(backward ? int(stride) : 1), move(backward ? 1 : stride), size(size) {
        bool any = false;
        for (int n = 0; n < step; n++) {
            Residue& r = residues[n];
            r.count = size > n ? ceil_div(size - n, step) : 0;
            count = std::max(count, r.count);
            for (i64 k = 0; k < kernel; k++) {
                const i64 tap = backward ? kernel - 1 - k : k;
                const i64 reads = backward ? n + padding - tap * dilation : tap * dilation - padding;
                if (reads % step != 0) continue;
                const i64 at = reads / step;
                if (r.taps > 0 && at != r.at[r.taps - 1] + 1) r.dense = false;
                r.tap[r.taps] = int(tap);
                r.at[r.taps++] = at;
                lowest = any ? std::min(lowest, at) : at;
                highest = any ? std::max(highest, at) : at;
                any = true;
            }
        }
    }

    // Source pixels that `many` result pixels of a residue reach.
    i64 reach(i64 many) const { return (many - 1) * move + highest - lowest + 1; }
};

constexpr i64 kMaxVectors = kLanes == 16 ? 4 : 2;
constexpr i64 kPanel = kMaxVectors * kLanes;  // columns of the product that are computed together

// Rows of the product that are computed together with so many vectors of columns: what the registers hold.
constexpr int rows_for(int vectors) { return kLanes == 16 ? (vectors == 4 ? 6 : 8) : (vectors == 2 ? 6 : 8); }

inline i64 vectors_of(i64 columns) { return ceil_div(std::min(columns, kPanel), kLanes); }
inline i64 padded(i64 columns) { return ceil_div(columns, kLanes) * kLanes; }

// Sums of which not all lanes have a column. Apart from the loops: code that takes addresses of sums costs them registers.
__attribute__((noinline)) inline void finish_part(const float* sum, i64 rows, i64 step, float* const* to, i64 shift,
                                                  bool add, i64 columns) {
    for (i64 i = 0; i < rows; i++, sum += step) {
        float* at = to[i] + shift;
        for (i64 c = 0; c < columns; c++) at[c] = add ? at[c] + sum[c] : sum[c];
    }
}

template <int R, int V>
inline void finish(const Floats (&sum)[R][V], float* const* to, i64 shift, bool add, i64 columns) {
    if (columns < V * kLanes) {
        alignas(64) float all[R * V * kLanes];
#pragma GCC unroll 12
        for (int i = 0; i < R; i++)
#pragma GCC unroll 4
            for (int j = 0; j < V; j++) store(all + (i * V + j) * kLanes, sum[i][j]);
        return finish_part(all, R, V * kLanes, to, shift, add, columns);
    }
    if (add) {
#pragma GCC unroll 12
        for (int i = 0; i < R; i++) {
            float* at = to[i] + shift;
#pragma GCC unroll 4
            for (int j = 0; j < V; j++) store(at + j * kLanes, load(at + j * kLanes) + sum[i][j]);
        }
        return;
    }
#pragma GCC unroll 12
    for (int i = 0; i < R; i++)
#pragma GCC unroll 4
        for (int j = 0; j < V; j++) store(to[i] + shift + j * kLanes, sum[i][j]);
}

// to[i][shift:] (+)= sum over runs r and k < length of from[i][offset[r] + k] * b[r * length + k][:].
template <int R, int V>
inline void product_rows(const float* const* from, const i64* offset, i64 runs, i64 length, const float* b,
                         float* const* to, i64 shift, bool add, i64 columns) {
    Floats sum[R][V] = {};
    for (i64 r = 0; r < runs; r++) {
        const float* a[R];
#pragma GCC unroll 8
        for (int i = 0; i < R; i++) a[i] = from[i] + offset[r];
        for (i64 k = 0; k < length; k++, b += V * kLanes) {
            Floats right[V];
#pragma GCC unroll 4
            for (int j = 0; j < V; j++) right[j] = load(b + j * kLanes);
#pragma GCC unroll 8
            for (int i = 0; i < R; i++) {
                const Floats left = splat(a[i][k]);
#pragma GCC unroll 4
                for (int j = 0; j < V; j++) sum[i][j] = fma_(left, right[j], sum[i][j]);
            }
        }
    }
    finish<R, V>(sum, to, shift, add, columns);
}

// All rows: as many at once as fit, then fewer.
template <int V>
void product_panel(i64 rows, const float* const* from, const i64* offset, i64 runs, i64 length, const float* b,
                   float* const* to, i64 shift, bool add, i64 columns) {
    constexpr int R = rows_for(V);
    i64 i = 0;
    for (; i + R <= rows; i += R) product_rows<R, V>(from + i, offset, runs, length, b, to + i, shift, add, columns);
    if (i + 4 <= rows) product_rows<4, V>(from + i, offset, runs, length, b, to + i, shift, add, columns), i += 4;
    if (i + 2 <= rows) product_rows<2, V>(from + i, offset, runs, length, b, to + i, shift, add, columns), i += 2;
    if (i + 1 <= rows) product_rows<1, V>(from + i, offset, runs, length, b, to + i, shift, add, columns), i += 1;
}

inline void product(i64 rows, const float* const* from, const i64* offset, i64 runs, i64 length, const float* b,
                    float* const* to, i64 shift, bool add, i64 columns) {
    switch (vectors_of(columns)) {
        case 1: return product_panel<1>(rows, from, offset, runs, length, b, to, shift, add, columns);
        case 2: return product_panel<2>(rows, from, offset, runs, length, b, to, shift, add, columns);
#if defined(__AVX512F__)
        case 3: return product_panel<3>(rows, from, offset, runs, length, b, to, shift, add, columns);
        case 4: return product_panel<4>(rows, from, offset, runs, length, b, to, shift, add, columns);
#endif
    }
}

// Where the terms of a sum over pixels are: `images` of `rows` of `many` pixels, with the distances between them.
struct Pixels {
    i64 images, image_step, rows, row_step, many, step;
};

// to[i][shift:] (+)= sum over pixels p of from[i][p] * b[p][:], the columns of one panel; pixels of b are neighbours.
template <int R, int V>
inline void outer_rows(const float* const* from, const Pixels& at, const float* b, float* const* to, i64 shift,
                       bool add) {
    Floats sum[R][V] = {};
    for (i64 n = 0; n < at.images; n++) {
        for (i64 r = 0; r < at.rows; r++) {
            const float* a[R];
#pragma GCC unroll 8
            for (int i = 0; i < R; i++) a[i] = from[i] + n * at.image_step + r * at.row_step;
            i64 pixel = 0;
            for (i64 j = 0; j < at.many; j++, b += V * kLanes, pixel += at.step) {
                Floats right[V];
#pragma GCC unroll 4
                for (int v = 0; v < V; v++) right[v] = load(b + v * kLanes);
#pragma GCC unroll 8
                for (int i = 0; i < R; i++) {
                    const Floats left = splat(a[i][pixel]);
#pragma GCC unroll 4
                    for (int v = 0; v < V; v++) sum[i][v] = fma_(left, right[v], sum[i][v]);
                }
            }
        }
    }
    finish<R, V>(sum, to, shift, add, V * kLanes);
}

template <int V>
void outer_panel(i64 m, const float* const* from, const Pixels& at, const float* b, float* const* to, i64 shift,
                 bool add) {
    constexpr int R = rows_for(V);
    i64 i = 0;
    for (; i + R <= m; i += R) outer_rows<R, V>(from + i, at, b, to + i, shift, add);
    if (i + 4 <= m) outer_rows<4, V>(from + i, at, b, to + i, shift, add), i += 4;
    if (i + 2 <= m) outer_rows<2, V>(from + i, at, b, to + i, shift, add), i += 2;
    if (i + 1 <= m) outer_rows<1, V>(from + i, at, b, to + i, shift, add);
}

inline void outer(i64 vectors, i64 m, const float* const* from, const Pixels& at, const float* b, float* const* to,
                  i64 shift, bool add) {
    switch (vectors) {
        case 1: return outer_panel<1>(m, from, at, b, to, shift, add);
        case 2: return outer_panel<2>(m, from, at, b, to, shift, add);
#if defined(__AVX512F__)
        case 3: return outer_panel<3>(m, from, at, b, to, shift, add);
        case 4: return outer_panel<4>(m, from, at, b, to, shift, add);
#endif
    }
}

}  // namespace brim
