// Unrolling windows of images into columns, folding columns back, packing filters: for convolutions as matrix products.
//
// KH x KW: elements of a window, known when this is compiled, so that loops unroll and divisions by them are products.
// win.size and x belong to the images, win.out (L positions) to the windows. Columns are dense, and outside of the image
// 0. Channels first they are (N, C KH KW, L). Channels last they are (N, L, groups, length), and the elements of a group
// of `channels` channels are in the order of the weight, (channels, KH, KW), or by element, (KH, KW, channels), V channels
// at a time; what is left of `length` is 0.

template <class I> struct Packing {
    I groups, channels, length;  // channels and length: of one group
};

BRIM_FN bool inside(const Windows& win, int h, int w) { return h >= 0 && w >= 0 && h < win.size[0] && w < win.size[1]; }

template <class T, class I>
BRIM_FN T inside_or_zero(const T* image, const I* strides, const Windows& win, int h, int w) {
    return inside(win, h, w) ? image[(I)h * strides[2] + (I)w * strides[3]] : T{};
}

// V neighbours, at once where they lie at a multiple of their size.
template <int V, class T> BRIM_FN Pack<T, V> pack_from(const T* from, bool aligned) {
    if (aligned) return *reinterpret_cast<const Pack<T, V>*>(from);
    Pack<T, V> made;
    for (int i = 0; i < V; ++i) made.v[i] = from[i];
    return made;
}

// A thread for each channel and position: neighbours write neighbouring positions.
template <int KH, int KW, class T, class I>
BRIM_FN void unroll_first(
    const T* x, T* columns, I n, const Packing<I>& packing, const Windows& win, const Strides4<I>& strides, int) {
    const I positions = (I)win.out[0] * win.out[1], channels = packing.groups * packing.channels;
    for (I at = (I)(blockIdx.x * blockDim.x + threadIdx.x); at < n; at += (I)(gridDim.x * blockDim.x)) {
        const Place<I> place = place_of(at, channels, win.out);
        const T* image = x + place.n * strides.x[0] + place.c * strides.x[1];
        T* column = columns + at + (place.n * channels + place.c) * (KH * KW - 1) * positions;
        const int h = place.h * win.stride[0] - win.padding[0], w = place.w * win.stride[1] - win.padding[1];
        for (int a = 0; a < KH; ++a)
            for (int b = 0; b < KW; ++b)
                column[(a * KW + b) * positions] =
                    inside_or_zero(image, strides.x, win, h + a * win.dilation[0], w + b * win.dilation[1]);
    }
}

// `lanes` threads for each position, n of all images: neighbours write neighbouring elements of its column.
template <int KH, int KW, class T, class I>
BRIM_FN void unroll_last(
    const T* x, T* columns, I n, const Packing<I>& packing, const Windows& win, const Strides4<I>& strides, int lanes) {
    const int lane = (int)threadIdx.x % lanes, rows = (int)blockDim.x / lanes;
    const I all = packing.groups * packing.length;
    for (I row = (I)(blockIdx.x * rows + threadIdx.x / lanes); row < n; row += (I)(gridDim.x * rows)) {
        const Place<I> place = place_of(row, (I)1, win.out);
        const T* image = x + place.n * strides.x[0];
        T* column = columns + row * all;
        const int h = place.h * win.stride[0] - win.padding[0], w = place.w * win.stride[1] - win.padding[1];
        for (I k = lane; k < all; k += lanes) {
            const I group = packing.groups > 1 ? k / packing.length : I(0), own = k - group * packing.length;
            const I c = own / (KH * KW);
            const int element = (int)(own - c * (KH * KW)), a = element / KW, b = element - a * KW;
            const T* channel = image + (group * packing.channels + c) * strides.x[1];
            column[k] = c < packing.channels ? inside_or_zero(channel, strides.x, win, h + a * win.dilation[0],
                                                              w + b * win.dilation[1])
                                             : T{};
        }
    }
}

// A thread for V channels of each position, n of all: neighbours read and write neighbouring channels.
template <int KH, int KW, int V, class T, class I>
BRIM_FN void unroll_pieces(
    const T* x, T* columns, I n, const Packing<I>& packing, const Windows& win, const Strides4<I>& strides, int) {
    const bool aligned = is_aligned<T, V>(x);
    const I pieces = packing.groups * packing.channels / V;
    for (I at = (I)(blockIdx.x * blockDim.x + threadIdx.x); at < n; at += (I)(gridDim.x * blockDim.x)) {
        const I row = at / pieces, c = (at - row * pieces) * V;
        const Place<I> place = place_of(row, (I)1, win.out);
        const I group = packing.groups > 1 ? c / packing.channels : I(0);
        const T* image = x + place.n * strides.x[0] + c;
        T* column = columns + (row * packing.groups + group) * packing.length + (c - group * packing.channels);
        const int top = place.h * win.stride[0] - win.padding[0], left = place.w * win.stride[1] - win.padding[1];
        for (int a = 0; a < KH; ++a)
            for (int b = 0; b < KW; ++b) {
                const int h = top + a * win.dilation[0], w = left + b * win.dilation[1];
                Pack<T, V> piece{};
                if (inside(win, h, w)) piece = pack_from<V>(image + ((I)h * strides.x[2] + (I)w * strides.x[3]), aligned);
                *reinterpret_cast<Pack<T, V>*>(column + (a * KW + b) * packing.channels) = piece;
            }
    }
}

// A thread for each element of the images (V channels of them) gathers what the windows give it, in the order of the
// windows' elements, so that sums have the same bits every time. LAST: neighbours have neighbouring channels.
template <int KH, int KW, bool LAST, int V, class T, class I>
BRIM_FN void fold(const T* columns, T* x, I n, const Packing<I>& packing, const Windows& win, const Strides4<I>& strides) {
    typedef typename Arithmetic<T>::type A;
    const bool aligned = V > 1 && is_aligned<T, V>(x);
    const I positions = (I)win.out[0] * win.out[1], channels = packing.groups * packing.channels;
    for (I at = (I)(blockIdx.x * blockDim.x + threadIdx.x); at < n; at += (I)(gridDim.x * blockDim.x)) {
        const I pixel = LAST ? at / (channels / V) : at;
        Place<I> place = place_of(pixel, LAST ? (I)1 : channels, win.size);
        if (LAST) place.c = (at - pixel * (channels / V)) * V;
        const I group = packing.groups > 1 ? place.c / packing.channels : I(0), own = place.c - group * packing.channels;
        const T* image = columns + place.n * packing.groups * packing.length * positions +
                         (LAST ? group * packing.length + (V > 1 ? own : own * (KH * KW)) : place.c * (KH * KW) * positions);
        A total[V] = {};
        for (int a = 0; a < KH; ++a) {
            const int above = place.h + win.padding[0] - a * win.dilation[0], h = above / win.stride[0];
            if (above < 0 || h * win.stride[0] != above || h >= win.out[0]) continue;
            for (int b = 0; b < KW; ++b) {
                const int left = place.w + win.padding[1] - b * win.dilation[1], w = left / win.stride[1];
                if (left < 0 || w * win.stride[1] != left || w >= win.out[1]) continue;
                const I position = (I)h * win.out[1] + w;
                const T* given = image + (LAST ? position * packing.groups * packing.length + (a * KW + b) * (V > 1 ? packing.channels : I(1))
                                               : (a * KW + b) * positions + position);
                const Pack<T, V> piece = pack_from<V>(given, V > 1);
                for (int i = 0; i < V; ++i) total[i] = s::add(total[i], cast<A>(piece.v[i]));
            }
        }
        Pack<T, V> made;
        for (int i = 0; i < V; ++i) made.v[i] = cast<T>(total[i]);
        T* to = x + offset4(strides.x, place);
        if (aligned) *reinterpret_cast<Pack<T, V>*>(to) = made;
        else
            for (int i = 0; i < V; ++i) to[i] = made.v[i];
    }
}

// The weight (O, C / groups, KH, KW) in the order of columns: (rows of all groups, length), `channels` of a group each.
// FLIPPED: the channels of the weight's images are the rows (`rows` in a group), and windows are turned by half a turn.
template <int WINDOW, bool BY_ELEMENT, bool FLIPPED, class T, class I>
BRIM_FN void pack_filters(const T* w, T* filters, I n, I rows, const Packing<I>& packing) {
    for (I at = (I)(blockIdx.x * blockDim.x + threadIdx.x); at < n; at += (I)(gridDim.x * blockDim.x)) {
        const I row = at / packing.length, k = at - row * packing.length;
        const I c = BY_ELEMENT ? k % packing.channels : k / WINDOW, element = BY_ELEMENT ? k / packing.channels : k % WINDOW;
        if (k >= packing.channels * WINDOW) {
            filters[at] = T{};
        } else if (FLIPPED) {
            const I group = row / rows;
            filters[at] = w[((group * packing.channels + c) * rows + (row - group * rows)) * WINDOW + (WINDOW - 1 - element)];
        } else {
            filters[at] = w[(row * packing.channels + c) * WINDOW + element];
        }
    }
}

// What is in the order of columns as a weight, converted.
template <int WINDOW, bool BY_ELEMENT, class S, class T, class I>
BRIM_FN void unpack_filters(const S* filters, T* w, I n, I, const Packing<I>& packing) {
    for (I at = (I)(blockIdx.x * blockDim.x + threadIdx.x); at < n; at += (I)(gridDim.x * blockDim.x)) {
        const I row = at / (packing.channels * WINDOW), k = at - row * (packing.channels * WINDOW);
        const I c = k / WINDOW, element = k - c * WINDOW;
        w[at] = cast<T>(filters[row * packing.length + (BY_ELEMENT ? element * packing.channels + c : k)]);
    }
}

// Images of any strides, dense and channels last: squares of 32 pixels and 32 channels go by way of shared memory, so
// that neighbours read neighbouring pixels and write neighbouring channels. n: squares of all images.
template <class T, class I>
BRIM_FN void turn(const T* x, T* turned, I n, I channels, I pixels, I width, const Strides4<I>& strides) {
    DYN_SHARED(T, square);
    const int column = (int)threadIdx.x % 32, first = (int)threadIdx.x / 32, rows = (int)blockDim.x / 32;
    const I across = (channels + 31) / 32, along = (pixels + 31) / 32;
    for (I at = (I)blockIdx.x; at < n; at += (I)gridDim.x) {
        const I row = at / across, c = (at - row * across) * 32, image = row / along, pixel = (row - image * along) * 32;
        const I own = pixel + column, h = own / width, w = own - h * width;
        const T* from = x + image * strides.x[0] + h * strides.x[2] + w * strides.x[3];
        for (int r = first; r < 32; r += rows)
            if (own < pixels && c + r < channels) square[r * 33 + column] = from[(c + r) * strides.x[1]];
        __syncthreads();
        for (int r = first; r < 32; r += rows)
            if (pixel + r < pixels && c + column < channels)
                turned[(image * pixels + pixel + r) * channels + c + column] = square[column * 33 + r];
        __syncthreads();
    }
}
