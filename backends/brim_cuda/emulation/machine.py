"""A CUDA device made of host memory: the same backend, kernels and launches as on a GPU, for machines without one."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from brim.backend import HostServices, MemoryInfo
from brim.errors import BudgetExceeded, DeviceError
from brim.spec import Spec
from brim.units import format_bytes
from brim_cuda.emulation.loader import EmulationLoader, Recorded, find_compiler
from brim_cuda.graphs import CaptureRefused

__all__ = ["EmulatedMachine"]

Array = np.ndarray[Any, Any]
_ALIGNMENT_BYTES = 512
_FRESH = 0xC7  # what new memory holds: floats of -1e5 or NaN-like patterns, never the zeros of a fresh page


class _RecordedGraph:
    """Launches that were captured. Implements ``brim_cuda.graphs.Graph``.

    Arguments:
        entries: what runs, in order.
        places: for each call that was captured, its last entry.
    """

    def __init__(self, entries: Sequence[Callable[[], Any]], places: Sequence[int]) -> None:
        self._entries, self._places = list(entries), list(places)

    def renew(self, number: int, values: Sequence[Any]) -> None:
        """Other arguments for one launch."""
        entry = self._entries[self._places[number]]
        assert isinstance(entry, Recorded)
        entry.write(values)

    def replay(self) -> None:
        """Everything, in order."""
        for entry in self._entries:
            entry()


class _Fetch:
    """What an array held when a copy of it was ordered. Implements ``brim_cuda.device.Fetcher``."""

    def __init__(self, machine: EmulatedMachine, array: Array) -> None:
        self._machine, self._array = machine, array
        self._copied: list[Array] = []

    def start(self) -> None:
        """A copy at once."""
        self._copied = [self._machine.download(self._array)]

    def value(self) -> Array:
        """Of the last copy. Raises IndexError for one that was not ordered."""
        return self._copied[-1]


class EmulatedMachine:
    """One device. Implements ``brim_cuda.device.Machine``.

    Arguments:
        total_bytes: its size.
        overhead_bytes: what context and libraries would take.
        order: in which order threads run, see ``EmulationLoader``.

    Attributes:
        held_bytes, peak_bytes: taken now, and the most so far, without the overhead.
        staged_feeds: how often inputs went by way of a stage.
    """

    def __init__(self, total_bytes: int = 1 << 30, overhead_bytes: int = 64 << 20, order: int = 0) -> None:
        self.loader = EmulationLoader(order)
        self.total_bytes, self.overhead_bytes = total_bytes, overhead_bytes
        self.held_bytes = self.peak_bytes = 0
        self.staged_feeds = 0
        self._services: HostServices | None = None
        self._lock = threading.RLock()

    def count(self) -> int:
        """One. Raises DeviceError without a compiler."""
        if find_compiler() is None:
            raise DeviceError("the emulated CUDA device compiles its kernels with g++, which was not found; install it")
        return 1

    def describe(self, index: int) -> str:
        """What it is."""
        return f"emulated CUDA device, {format_bytes(self.total_bytes)} of host memory"

    def facts(self, index: int) -> dict[str, str]:
        """What runs the kernels."""
        return {"compiler": str(find_compiler()), "products": "NumPy in place of cuBLASLt"}

    def connect(self, index: int, services: HostServices) -> None:
        """Used to make room before a refusal, as on a GPU."""
        self._services = services

    def allocate(self, index: int, nbytes: int) -> Array:
        """Host memory filled with a pattern. Raises BudgetExceeded where a card of this size would be full."""
        self._allowed("an allocation")
        with self._lock:
            if nbytes > self._free_bytes() and self._services is not None:
                self._services.trim()
            free_bytes = self._free_bytes()
            if nbytes > free_bytes:
                raise BudgetExceeded(
                    f"emulated device: {format_bytes(nbytes)} were asked for, {format_bytes(free_bytes)} are free of "
                    f"{format_bytes(self.total_bytes)}. Nothing was allocated. Take a smaller model or batch"
                )
            raw = np.full(nbytes + _ALIGNMENT_BYTES, _FRESH, np.uint8)
            start = -raw.ctypes.data % _ALIGNMENT_BYTES
            buffer = raw[start : start + nbytes]
            self.held_bytes += nbytes
            self.peak_bytes = max(self.peak_bytes, self.held_bytes)
            weakref.finalize(raw, self._gone, nbytes)
            return buffer

    def _free_bytes(self) -> int:
        return self.total_bytes - self.overhead_bytes - self.held_bytes

    def _gone(self, nbytes: int) -> None:
        self.held_bytes -= nbytes

    def view(self, buffer: Array | None, offset_bytes: int, spec: Spec) -> Array:
        """A NumPy array; strides may be zero or negative."""
        if buffer is None or spec.size == 0:
            return np.empty(spec.shape, spec.dtype)
        strides = None if spec.layout is None else tuple(s * spec.dtype.itemsize for s in spec.layout)
        return np.ndarray(spec.shape, spec.dtype, buffer, offset_bytes, strides)

    def upload(self, array: Array, host: Array) -> None:
        """Copy in. Raises ValueError for an array with gaps, which a GPU's copy engine would not fill."""
        self._allowed("a copy to the device")
        if not array.flags.c_contiguous:
            raise ValueError("only row-major arrays are copied to a device")
        np.copyto(array, host)

    def feed(self, pairs: Sequence[tuple[Array, Array]], stage: Array | None, generation: int) -> None:
        """By way of the stage, so that one that is too small, or memory of something else, is seen."""
        self._allowed("a copy to the device")
        at = 0
        for array, host in pairs:
            if stage is None:
                self.upload(array, host)
                continue
            piece = stage[at : at + array.nbytes].view(array.dtype).reshape(array.shape)
            self.upload(piece, host)
            self.upload(array, piece)
            at += -(-array.nbytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        if stage is not None:
            self.staged_feeds += 1
            stage[:] = _FRESH  # a step that reads its inputs here, and not where they were moved, computes nonsense

    def fetcher(self, array: Array) -> _Fetch:
        """The array as it is when the copy is ordered."""
        return _Fetch(self, array)

    def download(self, array: Array) -> Array:
        """A copy. Raises ValueError for an array with gaps."""
        self._allowed("a copy from the device")
        if not array.flags.c_contiguous:
            raise ValueError("only row-major arrays are copied from a device")
        return array.copy()

    @contextlib.contextmanager
    def running(self, index: int) -> Iterator[None]:
        """NumPy's part in products gives inf and nan without warnings."""
        with np.errstate(all="ignore"):
            yield

    def synchronize(self, index: int) -> None:
        """Everything has happened when a call returns."""
        self._allowed("a wait for the device")

    def memory(self, index: int) -> MemoryInfo:
        """As a card of its own."""
        return MemoryInfo(
            total_bytes=self.total_bytes,
            available_bytes=self._free_bytes(),
            limited_by="emulated device memory",
            overhead_bytes=self.overhead_bytes,
            overhead_exactness="exact",
        )

    def capture(self, calls: Sequence[Callable[[], None]]) -> _RecordedGraph:
        """The launches as they would be captured: run again with the arguments of now. Raises CaptureRefused."""
        try:
            with self.loader.record() as entries:
                places = []
                for call in calls:
                    call()
                    places.append(len(entries) - 1)
        except Exception as error:
            raise CaptureRefused(f"{type(error).__name__}: {error}") from error
        return _RecordedGraph(entries, places)

    def _allowed(self, what: str) -> None:
        """What waits for a device, or allocates, spoils a capture."""
        if self.loader.recording is not None:
            raise RuntimeError(f"{what} while a stream is captured")

    def process_bytes(self, index: int) -> int:
        """Overhead and all buffers."""
        return self.overhead_bytes + self.held_bytes

    def measuring(self, index: int) -> None:
        """None: how long an emulation takes says nothing about a device."""
        return
