"""The NVIDIA GPUs of this computer: memory by ``Vram``, arrays and streams of CuPy, copies through pinned memory.

Nothing is touched before the first question that needs a device; a context is created when its memory is first asked
for, and with it everything that brim will need of libraries, so that their size is known before anything is planned.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from importlib.util import find_spec
from typing import Any

import numpy as np

from brim.backend import HostServices, MemoryInfo
from brim.errors import DeviceError
from brim.op import REGISTRY
from brim.spec import Spec
from brim.units import format_bytes
from brim_cuda.cupy_runtime import read_system
from brim_cuda.dnn_open import wanted as dnn_wanted
from brim_cuda.feed import Feed, Fetch, PinnedRing
from brim_cuda.gpu import CupyLoader
from brim_cuda.graph_driver import Driver, DriverGraph, capture, load_driver
from brim_cuda.graphs import CaptureRefused
from brim_cuda.launch import Loader
from brim_cuda.lowlevel import OUT_OF_MEMORY, LowLevelError
from brim_cuda.measuring import Measuring
from brim_cuda.nvrtc import nvrtc_version
from brim_cuda.providers import make_provider
from brim_cuda.registry import bind
from brim_cuda.requirements import Facts, require
from brim_cuda.staging import PinnedStaging
from brim_cuda.steps import failure
from brim_cuda.stray import cap, refuse_allocators
from brim_cuda.vram import Segment, Vram

__all__ = ["GpuMachine"]

_resource: Any = importlib.import_module("resource") if find_spec("resource") else None  # Windows has none

_MIB = 1 << 20
_CONTEXT_BYTES = 450 * _MIB  # of a context with cuBLASLt, where it cannot be measured (see brim.program.profiles)
_LATER_BYTES = 64 * _MIB
"""Room for kernels that are loaded after the start: CUDA loads a kernel's code at its first use."""
_DNN_LATER_BYTES = 128 * _MIB
"""More of it with cuDNN, which has many large kernels; a guess, not measured."""


class _Buffer:
    """A segment, as CuPy sees it."""

    __slots__ = ("memory", "segment")

    def __init__(self, cupy: Any, segment: Segment, index: int) -> None:
        self.segment = segment
        self.memory = cupy.cuda.UnownedMemory(segment.address, segment.nbytes, segment, device_id=index)


class _Running:
    """Makes a device and its stream the current ones of this thread, and the stream of before afterwards.

    Raises DeviceError when the device is lost.
    """

    __slots__ = ("_index", "_runtime", "_stream")

    def __init__(self, runtime: Any, stream: Any, index: int) -> None:
        self._runtime, self._stream, self._index = runtime, stream, index

    def __enter__(self) -> None:
        try:
            self._runtime.setDevice(self._index)  # tells of what failed before, too
            self._stream.__enter__()
        except self._runtime.CUDARuntimeError as error:
            raise failure(f"the switch to cuda:{self._index}", error) from error

    def __exit__(self, *error: object) -> None:
        self._stream.__exit__(*error)


class _Gpu:
    """One device that was started."""

    def __init__(self, cupy: Any, index: int, loader: Loader, services: HostServices | None) -> None:
        self.cupy, self.index, self.loader = cupy, index, loader
        self.runtime = cupy.cuda.runtime
        self._services = services
        system = read_system(self.runtime, None if services is None else services.host)
        assert system.runtime is not None
        self.provider = make_provider(system, index)
        self.stream: Any = None
        self.feed: Any = None
        self.vram = Vram(
            self.provider,
            system.runtime,
            index,
            estimate_bytes=_CONTEXT_BYTES,
            trim=lambda: None if services is None else services.trim(),
            address_space_limit_bytes=_address_space_limit_bytes(),
        )
        self.staging = PinnedStaging(self._pin, self._charge)
        self.dnn_status = ""
        self.vram.start(self._open_context, self._load_libraries)

    def _pin(self, nbytes: int) -> Any:
        pinned = self.cupy.cuda.pinned_memory
        try:
            return pinned.PinnedMemoryPointer(pinned.PinnedMemory(nbytes), 0)
        except self.runtime.CUDARuntimeError as error:
            if error.status != OUT_OF_MEMORY:
                raise
            raise DeviceError(
                f"copies to and from cuda:{self.index} need {format_bytes(nbytes)} of host memory that stays where it "
                f"is, which the system refuses: {error}. Free host memory, or raise the limit of this container"
            ) from error

    def _charge(self, nbytes: int) -> Any:
        return (lambda: None) if self._services is None else self._services.charge(nbytes, "workspace")

    def _new_event(self) -> Any:
        return self.cupy.cuda.Event(block=False, disable_timing=True)

    def _open_context(self) -> None:
        try:
            self.runtime.setDevice(self.index)
            self.runtime.free(0)
            self.stream = self.cupy.cuda.Stream(non_blocking=True)
            ring = PinnedRing(lambda: PinnedStaging(self._pin, self._charge), self._new_event)
            copies = self.cupy.cuda.Stream(non_blocking=True)
            self.feed = Feed(self.runtime, self.stream, copies, ring, self._new_event)
            cap(self.cupy.get_default_memory_pool())
        except self.runtime.CUDARuntimeError as error:
            raise LowLevelError(str(error), int(error.status)) from error

    def _load_libraries(self) -> None:
        """A kernel, a product and a convolution, run once: libraries and their first kernels are loaded by that."""
        square, image, filters = Spec((64, 64)), Spec((1, 8, 8, 8)), Spec((8, 8, 3, 3))
        how = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 1}
        with _Running(self.runtime, self.stream, self.index):
            try:
                self._try("add", (square, square, square), {})
                self._try("matmul", (square, square, square), {})
                self.dnn_status = self.loader.open_dnn()
                if self.loader.dnn() is not None:
                    try:
                        self._try("conv2d", (image, filters, image), how)
                    except DeviceError as error:
                        if dnn_wanted() == "1":
                            raise
                        self.loader.close_dnn()
                        self.dnn_status = f"not used: {error}"
            except self.runtime.CUDARuntimeError as error:
                raise LowLevelError(str(error), int(error.status)) from error

    def _try(self, name: str, specs: tuple[Spec, Spec, Spec], params: dict[str, Any]) -> None:
        """Run an op of two inputs, on as much memory as it wants, whatever is in it."""
        each = 1 << 14
        kernel = bind(self.loader, REGISTRY[name], specs[:2], specs[2:], params, self.loader.dnn())
        nbytes = 3 * each + kernel.scratch_bytes
        address = self.runtime.malloc(nbytes)
        try:
            memory = self.cupy.cuda.UnownedMemory(address, nbytes, None, device_id=self.index)
            a, b, out = (self.view(memory, n * each, spec) for n, spec in enumerate(specs))
            kernel.run(out, a, b, scratch=self.view(memory, 3 * each, Spec((kernel.scratch_bytes,), np.dtype("u1"))))
            self.stream.synchronize()
        finally:
            self.runtime.free(address)

    def view(self, memory: Any, offset_bytes: int, spec: Spec) -> Any:
        item = spec.dtype.itemsize
        strides = None if spec.layout is None else tuple(step * item for step in spec.layout)
        at = self.cupy.cuda.MemoryPointer(memory, offset_bytes)
        return self.cupy.ndarray(spec.shape, spec.dtype, memptr=at, strides=strides)

    @contextlib.contextmanager
    def working(self, what: str) -> Iterator[None]:
        """Calls of the runtime for this device; their errors become DeviceError."""
        try:
            with _Running(self.runtime, self.stream, self.index):
                yield
        except (LowLevelError, self.runtime.CUDARuntimeError) as error:
            raise failure(f"{what} cuda:{self.index}", error) from error

    def upload(
        self, pairs: Sequence[tuple[int, np.ndarray[Any, Any]]], stage: int | None = None, generation: int = 0
    ) -> None:
        """Let memory have these bytes before anything that is launched from now on; nothing is waited for."""
        with self.working("a copy to"):
            self.feed.put(pairs, stage, generation)

    def new_fetch(self, array: Any) -> Fetch:
        """With memory and an event of its own."""
        staging = PinnedStaging(self._pin, self._charge)
        staging.reserve(array.nbytes)
        return Fetch(self.working, self.runtime, self.stream, array, staging, self._new_event())

    def download(self, address: int, data: np.ndarray[Any, Any]) -> None:
        """Copy bytes out, after everything that was launched before."""
        with self.working("a copy from"):
            for offset, nbytes in self.staging.pieces(data.size):
                with self.staging.lend(nbytes) as buffer:
                    kind = self.runtime.memcpyDeviceToHost
                    self.runtime.memcpyAsync(buffer.ptr, address + offset, nbytes, kind, self.stream.ptr)
                    self.stream.synchronize()
                    data[offset : offset + nbytes] = np.frombuffer(buffer, np.uint8, nbytes)


class GpuMachine:
    """All GPUs that this process sees. Implements ``brim_cuda.device.Machine``.

    Arguments:
        cupy: the module; imported when it is needed by default.
        look: gives the facts of this machine, or raises DeviceError.
        loader: compiles and launches.
        driver: gives the driver's functions for graphs.
    """

    def __init__(
        self,
        cupy: Any = None,
        look: Callable[[], Facts] = require,
        loader: Loader | None = None,
        driver: Callable[[], Driver] = load_driver,
    ) -> None:
        self._cupy, self._look = cupy, look
        self._facts: Facts | None = None
        self._gpus: dict[int, _Gpu] = {}
        self._services: dict[int, HostServices] = {}
        self._lock = threading.RLock()
        self.loader: Loader = CupyLoader(cupy) if loader is None else loader
        self._driver = driver

    def _ready(self) -> Any:
        """CuPy, after a look that everything is there. Raises DeviceError with what is missing."""
        if self._facts is None:
            self._facts = self._look()
            self._cupy = self._cupy or importlib.import_module("cupy")
            pool = self._cupy.get_default_memory_pool()
            refuse_allocators(os.environ, self._cupy.cuda.get_allocator(), pool)
        return self._cupy

    def _gpu(self, index: int) -> _Gpu:
        gpu = self._gpus.get(index)
        if gpu is None:
            with self._lock:
                gpu = self._gpus.get(index)
                if gpu is None:
                    cupy = self._ready()
                    try:
                        gpu = _Gpu(cupy, index, self.loader, self._services.get(index))
                    except LowLevelError as error:
                        raise failure(f"the start of cuda:{index}", error) from error
                    self._gpus[index] = gpu
        return gpu

    def count(self) -> int:
        """GPUs that this process sees. Raises DeviceError saying exactly what is missing."""
        self._ready()
        assert self._facts is not None
        return self._facts.device_count or 0

    def describe(self, index: int) -> str:
        """Name, size and compute capability; creates no context."""
        runtime = self._ready().cuda.runtime
        try:
            found = runtime.getDeviceProperties(index)
        except runtime.CUDARuntimeError as error:
            raise failure(f"a look at cuda:{index}", error) from error
        name = found["name"].decode() if isinstance(found["name"], bytes) else str(found["name"])
        return f"{name}, {format_bytes(int(found['totalGlobalMem']))}, sm_{found['major']}{found['minor']}"

    def facts(self, index: int) -> dict[str, str]:
        """Versions of driver, CuPy, NVRTC and cuBLASLt, and who counts memory."""
        cupy = self._ready()
        assert self._facts is not None
        driver = self._facts.driver_version or 0
        gpu = self._gpu(index)
        overhead = gpu.vram.overhead
        assert overhead is not None
        with gpu.working("a look at"):  # the library's handle belongs to the current device
            library = self.loader.gemm().library
        return {
            "driver": f"runs CUDA up to {driver // 1000}.{driver % 1000 // 10}",
            "cupy": str(cupy.__version__),
            "nvrtc": ".".join(map(str, nvrtc_version())),
            "cublasLt": _dotted(library.version()) if hasattr(library, "version") else "unknown",
            "cudnn": gpu.dnn_status,
            "memory": f"{gpu.provider.kind}; overhead {format_bytes(overhead.nbytes)} {overhead.exactness} "
            f"({overhead.source})",
        }

    def connect(self, index: int, services: HostServices) -> None:
        """What the framework does for this device's memory; before it is started."""
        self._services[index] = services

    def allocate(self, index: int, nbytes: int) -> Any:
        """One cudaMalloc. Raises BudgetExceeded, SpillDetected or DeviceError."""
        gpu = self._gpu(index)
        return _Buffer(gpu.cupy, gpu.vram.take(nbytes), index)

    def view(self, buffer: _Buffer | None, offset_bytes: int, spec: Spec) -> Any:
        """A CuPy array; strides may be zero or negative."""
        if buffer is None or spec.size == 0:
            return self._nothing(spec)
        index = buffer.memory.device_id
        return self._gpus[index].view(buffer.memory, offset_bytes, spec)

    def _nothing(self, spec: Spec) -> Any:
        cupy = self._ready()
        memory = cupy.cuda.UnownedMemory(0, 0, None, device_id=next(iter(self._gpus), 0))
        return cupy.ndarray(spec.shape, spec.dtype, memptr=cupy.cuda.MemoryPointer(memory, 0))

    def upload(self, array: Any, host: np.ndarray[Any, Any]) -> None:
        """Copy host values in, through pinned memory, in the order of launches."""
        if array.size:
            self._gpus[array.data.device_id].upload([_bytes_for(array, host)])

    def feed(self, pairs: Sequence[tuple[Any, Any]], stage: Any, generation: int) -> None:
        """Copy the inputs of a step in, if there is a stage while what was launched before still runs."""
        found = [(array.data.device_id, _bytes_for(array, host)) for array, host in pairs if array.size]
        if found:
            at = None if stage is None else stage.data.ptr
            self._gpus[found[0][0]].upload([pair for _, pair in found], at, generation)

    def fetcher(self, array: Any) -> Fetch:
        """Copies of a small array to the host, through a page of pinned memory of its own."""
        gpu = self._gpus[array.data.device_id]
        with gpu.working("a copy from"):
            return gpu.new_fetch(array)

    def download(self, array: Any) -> np.ndarray[Any, Any]:
        """A host copy."""
        host = np.empty(array.shape, array.dtype)
        if array.size:
            self._gpus[array.data.device_id].download(array.data.ptr, host.reshape(-1).view(np.uint8))
        return host

    def running(self, index: int) -> AbstractContextManager[Any]:
        """Launches go to the device's stream."""
        gpu = self._gpu(index)
        return _Running(gpu.runtime, gpu.stream, index)

    def synchronize(self, index: int) -> None:
        """Wait for the device's stream."""
        gpu = self._gpu(index)
        with gpu.working("work on"):
            gpu.stream.synchronize()

    def memory(self, index: int) -> MemoryInfo:
        """What is free, and what brim's start took of it."""
        gpu = self._gpu(index)
        assert gpu.vram.overhead is not None
        headroom = gpu.provider.headroom_bytes()
        later_bytes = _LATER_BYTES + (_DNN_LATER_BYTES if self.loader.dnn() is not None else 0)
        return MemoryInfo(
            total_bytes=gpu.provider.total_bytes(),
            available_bytes=max(0, gpu.provider.free_bytes() - later_bytes) + headroom,
            limited_by=f"memory of the device ({gpu.provider.kind})",
            overhead_bytes=gpu.vram.overhead.nbytes + later_bytes,
            overhead_exactness="estimated",
            headroom_bytes=headroom,
            unified=gpu.provider.shares_host_memory,
        )

    def capture(self, calls: Sequence[Callable[[], None]]) -> DriverGraph:
        """A graph on the current device's stream. Raises CaptureRefused."""
        gpu = self._gpus[self.loader.device()]
        try:
            driver = self._driver()
        except OSError as error:
            raise CaptureRefused(str(error)) from error
        return capture(driver, int(gpu.stream.ptr), calls, keeps=gpu.stream)

    def process_bytes(self, index: int) -> int | None:
        """What NVML counts for this process."""
        return self._gpu(index).provider.used_by_me_bytes()

    def measuring(self, index: int) -> Measuring:
        """Events on the device's stream, and what NVML tells."""
        gpu = self._gpu(index)
        system = read_system(gpu.runtime, None)
        assert system.runtime is not None
        return Measuring(gpu.cupy, gpu.stream, index, gpu.working, system.runtime.properties(index), system.nvml)


def _dotted(version: int) -> str:
    """cuBLASLt's version: 120903 is 12.9.3."""
    return f"{version // 10000}.{version // 100 % 100}.{version % 100}"


def _address_space_limit_bytes() -> int | None:
    """RLIMIT_AS, None for none or where there is no such thing."""
    if _resource is None:
        return None
    limit = _resource.getrlimit(_resource.RLIMIT_AS)[0]
    return None if limit == _resource.RLIM_INFINITY else int(limit)


def _bytes_for(array: Any, host: np.ndarray[Any, Any]) -> tuple[int, np.ndarray[Any, Any]]:
    """Address of a device array, and host values in its dtype as flat bytes."""
    return array.data.ptr, np.ascontiguousarray(host, array.dtype).reshape(-1).view(np.uint8)
