// Instructions on float32 and float64 that are exact or correctly rounded: the same bits as NumPy's.
#include "vm_functors.hpp"

namespace brim {
namespace {

TWO(Add, x + y)
TWO(Sub, x - y)
TWO(Mul, x* y)
TWO(Div, x / y)
// NaN if either is: the first comparison takes a NaN of x, the second one of y. Of two zeros the first.
TWO(Max, ((x >= y) | (x != x)) ? x : y)
TWO(Min, ((x <= y) | (x != x)) ? x : y)
// The number if one is NaN.
TWO(FMax, ((x >= y) | (y != y)) ? x : y)
TWO(FMin, ((x <= y) | (y != y)) ? x : y)
TWO(Eq, x == y)
TWO(Ne, x != y)
TWO(Lt, x < y)
TWO(Le, x <= y)
TWO(Gt, x > y)
TWO(Ge, x >= y)
TWO(And, (x != 0) & (y != 0))
TWO(Or, (x != 0) | (y != 0))
TWO(Xor, (x != 0) ^ (y != 0))
ONE(Not, x == 0)
ONE(Neg, -x)
ONE(Same, x)
ONE(Square, x* x)
ONE(Sign, x > 0 ? T(1) : x < 0 ? T(-1) : x == 0 ? T(0) : x)
ONE(IsNan, x != x)
struct Abs {
    static float of(float x) { return __builtin_fabsf(x); }
    static double of(double x) { return __builtin_fabs(x); }
};
struct CopySign {
    static float of(float x, float y) { return __builtin_copysignf(x, y); }
    static double of(double x, double y) { return __builtin_copysign(x, y); }
};
struct SignBit {
    static bool of(float x) { return bits_as<u32>(x) >> 31; }
    static bool of(double x) { return bits_as<u64>(x) >> 63; }
};
ONE(IsInf, Abs::of(x) == T(__builtin_inf()))
ONE(IsFinite, Abs::of(x) < T(__builtin_inf()))
struct Sqrt {
    static float of(float x) { return __builtin_sqrtf(x); }
    static double of(double x) { return __builtin_sqrt(x); }
};
ONE(RSqrt, T(1) / Sqrt::of(x))
struct Floor {
    static float of(float x) { return __builtin_floorf(x); }
    static double of(double x) { return __builtin_floor(x); }
};
struct Ceil {
    static float of(float x) { return __builtin_ceilf(x); }
    static double of(double x) { return __builtin_ceil(x); }
};
struct Trunc {
    static float of(float x) { return __builtin_truncf(x); }
    static double of(double x) { return __builtin_trunc(x); }
};
struct Round {
    static float of(float x) { return __builtin_rintf(x); }
    static double of(double x) { return __builtin_rint(x); }
};

}  // namespace

#define FOR(T, t)                                                                                             \
    {"add." t, binary<Add, T, T>}, {"sub." t, binary<Sub, T, T>}, {"mul." t, binary<Mul, T, T>},              \
        {"div." t, binary<Div, T, T>}, {"max." t, binary<Max, T, T>}, {"min." t, binary<Min, T, T>},          \
        {"fmax." t, binary<FMax, T, T>}, {"fmin." t, binary<FMin, T, T>}, {"eq." t, binary<Eq, bool, T>},     \
        {"ne." t, binary<Ne, bool, T>}, {"lt." t, binary<Lt, bool, T>}, {"le." t, binary<Le, bool, T>},       \
        {"gt." t, binary<Gt, bool, T>}, {"ge." t, binary<Ge, bool, T>}, {"and." t, binary<And, bool, T>},     \
        {"or." t, binary<Or, bool, T>}, {"xor." t, binary<Xor, bool, T>}, {"not." t, unary<Not, bool, T>},    \
        {"copysign." t, binary<CopySign, T, T>}, {"neg." t, unary<Neg, T, T>}, {"conj." t, unary<Same, T, T>}, \
        {"abs." t, unary<Abs, T, T>}, {"square." t, unary<Square, T, T>}, {"sign." t, unary<Sign, T, T>},     \
        {"sqrt." t, unary<Sqrt, T, T>}, {"rsqrt." t, unary<RSqrt, T, T>}, {"floor." t, unary<Floor, T, T>},   \
        {"ceil." t, unary<Ceil, T, T>}, {"trunc." t, unary<Trunc, T, T>}, {"round." t, unary<Round, T, T>},   \
        {"isnan." t, unary<IsNan, bool, T>}, {"isinf." t, unary<IsInf, bool, T>},                             \
        {"isfinite." t, unary<IsFinite, bool, T>}, {"signbit." t, unary<SignBit, bool, T>}

const Instruction kFloatInstructions[] = {FOR(float, "f32"), FOR(double, "f64"), {nullptr, nullptr}};

}  // namespace brim
