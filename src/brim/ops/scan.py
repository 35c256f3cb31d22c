"""Running results along an axis: cumulative sums."""

from __future__ import annotations

from typing import Any

from brim.autocast import suspended
from brim.errors import ShapeError
from brim.op import Op, primitive
from brim.ops.arithmetic import astype
from brim.spec import DTYPES, Spec, is_inexact, normalize_axis


def _spec(x: Spec, *, axis: int, reverse: bool, include_initial: bool) -> Spec:
    return Spec(tuple(dim + (include_initial and i == axis) for i, dim in enumerate(x.shape)), x.dtype)


def _grad(g: Any, _x: Any, _out: Any, *, axis: int, reverse: bool, include_initial: bool) -> Any:
    # Element i counts in every sum after it, so its gradient is the sum of theirs: the same scan, the other way round.
    if include_initial:
        kept = slice(None, -1) if reverse else slice(1, None)
        g = g[(*(slice(None),) * axis, kept)]
    return _cumulative_sum(g, axis=axis, reverse=not reverse, include_initial=False)


_cumulative_sum: Op = primitive("cumulative_sum", _spec, vjp=_grad, doc="running sum along an axis")


def cumulative_sum(
    x: Any, axis: int | None = None, *, dtype: Any = None, include_initial: bool = False, reverse: bool = False
) -> Any:
    """Sum of the elements up to and with each one, along an axis. Integers and bools are added in int64 or uint64.

    Arguments:
        axis: may be left out for an array of one axis.
        dtype: dtype to convert to before adding.
        include_initial: begin with the empty sum 0; the axis is then one longer.
        reverse: sum from the end towards the start.

    Raises:
        ShapeError: a scalar, no axis for an array of several, or an axis out of range.
    """
    if x.ndim == 0 or (axis is None and x.ndim != 1):
        raise ShapeError(f"cumulative_sum of an array of {x.ndim} axes: name one axis to sum along")
    along = normalize_axis(0 if axis is None else axis, x.ndim)
    how = {"axis": along, "reverse": bool(reverse), "include_initial": bool(include_initial)}
    if dtype is not None:
        with suspended():  # a dtype that is asked for is the result's
            return _cumulative_sum(astype(x, dtype), **how)
    if not is_inexact(x.dtype):
        x = astype(x, DTYPES["uint64"] if x.dtype.kind == "u" else DTYPES["int64"])
    return _cumulative_sum(x, **how)
