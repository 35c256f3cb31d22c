"""The CUDA backend object: the choice of kernels for ops, on a machine that has the memory and runs them.

There are two machines: ``brim_cuda.machine.GpuMachine``, the NVIDIA GPUs of this computer through CuPy, and
``brim_cuda.emulation.EmulatedMachine``, which has none and runs the same kernels on host memory, for tests.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np

from brim.backend import BoundKernel, HostServices, MemoryInfo, join_neighbours
from brim.op import Op
from brim.spec import Scalar, Spec
from brim_cuda import registry, steps
from brim_cuda.dnn import Dnn, Execute
from brim_cuda.dnn_conv import CONVOLUTIONS, turned
from brim_cuda.dnn_open import open_for_profile
from brim_cuda.dnn_open import wanted as dnn_wanted
from brim_cuda.gemm_epilogue import joins_epilogue
from brim_cuda.gemm_run import Multiply, Zero
from brim_cuda.graphs import SHORTEST, Graph, Graphed, wanted
from brim_cuda.kernels import conv, loss, norm
from brim_cuda.launch import Loader
from brim_cuda.measuring import Measuring

__all__ = ["CudaBackend", "Fetcher", "Machine"]


class Fetcher(Protocol):
    """A small device array, read again and again while other work goes on."""

    def start(self) -> None:
        """Order a copy to the host behind what was launched so far."""

    def value(self) -> np.ndarray[Any, Any]:
        """What the last copy brought; waits for it."""


class Machine(Protocol):
    """Devices, their memory, and what runs kernels on them. All sizes are in bytes."""

    @property
    def loader(self) -> Loader:
        """What compiles and launches."""

    def count(self) -> int:
        """Number of devices. Raises DeviceError saying what is missing when there is none."""

    def describe(self, index: int) -> str:
        """One line: name and size."""

    def facts(self, index: int) -> dict[str, str]:
        """Versions of what is between brim and the device."""

    def connect(self, index: int, services: HostServices) -> None:
        """What the framework does for this device's memory."""

    def allocate(self, index: int, nbytes: int) -> Any:
        """A raw buffer. Raises BudgetExceeded or DeviceError."""

    def view(self, buffer: Any, offset_bytes: int, spec: Spec) -> Any:
        """An array over part of a buffer."""

    def upload(self, array: Any, host: np.ndarray[Any, Any]) -> None:
        """Copy host values into a row-major array."""

    def feed(self, pairs: Sequence[tuple[Any, Any]], stage: Any, generation: int) -> None:
        """See ``CudaBackend.feed``."""

    def fetcher(self, array: Any) -> Fetcher:
        """Copies of a small row-major array to the host that are waited for later."""

    def download(self, array: Any) -> np.ndarray[Any, Any]:
        """Host copy of a row-major array."""

    def running(self, index: int) -> AbstractContextManager[Any]:
        """Launches inside go to this device."""

    def synchronize(self, index: int) -> None:
        """Wait for everything launched. Raises DeviceError when any of it failed."""

    def memory(self, index: int) -> MemoryInfo | None:
        """As this process sees it now; starts the device."""

    def process_bytes(self, index: int) -> int | None:
        """What this process holds on the device by the driver's count; None where nobody tells."""

    def measuring(self, index: int) -> Measuring | None:
        """Events, facts and state for measurements; None where nothing is to be measured."""

    def capture(self, calls: Sequence[Callable[[], None]]) -> Graph:
        """A graph of launches on the current device and stream. Raises CaptureRefused."""


class CudaBackend:
    """Implements ``brim.backend.Backend``.

    Arguments:
        machine: where arrays lie and kernels run.
        kind: the device's name.
    """

    alignment_bytes = 512
    """As CuPy's pool and PyTorch's: a multiple of every vector load and of what cuBLASLt likes."""

    segment_bytes = 2 << 20
    """cudaMalloc gives whole pages of 2 MiB."""

    shares_host_memory = False

    stages_inputs = True
    """The inputs of a step are copied while the step before runs, where there is memory for a second set of them."""

    prefers_channels_last = CONVOLUTIONS
    """Their products are over all images then, and tensor cores read channels side by side."""

    joins_side_by_side = 1 << 30
    """Updates of many parameters are one launch, as far as the peak of the step allows: between two launches a GPU is
    idle for microseconds, in which it could have moved megabytes. What waits for it lies in memory that is free."""

    joins_arrays_of = 64 << 20
    """Longer ones keep the GPU busy by themselves (``kernels.many.ELEMENTS_MAX`` elements of four bytes)."""

    joins_early = True
    """Autocast's casts of weights are few launches."""

    def __init__(self, machine: Machine, kind: str = "cuda") -> None:
        self.machine, self.kind = machine, kind
        self._profile: tuple[Dnn | None, str] | None = None
        self._for_profiles: dict[tuple[str, str], CudaBackend] = {}
        self.count, self.describe, self.facts, self.connect = (
            machine.count, machine.describe, machine.facts, machine.connect,
        )  # fmt: skip
        self.allocate, self.view, self.memory = machine.allocate, machine.view, machine.memory
        self.upload, self.download, self.fetcher = machine.upload, machine.download, machine.fetcher
        self.running, self.synchronize, self.process_bytes = machine.running, machine.synchronize, machine.process_bytes
        self.measuring = machine.measuring

    def bind(self, op: Op, ins: Sequence[Spec | Scalar], outs: Sequence[Spec], params: dict[str, Any]) -> BoundKernel:
        """The CUDA kernel for an op on these specs; needs no device. Raises KeyError where there is none."""
        return registry.bind(self.machine.loader, op, ins, outs, params, self.dnn())

    def dnn(self) -> Dnn | None:
        """cuDNN, where it is used."""
        return self.machine.loader.dnn() if self._profile is None else self._profile[0]

    @property
    def dnn_status(self) -> str:
        """One line on whether plans for a profile's card ask cuDNN; "" for devices that are there."""
        return "" if self._profile is None else self._profile[1]

    def for_profile(self, name: str) -> CudaBackend:
        """This backend as it plans for a card that is not there. Raises DeviceError where cuDNN is insisted on."""
        key = name, dnn_wanted()
        if key not in self._for_profiles:
            made = copy.copy(self)
            made._profile = open_for_profile(name)
            self._for_profiles[key] = made
        return self._for_profiles[key]

    def gains_channels_last(
        self, op: Op, ins: Sequence[Spec | Scalar], outs: Sequence[Spec], params: dict[str, Any]
    ) -> bool:
        """Of cuDNN's those on tensor cores: of half-width floats, and of float32 in TF32; of cuBLASLt's all whose
        windows have several elements, since one element makes a matrix product of either order."""
        if self.dnn() is not None:
            return outs[0].dtype.itemsize == 2 or bool(params.get("tf32", False))
        window = params.get("kernel") or ins[1].shape[2:]  # type: ignore[union-attr]
        return tuple(window) != (1, 1)

    def feed(self, pairs: Sequence[tuple[Any, Any]], stage: Any = None, generation: int = 0) -> None:
        """Copy the inputs of a step in; nothing is waited for that was launched before.

        Arguments:
            pairs: (row-major device array, host array) each; the host arrays may be written again afterwards.
            stage: flat uint8 device array of the inputs' bytes, each rounded up to ``alignment_bytes``; None for none.
            generation: another number when the stage is another memory.
        """
        self.machine.feed(pairs, stage, generation)

    def load(self, kernels: Sequence[BoundKernel]) -> None:
        """Compile these kernels together, before they are prepared."""
        steps.load(kernels)

    def chained(self, calls: Sequence[Callable[[], None]]) -> list[Callable[[], None]]:
        """A step's launches as graphs, which are launched as one."""
        if not wanted():
            return list(calls)
        return join_neighbours(calls, _is_launch, lambda row: Graphed(row, self.machine.capture), SHORTEST)

    def joins_epilogue(
        self, op: Op, ins: Sequence[Spec | Scalar], outs: Sequence[Spec], params: dict[str, Any]
    ) -> bool:
        """Whether a product or convolution with the elementwise group after it is the same calls of a library."""
        dnn = self.dnn()
        if dnn is not None and op.name in CONVOLUTIONS:
            # A later pass may lay the images anew: then there must be a plan, too, for brim's kernel is slower.
            other = [x if n == 1 else turned(x) for n, x in enumerate(ins)]  # a weight stays
            found = [registry.dnn_work(dnn, op, ins, outs, params)]
            found += [registry.dnn_work(dnn, op, other, [turned(x) for x in outs], params)]
            return None not in found
        if op.name == "conv2d_epilogue":
            return conv.joins_conv_epilogue(ins, outs, params)
        return joins_epilogue(op.name, ins, outs, params)

    def joins_norms(self, op: Op, ins: Sequence[Spec | Scalar], outs: Sequence[Spec], params: dict[str, Any]) -> bool:
        """Whether a norm and the elementwise groups around it are one kernel."""
        return norm.joins_norms(op.name, ins, outs, params)

    def joins_loss_gradient(
        self, op: Op, ins: Sequence[Spec | Scalar], outs: Sequence[Spec], params: dict[str, Any]
    ) -> bool:
        """Whether a loss and its gradient are one kernel."""
        return loss.joins_loss_gradient(op.name, ins, outs, params)

    def adopt(self, host: np.ndarray[Any, Any]) -> Any:
        """None: host memory is not the device's."""
        return None


def _is_launch(call: Any) -> bool:
    return isinstance(call, steps.Launch | Multiply | Zero | Execute)
