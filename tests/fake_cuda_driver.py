"""The driver's functions for graphs, on a loader that emulates kernels: captures are lists of launches."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from brim_cuda.emulation import EmulationLoader
from brim_cuda.emulation.loader import Recorded
from brim_cuda.graph_driver import KernelParams

__all__ = ["FakeDriverLibrary"]

INVALIDATED = 901  # CUDA_ERROR_STREAM_CAPTURE_INVALIDATED


class FakeDriverLibrary:
    """What ``graph_driver.Driver`` calls.

    Attributes:
        fail: names of functions and the CUresult that they return.
        calls: names of the functions that were called.
        live: graphs and executables that were not given back, by handle.
    """

    def __init__(self, loader: EmulationLoader) -> None:
        self.loader = loader
        self.fail: dict[str, int] = {}
        self.calls: list[str] = []
        self.live: dict[int, Any] = {}
        self._capture: Any = None
        self._entries: list[Any] = []
        self._nodes: dict[int, Any] = {}
        self._keeps: list[Any] = []
        self._next = 1000

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("cu") and name != "cuGetErrorString":
            self.calls.append(name)
            if (code := self.fail.get(name)) and name != "cuStreamEndCapture":
                return lambda *_: code
        return super().__getattribute__(name)

    def cuGetErrorString(self, code: int, text: Any) -> int:
        text._obj.value = f"error {code} of the test".encode()
        return 0

    def _handle(self, what: Any) -> int:
        self._next += 1
        self.live[self._next] = what
        return self._next

    def cuStreamBeginCapture_v2(self, stream: Any, mode: int) -> int:
        assert self._capture is None
        assert mode == 1
        self._capture = self.loader.record()
        self._entries = self._capture.__enter__()
        return 0

    def cuStreamEndCapture(self, stream: Any, graph: Any) -> int:
        self._capture.__exit__(None, None, None)
        self._capture = None
        if code := self.fail.get("cuStreamEndCapture"):  # a capture that was spoilt ends, too
            return code
        graph._obj.value = self._handle(self._entries)
        return 0

    def cuStreamGetCaptureInfo_v2(
        self, stream: Any, status: Any, serial: Any, graph: Any, nodes: Any, count: Any
    ) -> int:
        last = self._entries[-1]
        assert isinstance(last, Recorded)
        number = self._next = self._next + 1
        self._nodes[number] = last
        cell = ctypes.c_void_p(number)
        self._keeps.append(cell)
        nodes._obj.contents = cell
        count._obj.value = 1
        return 0

    def cuGraphInstantiateWithFlags(self, made: Any, graph: Any, flags: Any) -> int:
        made._obj.value = self._handle(list(self.live[graph.value]))
        return 0

    def cuGraphKernelNodeGetParams_v2(self, node: Any, params: Any) -> int:
        assert isinstance(params._obj, KernelParams)
        params._obj.func = node.value
        return 0

    def cuGraphExecKernelNodeSetParams_v2(self, executable: Any, node: Any, params: Any) -> int:
        assert executable.value in self.live
        entry = self._nodes[node.value]
        assert params._obj.func == node.value
        values = []
        for number, old in enumerate(entry.values):
            raw = (ctypes.c_uint8 * old.nbytes).from_address(params._obj.kernelParams[number])
            values.append(np.frombuffer(bytes(raw), old.dtype).reshape(old.shape))
        entry.write(values)
        return 0

    def cuGraphLaunch(self, executable: Any, stream: Any) -> int:
        for entry in self.live[executable.value]:
            entry()
        return 0

    def cuGraphExecDestroy(self, executable: Any) -> int:
        del self.live[executable.value]
        return 0

    def cuGraphDestroy(self, graph: Any) -> int:
        del self.live[graph.value]
        return 0
