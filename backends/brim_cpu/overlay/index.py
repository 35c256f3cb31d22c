"""Entries along an axis by index, of any dtype: reading them, and rows of a data set for batches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from brim.spec import Spec
from brim_cpu import native
from brim_cpu.kernels.indexing import check_range
from brim_cpu.native import Function
from brim_cpu.overlay import NativeKernel, overlay

__all__ = ["gather_rows"]

Array = np.ndarray[Any, Any]

_TAKE = Function("brim_take", "ppppiiii")
_GATHER_ROWS = Function("brim_gather_rows", "ppppiiii")
_FOUND_BYTES = 16  # the smallest and the largest index


def _check(found: Any, size: int, axis: int) -> None:
    check_range(int(found[0]), int(found[1]), size, axis)


@overlay("take")
def take(ins: Sequence[Any], outs: Sequence[Spec], *, axis: int) -> NativeKernel | None:
    """By bytes, whatever the dtype; an index out of range is an IndexError before anything is read."""
    x, _ = ins
    size = x.shape[axis]
    outer, inner = math.prod(x.shape[:axis]), math.prod(x.shape[axis + 1 :])

    def calls(y: Any, x: Any, indices: Any, scratch: Any) -> list[Any]:
        found = scratch.view(np.int64)
        run_bytes = inner * x.itemsize
        return [
            _TAKE.bind(y, found, x, indices, outer, indices.size, size, run_bytes),
            partial(_check, found, size, axis),
        ]

    return NativeKernel(calls, _FOUND_BYTES, contiguous=True)


def gather_rows(source: Array, indices: Array, out: Array, on_team: bool = True) -> None:
    """``out[i] = source[indices[i]]``, rows of a data set into a batch, on the team of threads.

    Arguments:
        source: (N, ...), read only.
        indices: (B,), int64, negative ones count from the end.
        out: (B, ...), of the dtype and row shape of ``source``; not in the memory of the others.
        on_team: False: the calling thread alone copies.

    Raises:
        IndexError: an index out of range; nothing was written. ValueError: shapes or dtypes that do not fit.
    """
    if out.dtype != source.dtype or out.shape != indices.shape + source.shape[1:] or indices.ndim != 1:
        raise ValueError(
            f"rows of {source.dtype} {source.shape} by indices of shape {indices.shape} cannot be written into "
            f"{out.dtype} {out.shape}; out is (len(indices), *source.shape[1:]) of the same dtype"
        )
    order = np.ascontiguousarray(indices, np.int64)
    plain = source.flags.c_contiguous and out.flags.c_contiguous and out.flags.writeable and not source.dtype.hasobject
    if not (plain and native.available()):
        if order.size:
            check_range(int(order.min()), int(order.max()), len(source), 0)
        if out.size:
            np.take(source, order, axis=0, out=out, mode="wrap")
        return
    found = np.empty(2, np.int64)
    row_bytes = math.prod(source.shape[1:]) * source.itemsize
    _GATHER_ROWS.bind(out, found, source, order, order.size, row_bytes, len(source), int(on_team))()
    _check(found, len(source), 0)
