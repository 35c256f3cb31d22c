"""Reductions over axes: sum, prod, max, min, any, all, and the positions argmax and argmin.

NumPy reduces without temporaries when it needs no conversion. Where it does (the half-width floats are added up in
float32, any and all of numbers), and where a long float32 sum down the columns would add up rounding errors one by one,
the input is taken block by block and the blocks' results are combined.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from brim_cpu.blocks import BLOCK_ELEMENTS, as_float32, blocks, carve, carve_bytes
from brim_cpu.registry import Specs, kernel

Array = np.ndarray[Any, Any]

_LONG_COLUMN = 4096
"""Rows from which a float32 sum down the columns is cut into blocks: NumPy adds those one after another."""


def _kept_shape(shape: tuple[int, ...], axes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(1 if axis in axes else dim for axis, dim in enumerate(shape))


def _compute_dtype(name: str, dtype: np.dtype[Any]) -> np.dtype[Any]:
    return np.dtype(bool) if name in ("any", "all") else as_float32(dtype)


def _blockwise(name: str, x: Any, axes: tuple[int, ...], compute: np.dtype[Any]) -> bool:
    if x.dtype != compute:
        return True
    if name != "sum" or compute != np.float32 or not axes or _memory_order(x)[-1] in axes:
        return False
    return math.prod(x.shape[axis] for axis in axes) > _LONG_COLUMN


def _memory_order(x: Any) -> list[int]:
    """The axes of an array or Spec from the slowest to the one along which neighbours are neighbours in memory."""
    steps = [abs(step) if dim > 1 else math.inf for dim, step in zip(x.shape, x.strides, strict=True)]
    return sorted(range(len(steps)), key=lambda axis: -steps[axis])


def _parts(x: Any, axes: tuple[int, ...], compute: np.dtype[Any]) -> list[tuple[tuple[int, ...], Any]]:
    """Scratch: the result in the compute dtype, one converted block, one block's result."""
    block = min(BLOCK_ELEMENTS, max(1, x.size))
    return [(_kept_shape(x.shape, axes), compute), ((block,), compute), ((block,), compute)]


def _reduction(name: str, ufunc: Any, start: Callable[[np.dtype[Any]], Any]) -> None:
    """Register the kernel ``name``: ``ufunc`` over ``axes``; ``start`` is its neutral element."""

    def scratch_bytes(ins: Specs, outs: Specs, *, axes: tuple[int, ...], **params: Any) -> int:
        x: Any = ins[0]
        compute = _compute_dtype(name, x.dtype)
        return carve_bytes(*_parts(x, axes, compute)) if _blockwise(name, x, axes, compute) else 0

    def run(
        out: Array, x: Array, *, scratch: Any = None, axes: tuple[int, ...], keepdims: bool, wide: bool = False
    ) -> None:
        compute = _compute_dtype(name, x.dtype)
        if not _blockwise(name, x, axes, compute):
            ufunc.reduce(x, axis=axes, out=out, keepdims=keepdims)
            return
        kept = out.reshape(_kept_shape(x.shape, axes))
        order = _memory_order(x)
        x, kept, axes = x.transpose(order), kept.transpose(order), tuple(order.index(axis) for axis in axes)
        total, converted, partial = carve(scratch, *_parts(x, axes, compute))
        total.fill(start(compute))
        if name == "sum" and x.dtype == compute and _is_table(x, axes):
            _sum_columns(total.reshape(-1), x.reshape(-1, total.size), converted, partial)
            np.copyto(kept, total)
            return
        for index in blocks(x.shape) if x.size else ():
            _add_block(ufunc, total, x, index, axes, converted, partial)
        np.copyto(kept, total, casting="unsafe")

    def prepare(
        out: Array, x: Array, *, scratch: Any = None, axes: tuple[int, ...], keepdims: bool, wide: bool = False
    ) -> list[Callable[[], None]] | None:
        if _blockwise(name, x, axes, _compute_dtype(name, x.dtype)):
            return None
        return [partial(ufunc.reduce, x, axis=axes, out=out, keepdims=keepdims)]

    kernel(name, scratch=scratch_bytes, prepare=prepare)(run)


def _is_table(x: Array, axes: tuple[int, ...]) -> bool:
    """True when an array is a matrix in memory of which every column is added up."""
    columns = math.prod(x.shape[len(axes) :])
    return axes == tuple(range(len(axes))) and x.flags.c_contiguous and 0 < columns <= BLOCK_ELEMENTS


def _sum_columns(total: Array, table: Array, ones: Array, partial: Array) -> None:
    """Add up rows, block by block: a product with ones takes a third of the time of ``np.add.reduce``."""
    step = max(1, min(table.shape[0], ones.size, BLOCK_ELEMENTS // total.size))
    ones, partial = ones[:step], partial[: total.size]
    ones.fill(1)
    for start in range(0, table.shape[0], step):
        rows = table[start : start + step]
        np.matmul(ones[: rows.shape[0]], rows, out=partial)
        np.add(total, partial, out=total)


def _add_block(
    ufunc: Any,
    total: Array,
    x: Array,
    index: tuple[slice | int, ...],
    axes: tuple[int, ...],
    converted: Array,
    partial: Array,
) -> None:
    """Combine one block of ``x`` into the part of ``total`` that it belongs to."""
    # Integers in the index become slices of length one, so that axes keep their numbers.
    whole = tuple(slice(i, i + 1) if isinstance(i, int) else i for i in index)
    piece = x[whole] if whole else x
    if x.dtype != total.dtype:
        block = converted[: piece.size].reshape(piece.shape)
        np.copyto(block, piece, casting="unsafe")
        piece = block
    target = total[tuple(slice(None) if axis in axes else part for axis, part in enumerate(whole))] if whole else total
    result = partial[: target.size].reshape(target.shape)
    ufunc.reduce(piece, axis=axes, out=result, keepdims=True)
    ufunc(target, result, out=target)


def _lowest(dtype: np.dtype[Any]) -> Any:
    return False if dtype.kind == "b" else -np.inf if dtype.kind == "f" else np.iinfo(dtype).min


def _highest(dtype: np.dtype[Any]) -> Any:
    return True if dtype.kind == "b" else np.inf if dtype.kind == "f" else np.iinfo(dtype).max


_reduction("sum", np.add, lambda dtype: 0)
_reduction("prod", np.multiply, lambda dtype: 1)
_reduction("max", np.maximum, _lowest)
_reduction("min", np.minimum, _highest)
_reduction("any", np.logical_or, lambda dtype: False)
_reduction("all", np.logical_and, lambda dtype: True)


# ------------------------------------------------------------------------------------------------------- positions


def _position_scratch(ins: Specs, outs: Specs, **params: Any) -> int:
    x: Any = ins[0]
    return carve_bytes(((min(BLOCK_ELEMENTS, max(1, x.size)),), as_float32(x.dtype)))


def _first(x: Array, block: Array, largest: bool) -> int:
    """Position, in row-major order, of the first NaN or else of the first extreme element."""
    best, position, seen = None, 0, 0
    for index in blocks(x.shape):
        piece = x[index] if index else x
        flat = block[: piece.size]
        np.copyto(flat.reshape(piece.shape), piece, casting="unsafe")
        at = int(flat.argmax() if largest else flat.argmin())
        value = flat[at]
        if best is None or (best == best and (value != value or (value > best if largest else value < best))):
            best, position = value, seen + at
        seen += piece.size
    return position


def _positions(out: Array, x: Array, scratch: Array, axis: int | None, keepdims: bool, largest: bool) -> None:
    # NumPy copies its whole input unless the axis is the last of a row-major array: blocks keep that copy small.
    (block,) = carve(scratch, ((min(BLOCK_ELEMENTS, max(1, x.size)),), as_float32(x.dtype)))
    if axis is None:
        out[...] = _first(x, block, largest)
        return
    lines = np.moveaxis(x, axis, -1)
    target = np.moveaxis(out, axis, -1)[..., 0] if keepdims else out
    if lines.shape[-1] > block.size:
        for line in np.ndindex(lines.shape[:-1]):
            target[line] = _first(lines[line], block, largest)
        return
    for index in blocks(lines.shape):
        piece = lines[index] if index else lines
        part = block[: piece.size].reshape(piece.shape)
        np.copyto(part, piece, casting="unsafe")
        into = target[index] if index else target
        if largest:
            part.argmax(axis=-1, out=into)
        else:
            part.argmin(axis=-1, out=into)


@kernel("argmax", scratch=_position_scratch)
def argmax(out: Array, x: Array, *, scratch: Any = None, axis: int | None, keepdims: bool) -> None:
    """Position of the first largest element; the first NaN where there is one."""
    _positions(out, x, scratch, axis, keepdims, largest=True)


@kernel("argmin", scratch=_position_scratch)
def argmin(out: Array, x: Array, *, scratch: Any = None, axis: int | None, keepdims: bool) -> None:
    """Position of the first smallest element; the first NaN where there is one."""
    _positions(out, x, scratch, axis, keepdims, largest=False)
