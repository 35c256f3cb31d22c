// Tiles of a product by brim's own kernels (gemm_panels.hpp), over B packed in panels that stay in the second-level cache,
// and A read in place or, where its rows would fall upon the same cache lines, packed too.
#include "gemm.hpp"
#include "gemm_panels.hpp"

namespace brim {
namespace {

constexpr i64 kDepth = 256;                  // of one pass over k, at most
constexpr i64 kPackedBytes = 256 * 1024;     // of B, on the thread's stack
constexpr i64 kUnpackedRows = 2 * kRows;     // so few rows do not repay the packing of B

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
