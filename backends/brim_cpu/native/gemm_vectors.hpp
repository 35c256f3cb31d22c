// Vectors of the widest kind that the compiler may use, for the matrix kernels.
#pragma once
#include <type_traits>

#include "simd.hpp"

namespace brim {
namespace {

template <class T>
struct Wide {
    typedef T Vector __attribute__((vector_size(kVectorBytes)));
    typedef T Unaligned __attribute__((vector_size(kVectorBytes), aligned(sizeof(T)), may_alias));
    using Whole = std::conditional_t<sizeof(T) == 4, i32, i64>;
    typedef Whole Mask __attribute__((vector_size(kVectorBytes)));
    static constexpr int lanes = kVectorBytes / int(sizeof(T));
};

template <class T>
inline typename Wide<T>::Vector load(const T* from) {
    return *reinterpret_cast<const typename Wide<T>::Unaligned*>(from);
}

// The first `count` elements, fewer than a vector has lanes; zero in the others, whose memory is not read.
template <class T>
inline typename Wide<T>::Vector load_part(const T* from, i64 count) {
#if defined(__AVX512F__)
    using V = typename Wide<T>::Vector;
    const u32 mask = (u32(1) << count) - 1;
    if constexpr (sizeof(T) == 4) return (V)_mm512_maskz_loadu_ps(__mmask16(mask), from);
    else return (V)_mm512_maskz_loadu_pd(__mmask8(mask), from);
#else
    alignas(kVectorBytes) T part[Wide<T>::lanes] = {};
    for (i64 n = 0; n < count; n++) part[n] = from[n];
    return load(part);
#endif
}

template <class T>
inline void store(T* to, typename Wide<T>::Vector v) {
    *reinterpret_cast<typename Wide<T>::Unaligned*>(to) = v;
}

template <class T>
inline typename Wide<T>::Vector multiply_add(typename Wide<T>::Vector a, typename Wide<T>::Vector b,
                                             typename Wide<T>::Vector c) {
#if defined(__AVX512F__) || (defined(__AVX__) && defined(__FMA__)) || defined(__aarch64__)
    using V = typename Wide<T>::Vector;
#endif
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 4) return (V)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
    else return (V)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(__AVX__) && defined(__FMA__)
    if constexpr (sizeof(T) == 4) return (V)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
    else return (V)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#elif defined(__aarch64__)
    if constexpr (sizeof(T) == 4) return (V)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
    else return (V)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
#else
    return c + a * b;
#endif
}

template <class T>
inline typename Wide<T>::Vector all_lanes(T x) {
#if defined(__AVX512F__)
    using V = typename Wide<T>::Vector;
    if constexpr (sizeof(T) == 4) return (V)_mm512_set1_ps(x);
    else return (V)_mm512_set1_pd(x);
#else
    return x - typename Wide<T>::Vector{};
#endif
}

#if defined(__GNUC__) && !defined(__clang__)
constexpr bool kShuffles = true;  // of two vectors, by a mask that is the same in every call

// Lane e of the result: x[e] of lanes whose number has not the bit d, and y[e - d] of those that have it.
template <class T, int d>
inline typename Wide<T>::Vector lower_blocks(typename Wide<T>::Vector x, typename Wide<T>::Vector y) {
    constexpr int lanes = Wide<T>::lanes;
    typename Wide<T>::Mask mask;
#pragma GCC unroll 16
    for (int e = 0; e < lanes; e++) mask[e] = e & d ? lanes + e - d : e;
    return __builtin_shuffle(x, y, mask);
}

// Lane e of the result: x[e + d] of lanes whose number has not the bit d, and y[e] of those that have it.
template <class T, int d>
inline typename Wide<T>::Vector upper_blocks(typename Wide<T>::Vector x, typename Wide<T>::Vector y) {
    constexpr int lanes = Wide<T>::lanes;
    typename Wide<T>::Mask mask;
#pragma GCC unroll 16
    for (int e = 0; e < lanes; e++) mask[e] = e & d ? lanes + e : e + d;
    return __builtin_shuffle(x, y, mask);
}
#else
constexpr bool kShuffles = false;

template <class T, int d>
inline typename Wide<T>::Vector lower_blocks(typename Wide<T>::Vector x, typename Wide<T>::Vector y) {
    for (int e = 0; e < Wide<T>::lanes; e++)
        if (e & d) x[e] = y[e - d];
    return x;
}

template <class T, int d>
inline typename Wide<T>::Vector upper_blocks(typename Wide<T>::Vector x, typename Wide<T>::Vector y) {
    for (int e = 0; e < Wide<T>::lanes; e++)
        if (!(e & d)) y[e] = x[e + d];
    return y;
}
#endif

// r[k][j] = r[j][k]: pairs of rows exchange blocks of 1, 2, 4, ... lanes.
template <class T, int d = 1>
inline void transpose(typename Wide<T>::Vector* r) {
    constexpr int lanes = Wide<T>::lanes;
#pragma GCC unroll 16
    for (int j = 0; j < lanes; j++) {
        if (j & d) continue;
        const typename Wide<T>::Vector x = r[j], y = r[j + d];
        r[j] = lower_blocks<T, d>(x, y);
        r[j + d] = upper_blocks<T, d>(x, y);
    }
    if constexpr (2 * d < lanes) transpose<T, 2 * d>(r);
}

// Lane e of the result is the sum over all lanes of r[e % count]; count is a power of two, at most the number of lanes.
// Lanes are added in one order, whatever the count.
template <class T, int count, int d = 1>
inline typename Wide<T>::Vector sums(typename Wide<T>::Vector* r) {
    if constexpr (d == Wide<T>::lanes) {
        return r[0];
    } else {
        constexpr int left = count > 1 ? count / 2 : 1;
#pragma GCC unroll 8
        for (int j = 0; j < left; j++) {
            const typename Wide<T>::Vector x = r[count > 1 ? 2 * j : 0], y = r[count > 1 ? 2 * j + 1 : 0];
            r[j] = lower_blocks<T, d>(x, y) + upper_blocks<T, d>(x, y);
        }
        return sums<T, left, 2 * d>(r);
    }
}

}  // namespace
}  // namespace brim
