"""Softmax, plain and causal, and its logarithm, with their own gradients (nothing but the result is kept in memory).

The gradients are composites without gradients of their own: where a backend has no kernel for them, or where they are
differentiated again, their bodies run and the ops in these record themselves.
"""

from __future__ import annotations

import math
from typing import Any

from brim.autocast import as_one
from brim.errors import ShapeError
from brim.op import composite
from brim.ops.arithmetic import astype, log, promote_to_inexact, where
from brim.ops.exponential import exp
from brim.ops.filling import iota
from brim.ops.movement import reshape
from brim.ops.reduce import max as _max
from brim.ops.reduce import sum as _sum
from brim.spec import DTYPES, normalize_axis

__all__ = ["causal_softmax", "log_softmax", "softmax", "widened"]


def widened(x: Any) -> Any:
    """``x`` in the dtype that sums over many elements are computed in: float32 for float16 and bfloat16."""
    return astype(x, "float32") if x.dtype.itemsize == 2 else x


@composite("softmax_grad")
def _softmax_grad(g: Any, out: Any, *, axis: int) -> Any:
    """the gradient of softmax: out (g - sum(g out)) along an axis"""
    return out * (g - _sum(g * out, axis=axis, keepdims=True))


@composite("log_softmax_grad")
def _log_softmax_grad(g: Any, out: Any, *, axis: int) -> Any:
    """the gradient of log_softmax: g - exp(out) sum(g) along an axis"""
    return g - exp(out) * _sum(g, axis=axis, keepdims=True)


@composite("softmax", vjp=lambda g, _x, out, *, axis: _softmax_grad(g, out, axis=axis))
def _softmax(x: Any, *, axis: int) -> Any:
    """exp(x) / sum(exp(x)) along an axis"""
    wide = widened(x)
    e = exp(wide - _max(wide, axis=axis, keepdims=True))
    return astype(e / _sum(e, axis=axis, keepdims=True), x.dtype)


@composite("log_softmax", vjp=lambda g, _x, out, *, axis: _log_softmax_grad(g, out, axis=axis))
def _log_softmax(x: Any, *, axis: int) -> Any:
    """x - log(sum(exp(x))) along an axis"""
    wide = widened(x)
    z = wide - _max(wide, axis=axis, keepdims=True)
    return astype(z - log(_sum(exp(z), axis=axis, keepdims=True)), x.dtype)


def softmax(x: Any, axis: int = -1) -> Any:
    """``exp(x) / sum(exp(x))`` along ``axis``; the largest element is subtracted first, so nothing overflows."""
    x = promote_to_inexact(x)
    return _softmax(x, axis=normalize_axis(axis, x.ndim))


def log_softmax(x: Any, axis: int = -1) -> Any:
    """``x - log(sum(exp(x)))`` along ``axis``, without overflow and without taking the logarithm of a tiny number."""
    x = promote_to_inexact(x)
    return _log_softmax(x, axis=normalize_axis(axis, x.ndim))


# ------------------------------------------------------------------------------------------------------------- causal


def _lower_triangle(x: Any) -> Any:
    """(R, C) of bools: row r sees the columns up to r."""
    rows, columns = (
        iota(0, 1, count=count, last=None, dtype=DTYPES["int32"], device=x.device.name) for count in x.shape[-2:]
    )
    return reshape(rows, (-1, 1)) >= columns


@composite("causal_softmax_grad")
def _causal_softmax_grad(g: Any, out: Any, *, scale: float) -> Any:
    """the gradient of causal_softmax; 0 right of the diagonal, whatever is given there"""
    seen = _lower_triangle(g)
    return _softmax_grad(where(seen, g, 0.0), where(seen, out, 0.0), axis=g.ndim - 1) * scale


@composite("causal_softmax", vjp=lambda g, _x, out, *, scale: _causal_softmax_grad(g, out, scale=scale))
def _causal_softmax(x: Any, *, scale: float) -> Any:
    """softmax of x * scale over the last axis, row r of the last two seeing only the columns up to r"""
    return _softmax(where(_lower_triangle(x), x * scale, -math.inf), axis=x.ndim - 1)


@as_one("causal_softmax")
def causal_softmax(x: Any, *, scale: float = 1.0, visible: Any = None) -> Any:
    """``softmax(x * scale)`` over the last axis, where row r of the last two axes sees only the columns up to r.

    A backend with a kernel for it reads and computes only what is seen; elsewhere it is ``where`` and ``softmax``.

    Arguments:
        x: scores (..., R, C) of floats.
        scale: factor of the scores.
        visible: bools (R, C), True up to the diagonal, where they are at hand: they are not made again then.

    Raises:
        ShapeError: x has fewer than two axes, or visible is not (R, C).
    """
    if x.ndim < 2:
        raise ShapeError(f"causal_softmax needs scores (..., rows, columns), got shape {x.shape}")
    if visible is not None and visible.shape != x.shape[-2:]:
        raise ShapeError(f"scores {x.shape} need visible of shape {x.shape[-2:]}, got {visible.shape}")
    x = promote_to_inexact(x)
    if _causal_softmax.has_kernel(x.device, x, scale=float(scale)):
        return _causal_softmax(x, scale=float(scale))
    seen = _lower_triangle(x) if visible is None else visible
    return softmax(where(seen, x * scale, -math.inf))
