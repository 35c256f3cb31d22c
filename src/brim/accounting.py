"""What users ask about a device's memory: set a budget, read the books, give cached memory back."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from brim.device import Device, device
from brim.errors import DeviceError
from brim.memory.budget import BudgetLike
from brim.memory.guard import DeviceMemory

__all__ = ["budget", "empty_cache", "memory_report", "memory_stats", "reset_peak_memory", "set_budget"]


def _memory(name: str | Device | None) -> DeviceMemory:
    found = device(name)
    if found.memory is None:
        raise DeviceError(f"device {found} holds no memory, so it has no budget and no books")
    return found.memory


def set_budget(limit: BudgetLike, device: str | Device | None = None) -> None:
    """Declare how much memory this process may hold on a device.

    Arguments:
        limit: bytes, "6GiB", "6GB", "80%", "auto" (free now less headroom), "off", or a dict per device.
        device: which device; the default device when None.

    Raises:
        BudgetSyntaxError: not a budget; the text says what to write.
    """
    _memory(device).set_budget(limit)


def budget(limit: BudgetLike, device: str | Device | None = None) -> AbstractContextManager[None]:
    """A tighter budget for a block of code; an inner budget may only lower an outer one.

    When an allocation is refused inside, the frames of the failed computation are cleared on the way out, so that the
    memory they held is free again even while the error is kept.
    """
    return _memory(device).lowered(limit)


def memory_stats(device: str | Device | None = None) -> dict[str, Any]:
    """The books of a device: live, held, peak and limit in bytes, live bytes by kind (exact; kinds add up to held)."""
    return _memory(device).stats()


def memory_report(device: str | Device | None = None) -> str:
    """The books as text: held against budget, by kind, by layer, the largest blocks with their source lines."""
    return _memory(device).report_text()


def reset_peak_memory(device: str | Device | None = None) -> None:
    """Start the high-water marks anew."""
    _memory(device).reset_peak()


def empty_cache(device: str | Device | None = None) -> int:
    """Give memory that is held but not live back to the system; returns the bytes."""
    return _memory(device).pool.release_cached()
