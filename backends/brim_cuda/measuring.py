"""What a measurement needs of a device: events on the stream of launches, a plain copy, the card's facts and its state.

Not used by the framework itself; ``brim bench`` asks the backend for it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from brim_cuda.lowlevel import DeviceProperties, LowLevelError

__all__ = ["Measuring"]


class Measuring:
    """Of one device.

    Arguments:
        cupy: the module.
        stream: of launches.
        index: of the device.
        working: makes the device and the stream the current ones, and CUDA's errors DeviceErrors.
        properties: who the device is.
        nvml: tells the state; None where there is none.
    """

    def __init__(
        self,
        cupy: Any,
        stream: Any,
        index: int,
        working: Callable[[str], AbstractContextManager[Any]],
        properties: DeviceProperties,
        nvml: Any,
    ) -> None:
        self._cupy, self._stream, self._index, self._working = cupy, stream, index, working
        self._properties, self._nvml = properties, nvml
        self._handle: Any = None

    def mark(self) -> Any:
        """An event behind everything launched so far; nothing is waited for."""
        with self._working("a mark on"):
            event = self._cupy.cuda.Event(block=False, disable_timing=False)
            event.record(self._stream)
        return event

    def seconds(self, before: Any, after: Any) -> float:
        """The device's time between two marks; waits for the later one."""
        with self._working("work on"):
            after.synchronize()
            return float(self._cupy.cuda.get_elapsed_time(before, after)) * 1e-3

    def copy(self, target: Any, source: Any) -> None:
        """Order a copy between row-major arrays of one size, by the driver's own copy."""
        if target.nbytes != source.nbytes:
            raise ValueError(f"a copy takes arrays of one size, got {target.nbytes} and {source.nbytes} bytes")
        runtime = self._cupy.cuda.runtime
        with self._working("a copy on"):
            kind = runtime.memcpyDeviceToDevice
            runtime.memcpyAsync(target.data.ptr, source.data.ptr, target.nbytes, kind, self._stream.ptr)

    def card(self) -> dict[str, Any]:
        """Name, identity, processors, size of the L2 cache, and what is free for everybody now."""
        runtime = self._cupy.cuda.runtime
        with self._working("a look at"):
            found = runtime.getDeviceProperties(self._index)
            free_bytes, _ = runtime.memGetInfo()
        return {
            "name": self._properties.name,
            "uuid": self._properties.uuid,
            "compute_capability": f"{found['major']}.{found['minor']}",
            "multiprocessors": int(found["multiProcessorCount"]),
            "l2_bytes": int(found["l2CacheSize"]),
            "free_bytes": int(free_bytes),
        }

    def state(self) -> dict[str, float]:
        """Clocks, temperature, power and reasons of lower clocks now, each as far as NVML tells it."""
        if self._nvml is None:
            return {}
        try:
            if self._handle is None:
                self._handle = self._nvml.find(self._properties.uuid, self._properties.pci_bus_id)
        except LowLevelError:
            return {}
        found: dict[str, float] = self._nvml.state(self._handle)
        return found
