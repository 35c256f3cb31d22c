"""Ops that put tensors together, take them apart or repeat them: concat, split, tile, repeat, roll, pad, triangles."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np

from brim.errors import DTypeError, ShapeError
from brim.op import Op, primitive
from brim.ops.arithmetic import astype
from brim.ops.compare import equal
from brim.ops.movement import broadcast_to, expand_dims, reshape, set_slice, slice_axis, squeeze
from brim.spec import DTYPES, Spec, as_dtype, as_shape, normalize_axis, promote


def _concat_spec(*xs: Spec, axis: int) -> Spec:
    first = xs[0]
    for position, x in enumerate(xs):
        same = x.ndim == first.ndim and all(
            a == b for d, (a, b) in enumerate(zip(x.shape, first.shape, strict=True)) if d != axis
        )
        if not same:
            raise ShapeError(
                f"concat along axis {axis}: all other sizes must be equal; input 0 has shape {first.shape}, "
                f"input {position} {x.shape}"
            )
    total = sum(x.shape[axis] for x in xs)
    return Spec((*first.shape[:axis], total, *first.shape[axis + 1 :]), first.dtype)


def _concat_grad(g: Any, _xs: Any, _out: Any, *, axis: int) -> list[Any]:
    found, start = [], 0
    for x in _xs:
        count = x.shape[axis]
        found.append(lambda start=start, count=count: slice_axis(g, axis, start, 1, count))
        start += count
    return found


_concat: Op = primitive(
    "concat", _concat_spec, vjp=_concat_grad, arity=None, doc="tensors one after another along an axis"
)


def concat(xs: Sequence[Any], axis: int | None = 0) -> Any:
    """Tensors one after another along an existing axis (None: each flattened first), in their common dtype.

    Raises:
        ShapeError: no tensors, or sizes that differ along another axis.
    """
    parts = list(xs)
    if not parts:
        raise ShapeError("concat and stack need at least one tensor")
    if axis is None:
        parts, axis = [reshape(x, (x.size,)) for x in parts], 0
    dtype = promote(*(x.dtype for x in parts))
    return _concat([astype(x, dtype) for x in parts], axis=normalize_axis(axis, parts[0].ndim))


def stack(xs: Sequence[Any], axis: int = 0) -> Any:
    """Tensors of one shape side by side along a new axis."""
    parts = list(xs)
    for position, x in enumerate(parts):
        if x.shape != parts[0].shape:
            raise ShapeError(f"stack needs equal shapes; input 0 has {parts[0].shape}, input {position} has {x.shape}")
    return concat([expand_dims(x, axis) for x in parts], normalize_axis(axis, parts[0].ndim + 1) if parts else 0)


def split(x: Any, sections: int | Sequence[int], axis: int = 0) -> tuple[Any, ...]:
    """Views of consecutive pieces along an axis.

    Arguments:
        sections: the number of pieces of equal size, or the size of every piece.

    Raises:
        ShapeError: the pieces do not add up to the axis.
    """
    axis = normalize_axis(axis, x.ndim)
    size = x.shape[axis]
    if isinstance(sections, Sequence):
        sizes = as_shape(sections)
    else:
        pieces = operator.index(sections)
        if pieces < 1 or size % pieces:
            raise ShapeError(f"cannot split axis {axis} of size {size} into {pieces} equal pieces; give their sizes")
        sizes = (size // pieces,) * pieces
    if sum(sizes) != size:
        raise ShapeError(f"pieces of sizes {sizes} add up to {sum(sizes)}, axis {axis} has size {size}")
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return tuple(slice_axis(x, axis, start, 1, count) for start, count in zip(starts, sizes, strict=True))


def unstack(x: Any, axis: int = 0) -> tuple[Any, ...]:
    """Views of the entries along an axis, which is gone from them."""
    axis = normalize_axis(axis, x.ndim)
    return tuple(squeeze(slice_axis(x, axis, i, 1, 1), axis) for i in range(x.shape[axis]))


def tile(x: Any, repetitions: int | Sequence[int]) -> Any:
    """``x`` laid side by side this often along each axis (aligned from the right)."""
    times = as_shape(repetitions)
    ndim = max(len(times), x.ndim)
    times = (1,) * (ndim - len(times)) + times
    shape = (1,) * (ndim - x.ndim) + x.shape
    pairs = tuple(d for dim in shape for d in (1, dim))
    wide = tuple(d for n, dim in zip(times, shape, strict=True) for d in (n, dim))
    return reshape(broadcast_to(reshape(x, pairs), wide), tuple(n * dim for n, dim in zip(times, shape, strict=True)))


def repeat(x: Any, repeats: int, axis: int | None = None) -> Any:
    """Every element this often in a row along an axis (None: of the flattened tensor)."""
    (times,) = as_shape(repeats)
    if axis is None:
        x, axis = reshape(x, (x.size,)), 0
    axis = normalize_axis(axis, x.ndim)
    shape = x.shape
    wide = broadcast_to(expand_dims(x, axis + 1), (*shape[: axis + 1], times, *shape[axis + 1 :]))
    return reshape(wide, (*shape[:axis], shape[axis] * times, *shape[axis + 1 :]))


def roll(x: Any, shift: int | Sequence[int], axis: int | Sequence[int] | None = None) -> Any:
    """Elements moved by ``shift`` along axes; what leaves at one end comes in at the other."""
    if axis is None:
        if isinstance(shift, Sequence):
            raise ShapeError("roll of the flattened tensor (axis=None) takes one shift")
        return reshape(roll(reshape(x, (x.size,)), shift, 0), x.shape)
    axes = (axis,) if not isinstance(axis, Sequence) else tuple(axis)
    shifts = (shift,) * len(axes) if not isinstance(shift, Sequence) else tuple(shift)
    if len(shifts) != len(axes):
        raise ShapeError(f"roll needs one shift an axis, got {len(shifts)} shifts for {len(axes)} axes")
    for one, a in zip(shifts, axes, strict=True):
        at = normalize_axis(a, x.ndim)
        size = x.shape[at]
        cut = operator.index(one) % size if size else 0
        if cut:
            x = _concat([slice_axis(x, at, size - cut, 1, cut), slice_axis(x, at, 0, 1, size - cut)], axis=at)
    return x


def pad(x: Any, widths: int | Sequence[Any], *, value: float = 0.0) -> Any:
    """``x`` with a border of one value.

    Arguments:
        widths: a pair (before, after) for every axis; or one pair, or one int, for all axes.
        value: what stands in the border.
    """
    given: Any = widths
    if not isinstance(given, Sequence):
        given = (given, given)
    if given and not isinstance(given[0], Sequence):
        if len(given) != 2:
            raise ShapeError(f"pad takes one int, one pair (before, after) or a pair an axis, got {widths}")
        given = (tuple(given),) * x.ndim
    if len(given) != x.ndim or any(len(pair) != 2 for pair in given):
        raise ShapeError(f"pad needs a pair (before, after) for each of the {x.ndim} axes, got {widths}")
    pairs = [as_shape(pair) for pair in given]
    index = tuple((before, 1, dim) for (before, _), dim in zip(pairs, x.shape, strict=True))
    shape = tuple(before + dim + after for (before, after), dim in zip(pairs, x.shape, strict=True))
    return set_slice(value, expand_dims(x, 0), index=index, shape=shape)


def _triangle_spec(x: Spec, *, k: int, upper: bool) -> Spec:
    if x.ndim < 2:
        raise ShapeError(f"tril and triu need at least two axes, got shape {x.shape}")
    return Spec(x.shape, x.dtype)


_triangle: Op = primitive(
    "triangle",
    _triangle_spec,
    vjp=lambda g, _x, _out, *, k, upper: _triangle(g, k=k, upper=upper),
    doc="x with zeros above (or below) diagonal k of its last two axes",
)


def tril(x: Any, k: int = 0) -> Any:
    """``x`` with zeros above diagonal ``k`` of the last two axes (0: the main one, positive: further right)."""
    return _triangle(x, k=operator.index(k), upper=False)


def triu(x: Any, k: int = 0) -> Any:
    """``x`` with zeros below diagonal ``k`` of the last two axes (0: the main one, positive: further right)."""
    return _triangle(x, k=operator.index(k), upper=True)


def one_hot(indices: Any, num_classes: int, *, dtype: Any = DTYPES["float32"]) -> Any:
    """``out[..., c] = 1 where indices[...] == c, else 0``; an index outside 0..num_classes-1 gives zeros.

    Arguments:
        indices: integer tensor of any shape.
        num_classes: size of the new last axis.
    """
    if indices.dtype.kind not in "iu":
        raise DTypeError(f"one_hot needs integer indices, got {indices.dtype}; convert with astype('int64')")
    return astype(equal(expand_dims(indices, indices.ndim), np.arange(num_classes)), as_dtype(dtype))


__all__ = [
    "concat", "one_hot", "pad", "repeat", "roll", "split", "stack", "tile", "tril", "triu", "unstack",
]  # fmt: skip
