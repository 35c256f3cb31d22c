"""The table of ops, its row, and the list it prints (``python -m brim.check.table``).

The rows lie in ``rows/``, in files that each export ``ROWS``. ``brim check`` and ``tests/test_ops.py`` run one body
over all of them; an op without a row fails the test of completeness.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import numpy as np

import brim
from brim.check import rows
from brim.errors import BrimError
from brim.op import REGISTRY, Op
from brim.spec import DTYPES

FLOATS = ("float32", "float64", "float16", "bfloat16")
# Relative and absolute tolerance of one rounding or a few, by the dtype that the op computes in.
TOLERANCE = {
    "float64": (1e-12, 1e-12),
    "float32": (2e-5, 2e-5),
    "float16": (4e-3, 4e-3),
    "bfloat16": (3e-2, 3e-2),
    "complex64": (2e-5, 2e-5),
    "complex128": (1e-12, 1e-12),
}

# Ops that one body on one device cannot run, and where their test is.
TESTED_ELSEWHERE = {
    "transfer": "between two devices: test_tensor.py",
    "store": "only in programs: test_program_passes_basic.py, test_networks_planned.py",
    "fused": "only in programs: test_fused_cpu.py, test_program_fuse.py",
    "fused_many": "only in programs: test_program_side_by_side.py, test_cuda_many.py",
    "matmul_epilogue": "only in programs: test_program_epilogue.py",
    "conv2d_epilogue": "only in programs: test_program_epilogue.py",
    "cross_entropy_powers": "only in programs: test_program_keep_powers.py",
    "cross_entropy_powers_grad": "only in programs: test_program_keep_powers.py",
    "cross_entropy_with_grad": "only in programs: test_program_loss_gradient.py",
    "layer_norm_fused": "only in programs: test_program_join_norms.py, test_cuda_fused_norms.py",
    "layer_norm_grad_fused": "only in programs: test_program_join_norms.py, test_cuda_fused_norms.py",
    "batch_norm_fused": "only in programs: test_program_join_norms.py, test_cuda_fused_norms.py",
    "batch_norm_grad_fused": "only in programs: test_program_join_norms.py, test_cuda_fused_norms.py",
}


@dataclass(frozen=True)
class In:
    """One input of a row: random values between ``low`` and ``high``.

    Attributes:
        shape: its shape.
        low, high: range of the random values.
        dtype: fixed dtype ("int64", "bool"...), or None for the dtype that the row is being run in.
        kinks: values where the gradient jumps; random values stay 0.05 away from them.
        values: function of a ``numpy.random.Generator`` that gives the array instead (permutations, indices).
        grad: whether a gradient is checked for this input (floats only).
    """

    shape: tuple[int, ...] = (3, 4)
    low: float = -2.0
    high: float = 2.0
    dtype: str | None = None
    kinks: tuple[float, ...] = ()
    values: Callable[[np.random.Generator], Any] | None = None
    grad: bool = True

    def make(self, rng: np.random.Generator, dtype: str) -> np.ndarray[Any, Any]:
        """A host array (row-major) with this input's values."""
        kind = DTYPES[self.dtype or dtype]
        if self.values is not None:
            return np.array(self.values(rng), dtype=kind, order="C")
        if kind.kind == "b":
            return rng.random(self.shape) < 0.5
        if kind.kind in "iu":
            return rng.integers(int(self.low), int(self.high), self.shape, endpoint=True).astype(kind)
        array = rng.uniform(self.low, self.high, self.shape)
        for kink in self.kinks:
            near = np.abs(array - kink) < 0.05
            array = np.where(near, kink + np.where(array < kink, -0.1, 0.1), array)
        if kind.kind == "c":
            array = array + 1j * rng.uniform(self.low, self.high, self.shape)
        return array.astype(kind)


@dataclass(frozen=True)
class Bad:
    """Inputs that must be refused: the specs' shapes (and dtypes), the params, and the error."""

    inputs: tuple[In, ...]
    error: type[BrimError]
    params: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float32"


@dataclass(frozen=True)
class Row:
    """One row: an op (or the public function that leads to it) on certain inputs.

    Attributes:
        name: what the row is called; with ``call`` and ``covers`` left out, the op's name in the registry.
        inputs: its inputs.
        reference: ``reference(*arrays, **params)`` with float64 (or integer) NumPy arrays gives the expected array, or
            a tuple for several outputs (None for an output that is checked elsewhere). None: no value is checked
            (random bits, uninitialised memory), and the row says why in ``note``.
        params: keyword arguments of ``call``.
        call: public function ``call(*tensors, **params)``; by default the op itself.
        covers: names of the registered ops that the row covers; by default ``(name,)``.
        dtypes: dtypes in which the inputs without a fixed one are made.
        tolerance: relative and absolute tolerance by dtype, over the table's.
        torch: "torch.exp" or ``f(torch, *tensors)`` computing the same with PyTorch, or None.
        torch_grad: whether the gradient is compared with PyTorch's too.
        grad: whether the gradient is checked; by default where the op has one and an input is a float.
        resizable: whether zero-size and one-element inputs make sense: then all inputs of ``inputs`` get these shapes.
        big: inputs of about 4 MB with which the kernels' allocations are measured; resizable rows need none.
        big_params: params for these, where they differ.
        bad: inputs that must be refused.
        note: what a reader of the list should know.
    """

    name: str
    inputs: tuple[In, ...]
    reference: Callable[..., Any] | None
    params: dict[str, Any] = field(default_factory=dict)
    call: Callable[..., Any] | None = None
    covers: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = FLOATS
    tolerance: dict[str, tuple[float, float]] = field(default_factory=dict)
    torch: str | Callable[..., Any] | None = None
    torch_grad: bool = True
    grad: bool | None = None
    resizable: bool = False
    big: tuple[In, ...] = ()
    big_params: dict[str, Any] = field(default_factory=dict)
    bad: tuple[Bad, ...] = ()
    note: str = ""

    @property
    def ops(self) -> tuple[str, ...]:
        return self.covers or (self.name,)

    @property
    def op(self) -> Op | None:
        """The registered op that the row calls directly, or None when it goes through a public function."""
        return REGISTRY[self.name] if self.call is None else None

    def run(self, *tensors: Any) -> Any:
        return (self.op if self.call is None else self.call)(*tensors, **self.params)  # type: ignore[misc]

    def differentiable(self, dtype: str = "float64") -> bool:
        """Whether the row's gradient is checked."""
        if not set(FLOATS) & set(self.dtypes):
            return False
        floats = any(i.grad and DTYPES[i.dtype or dtype] == DTYPES[dtype] for i in self.inputs)
        if self.grad is not None:
            return self.grad and floats
        return floats and all(REGISTRY[name].vjp is not None or REGISTRY[name].body is not None for name in self.ops)

    def arrays(self, dtype: str, seed: int = 0) -> list[np.ndarray[Any, Any]]:
        rng = np.random.default_rng(seed)
        return [i.make(rng, dtype) for i in self.inputs]

    def tolerances(self, dtype: str) -> tuple[float, float]:
        return self.tolerance.get(dtype, TOLERANCE.get(dtype, (1e-6, 1e-6)))

    def __str__(self) -> str:
        shapes = "-".join("x".join(map(str, i.shape)) or "scalar" for i in self.inputs)
        params = ",".join(f"{k}={getattr(v, '__name__', v)}" for k, v in self.params.items())
        return f"{self.name}[{shapes}]" + (f"({params})" if params else "")


def with_shapes(row: Row, shapes: Sequence[tuple[int, ...]]) -> Row:
    """The same row on inputs of other shapes."""
    return replace(row, inputs=tuple(replace(i, shape=s) for i, s in zip(row.inputs, shapes, strict=True)))


def enlarged(row: Row, shape: tuple[int, ...] = (1024, 1024)) -> Row | None:
    """The row on inputs of about 4 MB of float32, or None where it has none."""
    if row.big:
        return replace(row, inputs=row.big, params=row.params | row.big_params)
    return with_shapes(row, [shape] * len(row.inputs)) if row.resizable else None


@cache
def all_rows() -> tuple[Row, ...]:
    """The rows of every file in ``rows/``, in the order of their names."""
    names = sorted(found.name for found in pkgutil.iter_modules(rows.__path__))
    return tuple(row for name in names for row in importlib.import_module(f"{rows.__name__}.{name}").ROWS)


def checks(row: Row) -> list[str]:
    """What ``test_ops.py`` checks on a row, in words."""
    names = ["spec"]
    if row.reference is not None:
        names.append("value")
    if row.differentiable():
        names.append("gradient")
    if row.resizable:
        names.append("sizes 0 and 1")
    if row.bad:
        names.append("errors")
    if enlarged(row) is not None:
        names.append("allocations")
    if row.torch is not None:
        names.append("torch")
    return names


def listing() -> Iterator[str]:
    """Lines of the list: every registered op, its kind, its rows and what is checked on each."""
    by_op: dict[str, list[Row]] = {name: [] for name in REGISTRY}
    for row in all_rows():
        for name in row.ops:
            by_op.setdefault(name, []).append(row)
    for name in sorted(by_op):
        op = REGISTRY.get(name)
        kind = op.kind if op is not None else "NOT REGISTERED"
        yield f"{name} ({kind})" + ("" if by_op[name] else f": {TESTED_ELSEWHERE.get(name, 'NO ROW')}")
        for row in by_op[name]:
            yield f"    {row}: {', '.join(checks(row))}; {', '.join(row.dtypes)}" + (
                f"; {row.note}" if row.note else ""
            )
    missing = sum(not rows and name not in TESTED_ELSEWHERE for name, rows in by_op.items())
    yield f"{len(REGISTRY)} ops, {len(all_rows())} rows, {missing} ops without a row (brim {brim.__version__})"


def main() -> int:
    """Print the list; 1 when an op has no row."""
    lines = list(listing())
    print("\n".join(lines))
    return int(any("NO ROW" in line or "NOT REGISTERED" in line for line in lines))


if __name__ == "__main__":
    sys.exit(main())
