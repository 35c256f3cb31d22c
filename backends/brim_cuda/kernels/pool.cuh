// Pooling over windows of images (N, C, H, W) of any strides; a thread for each element of the result.

// The largest of each window, and the first position at which it lies; of NaNs the last. -inf at 0: nothing inside.
template <class T, class I>
BRIM_FN void max_pool(const T* x, T* y, int* index, I n, I channels, const Windows& win, const Strides4<I>& strides) {
    for (I at = (I)(blockIdx.x * blockDim.x + threadIdx.x); at < n; at += (I)(gridDim.x * blockDim.x)) {
        const Place<I> place = place_along(at, channels, win.out, strides.y);
        typename Arithmetic<T>::type best = -__int_as_float(0x7f800000);
        int found = -1;
        for (int i = 0; i < win.kernel[0]; ++i)
            for (int j = 0; j < win.kernel[1]; ++j) {
                const int h = place.h * win.stride[0] - win.padding[0] + i * win.dilation[0];
                const int w = place.w * win.stride[1] - win.padding[1] + j * win.dilation[1];
                if (h < 0 || w < 0 || h >= win.size[0] || w >= win.size[1]) continue;
                const auto value = cast<typename Arithmetic<T>::type>(x[offset4(strides.x, Place<I>{place.n, place.c, h, w})]);
                if (value != value || value > best || (found < 0 && value == best))
                    best = value, found = h * win.size[1] + w;
            }
        y[offset4(strides.y, place)] = cast<T>(best);
        index[offset4(strides.z, place)] = found < 0 ? 0 : found;
    }
}

// Elements at the positions that max_pool found. out: the shape of the positions.
template <class T, class I>
BRIM_FN void max_pool_pick(const T* x, const int* index, T* y, I n, I channels, const Windows& win, const Strides4<I>& strides) {
    for (I at = (I)(blockIdx.x * blockDim.x + threadIdx.x); at < n; at += (I)(gridDim.x * blockDim.x)) {
        const Place<I> place = place_along(at, channels, win.out, strides.y);
        const int found = index[offset4(strides.z, place)];
        y[offset4(strides.y, place)] =
            x[offset4(strides.x, Place<I>{place.n, place.c, found / win.size[1], found % win.size[1]})];
    }
}

// To every element what the windows give that found it the largest: gathered, in the order of the windows. A window with
// nothing inside has index 0, wherever it lies: only then need that element ask all of them.
template <class T, class I>
BRIM_FN void max_pool_grad(
    const T* g, const int* index, T* y, I n, I channels, const Windows& win, const Strides4<I>& strides) {
    typedef typename Arithmetic<T>::type A;
    for (I at = (I)(blockIdx.x * blockDim.x + threadIdx.x); at < n; at += (I)(gridDim.x * blockDim.x)) {
        const Place<I> place = place_along(at, channels, win.size, strides.y);
        const int mine = place.h * win.size[1] + place.w;
        const Range rows = mine == 0 && win.some_empty ? Range{0, win.out[0]} : covering(win, 0, place.h);
        const Range columns = mine == 0 && win.some_empty ? Range{0, win.out[1]} : covering(win, 1, place.w);
        A total = A(0);
        for (int h = rows.first; h < rows.stop; ++h)
            for (int w = columns.first; w < columns.stop; ++w) {
                const Place<I> window{place.n, place.c, h, w};
                if (index[offset4(strides.z, window)] == mine)
                    total = s::add(total, cast<A>(g[offset4(strides.x, window)]));
            }
        y[offset4(strides.y, place)] = cast<T>(total);
    }
}

// 1 / (elements of a window that count) along one axis.
BRIM_FN double share(const Windows& win, int axis, int at) {
    if (!win.inside_only) return 1.0 / win.kernel[axis];
    const int start = at * win.stride[axis] - win.padding[axis], stop = start + win.kernel[axis];
    return 1.0 / ((stop < win.size[axis] ? stop : win.size[axis]) - (start > 0 ? start : 0));
}

template <class T, class I>
BRIM_FN void avg_pool(const T* x, T* y, I n, I channels, const Windows& win, const Strides4<I>& strides) {
    typedef typename Arithmetic<T>::type A;
    for (I at = (I)(blockIdx.x * blockDim.x + threadIdx.x); at < n; at += (I)(gridDim.x * blockDim.x)) {
        const Place<I> place = place_along(at, channels, win.out, strides.y);
        A total = A(0);
        for (int i = 0; i < win.kernel[0]; ++i)
            for (int j = 0; j < win.kernel[1]; ++j) {
                const int h = place.h * win.stride[0] - win.padding[0] + i, w = place.w * win.stride[1] - win.padding[1] + j;
                if (h < 0 || w < 0 || h >= win.size[0] || w >= win.size[1]) continue;
                total = s::add(total, cast<A>(x[offset4(strides.x, Place<I>{place.n, place.c, h, w})]));
            }
        total = s::mul(total, (A)share(win, 0, place.h));
        y[offset4(strides.y, place)] = cast<T>(s::mul(total, (A)share(win, 1, place.w)));
    }
}

// What every window that covers an element gives it: gathered, in the order of the windows' elements.
template <class T, class I>
BRIM_FN void avg_pool_grad(const T* g, T* y, I n, I channels, const Windows& win, const Strides4<I>& strides) {
    typedef typename Arithmetic<T>::type A;
    for (I at = (I)(blockIdx.x * blockDim.x + threadIdx.x); at < n; at += (I)(gridDim.x * blockDim.x)) {
        const Place<I> place = place_along(at, channels, win.size, strides.y);
        A total = A(0);
        for (int i = 0; i < win.kernel[0]; ++i)
            for (int j = 0; j < win.kernel[1]; ++j) {
                const int above = place.h + win.padding[0] - i, left = place.w + win.padding[1] - j;
                if (above < 0 || left < 0 || above % win.stride[0] != 0 || left % win.stride[1] != 0) continue;
                const int h = above / win.stride[0], w = left / win.stride[1];
                if (h >= win.out[0] || w >= win.out[1]) continue;
                const A given = cast<A>(g[offset4(strides.x, Place<I>{place.n, place.c, h, w})]);
                total = s::add(total, s::mul(s::mul(given, (A)share(win, 0, h)), (A)share(win, 1, w)));
            }
        y[offset4(strides.y, place)] = cast<T>(total);
    }
}
