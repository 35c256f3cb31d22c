// Instructions on float32 that NumPy computes by other code, so that their last bits differ from NumPy's.
#include "math64.hpp"
#include "vm.hpp"

namespace brim {
namespace {

#define ONE(Name, expression) \
    struct Name {             \
        static float of(float x) { return float(expression); } \
    };
#define TWO(Name, expression) \
    struct Name {             \
        static float of(float x, float y) { return float(expression); } \
    };

ONE(Exp, exp32(x))
ONE(Log, log32(x))
ONE(Tanh, tanh32(x))
ONE(Erf, erf32(x))
ONE(Exp2, exp64(double(x) * kLn2))
ONE(Expm1, x == 0 ? double(x) : expm1_64(x))
ONE(Log2, log64(x) * 1.4426950408889634)
ONE(Log10, log64(x) * 0.4342944819032518)
ONE(Log1p, x == 0 ? double(x) : log1p_64(x))
ONE(Asin, __builtin_copysign(atan64(__builtin_fabs(x) / __builtin_sqrt((1.0 - x) * (1.0 + x))), double(x)))
ONE(Acos, 2.0 * atan64(__builtin_sqrt((1.0 - x) / (1.0 + x))))
ONE(Atan, __builtin_copysign(atan64(__builtin_fabs(x)), double(x)))
ONE(Sinh, sinh64(x))
ONE(Cosh, cosh64(x))
ONE(Asinh, asinh64(x))
ONE(Acosh, acosh64(x))
ONE(Atanh, atanh64(x))
ONE(Sin, turn64(x).sin)
ONE(Cos, turn64(x).cos)
ONE(Tan, turn64(x).sin / turn64(x).cos)
TWO(Pow, pow64(x, y))

struct Hypot {
    static float of(float x, float y) {
        const double a = x, b = y;
        const bool infinite = (__builtin_fabs(a) == kInfinity) | (__builtin_fabs(b) == kInfinity);
        return float(infinite ? kInfinity : __builtin_sqrt(a * a + b * b));
    }
};

struct Atan2 {
    static float of(float y, float x) {
        const double a = __builtin_fabs(double(y)), b = __builtin_fabs(double(x));
        const double ratio = a == b ? (a == 0.0 ? 0.0 : 1.0) : a / b;  // also of two zeros, of two infinities
        const double angle = atan64(ratio), turned = bits_as<u32>(x) >> 31 ? kPi - angle : angle;
        return float(((x != x) | (y != y)) ? double(x) + double(y) : __builtin_copysign(turned, double(y)));
    }
};

struct LogAddExp {
    static float of(float x, float y) {
        const double a = x, b = y, larger = a > b ? a : b, apart = __builtin_fabs(a - b);
        const double sum = larger + log1p_64(exp64(-apart));
        return float(a == b ? a + kLn2 : ((a != a) | (b != b)) ? a + b : sum);
    }
};

// Sine, cosine and tangent of huge numbers want more digits of pi: the C library has them, one number at a time.
template <class F, float (*precise)(float)>
void turning(void* d_, const void* a_, const void*, const void*, i64 n) {
    float* d = static_cast<float*>(d_);
    const float* a = static_cast<const float*>(a_);
    bool huge = false;
    for (i64 i = 0; i < n; i++) huge |= __builtin_fabsf(a[i]) > float(kTurnLimit);  // false for NaN
    if (huge) {
        for (i64 i = 0; i < n; i++) d[i] = __builtin_fabsf(a[i]) > float(kTurnLimit) ? precise(a[i]) : F::of(a[i]);
        return;
    }
    BRIM_INDEPENDENT
    for (i64 i = 0; i < n; i++) d[i] = F::of(a[i]);
}

#define F32(name, Name) {name ".f32", unary<Name, float, float>}
#define F32_2(name, Name) {name ".f32", binary<Name, float, float>}

}  // namespace

const Instruction kMathInstructions[] = {F32("exp", Exp),
                                         F32("log", Log),
                                         F32("tanh", Tanh),
                                         F32("erf", Erf),
                                         F32("exp2", Exp2),
                                         F32("expm1", Expm1),
                                         F32("log2", Log2),
                                         F32("log10", Log10),
                                         F32("log1p", Log1p),
                                         F32("asin", Asin),
                                         F32("acos", Acos),
                                         F32("atan", Atan),
                                         F32("sinh", Sinh),
                                         F32("cosh", Cosh),
                                         F32("asinh", Asinh),
                                         F32("acosh", Acosh),
                                         F32("atanh", Atanh),
                                         {"sin.f32", turning<Sin, sinf>},
                                         {"cos.f32", turning<Cos, cosf>},
                                         {"tan.f32", turning<Tan, tanf>},
                                         F32_2("pow", Pow),
                                         F32_2("hypot", Hypot),
                                         F32_2("atan2", Atan2),
                                         F32_2("logaddexp", LogAddExp),
                                         {nullptr, nullptr}};

}  // namespace brim
