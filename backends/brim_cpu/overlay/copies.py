"""Copies of elements as they are, of any dtype and strides: copy, set_slice, concat."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from brim.backend import ScalarCell
from brim.spec import Spec
from brim_cpu.kernels.movement import python_slice, same_elements
from brim_cpu.native import Call, Function
from brim_cpu.overlay import SMALL_BYTES, NativeKernel, overlay, small_numpy

__all__ = ["as_array", "copy_calls"]

Array = np.ndarray[Any, Any]

_COPY = Function("brim_copy", "ppp")

_PLAIN_BYTES = 512 * 1024
"""NumPy copies runs as fast as one thread can: only what is larger is worth binding several calls in eager code."""


def _plan(to: Array, source: Array) -> Array:
    """What ``brim_copy`` reads: the axes larger than 1, merged where they can be, slowest of the target first."""
    axes = sorted(
        (axis for axis in zip(to.shape, to.strides, source.strides, strict=True) if axis[0] != 1),
        key=lambda axis: (-axis[1], -abs(axis[2])),
    )
    merged: list[tuple[int, int, int]] = []
    for size, to_step, from_step in axes:
        if merged and merged[-1][1:] == (size * to_step, size * from_step):
            size *= merged.pop()[0]
        merged.append((size, to_step, from_step))
    merged = merged or [(1, to.itemsize, to.itemsize)]
    return np.array([to.itemsize, len(merged), *(number for axis in merged for number in axis)], np.int64)


def copy_calls(to: Array, source: Array) -> list[Call]:
    """The calls that copy ``source``, broadcast, into ``to``: none where there is nothing to do."""
    source = np.broadcast_to(source, to.shape)
    if not to.size or same_elements(to, source):
        return []
    forward: Any = (*(slice(None, None, -1 if step < 0 else 1) for step in to.strides), ...)
    to, source = to[forward], source[forward]
    return [_COPY.bind(to, source, _plan(to, source))]


def as_array(value: Any, dtype: np.dtype[Any]) -> tuple[Array, list[Callable[[], None]]]:
    """An operand as an array, a number as one without axes; and what reads it anew where it changes from run to run."""
    if isinstance(value, np.ndarray):
        return value, []
    place = np.empty((), dtype)
    if isinstance(value, ScalarCell):
        return place, [lambda: np.copyto(place, value.value, casting="unsafe")]
    np.copyto(place, value, casting="unsafe")
    return place, []


def _renewed(calls: list[Call], renewals: list[Callable[[], None]]) -> list[Call]:
    if calls:
        calls[0].renewals += renewals
    return calls


@overlay("copy")
def copy(ins: Sequence[Any], outs: Sequence[Spec]) -> NativeKernel | None:
    """Where the elements lie in another order than in the source, or with gaps; the interpreter does the others."""
    (x,), (out,) = ins, outs
    if not isinstance(x, Spec) or x.dtype != out.dtype or out.nbytes <= SMALL_BYTES or x.strides == out.strides:
        return None
    return NativeKernel(lambda y, x, scratch=None: copy_calls(y, x), any_output=True)


@overlay("set_slice")
def set_slice(ins: Sequence[Any], outs: Sequence[Spec], *, index: Any, shape: Any) -> NativeKernel | None:
    """In place only the slice is written; else what lies around it once, and the slice once."""
    (out,) = outs
    if any(isinstance(x, Spec) and x.dtype != out.dtype for x in ins):
        return None
    at: Any = (*(python_slice(*entry) for entry in index), ...)  # a view, even of an array without axes

    def calls(y: Any, x: Any, values: Any, scratch: Any = None) -> list[Call]:
        x, renewals = as_array(x, y.dtype)
        made: list[Call] = []
        if not same_elements(y, x):
            base = np.broadcast_to(x, y.shape)
            for part in _around(index, y.shape):
                made += copy_calls(y[part], base[part])
        values, more = as_array(values, y.dtype)
        made += copy_calls(y[at], values[0] if values.ndim else values)
        return _renewed(made, renewals + more)

    return NativeKernel(calls, aliasing=True, any_output=True, small=small_numpy("set_slice", out, _PLAIN_BYTES))


def _around(index: Any, shape: tuple[int, ...]) -> list[Any]:
    """Slices that cover all but the slice, if that is cut from one axis without gaps; else one of everything."""
    cut = [axis for axis, (entry, size) in enumerate(zip(index, shape, strict=True)) if entry != (0, 1, size)]
    if not cut:
        return []
    if len(cut) > 1 or abs(index[cut[0]][1]) != 1 or index[cut[0]][2] == 0:
        return [...]
    axis, (start, step, count) = cut[0], index[cut[0]]
    first = start if step == 1 else start - count + 1
    sides = (slice(0, first), slice(first + count, shape[axis]))
    return [(*(slice(None),) * axis, side) for side in sides if side.start != side.stop]


@overlay("concat")
def concat(ins: Sequence[Any], outs: Sequence[Spec], *, axis: int) -> NativeKernel | None:
    """One copy for each input."""
    (out,) = outs
    if any(x.dtype != out.dtype for x in ins):
        return None

    def calls(y: Any, *xs: Any, scratch: Any = None) -> list[Call]:
        made: list[Call] = []
        start = 0
        for x in xs:
            stop = start + x.shape[axis]
            made += copy_calls(y[(slice(None),) * axis + (slice(start, stop),)], x)
            start = stop
        return made

    return NativeKernel(calls, any_output=True, small=small_numpy("concat", out, _PLAIN_BYTES))
