// Convolutions of small groups of channels (depthwise ones above all), and their gradients, without products.
//
// Images of any strides. A block has `lanes` threads side by side, for V neighbouring channels each where channels lie
// side by side, for neighbouring pixels otherwise; blocks along x take further ones, since only there a grid may be long.
// Every sum is added up in one order, whatever the grid.

BRIM_FN float fused_add(float x, float y, float sum) { return fmaf(x, y, sum); }
BRIM_FN double fused_add(double x, double y, double sum) { return ::fma(x, y, sum); }

template <class I> struct Group {  // channels of one group: of what is read, and of what is written
    I in, out;
};

// Where element e of the filter from channel i of its group to channel d is. BACKWARD: the channels of the weight change
// places; FLIPPED: and its windows are turned by half a turn.
template <int WINDOW, bool BACKWARD, bool FLIPPED, class I> BRIM_FN I filter_at(const Group<I>& group, I d, I i, int e) {
    if (!BACKWARD) return (d * group.in + i) * WINDOW + e;
    const I which = d / group.out;
    return ((which * group.in + i) * group.out + (d - which * group.out)) * WINDOW + (FLIPPED ? WINDOW - 1 - e : e);
}

// V channels of R pixels below each other: what is read for one is there for the next.
template <int KH, int KW, int SH, int DH, int R, int V, class T, class A, class I, class Filter>
BRIM_FN void add_windows(
    A (&total)[R][V], const T* from, const I* strides, const Windows& win, int top, int left, bool aligned,
    const Filter& filter) {
    constexpr int ROWS = (R - 1) * SH + (KH - 1) * DH + 1;
#pragma unroll 1
    for (int b = 0; b < KW; ++b) {
        const int w = left + b * win.dilation[1];
        if (w < 0 || w >= win.size[1]) continue;
        A column[KH][V];
#pragma unroll
        for (int a = 0; a < KH; ++a)
#pragma unroll
            for (int v = 0; v < V; ++v) column[a][v] = filter(a * KW + b, v);
#pragma unroll
        for (int row = 0; row < ROWS; ++row) {
            const int h = top + row;
            if (h < 0 || h >= win.size[0]) continue;
            Pack<T, V> read{};
            bool there = false;
#pragma unroll
            for (int r = 0; r < R; ++r) {
                const int a = row - r * SH;
                if (a < 0 || a % DH != 0 || a / DH >= KH) continue;
                if (!there) read = pack_from<V>(from + ((I)h * strides[2] + (I)w * strides[3]), aligned);
                there = true;
#pragma unroll
                for (int v = 0; v < V; ++v)
                    total[r][v] = fused_add(cast<A>(read.v[v]), column[a / DH][v], total[r][v]);
            }
        }
    }
}

// The same for one pixel of the gradient of windows that move by more than one.
template <int KH, int KW, int V, class T, class A, class I, class Filter>
BRIM_FN void add_covering(
    A (&total)[1][V], const T* from, const I* strides, const Windows& win, int row, int column, bool aligned,
    const Filter& filter) {
#pragma unroll 1
    for (int a = 0; a < KH; ++a) {
        const int above = row + win.padding[0] - a * win.dilation[0], h = above / win.stride[0];
        if (above < 0 || h * win.stride[0] != above || h >= win.out[0]) continue;
#pragma unroll(KW <= 3 ? KW : 1)
        for (int b = 0; b < KW; ++b) {
            const int left = column + win.padding[1] - b * win.dilation[1], w = left / win.stride[1];
            if (left < 0 || w * win.stride[1] != left || w >= win.out[1]) continue;
            const Pack<T, V> read = pack_from<V>(from + ((I)h * strides[2] + (I)w * strides[3]), aligned);
            for (int v = 0; v < V; ++v)
                total[0][v] = fused_add(cast<A>(read.v[v]), filter(a * KW + b, v), total[0][v]);
        }
    }
}

// y = convolution of x, or the gradient of one. MODE 0: forward; 1: the gradient of windows that move by one, which is
// a convolution with flipped ones; 2: any other gradient (SH = DH = R = 1). strides: of x and of y.
//
// LAST: lanes are pieces of V channels; the filters of a block's channels lie in shared memory, one piece beside the
// other; blocks go on to further strips of R pixels. Otherwise lanes are strips of a plane, and blocks go on to planes.
// height, width: of y; strips: of R pixels, in a column of y.
template <int KH, int KW, int SH, int DH, int R, int V, int MODE, bool LAST, class T, class I>
BRIM_FN void grouped(
    const T* x, const T* weight, T* y, I images, I channels, I height, I width, const Group<I>& group,
    const Windows& win, const Strides4<I>& strides, int lanes) {
    typedef typename Arithmetic<T>::type A;
    constexpr int WINDOW = KH * KW;
    DYN_SHARED(A, filters);
    const bool aligned = V > 1 && is_aligned<T, V>(x), writes_aligned = V > 1 && is_aligned<T, V>(y);
    const int lane = (int)threadIdx.x % lanes, slot = (int)threadIdx.x / lanes, slots = (int)blockDim.x / lanes;
    const I strips = (height + R - 1) / R, first = (I)blockIdx.x * lanes * V;
    if (LAST) {
        const int own = lanes * V, all = (int)group.in * WINDOW * own;
        for (int at = (int)threadIdx.x; at < all; at += (int)blockDim.x) {
            const int d = at % own, rest = at / own, i = rest / WINDOW, e = rest % WINDOW;
            if (first + d < channels)
                filters[at] = cast<A>(weight[filter_at<WINDOW, MODE != 0, MODE == 1>(group, first + d, (I)i, e)]);
        }
        __syncthreads();
    }
    const I steps = LAST ? images * strips * width : images * channels;
    const I own = LAST ? first + lane * V : (I)blockIdx.x * lanes + lane;
    if (own >= (LAST ? channels : strips * width)) return;
    for (I at = (I)blockIdx.y * slots + slot; at < steps; at += (I)gridDim.y * slots) {
        const I position = LAST ? at : own, column = position % width, line = position / width;
        const I n = LAST ? line / strips : at / channels, strip = LAST ? line - n * strips : line;
        const I d = LAST ? own : at - n * channels;
        const int top = (int)strip * R, left = (int)column;
        A total[R][V] = {};
        for (I i = 0; i < group.in; ++i) {
            const T* from = x + n * strides.x[0] + (group.in == 1 && group.out == 1 ? d : d / group.out * group.in + i) * strides.x[1];
            const auto filter = [&](int e, int v) -> A {
                if (LAST) return filters[((int)i * WINDOW + e) * (lanes * V) + lane * V + v];
                return cast<A>(weight[filter_at<WINDOW, MODE != 0, MODE == 1>(group, d, i, e)]);
            };
            if constexpr (MODE == 2)
                add_covering<KH, KW, V>(total, from, strides.x, win, top, left, aligned, filter);
            else
                add_windows<KH, KW, SH, DH, R, V>(
                    total, from, strides.x, win, top * SH - win.padding[0], left * win.stride[1] - win.padding[1], aligned,
                    filter);
        }
        for (int r = 0; r < R; ++r) {
            if (top + r >= height) break;
            T* to = y + n * strides.y[0] + d * strides.y[1] + (top + r) * strides.y[2] + column * strides.y[3];
            Pack<T, V> made;
            for (int v = 0; v < V; ++v) made.v[v] = cast<T>(total[r][v]);
            if (writes_aligned) *reinterpret_cast<Pack<T, V>*>(to) = made;
            else
                for (int v = 0; v < V; ++v) to[v * strides.y[1]] = made.v[v];
        }
    }
}

// The gradient of the weight, added up over a piece of the positions of all images: parts (pieces, O, channels of a
// group, WINDOW). AH: rows of a window for each thread, the others are other blocks. A lane has V pairs of an output and
// a channel of its group. group.in: of x; group.out: of g.
template <int KH, int KW, int AH, int V, class T, class A, class I>
BRIM_FN void grouped_weight(
    const T* g, const T* x, A* parts, I pairs, I count, I chunk, const Group<I>& group, const Windows& win,
    const Strides4<I>& strides, int lanes) {
    DYN_SHARED(A, shared);
    const bool aligned = V > 1 && is_aligned<T, V>(x), g_aligned = V > 1 && is_aligned<T, V>(g);
    const int lane = (int)threadIdx.x % lanes, slot = (int)threadIdx.x / lanes, slots = (int)blockDim.x / lanes;
    const I pair = ((I)blockIdx.x * lanes + lane) * V, own = pair < pairs ? pair : I(0);
    const I o = own / group.in, c = o / group.out * group.in + (own - o * group.in);
    const int top_row = (int)blockIdx.z * AH;
    const I begin = (I)blockIdx.y * chunk, stop = begin + chunk < count ? begin + chunk : count;
    A total[AH * KW][V] = {};
    for (I at = begin + slot; pair < pairs && at < stop; at += slots) {
        const Place<I> place = place_of(at, (I)1, win.out);
        const T* given = g + place.n * strides.y[0] + o * strides.y[1] + place.h * strides.y[2] + place.w * strides.y[3];
        const T* image = x + place.n * strides.x[0] + c * strides.x[1];
        const Pack<T, V> gradient = pack_from<V>(given, g_aligned);
        const int h = place.h * win.stride[0] - win.padding[0], w = place.w * win.stride[1] - win.padding[1];
#pragma unroll
        for (int a = 0; a < AH; ++a)
#pragma unroll
            for (int b = 0; b < KW; ++b) {
                const int row = h + (top_row + a) * win.dilation[0], column = w + b * win.dilation[1];
                if (!inside(win, row, column)) continue;
                const Pack<T, V> read = pack_from<V>(image + ((I)row * strides.x[2] + (I)column * strides.x[3]), aligned);
#pragma unroll
                for (int v = 0; v < V; ++v)
                    total[a * KW + b][v] = fused_add(cast<A>(gradient.v[v]), cast<A>(read.v[v]), total[a * KW + b][v]);
            }
    }
#pragma unroll
    for (int e = 0; e < AH * KW; ++e)
#pragma unroll
        for (int v = 0; v < V; ++v) {
            shared[threadIdx.x] = total[e][v];
            __syncthreads();
            for (int half = slots / 2; half > 0; half /= 2) {
                if (slot < half) shared[threadIdx.x] = s::add(shared[threadIdx.x], shared[threadIdx.x + half * lanes]);
                __syncthreads();
            }
            if (slot == 0 && pair < pairs)
                parts[((I)blockIdx.y * pairs + pair + v) * (KH * KW) + top_row * KW + e] = shared[threadIdx.x];
            __syncthreads();
        }
}

// The sum of the pieces: warps of a block take every so many of them, for 32 elements, and add up theirs in one order.
template <class A, class T, class I> BRIM_FN void sum_of_pieces(const A* parts, T* w, I n, I pieces) {
    DYN_SHARED(A, shared);
    const int lane = (int)threadIdx.x % 32, slot = (int)threadIdx.x / 32, slots = (int)blockDim.x / 32;
    for (I first = (I)blockIdx.x * 32; first < n; first += (I)gridDim.x * 32) {
        const I at = first + lane;
        A total = A(0);
        for (I piece = slot; at < n && piece < pieces; piece += slots) total = s::add(total, parts[piece * n + at]);
        shared[threadIdx.x] = total;
        __syncthreads();
        for (int half = slots / 2; half > 0; half /= 2) {
            if (slot < half) shared[threadIdx.x] = s::add(shared[threadIdx.x], shared[threadIdx.x + half * 32]);
            __syncthreads();
        }
        if (slot == 0 && at < n) w[at] = cast<T>(shared[threadIdx.x]);
        __syncthreads();
    }
}
