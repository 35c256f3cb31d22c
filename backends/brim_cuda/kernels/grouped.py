"""Convolutions of small groups of channels, and their gradients: own kernels that read each pixel about once.

A depthwise convolution does a few multiplications for each byte: the memory is its limit, and products over unrolled
windows would move each pixel once for each element of the window.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from brim.spec import DTYPES, Spec
from brim_cuda.cuda_c import arithmetic
from brim_cuda.gemm_conv import PIECE_BYTES
from brim_cuda.kernels.pool import WINDOWS, Pair
from brim_cuda.launch import (
    BLOCK,
    C_TYPES,
    Call,
    In,
    Out,
    Param,
    Scratch,
    blocks_for,
    index_dtype,
    named_kernel,
    pointer,
)
from brim_cuda.registry import Work

__all__ = ["by_groups", "is_small"]

_INCLUDES = ("scalar.cuh", "shared.cuh", "windows.cuh", "columns.cuh", "grouped.cuh")
_INT = DTYPES["int32"]
_MOST_PRODUCTS = 64
"""Channels in times channels out of a group, up to which there is less to multiply than to read."""
_MOST_WINDOW = 64
"""Elements of a window."""
_SHARED_BYTES = 32 << 10
_STRIP = 4
"""Pixels below each other that a thread makes at once."""
_MOST_ROWS = 8
"""Rows that the windows of such pixels may span, for the registers."""
_LANES = 64
"""Pieces of channels side by side in a block, at most."""
_BUSY_BLOCKS = 2048
"""Blocks of a launch, about: some rounds of those that a large GPU runs at once."""
_SUMS = 36
"""Sums that a thread of the weight's gradient keeps in registers."""
_LEAST_POSITIONS = 16
"""Positions that such a thread adds up at least."""
_MAX_PIECES = 512
_WARP = 32


def is_small(w: Spec, groups: int) -> bool:
    """Whether a convolution with this weight (O, C/groups, kH, kW) is made here."""
    products = w.shape[1] * (w.shape[0] // groups)
    return groups > 1 and 0 < products <= _MOST_PRODUCTS and 0 < math.prod(w.shape[2:]) <= _MOST_WINDOW


def _power_of_two(at_least: int) -> int:
    return 1 << max(0, at_least - 1).bit_length()


def _across(spec: Spec) -> bool:
    """Whether channels lie closer together than pixels."""
    return spec.shape[1] > 1 and abs(spec.strides[1]) < abs(spec.strides[3] or spec.strides[2] or 1 << 62)


def _piece(channels: int, depthwise: bool, images: Sequence[Spec], most: int = 4) -> int:
    """Channels that a thread takes: as many as are read at once, up to four."""
    pieces = min(most, PIECE_BYTES // images[0].dtype.itemsize)
    for spec in images:
        n, c, h, w = spec.strides
        if c != 1 or any(step % pieces for step in (n, h, w)):
            return 1
    return pieces if depthwise and channels % pieces == 0 else 1


class _Operands:
    """Parameters and arguments that the kernels have in common.

    Arguments:
        read, other: the images whose strides are x and y.
        group: channels of a group that are read, and that are made.
    """

    def __init__(self, read: Spec, other: Spec, w: Spec, group: Pair, windows: np.ndarray[Any, Any]) -> None:
        self.index = index_dtype([read, other, w])
        ctype = C_TYPES[self.index]
        strides_dtype = np.dtype([(axis, self.index, (4,)) for axis in "xyz"])
        strides = np.zeros((), strides_dtype)
        strides["x"], strides["y"] = read.strides, other.strides
        group_dtype = np.dtype([(name, self.index) for name in ("in", "out")])
        self.rest: list[tuple[Param, Any]] = [
            (Param("group", group_dtype, ctype=f"Group<{ctype}>"), np.array(group, group_dtype)),
            (Param("windows", WINDOWS, ctype="Windows"), windows),
            (Param("strides", strides_dtype, ctype=f"Strides4<{ctype}>"), strides),
        ]

    def numbers(self, **named: int) -> list[tuple[Param, Any]]:
        return [(Param(name, self.index), self.index.type(value)) for name, value in named.items()]

    def lanes(self, lanes: int) -> tuple[Param, Any]:
        return Param("lanes", _INT), lanes


def _call(
    function: str, template: Sequence[Any], operands: list[tuple[Param, Any]], blocks: tuple[int, ...], shared: int = 0
) -> Call:
    params = [param for param, _ in operands]
    chosen = ", ".join(str(value).lower() for value in template)
    text = f"""extern "C" __global__ void __launch_bounds__({BLOCK}, 2) NAME(PARAMS) {{
    {function}{f"<{chosen}>" if chosen else ""}({", ".join(param.name for param in params)});
}}
"""
    kernel = named_kernel(function, params, text, _INCLUDES)
    return Call(kernel, blocks, tuple(argument for _, argument in operands), shared_bytes=shared)


def by_groups(
    name: str, ins: Sequence[Any], out: Spec, stride: Pair, padding: Pair, dilation: Pair, groups: int
) -> Work:
    """A convolution or one of its gradients, without products; the weight must be row-major, images may lie anyhow."""
    if out.size == 0:
        return Work([])
    if name == "conv2d_grad_weight":
        return _gradient_of_weight(ins[0], ins[1], out, stride, padding, dilation, groups)
    source, w = ins
    w = Spec(w.shape, w.dtype)
    inner, outer = w.shape[1], w.shape[0] // groups
    kernel: Pair = w.shape[2:]  # type: ignore[assignment]
    mode = 0 if name == "conv2d" else 1 if stride == (1, 1) else 2
    group = (inner, outer) if mode == 0 else (outer, inner)
    if mode == 1:  # a convolution with flipped windows
        padding = tuple(d * (k - 1) - p for d, k, p in zip(dilation, kernel, padding))  # type: ignore[assignment]
    windows = np.array((source.shape[2:], out.shape[2:], kernel, stride, padding, dilation, False, False), WINDOWS)
    if mode == 2:
        windows = np.array((out.shape[2:], source.shape[2:], kernel, stride, padding, dilation, False, False), WINDOWS)
    common = _Operands(source, out, w, group, windows)
    images, channels, height, width = out.shape
    last, strip = _across(out), 1 if mode == 2 else min(_STRIP, _power_of_two(height))
    step, spread = (1, 1) if mode == 2 else (stride[0], dilation[0])
    while strip > 1 and (strip - 1) * step + (kernel[0] - 1) * spread >= _MOST_ROWS:
        strip //= 2
    piece = _piece(channels, group == (1, 1), (source, out)) if last else 1
    strips = -(-height // strip)
    itemsize = arithmetic(w.dtype).itemsize
    if last:
        each = group[0] * math.prod(kernel) * piece * itemsize
        lanes = min(_LANES, _power_of_two(channels // piece), max(1, _power_of_two(_SHARED_BYTES // each + 1) // 2))
        tiles, steps, shared = -(-channels // (piece * lanes)), images * strips * width, each * lanes
    else:
        lanes = min(BLOCK, _power_of_two(strips * width))
        tiles, steps, shared = -(-strips * width // lanes), images * channels, 0
    along = min(-(-steps // (BLOCK // lanes)), max(1, -(-_BUSY_BLOCKS // tiles)) if last else 32768)
    operands = [
        (pointer("x", source.dtype, const=True), In(0)),
        (pointer("weight", w.dtype, const=True), In(1)),
        (pointer("y", out.dtype), Out(0)),
        *common.numbers(images=images, channels=channels, height=height, width=width),
        *common.rest,
        common.lanes(lanes),
    ]
    template = (*kernel, step, spread, strip, piece, mode, last)
    return Work([_call("grouped", template, operands, (tiles, along), shared)], contiguous=(False, True))


def _gradient_of_weight(g: Spec, x: Spec, out: Spec, stride: Pair, padding: Pair, dilation: Pair, groups: int) -> Work:
    kernel: Pair = out.shape[2:]  # type: ignore[assignment]
    group = (out.shape[1], out.shape[0] // groups)
    windows = np.array((x.shape[2:], g.shape[2:], kernel, stride, padding, dilation, False, False), WINDOWS)
    pairs, window = out.shape[0] * out.shape[1], math.prod(kernel)
    common = _Operands(x, g, Spec((_MAX_PIECES, out.size)), group, windows)
    most_sums = _SUMS * 4 // arithmetic(g.dtype).itemsize  # a float64 takes two registers
    rows = kernel[0] if window <= most_sums else 1
    last = _across(g)
    piece = 1
    while last and piece < 4 and rows * kernel[1] * piece * 2 <= most_sums:
        piece *= 2
    piece = _piece(pairs, group == (1, 1), (x, g), piece) if last else 1
    lanes = min(32, _power_of_two(-(-pairs // piece))) if last else 1
    tiles, count = -(-pairs // (lanes * piece)), g.shape[0] * math.prod(g.shape[2:])
    most = -(-count // (BLOCK // lanes * _LEAST_POSITIONS))
    pieces = max(1, min(_MAX_PIECES, most, -(-_BUSY_BLOCKS // tiles)))
    chunk = -(-count // pieces)
    compute = arithmetic(out.dtype)
    operands = [
        (pointer("g", g.dtype, const=True), In(0)),
        (pointer("x", x.dtype, const=True), In(1)),
        (pointer("parts", compute), Scratch(0)),
        *common.numbers(pairs=pairs, count=count, chunk=chunk),
        *common.rest,
        common.lanes(lanes),
    ]
    grid = (tiles, pieces, kernel[0] // rows)
    first = _call("grouped_weight", (*kernel, rows, piece), operands, grid, BLOCK * compute.itemsize)
    operands = [
        (pointer("parts", compute, const=True), Scratch(0)),
        (pointer("w", out.dtype), Out(0)),
        *common.numbers(n=out.size, pieces=pieces),
    ]
    blocks = (blocks_for(-(-out.size // _WARP) * BLOCK),)
    second = _call("sum_of_pieces", (), operands, blocks, BLOCK * compute.itemsize)
    return Work([first, second], pieces * out.size * compute.itemsize)
