// brim's own matrix kernels: a register tile of MR rows and NR columns, over B packed in panels of NR columns that stay
// in the second-level cache, and A read in place or, where its rows would fall upon the same cache lines, packed too.
#include "gemm.hpp"
#include "gemm_vectors.hpp"

namespace brim {
namespace {

#if defined(__AVX512F__)
constexpr int kRows = 12, kVectors = 2;
#elif defined(__AVX__)
constexpr int kRows = 6, kVectors = 2;
#else
constexpr int kRows = 4, kVectors = 2;
#endif

constexpr i64 kDepth = 256;                  // of one pass over k, at most
constexpr i64 kPackedBytes = 256 * 1024;     // of B, on the thread's stack
constexpr i64 kUnpackedRows = 2 * kRows;     // so few rows do not repay the packing of B

template <class T>
constexpr i64 kWidth = Wide<T>::lanes * kVectors;  // of a panel

// c (+)= a b for R rows and NR columns; element (i, k) of a lies at a[i * down + k * along], row k of b at b[k * next].
template <class T, int R>
void kernel(i64 depth, const T* a, i64 down, i64 along, const T* b, i64 next, T* c, i64 ldc, bool add) {
    using V = typename Wide<T>::Vector;
    constexpr int lanes = Wide<T>::lanes;
    V sum[R][kVectors];
#pragma GCC unroll 16
    for (int i = 0; i < R; i++)
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; v++) sum[i][v] = V{};
    for (i64 k = 0; k < depth; k++) {
        V row[kVectors];
        for (int v = 0; v < kVectors; v++) row[v] = load(b + k * next + v * lanes);
#pragma GCC unroll 16
        for (int i = 0; i < R; i++) {
            const V x = all_lanes(a[i * down + k * along]);
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; v++) sum[i][v] = multiply_add<T>(row[v], x, sum[i][v]);
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < R; i++)
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; v++) {
            T* at = c + i * ldc + v * lanes;
            store(at, add ? load(at) + sum[i][v] : sum[i][v]);
        }
}

template <class T>
using KernelFn = void (*)(i64, const T*, i64, i64, const T*, i64, T*, i64, bool);

template <class T, int... R>
struct Kernels {
    static constexpr KernelFn<T> of[] = {kernel<T, R>...};
};

template <class T>
KernelFn<T> kernel_of(i64 rows) {
#if defined(__AVX512F__)
    return Kernels<T, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12>::of[rows - 1];
#elif defined(__AVX__)
    return Kernels<T, 1, 2, 3, 4, 5, 6>::of[rows - 1];
#else
    return Kernels<T, 1, 2, 3, 4>::of[rows - 1];
#endif
}

// to[k * stride + j] = from[j * leading + k] for j < `rows` and as many k as a vector has lanes; where there are fewer
// than `rows`, the last one stands for the others. A whole vector is stored for each k all the same: `to` has room behind
// its end, and the next k overwrites what is too much.
template <class T, int rows>
inline void transpose_block(T* to, i64 stride, const T* from, i64 leading, i64 there = rows) {
    constexpr int lanes = Wide<T>::lanes;
    if constexpr (kShuffles && rows <= lanes) {
        typename Wide<T>::Vector r[lanes];
#pragma GCC unroll 16
        for (int j = 0; j < lanes; j++)
            r[j] = j < rows ? load(from + (j < there ? j : there - 1) * leading) : typename Wide<T>::Vector{};
        transpose<T>(r);
#pragma GCC unroll 16
        for (int k = 0; k < lanes; k++) store(to + k * stride, r[k]);
    } else {
        for (int j = 0; j < (there < rows ? int(there) : rows); j++)
            for (int k = 0; k < lanes; k++) to[k * stride + j] = from[j * leading + k];
    }
}

// One panel of B, stored transposed: depth rows of NR columns, of which `columns` exist and the others are zero.
template <class T>
void pack_transposed(T* to, const T* b, i64 ldb, i64 depth, i64 columns) {
    constexpr int lanes = Wide<T>::lanes, width = kWidth<T>;
    i64 j = 0;
    for (; j + lanes <= columns; j += lanes) {
        i64 k = 0;
        for (; k + lanes <= depth; k += lanes) transpose_block<T, lanes>(to + k * width + j, width, b + j * ldb + k, ldb);
        for (; k < depth; k++)
            for (i64 i = 0; i < lanes; i++) to[k * width + j + i] = b[(j + i) * ldb + k];
    }
    for (; j < width; j++)
        for (i64 k = 0; k < depth; k++) to[k * width + j] = j < columns ? b[j * ldb + k] : T(0);
}

// All panels of B, stored as it is: row by row, because that is how memory is read fastest. Panel j begins at
// to[j * panel].
template <class T>
void pack_plain(T* to, i64 panel, const T* b, i64 ldb, i64 depth, i64 columns) {
    constexpr i64 lanes = Wide<T>::lanes, width = kWidth<T>;
    const i64 full = columns / width, rest = columns % width;
    for (i64 k = 0; k < depth; k++) {
        const T* row = b + k * ldb;
        for (i64 j = 0; j < full; j++)
            for (int v = 0; v < kVectors; v++)
                store(to + j * panel + k * width + v * lanes, load(row + j * width + v * lanes));
        if (rest == 0) continue;
        for (int v = 0; v < kVectors; v++) {
            const i64 have = rest - v * lanes;
            store(to + full * panel + k * width + v * lanes,
                  have >= lanes ? load(row + full * width + v * lanes)
                                : load_part(row + full * width + v * lanes, have > 0 ? have : 0));
        }
    }
}

// Up to kRows rows of A, k by k; kRows numbers for each k in any case.
template <class T>
void pack_rows(T* to, const T* a, i64 lda, bool transposed, i64 depth, i64 rows) {
    constexpr i64 lanes = Wide<T>::lanes;
    if (transposed) {
        if (rows == kRows)
            for (i64 k = 0; k < depth; k++) std::memcpy(to + k * kRows, a + k * lda, kRows * sizeof(T));
        else
            for (i64 k = 0; k < depth; k++)
                for (i64 i = 0; i < rows; i++) to[k * kRows + i] = a[k * lda + i];
        return;
    }
    i64 k = 0;
    for (; k + lanes <= depth; k += lanes) transpose_block<T, kRows>(to + k * kRows, kRows, a + k, lda, rows);
    for (; k < depth; k++)
        for (i64 i = 0; i < rows; i++) to[k * kRows + i] = a[i * lda + k];
}

// Asks for a part of a block of memory: `rows` rows of `row` elements at a distance of `step`.
template <class T>
inline void prefetch_part(const T* from, i64 rows, i64 row, i64 step, i64 part, i64 parts) {
    constexpr i64 line = 64 / i64(sizeof(T));
    const i64 lines = ceil_div(row, line), share = ceil_div(rows * lines, parts);
    const i64 end = (part + 1) * share < rows * lines ? (part + 1) * share : rows * lines;
    if (part * share >= end) return;
    i64 r = part * share / lines, q = part * share % lines;
    for (i64 at = part * share; at < end; at++) {
        __builtin_prefetch(from + r * step + q * line, 0, 2);
        if (++q == lines) q = 0, r++;
    }
}

template <class T>
void tile(const Product& p, i64 m, i64 n, const T* a, const T* b, T* c) {
    constexpr i64 width = kWidth<T>;
    constexpr i64 room = kPackedBytes / i64(sizeof(T));
    alignas(64) T packed_b[room];
    alignas(64) T packed_a[kRows * kDepth + Wide<T>::lanes];
    alignas(64) T corner[kRows * width];
    const i64 passes = ceil_div(p.k, kDepth), depth_most = ceil_div(p.k, passes);
    const i64 panels_most = room / (width * depth_most), panel = width * depth_most;
    // Rows at a distance of whole kilobytes meet in the same sets of the first-level cache; few panels read them once.
    const bool pack_a = p.a_transposed ? n > 2 * width : (p.lda * i64(sizeof(T))) % 2048 == 0;
    const bool in_place = !p.b_transposed && (m <= kUnpackedRows);
    for (i64 first = 0; first < n; first += panels_most * width) {
        const i64 columns = n - first < panels_most * width ? n - first : panels_most * width;
        const i64 panels = ceil_div(columns, width), full = columns / width;
        for (i64 k = 0; k < p.k; k += depth_most) {
            const i64 depth = p.k - k < depth_most ? p.k - k : depth_most;
            const bool add = k > 0;
            if (p.b_transposed)
                for (i64 j = 0; j < panels; j++)
                    pack_transposed(packed_b + j * panel, b + (first + j * width) * p.ldb + k, p.ldb, depth,
                                    j < full ? width : columns % width);
            else if (!in_place)
                pack_plain(packed_b, panel, b + k * p.ldb + first, p.ldb, depth, columns);
            else if (full < panels)
                pack_plain(packed_b + full * panel, panel, b + k * p.ldb + first + full * width, p.ldb, depth,
                           columns % width);
            for (i64 i = 0; i < m; i += kRows) {
                const i64 rows = m - i < kRows ? m - i : i64(kRows), later = m - i - rows;
                const T* left = p.a_transposed ? a + k * p.lda + i : a + i * p.lda + k;
                const T* next_left = left + kRows * (p.a_transposed ? 1 : p.lda);
                i64 down = p.a_transposed ? 1 : p.lda, along = p.a_transposed ? p.lda : 1;
                if (pack_a) {
                    pack_rows(packed_a, left, p.lda, p.a_transposed != 0, depth, rows);
                    left = packed_a, down = 1, along = kRows;
                }
                const KernelFn<T> run = kernel_of<T>(rows);
                for (i64 j = 0; j < panels; j++) {
                    const i64 at = first + j * width, have = j < full ? width : columns % width;
                    const bool direct = in_place && j < full;
                    const T* right = direct ? b + k * p.ldb + at : packed_b + j * panel;
                    const i64 next = direct ? p.ldb : width;
                    T* to = c + i * p.ldc + at;
                    if (later > 0) {
                        const i64 rows_next = later < kRows ? later : i64(kRows);
                        if (p.a_transposed)
                            prefetch_part(next_left, depth, rows_next, p.lda, j, panels);
                        else
                            prefetch_part(next_left, rows_next, depth, p.lda, j, panels);
                    }
                    if (have == width) {
                        run(depth, left, down, along, right, next, to, p.ldc, add);
                        continue;
                    }
                    run(depth, left, down, along, right, next, corner, width, false);
                    for (i64 r = 0; r < rows; r++)
                        for (i64 q = 0; q < have; q++) {
                            const T sum = corner[r * width + q];
                            to[r * p.ldc + q] = add ? to[r * p.ldc + q] + sum : sum;
                        }
                }
            }
        }
    }
}

}  // namespace

void gemm_tile(const Product& p, i64 m, i64 n, const float* a, const float* b, float* c) { tile(p, m, n, a, b, c); }
void gemm_tile(const Product& p, i64 m, i64 n, const double* a, const double* b, double* c) { tile(p, m, n, a, b, c); }

}  // namespace brim
