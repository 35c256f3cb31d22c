"""Runs one op's native and NumPy kernels on arrays of any layout, in memory that shows stray writes."""

from __future__ import annotations

from typing import Any

import numpy as np

from brim.backend import BoundKernel
from brim.device import find_backend
from brim.spec import Spec
from brim_cpu import native, overlay
from brim_cpu.registry import KERNELS
from poison import only

__all__ = ["both", "dense_last", "image", "native_kernel", "run_native", "run_numpy", "spec_of"]

Array = np.ndarray[Any, Any]
_GUARD = 64
_STRAY = 171


def dense_last(shape: tuple[int, ...], dtype: Any = np.float32) -> Spec:
    """Images whose channels lie side by side."""
    _, c, h, w = shape
    return Spec(shape, np.dtype(dtype), (c * h * w, 1, w * c, c))


def image(rng: np.random.Generator, shape: tuple[int, ...], last: bool = False, shift: int = 0) -> Array:
    """Random images of float32 in either order, ``shift`` bytes off the alignment of floats' blocks."""
    spec = dense_last(shape) if last else Spec(shape)
    room = np.zeros(spec.nbytes + _GUARD + shift, np.uint8)
    start = -room.ctypes.data % _GUARD + shift
    made = np.ndarray(shape, np.float32, room, start, tuple(4 * step for step in spec.strides))
    made[...] = rng.standard_normal(shape)
    return made


def spec_of(array: Array) -> Spec:
    """Shape, dtype and layout of an array."""
    steps = tuple(stride // array.itemsize for stride in array.strides)
    return Spec(array.shape, array.dtype, None if array.flags.c_contiguous else steps)


def native_kernel(name: str, ins: list[Array], outs: list[Spec], params: dict[str, Any]) -> BoundKernel | None:
    """The kernel that is laid over NumPy's on these arrays."""
    find_backend("cpu")
    return overlay.bind_native(name, [spec_of(x) for x in ins], outs, params)


def _guarded(nbytes: int, shift: int = 0) -> tuple[Array, Array]:
    room = np.full(nbytes + 3 * _GUARD + shift, _STRAY, np.uint8)
    start = _GUARD - room.ctypes.data % _GUARD + shift
    return room, room[start : start + nbytes]


def _untouched(room: Array, inner: Array) -> bool:
    before = inner.ctypes.data - room.ctypes.data
    after = room[before + inner.size :]
    return bool((room[:before] == _STRAY).all() and (after == _STRAY).all())


def run_native(
    name: str, ins: list[Array], outs: list[Spec], params: dict[str, Any], *, threads: int = 2, shift: int = 0
) -> list[Array]:
    """Results of the native kernel on so many threads; inputs, guards and room outside the outputs stay as they are."""
    before = native.get_threads()
    native.set_threads(threads)
    try:
        kernel = native_kernel(name, ins, outs, params)
        assert kernel is not None, f"{name} has no native kernel for {outs} with {params}"
        given = [
            np.ascontiguousarray(x) if wanted else x
            for x, wanted in zip(ins, kernel.contiguous or (False,) * len(ins), strict=True)
        ]
        copies = [x.copy() for x in given]
        rooms = [_guarded(out.nbytes, shift) for out in outs]
        made = [
            np.ndarray(out.shape, out.dtype, inner, 0, tuple(step * out.dtype.itemsize for step in out.strides))
            for out, (_, inner) in zip(outs, rooms, strict=True)
        ]
        scratch = _guarded(kernel.scratch_bytes)
        with only(*made, *given, scratch[1]):
            kernel.run(made[0] if len(made) == 1 else tuple(made), *given, scratch=scratch[1], **params)
        assert _untouched(*scratch)
        assert all(_untouched(*room) for room in rooms)
        assert all(np.array_equal(a, b, equal_nan=True) for a, b in zip(given, copies, strict=True))
        return made
    finally:
        native.set_threads(before)


def run_numpy(name: str, ins: list[Array], outs: list[Spec], params: dict[str, Any]) -> list[Array]:
    """Results of the NumPy kernel."""
    find_backend("cpu")
    record = KERNELS[name]
    size = record.scratch([spec_of(x) for x in ins], outs, **params) if record.scratch else 0
    room = np.zeros(size + _GUARD, np.uint8)
    start = -room.ctypes.data % _GUARD
    made = [np.zeros(out.shape, out.dtype) for out in outs]
    scratch = {"scratch": room[start : start + size]} if size else {}
    with np.errstate(all="ignore"):
        record.run(made[0] if len(made) == 1 else tuple(made), *ins, **scratch, **params)
    return made


def both(name: str, ins: list[Array], out: Spec, params: dict[str, Any], **how: Any) -> tuple[Array, Array]:
    """Results of NumPy's kernel and of the native one, of an op with one result."""
    return run_numpy(name, ins, [out], params)[0], run_native(name, ins, [out], params, **how)[0]
