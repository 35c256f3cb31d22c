"""Cutting arrays into blocks that stay in the cache, so that kernels need only small scratch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

__all__ = ["BLOCK_ELEMENTS", "as_float32", "blocks", "carve", "carve_bytes", "row_blocks"]

BLOCK_ELEMENTS = 16 * 1024
"""Elements of one block: 64 KiB of float32, so that a handful of registers stay in the second-level cache."""

Array = np.ndarray[Any, Any]


def blocks(shape: tuple[int, ...], limit: int = BLOCK_ELEMENTS) -> Iterator[tuple[slice | int, ...]]:
    """Indices that cut an array of this shape into pieces of at most ``limit`` elements, in row-major order."""
    inner, axis = 1, len(shape)
    while axis > 0 and inner * shape[axis - 1] <= limit:
        axis -= 1
        inner *= shape[axis]
    if axis == 0:
        yield ()
        return
    step = max(1, limit // inner)
    for outer in np.ndindex(*shape[: axis - 1]):
        for start in range(0, shape[axis - 1], step):
            yield (*outer, slice(start, start + step))


def row_blocks(rows: int, row_elements: int, limit: int = BLOCK_ELEMENTS) -> Iterator[slice]:
    """Slices of whole rows, each of at most ``limit`` elements (at least one row)."""
    step = max(1, limit // max(1, row_elements))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def carve(scratch: Array, *parts: tuple[tuple[int, ...], Any]) -> list[Array]:
    """Arrays of the given (shape, dtype) one after another in a flat uint8 scratch, each 64-byte aligned."""
    out, at = [], 0
    for shape, dtype in parts:
        kind = np.dtype(dtype)
        count = 1
        for dim in shape:
            count *= dim
        nbytes = count * kind.itemsize
        out.append(scratch[at : at + nbytes].view(kind).reshape(shape))
        at += -(-nbytes // 64) * 64
    return out


def carve_bytes(*parts: tuple[tuple[int, ...], Any]) -> int:
    """Bytes of scratch that ``carve`` needs for these parts."""
    total = 0
    for shape, dtype in parts:
        count = np.dtype(dtype).itemsize
        for dim in shape:
            count *= dim
        total += -(-count // 64) * 64
    return total


def as_float32(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The dtype to compute in: float32 for the half-width floats, else the dtype itself."""
    return np.dtype("float32") if dtype.itemsize == 2 and dtype.kind not in "iu" else dtype
