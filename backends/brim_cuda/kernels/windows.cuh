// Windows that move over images (N, C, H, W) of any strides: for pooling and convolution.

struct Windows {  // height, width
    int size[2], out[2], kernel[2], stride[2], padding[2], dilation[2], inside_only, some_empty;
};

template <class I> struct Place {
    I n, c;
    int h, w;
};
template <class I> BRIM_FN Place<I> place_of(I at, I channels, const int* size) {
    const I row = at / size[1], plane = row / size[0], n = plane / channels;
    return Place<I>{n, plane - n * channels, (int)(row - plane * size[0]), (int)(at - row * size[1])};
}
// The at-th element of images, counted as they lie: channel by channel, or channels first where those lie side by side.
template <class I> BRIM_FN Place<I> place_along(I at, I channels, const int* size, const I* strides) {
    if (strides[1] >= strides[3]) return place_of(at, channels, size);
    const I pixel = at / channels;
    Place<I> place = place_of(pixel, (I)1, size);
    place.c = at - pixel * channels;
    return place;
}
template <class I> BRIM_FN I offset4(const I* strides, const Place<I>& p) {
    return p.n * strides[0] + p.c * strides[1] + p.h * strides[2] + p.w * strides[3];
}
template <class I> struct Strides4 {
    I x[4], y[4], z[4];
};

// The windows whose span along an axis covers an element.
struct Range {
    int first, stop;
};
BRIM_FN Range covering(const Windows& win, int axis, int at) {
    const int last = at + win.padding[axis], before = last - (win.kernel[axis] - 1) * win.dilation[axis];
    const int first = before > 0 ? (before + win.stride[axis] - 1) / win.stride[axis] : 0;
    const int stop = last / win.stride[axis] + 1;
    return Range{first, stop < win.out[axis] ? stop : win.out[axis]};
}
