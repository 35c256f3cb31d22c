"""NVIDIA's cuDNN through its Python frontend: what is asked of it, which plan is taken, and how plans are run.

A ``Request`` is data: what is computed, on tensors of which shapes, strides and dtypes. ``Dnn.plan`` makes a
``DnnPlan`` of it, which says what scratch it needs to the byte; the launch layer runs plans (``launch.DnnCall``).
Only plans that give the same bits each time are taken, the library's first choice that does; nothing is timed.

Importing this module loads nothing. Sources: cuDNN's documentation of the graph API (numerical notes, alignment of 16
bytes); the frontend's advice for frameworks: graphs are built once, variant packs reused, addresses passed as integers.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from brim.spec import DTYPES
from brim_cuda.lowlevel import LowLevelError

__all__ = ["ALIGNMENT_BYTES", "Cudnn", "Dnn", "DnnPlan", "DnnTensor", "DnnUnsupported", "Execute", "Request"]
__all__ += ["input_of", "output_of"]

ALIGNMENT_BYTES = 16
"""Every tensor must start at a multiple of this: what the frontend tells the library of all of them."""

WORKSPACE_BYTES_MAX = 256 << 20
"""Plans that need more are left out: where nothing else is offered, brim's own kernels take less."""

_DATA_TYPES = {DTYPES["float32"]: "FLOAT", DTYPES["float16"]: "HALF", DTYPES["bfloat16"]: "BFLOAT16"}


class DnnUnsupported(Exception):
    """The library has no plan for a request, and why; brim's own kernels take it."""


@dataclass(frozen=True, slots=True)
class DnnTensor:
    """An operand as the library is told.

    Attributes:
        shape, strides: in elements.
        dtype: of the elements.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def extent_bytes(self) -> int:
        """Bytes from the first element to the end of the last."""
        steps = sum((dim - 1) * step for dim, step in zip(self.shape, self.strides, strict=True))
        return (steps + 1) * self.dtype.itemsize


class Request(Protocol):
    """What the library is asked for; frozen and hashable, since plans are kept by it."""

    @property
    def title(self) -> str:
        """For messages."""

    @property
    def tensors(self) -> tuple[DnnTensor, ...]:
        """Its operands; the number of each in the library is its position here plus one."""

    @property
    def forbidden_notes(self) -> tuple[str, ...]:
        """Numerical notes (names of ``cudnn.numerical_note``) that a plan must not carry."""

    def build(self, cudnn: Any, graph: Any) -> None:
        """Describe it in a new graph of the frontend."""


@dataclass(frozen=True, slots=True)
class DnnPlan:
    """How a request is computed.

    Attributes:
        request: what.
        engine: the library's name for the engine and its settings.
        workspace_bytes: scratch it needs.
    """

    request: Request
    engine: str
    workspace_bytes: int


class Dnn(Protocol):
    """cuDNN on one device, cuDNN for plans alone, or its NumPy twin."""

    def plan(self, request: Request) -> DnnPlan:
        """The plan for a request; equal requests give the same. Raises DnnUnsupported."""

    def execute(self, plan: DnnPlan, pack: dict[int, int], workspace: int, stream: int) -> None:
        """Launch it: addresses by the tensors' numbers. Raises LowLevelError."""


class Cudnn:
    """The library. Implements ``Dnn``.

    Arguments:
        module: the frontend, ``cudnn``.
        handle: made by it for the device that is current; None for plans alone.
        properties: the frontend's description of a device that is not there, with
        sm_version: its compute capability, 90 for 9.0.
    """

    def __init__(self, module: Any, handle: Any = None, properties: Any = None, sm_version: int | None = None) -> None:
        self._module, self._handle = module, handle
        self._device: dict[str, Any] = (
            {"handle": handle} if handle is not None else {"device_property": properties, "sm_version": sm_version}
        )
        self._stream: int | None = None
        self._plans: dict[Request, DnnPlan | str] = {}
        self._built: dict[DnnPlan, tuple[Any, int]] = {}
        self._lock = threading.Lock()

    def version(self) -> str:
        """Of the library, as 9.28.0."""
        number = int(self._module.backend_version())
        return f"{number // 10000}.{number % 10000 // 100}.{number % 100}"

    def plan(self, request: Request) -> DnnPlan:
        """The library's first choice that is allowed, built. Raises DnnUnsupported."""
        with self._lock:
            found = self._plans.get(request)
            if found is None:
                try:
                    found, graph, index = self._choose(request)
                    self._built[found] = graph, index
                except Exception as error:  # each kind of refusal is an exception of its own in the frontend
                    found = " ".join(str(error).split())[:300] or type(error).__name__
                self._plans[request] = found
        if isinstance(found, str):
            raise DnnUnsupported(f"{request.title}: {found}")
        return found

    def _choose(self, request: Request) -> tuple[DnnPlan, Any, int]:
        cudnn = self._module
        wide = cudnn.data_type.FLOAT
        graph = cudnn.pygraph(intermediate_data_type=wide, compute_data_type=wide, **self._device)
        request.build(cudnn, graph)
        graph.validate()
        graph.build_operation_graph()
        graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
        graph.deselect_numeric_notes([getattr(cudnn.numerical_note, note) for note in request.forbidden_notes])
        refused = "no plan of the library gives the same bits each time, in this precision"
        for index in range(graph.get_execution_plan_count()):
            name = graph.get_plan_name_at_index(index)
            if not re.match(r"eng\d", name):
                continue  # written in Python, compiled by packages that brim does not ask for
            try:
                graph.build_plan_at_index(index)
            except Exception as error:
                if "Deselecting" not in str(error):  # which is said of those with forbidden notes
                    refused = str(error)
                continue
            workspace_bytes = int(graph.get_workspace_size_plan_at_index(index))
            if workspace_bytes <= WORKSPACE_BYTES_MAX:
                return DnnPlan(request, name, workspace_bytes), graph, index
            refused = f"the library's plans need {workspace_bytes} bytes of scratch"
        raise DnnUnsupported(refused)

    def execute(self, plan: DnnPlan, pack: dict[int, int], workspace: int, stream: int) -> None:
        """On the handle's device, in this stream. Raises LowLevelError."""
        with self._lock:
            try:
                if plan not in self._built:
                    self._rebuild(plan)
                if self._stream != stream:
                    self._module.set_stream(self._handle, stream)
                    self._stream = stream
                graph, index = self._built[plan]
                graph.execute_plan_at_index(pack, workspace, index, self._handle)
            except Exception as error:
                raise LowLevelError(f"cuDNN ({plan.engine}): {error}") from error

    def _rebuild(self, plan: DnnPlan) -> None:
        """A plan that was made for another device of this machine, for this one."""
        own, graph, index = self._choose(plan.request)
        if own.workspace_bytes > plan.workspace_bytes:
            raise LowLevelError(
                f"this device needs {own.workspace_bytes} bytes of scratch, {plan.workspace_bytes} are planned: "
                "plan for each device, or set BRIM_CUDNN=0"
            )
        self._built[plan] = graph, index


def _data_type(cudnn: Any, dtype: np.dtype[Any]) -> Any:
    """A dtype as the frontend calls it."""
    return getattr(cudnn.data_type, _DATA_TYPES[dtype])


def input_of(cudnn: Any, graph: Any, number: int, tensor: DnnTensor) -> Any:
    """A tensor that a graph reads."""
    kind = _data_type(cudnn, tensor.dtype)
    return graph.tensor(
        name=f"t{number}", dim=list(tensor.shape), stride=list(tensor.strides), data_type=kind, uid=number
    )


def output_of(cudnn: Any, made: Any, number: int, tensor: DnnTensor) -> None:
    """Name what a graph has made as a tensor that it writes."""
    made.set_output(True).set_uid(number).set_data_type(_data_type(cudnn, tensor.dtype))
    made.set_dim(list(tensor.shape)).set_stride(list(tensor.strides))


class Execute:
    """A plan on fixed operands; it is launched each time that this is called.

    Raises:
        ValueError: an operand that does not start where the library can read it.
    """

    __slots__ = ("_arguments", "_execute", "_translate")

    def __init__(
        self,
        library: Dnn,
        plan: DnnPlan,
        addresses: Sequence[int],
        workspace: int,
        stream: int,
        translate: Callable[[Exception], Exception],
    ) -> None:
        off = [address for address in addresses if address % ALIGNMENT_BYTES]
        if off:
            raise ValueError(
                f"{plan.request.title}: cuDNN reads arrays that start at multiples of {ALIGNMENT_BYTES} bytes, one "
                f"starts at {off[0]:#x}: copy that view first (x.copy()), or set BRIM_CUDNN=0"
            )
        self._execute, self._translate = library.execute, translate
        self._arguments = plan, dict(enumerate(addresses, 1)), workspace, stream

    def __call__(self) -> None:
        try:
            self._execute(*self._arguments)
        except LowLevelError as error:
            raise self._translate(error) from error
