"""Runs single native kernels of the CPU: what every call must hold, whatever the kernel.

Every call runs on 1, 2 and 3 threads with results that must agree to the bit, on inputs that must not change and in
outputs that lie between guards. References: the composites' bodies in
float64, the NumPy kernels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

import brim
from brim.eager import Eager
from brim.op import REGISTRY, set_eager_interpreter
from brim.spec import Spec
from brim_cpu import device as cpu_device
from brim_cpu import native
from brim_cpu.overlay import bind_native
from brim_cpu.registry import KERNELS
from poison import only

__all__ = ["RNG", "SHAPES", "body", "bound", "channels_last", "close", "needs_library", "normal", "numpy_kernel"]
__all__ += ["numpy_only", "run", "spec_of"]

needs_library = pytest.mark.skipif(not native.available(), reason=f"no native library: {native.status()}")

Array = np.ndarray[Any, Any]
_GUARD = 40  # elements on each side, about
RNG = np.random.default_rng(0)


def spec_of(x: Any) -> Any:
    if not isinstance(x, np.ndarray):
        return x
    layout = tuple(step // x.itemsize for step in x.strides)
    plain = Spec(x.shape, x.dtype)
    return plain if layout == plain.strides else Spec(x.shape, x.dtype, layout)


def guarded(
    shape: tuple[int, ...], dtype: Any, strides: tuple[int, ...] | None = None, aligned: bool = False
) -> tuple[Array, Array, Array]:
    """An array without meaningful values, on a cache line or one element after it, and what lies before and after."""
    count = math.prod(shape)
    itemsize = np.dtype(dtype).itemsize
    whole = np.full((count + 2 * _GUARD) * itemsize + 128, 77, np.uint8).view(dtype)
    start = (-whole.ctypes.data // whole.itemsize) % (64 // whole.itemsize) + 64 // whole.itemsize + (not aligned)
    inner = whole[start : start + count]
    outside = whole[:start], whole[start + count :]
    if strides is not None:
        return np.lib.stride_tricks.as_strided(inner, shape, [s * inner.itemsize for s in strides]), *outside
    return inner.reshape(shape), *outside


def bound(name: str, ins: list[Any], outs: list[Spec] | None = None, **params: Any) -> tuple[Any, list[Spec]]:
    specs = [spec_of(x) for x in ins]
    outs = outs or [Spec(s.shape, s.dtype) for s in REGISTRY[name].infer(specs, params)]
    return bind_native(name, specs, outs, params), outs


def run(name: str, *ins: Any, outs: list[Spec] | None = None, aligned: bool = False, **params: Any) -> Any:
    """The outputs of a native kernel, which is given them on cache lines or one element after."""
    kernel, out_specs = bound(name, list(ins), outs, **params)
    assert kernel is not None, f"no native kernel for {name}"
    before = [x.copy() if isinstance(x, np.ndarray) else x for x in ins]
    given = [
        np.ascontiguousarray(x) if need and isinstance(x, np.ndarray) else x
        for x, need in zip(ins, kernel.contiguous, strict=True)
    ]
    results: list[list[Array]] = []
    threads_before = native.get_threads()
    try:
        for threads in (1, 2, 3):
            native.set_threads(threads)
            made = [guarded(s.shape, s.dtype, None if s.contiguous else s.strides, aligned) for s in out_specs]
            arrays = tuple(array for array, _, _ in made)
            scratch = np.full(kernel.scratch_bytes, 0xFF, np.uint8)  # NaN, whatever it is read as
            # not kernel.run, which for few elements is NumPy's
            calls = kernel.prepare(arrays if len(arrays) > 1 else arrays[0], *given, scratch=scratch, **params)
            with only(*arrays, *given, scratch):
                for call in calls:
                    call()
            for _, ahead, behind in made:
                assert (np.concatenate([ahead, behind]).view(np.uint8) == 77).all(), "written outside of the output"
            results.append([array.copy() for array in arrays])
    finally:
        native.set_threads(threads_before)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert a.tobytes() == b.tobytes(), "depends on the number of threads"
    for x, was in zip(ins, before, strict=True):
        assert not isinstance(x, np.ndarray) or x.tobytes() == was.tobytes(), "an input was changed"
    return results[0] if len(results[0]) > 1 else results[0][0]


@contextmanager
def numpy_only() -> Iterator[None]:
    """Eager ops without native kernels."""
    before = cpu_device.bind_native
    cpu_device.bind_native = lambda *args: None  # type: ignore[assignment]
    set_eager_interpreter(Eager())
    try:
        yield
    finally:
        cpu_device.bind_native = before
        set_eager_interpreter(Eager())


def body(name: str, *ins: Any, **params: Any) -> Any:
    """The outputs of a composite's body in float64, by NumPy kernels."""
    with numpy_only(), brim.no_grad():
        given = [
            brim.asarray(x.astype(np.float64) if x.dtype == np.float32 else x) if isinstance(x, np.ndarray) else x
            for x in ins
        ]
        made = REGISTRY[name].body(*given, **params)  # type: ignore[misc]
        return [m.numpy() for m in made] if isinstance(made, tuple) else made.numpy()


def close(got: Array, want: Array, ulps: float = 16, scale: float | None = None) -> None:
    """Equal but for so many units in the last place of the largest entry (or of `scale`); NaN and inf alike."""
    want = np.asarray(want, np.float64)
    assert got.shape == want.shape
    with np.errstate(over="ignore"):
        rounded = want.astype(got.dtype)
    finite = np.isfinite(rounded)
    np.testing.assert_array_equal(got[~finite], rounded[~finite])
    if finite.any():
        size = max(np.abs(want[finite]).max() if scale is None else scale, float(np.finfo(got.dtype).tiny))
        worst = np.abs(got[finite].astype(np.float64) - want[finite]).max()
        assert worst <= ulps * np.finfo(got.dtype).eps * size, (worst, size)


def normal(*shape: int, dtype: Any = np.float32) -> Array:
    """Normal numbers one element off alignment."""
    count = math.prod(shape)
    return np.concatenate([np.zeros(1), RNG.standard_normal(count)]).astype(dtype)[1:].reshape(shape)


SHAPES = [
    (1, 1), (1, 5000), (5000, 1), (3, 15), (3, 16), (3, 17), (7, 63), (7, 64), (7, 65), (2, 1023), (2, 1024), (2, 1025),
    (300, 10), (33, 2049), (1000, 129),
]  # fmt: skip


def numpy_kernel(name: str, x: Array, **params: Any) -> Array:
    spec = REGISTRY[name].infer([spec_of(x)], params)[0]
    record = KERNELS[name]
    out = np.empty(spec.shape, spec.dtype)
    nbytes = record.scratch([spec_of(x)], [spec], **params) if record.scratch else 0
    record.run(out, x, scratch=np.empty(nbytes, np.uint8), **params)
    return out


def channels_last(x: Array) -> Array:
    """The same images with their channels side by side in memory."""
    return np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 1, -1)), -1, 1)
