"""conv2d and its gradients on float32 images of either order in memory: native/conv.cpp and conv_weight.cpp, or, where
``brim.conv_precision()`` is "fast" and it takes less time, native/winograd.cpp."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import numpy as np

from brim.spec import Scalar, Spec
from brim_cpu.native import Function, get_threads
from brim_cpu.overlay import NativeKernel, overlay

Pair = tuple[int, int]
Specs = Sequence[Spec | Scalar]

_MAX_WINDOW, _MAX_STRIDE = 32, 8  # kMaxTaps and kMaxStride in native/conv.hpp

_SCRATCH = Function("brim_conv2d_scratch", "ppi")
_CONV = Function("brim_conv2d", "ppppp")
_GRAD_INPUT = Function("brim_conv2d_grad_input", "ppppp")
_WEIGHT_SCRATCH = Function("brim_conv2d_grad_weight_scratch", "pp")
_GRAD_WEIGHT = Function("brim_conv2d_grad_weight", "ppppp")
_WINOGRAD_SCRATCH = Function("brim_winograd_scratch", "ppi")
_WINOGRAD = Function("brim_winograd", "ppppp")
_WINOGRAD_GRAD_INPUT = Function("brim_winograd_grad_input", "ppppp")
_WINOGRAD_GRAD_WEIGHT = Function("brim_winograd_grad_weight", "ppppp")

# What it takes, in multiplications of the fast algorithm's products (measured with AVX-512).
_PER_VALUE = 16  # to transform one number of a tile, forth and back
_PER_FILTER, _PER_FAR_FILTER = 40, 100  # to transform one number of the filters; where the second cache is too small
_SECOND_CACHE_BYTES = 1 << 20
_DIRECT = 1.25  # one multiplication of the exact algorithm
_LEAST_CHANNELS = 16  # of a vector of them


def is_channels_last(spec: Spec) -> bool | None:
    """Whether channels lie side by side in dense images, False for row-major ones; None for any other layout."""
    _, c, h, w = spec.shape
    if spec.contiguous and c > 1:
        return False
    return True if spec.contiguous or spec.strides == (c * h * w, 1, w * c, c) else None


def _suits(kernel: Pair, stride: Pair, *specs: Spec) -> bool:
    """Whether native kernels compute this: dense results of some elements, windows and strides of usual sizes."""
    return (
        all(spec.dtype == np.float32 and spec.size > 0 for spec in specs)
        and max(kernel) <= _MAX_WINDOW
        and max(stride) <= _MAX_STRIDE
    )


class _Geometry:
    """Sizes as native/conv.hpp wants them, of out = conv2d(x, w)."""

    def __init__(
        self, x: Spec, w: Spec, out: Spec, *, stride: Pair, padding: Pair, dilation: Pair, groups: int
    ) -> None:
        sizes = (*x.shape, *out.shape[1:], *w.shape[2:], *stride, *padding, *dilation, groups)
        # An image in another order comes as a row-major copy.
        last = (is_channels_last(x) or False, is_channels_last(out) or False)
        self.array = np.frombuffer(struct.pack("20q", *sizes, *last, get_threads(), 0), np.int64).copy()

    def scratch_bytes(self, function: Function, *more: Any) -> int:
        needed = np.zeros(1, np.int64)
        function.bind(needed, self.array, *more)()
        return int(needed[0])


def _copied(*specs: Spec) -> tuple[bool, ...]:
    return tuple(is_channels_last(spec) is None for spec in specs)


def tile_of(N: int, C: int, outputs: int, H: int, W: int) -> int:
    """The size of Winograd's tiles, 2 or 4, that computes N results of H by W from C channels to `outputs` (or back)
    in least time; 0 where the exact algorithm does: of sizes alone, so that it does not depend on threads.

    Tiles of F by F take (F + 2)^2 products of C * outputs multiplications each, their transforms go with C + outputs,
    those of the filters with C * outputs: docs/convolution.md.
    """
    if min(C, outputs) < _LEAST_CHANNELS:
        return 0
    times: dict[float, int] = {_DIRECT * N * H * W * 9 * C * outputs: 0}
    for F in (4, 2):
        places, tiles = (F + 2) ** 2, N * -(-H // F) * -(-W // F)
        per_filter = _PER_FAR_FILTER if 4 * places * C * outputs > _SECOND_CACHE_BYTES else _PER_FILTER
        times[places * (tiles * (C * outputs + _PER_VALUE * (C + outputs)) + per_filter * C * outputs)] = F
    return times[min(times)]


def _uses_tiles(sizes: _Geometry, fast: bool, images: Spec, w: Spec, how: dict[str, Any]) -> bool:
    """Whether the fast algorithm is wanted, known for these sizes and worth it; its tiles are then in ``sizes``.

    Arguments:
        images: the results; for the gradient of the weight, the gradient of the results.
    """
    if fast and w.shape[2:] == (3, 3) and how["stride"] == how["dilation"] == (1, 1) and how["groups"] == 1:
        sizes.array[-1] = tile_of(images.shape[0], *w.shape[:2], *images.shape[2:])
    return bool(sizes.array[-1])


@overlay("conv2d")
def _conv2d(ins: Specs, outs: Sequence[Spec], *, fast: bool = False, **how: Any) -> NativeKernel | None:
    return _with_filters(ins, outs[0], False, fast, how)


@overlay("conv2d_grad_input")
def _grad_input(ins: Specs, outs: Sequence[Spec], *, size: Pair, fast: bool = False, **how: Any) -> NativeKernel | None:
    return _with_filters(ins, outs[0], True, fast, how)


def _with_filters(ins: Specs, out: Spec, backward: bool, fast: bool, how: dict[str, Any]) -> NativeKernel | None:
    """Images and filters to images; backward: from the gradient of the results to that of the images."""
    images, w = ins
    assert isinstance(images, Spec)
    assert isinstance(w, Spec)
    if not _suits((w.shape[2], w.shape[3]), how["stride"], images, w, out) or is_channels_last(out) is None:
        return None
    sizes = _Geometry(out, w, images, **how) if backward else _Geometry(images, w, out, **how)
    tiled = _uses_tiles(sizes, fast, out, w, how)
    functions = (_GRAD_INPUT, _WINOGRAD_GRAD_INPUT) if backward else (_CONV, _WINOGRAD)
    function = functions[tiled]
    return NativeKernel(
        lambda out, images, w, scratch: [function.bind(out, images, w, scratch, sizes.array)],
        scratch_bytes=sizes.scratch_bytes(_WINOGRAD_SCRATCH if tiled else _SCRATCH, int(backward)),
        contiguous=(*_copied(images), True),
    )


@overlay("conv2d_grad_weight")
def _grad_weight(
    ins: Specs, outs: Sequence[Spec], *, kernel: Pair, fast: bool = False, **how: Any
) -> NativeKernel | None:
    g, x = ins
    (out,) = outs
    assert isinstance(g, Spec)
    assert isinstance(x, Spec)
    if not (_suits(kernel, how["stride"], g, x, out) and out.contiguous):
        return None
    sizes = _Geometry(x, out, g, **how)
    tiled = _uses_tiles(sizes, fast, g, out, how)
    function = _WINOGRAD_GRAD_WEIGHT if tiled else _GRAD_WEIGHT
    return NativeKernel(
        lambda out, g, x, scratch: [function.bind(out, g, x, scratch, sizes.array)],
        scratch_bytes=sizes.scratch_bytes(_WINOGRAD_SCRATCH, 2) if tiled else sizes.scratch_bytes(_WEIGHT_SCRATCH),
        contiguous=_copied(g, x),
    )
