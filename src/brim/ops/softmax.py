"""Softmax and its logarithm along one axis, with their own gradients (nothing but the result is kept in memory)."""

from __future__ import annotations

from typing import Any

from brim.op import composite
from brim.ops.arithmetic import astype, log, promote_to_inexact
from brim.ops.exponential import exp
from brim.ops.reduce import max as _max
from brim.ops.reduce import sum as _sum
from brim.spec import normalize_axis

__all__ = ["log_softmax", "softmax", "widened"]


def widened(x: Any) -> Any:
    """``x`` in the dtype that sums over many elements are computed in: float32 for float16 and bfloat16."""
    return astype(x, "float32") if x.dtype.itemsize == 2 else x


def _softmax_grad(g: Any, _x: Any, out: Any, *, axis: int) -> Any:
    return out * (g - _sum(g * out, axis=axis, keepdims=True))


def _log_softmax_grad(g: Any, _x: Any, out: Any, *, axis: int) -> Any:
    return g - exp(out) * _sum(g, axis=axis, keepdims=True)


@composite("softmax", vjp=_softmax_grad)
def _softmax(x: Any, *, axis: int) -> Any:
    """exp(x) / sum(exp(x)) along an axis"""
    wide = widened(x)
    e = exp(wide - _max(wide, axis=axis, keepdims=True))
    return astype(e / _sum(e, axis=axis, keepdims=True), x.dtype)


@composite("log_softmax", vjp=_log_softmax_grad)
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
