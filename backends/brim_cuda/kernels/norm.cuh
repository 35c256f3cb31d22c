// Layer norm and batch norm, forward and gradients: moments of a line, then every element of it normalised.
//
// A line is what shares a mean: the last axes of one element of the batch (layer norm), or one channel (batch norm).
// Long lines that are few are cut into `pieces` of `chunk` elements (blockIdx.y), each with moments or sums of its own in
// scratch, [2][pieces][lines]; the launch that uses them combines them. Statistics are in float32 for half-width floats;
// squares are taken of deviations from the mean.
//
// Where elements come from and where results go is printed (`norm_c.py`): `first(line, j)` computes and stores what comes
// before the norm and gives the V elements from j on; `again` gives them once more; `last(line, j, values)` computes what
// follows and stores it. A thread holds its elements in registers (HELD units of V) where a line is short enough, so that
// it is read once; else it is read again, which caches answer.

template <class A, int V> struct Values {
    A v[V];
};
template <class A, int V> struct Pairs {
    A g[V], x[V];
};

// A weight is an array or a number.
template <class A, class T, class I> BRIM_FN A number_at(const T* p, I at) { return cast<A>(p[at]); }
template <class A, class I> BRIM_FN A number_at(A number, I) { return number; }
// The weights of V elements: BY_LINE: that of their line, V times.
template <bool BY_LINE, class A, int V, class T, class I>
BRIM_FN Values<A, V> weights(const T* p, I line, I j, bool wide) {
    Values<A, V> found;
    if constexpr (BY_LINE) {
        const A one = cast<A>(p[line]);
#pragma unroll
        for (int k = 0; k < V; ++k) found.v[k] = one;
    } else {
        const Pack<T, V> pack = taken<V>(p + j, wide);
#pragma unroll
        for (int k = 0; k < V; ++k) found.v[k] = cast<A>(pack.v[k]);
    }
    return found;
}
template <bool BY_LINE, class A, int V, class I> BRIM_FN Values<A, V> weights(A number, I, I, bool) {
    Values<A, V> found;
#pragma unroll
    for (int k = 0; k < V; ++k) found.v[k] = number;
    return found;
}

// use(j, elements) for every unit of this thread: what it holds, or else load(j).
template <int V, int HELD, class I, class Held, class Load, class Use>
BRIM_FN void every(I begin, I stop, const Dealt<I>& dealt, const Held* held, const Load& load, const Use& use) {
    if constexpr (HELD > 0) {
#pragma unroll
        for (int r = 0; r < HELD; ++r) {
            const I j = begin + ((I)dealt.lane + r * (I)dealt.lanes) * V;
            if (j < stop) use(j, held[r]);
        }
    } else {
        four_at_once(begin + (I)dealt.lane * V, stop, (I)dealt.lanes * V, load, use);
    }
}
template <int V, int HELD, class I, class Held, class Load>
BRIM_FN void hold(I begin, I stop, const Dealt<I>& dealt, Held* held, const Load& load) {
#pragma unroll
    for (int r = 0; r < HELD; ++r) {
        const I j = begin + ((I)dealt.lane + r * (I)dealt.lanes) * V;
        if (j < stop) held[r] = load(j);
    }
}

// Source of the rule that joins: T. F. Chan, G. H. Golub and R. J. LeVeque, "Updating formulae and a pairwise algorithm
// for computing sample variances", Stanford CS report 773 (1979).
template <class A> struct Moments {
    A n, mean, squares;  // squares: the sum of squared deviations from the mean
    BRIM_FN void join(const Moments& other) {
        if (other.n == A(0)) return;
        if (n == A(0)) {
            *this = other;
            return;
        }
        const A all = s::add(n, other.n), away = s::sub(other.mean, mean), share = s::div(other.n, all);
        mean = s::add(mean, s::mul(away, share));
        squares = s::add(s::add(squares, other.squares), s::mul(s::mul(away, away), s::mul(n, share)));
        n = all;
    }
};

template <int V, int HELD, class A, class I, class First, class Again>
BRIM_FN Moments<A> moments_of(
    const First& first, const Again& again, Values<A, V>* held, I begin, I stop, const Dealt<I>& dealt, Added<A>* shared) {
    Added<A> mine = {A(0)};
    const auto add = [&](I, const Values<A, V>& unit) {
#pragma unroll
        for (int k = 0; k < V; ++k) mine.sum = s::add(mine.sum, unit.v[k]);
    };
    hold<V, HELD>(begin, stop, dealt, held, first);
    every<V, HELD>(begin, stop, dealt, held, first, add);
    const A n = (A)(stop > begin ? stop - begin : I(0));
    const A total = dealt.together(mine, shared).sum, mean = n > A(0) ? s::div(total, n) : A(0);
    mine.sum = A(0);
    every<V, HELD>(begin, stop, dealt, held, again, [&](I, const Values<A, V>& unit) {
#pragma unroll
        for (int k = 0; k < V; ++k) mine.sum = s::add(mine.sum, s::square(s::sub(unit.v[k], mean)));
    });
    return Moments<A>{n, mean, dealt.together(mine, shared).sum};
}

// (x - mean) rstd weight + bias of elements begin..stop-1. BY_LINE: a weight for each line, else for each element.
template <bool BY_LINE, int V, int HELD, class W, class B, class A, class I, class Again, class Last>
BRIM_FN void normalise(
    const Again& again, const Last& last, const Values<A, V>* held, W weight, B bias, I line, I begin, I stop, A mean,
    A var, A eps, const Dealt<I>& dealt, bool wide) {
    const A rstd = s::rsqrt(s::add(var, eps));
    every<V, HELD>(begin, stop, dealt, held, again, [&](I j, const Values<A, V>& unit) {
        const Values<A, V> w = weights<BY_LINE, A, V>(weight, line, j, wide);
        const Values<A, V> b = weights<BY_LINE, A, V>(bias, line, j, wide);
        Values<A, V> made;
#pragma unroll
        for (int k = 0; k < V; ++k)
            made.v[k] = s::add(s::mul(s::mul(s::sub(unit.v[k], mean), rstd), w.v[k]), b.v[k]);
        last(line, j, made);
    });
}

template <bool BY_LINE, int V, int HELD, class W, class B, class A, class I, class First, class Again, class Last>
BRIM_FN void norm_lines(
    const First& first, const Again& again, const Last& last, W weight, B bias, A* mean, A* var, I lines, I count, A eps,
    int lanes, bool across, bool wide) {
    DYN_SHARED(Added<A>, shared);
    const Dealt<I> dealt(lanes, across);
    for (I tile = (I)blockIdx.x; tile * dealt.lines_at_once < lines; tile += (I)gridDim.x) {
        const I line = tile * dealt.lines_at_once + dealt.own;
        const bool there = line < lines;
        const I stop = there ? count : I(0);
        Values<A, V> held[HELD > 0 ? HELD : 1];
        const auto second = [&](I j) { return again(line, j); };
        const Moments<A> all = moments_of<V, HELD>(
            [&](I j) { return first(line, j); }, second, held, I(0), stop, dealt, shared);
        const A spread = s::div(all.squares, all.n);
        if (!there) continue;
        if (dealt.lane == 0) mean[line] = all.mean, var[line] = spread;
        normalise<BY_LINE, V, HELD>(
            second, last, held, weight, bias, line, I(0), stop, all.mean, spread, eps, dealt, wide);
    }
}

template <class I> BRIM_FN I end_of_piece(I first, I chunk, I count) {
    return count - first < chunk ? count : first + chunk;
}

template <int V, class A, class I, class First, class Again>
BRIM_FN void norm_pieces(
    const First& first, const Again& again, A* parts, I lines, I count, I chunk, I pieces, int lanes, bool across) {
    DYN_SHARED(Added<A>, shared);
    const Dealt<I> dealt(lanes, across);
    const I piece = (I)blockIdx.y, begin = piece * chunk;
    for (I tile = (I)blockIdx.x; tile * dealt.lines_at_once < lines; tile += (I)gridDim.x) {
        const I line = tile * dealt.lines_at_once + dealt.own;
        const bool there = line < lines;
        const I stop = there ? end_of_piece(begin, chunk, count) : I(0);
        Values<A, V> held[1];
        const Moments<A> own = moments_of<V, 0>(
            [&](I j) { return first(line, j); }, [&](I j) { return again(line, j); }, held, begin, stop, dealt, shared);
        if (!there || dealt.lane != 0) continue;
        parts[piece * lines + line] = own.mean;
        parts[(pieces + piece) * lines + line] = own.squares;
    }
}

template <int V, class W, class B, class A, class I, class Again, class Last>
BRIM_FN void norm_from_pieces(
    const Again& again, const Last& last, W weight, B bias, const A* parts, A* mean, A* var, I lines, I count, A eps,
    I chunk, I pieces, int lanes, bool across, bool wide) {
    DYN_SHARED(Moments<A>, shared);
    const Dealt<I> dealt(lanes, across);
    const I begin = (I)blockIdx.y * chunk;
    for (I tile = (I)blockIdx.x; tile * dealt.lines_at_once < lines; tile += (I)gridDim.x) {
        const I line = tile * dealt.lines_at_once + dealt.own;
        const bool there = line < lines;
        Moments<A> mine = {A(0), A(0), A(0)};
        for (I p = (I)dealt.lane; p < (there ? pieces : I(0)); p += (I)dealt.lanes) {
            const A n = (A)(end_of_piece(p * chunk, chunk, count) - p * chunk);
            mine.join(Moments<A>{n, parts[p * lines + line], parts[(pieces + p) * lines + line]});
        }
        const Moments<A> all = dealt.together(mine, shared);
        const A spread = s::div(all.squares, all.n);
        if (!there) continue;
        if (blockIdx.y == 0 && dealt.lane == 0) mean[line] = all.mean, var[line] = spread;
        const Values<A, V>* none = nullptr;
        normalise<true, V, 0>(
            [&](I j) { return again(line, j); }, last, none, weight, bias, line, begin, end_of_piece(begin, chunk, count),
            all.mean, spread, eps, dealt, wide);
    }
}

// --------------------------------------------------------------------------------------------------------- gradients

// The sums over a line that its gradient needs: of g and of g * normal; WEIGHTED: with g * weight in the place of g.
template <bool WEIGHTED, int V, int HELD, class A, class W, class I, class Load>
BRIM_FN TwoAdded<A> sums_of(
    const Load& load, Pairs<A, V>* held, W weight, I begin, I stop, A mean, A rstd, const Dealt<I>& dealt,
    TwoAdded<A>* shared, bool wide) {
    TwoAdded<A> mine = {A(0), A(0)};
    hold<V, HELD>(begin, stop, dealt, held, load);
    every<V, HELD>(begin, stop, dealt, held, load, [&](I j, const Pairs<A, V>& unit) {
        Values<A, V> w;
        if constexpr (WEIGHTED) w = weights<false, A, V>(weight, I(0), j, wide);
#pragma unroll
        for (int k = 0; k < V; ++k) {
            const A given = WEIGHTED ? s::mul(unit.g[k], w.v[k]) : unit.g[k];
            mine.join(TwoAdded<A>{given, s::mul(given, s::mul(s::sub(unit.x[k], mean), rstd))});
        }
    });
    return dealt.together(mine, shared);
}

// (scaled - mean(scaled) - normal mean(scaled normal)) rstd, with scaled = g weight; `sums` are of g if BY_LINE, else of
// scaled; share = 1 / count.
template <bool BY_LINE, int V, int HELD, class W, class A, class I, class Load, class Last>
BRIM_FN void gradients_from(
    const Load& load, const Last& last, const Pairs<A, V>* held, W weight, I line, I begin, I stop,
    const TwoAdded<A>& sums, A mean, A rstd, A share, const Dealt<I>& dealt, bool wide) {
    A factor = share;
    if constexpr (BY_LINE) factor = s::mul(share, number_at<A>(weight, line));
    const A level = s::mul(sums.first, factor), slope = s::mul(sums.second, factor);
    every<V, HELD>(begin, stop, dealt, held, load, [&](I j, const Pairs<A, V>& unit) {
        const Values<A, V> w = weights<BY_LINE, A, V>(weight, line, j, wide);
        Values<A, V> made;
#pragma unroll
        for (int k = 0; k < V; ++k) {
            const A normal = s::mul(s::sub(unit.x[k], mean), rstd), scaled = s::mul(unit.g[k], w.v[k]);
            made.v[k] = s::mul(s::sub(scaled, s::add(level, s::mul(normal, slope))), rstd);
        }
        last(line, j, made);
    });
}

template <int V, int HELD, class W, class A, class I, class First, class Again, class Last>
BRIM_FN void layer_norm_grad_lines(
    const First& first, const Again& again, const Last& last, W weight, const A* mean, const A* var, I lines, I count,
    A eps, A share, int lanes, bool across, bool wide) {
    DYN_SHARED(TwoAdded<A>, shared);
    const Dealt<I> dealt(lanes, across);
    for (I tile = (I)blockIdx.x; tile * dealt.lines_at_once < lines; tile += (I)gridDim.x) {
        const I line = tile * dealt.lines_at_once + dealt.own;
        const bool there = line < lines;
        const I stop = there ? count : I(0);
        const A centre = there ? mean[line] : A(0), rstd = s::rsqrt(s::add(there ? var[line] : A(1), eps));
        Pairs<A, V> held[HELD > 0 ? HELD : 1];
        const TwoAdded<A> sums = sums_of<true, V, HELD>(
            [&](I j) { return first(line, j); }, held, weight, I(0), stop, centre, rstd, dealt, shared, wide);
        gradients_from<false, V, HELD>(
            [&](I j) { return again(line, j); }, last, held, weight, line, I(0), stop, sums, centre, rstd, share, dealt,
            wide);
    }
}

// Gradients of weight (`second`) and bias (`first`) of layer norm: the results, or parts of them where there are several
// pieces. A line is a column of the batch's matrix; mean and var are of its rows, and so is what `again` counts as lines.
template <class A, class F, class S, class I, class Again>
BRIM_FN void layer_norm_grad_columns(
    const Again& again, const A* mean, const A* var, S* second, F* first, I lines, I count, A eps, I chunk, int lanes,
    bool across) {
    DYN_SHARED(TwoAdded<A>, shared);
    const Dealt<I> dealt(lanes, across);
    const I piece = (I)blockIdx.y, from = piece * chunk;
    for (I tile = (I)blockIdx.x; tile * dealt.lines_at_once < lines; tile += (I)gridDim.x) {
        const I line = tile * dealt.lines_at_once + dealt.own;
        const bool there = line < lines;
        const I stop = there ? end_of_piece(from, chunk, count) : I(0);
        TwoAdded<A> mine = {A(0), A(0)};
        const auto both = [&](I j) { return again(j, line); };
        four_at_once(from + (I)dealt.lane, stop, (I)dealt.lanes, both, [&](I j, const Pairs<A, 1>& two) {
            const A normal = s::mul(s::sub(two.x[0], mean[j]), s::rsqrt(s::add(var[j], eps)));
            mine.join(TwoAdded<A>{two.g[0], s::mul(two.g[0], normal)});
        });
        const TwoAdded<A> sums = dealt.together(mine, shared);
        if (!there || dealt.lane != 0) continue;
        first[piece * lines + line] = cast<F>(sums.first);
        second[piece * lines + line] = cast<S>(sums.second);
    }
}

// The sums of `count` pieces, [2][count][lines].
template <class A, class I>
BRIM_FN TwoAdded<A> joined(const A* parts, I lines, I line, I pieces, const Dealt<I>& dealt, TwoAdded<A>* shared) {
    TwoAdded<A> mine = {A(0), A(0)};
    for (I p = (I)dealt.lane; p < pieces; p += (I)dealt.lanes)
        mine.join(TwoAdded<A>{parts[p * lines + line], parts[(pieces + p) * lines + line]});
    return dealt.together(mine, shared);
}

template <class A, class F, class S, class I>
BRIM_FN void norm_grad_join(const A* parts, S* second, F* first, I lines, I count, int lanes, bool across) {
    DYN_SHARED(TwoAdded<A>, shared);
    const Dealt<I> dealt(lanes, across);
    for (I tile = (I)blockIdx.x; tile * dealt.lines_at_once < lines; tile += (I)gridDim.x) {
        const I line = tile * dealt.lines_at_once + dealt.own;
        const TwoAdded<A> sums = joined(parts, lines, line, line < lines ? count : I(0), dealt, shared);
        if (line >= lines || dealt.lane != 0) continue;
        first[line] = cast<F>(sums.first);
        second[line] = cast<S>(sums.second);
    }
}

template <int V, int HELD, class W, class A, class F, class S, class I, class First, class Again, class Last>
BRIM_FN void batch_norm_grad_lines(
    const First& first_time, const Again& again, const Last& last, W weight, const A* mean, const A* var, S* second,
    F* first, I lines, I count, A eps, A share, int lanes, bool across, bool wide) {
    DYN_SHARED(TwoAdded<A>, shared);
    const Dealt<I> dealt(lanes, across);
    for (I tile = (I)blockIdx.x; tile * dealt.lines_at_once < lines; tile += (I)gridDim.x) {
        const I line = tile * dealt.lines_at_once + dealt.own;
        const bool there = line < lines;
        const I own = there ? line : I(0), stop = there ? count : I(0);
        const A centre = mean[own], rstd = s::rsqrt(s::add(var[own], eps));
        Pairs<A, V> held[HELD > 0 ? HELD : 1];
        const TwoAdded<A> sums = sums_of<false, V, HELD>(
            [&](I j) { return first_time(own, j); }, held, weight, I(0), stop, centre, rstd, dealt, shared, wide);
        gradients_from<true, V, HELD>(
            [&](I j) { return again(own, j); }, last, held, weight, own, I(0), stop, sums, centre, rstd, share, dealt,
            wide);
        if (!there || dealt.lane != 0) continue;
        first[line] = cast<F>(sums.first);
        second[line] = cast<S>(sums.second);
    }
}

template <int V, class A, class I, class First>
BRIM_FN void batch_norm_grad_pieces(
    const First& first_time, const A* mean, const A* var, A* parts, I lines, I count, A eps, I chunk, I pieces,
    int lanes, bool across) {
    DYN_SHARED(TwoAdded<A>, shared);
    const Dealt<I> dealt(lanes, across);
    const I piece = (I)blockIdx.y, begin = piece * chunk;
    for (I tile = (I)blockIdx.x; tile * dealt.lines_at_once < lines; tile += (I)gridDim.x) {
        const I line = tile * dealt.lines_at_once + dealt.own;
        const bool there = line < lines;
        const I own = there ? line : I(0), stop = there ? end_of_piece(begin, chunk, count) : I(0);
        Pairs<A, V> held[1];
        const TwoAdded<A> sums = sums_of<false, V, 0>(
            [&](I j) { return first_time(own, j); }, held, A(1), begin, stop, mean[own],
            s::rsqrt(s::add(var[own], eps)), dealt, shared, false);
        if (!there || dealt.lane != 0) continue;
        parts[piece * lines + line] = sums.first;
        parts[(pieces + piece) * lines + line] = sums.second;
    }
}

template <int V, class W, class A, class F, class S, class I, class Again, class Last>
BRIM_FN void batch_norm_grad_from_pieces(
    const Again& again, const Last& last, W weight, const A* mean, const A* var, const A* parts, S* second, F* first,
    I lines, I count, A eps, A share, I chunk, I pieces, int lanes, bool across, bool wide) {
    DYN_SHARED(TwoAdded<A>, shared);
    const Dealt<I> dealt(lanes, across);
    const I begin = (I)blockIdx.y * chunk;
    for (I tile = (I)blockIdx.x; tile * dealt.lines_at_once < lines; tile += (I)gridDim.x) {
        const I line = tile * dealt.lines_at_once + dealt.own;
        const bool there = line < lines;
        const I own = there ? line : I(0);
        const TwoAdded<A> sums = joined(parts, lines, own, there ? pieces : I(0), dealt, shared);
        if (!there) continue;
        const Pairs<A, V>* none = nullptr;
        gradients_from<true, V, 0>(
            [&](I j) { return again(own, j); }, last, none, weight, own, begin, end_of_piece(begin, chunk, count), sums,
            mean[own], s::rsqrt(s::add(var[own], eps)), share, dealt, wide);
        if (blockIdx.y != 0 || dealt.lane != 0) continue;
        first[line] = cast<F>(sums.first);
        second[line] = cast<S>(sums.second);
    }
}
