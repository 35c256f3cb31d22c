// Sums and extremes of many numbers in an order that depends on their count alone: not on threads or the processor.
//
// A run of up to kLeaf numbers is folded into kLanes lanes side by side, number i into lane i % kLanes, and the lanes
// in a tree; longer runs are halved (pairwise summation), so the rounding error grows with the logarithm of the count.
#pragma once
#include "simd.hpp"

namespace brim {

template <class T>
struct VectorOf;
template <>
struct VectorOf<float> {
    typedef float Type __attribute__((vector_size(kVectorBytes)));
};
template <>
struct VectorOf<double> {
    typedef double Type __attribute__((vector_size(kVectorBytes)));
};
template <class T>
using Vector = typename VectorOf<T>::Type;

constexpr int kLaneBytes = 256, kPerLanes = kLaneBytes / kVectorBytes;  // lanes of all, vectors that hold them
template <class T>
constexpr i64 kLanes = kLaneBytes / i64(sizeof(T));
template <class T>
constexpr i64 kWidth = kVectorBytes / i64(sizeof(T));

constexpr i64 kLeaf = 1024;

template <class T>
inline Vector<T> load(const T* from) {
    Vector<T> v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

template <class T>
inline Vector<T> spread(T value) {
    return value - Vector<T>{};  // less 0, which keeps -0; GCC 12 fills lane after lane if asked to
}

// The first `count` lanes (fewer than all) from memory, the others from `padding`; nothing else is read.
template <class T>
inline Vector<T> load_part(const T* from, i64 count, T padding) {
#if defined(__AVX512F__)
    const Vector<T> v = spread(padding);
    if constexpr (sizeof(T) == 4) return Vector<T>(_mm512_mask_loadu_ps(__m512(v), __mmask16((1u << count) - 1), from));
    if constexpr (sizeof(T) == 8) return Vector<T>(_mm512_mask_loadu_pd(__m512d(v), __mmask8((1u << count) - 1), from));
#endif
    T part[kWidth<T>];
    for (i64 i = 0; i < kWidth<T>; i++) part[i] = i < count ? from[i] : padding;
    return load(part);
}

template <class T>
inline void store(T* to, Vector<T> v) {
    std::memcpy(to, &v, sizeof v);
}

// The first `count` lanes to memory.
template <class T>
inline void store_part(T* to, i64 count, Vector<T> v) {
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 4) return _mm512_mask_storeu_ps(to, __mmask16((1u << count) - 1), __m512(v));
    if constexpr (sizeof(T) == 8) return _mm512_mask_storeu_pd(to, __mmask8((1u << count) - 1), __m512d(v));
#endif
    for (i64 i = 0; i < count; i++) to[i] = v[i];
}

// The first `count` lanes of v, the others `padding`.
template <class T>
inline Vector<T> first_lanes(Vector<T> v, i64 count, T padding) {
    T lanes[kWidth<T>];
    for (i64 i = 0; i < kWidth<T>; i++) lanes[i] = i < count ? v[i] : padding;
    return load(lanes);
}

#if defined(__AVX512F__)
template <>
inline Vector<float> first_lanes(Vector<float> v, i64 count, float padding) {
    return Vector<float>(_mm512_mask_mov_ps(__m512(spread(padding)), __mmask16((1u << count) - 1), __m512(v)));
}
#endif

template <class T>
struct Add {
    using Wide = double;  // runs are added up in it
    static constexpr T start() { return 0; }
    template <class V>
    static V of(V a, V b) {
        return a + b;
    }
};

// The larger one, NaN where one is.
template <class T>
struct Larger {
    using Wide = T;
    static constexpr T start() { return T(-__builtin_inf()); }
    template <class V>
    static V of(V a, V b) {
        return ((b > a) | (b != b)) ? b : a;
    }
};

template <class T>
struct Smaller {
    using Wide = T;
    static constexpr T start() { return T(__builtin_inf()); }
    template <class V>
    static V of(V a, V b) {
        return ((b < a) | (b != b)) ? b : a;
    }
};

// Lane i with lane i + half, and so on until one is left.
template <class Op, class T, int lanes>
inline T fold_within(const T __attribute__((vector_size(lanes * sizeof(T)))) & v) {
    if constexpr (lanes == 2) {
        return Op::of(v[0], v[1]);
    } else {
        typedef T Half __attribute__((vector_size(lanes / 2 * sizeof(T))));
        Half low, high;
#if defined(__AVX512F__)
        if constexpr (sizeof v == 64) {  // by way of memory otherwise
            low = Half(_mm512_maskz_extractf64x4_pd(0xf, __m512d(v), 0));
            high = Half(_mm512_maskz_extractf64x4_pd(0xf, __m512d(v), 1));
            return fold_within<Op, T, lanes / 2>(Op::of(low, high));
        }
#endif
        std::memcpy(&low, &v, sizeof low);
        std::memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof low, sizeof high);
        return fold_within<Op, T, lanes / 2>(Op::of(low, high));
    }
}

// As fold_within, of all kLanes lanes.
template <class Op, class T>
inline T fold_vectors(Vector<T>* v) {
#pragma GCC unroll 4
    for (int half = kPerLanes / 2; half > 0; half /= 2)
#pragma GCC unroll 8
        for (int k = 0; k < half; k++) v[k] = Op::of(v[k], v[k + half]);
    return fold_within<Op, T, int(kWidth<T>)>(v[0]);
}

// Folds up to kLeaf terms into `Results` results; `add(acc, v)` combines one vector of each source, `v`, with the
// accumulators `acc`. Past the end sources read as `padding`, of which the terms must be neutral.
template <class Op, int Results, int Sources, class T, class F>
inline void fold_leaf(T* results, const T* const* from, const T* padding, i64 n, const F& add) {
    Vector<T> acc[kPerLanes][Results], v[Sources];
    for (int k = 0; k < kPerLanes; k++)
        for (int r = 0; r < Results; r++) acc[k][r] = spread<T>(Op::start());
    i64 at = 0;
    for (; at + kLanes<T> <= n; at += kLanes<T>)
#pragma GCC unroll 16
        for (int k = 0; k < kPerLanes; k++) {
            for (int s = 0; s < Sources; s++) v[s] = load(from[s] + at + k * kWidth<T>);
            add(acc[k], v);
        }
#pragma GCC unroll 16
    for (int k = 0; k < kPerLanes; k++) {
        if (at >= n) break;
        const bool whole = at + kWidth<T> <= n;
        for (int s = 0; s < Sources; s++) v[s] = whole ? load(from[s] + at) : load_part(from[s] + at, n - at, padding[s]);
        add(acc[k], v);
        at += kWidth<T>;
    }
    for (int r = 0; r < Results; r++) {
        Vector<T> lanes[kPerLanes];
        for (int k = 0; k < kPerLanes; k++) lanes[k] = acc[k][r];
        results[r] = fold_vectors<Op, T>(lanes);
    }
}

// As fold_leaf, for any count.
template <class Op, int Results, int Sources, class T, class F>
void fold(T* results, const T* const* from, const T* padding, i64 n, const F& add) {
    if (n <= kLeaf) return fold_leaf<Op, Results, Sources>(results, from, padding, n, add);
    const i64 half = ceil_div(ceil_div(n, kLeaf), 2) * kLeaf;
    T right[Results];
    const T* rest[Sources];
    for (int s = 0; s < Sources; s++) rest[s] = from[s] + half;
    fold<Op, Results, Sources>(results, from, padding, half, add);
    fold<Op, Results, Sources>(right, rest, padding, n - half, add);
    for (int r = 0; r < Results; r++) results[r] = Op::of(results[r], right[r]);
}

template <class Op, class T>
inline T fold_run(const T* x, i64 n) {
    T result;
    const T padding = Op::start();
    fold<Op, 1, 1>(&result, &x, &padding, n, [](Vector<T>* acc, const Vector<T>* v) { acc[0] = Op::of(acc[0], v[0]); });
    return result;
}

template <class T>
inline T sum_of(const T* x, i64 n) {
    return fold_run<Add<T>>(x, n);
}

template <class T>
inline T largest_of(const T* x, i64 n) {
    return fold_run<Larger<T>>(x, n);
}

// Columns: out[j] = the fold of x[r * stride + j] over the rows r. At most kTile columns at once.
constexpr i64 kTile = 512, kLeafRows = 32;

template <class Op, class T>
void fold_rows(T* out, const T* x, i64 rows, i64 stride, i64 width) {
    if (rows <= kLeafRows) {
        for (i64 j = 0; j < width; j++) out[j] = Op::start();
        for (i64 r = 0; r < rows; r++) {
            const T* row = x + r * stride;
            BRIM_INDEPENDENT
            for (i64 j = 0; j < width; j++) out[j] = Op::of(out[j], row[j]);
        }
        return;
    }
    const i64 half = ceil_div(ceil_div(rows, kLeafRows), 2) * kLeafRows;
    T right[kTile];
    fold_rows<Op>(out, x, half, stride, width);
    fold_rows<Op>(right, x + half * stride, rows - half, stride, width);
    for (i64 j = 0; j < width; j++) out[j] = Op::of(out[j], right[j]);
}

// Whether results are large enough to be written past the caches, in runs of so many numbers: of whole cache lines, or
// so long that the parts of lines at their ends do not count.
template <class T>
inline bool is_streamed(i64 numbers, i64 run) {
    const i64 nbytes = run * i64(sizeof(T));
    return numbers * i64(sizeof(T)) >= kStreamBytes && (nbytes % 64 == 0 || nbytes >= 4096);
}

// Asks for the memory `ahead` bytes behind a run of `nbytes`; it need not exist.
inline void prefetch(const void* run, i64 nbytes, i64 ahead) {
    const char* from = static_cast<const char*>(run) + ahead;
    for (i64 at = 0; at < nbytes; at += 64) __builtin_prefetch(from + at);
}

// Writes `n` numbers that `compute(block, begin, count)` gives, past the caches where `streamed`: then the thread calls
// stream_done() after its last run. (Not here: it waits for all that is on the way.)
template <class T, class F>
inline void write_run(T* out, i64 n, bool streamed, const F& compute) {
    if (!streamed) return compute(out, i64(0), n);
    T block[kLeaf];
    const i64 over = i64(reinterpret_cast<std::uintptr_t>(out) % 64) / i64(sizeof(T));  // the first block ends with a line
    for (i64 at = 0, count; at < n; at += count) {
        count = kLeaf - (at == 0 ? over : 0);
        count = n - at < count ? n - at : count;
        compute(block, at, count);
        stream_copy(out + at, block, count * i64(sizeof(T)));
    }
}

}  // namespace brim
