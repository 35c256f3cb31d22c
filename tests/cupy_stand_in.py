"""CuPy with host memory for a device: its own arrays and pointers, and a runtime that is made of NumPy and ctypes.

What ``brim_cuda.machine`` does with CuPy is then done for real, but for the driver: it does not show that a GPU works.
Copies on streams are checked for missing waits (``cuda_streams.py``).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import cupy
import numpy as np

from brim_cuda.device import CudaBackend
from brim_cuda.emulation import EmulationLoader
from brim_cuda.graph_driver import Driver
from brim_cuda.machine import GpuMachine
from brim_cuda.requirements import Facts
from cuda_streams import Books, Event, Stream
from fake_cuda_driver import FakeDriverLibrary

__all__ = ["FACTS", "NAME", "Loader", "StandIn", "registered"]

NAME = "standin"

GIB, MIB = 2**30, 2**20
CONTEXT_BYTES = 300 * MIB
FACTS = Facts(("cupy-cuda12x",), "14.1.1", "", 12090, True, 13000, 1)


class RuntimeFailure(RuntimeError):
    """As ``CUDARuntimeError``."""

    def __init__(self, status: int) -> None:
        super().__init__(f"cudaError {status}")
        self.status = status


class Loader(EmulationLoader):
    """Runs kernels on the memory that CuPy's arrays point to."""

    def __init__(self, owner: StandIn) -> None:
        super().__init__()
        self.owner = owner

    def functions(self, kernels: Any) -> Any:
        assert self.owner.streams, "kernels are loaded and launched with a device and its stream current"
        return super().functions(kernels)

    def stream(self) -> int:
        return self.owner.streams[-1].ptr

    def address(self, array: Any) -> int:
        return int(array.data.ptr) if isinstance(array, cupy.ndarray) else super().address(array)


class Runtime:
    """``cupy.cuda.runtime`` of a machine with one card.

    Attributes:
        total_bytes: its size.
        fail: status with which every copy and synchronisation fails, 0 for none.
        live: what was allocated and not freed, by address.
    """

    CUDARuntimeError = RuntimeFailure
    memcpyHostToDevice, memcpyDeviceToHost, memcpyDeviceToDevice = 1, 2, 3

    def __init__(self, total_bytes: int) -> None:
        self.total_bytes, self.fail = total_bytes, 0
        self.live: dict[int, Any] = {}
        self.context = False
        self.device = 0
        self.copies: list[tuple[int, int]] = []
        self.books = Books(self.check)

    def setDevice(self, index: int) -> None:
        self.device = index

    def getDevice(self) -> int:
        return self.device

    def getDeviceProperties(self, index: int) -> dict[str, Any]:
        return {"name": b"Stand-in", "uuid": b"0" * 16, "totalGlobalMem": self.total_bytes, "major": 9, "minor": 0}

    def deviceGetPCIBusId(self, index: int) -> str:
        return "0000:01:00.0"

    def memGetInfo(self) -> tuple[int, int]:
        self.context = True
        held = sum(memory.nbytes for memory in self.live.values())
        return self.total_bytes - CONTEXT_BYTES - held, self.total_bytes

    def malloc(self, nbytes: int) -> int:
        if nbytes > self.memGetInfo()[0]:
            raise RuntimeFailure(2)
        memory = np.full(nbytes, 0xC7, np.uint8)
        self.live[memory.ctypes.data] = memory
        return memory.ctypes.data

    def free(self, address: int) -> None:
        if address:
            self.books.forget(address, self.live.pop(address).nbytes)
        self.context = True

    def memcpyAsync(self, target: int, source: int, nbytes: int, kind: int, stream: int) -> None:
        self.check()
        sides = {1: (target,), 2: (source,), 3: (target, source)}[kind]
        for device in sides:
            assert any(start <= device and device + nbytes <= start + m.nbytes for start, m in self.live.items())
        self.copies.append((kind, nbytes))
        self.books.copy(target, source, nbytes, kind, stream)

    def check(self) -> None:
        if self.fail:
            raise RuntimeFailure(self.fail)


class _Pool:
    def __init__(self) -> None:
        self.limit = 0

    def free_all_blocks(self) -> None: ...

    def total_bytes(self) -> int:
        return 0

    def get_limit(self) -> int:
        return self.limit

    def set_limit(self, size: int) -> None:
        self.limit = size

    def malloc(self, nbytes: int) -> None: ...


class _Pinned:
    def __init__(self, nbytes: int) -> None:
        self.memory = np.zeros(nbytes, np.uint8)


class _PinnedPointer:
    """Has the buffer protocol's place (``memoryview``) and an address, as CuPy's."""

    def __new__(cls, pinned: _Pinned, offset: int) -> Any:
        made = pinned.memory.view(_WithAddress)
        return made


class _WithAddress(np.ndarray):
    @property
    def ptr(self) -> int:
        return int(self.ctypes.data)


class StandIn:
    """The module.

    Attributes:
        streams: those that are current, innermost last.
    """

    __version__ = "14.1.1"
    ndarray = cupy.ndarray

    def __init__(self, total_bytes: int = 2 * GIB) -> None:
        self.pool = _Pool()
        self.streams: list[Stream] = []
        self.cuda = SimpleNamespace(
            runtime=Runtime(total_bytes),
            UnownedMemory=cupy.cuda.UnownedMemory,
            MemoryPointer=cupy.cuda.MemoryPointer,
            Stream=self._stream,
            Event=self._event,
            pinned_memory=SimpleNamespace(PinnedMemory=_Pinned, PinnedMemoryPointer=_PinnedPointer),
            get_allocator=lambda: self.pool.malloc,
        )

    def _stream(self, non_blocking: bool) -> Stream:
        assert non_blocking
        return Stream(self.cuda.runtime.books, self.streams)

    def _event(self, block: bool, disable_timing: bool) -> Event:
        assert not block
        assert disable_timing
        return Event(self.cuda.runtime.books)

    def get_default_memory_pool(self) -> _Pool:
        return self.pool


@contextmanager
def registered() -> Iterator[StandIn]:
    """A machine with one card, registered as the device NAME."""
    devices = sys.modules["brim.device"]
    made = StandIn()
    loader = Loader(made)
    driver = Driver(FakeDriverLibrary(loader))
    devices._backends[NAME] = CudaBackend(GpuMachine(made, lambda: FACTS, loader, lambda: driver), NAME)
    try:
        yield made
    finally:
        del devices._backends[NAME]
        devices._devices.pop((NAME, 0), None)
