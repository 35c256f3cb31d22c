"""Running planned products: a ``GemmPlan``, addresses and a stream become calls of cuBLASLt (or of its NumPy twin).

Descriptors are built once; the algorithm is asked for once for a plan and the alignment of its addresses. Nothing is
allocated on the device, so the calls can be captured in a graph.
"""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from brim_cuda.cublaslt import (
    Algorithm,
    CublasLtError,
    DataType,
    Interface,
    LayoutAttribute,
    MatmulAttribute,
    Operation,
    PreferenceAttribute,
    ReductionScheme,
    Status,
)
from brim_cuda.gemm import AUX, GemmPlan, Matrix, Offsets

__all__ = ["Addresses", "GemmRunner", "Multiply", "Zero", "alignment_of"]

_ALIGNMENT_MAX_BYTES = 256
_KEPT = 1024


@dataclass(frozen=True, slots=True)
class Addresses:
    """Where the operands of one product start, as integers; 0 for those that it does not have."""

    a: int
    b: int
    out: int
    added: int = 0
    bias: int = 0
    aux: int = 0
    workspace: int = 0


def alignment_of(*addresses: int) -> int:
    """The largest power of two, up to 256, that divides all addresses (0 is divided by all)."""
    together = _ALIGNMENT_MAX_BYTES
    for address in addresses:
        together |= address
    return together & -together


class _Built:
    """A plan's descriptors in the library, freed with this object."""

    def __init__(self, library: Interface, plan: GemmPlan, algorithms: dict[Any, Algorithm] | None = None) -> None:
        self._library = library
        self.algorithms = {} if algorithms is None else algorithms  # by alignment, shared by all that are of this plan
        self.made: list[Callable[[], None]] = []
        weakref.finalize(self, _free, self.made)
        self.matmul = library.new_matmul(plan.compute, plan.scale)
        self.made.append(partial(library.free_matmul, self.matmul))
        self.first, self.second = self._layout(plan.first), self._layout(plan.second)
        self.out = self._layout(plan.out)
        self.added = self._layout(plan.added) if plan.added is not None else self.out
        self.alpha, self.beta = _scalar(plan.scale, plan.alpha), _scalar(plan.scale, plan.beta)
        put = partial(library.set, self.matmul)
        put(MatmulAttribute.TRANSA, Operation(plan.first.transposed))
        put(MatmulAttribute.TRANSB, Operation(plan.second.transposed))
        put(MatmulAttribute.EPILOGUE, plan.epilogue)
        if plan.bias_length:
            put(MatmulAttribute.BIAS_DATA_TYPE, plan.out.kind)
        if plan.epilogue in AUX:
            put(MatmulAttribute.AUX_LD, plan.aux_ld)
            if plan.out.batch > 1:
                put(MatmulAttribute.AUX_BATCH_STRIDE, plan.aux_stride)

    def _layout(self, matrix: Matrix) -> int:
        made = self._library.new_layout(matrix.kind, matrix.rows, matrix.columns, matrix.ld)
        self.made.append(partial(self._library.free_layout, made))
        if matrix.batch > 1:
            self._library.set(made, LayoutAttribute.BATCH_COUNT, matrix.batch)
            self._library.set(made, LayoutAttribute.BATCH_STRIDE, matrix.stride)
        return made


def _free(made: list[Callable[[], None]]) -> None:
    while made:
        made.pop()()


def _scalar(kind: DataType, value: float) -> Any:
    """A number in host memory, as the library reads it."""
    if kind == DataType.FLOAT32:
        return ctypes.c_float(value)
    if kind == DataType.FLOAT64:
        return ctypes.c_double(value)
    cell = ctypes.c_float if kind == DataType.COMPLEX64 else ctypes.c_double
    number = complex(value)
    return (cell * 2)(number.real, number.imag)


class GemmRunner:
    """Executes plans on one device.

    Arguments:
        library: libcublasLt, or ``HostCublasLt``.
        zero: ``zero(address, nbytes, stream)`` sets memory to zero.
    """

    def __init__(self, library: Interface, zero: Callable[[int, int, int], None]) -> None:
        self.library, self.zero = library, zero
        self._handle = library.create()
        self._algorithms: dict[GemmPlan, dict[Any, Algorithm]] = {}
        self._built: dict[Any, _Built] = {}
        self._lock = threading.Lock()

    def close(self) -> None:
        """Give the handle back; no plan can be run after it."""
        self._built.clear()
        self.library.destroy(self._handle)

    def run(self, plan: GemmPlan, at: Addresses, stream: int) -> None:
        """Launch a product. Raises CublasLtError naming it."""
        with self._lock:  # the addresses of bias and aux are set in descriptors that all callers share
            built = self._built.get(plan)
            if built is None and plan.calls:
                if len(self._built) >= _KEPT:
                    self._built.clear()
                built = self._built[plan] = self._build(plan)
            for call in self._launches(plan, at, stream, lambda: built):
                call()

    def prepare(self, plan: GemmPlan, at: Addresses, stream: int) -> list[Callable[[], None]]:
        """Calls without arguments that launch a product at these addresses. Raises CublasLtError naming it."""
        shared: list[_Built] = []

        def build() -> _Built:
            # Offsets of aux are attributes of the descriptor: then each call has its own.
            if not shared or plan.epilogue in AUX:
                shared.append(self._build(plan))
            return shared[-1]

        return list(self._launches(plan, at, stream, build))

    def _build(self, plan: GemmPlan) -> _Built:
        try:
            return _Built(self.library, plan, self._algorithms.setdefault(plan, {}))
        except CublasLtError as error:
            raise error.about(plan.title) from error

    def _launches(self, plan: GemmPlan, at: Addresses, stream: int, build: Callable[[], Any]) -> Any:
        for offset, nbytes in plan.fills:
            yield Zero(self.zero, at.out + offset, nbytes, stream)
        for call in plan.calls:
            yield self._launch(plan, build(), call, at, stream)

    def _launch(self, plan: GemmPlan, built: _Built, by: Offsets, at: Addresses, stream: int) -> Callable[[], None]:
        a, b, out = at.a + by.a, at.b + by.b, at.out + by.out
        added = at.added + by.added if plan.added is not None else out
        try:
            if plan.bias_length:
                self.library.set(built.matmul, MatmulAttribute.BIAS_POINTER, at.bias)
            if plan.epilogue in AUX:
                self.library.set(built.matmul, MatmulAttribute.AUX_POINTER, at.aux + by.aux)
            first, second = (b, a) if plan.first_is_b else (a, b)
            # Nothing tells the library how bias and aux lie: that goes with the result, beside which they are used.
            places = (first,), (second,), (added,), (out, at.bias, at.aux + by.aux)
            algorithm = self._algorithm(plan, built, at, tuple(alignment_of(*place) for place in places))
        except CublasLtError as error:
            raise error.about(plan.title) from error
        return Multiply(
            plan.title, built, self.library.matmul, self._handle, built.matmul, built.alpha,
            first, built.first, second, built.second, built.beta, added, built.added, out, built.out,
            algorithm.data, at.workspace, plan.workspace_bytes, stream,
        )  # fmt: skip

    def _algorithm(self, plan: GemmPlan, built: _Built, at: Addresses, alignments: tuple[int, ...]) -> Algorithm:
        workspace_bytes = plan.workspace_bytes if at.workspace else 0
        key = *alignments, workspace_bytes
        found = built.algorithms.get(key)
        if found is not None:
            return found
        preference = self.library.new_preference()
        try:
            put = partial(self.library.set, preference)
            put(PreferenceAttribute.MAX_WORKSPACE_BYTES, workspace_bytes)
            # Parts of a sum over K are added up in the compute type, never in a half-width result.
            put(PreferenceAttribute.REDUCTION_SCHEME_MASK, ReductionScheme.COMPUTE_TYPE)
            for operand, alignment in zip("ABCD", alignments):
                put(PreferenceAttribute[f"MIN_ALIGNMENT_{operand}_BYTES"], alignment)
            options = self.library.heuristic(
                self._handle, built.matmul, built.first, built.second, built.added, built.out, preference, 1
            )
        finally:
            self.library.free_preference(preference)
        if not options:
            raise CublasLtError("cublasLtMatmulAlgoGetHeuristic", Status.NOT_SUPPORTED)
        built.algorithms[key] = options[0]
        return options[0]


class Multiply:
    """A product on fixed operands; it is launched each time that this is called."""

    __slots__ = ("_alive", "_arguments", "_matmul", "_title")

    def __init__(self, title: str, alive: _Built, matmul: Callable[..., None], *arguments: Any) -> None:
        self._title, self._alive, self._matmul, self._arguments = title, alive, matmul, arguments

    def __call__(self) -> None:
        try:
            self._matmul(*self._arguments)
        except CublasLtError as error:
            raise error.about(self._title) from error


class Zero:
    """Memory that is set to zero each time that this is called."""

    __slots__ = ("_arguments", "_zero")

    def __init__(self, zero: Callable[[int, int, int], None], *arguments: int) -> None:
        self._zero, self._arguments = zero, arguments

    def __call__(self) -> None:
        self._zero(*self._arguments)
