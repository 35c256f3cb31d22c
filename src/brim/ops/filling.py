"""Tensors made from numbers alone: one number everywhere, and evenly spaced numbers."""

from __future__ import annotations

from brim.op import Op, primitive
from brim.spec import Spec

__all__ = ["fill", "iota"]

fill: Op = primitive(
    "fill",
    lambda value, *, shape, dtype, device: Spec(shape, dtype),
    doc="one number everywhere",
)
iota: Op = primitive(
    "iota",
    lambda start, step, *, count, last, dtype, device: Spec((count,), dtype),
    arity=2,
    doc="start + i * step; floats are computed in float64 and rounded once",
)
