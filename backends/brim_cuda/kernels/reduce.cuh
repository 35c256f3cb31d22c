// Reductions over any axes. The order of additions depends on the shape alone: no atomics, the same bits every time.
//
// An output's elements are counted 0..count-1 and cut into pieces of `chunk`; piece blockIdx.y goes to
// partial[piece * outputs + output], and a second launch combines the pieces.

// How numbers are combined. `Acc` is what is carried along; A is the dtype of the arithmetic.
template <class A> struct Sum {
    typedef A Acc;
    BRIM_FN static Acc start() { return A(0); }
    template <class X> BRIM_FN static Acc load(X x, i64) { return cast<A>(x); }
    BRIM_FN static Acc combine(Acc a, Acc b) { return s::add(a, b); }
    BRIM_FN static Acc value(Acc a) { return a; }
};
template <class A> struct Prod : Sum<A> {
    BRIM_FN static A start() { return A(1); }
    BRIM_FN static A combine(A a, A b) { return s::mul(a, b); }
};
template <class A> struct Max : Sum<A> {
    BRIM_FN static A start() {
        if constexpr (same<A, bool>) return false;
        else if constexpr (is_float<A>) return -(A)__int_as_float(0x7f800000);
        else return lowest_integer<A>();
    }
    BRIM_FN static A combine(A a, A b) { return s::max(a, b); }
};
template <class A> struct Min : Sum<A> {
    BRIM_FN static A start() {
        if constexpr (same<A, bool>) return true;
        else if constexpr (is_float<A>) return (A)__int_as_float(0x7f800000);
        else return highest_integer<A>();
    }
    BRIM_FN static A combine(A a, A b) { return s::min(a, b); }
};
template <class A> struct Any : Sum<bool> {
    BRIM_FN static bool combine(bool a, bool b) { return a || b; }
};
template <class A> struct All : Sum<bool> {
    BRIM_FN static bool start() { return true; }
    BRIM_FN static bool combine(bool a, bool b) { return a && b; }
};

// Positions of extremes: the first NaN, else the first of the largest (smallest) numbers. at < 0: nothing yet.
template <class A> struct Found {
    A best;
    i64 at;
};
template <class A, bool LARGEST> struct Position {
    typedef Found<A> Acc;
    BRIM_FN static Acc start() { return Acc{A(0), -1}; }
    template <class X> BRIM_FN static Acc load(X x, i64 at) {
        if constexpr (same<X, Acc>) return x;
        else return Acc{cast<A>(x), at};
    }
    BRIM_FN static Acc combine(const Acc& a, const Acc& b) {
        if (a.at < 0) return b;
        if (b.at < 0) return a;
        const bool a_nan = a.best != a.best, b_nan = b.best != b.best;
        if (a_nan != b_nan) return a_nan ? a : b;
        if (a_nan || a.best == b.best) return a.at < b.at ? a : b;
        return (a.best > b.best) == LARGEST ? a : b;
    }
    BRIM_FN static i64 value(const Acc& a) { return a.at; }
};
template <class A> struct ArgMax : Position<A, true> {};
template <class A> struct ArgMin : Position<A, false> {};

template <class To, class From> BRIM_FN To stored(const From& x) {
    if constexpr (same<To, From>) return x;
    else return cast<To>(x);
}

// Offset of element i of a walk, in operand `which`.
template <class I, int O, int D> BRIM_FN I offset_of(const Walk<I, O, D>& walk, I i, int which) {
    I offset = 0;
#pragma unroll
    for (int d = D - 1; d > 0; --d) {
        const I next = i / walk.shape[d];
        offset += (i - next * walk.shape[d]) * walk.stride[which][d];
        i = next;
    }
    return offset + i * walk.stride[which][0];
}

// A block for each output and piece: neighbours in memory are elements of one output.
template <class Op, bool LAST, class X, class Y, class I, int K, int R>
BRIM_FN void reduce_by_block(
    const X* x, Y* y, const Walk<I, 2, K>& kept, const Walk<I, 1, R>& reduced, I outputs, I count, I chunk) {
    typedef typename Op::Acc Acc;
    DYN_SHARED(Acc, shared);
    const I first = (I)blockIdx.y * chunk, stop = count - first < chunk ? count : first + chunk;
    for (I output = blockIdx.x; output < outputs; output += gridDim.x) {
        const X* row = x + offset_of(kept, output, 0);
        Acc own = Op::start();
        for (I i = first + (I)threadIdx.x; i < stop; i += (I)blockDim.x)
            own = Op::combine(own, Op::load(row[offset_of(reduced, i, 0)], (i64)i));
        shared[threadIdx.x] = own;
        __syncthreads();
        for (unsigned half = blockDim.x / 2; half > 0; half /= 2) {
            if (threadIdx.x < half) shared[threadIdx.x] = Op::combine(shared[threadIdx.x], shared[threadIdx.x + half]);
            __syncthreads();
        }
        if (threadIdx.x == 0) {
            if constexpr (LAST) y[offset_of(kept, output, 1)] = stored<Y>(Op::value(shared[0]));
            else y[(I)blockIdx.y * outputs + output] = shared[0];
        }
        __syncthreads();
    }
}

// A thread for each output and piece: neighbours in memory are elements of neighbouring outputs, or there are few.
template <class Op, bool LAST, class X, class Y, class I, int K, int R>
BRIM_FN void reduce_by_thread(
    const X* x, Y* y, const Walk<I, 2, K>& kept, const Walk<I, 1, R>& reduced, I outputs, I count, I chunk) {
    typedef typename Op::Acc Acc;
    const I first = (I)blockIdx.y * chunk, stop = count - first < chunk ? count : first + chunk;
    for (I output = (I)(blockIdx.x * blockDim.x + threadIdx.x); output < outputs; output += (I)(gridDim.x * blockDim.x)) {
        const X* column = x + offset_of(kept, output, 0);
        Acc own = Op::start();
        for (I i = first; i < stop; ++i) own = Op::combine(own, Op::load(column[offset_of(reduced, i, 0)], (i64)i));
        if constexpr (LAST) y[offset_of(kept, output, 1)] = stored<Y>(Op::value(own));
        else y[(I)blockIdx.y * outputs + output] = own;
    }
}
