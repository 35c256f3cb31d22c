// Cross-entropy of rows of scores against one class each: no log-probabilities are stored.

// A row is dealt out in units of V elements. A thread keeps its first HELD units in registers, in which the gradient finds
// them again; the rest of a very long row is read once more, from the caches if few rows are under way.
template <int V, int HELD, class X, class I, class Use>
BRIM_FN void each_of_row(
    const X* row, const Pack<X, V>* held, I count, const Dealt<I>& dealt, bool wide, const Use& use) {
#pragma unroll
    for (int r = 0; r < HELD; ++r) {
        const I j = ((I)dealt.lane + r * (I)dealt.lanes) * V;
        if (j < count) use(j, held[r]);
    }
    four_at_once(
        ((I)dealt.lane + HELD * (I)dealt.lanes) * V, count, (I)dealt.lanes * V,
        [&](I j) { return taken<V>(row + j, wide); }, use);
}

template <class A, int V, class X> BRIM_FN void take_unit(Online<A>& mine, const Pack<X, V>& unit) {
    A values[V], largest = mine.top;
#pragma unroll
    for (int k = 0; k < V; ++k) {
        values[k] = cast<A>(unit.v[k]);
        largest = values[k] > largest ? values[k] : largest;
    }
    if (largest > mine.top) {
        mine.sum = s::mul(mine.sum, s::exp(s::sub(mine.top, largest)));
        mine.top = largest;
    }
#pragma unroll
    for (int k = 0; k < V; ++k)  // equal infinities have no difference
        mine.sum = s::add(mine.sum, values[k] == mine.top ? A(1) : s::exp(s::sub(values[k], mine.top)));
}

// The loss of row r, its largest score and the logarithm of its sum of e^(x - largest). q is 1 at the class, smoothed:
// a share is spread evenly over all classes. A row to ignore has loss 0; a class that does not exist gives NaN.
// GRADIENT: instead of the two, y = g (softmax(x) - q), which may lie where x does; 0 in rows that do not count.
template <bool GRADIENT, int V, int HELD, class X, class Index, class A, class G, class I>
BRIM_FN void cross_entropy_rows(
    const X* x, const Index* index, X* losses, A* top, A* total, const G* g, X* y, I lines, I count, I g_step,
    i64 ignored, A smoothing, int lanes, bool across) {
    DYN_SHARED(Online<A>, shared);
    Added<A>* sums = reinterpret_cast<Added<A>*>(shared);
    const Dealt<I> dealt(lanes, across);
    const bool wide = is_aligned<X, V>(x) && (!GRADIENT || is_aligned<X, V>(y));
    const A share = s::div(smoothing, (A)count);
    for (I tile = (I)blockIdx.x; tile * dealt.lines_at_once < lines; tile += (I)gridDim.x) {
        const I line = tile * dealt.lines_at_once + dealt.own;
        const bool there = line < lines;
        const X* row = x + (there ? line : I(0)) * count;
        const I seen = there ? count : I(0);
        const i64 at = there ? (i64)index[line] : ignored;
        const bool exists = at >= 0 && at < (i64)count;
        const A score = cast<A>(row[exists ? (I)at : I(0)]);  // before any thread writes where it lies
        Pack<X, V> held[HELD];
#pragma unroll
        for (int r = 0; r < HELD; ++r) {
            const I j = ((I)dealt.lane + r * (I)dealt.lanes) * V;
            if (j < seen) held[r] = taken<V>(row + j, wide);
        }
        Online<A> mine = Online<A>::none();
        each_of_row<V, HELD>(row, held, seen, dealt, wide, [&](I, const Pack<X, V>& unit) { take_unit(mine, unit); });
        const Online<A> all = dealt.together(mine, shared);
        const A log_sum = s::log(all.finite_sum());
        Added<A> spread = {A(0)};
        if (smoothing != A(0)) {
            each_of_row<V, HELD>(row, held, seen, dealt, wide, [&](I, const Pack<X, V>& unit) {
#pragma unroll
                for (int k = 0; k < V; ++k)
                    spread.sum = s::add(spread.sum, s::sub(log_sum, s::sub(cast<A>(unit.v[k]), all.top)));
            });
            spread = dealt.together(spread, sums);
        }
        if (!there) continue;
        if (dealt.lane == 0) {
            A loss = exists ? s::sub(log_sum, s::sub(score, all.top)) : not_a_number<A>();
            if (smoothing != A(0))
                loss = s::add(s::mul(loss, s::sub(A(1), smoothing)), s::mul(spread.sum, share));
            losses[line] = cast<X>(at == ignored ? A(0) : loss);
            if constexpr (!GRADIENT) top[line] = all.top, total[line] = log_sum;
        }
        if constexpr (GRADIENT) {
            const bool counts = at != ignored && exists;
            const A given = cast<A>(g[line * g_step]), hit = s::sub(A(1), smoothing);
            each_of_row<V, HELD>(row, held, seen, dealt, wide, [&](I j, const Pack<X, V>& unit) {
                Pack<X, V> made;
#pragma unroll
                for (int k = 0; k < V; ++k) {
                    A found = A(0);
                    if (counts) {
                        found = s::sub(s::exp(s::sub(s::sub(cast<A>(unit.v[k]), all.top), log_sum)), share);
                        found = s::mul(given, (i64)(j + k) == at ? s::sub(found, hit) : found);
                    }
                    made.v[k] = cast<X>(found);
                }
                put<V>(y + line * count + j, made, wide);
            });
        }
    }
}

// y = g (softmax(x) - q); 0 in rows to ignore, and in rows whose class does not exist.
template <class G, class X, class Index, class A, class I>
BRIM_FN void cross_entropy_grad_lines(
    const G* g, const X* x, const Index* index, const A* top, const A* total, X* y, I lines, I count, i64 ignored,
    A smoothing, int lanes, bool across) {
    const Dealt<I> dealt(lanes, across);
    const A hit = s::sub(A(1), smoothing), share = s::div(smoothing, (A)count);
    for (I tile = (I)blockIdx.x; tile * dealt.lines_at_once < lines; tile += (I)gridDim.x) {
        const I line = tile * dealt.lines_at_once + dealt.own;
        if (line >= lines) continue;
        const i64 at = (i64)index[line];
        const bool counts = at != ignored && at >= 0 && at < (i64)count;
        const A given = cast<A>(g[line]), largest = top[line], log_sum = total[line];
        const X* from = x + line * count;
        X* to = y + line * count;
        four_at_once((I)dealt.lane, count, (I)dealt.lanes, [&](I j) { return from[j]; }, [&](I j, X value) {
            A found = A(0);
            if (counts) {
                found = s::sub(s::exp(s::sub(s::sub(cast<A>(value), largest), log_sum)), share);
                found = s::mul(given, (i64)j == at ? s::sub(found, hit) : found);
            }
            to[j] = cast<X>(found);
        });
    }
}
