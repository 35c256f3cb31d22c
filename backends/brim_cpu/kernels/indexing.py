"""NumPy kernels that read and write by index arrays."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from brim_cpu.kernels.movement import same_elements
from brim_cpu.registry import kernel

__all__ = ["check_range"]

Array = np.ndarray[Any, Any]


def _check(indices: Array, size: int, axis: int) -> None:
    """IndexError naming the first bad kind of index; min and max need no memory."""
    if indices.size == 0:
        return
    check_range(int(indices.min()), int(indices.max()), size, axis)


def check_range(low: int, high: int, size: int, axis: int) -> None:
    """IndexError where indices from ``low`` to ``high`` do not all lie in an axis of this size."""
    if low < -size or high >= size:
        bad = low if low < -size else high
        raise IndexError(f"index {bad} is out of range for axis {axis} of size {size}")


@kernel("take", contiguous=True)
def take(out: Array, x: Array, indices: Array, scratch: Any = None, *, axis: int) -> None:
    _check(indices, x.shape[axis], axis)
    if out.size:
        np.take(x, indices, axis=axis, out=out, mode="wrap")  # mode="raise" would buffer the result


@kernel("positions")
def positions(out: Array, indices: Array, scratch: Any = None, *, size: int, stride: int, axis: int) -> None:
    _check(indices, size, axis)
    if out.size:
        np.copyto(out, indices, casting="unsafe")
        np.remainder(out, size, out=out)
        np.multiply(out, stride, out=out)


def _three_axes(out: Array, axis: int) -> tuple[int, int, int]:
    return math.prod(out.shape[:axis]), out.shape[axis], math.prod(out.shape[axis + 1 :])


@kernel("index_add", contiguous=(1, 2), aliasing=True)
def index_add(out: Array, x: Any, indices: Array, values: Array, scratch: Any = None, *, axis: int, size: int) -> None:
    _check(indices, size, axis)
    if not same_elements(out, x):
        np.copyto(out, x, casting="unsafe")
    outer, _, inner = _three_axes(out, axis)
    target = out.reshape(outer, size, inner)
    given = values.reshape(outer, indices.shape[1], inner)
    order = indices[0]
    if inner == 1 and outer <= order.size:
        for row in range(outer):
            np.add.at(target[row, :, 0], order, given[row, :, 0])
        return
    for position, index in enumerate(order):
        line = target[:, index]
        np.add(line, given[:, position], out=line)


@kernel("put", contiguous=(1,), aliasing=True)
def put(out: Array, x: Any, indices: Array, values: Any, scratch: Any = None, *, axis: int, size: int) -> None:
    _check(indices, size, axis)
    if not same_elements(out, x):
        np.copyto(out, x, casting="unsafe")
    order = indices[0]
    lead = (slice(None),) * axis
    if out.ndim == 1:
        out[order] = values[0] if isinstance(values, np.ndarray) else values
        return
    for position, index in enumerate(order):
        to: tuple[Any, ...] = (*lead, index)
        source: tuple[Any, ...] = (*lead, 0, position)
        np.copyto(out[to], values[source] if isinstance(values, np.ndarray) else values)
