// max_pool2d, avg_pool2d and their gradients on float32: the same choices and, element for element, the same order of
// additions as NumPy's kernels (brim_cpu/kernels/pool.py).
//
// Channels side by side: pixel after pixel of the result, many channels at once. Row-major: row after row of a channel,
// many columns at once.
#include <cmath>

#include "images.hpp"
#include "team.hpp"

namespace brim {
namespace {

// x(N, C, H, W) seen through windows that give (N, C, P, Q); filled in by overlay/pool.py.
struct Windows {
    i64 N, C, H, W, P, Q, kh, kw, sh, sw, ph, pw, dh, dw;
    i64 last;  // whether channels lie side by side, in all arrays

    i64 images() const { return C * H * W; }
    i64 results() const { return C * P * Q; }
};

typedef i32 Ints __attribute__((vector_size(kLanes * 4)));

inline Ints load_ints(const i32* from) {
    Ints v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

inline void store_ints(i32* to, Ints v) { std::memcpy(to, &v, sizeof v); }

// Elements k of a window at output o that lie inside: begin <= k < end.
inline Range inside(i64 o, i64 size, i64 kernel, i64 stride, i64 padding, i64 dilation) {
    const i64 start = o * stride - padding;
    const i64 begin = start < 0 ? ceil_div(-start, dilation) : 0;
    const i64 end = start >= size ? 0 : ceil_div(size - start, dilation);
    return {begin, std::max(begin, std::min(end, kernel))};
}

// Outputs o whose window element k lies inside: begin <= o < end.
inline Range reached(i64 k, i64 size, i64 out, i64 stride, i64 padding, i64 dilation) {
    const i64 shift = k * dilation - padding;
    const i64 begin = shift < 0 ? ceil_div(-shift, stride) : 0;
    const i64 end = shift >= size ? 0 : ceil_div(size - shift, stride);
    return {begin, std::max(begin, std::min(end, out))};
}

// Channels [0, C): body(c) for whole vectors, the last of which may overlap the one before it; `rest` where C is less.
template <class Body, class Rest>
inline void over_channels(i64 C, const Body& body, const Rest& rest) {
    if (C < kLanes) {
        for (i64 c = 0; c < C; c++) rest(c);
        return;
    }
    for (i64 c = 0; c < C; c += kLanes) body(std::min(c, C - kLanes));
}

// Pieces of rows that have about kGrain elements; piece(image, rows).
template <class Piece>
inline void over_rows(i64 N, i64 rows, i64 per_row, const Piece& piece) {
    const i64 step = std::max<i64>(1, std::min(rows, kGrain / std::max<i64>(1, per_row)));
    const i64 blocks = ceil_div(rows, step);
    parallel(N * blocks, [&](i64 which) { piece(which / blocks, piece_of(rows, step, which % blocks)); });
}

// The first of the largest; the last NaN where there is one.
inline bool takes(float x, float best) { return x > best || x != x; }

void max_pixel(const Windows& s, const float* image, i64 i, i64 j, float* out, i32* index) {
    const Range a = inside(i, s.H, s.kh, s.sh, s.ph, s.dh), b = inside(j, s.W, s.kw, s.sw, s.pw, s.dw);
    if (a.begin == a.end || b.begin == b.end) {  // a dilated one over the whole image
        for (i64 c = 0; c < s.C; c++) out[c] = -INFINITY, index[c] = 0;
        return;
    }
    const i64 down = s.dh * s.W, start = (i * s.sh - s.ph + a.begin * s.dh) * s.W + j * s.sw - s.pw + b.begin * s.dw;
    const i64 rows = a.end - a.begin, columns = b.end - b.begin;
    over_channels(
        s.C,
        [&](i64 c) {
            Floats best = load(image + start * s.C + c);
            Ints where = Ints{} + i32(start);
            for (i64 k = 0; k < rows; k++) {
                i64 at = start + k * down;
                for (i64 l = 0; l < columns; l++, at += s.dw) {
                    const Floats x = load(image + at * s.C + c);
                    const auto take = (x > best) | (x != x);
                    best = take ? x : best;
                    where = take ? Ints{} + i32(at) : where;
                }
            }
            store(out + c, best);
            store_ints(index + c, where);
        },
        [&](i64 c) {
            float best = image[start * s.C + c];
            i64 where = start;
            for (i64 k = 0; k < rows; k++)
                for (i64 l = 0; l < columns; l++) {
                    const i64 at = start + k * down + l * s.dw;
                    const float x = image[at * s.C + c];
                    if (takes(x, best)) best = x, where = at;
                }
            out[c] = best, index[c] = i32(where);
        });
}

// One result of a channel's plane.
void max_one(const Windows& s, const float* plane, i64 i, i64 j, float* out, i32* index) {
    const Range a = inside(i, s.H, s.kh, s.sh, s.ph, s.dh), b = inside(j, s.W, s.kw, s.sw, s.pw, s.dw);
    float best = -INFINITY;
    i64 where = -1;
    for (i64 k = a.begin; k < a.end; k++)
        for (i64 l = b.begin; l < b.end; l++) {
            const i64 at = (i * s.sh - s.ph + k * s.dh) * s.W + j * s.sw - s.pw + l * s.dw;
            if (where < 0 || takes(plane[at], best)) best = plane[at], where = at;
        }
    *out = best;
    *index = i32(std::max<i64>(where, 0));  // a dilated window may step over the whole image
}

template <int B>
struct Several {
    typedef float Values __attribute__((vector_size(B * 4)));
    typedef i32 Places __attribute__((vector_size(B * 4)));
};

// B results next to each other, whose windows have all their columns inside.
template <int B, i64 Stride>
inline void max_block(const Windows& s, const float* plane, Range a, i64 i, i64 j, float* out, i32* index) {
    using Values = typename Several<B>::Values;
    using Places = typename Several<B>::Places;
    const i64 stride = Stride ? Stride : s.sw, first = j * stride - s.pw;
    Places steps, pick;
    for (int n = 0; n < B; n++) steps[n] = i32(n * stride), pick[n] = n < B / 2 ? 2 * n : 2 * n + 1;
    Values best{};
    Places where{};
    for (i64 k = a.begin; k < a.end; k++) {
        for (i64 l = 0; l < s.kw; l++) {
            const i64 at = (i * s.sh - s.ph + k * s.dh) * s.W + first + l * s.dw;
            Values x;
            if (Stride == 1) {
                std::memcpy(&x, plane + at, sizeof x);
            } else if (Stride == 2) {  // every second of 2 B - 1 values
                Values low, high;
                std::memcpy(&low, plane + at, sizeof x);
                std::memcpy(&high, plane + at + B - 1, sizeof x);
#if defined(__clang__)
                for (int n = 0; n < B; n++) x[n] = n < B / 2 ? low[2 * n] : high[2 * n + 1 - B];
#else
                x = __builtin_shuffle(low, high, pick);
#endif
            } else {
                for (int n = 0; n < B; n++) x[n] = plane[at + n * stride];
            }
            const Places here = steps + i32(at);
            const bool begins = k == a.begin && l == 0;
            const Places take = begins ? here == here : (x > best) | (x != x);
            best = begins ? x : take ? x : best;
            where = begins ? here : take ? here : where;
        }
    }
    std::memcpy(out + j, &best, sizeof best);
    std::memcpy(index + j, &where, sizeof where);
}

template <int B, i64 Stride>
void max_blocks(const Windows& s, const float* plane, Range a, i64 i, Range whole, float* out, i32* index) {
    for (i64 j = whole.begin; j < whole.end; j += B)
        max_block<B, Stride>(s, plane, a, i, std::min(j, whole.end - B), out, index);
}

template <i64 Stride>  // 0: any
void max_row(const Windows& s, const float* plane, i64 i, float* out, i32* index) {
    const Range a = inside(i, s.H, s.kh, s.sh, s.ph, s.dh);
    // Windows with all columns inside: their first and their last element are.
    Range whole{reached(0, s.W, s.Q, s.sw, s.pw, s.dw).begin, reached(s.kw - 1, s.W, s.Q, s.sw, s.pw, s.dw).end};
    const i64 many = a.begin < a.end ? whole.end - whole.begin : 0;
    if (many >= 16 && kLanes == 16)
        max_blocks<16, Stride>(s, plane, a, i, whole, out, index);
    else if (many >= 8 && kLanes >= 8)
        max_blocks<8, Stride>(s, plane, a, i, whole, out, index);
    else if (many >= 4)
        max_blocks<4, Stride>(s, plane, a, i, whole, out, index);
    else
        whole = {0, 0};
    for (i64 j = 0; j < whole.begin; j++) max_one(s, plane, i, j, out + j, index + j);
    for (i64 j = whole.end; j < s.Q; j++) max_one(s, plane, i, j, out + j, index + j);
}

// The function for the stride along a row.
template <class Row1, class Row2, class RowAny>
inline void by_stride(i64 stride, const Row1& one, const Row2& two, const RowAny& any) {
    stride == 1 ? one() : stride == 2 ? two() : any();
}

void max_pool(const Windows& s, float* out, i32* index, const float* x) {
    if (s.last) {
        over_rows(s.N, s.P, s.Q * s.C * s.kh * s.kw, [&](i64 n, Range rows) {
            for (i64 i = rows.begin; i < rows.end; i++)
                for (i64 j = 0; j < s.Q; j++) {
                    const i64 at = n * s.results() + (i * s.Q + j) * s.C;
                    max_pixel(s, x + n * s.images(), i, j, out + at, index + at);
                }
        });
        return;
    }
    over_rows(1, s.N * s.C * s.P, s.Q * s.kh * s.kw, [&](i64, Range rows) {
        for (i64 row = rows.begin; row < rows.end; row++) {
            const i64 plane = row / s.P, i = row % s.P;
            const float* from = x + plane * s.H * s.W;
            float* to = out + row * s.Q;
            i32* where = index + row * s.Q;
            by_stride(
                s.sw, [&] { max_row<1>(s, from, i, to, where); }, [&] { max_row<2>(s, from, i, to, where); },
                [&] { max_row<0>(s, from, i, to, where); });
        }
    });
}

// Windows i that may have an element at h: begin <= i < end.
inline Range windows_at(i64 h, i64 out, i64 kernel, i64 stride, i64 padding, i64 dilation) {
    const i64 first = h + padding - (kernel - 1) * dilation;
    const i64 begin = first > 0 ? ceil_div(first, stride) : 0;
    return {begin, std::max(begin, std::min(out, (h + padding) / stride + 1))};
}

// A pixel gathers from the windows that chose it, in their order.
void max_grad_pixel(const Windows& s, const float* g, const i32* index, i64 h, i64 w, float* out) {
    const Range a = windows_at(h, s.P, s.kh, s.sh, s.ph, s.dh), b = windows_at(w, s.Q, s.kw, s.sw, s.pw, s.dw);
    const i32 own = i32(h * s.W + w);
    over_channels(
        s.C,
        [&](i64 c) {
            Floats sum{};
            for (i64 i = a.begin; i < a.end; i++)
                for (i64 j = b.begin; j < b.end; j++) {
                    const i64 at = (i * s.Q + j) * s.C + c;
                    sum += load_ints(index + at) == Ints{} + own ? load(g + at) : Floats{};
                }
            store(out + c, sum);
        },
        [&](i64 c) {
            float sum = 0;
            for (i64 i = a.begin; i < a.end; i++)
                for (i64 j = b.begin; j < b.end; j++) {
                    const i64 at = (i * s.Q + j) * s.C + c;
                    sum += index[at] == own ? g[at] : 0.0f;
                }
            out[c] = sum;
        });
}

void max_pool_grad(const Windows& s, float* out, const float* g, const i32* index) {
    if (s.last) {
        over_rows(s.N, s.H, s.W * s.C, [&](i64 n, Range rows) {
            for (i64 h = rows.begin; h < rows.end; h++)
                for (i64 w = 0; w < s.W; w++)
                    max_grad_pixel(s, g + n * s.results(), index + n * s.results(), h, w,
                                   out + n * s.images() + (h * s.W + w) * s.C);
        });
        return;
    }
    const i64 size = s.H * s.W, windows = s.P * s.Q;
    over_rows(1, s.N * s.C, size, [&](i64, Range planes) {
        for (i64 plane = planes.begin; plane < planes.end; plane++) {
            float* to = out + plane * size;
            std::memset(to, 0, size_t(size) * 4);
            const float* from = g + plane * windows;
            const i32* where = index + plane * windows;
            for (i64 i = 0; i < windows; i++) to[where[i]] += from[i];
        }
    });
}

// Sums of windows, then times the factor of the row and the factor of the column.
void avg_pixel(const Windows& s, const float* image, i64 i, i64 j, float row, float column, float* out) {
    const Range a = inside(i, s.H, s.kh, s.sh, s.ph, s.dh), b = inside(j, s.W, s.kw, s.sw, s.pw, s.dw);
    const auto at = [&](i64 k, i64 l) {
        return ((i * s.sh - s.ph + k * s.dh) * s.W + j * s.sw - s.pw + l * s.dw) * s.C;
    };
    over_channels(
        s.C,
        [&](i64 c) {
            Floats sum{};
            for (i64 k = a.begin; k < a.end; k++)
                for (i64 l = b.begin; l < b.end; l++) sum += load(image + at(k, l) + c);
            store(out + c, sum * splat(row) * splat(column));
        },
        [&](i64 c) {
            float sum = 0;
            for (i64 k = a.begin; k < a.end; k++)
                for (i64 l = b.begin; l < b.end; l++) sum += image[at(k, l) + c];
            out[c] = sum * row * column;
        });
}

template <i64 Stride>
void avg_row(const Windows& s, const float* plane, i64 i, float row, const float* columns, float* __restrict out) {
    const i64 stride = Stride ? Stride : s.sw;
    std::memset(out, 0, size_t(s.Q) * 4);
    const Range a = inside(i, s.H, s.kh, s.sh, s.ph, s.dh);
    for (i64 k = a.begin; k < a.end; k++) {
        for (i64 l = 0; l < s.kw; l++) {
            const Range b = reached(l, s.W, s.Q, s.sw, s.pw, s.dw);
            const float* from = plane + (i * s.sh - s.ph + k * s.dh) * s.W + l * s.dw - s.pw;
            for (i64 j = b.begin; j < b.end; j++) out[j] += from[j * stride];
        }
    }
    for (i64 j = 0; j < s.Q; j++) out[j] = out[j] * row * columns[j];
}

void avg_pool(const Windows& s, float* out, const float* x, const float* rows, const float* columns) {
    if (s.last) {
        over_rows(s.N, s.P, s.Q * s.C * s.kh * s.kw, [&](i64 n, Range some) {
            for (i64 i = some.begin; i < some.end; i++)
                for (i64 j = 0; j < s.Q; j++)
                    avg_pixel(s, x + n * s.images(), i, j, rows[i], columns[j],
                              out + n * s.results() + (i * s.Q + j) * s.C);
        });
        return;
    }
    over_rows(1, s.N * s.C * s.P, s.Q * s.kh * s.kw, [&](i64, Range some) {
        for (i64 row = some.begin; row < some.end; row++) {
            const i64 i = row % s.P;
            const float* from = x + row / s.P * s.H * s.W;
            float* to = out + row * s.Q;
            by_stride(
                s.sw, [&] { avg_row<1>(s, from, i, rows[i], columns, to); },
                [&] { avg_row<2>(s, from, i, rows[i], columns, to); },
                [&] { avg_row<0>(s, from, i, rows[i], columns, to); });
        }
    });
}

// A pixel gathers from its windows, element 0 of a window first: from the last of the windows to the first.
void avg_grad_pixel(const Windows& s, const float* g, i64 h, i64 w, const float* rows, const float* columns,
                    float* out) {
    const Range a = windows_at(h, s.P, s.kh, s.sh, s.ph, s.dh), b = windows_at(w, s.Q, s.kw, s.sw, s.pw, s.dw);
    over_channels(
        s.C,
        [&](i64 c) {
            Floats sum{};
            for (i64 i = a.end - 1; i >= a.begin; i--)
                for (i64 j = b.end - 1; j >= b.begin; j--)
                    sum += load(g + (i * s.Q + j) * s.C + c) * splat(rows[i]) * splat(columns[j]);
            store(out + c, sum);
        },
        [&](i64 c) {
            float sum = 0;
            for (i64 i = a.end - 1; i >= a.begin; i--)
                for (i64 j = b.end - 1; j >= b.begin; j--) sum += g[(i * s.Q + j) * s.C + c] * rows[i] * columns[j];
            out[c] = sum;
        });
}

void avg_grad_row(const Windows& s, const float* g, i64 h, const float* rows, const float* columns, float* out) {
    std::memset(out, 0, size_t(s.W) * 4);
    const Range a = windows_at(h, s.P, s.kh, s.sh, s.ph, s.dh);
    for (i64 i = a.end - 1; i >= a.begin; i--) {
        const float* from = g + i * s.Q;
        const float row = rows[i];
        for (i64 l = 0; l < s.kw; l++) {
            const Range b = reached(l, s.W, s.Q, s.sw, s.pw, s.dw);
            float* to = out + l * s.dw - s.pw;
            for (i64 j = b.begin; j < b.end; j++) to[j * s.sw] += from[j] * row * columns[j];
        }
    }
}

void avg_pool_grad(const Windows& s, float* out, const float* g, const float* rows, const float* columns) {
    if (s.last) {
        over_rows(s.N, s.H, s.W * s.C, [&](i64 n, Range some) {
            for (i64 h = some.begin; h < some.end; h++)
                for (i64 w = 0; w < s.W; w++)
                    avg_grad_pixel(s, g + n * s.results(), h, w, rows, columns,
                                   out + n * s.images() + (h * s.W + w) * s.C);
        });
        return;
    }
    over_rows(1, s.N * s.C * s.H, s.W * s.kw, [&](i64, Range some) {
        for (i64 row = some.begin; row < some.end; row++)
            avg_grad_row(s, g + row / s.H * s.P * s.Q, row % s.H, rows, columns, out + row * s.W);
    });
}

}  // namespace
}  // namespace brim

using namespace brim;

// The largest of each window and where it lies in its channel's plane.
BRIM_EXPORT void brim_max_pool2d(float* out, i32* index, const float* x, const Windows* s) {
    max_pool(*s, out, index, x);
}

// Each window's gradient at the place of its largest element; dilation and padding as there.
BRIM_EXPORT void brim_max_pool2d_grad(float* dx, const float* g, const i32* index, const Windows* s) {
    max_pool_grad(*s, dx, g, index);
}

// Sums of windows times rows[i] times columns[j]; windows are not dilated.
BRIM_EXPORT void brim_avg_pool2d(float* out, const float* x, const float* rows, const float* columns,
                                 const Windows* s) {
    avg_pool(*s, out, x, rows, columns);
}

BRIM_EXPORT void brim_avg_pool2d_grad(float* dx, const float* g, const float* rows, const float* columns,
                                      const Windows* s) {
    avg_pool_grad(*s, dx, g, rows, columns);
}
