// The links of chains (vm_chain.hpp): every function for every kind of operand, printed by templates.
#include "vm_chain.hpp"

namespace brim {
namespace {

typedef float Loose __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));  // aligned to its elements only

constexpr int kLanes = kVectorBytes / int(sizeof(float));

inline Vector all(float value) {  // not {} + value, which loses the sign of -0
    Vector r;
    for (int i = 0; i < kLanes; i++) r[i] = value;
    return r;
}

typedef int Mask __attribute__((vector_size(kVectorBytes)));

enum Kind { kAcc, kMem, kCon };

template <Kind kind>
inline Vector operand(Vector acc, const char* from, i64 at, int which) {
    if constexpr (kind == kAcc) return acc;
    if constexpr (kind == kMem) return *reinterpret_cast<const Loose*>(from + at + which * kVectorBytes);
    return all(*reinterpret_cast<const float*>(from));
}

#define ACCUMULATORS                                                                                                   \
    Vector acc0, Vector acc1, Vector acc2, Vector acc3, Vector acc4, Vector acc5, Vector acc6, Vector acc7,            \
        const Link *link, i64 at
#define NEXT(what)                                                                                                     \
    return link[1].run(what(0), what(1), what(2), what(3), what(4), what(5), what(6), what(7), link + 1, at)

template <class F, Kind A>
void one(ACCUMULATORS) {
#define RESULT(n) F::of(operand<A>(acc##n, link->x, at, n))
    NEXT(RESULT);
#undef RESULT
}

template <class F, Kind A, Kind B>
void two(ACCUMULATORS) {
#define RESULT(n) F::of(operand<A>(acc##n, link->x, at, n), operand<B>(acc##n, link->y, at, n))
    NEXT(RESULT);
#undef RESULT
}

// The accumulator and a product that nothing else reads.
template <class F, bool product_first, Kind A, Kind B>
inline Vector with_product(Vector acc, const Link* link, i64 at, int which) {
    const Vector product = operand<A>(acc, link->x, at, which) * operand<B>(acc, link->y, at, which);
    return product_first ? F::of(product, acc) : F::of(acc, product);
}

template <class F, bool product_first, Kind A, Kind B>
void three(ACCUMULATORS) {
#define RESULT(n) with_product<F, product_first, A, B>(acc##n, link, at, n)
    NEXT(RESULT);
#undef RESULT
}

// The accumulator is what a comparison gave: a mask of each lane's bits.
template <Kind A, Kind B>
void choose(ACCUMULATORS) {
#define RESULT(n) \
    bits_as<Mask>(acc##n) ? operand<A>(acc##n, link->x, at, n) : operand<B>(acc##n, link->y, at, n)
    NEXT(RESULT);
#undef RESULT
}

void store(ACCUMULATORS) {
    char* to = const_cast<char*>(link->x) + at;
#define STORE(n) *reinterpret_cast<Loose*>(to + n * kVectorBytes) = acc##n
    STORE(0), STORE(1), STORE(2), STORE(3), STORE(4), STORE(5), STORE(6), STORE(7);
#undef STORE
#define SAME(n) acc##n
    NEXT(SAME);
}

// Asks for a tile that comes later; addresses past an array's end do no harm. The processor's own prefetching starts
// anew in each page of 4 KiB and for each array, which is too late where several arrays are read at once.
void prefetch(ACCUMULATORS) {
    const char* from = link->x + at;
    for (i64 line = 0; line < kTileBytes; line += 64) __builtin_prefetch(from + line);
    NEXT(SAME);
}

void end(ACCUMULATORS) {
    (void)acc0, (void)acc1, (void)acc2, (void)acc3, (void)acc4, (void)acc5, (void)acc6, (void)acc7, (void)link, (void)at;
}

#define TWO(Name, expression) \
    struct Name {             \
        static Vector of(Vector x, Vector y) { return expression; } \
    };
#define COMPARE(Name, expression) TWO(Name, bits_as<Vector>(expression))
#define ONE(Name, expression) \
    struct Name {             \
        static Vector of(Vector x) { return expression; } \
    };
TWO(Add, x + y)
TWO(Sub, x - y)
TWO(Mul, x* y)
TWO(Div, x / y)
// As vm_float.cpp has them, in the order that the processor's own maximum follows.
TWO(Max, y != y ? y : y > x ? y : x)
TWO(Min, y != y ? y : y < x ? y : x)
COMPARE(Eq, x == y)
COMPARE(Ne, x != y)
COMPARE(Lt, x < y)
COMPARE(Le, x <= y)
COMPARE(Gt, x > y)
COMPARE(Ge, x >= y)
ONE(Neg, -x)
ONE(Square, x* x)

#define LANES(Name, expression)                                 \
    struct Name {                                               \
        static Vector of(Vector v) {                            \
            Vector r;                                           \
            for (int i = 0; i < kLanes; i++) r[i] = expression; \
            return r;                                           \
        }                                                       \
    };
LANES(Abs, __builtin_fabsf(v[i]))
LANES(Sqrt, __builtin_sqrtf(v[i]))

}  // namespace

#define UNARY(name, F) {name ".a", one<F, kAcc>}, {name ".m", one<F, kMem>}
#define BINARY(name, F)                                                                                                \
    {name ".am", two<F, kAcc, kMem>}, {name ".ac", two<F, kAcc, kCon>}, {name ".ma", two<F, kMem, kAcc>},              \
        {name ".ca", two<F, kCon, kAcc>}, {name ".aa", two<F, kAcc, kAcc>}, {name ".mm", two<F, kMem, kMem>},          \
        {name ".mc", two<F, kMem, kCon>}, {name ".cm", two<F, kCon, kMem>}
#define TERNARY(name, F)                                                                                               \
    {name ".amm", three<F, false, kMem, kMem>}, {name ".amc", three<F, false, kMem, kCon>},                            \
        {name ".acm", three<F, false, kCon, kMem>}, {name ".mma", three<F, true, kMem, kMem>},                         \
        {name ".mca", three<F, true, kMem, kCon>}, {name ".cma", three<F, true, kCon, kMem>}

const LinkInstruction kLinkInstructions[] = {{"end", end},
                                             {"store", store},
                                             {"prefetch", prefetch},
                                             BINARY("add", Add),
                                             BINARY("sub", Sub),
                                             BINARY("mul", Mul),
                                             BINARY("div", Div),
                                             BINARY("max", Max),
                                             BINARY("min", Min),
                                             TERNARY("add", Add),
                                             TERNARY("sub", Sub),
                                             UNARY("neg", Neg),
                                             UNARY("abs", Abs),
                                             UNARY("square", Square),
                                             UNARY("sqrt", Sqrt),
                                             BINARY("eq", Eq),
                                             BINARY("ne", Ne),
                                             BINARY("lt", Lt),
                                             BINARY("le", Le),
                                             BINARY("gt", Gt),
                                             BINARY("ge", Ge),
                                             {"where.mm", choose<kMem, kMem>},
                                             {"where.mc", choose<kMem, kCon>},
                                             {"where.cm", choose<kCon, kMem>},
                                             {"where.cc", choose<kCon, kCon>},
                                             {nullptr, nullptr}};

void run_chain(const Link* links, i64 tiles) {
    const Vector none{};
    for (i64 tile = 0; tile < tiles; tile++)
        links->run(none, none, none, none, none, none, none, none, links, tile * kTileBytes);
}

}  // namespace brim
