// Functions in float64 to about 1e-11, from which the rarer float32 functions are rounded: within 1 unit in the last place
// of float32 with nothing to prove. Series are those of Taylor; arguments come from float32, so they are never denormal.
#pragma once
#include "math32.hpp"

namespace brim {

constexpr double kInfinity = __builtin_inf();
constexpr double kLn2 = 0.6931471805599453, kHalfPi = 1.5707963267948966, kPi = 3.141592653589793;

inline double round64(double x) { return (x + 6755399441055744.0) - 6755399441055744.0; }  // |x| < 2^51

// 2^n for a whole number n with -1022 <= n <= 1023: the sum with 1.5 * 2^52 has n in its low bits.
inline double pow2(double n) { return bits_as<double>((bits_as<u64>(n + 6755399441055744.0) + 1023) << 52); }

// x, limited to where 2^n above is normal; float32 is infinite or zero long before.
inline double limited64(double x) { return x < -700.0 ? -700.0 : x > 700.0 ? 700.0 : x; }

struct Reduced {
    double n, r;  // x = n ln 2 + r
};

inline Reduced reduce64(double x) {
    const double n = round64(x * 1.4426950408889634);
    return {n, fma_(n, -0x1.a39ef35793c76p-33, fma_(n, -0x1.62e42fee00000p-1, x))};
}

// e^r - 1 for |r| < 0.35
inline double small_expm1_64(double r) {
    return r * poly(r, 1.0, 1.0 / 2, 1.0 / 6, 1.0 / 24, 1.0 / 120, 1.0 / 720, 1.0 / 5040, 1.0 / 40320, 1.0 / 362880,
                    1.0 / 3628800);
}

inline double exp64(double x) {
    const Reduced at = reduce64(limited64(x));
    return (small_expm1_64(at.r) + 1.0) * pow2(at.n);
}

inline double expm1_64(double x) {
    const Reduced at = reduce64(limited64(x));
    const double scale = pow2(at.n);
    return fma_(small_expm1_64(at.r), scale, scale - 1.0);
}

// log(x) for normal x > 0; -infinity at 0, NaN below
inline double log64(double x) {
    const u64 above = bits_as<u64>(x) - 0x3fe6a09e667f3bcd;  // from sqrt(1/2)
    const double m = bits_as<double>((above & 0x000fffffffffffff) + 0x3fe6a09e667f3bcd);
    // The exponent as a number, without a conversion: its bits under those of 2^52, whose sign is taken care of by 2048.
    const double e = bits_as<double>(((above + (u64(2048) << 52)) >> 52) | 0x4330000000000000) - (4503599627370496.0 + 2048);
    const double s = (m - 1.0) / (m + 1.0), z = s * s;
    const double series = poly(z, 2.0, 2.0 / 3, 2.0 / 5, 2.0 / 7, 2.0 / 9, 2.0 / 11, 2.0 / 13, 2.0 / 15);
    const double result = fma_(e, kLn2, s * series);
    const double special = x == 0.0 ? -kInfinity : x > 0.0 ? x : __builtin_nan("");
    return ((x > 0.0) & (x < kInfinity)) ? result : special;
}

inline double log1p_64(double x) {
    const double u = 1.0 + x, lost = (x - (u - 1.0)) / u;
    const double result = log64(u);
    return ((u > 0.0) & (u < kInfinity)) ? result + lost : result;
}

// atan(x) for x >= 0, infinity included
inline double atan64(double x) {
    const bool over = x > 2.414213562373095;    // tan(3 pi / 8)
    const bool middle = x > 0.414213562373095;  // tan(pi / 8)
    const double z = over ? -1.0 / x : middle ? (x - 1.0) / (x + 1.0) : x;
    const double start = over ? kHalfPi : middle ? kHalfPi / 2 : 0.0;
    const double w = z * z;
    const double series = poly(w, 1.0, -1.0 / 3, 1.0 / 5, -1.0 / 7, 1.0 / 9, -1.0 / 11, 1.0 / 13, -1.0 / 15, 1.0 / 17,
                               -1.0 / 19, 1.0 / 21, -1.0 / 23, 1.0 / 25);
    return fma_(z, series, start);
}

struct Turn {
    double sin, cos;
};

constexpr double kTurnLimit = 1e6;  // beyond, n * pi/2 in three parts is no longer exact

inline Turn turn64(double x) {
    const double n = round64(x * 0.6366197723675814);
    double r = fma_(n, -0x1.921fb54400000p+0, x);
    r = fma_(n, -0x1.0b4611a600000p-34, r);
    r = fma_(n, -0x1.3198a2e037073p-69, r);
    const double z = r * r;
    const double s = r * poly(z, 1.0, -1.0 / 6, 1.0 / 120, -1.0 / 5040, 1.0 / 362880, -1.0 / 39916800, 1.0 / 6227020800);
    const double c = poly(z, 1.0, -1.0 / 2, 1.0 / 24, -1.0 / 720, 1.0 / 40320, -1.0 / 3628800, 1.0 / 479001600);
    const u64 quarter = bits_as<u64>(n + 6755399441055744.0);
    const bool swapped = quarter & 1;
    const double sine = swapped ? c : s, cosine = swapped ? s : c;
    return {quarter & 2 ? -sine : sine, (quarter + 1) & 2 ? -cosine : cosine};
}

// sinh(x) and tanh's relatives keep their relative accuracy at 0 by way of expm1.
inline double sinh64(double x) {
    const double size = __builtin_fabs(x), t = expm1_64(size > 200.0 ? 200.0 : size);
    return __builtin_copysign(0.5 * (t + t / (t + 1.0)), x);
}

inline double cosh64(double x) {
    const double t = exp64(__builtin_fabs(x) > 200.0 ? 200.0 : __builtin_fabs(x));
    return 0.5 * (t + 1.0 / t);
}

inline double asinh64(double x) {
    const double size = __builtin_fabs(x), z = size * size;
    const double t = log1p_64(size + z / (1.0 + __builtin_sqrt(z + 1.0)));
    return __builtin_copysign(size < kInfinity ? t : size, x);
}

inline double acosh64(double x) {
    const double t = x - 1.0;
    return x < 1.0 ? __builtin_nan("") : log1p_64(t + __builtin_sqrt(t * (t + 2.0)));
}

inline double atanh64(double x) {
    const double size = __builtin_fabs(x);
    return __builtin_copysign(0.5 * log1p_64(2.0 * size / (1.0 - size)), x);
}

inline double pow64(double x, double y) {
    const double size = __builtin_fabs(x);
    const double whole = __builtin_trunc(y), half = __builtin_trunc(y * 0.5);
    const bool is_whole = whole == y, is_odd = is_whole & (half * 2.0 != whole) & (__builtin_fabs(y) < kInfinity);
    const double power = exp64(y * log64(size));
    const double value = size == 1.0 ? 1.0 : power;
    const bool negative = bits_as<u64>(x) >> 63;
    const double side = (negative & is_odd) ? -value : value;
    // A negative number to a power that is not whole; zero and infinity have powers.
    const double result = ((x < 0.0) & !is_whole & (size < kInfinity)) ? __builtin_nan("") : side;
    return ((y == 0.0) | (x == 1.0)) ? 1.0 : ((x != x) | (y != y)) ? x + y : result;
}

}  // namespace brim
