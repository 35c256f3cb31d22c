// e^(x - top) along a row whose largest number is `top`, and the sum: what softmax and its relatives begin with.
#pragma once
#include "math32.hpp"
#include "rows.hpp"

namespace brim {

// e^x for x <= 0 within 1 unit in the last place (1.1 without a fused multiply-add); NaN for NaN; where it would be
// denormal the scalar gives 0.
inline float exp_below(float x) {
    constexpr float least = -87.33654f;  // its power is the smallest normal number
    const float limited = x < least ? least : x;
    // The sum with 1.5 * 2^23 has a whole number in its low bits.
    const float shifted = fma_(limited, 1.44269504088896341f, 12582912.0f);
    const float n = shifted - 12582912.0f;
    float r = fma_(n, -0.693115234375f, limited);
    r = fma_(n, -3.194618495e-05f, r);
    // e^r on |r| < 0.347
    const float p = poly(r, 1.0f, 1.0f, 0.49999994f, 0.16666521f, 0.04166839f, 0.008368745f, 0.001381454f);
    const float power = p * bits_as<float>((bits_as<u32>(shifted) + 127) << 23);
    return x < least ? 0.0f : power;
}

#if defined(__AVX512F__)
// As the scalar, and rounded to a denormal number where that is due: the processor scales by 2^n in one step. (maskz:
// GCC 12 warns about its own plain forms.)
inline Vector<float> exp_below(Vector<float> x) {
    const __m512 limited = _mm512_maskz_max_ps(0xffff, _mm512_set1_ps(-104.0f), __m512(x));  // the second where one is NaN
    const __m512 magic = _mm512_set1_ps(12582912.0f);
    const __m512 n = _mm512_fmadd_ps(limited, _mm512_set1_ps(1.44269504088896341f), magic) - magic;
    __m512 r = _mm512_fmadd_ps(n, _mm512_set1_ps(-0.693115234375f), limited);
    r = _mm512_fmadd_ps(n, _mm512_set1_ps(-3.194618495e-05f), r);
    constexpr float rest[] = {0.008368745f, 0.04166839f, 0.16666521f, 0.49999994f, 1.0f, 1.0f};
    __m512 p = _mm512_set1_ps(0.001381454f);
    for (float c : rest) p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
    return Vector<float>(_mm512_maskz_scalef_ps(0xffff, p, n));
}

inline Vector<float> fma_(Vector<float> a, float b, float c) {
    return Vector<float>(_mm512_fmadd_ps(__m512(a), __m512(spread(b)), __m512(spread(c))));
}
#endif

// out[j] = f(x[j]) of a row; `f` takes a number or, where that is worth it, a vector of them.
template <class F>
__attribute__((noinline)) void map_row(float* out, const float* x, i64 n, const F& f) {
#if defined(__AVX512F__)
    i64 at = 0;
    for (; at + kWidth<float> <= n; at += kWidth<float>) store(out + at, f(load(x + at)));
    if (at < n) store_part(out + at, n - at, f(load_part(x + at, n - at, 0.0f)));
#else
    BRIM_INDEPENDENT
    for (i64 j = 0; j < n; j++) out[j] = f(x[j]);
#endif
}

// The largest number of a row, NaN left out; -infinity where there is none.
template <class T>
struct LargestNumber : Larger<T> {
    template <class V>
    static V of(V a, V b) {
        return b > a ? b : a;
    }
};

inline float top_of(const float* x, i64 n) { return fold_run<LargestNumber<float>>(x, n); }

// e[j] = e^(x[j] - top), and their sum; `e` may be `x`. Without `kept` there is nothing but the sum.
template <bool kept>
float exponentials(float* e, const float* x, float top, i64 n) {
    if (n > kLeaf) {
        const i64 half = ceil_div(ceil_div(n, kLeaf), 2) * kLeaf;
        const float left = exponentials<kept>(e, x, top, half);
        return left + exponentials<kept>(kept ? e + half : e, x + half, top, n - half);
    }
#if defined(__AVX512F__)
    Vector<float> sums[kPerLanes] = {};
    i64 at = 0;
    const auto add = [&](int k, Vector<float> v, i64 count) {
        const Vector<float> power = exp_below(v - top);
        if (kept) count == kWidth<float> ? store(e + at, power) : store_part(e + at, count, power);
        sums[k] += power;
        at += count;
    };
    while (at + kLanes<float> <= n)
#pragma GCC unroll 4
        for (int k = 0; k < kPerLanes; k++) add(k, load(x + at), kWidth<float>);
#pragma GCC unroll 4
    for (int k = 0; k < kPerLanes; k++) {
        if (n - at >= kWidth<float>)
            add(k, load(x + at), kWidth<float>);
        else if (at < n)
            add(k, load_part(x + at, n - at, -__builtin_inff()), n - at);
    }
    return fold_vectors<Add<float>, float>(sums);
#else
    constexpr i64 lanes = kLanes<float>;
    float sums[lanes] = {};
    for (i64 at = 0; at < n; at += lanes) {
        const i64 count = n - at < lanes ? n - at : lanes;
        BRIM_INDEPENDENT
        for (i64 j = 0; j < count; j++) {
            const float power = exp_below(x[at + j] - top);
            if (kept) e[at + j] = power;
            sums[j] += power;
        }
    }
    Vector<float> folded[kPerLanes];
    std::memcpy(folded, sums, sizeof sums);
    return fold_vectors<Add<float>, float>(folded);
#endif
}

}  // namespace brim
