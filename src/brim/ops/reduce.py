"""Reductions over axes: sum, mean, products, extremes, variance, logical any and all, logsumexp."""

from __future__ import annotations

import builtins
import math
from typing import Any

from brim.autocast import as_one, suspended
from brim.errors import DTypeError, ShapeError
from brim.op import Op, composite, primitive
from brim.ops.arithmetic import astype, log, promote_to_inexact, sqrt, square, where
from brim.ops.compare import isfinite
from brim.ops.exponential import exp
from brim.spec import (
    DTYPES,
    Shape,
    Spec,
    default_float,
    is_complex,
    is_float,
    is_inexact,
    normalize_axes,
    normalize_axis,
)


def _reduced_shape(x: Spec, axes: tuple[int, ...], keepdims: bool) -> Shape:
    if keepdims:
        return tuple(1 if i in axes else dim for i, dim in enumerate(x.shape))
    return tuple(dim for i, dim in enumerate(x.shape) if i not in axes)


def _same_spec(x: Spec, *, axes: tuple[int, ...], keepdims: bool) -> Spec:
    return Spec(_reduced_shape(x, axes, keepdims), x.dtype)


def _spread(g: Any, x: Any, axes: tuple[int, ...]) -> Any:
    """A reduction's gradient (or result) repeated over the axes that were reduced."""
    kept = tuple(1 if i in axes else dim for i, dim in enumerate(x.shape))
    return g.reshape(kept).broadcast_to(x.shape)


def _sum_spec(x: Spec, *, axes: tuple[int, ...], keepdims: bool, wide: bool = False) -> Spec:
    # wide: the float32 sum of half-width floats as it is, for results that a division brings back into range (mean).
    dtype = default_float if wide and is_float(x.dtype) and x.dtype.itemsize == 2 else x.dtype
    return Spec(_reduced_shape(x, axes, keepdims), dtype)


_sum: Op = primitive(
    "sum",
    _sum_spec,
    vjp=lambda g, _x, _out, *, axes, keepdims, wide=False: _spread(g, _x, axes),
    doc="sum over axes; float16 and bfloat16 are added up in float32",
)


def _extreme_spec(x: Spec, *, axes: tuple[int, ...], keepdims: bool) -> Spec:
    if is_complex(x.dtype):
        raise DTypeError(f"complex numbers have no order, so no largest or smallest: {x.dtype}")
    if builtins.any(x.shape[a] == 0 for a in axes):
        raise ShapeError(f"the extreme over an empty axis is undefined: shape {x.shape}, axes {axes}")
    return _same_spec(x, axes=axes, keepdims=keepdims)


def _extreme_grad(g: Any, x: Any, out: Any, *, axes: tuple[int, ...], keepdims: bool) -> Any:
    # Ties share the gradient evenly.
    hit = x == _spread(out, x, axes)
    count = _sum(hit.astype(x.dtype), axes=axes, keepdims=keepdims)
    return where(hit, _spread(g / count, x, axes), 0.0)


_max: Op = primitive("max", _extreme_spec, vjp=_extreme_grad, doc="largest over axes; NaN if any is NaN")
_min: Op = primitive("min", _extreme_spec, vjp=_extreme_grad, doc="smallest over axes; NaN if any is NaN")


def _prod_grad(g: Any, x: Any, _out: Any, *, axes: tuple[int, ...], keepdims: bool) -> Any:
    # The product of the others: without zeros all / x; beside one zero only the zero's own entry is not 0.
    zero = x == 0
    others = where(zero, 1.0, x)
    product = _spread(_prod(others, axes=axes, keepdims=keepdims), x, axes)
    zeros = _spread(_sum(zero.astype("int64"), axes=axes, keepdims=keepdims), x, axes)
    return _spread(g, x, axes) * where(zeros == 0, product / others, where(zero & (zeros == 1), product, 0.0))


def _bool_spec(x: Spec, *, axes: tuple[int, ...], keepdims: bool) -> Spec:
    return Spec(_reduced_shape(x, axes, keepdims), DTYPES["bool"])


def _position_spec(x: Spec, *, axis: int | None, keepdims: bool) -> Spec:
    axes = tuple(range(x.ndim)) if axis is None else (axis,)
    return _extreme_spec(x, axes=axes, keepdims=keepdims).with_dtype(DTYPES["int64"])


_prod: Op = primitive("prod", _same_spec, vjp=_prod_grad, doc="product over axes")
_any: Op = primitive("any", _bool_spec, doc="True where any element over the axes is not zero")
_all: Op = primitive("all", _bool_spec, doc="True where no element over the axes is zero")
_argmax: Op = primitive(
    "argmax", _position_spec, doc="position of the first largest; of the first NaN where there is one"
)
_argmin: Op = primitive(
    "argmin", _position_spec, doc="position of the first smallest; of the first NaN where there is one"
)


@composite("logsumexp_grad")
def _logsumexp_grad(g: Any, x: Any, out: Any, *, axes: tuple[int, ...]) -> Any:
    """the gradient of logsumexp: g softmax(x)"""
    # exp(x - out) is the softmax; where every x is -inf, so is out, and the gradient is 0 rather than NaN.
    return _spread(g, x, axes) * exp(x - _spread(where(isfinite(out), out, 0.0), x, axes))


@composite("logsumexp", vjp=lambda g, x, out, *, axes, keepdims: _logsumexp_grad(g, x, out, axes=axes))
def _logsumexp(x: Any, *, axes: tuple[int, ...], keepdims: bool) -> Any:
    """log of the sum of e^x over axes, without overflow"""
    top = _max(x, axes=axes, keepdims=True)
    shift = where(isfinite(top), top, 0.0)
    total = log(_sum(exp(x - shift), axes=axes, keepdims=True)) + shift
    return total if keepdims else total.reshape(_reduced_shape(x, axes, False))


def _reduce(op: Op, x: Any, axis: Any, keepdims: bool) -> Any:
    return op(x, axes=normalize_axes(axis, x.ndim), keepdims=bool(keepdims))


def sum(x: Any, axis: Any = None, *, dtype: Any = None, keepdims: bool = False) -> Any:
    """Sum over axes. Integers and bools are added in int64 (uint64 when unsigned), floats in at least float32.

    Arguments:
        axis: an axis, a sequence of axes, or None for all.
        dtype: dtype to convert to before adding.
        keepdims: keep reduced axes with size 1.
    """
    if dtype is not None:
        with suspended():  # a dtype that is asked for is the result's
            return _reduce(_sum, astype(x, dtype), axis, keepdims)
    if not is_inexact(x.dtype):
        x = astype(x, DTYPES["uint64"] if x.dtype.kind == "u" else DTYPES["int64"])
    return _reduce(_sum, x, axis, keepdims)


@as_one("mean")
def mean(x: Any, axis: Any = None, *, keepdims: bool = False) -> Any:
    """Arithmetic mean over axes; integers give float32."""
    x = promote_to_inexact(x)
    axes = normalize_axes(axis, x.ndim)
    count = math.prod(x.shape[a] for a in axes)
    return _divided(_sum(x, axes=axes, keepdims=bool(keepdims), wide=True), count, x)


def _divided(total: Any, count: float, x: Any) -> Any:
    """``total / count`` in the dtype of ``x``; NaN where the count is not positive."""
    return astype(total * (1.0 / count if count > 0 else float("nan")), x.dtype)


def max(x: Any, axis: Any = None, *, keepdims: bool = False) -> Any:
    """Largest element over axes. Raises ShapeError over an empty axis."""
    return _reduce(_max, x, axis, keepdims)


def min(x: Any, axis: Any = None, *, keepdims: bool = False) -> Any:
    """Smallest element over axes. Raises ShapeError over an empty axis."""
    return _reduce(_min, x, axis, keepdims)


def prod(x: Any, axis: Any = None, *, dtype: Any = None, keepdims: bool = False) -> Any:
    """Product over axes; dtypes as in ``sum``. The first gradient is right with zeros among the elements too."""
    if dtype is not None:
        with suspended():  # a dtype that is asked for is the result's
            return _reduce(_prod, astype(x, dtype), axis, keepdims)
    if not is_inexact(x.dtype):
        x = astype(x, DTYPES["uint64"] if x.dtype.kind == "u" else DTYPES["int64"])
    return _reduce(_prod, x, axis, keepdims)


@as_one("var")
def var(x: Any, axis: Any = None, *, correction: float = 0, keepdims: bool = False) -> Any:
    """Variance: the sum of squared deviations from the mean, over (count - correction); integers give float32.

    Arguments:
        correction: 0 for the variance of the values themselves, 1 for the unbiased estimate from a sample.
            A count no larger than the correction gives NaN.
    """
    x = promote_to_inexact(x)
    axes = normalize_axes(axis, x.ndim)
    count = math.prod(x.shape[a] for a in axes) - correction
    total = _sum(square(x - mean(x, axes, keepdims=True)), axes=axes, keepdims=bool(keepdims), wide=True)
    return _divided(total, count, x)


@as_one("std")
def std(x: Any, axis: Any = None, *, correction: float = 0, keepdims: bool = False) -> Any:
    """Standard deviation: the square root of ``var``."""
    return sqrt(var(x, axis, correction=correction, keepdims=keepdims))


def any(x: Any, axis: Any = None, *, keepdims: bool = False) -> Any:
    """True where any element over the axes is not zero (NaN counts as not zero); False over an empty axis."""
    return _reduce(_any, x, axis, keepdims)


def all(x: Any, axis: Any = None, *, keepdims: bool = False) -> Any:
    """True where no element over the axes is zero; True over an empty axis."""
    return _reduce(_all, x, axis, keepdims)


def argmax(x: Any, axis: int | None = None, *, keepdims: bool = False) -> Any:
    """Position (int64) of the first largest element along an axis, or in the flattened array when the axis is None.

    Raises:
        ShapeError: the axis is empty or out of range.
        DTypeError: complex numbers.
    """
    return _argmax(x, axis=None if axis is None else normalize_axis(axis, x.ndim), keepdims=bool(keepdims))


def argmin(x: Any, axis: int | None = None, *, keepdims: bool = False) -> Any:
    """Position (int64) of the first smallest element; see ``argmax``."""
    return _argmin(x, axis=None if axis is None else normalize_axis(axis, x.ndim), keepdims=bool(keepdims))


def logsumexp(x: Any, axis: Any = None, *, keepdims: bool = False) -> Any:
    """log of the sum of e^x over axes, without overflow; -inf where every element is. Integers give float32.

    Raises:
        ShapeError: an axis is empty.
    """
    return _reduce(_logsumexp, promote_to_inexact(x), axis, keepdims)
