"""Matrix products with NumPy (BLAS). Half-width floats are converted block by block and added up in float32."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from brim_cpu.blocks import carve, carve_bytes
from brim_cpu.registry import kernel

Array = np.ndarray[Any, Any]

_TILE = 256
"""Rows and columns of the result that are computed at a time in float32."""


def _is_half(dtype: np.dtype[Any]) -> bool:
    return dtype.itemsize == 2 and dtype.kind not in "iu"


def _parts(rows: int, inner: int, columns: int) -> list[tuple[tuple[int, ...], str]]:
    m, n = min(rows, _TILE), min(columns, _TILE)
    return [((m * inner,), "f4"), ((inner * n,), "f4"), ((m * n,), "f4")]


def _scratch_bytes(ins: Any, outs: Any) -> int:
    a, b = ins
    return carve_bytes(*_parts(a.shape[-2], a.shape[-1], b.shape[-1])) if _is_half(a.dtype) else 0


def _prepare(out: Array, a: Array, b: Array, scratch: Any = None) -> list[Callable[[], None]] | None:
    if out.size == 0 or a.shape[-1] == 0 or _is_half(out.dtype):
        return None
    return [partial(np.matmul, a, b, out=out)]


@kernel("matmul", scratch=_scratch_bytes, prepare=_prepare)
def matmul(out: Array, a: Array, b: Array, scratch: Any = None) -> None:
    if out.size == 0:
        return
    if a.shape[-1] == 0:
        out[...] = 0
        return
    if not _is_half(out.dtype):
        np.matmul(a, b, out=out)
        return
    rows, inner, columns = a.shape[-2], a.shape[-1], b.shape[-1]
    left, right, product = carve(scratch, *_parts(rows, inner, columns))
    batch = out.shape[:-2]
    a, b = np.broadcast_to(a, (*batch, rows, inner)), np.broadcast_to(b, (*batch, inner, columns))
    for at in np.ndindex(*batch):
        for column in range(0, columns, _TILE):
            n = min(_TILE, columns - column)
            y = right[: inner * n].reshape(inner, n)
            np.copyto(y, b[at][:, column : column + n])
            for row in range(0, rows, _TILE):
                m = min(_TILE, rows - row)
                x, z = left[: m * inner].reshape(m, inner), product[: m * n].reshape(m, n)
                np.copyto(x, a[at][row : row + m])
                np.matmul(x, y, out=z)
                np.copyto(out[at][row : row + m, column : column + n], z, casting="unsafe")
