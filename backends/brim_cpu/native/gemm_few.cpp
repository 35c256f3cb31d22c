// Products with few rows: B is read once, where it lies, because packing it would cost more than the product.
//
// B stored transposed: dot products along k, which lies contiguous in both operands. B as it is: all columns that the
// registers hold, k by k.
#include "gemm.hpp"
#include "gemm_vectors.hpp"

namespace brim {
namespace {

constexpr i64 kRowsBytes = 24 * 1024;      // of A, beside B's in the first-level cache
constexpr i64 kColumnsBytes = 384 * 1024;  // of B, in the second-level cache

// c[R, C] = dot products of R rows of a and C rows of b. Where there are fewer than C, the last is taken again and its
// repeated sums are left out.
template <class T, int R, int C>
void dots(i64 depth, const T* a, i64 lda, const T* b, i64 ldb, T* c, i64 ldc, i64 columns) {
    using V = typename Wide<T>::Vector;
    constexpr int lanes = Wide<T>::lanes;
    const T* rows[C];
#pragma GCC unroll 8
    for (int j = 0; j < C; j++) rows[j] = b + (j < columns ? j : columns - 1) * ldb;
    V sum[R * C];
#pragma GCC unroll 32
    for (int i = 0; i < R * C; i++) sum[i] = V{};
    i64 k = 0;
    for (; k + lanes <= depth; k += lanes) {
        V left[R];
#pragma GCC unroll 4
        for (int i = 0; i < R; i++) left[i] = load(a + i * lda + k);
#pragma GCC unroll 8
        for (int j = 0; j < C; j++) {
            const V right = load(rows[j] + k);
#pragma GCC unroll 4
            for (int i = 0; i < R; i++) sum[i * C + j] = multiply_add<T>(left[i], right, sum[i * C + j]);
        }
    }
    if (k < depth) {
        V left[R];
#pragma GCC unroll 4
        for (int i = 0; i < R; i++) left[i] = load_part(a + i * lda + k, depth - k);
#pragma GCC unroll 8
        for (int j = 0; j < C; j++) {
            const V right = load_part(rows[j] + k, depth - k);
#pragma GCC unroll 4
            for (int i = 0; i < R; i++) sum[i * C + j] = multiply_add<T>(left[i], right, sum[i * C + j]);
        }
    }
    constexpr bool together = R * C <= lanes && ((R * C) & (R * C - 1)) == 0;  // all sums come out in one vector
    constexpr int rows_at_once = together ? R : 1, columns_at_once = C < lanes ? C : lanes;
    alignas(kVectorBytes) T out[lanes];
#pragma GCC unroll 4
    for (int i = 0; i < R; i += rows_at_once)
#pragma GCC unroll 4
        for (int j = 0; j < C; j += columns_at_once) {
            const V total = sums<T, rows_at_once * columns_at_once>(sum + i * C + j);
            store(out, total);
            const i64 have = columns - j < columns_at_once ? columns - j : columns_at_once;
            for (int r = 0; r < rows_at_once; r++) {
                T* to = c + (i + r) * ldc + j;
                if (have == columns_at_once)
                    std::memcpy(to, out + r * C, columns_at_once * sizeof(T));
                else if (have > 0)
                    std::memcpy(to, out + r * C, size_t(have) * sizeof(T));
            }
        }
}

// c[R, V vectors] = a b: element (i, k) of a lies at a[i * down + k * along].
template <class T, int R, int vectors>
void columns_of(i64 depth, const T* a, i64 down, i64 along, const T* b, i64 ldb, T* c, i64 ldc, i64 columns) {
    using V = typename Wide<T>::Vector;
    constexpr i64 lanes = Wide<T>::lanes;
    V sum[R][vectors];
#pragma GCC unroll 4
    for (int i = 0; i < R; i++)
#pragma GCC unroll 16
        for (int v = 0; v < vectors; v++) sum[i][v] = V{};
    if (columns >= vectors * lanes) {
        for (i64 k = 0; k < depth; k++) {
            V x[R];
#pragma GCC unroll 4
            for (int i = 0; i < R; i++) x[i] = all_lanes(a[i * down + k * along]);
#pragma GCC unroll 16
            for (int v = 0; v < vectors; v++) {
                const V row = load(b + k * ldb + v * lanes);
#pragma GCC unroll 4
                for (int i = 0; i < R; i++) sum[i][v] = multiply_add<T>(row, x[i], sum[i][v]);
            }
        }
#pragma GCC unroll 4
        for (int i = 0; i < R; i++)
#pragma GCC unroll 16
            for (int v = 0; v < vectors; v++) store(c + i * ldc + v * lanes, sum[i][v]);
        return;
    }
    if constexpr (vectors > 1) {  // the rest: half as many at once
        for (i64 j = 0; j < columns; j += vectors / 2 * lanes)
            columns_of<T, R, vectors / 2>(depth, a, down, along, b + j, ldb, c + j, ldc, columns - j);
    } else {
        for (i64 k = 0; k < depth; k++) {
            const V row = load_part(b + k * ldb, columns);
#pragma GCC unroll 4
            for (int i = 0; i < R; i++) sum[i][0] = multiply_add<T>(row, all_lanes(a[i * down + k * along]), sum[i][0]);
        }
        for (int i = 0; i < R; i++) std::memcpy(c + i * ldc, &sum[i][0], size_t(columns) * sizeof(T));
    }
}

template <class T>
void some_dots(const Product& p, i64 rows, i64 n, const T* a, const T* b, T* c) {
    switch (rows) {
        case 1:
            for (i64 j = 0; j < n; j += 8) dots<T, 1, 8>(p.k, a, p.lda, b + j * p.ldb, p.ldb, c + j, p.ldc, n - j);
            return;
        case 2:
            for (i64 j = 0; j < n; j += 8) dots<T, 2, 8>(p.k, a, p.lda, b + j * p.ldb, p.ldb, c + j, p.ldc, n - j);
            return;
        case 3:
            for (i64 j = 0; j < n; j += 4) dots<T, 3, 4>(p.k, a, p.lda, b + j * p.ldb, p.ldb, c + j, p.ldc, n - j);
            return;
        default:
            for (i64 j = 0; j < n; j += 4) dots<T, 4, 4>(p.k, a, p.lda, b + j * p.ldb, p.ldb, c + j, p.ldc, n - j);
    }
}

inline i64 at_least(i64 a, i64 least) { return a > least ? a : least; }
inline i64 at_most(i64 a, i64 most) { return a < most ? a : most; }

// Blocks of A's rows stay in the first-level cache while B's rows pass by, and those in the second-level cache.
template <class T>
void all_dots(const Product& p, i64 m, i64 n, const T* a, const T* b, T* c) {
    const i64 row_bytes = p.k * i64(sizeof(T));
    const i64 down = at_least(kRowsBytes / row_bytes / 4 * 4, 4), across = at_least(kColumnsBytes / row_bytes / 8 * 8, 8);
    for (i64 first = 0; first < n; first += across) {
        const i64 columns = at_most(n - first, across);
        for (i64 i = 0; i < m; i += down) {
            const i64 rows = at_most(m - i, down);
            for (i64 j = 0; j < columns; j += 8)
                for (i64 r = 0; r < rows; r += 4)
                    some_dots(p, rows - r, at_most(columns - j, 8), a + (i + r) * p.lda, b + (first + j) * p.ldb,
                              c + (i + r) * p.ldc + first + j);
        }
    }
}

template <class T, int R, int vectors>
void all_columns(const Product& p, i64 n, const T* a, const T* b, T* c) {
    const i64 down = p.a_transposed ? 1 : p.lda, along = p.a_transposed ? p.lda : 1, step = vectors * Wide<T>::lanes;
    for (i64 j = 0; j < n; j += step)
        columns_of<T, R, vectors>(p.k, a, down, along, b + j, p.ldb, c + j, p.ldc, n - j);
}

template <class T>
void few(const Product& p, i64 m, i64 n, const T* a, const T* b, T* c) {
    if (p.b_transposed) return all_dots(p, m, n, a, b, c);
    for (i64 i = 0; i < m; i += 4) {
        const T* left = a + i * (p.a_transposed ? 1 : p.lda);
        T* to = c + i * p.ldc;
        switch (m - i) {
            case 1: all_columns<T, 1, 8>(p, n, left, b, to); break;
            case 2: all_columns<T, 2, 8>(p, n, left, b, to); break;
            case 3: all_columns<T, 3, 6>(p, n, left, b, to); break;
            default: all_columns<T, 4, 4>(p, n, left, b, to); break;
        }
    }
}

}  // namespace

void gemm_few(const Product& p, i64 m, i64 n, const float* a, const float* b, float* c) { few(p, m, n, a, b, c); }
void gemm_few(const Product& p, i64 m, i64 n, const double* a, const double* b, double* c) { few(p, m, n, a, b, c); }

}  // namespace brim
