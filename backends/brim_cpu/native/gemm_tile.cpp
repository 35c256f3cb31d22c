// brim's own matrix kernels: a register tile of MR rows and NR columns, over B packed in panels of NR columns that stay
// in the second-level cache, and A read in place or, where its rows would fall upon the same cache lines, packed too.
#include "gemm.hpp"
#include <type_traits>

#include "simd.hpp"

namespace brim {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kRows = 12, kVectors = 2;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32, kRows = 6, kVectors = 2;
#else
constexpr int kVectorBytes = 16, kRows = 4, kVectors = 2;
#endif

constexpr i64 kDepth = 256;                  // of one pass over k, at most
constexpr i64 kPackedBytes = 256 * 1024;     // of B, on the thread's stack
constexpr i64 kUnpackedRows = 2 * kRows;     // so few rows do not repay the packing of B

template <class T>
struct Wide {
    typedef T Vector __attribute__((vector_size(kVectorBytes)));
    typedef T Unaligned __attribute__((vector_size(kVectorBytes), aligned(sizeof(T)), may_alias));
    static constexpr int lanes = kVectorBytes / int(sizeof(T));
    static constexpr int columns = lanes * kVectors;
};

template <class T>
inline typename Wide<T>::Vector load(const T* from) {
    return *reinterpret_cast<const typename Wide<T>::Unaligned*>(from);
}

template <class T>
inline void store(T* to, typename Wide<T>::Vector v) {
    *reinterpret_cast<typename Wide<T>::Unaligned*>(to) = v;
}

template <class V, class T>
inline V multiply_add(V a, T b, V c) {
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 4) return (V)_mm512_fmadd_ps((__m512)a, _mm512_set1_ps(b), (__m512)c);
    else return (V)_mm512_fmadd_pd((__m512d)a, _mm512_set1_pd(b), (__m512d)c);
#elif defined(__AVX__) && defined(__FMA__)
    if constexpr (sizeof(T) == 4) return (V)_mm256_fmadd_ps((__m256)a, _mm256_set1_ps(b), (__m256)c);
    else return (V)_mm256_fmadd_pd((__m256d)a, _mm256_set1_pd(b), (__m256d)c);
#else
    return c + a * b;
#endif
}

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
            const T x = a[i * down + k * along];
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; v++) sum[i][v] = multiply_add(row[v], x, sum[i][v]);
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

#if defined(__GNUC__) && !defined(__clang__)
constexpr bool kTransposesInRegisters = true;

// r[k][j] = r[j][k]: pairs of rows exchange blocks of 1, 2, 4, ... lanes.
template <class T>
inline void transpose(typename Wide<T>::Vector* r) {
    constexpr int lanes = Wide<T>::lanes;
    using Whole = std::conditional_t<sizeof(T) == 4, i32, i64>;
    typedef Whole Mask __attribute__((vector_size(kVectorBytes)));
#pragma GCC unroll 4
    for (int d = 1; d < lanes; d *= 2) {
        Mask low, high;
#pragma GCC unroll 16
        for (int e = 0; e < lanes; e++) low[e] = e & d ? lanes + e - d : e, high[e] = e & d ? lanes + e : e + d;
#pragma GCC unroll 16
        for (int j = 0; j < lanes; j++) {
            if (j & d) continue;
            const typename Wide<T>::Vector x = r[j], y = r[j + d];
            r[j] = __builtin_shuffle(x, y, low);
            r[j + d] = __builtin_shuffle(x, y, high);
        }
    }
}
#else
constexpr bool kTransposesInRegisters = false;

template <class T>
inline void transpose(typename Wide<T>::Vector*) {}
#endif

// to[k * stride + j] = from[j * leading + k] for j < rows and as many k as a vector has lanes. Where rows are fewer, a
// whole vector is stored all the same: `to` has room behind its end, and the next k overwrites what is too much.
template <class T, int rows>
inline void transpose_block(T* to, i64 stride, const T* from, i64 leading) {
    constexpr int lanes = Wide<T>::lanes;
    if constexpr (kTransposesInRegisters && rows <= lanes) {
        typename Wide<T>::Vector r[lanes];
#pragma GCC unroll 16
        for (int j = 0; j < lanes; j++) r[j] = j < rows ? load(from + j * leading) : typename Wide<T>::Vector{};
        transpose<T>(r);
#pragma GCC unroll 16
        for (int k = 0; k < lanes; k++) store(to + k * stride, r[k]);
    } else {
        for (int j = 0; j < rows; j++)
            for (int k = 0; k < lanes; k++) to[k * stride + j] = from[j * leading + k];
    }
}

// One panel of B: depth rows of NR columns, of which `columns` exist and the others are zero.
template <class T>
void pack_panel(T* to, const T* b, i64 ldb, bool transposed, i64 depth, i64 columns) {
    constexpr int lanes = Wide<T>::lanes, width = Wide<T>::columns;
    if (!transposed) {
        if (columns == width) {
            for (i64 k = 0; k < depth; k++)
                for (int v = 0; v < kVectors; v++) store(to + k * width + v * lanes, load(b + k * ldb + v * lanes));
            return;
        }
        for (i64 k = 0; k < depth; k++)
            for (i64 j = 0; j < width; j++) to[k * width + j] = j < columns ? b[k * ldb + j] : T(0);
        return;
    }
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

// kRows rows of A, k by k.
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
    if (rows == kRows)
        for (; k + lanes <= depth; k += lanes) transpose_block<T, kRows>(to + k * kRows, kRows, a + k, lda);
    for (; k < depth; k++)
        for (i64 i = 0; i < rows; i++) to[k * kRows + i] = a[i * lda + k];
}

template <class T>
void tile(const Product& p, i64 m, i64 n, const T* a, const T* b, T* c) {
    constexpr i64 width = Wide<T>::columns;
    constexpr i64 room = kPackedBytes / i64(sizeof(T));
    alignas(64) T packed_b[room];
    alignas(64) T packed_a[kRows * kDepth + Wide<T>::lanes];
    alignas(64) T corner[kRows * width];
    const i64 passes = ceil_div(p.k, kDepth), depth_most = ceil_div(p.k, passes);
    const i64 panels_most = room / (width * depth_most);
    // Rows at a distance of whole kilobytes meet in the same sets of the first-level cache.
    const bool pack_a = p.a_transposed || (p.lda * i64(sizeof(T))) % 2048 == 0;
    for (i64 first = 0; first < n; first += panels_most * width) {
        const i64 columns = n - first < panels_most * width ? n - first : panels_most * width;
        const i64 panels = ceil_div(columns, width);
        for (i64 k = 0; k < p.k; k += depth_most) {
            const i64 depth = p.k - k < depth_most ? p.k - k : depth_most;
            const bool add = k > 0;
            const bool in_place = !p.b_transposed && m <= kUnpackedRows;
            for (i64 j = 0; j < panels; j++) {
                const i64 left = columns - j * width, have = left < width ? left : width, at = first + j * width;
                if (in_place && have == width) continue;
                pack_panel(packed_b + j * width * depth_most, p.b_transposed ? b + at * p.ldb + k : b + k * p.ldb + at, p.ldb,
                           p.b_transposed != 0, depth, have);
            }
            for (i64 i = 0; i < m; i += kRows) {
                const i64 rows = m - i < kRows ? m - i : i64(kRows);
                const T* left = p.a_transposed ? a + k * p.lda + i : a + i * p.lda + k;
                i64 down = p.lda, along = 1;
                if (pack_a) {
                    pack_rows(packed_a, left, p.lda, p.a_transposed != 0, depth, rows);
                    left = packed_a, down = 1, along = kRows;
                }
                const KernelFn<T> run = kernel_of<T>(rows);
                for (i64 j = 0; j < panels; j++) {
                    const i64 missing = columns - j * width, have = missing < width ? missing : width;
                    const i64 at = first + j * width;
                    const bool direct = in_place && have == width;
                    const T* right = direct ? b + k * p.ldb + at : packed_b + j * width * depth_most;
                    const i64 next = direct ? p.ldb : width;
                    T* to = c + i * p.ldc + at;
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
