"""NVML through ctypes: memory of a card and who holds it. Part of every NVIDIA driver; no package is needed.

Source: NVIDIA, NVML API reference (functions and structures by name; error codes of nvmlReturn_t).
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Callable
from typing import Any

from brim_cuda.lowlevel import LowLevelError, Neighbour, Reading

__all__ = ["CtypesNvml", "open_nvml"]

_REASONS = {3: "not supported", 4: "no permission", 6: "not found", 13: "not supported"}
_TOO_SMALL = 7  # NVML_ERROR_INSUFFICIENT_SIZE: more processes than asked for
_UNKNOWN_BYTES = 2**64 - 1  # NVML_VALUE_NOT_AVAILABLE
_LISTS = ("nvmlDeviceGetComputeRunningProcesses_v3", "nvmlDeviceGetGraphicsRunningProcesses_v3")


class _Memory(ctypes.Structure):
    """nvmlMemory_t"""

    _fields_ = [("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong)]


class _Process(ctypes.Structure):
    """nvmlProcessInfo_t"""

    _fields_ = [
        ("pid", ctypes.c_uint),
        ("used_bytes", ctypes.c_ulonglong),
        ("gpu_instance", ctypes.c_uint),
        ("compute_instance", ctypes.c_uint),
    ]


class CtypesNvml:
    """``brim_cuda.lowlevel.Nvml`` over a loaded library. Raises LowLevelError where NVML refuses.

    Arguments:
        library: with NVML's functions as attributes.
    """

    def __init__(self, library: Any) -> None:
        self._library = library
        self._call("nvmlInit_v2")

    def _call(self, name: str, *arguments: Any) -> None:
        function = getattr(self._library, name, None)
        if function is None:
            raise LowLevelError(f"the NVIDIA driver is too old: its NVML has no {name}", 13, "not supported")
        code = int(function(*arguments))
        if code:
            raise LowLevelError(f"{name} failed with NVML error {code}", code, _REASONS.get(code, "other"))

    def find(self, uuid: str, pci_bus_id: str) -> Any:
        """The device's handle by UUID, else by PCI address."""
        handle = ctypes.c_void_p()
        tries = [("nvmlDeviceGetHandleByUUID", uuid), ("nvmlDeviceGetHandleByPciBusId_v2", pci_bus_id)]
        last = LowLevelError("neither UUID nor PCI address is known", 6, "not found")
        for name, text in tries:
            if text:
                try:
                    self._call(name, ctypes.c_char_p(text.encode()), ctypes.byref(handle))
                except LowLevelError as error:
                    last = error
                else:
                    return handle
        raise last

    def memory(self, handle: Any) -> Reading:
        """Free and total bytes of the whole card."""
        memory = _Memory()
        self._call("nvmlDeviceGetMemoryInfo", handle, ctypes.byref(memory))
        return Reading(memory.free, memory.total)

    def processes(self, handle: Any) -> list[Neighbour]:
        """Processes that compute or draw; one that does both is listed twice."""
        found = self._processes(_LISTS[0], handle)
        try:
            return found + self._processes(_LISTS[1], handle)
        except LowLevelError:  # a card without graphics
            return found

    def _processes(self, name: str, handle: Any) -> list[Neighbour]:
        room = 64
        while True:
            count = ctypes.c_uint(room)
            table = (_Process * room)()
            try:
                self._call(name, handle, ctypes.byref(count), table)
            except LowLevelError as error:
                if error.code != _TOO_SMALL or room > 2**16:
                    raise
                room = max(2 * room, count.value + 16)  # more may have come meanwhile
                continue
            entries = table[: count.value]
            return [Neighbour(one.pid, None if one.used_bytes == _UNKNOWN_BYTES else one.used_bytes) for one in entries]

    def mig_enabled(self, handle: Any) -> bool:
        """Whether the card is cut into instances now; False where it cannot be."""
        current, pending = ctypes.c_uint(), ctypes.c_uint()
        try:
            self._call("nvmlDeviceGetMigMode", handle, ctypes.byref(current), ctypes.byref(pending))
        except LowLevelError as error:
            if error.reason == "not supported":
                return False
            raise
        return current.value == 1

    def state(self, handle: Any) -> dict[str, float]:
        """What the device does now; what NVML does not tell of this one is left out.

        Returns:
            "sm_clock_hz", "memory_clock_hz", "temperature_celsius", "power_watts", "power_limit_watts", and
            "slowed_by": a sum of nvmlClocksEventReasons, 0 or 1 (idle) where nothing slows the clocks.
        """
        number, wide, found = ctypes.c_uint(), ctypes.c_ulonglong(), dict[str, float]()
        for key, name, arguments, result, unit in (
            ("sm_clock_hz", "nvmlDeviceGetClockInfo", (1,), number, 1e6),
            ("memory_clock_hz", "nvmlDeviceGetClockInfo", (2,), number, 1e6),
            ("temperature_celsius", "nvmlDeviceGetTemperature", (0,), number, 1.0),
            ("power_watts", "nvmlDeviceGetPowerUsage", (), number, 1e-3),
            ("power_limit_watts", "nvmlDeviceGetEnforcedPowerLimit", (), number, 1e-3),
            ("slowed_by", "nvmlDeviceGetCurrentClocksThrottleReasons", (), wide, 1.0),
        ):
            with contextlib.suppress(LowLevelError):
                self._call(name, handle, *arguments, ctypes.byref(result))
                found[key] = result.value * unit
        return found


def open_nvml(load_library: Callable[[str], Any] = ctypes.CDLL) -> CtypesNvml | None:
    """The NVML of this machine's driver, None where there is none (Jetson) or it does not start."""
    try:
        return CtypesNvml(load_library("nvml.dll" if sys.platform == "win32" else "libnvidia-ml.so.1"))
    except (OSError, LowLevelError):
        return None
