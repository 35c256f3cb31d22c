"""NumPy kernels that place elements: writes into slices, concatenation, triangles."""

from __future__ import annotations

from typing import Any

import numpy as np

from brim_cpu.registry import kernel

__all__ = ["python_slice", "same_elements"]

Array = np.ndarray[Any, Any]


def same_elements(a: Any, b: Any) -> bool:
    """Whether two operands are arrays of the same elements in memory, in the same order."""
    if not (isinstance(a, np.ndarray) and isinstance(b, np.ndarray)):
        return False
    at, other = (x.__array_interface__["data"][0] for x in (a, b))
    return bool(at == other and a.shape == b.shape and a.strides == b.strides)


def python_slice(start: int, step: int, count: int) -> slice:
    """The slice of ``count`` entries from ``start`` on, ``step`` apart."""
    if count == 0:
        return slice(0, 0)
    stop = start + step * count
    return slice(start, None if stop < 0 else stop, step)


@kernel("set_slice", aliasing=True)
def set_slice(out: Array, x: Any, values: Any, scratch: Any = None, *, index: Any, shape: Any) -> None:
    if not same_elements(out, x):
        np.copyto(out, x, casting="unsafe")
    at: Any = (*(python_slice(*entry) for entry in index), ...)  # gives a view, even of an array without axes
    np.copyto(out[at], values[0] if isinstance(values, np.ndarray) else values, casting="unsafe")


@kernel("concat")
def concat(out: Array, *xs: Array, scratch: Any = None, axis: int) -> None:
    start = 0
    for x in xs:
        stop = start + x.shape[axis]
        np.copyto(out[(slice(None),) * axis + (slice(start, stop),)], x)
        start = stop


@kernel("triangle")
def triangle(out: Array, x: Array, scratch: Any = None, *, k: int, upper: bool) -> None:
    np.copyto(out, x)
    rows, columns = out.shape[-2:]
    for row in range(rows):
        if upper:
            out[..., row, : max(0, min(columns, row + k))] = 0
        else:
            out[..., row, max(0, min(columns, row + k + 1)) :] = 0
