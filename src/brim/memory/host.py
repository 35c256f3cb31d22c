"""How much host memory this process may use: physical memory, control groups, process limits; and what it uses now.

On Linux everything is read from ``/proc`` and the cgroup file systems here, because what a container may use is written
there and nowhere else. Swap is never counted as memory. Each reader takes ``root``, below which a whole machine's
``/proc`` and ``/sys`` may lie, so that any machine can be described by a handful of small files.

Sources: Linux ``Documentation/admin-guide/cgroup-v2.rst`` and ``cgroup-v1/memory.rst``; ``proc(5)``; ``getrlimit(2)``;
Microsoft, ``GlobalMemoryStatusEx``.
"""

from __future__ import annotations

import ctypes
import os
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from brim.errors import DeviceError, SwapDetected
from brim.memory.cgroup import limited_groups
from brim.memory.procfs import kib_lines, read_text
from brim.units import format_bytes

if sys.platform != "win32":
    import resource

__all__ = ["HostMemory", "SwapWatch", "peak_rss_bytes", "read_host_memory", "rss_bytes"]

_ROOT = Path("/")
_RLIMITS = {"RLIMIT_AS": "VmSize", "RLIMIT_DATA": "VmData"}  # limit -> the line of /proc/self/status that it limits


@dataclass(frozen=True)
class HostMemory:
    """What this process may use of the host's memory, and which limit says so.

    Attributes:
        total_bytes: physical memory.
        limit_bytes: the smallest of physical memory and every limit set on this process or a group it is in.
        available_bytes: what it can still take without swapping or being killed; file cache counts, swap does not.
        swap_used_bytes: how much of this process lies in swap now.
        sources: (name, bytes) of physical memory and each limit below it; ``limit_bytes`` is their minimum.
        available_sources: (name, bytes) of each reading behind ``available_bytes``, which is their minimum.
    """

    total_bytes: int
    limit_bytes: int
    available_bytes: int
    swap_used_bytes: int
    sources: tuple[tuple[str, int], ...]
    available_sources: tuple[tuple[str, int], ...]

    @property
    def tightest(self) -> tuple[str, int]:
        """Name and bytes of the limit that decides."""
        return min(self.sources, key=lambda source: source[1])

    @property
    def tightest_available(self) -> tuple[str, int]:
        """Name and bytes of the reading that decides what is available."""
        return min(self.available_sources, key=lambda source: source[1])

    @property
    def headroom_bytes(self) -> int:
        """What a budget ``auto`` leaves to others: 5 % of the limit (page tables, stacks, the rest of the machine)."""
        return self.limit_bytes // 20


def read_host_memory(root: Path = _ROOT, rlimits: Mapping[str, int | None] | None = None) -> HostMemory:
    """Read all limits of this process anew (measured; a few hundred microseconds).

    Arguments:
        root: where ``/proc`` and ``/sys`` lie; another one than ``/`` describes another Linux machine.
        rlimits: ``RLIMIT_AS`` and ``RLIMIT_DATA`` in bytes, None for no limit; by default this process's own.

    Raises:
        DeviceError: the machine does not tell its memory.
    """
    if (root / "proc" / "meminfo").exists():
        return _read_linux(root, _own_rlimits() if rlimits is None else rlimits)
    if root != _ROOT:
        raise DeviceError(f"there is no proc/meminfo below {root}; give the folder that holds a machine's proc and sys")
    if sys.platform == "win32":
        kernel32 = ctypes.WinDLL("kernel32", use_last_error=True)
        return _from_windows(lambda status: int(kernel32.GlobalMemoryStatusEx(ctypes.byref(status))))
    if sys.platform == "linux":  # /proc is not mounted
        return _from_sysconf()
    return _from_psutil()


# --- Linux: /proc -----------------------------------------------------------------------------------------------------


def _read_linux(root: Path, rlimits: Mapping[str, int | None]) -> HostMemory:
    meminfo = kib_lines(read_text(root / "proc/meminfo"))
    if "MemTotal" not in meminfo:
        raise DeviceError(f"{root / 'proc/meminfo'} has no line MemTotal; declare a budget in bytes instead")
    total_bytes = meminfo["MemTotal"]
    status = kib_lines(read_text(root / "proc/self/status"))

    limits = [("physical memory (MemTotal)", total_bytes)]
    available = [("MemAvailable", _available_on_host(meminfo))]
    for group in limited_groups(root, total_bytes):
        limits.extend(group.limits)
        available.append(group.available)
    for name, counter in _RLIMITS.items():
        limit = rlimits.get(name)
        if limit is not None:
            if limit < total_bytes:
                limits.append((name, limit))
            # Address space that is reserved but unused counts here too: the kernel refuses by these very counters.
            available.append((f"{name} less {counter}", limit - status.get(counter, 0)))
    limit_bytes = min(value for _, value in limits)
    return HostMemory(
        total_bytes=total_bytes,
        limit_bytes=limit_bytes,
        available_bytes=max(0, min(limit_bytes, *(value for _, value in available))),
        swap_used_bytes=status.get("VmSwap", 0),
        sources=tuple(limits),
        available_sources=tuple(available),
    )


def _available_on_host(meminfo: Mapping[str, int]) -> int:
    """MemAvailable; before Linux 3.14 what it estimates: free memory and file cache less shared memory."""
    if "MemAvailable" in meminfo:
        return meminfo["MemAvailable"]
    cache_bytes = meminfo.get("Cached", 0) - meminfo.get("Shmem", 0)
    return meminfo.get("MemFree", 0) + meminfo.get("Buffers", 0) + max(0, cache_bytes)


def _own_rlimits() -> dict[str, int | None]:
    """The soft limits of this process; None where there is none."""
    limits: dict[str, int | None] = {}
    if sys.platform != "win32":
        for name in _RLIMITS:
            if hasattr(resource, name):
                soft, _ = resource.getrlimit(getattr(resource, name))
                limits[name] = None if soft == resource.RLIM_INFINITY else soft
    return limits


# --- other systems ----------------------------------------------------------------------------------------------------


class _MemoryStatusEx(ctypes.Structure):
    """MEMORYSTATUSEX of the Windows API."""

    _fields_ = [
        ("length", ctypes.c_uint32),
        ("memory_load", ctypes.c_uint32),
        *((name, ctypes.c_uint64) for name in ("total_phys", "avail_phys", "total_page_file", "avail_page_file")),
        *((name, ctypes.c_uint64) for name in ("total_virtual", "avail_virtual", "avail_extended_virtual")),
    ]


def _from_windows(global_memory_status_ex: Callable[[_MemoryStatusEx], int]) -> HostMemory:
    """Physical memory, and the commit limit: Windows refuses allocations over it, whatever physical memory is free."""
    status = _MemoryStatusEx(length=ctypes.sizeof(_MemoryStatusEx))
    if not global_memory_status_ex(status):
        raise DeviceError("Windows did not tell its memory (GlobalMemoryStatusEx failed); declare a budget in bytes")
    return _of_readings(
        status.total_phys,
        [("commit limit", status.total_page_file), ("address space", status.total_virtual)],
        [("free physical memory", status.avail_phys), ("free commit", status.avail_page_file)],
    )


def _from_psutil() -> HostMemory:
    """macOS and BSD. psutil's ``available`` is free and inactive memory: wired and compressed memory are not in it."""
    import psutil

    memory = psutil.virtual_memory()
    limits = [(name, limit) for name, limit in _own_rlimits().items() if limit is not None]
    return _of_readings(int(memory.total), limits, [("free and inactive memory", int(memory.available))])


def _from_sysconf() -> HostMemory:
    """A Linux without /proc: the C library knows at least physical memory and its unused part."""
    sysconf: Callable[[str], int] = getattr(os, "sysconf")  # noqa: B009 (absent on Windows, as type checkers know)
    limits = [(name, limit) for name, limit in _own_rlimits().items() if limit is not None]
    free = [("unused memory (sysconf)", sysconf("SC_PAGE_SIZE") * sysconf("SC_AVPHYS_PAGES"))]
    return _of_readings(sysconf("SC_PAGE_SIZE") * sysconf("SC_PHYS_PAGES"), limits, free)


def _of_readings(total_bytes: int, limits: list[tuple[str, int]], available: list[tuple[str, int]]) -> HostMemory:
    sources = [("physical memory", total_bytes), *((name, limit) for name, limit in limits if limit < total_bytes)]
    limit_bytes = min(value for _, value in sources)
    available_bytes = max(0, min(limit_bytes, *(value for _, value in available)))
    return HostMemory(total_bytes, limit_bytes, available_bytes, 0, tuple(sources), tuple(available))


# --- what this process uses -------------------------------------------------------------------------------------------


def rss_bytes() -> int:
    """Resident memory of this process, foreign code included (measured)."""
    resident = kib_lines(read_text(_ROOT / "proc/self/status")).get("VmRSS")
    if resident is not None:
        return resident
    if sys.platform == "linux":
        return peak_rss_bytes()
    import psutil

    return int(psutil.Process().memory_info().rss)


def peak_rss_bytes() -> int:
    """Highest resident memory of this process so far (measured)."""
    peak = kib_lines(read_text(_ROOT / "proc/self/status")).get("VmHWM")
    if peak is not None:
        return peak
    if sys.platform != "win32":
        maximum = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return maximum if sys.platform == "darwin" else maximum * 1024  # macOS counts bytes, the others KiB
    import psutil

    return int(psutil.Process().memory_info().peak_wset)


class SwapWatch:
    """Notices that part of this process was moved to swap; elsewhere than on Linux ``supported`` is False.

    Arguments:
        policy: ``error`` raises, ``warn`` warns and goes on, ``off`` does not look.
        root: where ``/proc`` lies.
        tolerance_bytes: growth up to this much is let pass.
    """

    def __init__(
        self, policy: Literal["error", "warn", "off"] = "error", root: Path = _ROOT, tolerance_bytes: int = 0
    ) -> None:
        if policy not in ("error", "warn", "off"):
            raise ValueError(f'swap policy {policy!r} is not one of "error", "warn", "off"')
        self.policy = policy
        self.tolerance_bytes = tolerance_bytes
        self._status_path = os.fspath(root / "proc/self/status")
        swapped_bytes = self._swapped_bytes()
        self.supported = swapped_bytes is not None
        self.swapped_bytes = swapped_bytes or 0

    def check(self, where: str = "") -> int:
        """Bytes that moved to swap since the last check (0 almost always; one small file is read).

        Arguments:
            where: for the message, e.g. ``"step 12"``.

        Raises:
            SwapDetected: under the policy ``error``.
        """
        if self.policy == "off" or not self.supported:
            return 0
        before_bytes, self.swapped_bytes = self.swapped_bytes, self._swapped_bytes() or 0
        grown_bytes = self.swapped_bytes - before_bytes
        if grown_bytes <= self.tolerance_bytes:
            return 0
        place = f" at {where}" if where else ""
        message = (
            f"{format_bytes(grown_bytes)} of this process moved to swap{place}: {format_bytes(self.swapped_bytes)} "
            f"of it lie there now, {format_bytes(before_bytes)} before. It would go on many times slower. "
            'Lower the budget or the batch size, or close other programs; the swap policy "warn" goes on regardless.'
        )
        if self.policy == "error":
            raise SwapDetected(message, swapped_bytes=grown_bytes)
        warnings.warn(message, RuntimeWarning, stacklevel=2)
        return grown_bytes

    def _swapped_bytes(self) -> int | None:
        """VmSwap; None where the kernel has no such line."""
        try:
            with open(self._status_path, "rb") as file:
                status = file.read()
        except OSError:
            return None
        _, found, rest = status.partition(b"\nVmSwap:")
        return int(rest.split(None, 1)[0]) * 1024 if found else None
