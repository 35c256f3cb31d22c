"""CUDA's graphs through the driver's library: capture of a stream, nodes of kernels, and replays.

Signatures and structures are those of ``cuda.h`` of CUDA 12 (https://docs.nvidia.com/cuda/cuda-driver-api).
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
import weakref
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np

from brim_cuda.graphs import CaptureRefused
from brim_cuda.lowlevel import LowLevelError
from brim_cuda.steps import Launch

__all__ = ["Driver", "DriverGraph", "capture", "load_driver"]

_THREAD_LOCAL = 1
"""CU_STREAM_CAPTURE_MODE_THREAD_LOCAL: what this thread must not do while it captures ends the capture; other threads
may do as they please."""


class KernelParams(ctypes.Structure):
    """CUDA_KERNEL_NODE_PARAMS_v2."""

    _fields_ = [
        ("func", ctypes.c_void_p),
        ("gridDimX", ctypes.c_uint), ("gridDimY", ctypes.c_uint), ("gridDimZ", ctypes.c_uint),
        ("blockDimX", ctypes.c_uint), ("blockDimY", ctypes.c_uint), ("blockDimZ", ctypes.c_uint),
        ("sharedMemBytes", ctypes.c_uint),
        ("kernelParams", ctypes.POINTER(ctypes.c_void_p)),
        ("extra", ctypes.POINTER(ctypes.c_void_p)),
        ("kern", ctypes.c_void_p),
        ("ctx", ctypes.c_void_p),
    ]  # fmt: skip


class Driver:
    """The functions of libcuda that graphs need; failures are LowLevelError with the driver's words.

    Arguments:
        library: libcuda, or what stands in for it.
    """

    def __init__(self, library: Any) -> None:
        self._library = library

    def call(self, name: str, *arguments: Any) -> None:
        """Call a function that returns a CUresult."""
        code = getattr(self._library, name)(*arguments)
        if code:
            text = ctypes.c_char_p()
            self._library.cuGetErrorString(code, ctypes.byref(text))
            told = text.value.decode() if text.value else "unknown error"
            raise LowLevelError(f"{name}: {told} (CUresult {code})", code)

    def begin(self, stream: int) -> None:
        """Launches of this thread on the stream are recorded from now on."""
        self.call("cuStreamBeginCapture_v2", ctypes.c_void_p(stream), _THREAD_LOCAL)

    def end(self, stream: int) -> int:
        """The graph that was recorded."""
        graph = ctypes.c_void_p()
        self.call("cuStreamEndCapture", ctypes.c_void_p(stream), ctypes.byref(graph))
        if not graph.value:
            raise LowLevelError("cuStreamEndCapture: the capture was spoilt by a call that cannot be captured")
        return graph.value

    def last_node(self, stream: int) -> int:
        """The node that was recorded last."""
        status, serial = ctypes.c_int(), ctypes.c_uint64()
        graph, nodes, count = ctypes.c_void_p(), ctypes.POINTER(ctypes.c_void_p)(), ctypes.c_size_t()
        self.call(
            "cuStreamGetCaptureInfo_v2", ctypes.c_void_p(stream), ctypes.byref(status), ctypes.byref(serial),
            ctypes.byref(graph), ctypes.byref(nodes), ctypes.byref(count),
        )  # fmt: skip
        if count.value != 1:
            raise LowLevelError(f"cuStreamGetCaptureInfo: {count.value} last nodes where one launch came after another")
        return int(nodes[0] or 0)

    def instantiate(self, graph: int) -> int:
        """What can be launched."""
        made = ctypes.c_void_p()
        self.call("cuGraphInstantiateWithFlags", ctypes.byref(made), ctypes.c_void_p(graph), ctypes.c_uint64(0))
        return int(made.value or 0)

    def kernel_params(self, node: int) -> KernelParams:
        """How a node launches its kernel."""
        params = KernelParams()
        self.call("cuGraphKernelNodeGetParams_v2", ctypes.c_void_p(node), ctypes.byref(params))
        return params

    def set_params(self, executable: int, node: int, params: KernelParams) -> None:
        """Launch a node's kernel with these from now on; the arguments are copied."""
        self.call(
            "cuGraphExecKernelNodeSetParams_v2",
            ctypes.c_void_p(executable),
            ctypes.c_void_p(node),
            ctypes.byref(params),
        )

    def launch(self, executable: int, stream: int) -> None:
        """Replay on a stream."""
        self.call("cuGraphLaunch", ctypes.c_void_p(executable), ctypes.c_void_p(stream))

    def destroy(self, graph: int, executable: int = 0) -> None:
        """Give both back; a replay that is under way ends first."""
        if executable:
            self.call("cuGraphExecDestroy", ctypes.c_void_p(executable))
        if graph:
            self.call("cuGraphDestroy", ctypes.c_void_p(graph))


@cache
def load_driver() -> Driver:
    """The driver of this machine. Raises OSError where there is none."""
    return Driver(ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"))


class _Arguments:
    """The arguments of one kernel in memory of their own, and the structure that points to them."""

    def __init__(self, params: KernelParams, values: Sequence[Any]) -> None:
        self.places = [np.array(value) for value in values]
        self.table = (ctypes.c_void_p * len(self.places))(*(place.ctypes.data for place in self.places))
        self.params = params
        params.kernelParams = ctypes.cast(self.table, ctypes.POINTER(ctypes.c_void_p))
        params.extra = None

    def write(self, values: Sequence[Any]) -> None:
        for place, value in zip(self.places, values, strict=True):
            place[...] = value


class DriverGraph:
    """A captured graph on a GPU. Implements ``graphs.Graph``.

    Arguments:
        driver: whose functions are called.
        graph: as ``Driver.end`` gives it; it is owned from now on.
        stream: where it is replayed.
        nodes: node and first arguments of the launches that change, by their number.
        keeps: what must live as long as the graph.
    """

    def __init__(
        self, driver: Driver, graph: int, stream: int, nodes: dict[int, tuple[int, Sequence[Any]]], keeps: Any
    ) -> None:
        self._driver, self._stream, self._keeps = driver, stream, keeps
        executable = 0
        try:
            executable = driver.instantiate(graph)
            self._arguments = {
                number: (node, _Arguments(driver.kernel_params(node), values))
                for number, (node, values) in nodes.items()
            }
        except BaseException:
            driver.destroy(graph, executable)
            raise
        self._executable = executable
        weakref.finalize(self, _destroy, driver, graph, executable)

    def renew(self, number: int, values: Sequence[Any]) -> None:
        """Other arguments for one launch."""
        node, arguments = self._arguments[number]
        arguments.write(values)
        self._driver.set_params(self._executable, node, arguments.params)

    def replay(self) -> None:
        """One launch."""
        self._driver.launch(self._executable, self._stream)


def _destroy(driver: Driver, graph: int, executable: int) -> None:
    with contextlib.suppress(LowLevelError):  # the device is lost, or the process ends: nothing is left to give back
        driver.destroy(graph, executable)


def capture(driver: Driver, stream: int, calls: Sequence[Callable[[], None]], keeps: Any = None) -> DriverGraph:
    """A graph of what these calls launch on a stream, which must be the current one.

    Raises:
        CaptureRefused: a call did something else, or the driver refuses; nothing of the attempt is left.
    """
    nodes: dict[int, tuple[int, Sequence[Any]]] = {}
    try:
        driver.begin(stream)
    except LowLevelError as error:
        raise CaptureRefused(str(error)) from error
    try:
        for number, call in enumerate(calls):
            call()
            if isinstance(call, Launch) and call.cells:
                nodes[number] = driver.last_node(stream), call.values
    except BaseException as error:
        with contextlib.suppress(LowLevelError):  # a spoilt capture leaves no graph
            driver.destroy(driver.end(stream))
        if isinstance(error, Exception):
            raise CaptureRefused(f"{type(error).__name__}: {error}") from error
        raise
    try:
        return DriverGraph(driver, driver.end(stream), stream, nodes, keeps)
    except LowLevelError as error:
        raise CaptureRefused(str(error)) from error
