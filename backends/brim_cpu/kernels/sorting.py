"""NumPy kernels that sort the last axis. NumPy's argsort has no ``out=``: it runs on blocks of rows."""

from __future__ import annotations

from typing import Any

import numpy as np

from brim_cpu.blocks import row_blocks
from brim_cpu.registry import kernel

Array = np.ndarray[Any, Any]

_FIXED_BYTES = 4096  # array headers


def _argsort_bytes(ins: Any, outs: Any) -> int:
    x = ins[0]
    width = x.shape[-1]
    rows = next(row_blocks(x.size // max(1, width), width), slice(0, 0)).stop
    # the block's indices, and per row a copy, its indices and the merge buffers of half a row each
    return int(rows * width * 8 + width * (2 * x.dtype.itemsize + 16) + _FIXED_BYTES)


@kernel("argsort", contiguous=True, library=_argsort_bytes)
def argsort(out: Array, x: Array, scratch: Any = None) -> None:
    width = x.shape[-1]
    if x.size == 0:
        return
    rows_in, rows_out = x.reshape(-1, width), out.reshape(-1, width)
    for rows in row_blocks(len(rows_in), width):
        np.copyto(rows_out[rows], np.argsort(rows_in[rows], axis=-1, kind="stable"))


@kernel("sort", library=lambda ins, outs: int(2 * ins[0].shape[-1] * ins[0].dtype.itemsize + _FIXED_BYTES))
def sort(out: Array, x: Array, scratch: Any = None) -> None:
    np.copyto(out, x)
    if out.size:
        out.sort(axis=-1)
