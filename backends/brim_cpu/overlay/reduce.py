"""Sum, max and min of float32 and float64 arrays without gaps, whatever the order of their axes; argmax and argmin."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from brim.spec import Spec
from brim_cpu.native import Function
from brim_cpu.overlay import NativeKernel, overlay

__all__ = ["memory_order", "merged_axes"]

_TYPES = {np.dtype("float32"): "f32", np.dtype("float64"): "f64"}
_NAMES = [f"{op}_{short}" for op in ("sum", "max", "min") for short in _TYPES.values()]
_RUNS = {name: Function(f"brim_{name}_runs", "pppiiii") for name in _NAMES}
_COLUMNS = {name: Function(f"brim_{name}_columns", "pppiii") for name in _NAMES}
_POSITION_TYPES = _TYPES | {np.dtype(np.int32): "i32", np.dtype(np.int64): "i64"}
_POSITION_TYPES |= {np.dtype(np.uint8): "u8", np.dtype(np.bool_): "u8"}
_POSITIONS = [f"{op}_{short}" for op in ("argmax", "argmin") for short in _POSITION_TYPES.values()]
_POSITION_RUNS = {name: Function(f"brim_{name}_runs", "pppii") for name in _POSITIONS}
_POSITION_COLUMNS = {name: Function(f"brim_{name}_columns", "ppiii") for name in _POSITIONS}
_SCRATCH = Function("brim_reduce_scratch", "piiii")


def memory_order(spec: Spec) -> list[int] | None:
    """The axes larger than 1 from the slowest to the fastest; None where elements do not lie side by side."""
    order = sorted((a for a in range(spec.ndim) if spec.shape[a] != 1), key=lambda a: -spec.strides[a])
    step = 1
    for axis in reversed(order):
        if spec.strides[axis] != step:
            return None
        step *= spec.shape[axis]
    return order


def merged_axes(spec: Spec, axes: Sequence[int]) -> tuple[int, int, int, int] | None:
    """Sizes (kept, reduced, kept, reduced) of the axes in memory, neighbours of a kind merged.

    None where there are more changes between the two kinds, or where the result would lie in another order.
    """
    order = memory_order(spec)
    kept = [axis for axis in order or () if axis not in axes]
    if order is None or kept != sorted(kept):
        return None
    sizes, reducing = [1], False
    for axis in order:
        if (axis in axes) is not reducing:
            reducing = not reducing
            sizes.append(1)
        sizes[-1] *= spec.shape[axis]
    return None if len(sizes) > 4 else tuple(sizes + [1] * (4 - len(sizes)))  # type: ignore[return-value]


def _scratch_numbers(sizes: tuple[int, int, int, int]) -> tuple[int, int]:
    found = np.zeros(2, np.int64)
    _SCRATCH.bind(found, *sizes)()
    return int(found[0]), int(found[1])


def _reduction(name: str, ins: Sequence[Any], outs: Sequence[Spec], axes: Sequence[int]) -> NativeKernel | None:
    (x,), (out,) = ins, outs
    if x.dtype not in _TYPES or out.dtype != x.dtype or not x.size or not out.contiguous:
        return None
    sizes = merged_axes(x, axes)
    if sizes is None:
        return None
    kept, reduced, inner, run = sizes
    if run == 1 and inner == 1:
        kept, reduced, inner, run = kept, 1, 1, reduced
    function = f"{name}_{_TYPES[x.dtype]}"
    of_runs, of_columns = _scratch_numbers((kept, reduced, inner, run))
    if run == 1 and inner > 1:

        def calls(y: Any, x: Any, scratch: Any = None) -> list[Any]:
            return [_COLUMNS[function].bind(y, scratch, x, kept, reduced, inner)]

        return NativeKernel(calls, of_columns * x.dtype.itemsize)

    def calls_of_runs(y: Any, x: Any, scratch: Any = None) -> list[Any]:
        return [_RUNS[function].bind(y, scratch, x, kept, reduced, inner, run)]

    return NativeKernel(calls_of_runs, of_runs * x.dtype.itemsize)


@overlay("sum")
def sum_(
    ins: Sequence[Any], outs: Sequence[Spec], *, axes: tuple[int, ...], keepdims: bool, wide: bool = False
) -> NativeKernel | None:
    """Pairwise along runs and columns."""
    return _reduction("sum", ins, outs, axes)


@overlay("max")
def max_(ins: Sequence[Any], outs: Sequence[Spec], *, axes: tuple[int, ...], keepdims: bool) -> NativeKernel | None:
    """NaN where one is."""
    return _reduction("max", ins, outs, axes)


@overlay("min")
def min_(ins: Sequence[Any], outs: Sequence[Spec], *, axes: tuple[int, ...], keepdims: bool) -> NativeKernel | None:
    """NaN where one is."""
    return _reduction("min", ins, outs, axes)


def _position(name: str, ins: Sequence[Any], outs: Sequence[Spec], axis: int | None) -> NativeKernel | None:
    (x,) = ins
    if x.dtype not in _POSITION_TYPES or not x.size or not outs[0].contiguous:
        return None
    first, last = (0, x.ndim) if axis is None else (axis, axis + 1)
    outer, count, inner = (math.prod(x.shape[a:b]) for a, b in ((0, first), (first, last), (last, x.ndim)))
    function = f"{name}_{_POSITION_TYPES[x.dtype]}"
    if inner > 1:

        def calls(y: Any, x: Any, scratch: Any = None) -> list[Any]:
            return [_POSITION_COLUMNS[function].bind(y, x, outer, count, inner)]

        return NativeKernel(calls, contiguous=True)
    numbers, _ = _scratch_numbers((outer, 1, 1, count))

    def calls_of_runs(y: Any, x: Any, scratch: Any = None) -> list[Any]:
        return [_POSITION_RUNS[function].bind(y, scratch, x, outer, count)]

    return NativeKernel(calls_of_runs, numbers * 8, contiguous=True)


@overlay("argmax")
def argmax(ins: Sequence[Any], outs: Sequence[Spec], *, axis: int | None, keepdims: bool) -> NativeKernel | None:
    """The first largest; the first NaN where there is one."""
    return _position("argmax", ins, outs, axis)


@overlay("argmin")
def argmin(ins: Sequence[Any], outs: Sequence[Spec], *, axis: int | None, keepdims: bool) -> NativeKernel | None:
    """The first smallest; the first NaN where there is one."""
    return _position("argmin", ins, outs, axis)
