"""A bench for products on CUDA without a GPU: arrays whose memory is all that the NumPy twin of cuBLASLt may touch."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided

from brim.spec import DTYPES, Spec
from brim_cuda.cublaslt_host import HostCublasLt
from brim_cuda.gemm import GemmPlan
from brim_cuda.gemm_run import Addresses, GemmRunner

__all__ = ["Bench", "close", "reference"]

Array = np.ndarray[Any, Any]

TOLERANCE = {
    DTYPES["float32"]: 2e-6,
    DTYPES["float64"]: 1e-14,
    DTYPES["float16"]: 1e-3,
    DTYPES["bfloat16"]: 8e-3,
    DTYPES["complex64"]: 2e-6,
    DTYPES["complex128"]: 1e-14,
}


class Bench:
    """The twin, a runner, and arrays whose memory is all that the twin may touch."""

    def __init__(self) -> None:
        self.library = HostCublasLt()
        self.library.memory = []
        self.filled: list[int] = []
        self.runner = GemmRunner(self.library, self.zero)
        self.alive: list[Array] = []

    def zero(self, address: int, nbytes: int, stream: int) -> None:
        self.library._bytes(address, nbytes).fill(0)
        self.filled.append(nbytes)

    def memory(self, nbytes: int) -> Array:
        """Exactly so many bytes, of which the twin is told."""
        made = np.empty(nbytes + 256, np.uint8)
        at = -made.ctypes.data % 256
        part = made[at : at + nbytes]
        self.alive.append(made)
        assert self.library.memory is not None
        self.library.memory.append((part.ctypes.data, nbytes))
        return part

    def array(self, spec: Spec, values: Array | None = None) -> Array:
        """An array of this layout over memory that ends where its last element does; NaN in the gaps."""
        last = sum((n - 1) * s for n, s in zip(spec.shape, spec.strides)) if spec.size else -1
        flat = self.memory((last + 1) * spec.dtype.itemsize).view(spec.dtype)
        flat[...] = 0 if spec.dtype.kind in "iub" else np.nan
        item = spec.dtype.itemsize
        made = as_strided(flat, spec.shape, tuple(s * item for s in spec.strides))
        if values is not None:
            made[...] = values.astype(spec.dtype)
        return made

    def random(self, spec: Spec, seed: int) -> Array:
        rng = np.random.default_rng(seed)
        if spec.dtype.kind in "iub":
            return self.array(spec, rng.integers(0, 2, spec.shape))
        values = rng.standard_normal(spec.shape)
        if spec.dtype.kind == "c":
            values = values + 1j * rng.standard_normal(spec.shape)
        return self.array(spec, values)

    def run(self, plan: GemmPlan, out: Array, a: Array, b: Array, prepared: bool = False, **others: Array) -> None:
        """Copies what the plan wants copied, then runs it."""
        if plan.copied[0]:
            a = self.array(Spec(a.shape, a.dtype), a)
        if plan.copied[1]:
            b = self.array(Spec(b.shape, b.dtype), b)
        places = {name: array.ctypes.data for name, array in others.items()}
        at = Addresses(a.ctypes.data, b.ctypes.data, out.ctypes.data, **places)
        if not prepared:
            self.runner.run(plan, at, stream=0)
            return
        for call in self.runner.prepare(plan, at, stream=0):
            call()


def reference(a: Array, b: Array) -> Array:
    wide = np.complex128 if a.dtype.kind == "c" else np.float64
    return np.matmul(a.astype(wide), b.astype(wide))


def close(out: Array, want: Array, inner: int, factor: float = 1.0) -> None:
    scale = TOLERANCE[out.dtype] * factor * max(1.0, math.sqrt(inner))
    wide = np.complex128 if out.dtype.kind == "c" else np.float64
    np.testing.assert_allclose(out.astype(wide), want, rtol=scale, atol=4 * scale)
