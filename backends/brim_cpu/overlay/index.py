"""Entries along an axis by index: reading, adding, writing, and rows of a data set for batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from brim.spec import DTYPES, Spec
from brim_cpu import native
from brim_cpu.kernels.indexing import check_range
from brim_cpu.native import Call, Function
from brim_cpu.overlay import NativeKernel, overlay, small_numpy
from brim_cpu.overlay.copies import as_array, copy_calls
from brim_cpu.registry import KERNELS

__all__ = ["gather_rows"]

Array = np.ndarray[Any, Any]

_PLAIN_BYTES = 256 * 1024
"""NumPy's take is as fast as one thread can be: only larger results are worth binding a call in eager code."""
_FEW_INDICES = 16
"""NumPy writes index by index, which costs a microsecond each: more are worth binding a call in eager code."""

_TAKE = Function("brim_take", "ppppiiii")
_GATHER_ROWS = Function("brim_gather_rows", "ppppiiii")


def _check(found: Any, size: int, axis: int) -> None:
    check_range(int(found[0]), int(found[1]), size, axis)


@overlay("take")
def take(ins: Sequence[Any], outs: Sequence[Spec], *, axis: int) -> NativeKernel | None:
    """By bytes, whatever the dtype; an index out of range is an IndexError before anything is read."""
    x, _ = ins
    size = x.shape[axis]
    outer, inner = math.prod(x.shape[:axis]), math.prod(x.shape[axis + 1 :])

    def calls(y: Any, x: Any, indices: Any, scratch: Any = None) -> list[Any]:
        found = np.empty(2, np.int64)
        run_bytes = inner * x.itemsize
        call = _TAKE.bind(y, found, x, indices, outer, indices.size, size, run_bytes)
        call.checks.append(partial(_check, found, size, axis))
        return [call]

    return NativeKernel(calls, contiguous=True, small=small_numpy("take", outs[0], _PLAIN_BYTES))


@dataclass(frozen=True, slots=True)
class _Sizes:
    """What ``index_add`` and ``put`` write: (outer, size, inner) at ``count`` indices."""

    outer: int
    count: int
    size: int
    inner: int


def _sizes(out: Spec, indices: Spec, axis: int) -> _Sizes:
    outer, inner = math.prod(out.shape[:axis]), math.prod(out.shape[axis + 1 :])
    return _Sizes(outer, indices.size, out.shape[axis], inner)


_ADDED = {DTYPES[f"{kind}float{bits}"]: f"{kind}f{bits}" for kind, bits in (("", 16), ("b", 16), ("", 32), ("", 64))}
_ADDED |= {dtype: f"u{8 * dtype.itemsize}" for dtype in DTYPES.values() if dtype.kind in "iu"}  # they wrap around
_ADDED |= {DTYPES["complex64"]: "f32", DTYPES["complex128"]: "f64"}  # pairs of numbers
_INDEX_ADD = {name: Function(f"brim_index_add_{name}", "pppppiiiii") for name in set(_ADDED.values())}
_PUT = {size: Function(f"brim_put_u{8 * size}", "pppppiiiiii") for size in (1, 2, 4, 8)}


@overlay("index_add")
def index_add(ins: Sequence[Any], outs: Sequence[Spec], *, axis: int, size: int) -> NativeKernel | None:
    """The gradient of ``take``: sums in the order of the indices, by columns or rows of the result in each thread."""
    (x, indices, values), (out,) = ins, outs
    if out.dtype not in _ADDED or not isinstance(values, Spec) or not _fit(out, indices, x, values):
        return None
    sizes, function = _sizes(out, indices, axis), _INDEX_ADD[_ADDED[out.dtype]]
    parts = 2 if out.dtype.kind == "c" else 1
    if parts == 2 and not isinstance(x, Spec):
        return None

    def calls(y: Any, x: Any, indices: Any, values: Any, scratch: Any = None) -> list[Any]:
        found = np.empty(2, np.int64)
        base, copies, renewals = _base(y, x)
        numbers = (sizes.outer, sizes.count, sizes.size, sizes.inner * parts)
        call = function.bind(y, found, base, indices, values, _step(base), *numbers)
        call.renewals += renewals
        call.checks.append(partial(_check, found, size, axis))
        return [*copies, call]

    return NativeKernel(calls, contiguous=(False, True, True), aliasing=True, small=_few("index_add", indices))


@overlay("put")
def put(ins: Sequence[Any], outs: Sequence[Spec], *, axis: int, size: int) -> NativeKernel | None:
    """By bytes; the last of equal indices stays."""
    (x, indices, values), (out,) = ins, outs
    if out.dtype.itemsize not in _PUT or not _fit(out, indices, x, values):
        return None
    sizes, function = _sizes(out, indices, axis), _PUT[out.dtype.itemsize]

    def calls(y: Any, x: Any, indices: Any, values: Any, scratch: Any = None) -> list[Any]:
        found = np.empty(2, np.int64)
        base, copies, renewals = _base(y, x)
        given, more = as_array(values, y.dtype)
        steps = (_step(base), _step(given))
        numbers = (sizes.outer, sizes.count, sizes.size, sizes.inner)
        call = function.bind(y, found, base, indices, given, *steps, *numbers)
        call.renewals += renewals + more
        call.checks.append(partial(_check, found, size, axis))
        return [*copies, call]

    return NativeKernel(calls, contiguous=(False, True, True), aliasing=True, small=_few("put", indices))


def _fit(out: Spec, indices: Spec, *operands: Any) -> bool:
    """Whether all has the dtypes that the kernels take for granted."""
    return indices.dtype == np.int64 and all(not isinstance(x, Spec) or x.dtype == out.dtype for x in operands)


def _few(name: str, indices: Spec) -> Callable[..., None] | None:
    return KERNELS[name].run if indices.size <= _FEW_INDICES else None


def _base(out: Array, x: Any) -> tuple[Array, list[Call], list[Callable[[], None]]]:
    """What is written over, row-major, the calls that bring it there, and what renews it before each run."""
    if isinstance(x, np.ndarray) and not x.flags.c_contiguous:
        return out, copy_calls(out, x), []
    base, renewals = as_array(x, out.dtype)
    return base, [], renewals


def _step(operand: Array) -> int:
    """1 for an array, 0 for a number, which stands for every element."""
    return min(operand.ndim, 1)


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
    if indices.dtype.kind not in "iu" or indices.dtype == np.uint64:
        raise ValueError(f"indices of rows are integers that fit into int64, not {indices.dtype}")
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
    _GATHER_ROWS.call(out, found, source, order, order.size, row_bytes, len(source), int(on_team))
    _check(found, len(source), 0)
