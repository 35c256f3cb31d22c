"""Tensors from shapes and ranges: zeros, ones, full, arange, linspace, eye and their like."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import numpy as np

from brim.device import device as find_device
from brim.errors import DTypeError, ShapeError
from brim.ops.filling import fill, iota
from brim.ops.join import tril
from brim.ops.movement import broadcast_to, reshape, set_slice
from brim.spec import (
    DTYPES,
    Scalar,
    as_dtype,
    as_shape,
    default_float,
    is_complex,
    is_inexact,
    is_integer,
    promote,
)
from brim.tensor import Tensor
from brim.tensor import empty as _empty

__all__ = [
    "arange",
    "empty",
    "empty_like",
    "eye",
    "full",
    "full_like",
    "linspace",
    "meshgrid",
    "ones",
    "ones_like",
    "tri",
    "zeros",
    "zeros_like",
]


def _place(device: Any) -> str:
    return find_device(device).name


def _number(value: Any, what: str) -> Scalar:
    if hasattr(value, "item") and getattr(value, "size", 1) == 1:
        value = value.item()
    if not isinstance(value, bool | int | float | complex):
        raise DTypeError(f"{what} is a number, got {type(value).__name__}; for arrays use brim.asarray")
    return value


def full(shape: Any, value: Any, *, dtype: Any = None, device: Any = None, requires_grad: bool = False) -> Tensor:
    """A tensor with one number everywhere.

    Arguments:
        shape: an int or a sequence of ints.
        value: a number (or a tensor of one element).
        dtype: by default bool, int64, float32 or complex64, after the value.
        device: the default device when None.
        requires_grad: record operations on it for gradients.

    Raises:
        BudgetExceeded: it does not fit; nothing was allocated.
    """
    number = _number(value, "the fill value")
    kind = promote(number) if dtype is None else as_dtype(dtype)
    if isinstance(number, complex) and not is_complex(kind):
        raise DTypeError(f"{number} cannot be stored as {kind}; use dtype='complex64'")
    if is_integer(kind) and not isinstance(number, complex):
        bounds = np.iinfo(kind)
        if not bounds.min <= number <= bounds.max:
            raise DTypeError(f"{number} cannot be stored as {kind}, which holds {bounds.min} to {bounds.max}")
    out = fill(number, shape=as_shape(shape), dtype=kind, device=_place(device))
    return out.requires_grad_() if requires_grad else out


def zeros(shape: Any, *, dtype: Any = default_float, device: Any = None, requires_grad: bool = False) -> Tensor:
    """A tensor of zeros; see ``full``."""
    return full(shape, 0, dtype=dtype, device=device, requires_grad=requires_grad)


def ones(shape: Any, *, dtype: Any = default_float, device: Any = None, requires_grad: bool = False) -> Tensor:
    """A tensor of ones; see ``full``."""
    return full(shape, 1, dtype=dtype, device=device, requires_grad=requires_grad)


def empty(shape: Any, *, dtype: Any = default_float, device: Any = None, requires_grad: bool = False) -> Tensor:
    """A tensor whose elements have no particular values; see ``full``."""
    out = _empty(as_shape(shape), dtype=dtype, device=device)
    return out.requires_grad_() if requires_grad else out


def _like(make: Callable[..., Tensor], x: Tensor, dtype: Any, device: Any, requires_grad: bool) -> Tensor:
    return make(
        x.shape,
        dtype=x.dtype if dtype is None else dtype,
        device=x.device if device is None else device,
        requires_grad=requires_grad,
    )


def zeros_like(x: Tensor, *, dtype: Any = None, device: Any = None, requires_grad: bool = False) -> Tensor:
    """Zeros with the shape, dtype and device of ``x`` unless given."""
    return _like(zeros, x, dtype, device, requires_grad)


def ones_like(x: Tensor, *, dtype: Any = None, device: Any = None, requires_grad: bool = False) -> Tensor:
    """Ones with the shape, dtype and device of ``x`` unless given."""
    return _like(ones, x, dtype, device, requires_grad)


def empty_like(x: Tensor, *, dtype: Any = None, device: Any = None, requires_grad: bool = False) -> Tensor:
    """No particular values, with the shape, dtype and device of ``x`` unless given."""
    return _like(empty, x, dtype, device, requires_grad)


def full_like(x: Tensor, value: Any, *, dtype: Any = None, device: Any = None, requires_grad: bool = False) -> Tensor:
    """One number, with the shape, dtype and device of ``x`` unless given."""

    def make(shape: Any, **options: Any) -> Tensor:
        return full(shape, value, **options)

    return _like(make, x, dtype, device, requires_grad)


def arange(
    start: Any,
    stop: Any = None,
    step: Any = 1,
    *,
    dtype: Any = None,
    device: Any = None,
    requires_grad: bool = False,
) -> Tensor:
    """``start, start + step, ...`` as long as it lies before ``stop``; ``arange(n)`` counts from 0.

    Arguments:
        dtype: int64 when all three are ints, else float32.

    Raises:
        ValueError: step is 0, or a bound is not finite.
    """
    bounds = (0, start, step) if stop is None else (start, stop, step)
    first, last, by = (_number(v, "a bound of arange") for v in bounds)
    if isinstance(first, complex) or isinstance(last, complex) or isinstance(by, complex):
        raise DTypeError("arange is not defined for complex numbers")
    if by == 0 or not all(map(math.isfinite, (first, last, by))):
        raise ShapeError(f"arange needs finite bounds and a step that is not 0, got {first}, {last}, {by}")
    whole = not any(isinstance(v, float) for v in (first, last, by))
    kind = (DTYPES["int64"] if whole else default_float) if dtype is None else as_dtype(dtype)
    count = max(0, -((last - first) // -by) if whole else math.ceil((last - first) / by))
    out = iota(first, by, count=int(count), last=None, dtype=kind, device=_place(device))
    return out.requires_grad_() if requires_grad else out


def linspace(
    start: float,
    stop: float,
    num: int,
    *,
    endpoint: bool = True,
    dtype: Any = default_float,
    device: Any = None,
    requires_grad: bool = False,
) -> Tensor:
    """``num`` numbers evenly spaced from ``start`` to ``stop`` (included, exactly, unless endpoint=False)."""
    count = operator.index(num)
    kind = as_dtype(dtype)
    if count < 0:
        raise ShapeError(f"linspace needs num >= 0, got {count}")
    if not is_inexact(kind) or is_complex(kind):
        raise DTypeError(f"linspace gives floats, got dtype {kind}")
    parts = count - 1 if endpoint else count
    step = (float(stop) - float(start)) / parts if parts > 0 else 0.0
    end = float(stop) if endpoint and count > 1 else None
    out = iota(float(start), step, count=count, last=end, dtype=kind, device=_place(device))
    return out.requires_grad_() if requires_grad else out


def eye(
    rows: int,
    columns: int | None = None,
    k: int = 0,
    *,
    dtype: Any = default_float,
    device: Any = None,
    requires_grad: bool = False,
) -> Tensor:
    """A matrix with ones on diagonal ``k`` (positive: right of the main one) and zeros elsewhere."""
    n, m = as_shape((rows, rows if columns is None else columns))
    k = operator.index(k)
    count = max(0, min(n, m - k) if k >= 0 else min(n + k, m))
    start = k if k >= 0 else -k * m
    line = ones((1, count), dtype=dtype, device=device)
    index = ((start if count else 0, m + 1, count),)
    out = reshape(set_slice(0, line, index=index, shape=(n * m,)), (n, m))
    return out.requires_grad_() if requires_grad else out


def tri(rows: int, columns: int | None = None, k: int = 0, *, dtype: Any = default_float, device: Any = None) -> Tensor:
    """A matrix with ones on and below diagonal ``k``, zeros above."""
    one = ones((), dtype=dtype, device=device)
    return tril(broadcast_to(one, as_shape((rows, rows if columns is None else columns))), k)


def meshgrid(*axes: Tensor, indexing: str = "xy") -> tuple[Tensor, ...]:
    """One-dimensional tensors spread over a common grid, as views that share their memory (copy before writing).

    Arguments:
        indexing: "ij": output k varies along axis k; "xy": the first two axes exchanged.
    """
    if indexing not in ("xy", "ij"):
        raise ShapeError(f"meshgrid's indexing is 'xy' or 'ij', not {indexing!r}")
    for x in axes:
        if x.ndim != 1:
            raise ShapeError(f"meshgrid takes tensors with one axis, got shape {x.shape}")
    order = list(range(len(axes)))
    if indexing == "xy" and len(axes) > 1:
        order[:2] = [1, 0]
    shape = tuple(axes[a].size for a in order)
    grids = []
    for at, x in enumerate(axes):
        own = tuple(x.size if a == at else 1 for a in order)
        grids.append(broadcast_to(reshape(x, own), shape))
    return tuple(grids)
