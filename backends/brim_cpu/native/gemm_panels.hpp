// brim's own matrix kernels: a register tile of up to kRows rows and one panel of kWidth columns; and the packing of the
// right operand in such panels.
#pragma once
#include "common.hpp"
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

}  // namespace
}  // namespace brim
