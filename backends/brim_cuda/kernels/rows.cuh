// Lines of arrays, each reduced or normalised as a whole, and how their elements are dealt out to the threads of a block.
//
// `lanes` threads (a power of two) share a line, and a block takes blockDim.x / lanes lines at a time. The order in which
// a line's elements are combined depends on its length and the number of lanes alone: the same bits every time.

// Where line l starts: l / group * group_step + l % group * line; element j: j / part * part_step + j % part * step.
// group (part) 0: there is only the second term.
template <class I> struct Steps {
    I group, group_step, line, part, part_step, step;
};
template <class I> BRIM_FN I two_steps(I at, I whole, I outer, I inner) {
    if (whole == I(0)) return at * inner;
    const I n = at / whole;
    return n * outer + (at - n * whole) * inner;
}
template <class I> BRIM_FN I line_start(const Steps<I>& s, I line) { return two_steps(line, s.group, s.group_step, s.line); }
template <class I> BRIM_FN I element(const Steps<I>& s, I j) { return two_steps(j, s.part, s.part_step, s.step); }

// This thread's place. across: neighbouring threads have neighbouring lines, else neighbouring elements of a line.
template <class I> struct Dealt {
    int lanes, lines_at_once, lane, own, stride, first_slot;
    BRIM_FN Dealt(int lanes_, bool across) {
        const int thread = (int)threadIdx.x;
        lanes = lanes_;
        lines_at_once = (int)blockDim.x / lanes;
        lane = across ? thread / lines_at_once : thread & (lanes - 1);
        own = across ? thread - lane * lines_at_once : thread / lanes;
        stride = across ? lines_at_once : 1;
        first_slot = across ? own : own * lanes;
    }
    // Combines what the lanes of a line have, in a fixed order; every thread of the block must come here.
    template <class V> BRIM_FN V together(V mine, V* shared) const {
        if (lanes == 1) return mine;
        shared[threadIdx.x] = mine;
        __syncthreads();
        for (int half = lanes / 2; half > 0; half /= 2) {
            if (lane < half) shared[threadIdx.x].join(shared[(int)threadIdx.x + half * stride]);
            __syncthreads();
        }
        const V all = shared[first_slot];
        __syncthreads();  // before `shared` is written again
        return all;
    }
};

// use(j, load(j)) for every step-th j, in order, with four loads under way at a time: results may lie where operands do,
// so the compiler cannot move a load before a store, and one load at a time would leave the memory idle. Of pairs of
// doubles, one at a time: four would not fit in the registers.
template <class I, class Load, class Use>
BRIM_FN void four_at_once(I j, I stop, I step, const Load& load, const Use& use) {
    if constexpr (sizeof(load(j)) <= 8) {
        for (; j + 3 * step < stop; j += 4 * step) {
            const auto a = load(j), b = load(j + step), c = load(j + 2 * step), d = load(j + 3 * step);
            use(j, a);
            use(j + step, b);
            use(j + 2 * step, c);
            use(j + 3 * step, d);
        }
    }
    for (; j < stop; j += step) use(j, load(j));
}

// V elements in one access where all operands allow it.
template <int V, class T> BRIM_FN Pack<T, V> taken(const T* p, bool wide) {
    if (V > 1 && wide) return *(const Pack<T, V>*)p;
    Pack<T, V> found;
#pragma unroll
    for (int k = 0; k < V; ++k) found.v[k] = p[k];
    return found;
}
template <int V, class T> BRIM_FN void put(T* p, const Pack<T, V>& pack, bool wide) {
    if (V > 1 && wide) {
        *(Pack<T, V>*)p = pack;
        return;
    }
#pragma unroll
    for (int k = 0; k < V; ++k) p[k] = pack.v[k];
}

template <class A> struct Two {
    A first, second;
};

template <class A> struct Added {
    A sum;
    BRIM_FN void join(const Added& other) { sum = s::add(sum, other.sum); }
};
template <class A> struct TwoAdded {
    A first, second;
    BRIM_FN void join(const TwoAdded& other) {
        first = s::add(first, other.first);
        second = s::add(second, other.second);
    }
};

template <class A> BRIM_FN A infinity() { return (A)__int_as_float(0x7f800000); }
template <class A> BRIM_FN A not_a_number() { return (A)__int_as_float(0x7fc00000); }
