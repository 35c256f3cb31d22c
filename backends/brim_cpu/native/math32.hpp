// exp, log, tanh and erf of float32, within 2 units in the last place (tests/test_native_math.py measures each), written
// so that loops over them vectorise. Polynomials are minimax fits by Remez's algorithm on the interval that is named.
#pragma once
#include "simd.hpp"

namespace brim {

// Horner's scheme: c0 + c1 x + c2 x^2 + ...
template <class T>
inline T poly(T, T c0) {
    return c0;
}
template <class T, class... More>
inline T poly(T x, T c0, T c1, More... more) {
    return fma_(poly(x, c1, more...), x, c0);
}

// 2^n for a whole number n with -126 <= n <= 127: the sum with 1.5 * 2^23 has n in its low bits.
inline float pow2(float n) { return bits_as<float>((bits_as<u32>(n + 12582912.0f) + 127) << 23); }

inline float round32(float x) { return (x + 12582912.0f) - 12582912.0f; }  // |x| < 2^22

inline float exp32(float x) {
    const float limited = x < -104.0f ? -104.0f : x > 89.0f ? 89.0f : x;  // NaN passes
    const float n = round32(limited * 1.44269504088896341f);
    float r = fma_(n, -0.693115234375f, limited);
    r = fma_(n, -3.194618495e-05f, r);
    // (e^r - 1 - r) / r^2 on |r| < 0.354
    const float q = poly(r, 0.5f, 0.16666667f, 0.04166633f, 0.008333269f, 0.0013943064f, 0.00019917074f);
    const float p = fma_(q, r * r, r) + 1.0f;
    const float half = round32(n * 0.5f);  // 2^n in two factors: n is from -150 to 128
    return p * pow2(half) * pow2(n - half);
}

inline float log32(float x) {
    const float scaled = x < 1.17549435e-38f ? x * 8388608.0f : x;  // denormal: times 2^23
    const float shift = x < 1.17549435e-38f ? -23.0f : 0.0f;
    const u32 bits = bits_as<u32>(scaled);
    const u32 above = bits - 0x3f3504f3;  // from sqrt(1/2): the mantissa m is in [sqrt(1/2), sqrt(2))
    const float e = float(i32(above) >> 23) + shift;
    const float f = bits_as<float>((above & 0x007fffff) + 0x3f3504f3) - 1.0f;
    // (log(1 + f) - f + f^2 / 2) / f^3
    const float q = poly(f, 0.3333331f, -0.24999987f, 0.20002146f, -0.16669217f, 0.14220023f, -0.1238555f, 0.1186512f,
                         -0.11780707f, 0.0692108f);
    const float square = f * f;
    float tail = q * (square * f);
    tail = fma_(e, -2.12194440e-4f, tail);
    tail = fma_(square, -0.5f, tail);
    const float result = fma_(e, 0.693359375f, f + tail);
    const float special = x == 0.0f ? -__builtin_inff() : x > 0.0f ? x : __builtin_nanf("");  // infinity, negative, NaN
    return ((x > 0.0f) & (x < __builtin_inff())) ? result : special;
}

inline float tanh32(float x) {
    const float size = __builtin_fabsf(x), z = x * x;
    // (tanh(x) - x) / x^3 for |x| < 0.625
    const float q = poly(z, -0.33333284f, 0.13331449f, -0.053739287f, 0.020635072f, -0.0056980876f);
    const float small = fma_(q * z, x, x);
    // 1 - 2 / (e^y + 1), which is 1 to the last bit from y = 18.1 on; errors of e^y count for 0.6 and less
    const float y = size < 9.1f ? size + size : 18.2f;
    const float turned = fma_(y, 1.44269504088896341f, 12582912.0f), n = turned - 12582912.0f;  // as in round32, pow2
    const float r = fma_(n, -0.69314718f, y);
    const float p = poly(r, 0.49999994f, 0.1666652f, 0.041668404f, 0.008368899f, 0.0013814222f);  // as in exp32
    const float e = bits_as<float>(bits_as<u32>(fma_(p, r * r, r) + 1.0f) + (bits_as<u32>(turned) << 23));
    const float large = 1.0f - 2.0f / (e + 1.0f);
    return x != x ? x : __builtin_copysignf(size < 0.625f ? small : large, x);  // -0 too
}

inline float erf32(float x) {
    const float size = __builtin_fabsf(x), z = x * x;
    // erf(x) / x - 1 for |x| < 0.925
    const float q = poly(z, 0.12837917f, -0.37612635f, 0.11283699f, -0.026859539f, 0.005201305f, -0.00081450795f,
                         8.377597e-05f);
    const float small = fma_(q, x, x);
    // log(1 - erf(t)) for 0.92 < t < 3.95, where erf is 1 to the last bit
    const float t = size > 3.95f ? 3.95f : size;
    const float r = poly(t, 0.00017587458f, -1.1295208f, -0.63333464f, -0.10829394f, 0.025128623f, -0.0041746427f,
                         0.00043521883f, -2.1161899e-05f);
    const float large = __builtin_copysignf(1.0f - exp32(r), x);
    return size < 0.925f ? small : x != x ? x : large;
}

}  // namespace brim
