"""Reductions of many tensors together to one number: what a step wants to know of all of its gradients."""

from __future__ import annotations

from typing import Any

from brim.op import composite
from brim.ops.arithmetic import abs, astype
from brim.ops.compare import isfinite
from brim.ops.join import stack
from brim.ops.reduce import all, sum
from brim.spec import is_complex

__all__ = ["all_finite", "squares_sum"]


@composite("squares_sum")
def squares_sum(*xs: Any) -> Any:
    """sum of the squared absolute values of all elements of all inputs; half widths in float32"""
    return sum(stack([_squares(x) for x in xs]))


def _squares(x: Any) -> Any:
    if is_complex(x.dtype):
        x = abs(x)
    elif x.dtype.itemsize < 4:
        x = astype(x, "float32")
    if x.size == 0:
        return sum(x)
    # The rows' products with themselves: the squares are never there as an array of their own.
    rows = x.reshape((x.shape[0] if x.ndim > 1 else 1, 1, -1))
    return sum(rows @ rows.mT)


@composite("all_finite")
def all_finite(factor: Any, *xs: Any) -> Any:
    """whether factor * x is finite for every element of every input x, in the dtype of x"""
    return all(stack([all(isfinite(x * astype(factor, x.dtype))) for x in xs]))
