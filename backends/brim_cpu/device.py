"""The CPU backend object: raw memory from NumPy, arrays over it, and the choice of a kernel for an op.

A native kernel is taken where there is one for the op on these specs (``overlay``), else NumPy's (``kernels``).
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import platform
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import numpy as np

from brim.backend import BoundKernel, MemoryInfo
from brim.op import Op
from brim.spec import Scalar, Spec
from brim_cpu import kernels, native
from brim_cpu.elementwise import bind_elementwise
from brim_cpu.epilogue import EPILOGUES, bind_epilogue
from brim_cpu.fused import bind_fused, bind_many
from brim_cpu.fused_norms import FUSED_NORMS, bind_fused_norm
from brim_cpu.overlay import bind_native
from brim_cpu.overlay import elementwise as overlay
from brim_cpu.overlay.index import gather_rows
from brim_cpu.peak import register_rate
from brim_cpu.registry import KERNELS

__all__ = ["CpuBackend"]

Array = np.ndarray[Any, Any]


class CpuBackend:
    """NumPy arrays in host memory; implements ``brim.backend.Backend``."""

    kind = "cpu"
    alignment_bytes = 64
    shares_host_memory = True
    segment_bytes = 0
    prefers_channels_last: frozenset[str] = frozenset()
    """Ops for which programs lay images out channels-last: none, so that a program gives the bits of the eager step.

    The kernels of convolution and pooling take either order; channels last they need 10 to 30 % less time (float32, one
    thread, 3x3 windows), but they add in another order.
    """

    knows_fast_convolutions = True

    def __init__(self) -> None:
        for family in pkgutil.iter_modules(kernels.__path__):
            importlib.import_module(f"{kernels.__name__}.{family.name}")
        overlay.install()
        # A native call costs a microsecond, and more to wake the team; NumPy would run the parts one by one anyway.
        self.joins_side_by_side = 4 << 20 if native.available() else 0
        self.joins_updates = 16 << 20  # fewer and longer pieces for each thread; larger arrays are long by themselves

    def count(self) -> int:
        """One: all cores are one device."""
        return 1

    def describe(self, index: int) -> str:
        """Architecture and number of processors this process may use."""
        usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        return f"{platform.machine()} CPU, {usable} usable processors, NumPy {np.__version__}"

    def allocate(self, index: int, nbytes: int) -> Array:
        """A flat uint8 array whose first byte lies on a 64-byte boundary."""
        raw = np.empty(nbytes + self.alignment_bytes, np.uint8)
        start = -raw.ctypes.data % self.alignment_bytes
        return raw[start : start + nbytes]

    def view(self, buffer: Array | None, offset_bytes: int, spec: Spec) -> Array:
        """An array over part of a buffer; strides may be zero or negative."""
        if buffer is None or spec.size == 0:
            return np.empty(spec.shape, spec.dtype)
        if spec.layout is None:
            return np.ndarray(spec.shape, spec.dtype, buffer, offset_bytes)
        itemsize = spec.dtype.itemsize
        return np.ndarray(spec.shape, spec.dtype, buffer, offset_bytes, tuple(s * itemsize for s in spec.layout))

    def bind(self, op: Op, ins: Sequence[Spec | Scalar], outs: Sequence[Spec], params: dict[str, Any]) -> BoundKernel:
        """The native kernel for an op on these specs, else NumPy's. Raises KeyError for a composite without one."""
        if "tf32" in params:  # products of float32 are always computed in full here
            return _without("tf32", self.bind(op, ins, outs, {k: v for k, v in params.items() if k != "tf32"}))
        native_kernel = bind_native(op.name, ins, outs, params)
        if native_kernel is not None:
            return native_kernel
        if "fast" in params:  # NumPy's convolutions know one way only
            return _without("fast", self.bind(op, ins, outs, {k: v for k, v in params.items() if k != "fast"}))
        if op.kind == "elementwise" and op.name not in KERNELS:
            return bind_elementwise(op, ins, outs[0], params)
        if op.name == "fused":
            formula = params["formula"]
            return overlay.bind_formula(formula, ins, outs) or bind_fused(formula, ins, outs)
        if op.name == "fused_many":
            return overlay.bind_many(ins, outs, **params) or bind_many(ins, outs, **params)
        if op.name in EPILOGUES:
            return bind_epilogue(self.bind, op.name, ins, outs, params)
        if op.name in FUSED_NORMS:
            return bind_fused_norm(self.bind, op.name, ins, outs, params)
        record = KERNELS[op.name]
        scratch = record.scratch(ins, outs, **params) if record.scratch else 0
        library = record.library(ins, outs, **params) if record.library else 0
        flags = record.contiguous
        contiguous = (flags,) * len(ins) if isinstance(flags, bool) else tuple(i in flags for i in range(len(ins)))
        return BoundKernel(record.run, scratch, library, contiguous, record.aliasing, record.prepare)

    def chained(self, calls: Sequence[Callable[[], None]]) -> list[Callable[[], None]]:
        """Calls of native kernels that follow each other, joined."""
        return native.chained(calls)

    def joins_epilogue(
        self, op: Op, ins: Sequence[Spec | Scalar], outs: Sequence[Spec], params: dict[str, Any]
    ) -> bool:
        """Whether a product and the formula after it are one native call."""
        if "tf32" in params:
            params = {k: v for k, v in params.items() if k != "tf32"}
        return op.name in EPILOGUES and bind_native(op.name, ins, outs, params) is not None

    def joins_norms(self, op: Op, ins: Sequence[Spec | Scalar], outs: Sequence[Spec], params: dict[str, Any]) -> bool:
        """Whether a norm with these formulas is one native call that takes less time than the parts by themselves."""
        return bind_native(op.name, ins, outs, params) is not None

    def keeps_powers(self, op: Op, ins: Sequence[Spec | Scalar], outs: Sequence[Spec], params: dict[str, Any]) -> bool:
        """Whether a loss that keeps its powers, or the gradient that reads them, is a native call."""
        return bind_native(op.name, ins, outs, params) is not None

    def native_status(self) -> str:
        """One line: which native library runs, or why none."""
        return native.status()

    def set_threads(self, count: int) -> None:
        """How many threads native kernels run on."""
        native.set_threads(count)

    def get_threads(self) -> int:
        """How many threads native kernels run on."""
        return native.get_threads()

    def register_rate(self, seconds: float) -> float | None:
        """The most float32 operations a second in registers; see ``brim_cpu.peak.register_rate``."""
        return register_rate(seconds)

    def gather_rows(self, source: Array, indices: Array, out: Array, on_team: bool = True) -> None:
        """``out[i] = source[indices[i]]`` for rows of host arrays; see ``brim_cpu.overlay.index.gather_rows``."""
        gather_rows(source, indices, out, on_team)

    def running(self, index: int) -> AbstractContextManager[Any]:
        """Floating-point exceptions give inf and nan, as on every device, and no warnings."""
        return np.errstate(all="ignore")

    def upload(self, array: Array, host: Array) -> None:
        """Copy values in."""
        np.copyto(array, host)

    def download(self, array: Array) -> Array:
        """The array itself."""
        return array

    def adopt(self, host: Array) -> Array | None:
        """A flat view of a writable row-major array's bytes; its elements lie where loads of their type may start."""
        if not (host.flags.c_contiguous and host.flags.writeable and host.flags.aligned):
            return None
        return host.reshape(-1).view(np.uint8)

    def synchronize(self, index: int) -> None:
        """NumPy calls have finished when they return."""

    def memory(self, index: int) -> MemoryInfo | None:
        """None: the host's limits are the answer."""
        return None


def _without(name: str, kernel: BoundKernel) -> BoundKernel:
    """The kernel, called with a param that it does not know."""

    def dropping(function: Any) -> Any:
        def call(*args: Any, **params: Any) -> Any:
            params.pop(name, None)
            return function(*args, **params)

        return None if function is None else call

    return replace(kernel, run=dropping(kernel.run), prepare=dropping(kernel.prepare))
