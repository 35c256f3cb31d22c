"""NumPy kernels that place elements: writes into slices, concatenation, triangles."""

from __future__ import annotations

from typing import Any

import numpy as np

from brim_cpu.registry import kernel

Array = np.ndarray[Any, Any]


def _python_slice(start: int, step: int, count: int) -> slice:
    if count == 0:
        return slice(0, 0)
    stop = start + step * count
    return slice(start, None if stop < 0 else stop, step)


@kernel("set_slice", aliasing=True)
def set_slice(out: Array, x: Any, values: Any, scratch: Any = None, *, index: Any, shape: Any) -> None:
    if out is not x:
        np.copyto(out, x, casting="unsafe")
    target = out[tuple(_python_slice(*entry) for entry in index)]
    np.copyto(target, values[0] if isinstance(values, np.ndarray) else values, casting="unsafe")


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
