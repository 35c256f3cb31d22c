// Kernels along one axis of an array: running sums, and one class picked of each row.
//
// A line is walked with a stride; lines are counted over (outer, inner) around the axis of a row-major array.

// y[k] = x[0] + ... + x[k] (from the end when reversed); `initial`: y starts with a 0 and is one longer.
template <class T, class I> struct Line {
    const T* x;
    T* y;
    I x_step, y_step;
};
template <class T, class I>
BRIM_FN Line<T, I> line_at(const T* x, T* y, I line, I length, I inner, bool reverse, bool initial) {
    const I outer = line / inner, column = line - outer * inner, longer = length + (initial ? 1 : 0);
    const T* from = x + outer * length * inner + column;
    T* to = y + outer * longer * inner + column;
    if (!reverse) return Line<T, I>{from, to, inner, inner};
    return Line<T, I>{from + (length - 1) * inner, to + (longer - 1) * inner, -inner, -inner};
}

// A thread for each line.
template <class T, class I>
BRIM_FN void running_sums_by_thread(const T* x, T* y, I lines, I length, I inner, bool reverse, bool initial) {
    typedef typename Arithmetic<T>::type A;
    for (I n = (I)(blockIdx.x * blockDim.x + threadIdx.x); n < lines; n += (I)(gridDim.x * blockDim.x)) {
        const Line<T, I> line = line_at(x, y, n, length, inner, reverse, initial);
        A total = A(0);
        if (initial) line.y[0] = cast<T>(total);
        const I first = initial ? 1 : 0;
        for (I k = 0; k < length; ++k) {
            const A value = cast<A>(line.x[k * line.x_step]);
            total = k == 0 ? value : s::add(total, value);
            line.y[(k + first) * line.y_step] = cast<T>(total);
        }
    }
}

// A block for each line: sums within pieces of as many elements as there are threads, and a total carried along.
template <class T, class I>
BRIM_FN void running_sums_by_block(const T* x, T* y, I lines, I length, I inner, bool reverse, bool initial) {
    typedef typename Arithmetic<T>::type A;
    DYN_SHARED(A, sums);
    for (I n = (I)blockIdx.x; n < lines; n += (I)gridDim.x) {
        const Line<T, I> line = line_at(x, y, n, length, inner, reverse, initial);
        A carry = A(0);
        if (initial && threadIdx.x == 0) line.y[0] = cast<T>(carry);
        const I shift = initial ? 1 : 0;
        for (I first = 0; first < length; first += (I)blockDim.x) {
            const I k = first + (I)threadIdx.x;
            sums[threadIdx.x] = k < length ? cast<A>(line.x[k * line.x_step]) : A(0);
            __syncthreads();
            for (unsigned away = 1; away < blockDim.x; away *= 2) {
                A value = sums[threadIdx.x];
                if (threadIdx.x >= away) value = s::add(sums[threadIdx.x - away], value);
                __syncthreads();
                sums[threadIdx.x] = value;
                __syncthreads();
            }
            if (k < length) line.y[(k + shift) * line.y_step] = cast<T>(s::add(carry, sums[threadIdx.x]));
            carry = s::add(carry, sums[blockDim.x - 1]);
            __syncthreads();  // before sums is written again
        }
    }
}

// y[r] = x[r, index[r]], 0 where the index is to be ignored; NaN for a class that does not exist.
template <class T, class Index, class I>
BRIM_FN void pick_classes(const T* x, const Index* index, T* y, I rows, I classes, i64 ignored) {
    for (I r = (I)(blockIdx.x * blockDim.x + threadIdx.x); r < rows; r += (I)(gridDim.x * blockDim.x)) {
        const i64 at = (i64)index[r];
        const bool there = at >= 0 && at < (i64)classes;
        y[r] = at == ignored ? T{} : there ? x[r * classes + (I)at] : missing<T>();
    }
}

// y[r, c] = g[r] where c is index[r], else 0.
template <class T, class Index, class I>
BRIM_FN void put_classes(const T* g, const Index* index, T* y, I n, I classes, i64 ignored) {
    for (I at = (I)(blockIdx.x * blockDim.x + threadIdx.x); at < n; at += (I)(gridDim.x * blockDim.x)) {
        const I row = at / classes, column = at - row * classes;
        const i64 wanted = (i64)index[row];
        y[at] = wanted == (i64)column && wanted != ignored ? g[row] : T{};
    }
}
