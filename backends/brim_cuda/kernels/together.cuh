// Reductions of all elements of many arrays to one number. Blocks are numbered through all arrays; each combines a chunk
// of one of them into partial[block], and one block of a last launch combines those. Which elements meet depends on the
// sizes alone, not on where arrays start: no atomics, the same bits every time.

template <class A> struct SquaresSum : Sum<A> {
    template <class X> BRIM_FN static A load(X x, X) {
        const A a = cast<A>(x);
        return s::mul(a, a);
    }
};
template <class A> struct AllFinite : All<A> {
    template <class X> BRIM_FN static bool load(X x, X factor) { return s::isfinite(s::mul(x, factor)); }
};

// The block's numbers combined, in thread 0.
template <class Op> BRIM_FN typename Op::Acc combined_by_block(typename Op::Acc own) {
    DYN_SHARED(typename Op::Acc, shared);
    shared[threadIdx.x] = own;
    __syncthreads();
    for (unsigned half = blockDim.x / 2; half > 0; half /= 2) {
        if (threadIdx.x < half) shared[threadIdx.x] = Op::combine(shared[threadIdx.x], shared[threadIdx.x + half]);
        __syncthreads();
    }
    return shared[0];
}

// `table` has the addresses, sizes and first blocks of PARTS arrays at most; a thread takes STEP elements at once.
template <class Op, class X, int STEP, int PARTS, class T>
BRIM_FN void reduce_together(const T& table, int parts, i64 chunk, X factor, typename Op::Acc* partial) {
    const i32 block = (i32)blockIdx.x;
    int part = 0;  // the last one whose first block is not after this one
#pragma unroll
    for (int half = PARTS / 2; half > 0; half /= 2)
        if (part + half < parts && table.first[part + half] <= block) part += half;
    const X* x = (const X*)table.at[part];
    const i64 first = (i64)(block - table.first[part]) * chunk, size = table.size[part];
    const i64 stop = size - first < chunk ? size : first + chunk;
    const bool aligned = is_aligned<X, STEP>(x);
    typename Op::Acc own[STEP];
#pragma unroll
    for (int k = 0; k < STEP; ++k) own[k] = Op::start();
    for (i64 i = first + (i64)threadIdx.x * STEP; i < stop; i += (i64)blockDim.x * STEP) {
        if (aligned && i + STEP <= stop) {
            const auto a = *(const Pack<X, STEP>*)(x + i);
#pragma unroll
            for (int k = 0; k < STEP; ++k) own[k] = Op::combine(own[k], Op::load(a.v[k], factor));
        } else {
#pragma unroll
            for (int k = 0; k < STEP; ++k)
                if (i + k < stop) own[k] = Op::combine(own[k], Op::load(x[i + k], factor));
        }
    }
#pragma unroll
    for (int half = STEP / 2; half > 0; half /= 2)
#pragma unroll
        for (int k = 0; k < half; ++k) own[k] = Op::combine(own[k], own[k + half]);
    const typename Op::Acc all = combined_by_block<Op>(own[0]);
    if (threadIdx.x == 0) partial[block] = all;
}

template <class Op, class Y> BRIM_FN void reduce_partial(const typename Op::Acc* partial, i32 count, Y* y) {
    typename Op::Acc own = Op::start();
    for (i32 i = (i32)threadIdx.x; i < count; i += (i32)blockDim.x) own = Op::combine(own, partial[i]);
    const typename Op::Acc all = combined_by_block<Op>(own);
    if (threadIdx.x == 0) y[0] = cast<Y>(all);
}
