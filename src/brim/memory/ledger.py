"""The ledger: every block of a device, with what it is for, which layer and op made it, and where in the user's code.

Categories are exclusive and always add up to the live bytes exactly. The ledger decides nothing; ``pool.py`` asks
``guard.py`` for the limit and books here.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any

__all__ = ["CATEGORIES", "BlockRecord", "Ledger", "user_site"]

CATEGORIES = (
    "params",
    "buffers",
    "grads",
    "optimizer",
    "activations",
    "temps",
    "inputs",
    "workspace",
    "arena",
    "rounding",
)
"""Params: trainable parameters. Buffers: running statistics, constants. Grads: parameter gradients. Optimizer: its
state. Activations: kept for the backward pass. Temps: other live results. Inputs: batches and data sets. Workspace:
scratch that kernels declared. Arena: the memory in which planned steps run (a plan says what is in it). Rounding:
bytes lost to alignment."""


@dataclass(slots=True, eq=False)
class BlockRecord:
    """One live block: the numbers and names a report shows. Holds no memory itself."""

    nbytes: int
    category: str
    op: str
    layer: str
    site: tuple[str, int] | None
    rounding_bytes: int = 0
    shape: tuple[int, ...] | None = None
    dtype: Any = None
    segment: Any = None
    offset_bytes: int = 0
    reserved_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        self.reserved_bytes = self.nbytes + self.rounding_bytes

    @property
    def where(self) -> str:
        """``file:line`` of the user's code, or an empty string."""
        return f"{self.site[0]}:{self.site[1]}" if self.site else ""


class Ledger:
    """Books of one device. Not locked by itself: the pool books under its own lock.

    Attributes:
        live_bytes: sum over all live blocks, rounding included.
        peak_bytes: highest live_bytes since the last ``reset_peak``.
        by_kind: live bytes of each category; they sum to live_bytes.
        allocations: number of blocks ever booked.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self.records: set[BlockRecord] = set()
        self.by_kind: dict[str, int] = dict.fromkeys(CATEGORIES, 0)
        self.live_bytes = 0
        self.peak_bytes = 0
        self.peak_by_kind: dict[str, int] = dict(self.by_kind)
        self.allocations = 0

    def book(self, record: BlockRecord) -> None:
        """Enter a new block."""
        self.records.add(record)
        self.by_kind[record.category] += record.nbytes
        self.by_kind["rounding"] += record.rounding_bytes
        self.live_bytes += record.reserved_bytes
        self.allocations += 1
        if self.live_bytes > self.peak_bytes:
            self.peak_bytes = self.live_bytes
            self.peak_by_kind = dict(self.by_kind)

    def strike(self, record: BlockRecord) -> None:
        """Remove a block that was freed."""
        self.records.remove(record)
        self.by_kind[record.category] -= record.nbytes
        self.by_kind["rounding"] -= record.rounding_bytes
        self.live_bytes -= record.reserved_bytes

    def recategorise(self, record: BlockRecord, category: str, layer: str | None = None) -> None:
        """Move a live block to another category (a result that is kept for backward becomes an activation)."""
        if record in self.records:
            self.by_kind[record.category] -= record.nbytes
            self.by_kind[category] += record.nbytes
        record.category = category
        if layer is not None:
            record.layer = layer

    def reset_peak(self) -> None:
        """Start a new high-water mark at the present live bytes."""
        self.peak_bytes = self.live_bytes
        self.peak_by_kind = dict(self.by_kind)


def user_site() -> tuple[str, int] | None:
    """File and line of the nearest caller outside brim and its backends; None under the command line.

    The networks of ``brim check`` are written as a user would write them, and count as a user's code.
    """
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if not name.startswith("brim"):
            if name != "contextlib":  # decorators lie between
                return frame.f_code.co_filename, frame.f_lineno
        elif name.startswith("brim.cli"):
            return None  # started from the command line: there is no user's code
        elif (not name.startswith(("brim.", "brim_")) and name != "brim") or name.startswith("brim.check.networks."):
            return frame.f_code.co_filename, frame.f_lineno
        frame = frame.f_back  # type: ignore[assignment]
    return None
