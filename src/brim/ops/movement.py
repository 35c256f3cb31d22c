"""Ops that only read their input differently (views): reshape, permute, expand, slice; and what is built from them."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

from brim.errors import DTypeError, ShapeError
from brim.op import Op, primitive, view
from brim.ops.reduce import sum as _sum
from brim.spec import Scalar, Shape, Spec, as_shape, broadcast_shapes, normalize_axes, normalize_axis, row_major

SliceIndex = tuple[tuple[int, int, int], ...]
"""For every axis: start, step, count."""

# -------------------------------------------------------------------------------------------------- the four views


def _tidy(shape: Shape, dtype: Any, strides: tuple[int, ...]) -> Spec:
    plain = row_major(shape)
    same = all(dim == 1 or a == b for dim, a, b in zip(shape, strides, plain, strict=True)) or 0 in shape
    return Spec(shape, dtype, None if same else strides)


def _reshape_rule(x: Spec, *, shape: Shape) -> tuple[Spec, int] | None:
    if math.prod(shape) != x.size:
        raise ShapeError(f"cannot reshape {x.size} elements of shape {x.shape} into {shape}")
    if x.contiguous:
        return Spec(shape, x.dtype), 0
    # Both shapes are cut into runs with equal products; inside a run the old axes must lie evenly spaced.
    old = [(dim, stride) for dim, stride in zip(x.shape, x.strides, strict=True) if dim != 1]
    strides: list[int] = []
    at, new_axis = 0, 0
    while new_axis < len(shape):
        first, product_new = new_axis, shape[new_axis]
        new_axis += 1
        if product_new == 1:
            strides.append(1)
            continue
        run_first, product_old = at, old[at][0]
        at += 1
        while product_new != product_old:
            if product_new < product_old:
                product_new *= shape[new_axis]
                new_axis += 1
            else:
                product_old *= old[at][0]
                at += 1
        for k in range(run_first, at - 1):
            if old[k][1] != old[k + 1][0] * old[k + 1][1]:
                return None
        step = old[at - 1][1]
        run: list[int] = []
        for dim in reversed(shape[first:new_axis]):
            run.append(step)
            step *= dim
        strides.extend(reversed(run))
    return _tidy(shape, x.dtype, tuple(strides)), 0


def _permute_rule(x: Spec, *, axes: tuple[int, ...]) -> tuple[Spec, int]:
    strides = x.strides
    return _tidy(tuple(x.shape[a] for a in axes), x.dtype, tuple(strides[a] for a in axes)), 0


def _expand_rule(x: Spec, *, shape: Shape) -> tuple[Spec, int]:
    if len(shape) < x.ndim or broadcast_shapes(x.shape, shape) != shape:
        raise ShapeError(f"shape {x.shape} cannot be broadcast to {shape}")
    lead = len(shape) - x.ndim
    strides = (0,) * lead + tuple(
        0 if dim == 1 and want != 1 else stride
        for dim, want, stride in zip(x.shape, shape[lead:], x.strides, strict=True)
    )
    return _tidy(shape, x.dtype, strides), 0


def _slice_rule(x: Spec, *, index: SliceIndex) -> tuple[Spec, int]:
    """``index`` holds (start, step, count) for every axis."""
    offset = sum(start * stride for (start, _, count), stride in zip(index, x.strides, strict=True) if count)
    strides = tuple(step * stride for (_, step, _), stride in zip(index, x.strides, strict=True))
    shape = tuple(count for _, _, count in index)
    return _tidy(shape, x.dtype, strides), 0 if 0 in shape else offset


_reshape: Op = view("reshape", _reshape_rule, vjp=lambda g, _x, _out, *, shape: _reshape(g, shape=_x.shape))
_permute: Op = view(
    "permute_dims", _permute_rule, vjp=lambda g, _x, _out, *, axes: _permute(g, axes=_inverse_permutation(axes))
)
# The gradient of a broadcast is a sum over the new axes: autograd does that for every input anyway.
_expand: Op = view("broadcast_to", _expand_rule, vjp=lambda g, _x, _out, *, shape: g)


def _inverse_permutation(axes: tuple[int, ...]) -> tuple[int, ...]:
    inverse = [0] * len(axes)
    for position, axis in enumerate(axes):
        inverse[axis] = position
    return tuple(inverse)


# -------------------------------------------------------------------------------------------------- what users call


def reshape(x: Any, shape: int | Sequence[int], *, copy: bool | None = None) -> Any:
    """The same elements in row-major order under another shape; one size may be -1. A view where possible.

    Raises:
        ShapeError: the number of elements differs, or more than one -1.
    """
    dims = [operator.index(d) for d in (shape if isinstance(shape, Sequence) else (shape,))]
    if -1 in dims:
        rest = math.prod(d for d in dims if d != -1)
        if dims.count(-1) > 1 or (rest == 0) or x.size % rest:
            raise ShapeError(f"cannot reshape {x.size} elements of shape {x.shape} into {tuple(dims)}")
        dims[dims.index(-1)] = x.size // rest
    out = _reshape(x, shape=as_shape(dims))
    return out.copy() if copy else out


def permute_dims(x: Any, axes: Sequence[int]) -> Any:
    """A view with the axes in another order. Raises ShapeError unless every axis is named once."""
    order = tuple(normalize_axis(a, x.ndim) for a in axes)
    if sorted(order) != list(range(x.ndim)):
        raise ShapeError(f"permute_dims needs each of the {x.ndim} axes once, got {tuple(axes)}")
    return _permute(x, axes=order)


def broadcast_to(x: Any, shape: Sequence[int]) -> Any:
    """A view of ``x`` repeated along axes of size 1 (stride 0, no copy)."""
    return _expand(x, shape=as_shape(shape))


def sum_to(x: Any, shape: Shape) -> Any:
    """``x`` summed over the axes along which ``shape`` broadcasts to ``x.shape``: the transpose of broadcasting."""
    lead = x.ndim - len(shape)
    axes = tuple(range(lead)) + tuple(
        lead + i for i, (want, have) in enumerate(zip(shape, x.shape[lead:], strict=True)) if want == 1 and have != 1
    )
    return reshape(_sum(x, axis=axes, keepdims=True, dtype=x.dtype), shape)


# ------------------------------------------------------------------------------------------- slices and axes of size 1


def _inside(index: SliceIndex, spec: Spec) -> None:
    if len(index) != spec.ndim:
        raise ShapeError(f"a slice of shape {spec.shape} needs {spec.ndim} entries, got {len(index)}")


def _set_slice_spec(x: Spec | Scalar, values: Spec | Scalar, *, index: SliceIndex, shape: Shape) -> Spec:
    whole = x if isinstance(x, Spec) else Spec(shape, values.dtype) if isinstance(values, Spec) else None
    if whole is None:
        raise DTypeError("set_slice needs at least one tensor")
    _inside(index, whole)
    if isinstance(values, Spec):
        want = (1, *(count for _, _, count in index))
        if values.shape != want or values.dtype != whole.dtype:
            raise ShapeError(f"set_slice needs values {Spec(want, whole.dtype)}, got {values}")
    return Spec(whole.shape, whole.dtype)


set_slice: Op = primitive(
    "set_slice",
    _set_slice_spec,
    vjp=lambda g, _x, _values, _out, *, index, shape: (
        lambda: set_slice(g, 0.0, index=index, shape=shape),
        lambda: _slice(g, index=index).reshape(_values.shape),
    ),
    arity=2,
    doc="x (or one number everywhere) with values written into a slice; values have a leading axis of size 1",
)
# The transpose of a slice. ``values`` has one axis more than ``x``, so the two can never share memory in place.

_slice: Op = view(
    "slice",
    _slice_rule,
    vjp=lambda g, _x, _out, *, index: set_slice(0.0, expand_dims(g, 0), index=index, shape=_x.shape),
    doc="a view of every step-th element from a start on, for each axis",
)


def slice_axis(x: Any, axis: int, start: int, step: int, count: int) -> Any:
    """A view of ``count`` elements along one axis: start, start + step, ...; nothing is checked."""
    index = tuple((start, step, count) if a == axis else (0, 1, dim) for a, dim in enumerate(x.shape))
    return _slice(x, index=index)


def expand_dims(x: Any, axis: int | Sequence[int] = 0) -> Any:
    """New axes of size 1 at these positions of the result. Raises ShapeError when out of range or named twice."""
    count = len(axis) if isinstance(axis, Sequence) else 1
    axes = normalize_axes(axis, x.ndim + count)
    rest = iter(x.shape)
    return reshape(x, tuple(1 if a in axes else next(rest) for a in range(x.ndim + count)))


def squeeze(x: Any, axis: int | Sequence[int] | None = None) -> Any:
    """Without these axes, which must have size 1; None drops all axes of size 1."""
    axes = tuple(a for a, dim in enumerate(x.shape) if dim == 1) if axis is None else normalize_axes(axis, x.ndim)
    for a in axes:
        if x.shape[a] != 1:
            raise ShapeError(f"cannot squeeze axis {a} of shape {x.shape}: its size is {x.shape[a]}, not 1")
    return reshape(x, tuple(dim for a, dim in enumerate(x.shape) if a not in axes))


def flip(x: Any, axis: int | Sequence[int] | None = None) -> Any:
    """A view with the order along these axes (None: all) turned round."""
    axes = normalize_axes(axis, x.ndim)
    return _slice(x, index=tuple((dim - 1, -1, dim) if a in axes else (0, 1, dim) for a, dim in enumerate(x.shape)))


def moveaxis(x: Any, source: int | Sequence[int], destination: int | Sequence[int]) -> Any:
    """A view with some axes moved to other positions; the others keep their order."""
    given = (source,) if not isinstance(source, Sequence) else tuple(source)
    wanted = (destination,) if not isinstance(destination, Sequence) else tuple(destination)
    if len(given) != len(wanted):
        raise ShapeError(f"moveaxis needs as many destinations as sources, got {given} and {wanted}")
    normalize_axes(given, x.ndim)  # raises for an axis that is named twice
    normalize_axes(wanted, x.ndim)
    moves = {normalize_axis(d, x.ndim): normalize_axis(s, x.ndim) for s, d in zip(given, wanted, strict=True)}
    rest = iter(a for a in range(x.ndim) if a not in moves.values())
    return _permute(x, axes=tuple(moves[a] if a in moves else next(rest) for a in range(x.ndim)))


def swapaxes(x: Any, axis1: int, axis2: int) -> Any:
    """A view with two axes exchanged."""
    order = list(range(x.ndim))
    a, b = normalize_axis(axis1, x.ndim), normalize_axis(axis2, x.ndim)
    order[a], order[b] = b, a
    return _permute(x, axes=tuple(order))


def flatten(x: Any, start_axis: int = 0, end_axis: int = -1) -> Any:
    """The axes from ``start_axis`` to ``end_axis`` (both included) made one."""
    if x.ndim == 0:
        return reshape(x, (1,))
    first, last = normalize_axis(start_axis, x.ndim), normalize_axis(end_axis, x.ndim)
    if first > last:
        raise ShapeError(f"flatten needs start_axis <= end_axis, got {start_axis} and {end_axis}")
    return reshape(x, (*x.shape[:first], math.prod(x.shape[first : last + 1]), *x.shape[last + 1 :]))
