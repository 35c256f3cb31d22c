"""CUDA kernels without a GPU, for tests: what the CPU kernels did on the table of ops, and the same calls emulated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any
from unittest.mock import patch

import numpy as np

import brim
from brim import op as op_module
from brim.backend import BoundKernel, ScalarCell
from brim.check.networks import IN_HALF, NETWORKS, compiled, make
from brim.check.table import all_rows
from brim.op import REGISTRY, Op
from brim.spec import Spec
from brim_cpu import device
from brim_cpu.device import CpuBackend
from brim_cuda.emulation import EmulationLoader, Guarded, find_compiler
from brim_cuda.launch import Call, Kernel
from brim_cuda.registry import Work, bind, work_of

Array = np.ndarray[Any, Any]
WHY_NOT = "" if find_compiler() else "needs g++, which was not found"


@dataclass(frozen=True)
class Recorded:
    """One call of a CPU kernel: what it was bound to, what it got and what it wrote."""

    op: Op
    ins: tuple[Any, ...]
    outs: tuple[Spec, ...]
    params: dict[str, Any]
    given: tuple[Any, ...]
    wrote: tuple[Array, ...]

    def work(self) -> Work | None:
        """The launches on CUDA, or None where it has no kernel for these specs."""
        try:
            return work_of(self.op, self.ins, self.outs, self.params)
        except KeyError:
            return None

    def __str__(self) -> str:
        return f"{self.op.name}({', '.join(map(str, self.ins))}, {self.params})"


def _forget_bound_kernels() -> None:
    """Eager ops keep the kernels that earlier tests bound: those would not be noted, and noted ones not forgotten."""
    op_module._eager._plans.clear()


class _Recorder:
    """While it is entered, every kernel that the CPU backend binds notes down its first call."""

    def __init__(self) -> None:
        self.seen: dict[str, Recorded] = {}

    def __enter__(self) -> _Recorder:
        self._original = original = CpuBackend.bind

        def bind(backend: CpuBackend, op: Op, ins: Any, outs: Any, params: Any) -> BoundKernel:
            return self._noting(original(backend, op, ins, outs, params), op, ins, outs, params)

        CpuBackend.bind = bind  # type: ignore[method-assign]
        _forget_bound_kernels()
        return self

    def __exit__(self, *error: object) -> None:
        CpuBackend.bind = self._original  # type: ignore[method-assign]
        _forget_bound_kernels()

    def _noting(self, kernel: BoundKernel, op: Op, ins: Any, outs: Any, params: Any) -> BoundKernel:
        key = repr((op.name, ins, outs, params))

        def before(args: Sequence[Any]) -> tuple[Any, ...]:
            numbers = [a.value if isinstance(a, ScalarCell) else a for a in args]
            return tuple(a.copy() if isinstance(a, np.ndarray) else a for a in numbers)

        def after(given: tuple[Any, ...], out: Any) -> None:
            wrote = tuple(o.copy() for o in (out if isinstance(out, tuple) else (out,)))
            self.seen.setdefault(key, Recorded(op, tuple(ins), tuple(outs), dict(params), given, wrote))

        def run(out: Any, *args: Any, scratch: Any = None, **named: Any) -> None:
            given = before(args)
            kernel.run(out, *args, scratch=scratch, **named)
            after(given, out)

        def prepare(out: Any, *args: Any, scratch: Any = None, **named: Any) -> list[Callable[[], None]] | None:
            assert kernel.prepare is not None
            calls = kernel.prepare(out, *args, scratch=scratch, **named)
            if calls is None or key in self.seen:
                return calls
            kept: list[tuple[Any, ...]] = []
            return [lambda: kept.append(before(args)), *calls, lambda: after(kept.pop(), out)]

        return replace(kernel, run=run, prepare=prepare if kernel.prepare else None)


@cache
def recorded() -> tuple[Recorded, ...]:
    """Every kernel call, each on other specs or params, that the rows of the table of ops lead to."""
    with _Recorder() as recorder:
        for row in all_rows():
            for dtype in row.dtypes:
                row.run(*(brim.asarray(array) for array in row.arrays(dtype)))
    return tuple(recorder.seen.values())


def _no_composites(bind: Any) -> Any:
    return lambda name, *rest: None if REGISTRY[name].kind == "composite" else bind(name, *rest)


@cache
def recorded_in_networks() -> tuple[Recorded, ...]:
    """The same of one call of every planned step of the test networks: fused groups, among others.

    Composites run their bodies, whatever the CPU has kernels for.
    """
    with _Recorder() as recorder, patch.object(device, "bind_native", _no_composites(device.bind_native)):
        for name in (*NETWORKS, *IN_HALF):
            net = make(name)
            steps = compiled(net)
            for which in sorted({which for which, _ in net.calls}):
                steps[which](*next(arguments for number, arguments in net.calls if number == which))
    return tuple(recorder.seen.values())


def is_complex_call(one: Recorded) -> bool:
    """Whether it reads or writes complex numbers."""
    return any(isinstance(spec, Spec) and spec.dtype.kind == "c" for spec in (*one.ins, *one.outs))


def kernels_of(works: Sequence[Work]) -> list[Kernel]:
    """The kernels that these need, each once."""
    return list(dict.fromkeys(call.kernel for work in works for call in work.calls if isinstance(call, Call)))


def laid_out(array: Array, spec: Spec) -> Array:
    """The array with the strides of a spec."""
    if spec.layout is None or spec.size == 0:
        return np.array(array, order="C")
    low = sum(min(0, step * (dim - 1)) for step, dim in zip(spec.layout, spec.shape))
    high = sum(max(0, step * (dim - 1)) for step, dim in zip(spec.layout, spec.shape))
    memory = np.zeros(high - low + 1, spec.dtype)
    steps = [step * spec.dtype.itemsize for step in spec.layout]
    view = np.lib.stride_tricks.as_strided(memory[-low:], spec.shape, steps)
    view[...] = array
    return view


def poison(array: Array) -> None:
    """Fill an array with what no kernel writes by itself."""
    if array.dtype != bool and array.size:
        array[...] = np.full(array.dtype.itemsize, 0xC3, np.uint8).view(array.dtype)[0]


def emulated(loader: EmulationLoader, call: Recorded, *, prepared: bool = False) -> list[Array]:
    """What the CUDA kernel writes, its operands in guarded memory; MemoryError where it writes beside them."""
    kernel = bind(loader, call.op, call.ins, call.outs, call.params)
    if any(kernel.contiguous):  # such inputs come row-major, whatever the CPU's kernel took
        specs = [
            Spec(s.shape, s.dtype) if need and isinstance(s, Spec) else s
            for s, need in zip(call.ins, kernel.contiguous)
        ]
        call = replace(call, ins=tuple(specs))
        kernel = bind(loader, call.op, call.ins, call.outs, call.params)
    ins = [Guarded(laid_out(x, s)) if isinstance(s, Spec) else x for x, s in zip(call.given, call.ins)]
    outs = [Guarded(laid_out(np.zeros(spec.shape, spec.dtype), spec)) for spec in call.outs]
    scratch = Guarded(np.full(kernel.scratch_bytes, 0xC3, np.uint8))
    for out in outs:
        poison(out.array)
    target = outs[0].array if len(outs) == 1 else tuple(out.array for out in outs)
    arrays = [x.array if isinstance(x, Guarded) else x for x in ins]
    guarded = [*outs, scratch, *(x for x in ins if isinstance(x, Guarded))]
    loader.library.memory = [(first, stop - first) for first, stop in (memory.bounds for memory in guarded)]
    if prepared:
        assert kernel.prepare is not None
        for launch in kernel.prepare(target, *arrays, scratch=scratch.array, **call.params) or ():
            launch()
    else:
        kernel.run(target, *arrays, scratch=scratch.array, **call.params)
    loader.library.memory = None
    for memory in guarded:
        memory.check()
    for x, given in zip(ins, call.given):
        if isinstance(x, Guarded):
            assert x.array.tobytes() == given.tobytes(), "an input was modified"
    return [out.array for out in outs]


def same_bits(got: Array, want: Array) -> bool:
    """Equal to the last bit; any NaN equals any other."""
    if got.shape != want.shape or got.dtype != want.dtype:
        return False
    if got.tobytes() == want.tobytes():
        return True
    if got.dtype.kind in "biu":
        return False
    nan = np.isnan(got)
    bits = f"u{got.dtype.itemsize}"
    same = np.ascontiguousarray(got).view(bits) == np.ascontiguousarray(want).view(bits)
    return bool(np.all(np.where(nan, np.isnan(want), same)))


def ulps(got: Array, want: Array) -> float:
    """The largest distance in units of the last place of the larger number."""
    a, b = got.astype(np.float64), want.astype(np.float64)
    if not np.array_equal(np.isnan(a), np.isnan(b)):
        return float("inf")
    mantissa, smallest = {"float16": (10, -24), "bfloat16": (7, -133), "float32": (23, -149), "float64": (52, -1074)}[
        got.dtype.name
    ]
    _, exponent = np.frexp(np.maximum(np.abs(a), np.abs(b)))
    unit = np.ldexp(1.0, np.maximum(exponent - 1 - mantissa, smallest))
    return float(np.max(np.where(a == b, 0.0, np.abs(a - b) / unit), initial=0.0, where=~np.isnan(a)))
