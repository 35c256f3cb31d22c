"""The emulated CUDA device with faults to order: kernels that do not compile, a device that is lost, a full card."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

import brim
from brim.device import Device, _backends, _devices
from brim_cuda.device import CudaBackend
from brim_cuda.emulation import EmulatedMachine, EmulationLoader
from brim_cuda.launch import Kernel
from brim_cuda.lowlevel import LowLevelError
from brim_cuda.nvrtc import NvrtcError
from brim_cuda.steps import failure

__all__ = ["FaultyMachine", "faulty_device"]

_numbers = itertools.count()


class FaultyLoader(EmulationLoader):
    """Runs kernels as long as it is let.

    Attributes:
        refused: no kernel with this in its text compiles; "" lets all.
        left: launches until the device is lost, None for never.
        lost: the status with which every call fails from then on, 0 while all is well.
        code: that status.
    """

    def __init__(self) -> None:
        super().__init__()
        self.refused, self.left, self.lost, self.code = "", None, 0, 719
        self.left: int | None

    def functions(self, kernels: Sequence[Kernel]) -> list[Callable[..., None]]:
        for kernel in kernels:
            if self.refused and self.refused in kernel.source:
                raise NvrtcError(f"NVRTC refuses the kernels for sm_90:\n{kernel.name}(1): error: by order")
        return [self._failing(kernel, run) for kernel, run in zip(kernels, super().functions(kernels), strict=True)]

    def _failing(self, kernel: Kernel, run: Callable[..., None]) -> Callable[..., None]:
        def launch(*args: Any) -> None:
            if self.left == 0:
                self.lost = self.code
            self.check(f"launching kernel {kernel.name}")
            run(*args)
            if self.left is not None:
                self.left -= 1

        return launch

    def check(self, doing: str) -> None:
        """Raises LowLevelError when the device is lost: it stays so, as a CUDA context does."""
        if self.lost:
            raise LowLevelError(f"CUDA_ERROR_{self.lost} (while {doing})", self.lost)


class _FaultyGraph:
    """A graph whose replays fail as launches do."""

    def __init__(self, graph: Any, loader: FaultyLoader) -> None:
        self._graph, self._loader, self.renew = graph, loader, graph.renew

    def replay(self) -> None:
        if self._loader.left is not None:  # somewhere in the graph
            self._loader.lost = self._loader.code
        self._loader.check("launching a graph")
        self._graph.replay()


class FaultyMachine(EmulatedMachine):
    """The emulated card; copies and waiting fail once it is lost, as those of ``brim_cuda.machine`` do."""

    loader: FaultyLoader

    def __init__(self, total_bytes: int) -> None:
        super().__init__(total_bytes)
        self.loader = FaultyLoader()

    def _check(self, what: str) -> None:
        try:
            self.loader.check(what)
        except LowLevelError as error:
            raise failure(f"{what} cuda:0", error) from error

    def upload(self, array: Any, host: np.ndarray[Any, Any]) -> None:
        self._check("a copy to")
        super().upload(array, host)

    def download(self, array: Any) -> np.ndarray[Any, Any]:
        self._check("a copy from")
        return super().download(array)

    def capture(self, calls: Sequence[Callable[[], None]]) -> Any:
        """Raises CaptureRefused."""
        return _FaultyGraph(super().capture(calls), self.loader)

    def synchronize(self, index: int) -> None:
        self._check("work on")


@contextmanager
def faulty_device(total_bytes: int = 512 << 20) -> Iterator[tuple[Device, FaultyMachine]]:
    """A device of its own, that no cache of kernels of another test belongs to."""
    name = f"faulty{next(_numbers)}"
    machine = FaultyMachine(total_bytes)
    _backends[name] = CudaBackend(machine, name)
    try:
        yield brim.device(name), machine
    finally:
        del _backends[name]
        _devices.pop((name, 0), None)
