"""Sorting along an axis: sort, argsort, topk. NaN counts as the largest."""

from __future__ import annotations

import operator
from typing import Any

from brim.errors import DTypeError, ShapeError
from brim.op import Op, primitive
from brim.ops.arithmetic import subtract
from brim.ops.indexing import gather, scatter_add_zeros
from brim.ops.movement import flip, moveaxis, slice_axis
from brim.spec import DTYPES, Spec, normalize_axis


def _sorted_spec(x: Spec) -> Spec:
    if x.dtype.kind == "c":
        raise DTypeError(f"complex numbers have no order, got {x.dtype}; sort brim.abs(x)")
    return Spec(x.shape, x.dtype)


_argsort: Op = primitive(
    "argsort",
    lambda x: Spec(_sorted_spec(x).shape, DTYPES["int64"]),
    doc="indices that sort the last axis upwards; equal elements keep their order",
)
_sort: Op = primitive(
    "sort",
    _sorted_spec,
    vjp=lambda g, x, _out: scatter_add_zeros(x.shape, _argsort(x), g, x.ndim - 1),
    doc="the last axis sorted upwards",
)


def _last(x: Any, axis: int) -> tuple[Any, int]:
    if x.ndim == 0:
        raise ShapeError("cannot sort a tensor without axes")
    axis = normalize_axis(axis, x.ndim)
    return (x if axis == x.ndim - 1 else moveaxis(x, axis, -1)), axis


def sort(x: Any, axis: int = -1, *, descending: bool = False, stable: bool = True) -> Any:
    """The elements along an axis in order. Equal elements are equal, so ``stable`` changes nothing here."""
    y, axis = _last(x, axis)
    out = _sort(y)
    out = flip(out, -1) if descending else out
    return out if axis == x.ndim - 1 else moveaxis(out, -1, axis)


def argsort(x: Any, axis: int = -1, *, descending: bool = False, stable: bool = True) -> Any:
    """int64 indices with ``gather(x, argsort(x, axis), axis) == sort(x, axis)``; equal elements keep their order."""
    y, axis = _last(x, axis)
    # Sorting the reversed axis and reversing the result keeps the order of equal elements.
    out = subtract(y.shape[-1] - 1, flip(_argsort(flip(y, -1)), -1)) if descending else _argsort(y)
    return out if axis == x.ndim - 1 else moveaxis(out, -1, axis)


def topk(x: Any, k: int, axis: int = -1, *, largest: bool = True) -> tuple[Any, Any]:
    """The ``k`` largest (or smallest) elements along an axis, best first, and their indices.

    Returns:
        (values, indices int64), both with size ``k`` along ``axis``; of equal elements the first come first.

    Raises:
        ShapeError: ``k`` is negative or larger than the axis.
    """
    count = operator.index(k)
    axis = normalize_axis(axis, x.ndim)
    if not 0 <= count <= x.shape[axis]:
        raise ShapeError(f"topk of axis {axis} needs k in 0..{x.shape[axis]} (its size), got {count}")
    indices = slice_axis(argsort(x, axis, descending=largest), axis, 0, 1, count)
    return gather(x, indices, axis), indices


__all__ = ["argsort", "sort", "topk"]
