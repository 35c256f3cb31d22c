"""Kernels of max_pool2d and avg_pool2d: the window's elements one after another, each over a whole image."""

from __future__ import annotations

from typing import Any

import numpy as np

from brim_cpu.blocks import as_float32, carve, carve_bytes
from brim_cpu.registry import kernel
from brim_cpu.windows import window_slices

Parts = tuple[tuple[tuple[int, ...], Any], ...]


def _max_parts(out_shape: Any) -> Parts:
    return ((out_shape[1:], "bool"), (out_shape[1:], "bool"), (out_shape[2:], "int32"))


@kernel("max_pool2d", scratch=lambda ins, outs, **_: carve_bytes(*_max_parts(outs[0].shape)))
def _max_pool(outs: Any, x: Any, *, scratch: Any, kernel: Any, **how: Any) -> None:
    out, index = outs
    taken, nan, position = carve(scratch, *_max_parts(out.shape))
    height, width = x.shape[2:]
    for n in range(x.shape[0]):
        out[n].fill(-np.inf)
        index[n].fill(-1)  # the first element that a window meets is always taken
        for _, _, into, of in window_slices((height, width), out.shape[2:], kernel, **how):
            seen, best, where = x[n][:, of[0], of[1]], out[n][:, into[0], into[1]], index[n][:, into[0], into[1]]
            better, is_nan = taken[:, into[0], into[1]], nan[:, into[0], into[1]]
            np.greater(seen, best, out=better)
            np.isnan(seen, out=is_nan)
            np.logical_or(better, is_nan, out=better)
            np.less(where, 0, out=is_nan)
            np.logical_or(better, is_nan, out=better)
            np.copyto(best, seen, where=better)
            spot = position[into[0], into[1]]
            for row in range(spot.shape[0]):
                first = (of[0].start + row * of[0].step) * width
                spot[row] = np.arange(first + of[1].start, first + of[1].stop, of[1].step, dtype=np.int32)
            np.copyto(where, spot, where=better)
        np.maximum(index[n], 0, out=index[n])  # a dilated window may step over the whole image


@kernel("max_pool2d_grad", scratch=lambda ins, outs, **_: carve_bytes(*_grad_parts(outs[0])))
def _max_pool_grad(out: Any, g: Any, index: Any, *, size: Any, scratch: Any) -> None:
    (plane,) = carve(scratch, *_grad_parts(out))
    flat = plane.reshape(-1)
    for n in range(out.shape[0]):
        for c in range(out.shape[1]):
            plane.fill(0)
            for row in range(g.shape[2]):
                np.add.at(flat, index[n, c, row], g[n, c, row].astype(flat.dtype, copy=False))
            np.copyto(out[n, c], plane, casting="unsafe")


def _grad_parts(out: Any) -> Parts:
    return ((tuple(out.shape[2:]), as_float32(out.dtype)),)


@kernel("max_pool2d_pick", contiguous=(0,))
def _max_pool_pick(out: Any, x: Any, index: Any, *, scratch: Any = None) -> None:
    for n in range(out.shape[0]):
        for c in range(out.shape[1]):
            flat = x[n, c].reshape(-1)
            for row in range(out.shape[2]):
                out[n, c, row] = flat[index[n, c, row]]


def _factors(size: int, out: int, kernel: int, stride: int, padding: int, inside_only: bool) -> Any:
    """1 / (number of elements that count) of the windows along one axis, float64 of shape (out,)."""
    if not inside_only:
        # An element beyond the padding is outside too, but floor mode never makes such a window.
        return np.full(out, 1.0 / kernel)
    start = np.arange(out) * stride - padding
    return 1.0 / (np.minimum(start + kernel, size) - np.maximum(start, 0))


def _avg_parts(images: Any, windows: Any) -> Parts:
    wide = as_float32(np.dtype(images.dtype))
    return ((tuple(images.shape[1:]), wide), (tuple(windows.shape[1:]), wide))


def _scale(windows: Any, size: Any, kernel: Any, stride: Any, padding: Any, count_include_pad: bool) -> None:
    rows, columns = (
        _factors(size[i], windows.shape[1 + i], kernel[i], stride[i], padding[i], not count_include_pad) for i in (0, 1)
    )
    np.multiply(windows, rows.astype(windows.dtype)[:, None], out=windows)
    np.multiply(windows, columns.astype(windows.dtype), out=windows)


@kernel("avg_pool2d", scratch=lambda ins, outs, **_: carve_bytes(*_avg_parts(ins[0], outs[0])))
def _avg_pool(
    out: Any, x: Any, *, scratch: Any, kernel: Any, stride: Any, padding: Any, count_include_pad: bool
) -> None:
    image, total = carve(scratch, *_avg_parts(x, out))
    size = x.shape[2:]
    for n in range(x.shape[0]):
        np.copyto(image, x[n], casting="unsafe")
        total.fill(0)
        for _, _, into, of in window_slices(size, out.shape[2:], kernel, stride, padding, (1, 1)):
            target = total[:, into[0], into[1]]
            np.add(target, image[:, of[0], of[1]], out=target)
        _scale(total, size, kernel, stride, padding, count_include_pad)
        np.copyto(out[n], total, casting="unsafe")


@kernel("avg_pool2d_grad", scratch=lambda ins, outs, **_: carve_bytes(*_avg_parts(outs[0], ins[0])))
def _avg_pool_grad(
    out: Any, g: Any, *, size: Any, scratch: Any, kernel: Any, stride: Any, padding: Any, count_include_pad: bool
) -> None:
    image, share = carve(scratch, *_avg_parts(out, g))
    for n in range(out.shape[0]):
        np.copyto(share, g[n], casting="unsafe")
        _scale(share, size, kernel, stride, padding, count_include_pad)
        image.fill(0)
        for _, _, of, into in window_slices(size, g.shape[2:], kernel, stride, padding, (1, 1)):
            target = image[:, into[0], into[1]]
            np.add(target, share[:, of[0], of[1]], out=target)
        np.copyto(out[n], image, casting="unsafe")
