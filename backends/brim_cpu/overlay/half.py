"""Products of float16 and bfloat16: tile by tile, or some images at a time, converted to float32 and computed as such.

What is converted at a time is small, so that half width saves memory here, too. Sums are float32 from end to end, and
each element of the result is rounded once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np

from brim.expr import FusedFormula, ScalarStep
from brim.spec import Spec
from brim_cpu.blocks import carve, carve_bytes
from brim_cpu.overlay import NativeKernel, overlay_half
from brim_cpu.overlay.elementwise import Interpreter
from brim_cpu.overlay.matmul import matmul as wide_matmul

__all__ = ["converted", "matmul"]

Array = np.ndarray[Any, Any]
Call = Callable[[], None]

_WIDE = np.dtype("float32")

TILE = 512
"""Rows and columns of the result that are computed at a time: the product then takes far longer than converting."""
SLICE_BYTES = 1 << 20
"""Of short rows, and of small matrices in a batch, more are computed at a time: so many bytes in float32."""


@cache
def _cast(source: np.dtype[Any], target: np.dtype[Any]) -> Interpreter:
    step = ScalarStep("cast", target, (("in", 0),), source)
    return Interpreter(FusedFormula((step,), (0,)), [False], [target])


def converted(target: Array, source: Array) -> Call:
    """A call that copies elements and converts them."""
    call = _cast(source.dtype, target.dtype).call([target], [source])
    assert call is not None
    return call


def _is_transposed(strides: Sequence[int], shape: Sequence[int]) -> bool:
    return strides[-2] < strides[-1] and shape[-1] > 1


def _block(buffer: Array, like: Array) -> Array:
    """Float32 memory in the shape of a block of matrices, with the same side innermost."""
    flat = buffer[: like.size]
    if _is_transposed(like.strides, like.shape):
        return flat.reshape(*like.shape[:-2], like.shape[-1], like.shape[-2]).swapaxes(-1, -2)
    return flat.reshape(like.shape)


def _spec(array: Array) -> Spec:
    return Spec(array.shape, array.dtype, tuple(step // array.itemsize for step in array.strides))


def _product(out: Array, a: Array, b: Array) -> Sequence[Call]:
    found = wide_matmul([_spec(a), _spec(b)], [_spec(out)])
    assert found is not None  # row-major or transposed as a whole, and not empty
    return found.calls(out, a, b)


@overlay_half("matmul")
def matmul(ins: Any, outs: Any, **params: Any) -> NativeKernel | None:
    """A product of matrices of half width."""
    a, b = ins
    (out,) = outs
    m, k, n = a.shape[-2], a.shape[-1], b.shape[-1]
    if out.size == 0 or k == 0 or not a.dtype == b.dtype == out.dtype:
        return None
    lead = out.shape[:-2]
    one = m * k + k * n + m * n  # elements of a product
    # One matrix shared by all of a batch would be converted again for every slice.
    small = len(lead) > 0 and m <= TILE and n <= TILE and a.shape[:-2] == b.shape[:-2] == lead
    tile = TILE
    if small:
        inner = math.prod(lead[1:])
        step = max(1, SLICE_BYTES // (4 * one * inner))
        many = min(step, lead[0]) * inner
        parts = [((many * size,), _WIDE) for size in (m * k, k * n, m * n)]
    else:
        columns = min(n, TILE)
        tile = max(1, SLICE_BYTES // (4 * (k + columns) * TILE)) * TILE
        rows = min(m, tile)
        parts = [((size,), _WIDE) for size in (rows * k, k * columns, rows * columns)]

    def calls(out: Array, a: Array, b: Array, scratch: Any = None) -> list[Call]:
        left, right, result = carve(scratch, *parts)
        made: list[Call] = []

        def product(out: Array, a: Array, y: Array) -> None:
            x, z = _block(left, a), _block(result, out)
            made.append(converted(x, a))
            made.extend(_product(z, x, y))
            made.append(converted(out, z))

        if small:
            for first in range(0, lead[0], step):
                some = slice(first, first + step)
                y = _block(right, b[some])
                made.append(converted(y, b[some]))
                product(out[some], a[some], y)
            return made
        a, b = np.broadcast_to(a, (*lead, m, k)), np.broadcast_to(b, (*lead, k, n))
        for at in np.ndindex(*lead):
            for column in range(0, n, TILE):
                across = slice(column, column + TILE)
                y = _block(right, b[at][:, across])
                made.append(converted(y, b[at][:, across]))
                for row in range(0, m, tile):
                    down = slice(row, row + tile)
                    product(out[at][down, across], a[at][down], y)
        return made

    return NativeKernel(calls, carve_bytes(*parts))
