"""Reductions over axes: sum, mean, products, extremes, variance, logical any and all, logsumexp."""

from __future__ import annotations

from typing import Any

from brim.errors import ShapeError
from brim.op import Op, primitive
from brim.ops.arithmetic import astype, promote_to_inexact, where
from brim.spec import DTYPES, Shape, Spec, is_inexact, normalize_axes


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


_sum = primitive(
    "sum",
    _same_spec,
    vjp=lambda g, _x, _out, *, axes, keepdims: _spread(g, _x, axes),
    doc="sum over axes; float16 and bfloat16 are added up in float32",
)


def _extreme_spec(x: Spec, *, axes: tuple[int, ...], keepdims: bool) -> Spec:
    if any(x.shape[a] == 0 for a in axes):
        raise ShapeError(f"the extreme over an empty axis is undefined: shape {x.shape}, axes {axes}")
    return _same_spec(x, axes=axes, keepdims=keepdims)


def _extreme_grad(g: Any, x: Any, out: Any, *, axes: tuple[int, ...], keepdims: bool) -> Any:
    # Ties share the gradient evenly.
    hit = x == _spread(out, x, axes)
    count = _sum(hit.astype(x.dtype), axes=axes, keepdims=keepdims)
    return where(hit, _spread(g / count, x, axes), 0.0)


_max = primitive("max", _extreme_spec, vjp=_extreme_grad, doc="largest over axes; NaN if any is NaN")
_min = primitive("min", _extreme_spec, vjp=_extreme_grad, doc="smallest over axes; NaN if any is NaN")


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
        x = astype(x, dtype)
    elif not is_inexact(x.dtype):
        x = astype(x, DTYPES["uint64"] if x.dtype.kind == "u" else DTYPES["int64"])
    return _reduce(_sum, x, axis, keepdims)


def mean(x: Any, axis: Any = None, *, keepdims: bool = False) -> Any:
    """Arithmetic mean over axes; integers give float32."""
    x = promote_to_inexact(x)
    axes = normalize_axes(axis, x.ndim)
    count = 1
    for a in axes:
        count *= x.shape[a]
    return _sum(x, axes=axes, keepdims=bool(keepdims)) * (1.0 / count if count else float("nan"))


def max(x: Any, axis: Any = None, *, keepdims: bool = False) -> Any:
    """Largest element over axes. Raises ShapeError over an empty axis."""
    return _reduce(_max, x, axis, keepdims)


def min(x: Any, axis: Any = None, *, keepdims: bool = False) -> Any:
    """Smallest element over axes. Raises ShapeError over an empty axis."""
    return _reduce(_min, x, axis, keepdims)
