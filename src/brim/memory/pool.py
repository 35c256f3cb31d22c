"""The eager pool of a device: gives out blocks, keeps freed ones for reuse, and asks before it holds more.

Deterministic best fit by (size, segment, offset) with splitting and coalescing inside a segment, so the same sequence
of requests always lands in the same places. Big blocks come from segments that are kept (touching fresh pages costs
more than most arithmetic); blocks below ``small_bytes`` are taken from and given back to the system one by one.
"""

from __future__ import annotations

import threading
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from brim.context import context
from brim.errors import DeviceError
from brim.memory.ledger import BlockRecord, Ledger, user_site
from brim.spec import Spec

__all__ = ["Block", "MetaBlock", "Pool", "Refusal", "round_up"]


def round_up(nbytes: int, alignment_bytes: int) -> int:
    """The least multiple of the alignment that holds ``nbytes``; 0 stays 0."""
    return -(-nbytes // alignment_bytes) * alignment_bytes


class Block:
    """Ownership of some bytes of a device. When the last reference goes, the bytes are free again.

    Attributes:
        record: its entry in the ledger.
        buffer: the raw buffer of the backend that it lies in.
        offset_bytes: where it starts in that buffer.
        version: counts in-place writes, so that a gradient can tell that what it kept was overwritten.
    """

    __slots__ = ("__weakref__", "buffer", "offset_bytes", "pool", "record", "version")

    def __init__(self, pool: Pool, record: BlockRecord, buffer: Any, offset_bytes: int) -> None:
        self.pool, self.record, self.buffer, self.offset_bytes = pool, record, buffer, offset_bytes
        self.version = 0

    def __del__(self) -> None:
        pool = getattr(self, "pool", None)
        if pool is not None:
            pool._release(self.record)

    def recategorise(self, category: str, layer: str | None = None) -> None:
        """Book these bytes under another category (see ``memory.ledger.CATEGORIES``)."""
        self.pool.recategorise(self.record, category, layer)


class MetaBlock:
    """What a tensor without memory has in place of a block: an identity that views share, and a record in no ledger.

    Arguments:
        spec: shape and dtype of the tensor it is made for.
        op: what made it.
        category: see ``memory.ledger.CATEGORIES``.
    """

    __slots__ = ("__weakref__", "record", "version")

    offset_bytes = 0

    def __init__(self, spec: Spec, op: str = "", category: str = "temps") -> None:
        self.record = BlockRecord(spec.nbytes, category, op, context.layer, user_site())
        self.record.shape, self.record.dtype = spec.shape, spec.dtype
        self.version = 0

    @property
    def buffer(self) -> Any:
        """Raises DeviceError: there are no values."""
        raise DeviceError(
            f"this tensor (made with shape {self.record.shape}) is on the meta device: it has a shape and no values; "
            "make it on 'cpu' or 'cuda' to compute with it"
        )

    def recategorise(self, category: str, layer: str | None = None) -> None:
        """Note what the memory would be booked as."""
        self.record.category = category
        if layer is not None:
            self.record.layer = layer


@dataclass(slots=True, eq=False)
class _Segment:
    serial: int
    nbytes: int
    buffer: Any
    starts: dict[int, int] = field(default_factory=dict)  # free offset -> size
    ends: dict[int, int] = field(default_factory=dict)  # free end -> offset


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why the pool would not give a block: what the caller needs to explain it.

    Attributes:
        record: the block that was asked for.
        limit_bytes: the limit in force: of the budget, or (reason "host") what the host could still give.
        held_bytes: bytes the pool holds, free holes included.
        live_bytes: bytes of live blocks.
        total_free_bytes: bytes free in holes of the pool.
        largest_hole_bytes: the largest of them.
        reason: "budget" or "host".
    """

    record: BlockRecord
    limit_bytes: int
    held_bytes: int
    live_bytes: int
    total_free_bytes: int
    largest_hole_bytes: int
    reason: str


class Pool:
    """Blocks of one device under one limit.

    Arguments:
        allocate: gives a raw buffer of so many bytes.
        ledger: where every block is booked.
        alignment_bytes: blocks are rounded up to this.
        small_bytes: blocks below this are not kept for reuse.
        limit: returns the most bytes the pool may hold now, or None for no limit.
        available: given the bytes about to be taken, the bytes the host could give now; None when it need not be asked.
        refuse: builds the exception for a Refusal.
    """

    def __init__(
        self,
        allocate: Callable[[int], Any],
        ledger: Ledger,
        *,
        alignment_bytes: int = 64,
        small_bytes: int = 64 * 1024,
        limit: Callable[[], int | None] = lambda: None,
        available: Callable[[int], int | None] = lambda _nbytes: None,
        refuse: Callable[[Refusal], Exception],
    ) -> None:
        self._allocate, self.ledger = allocate, ledger
        self.alignment_bytes, self.small_bytes = alignment_bytes, small_bytes
        self._limit, self._available, self._refuse = limit, available, refuse
        self._lock = threading.Lock()
        self._freed: deque[BlockRecord] = deque()
        self._holes: list[tuple[int, int, int]] = []  # (size, segment serial, offset), sorted
        self._segments: dict[int, _Segment] = {}
        self._next_serial = 0
        self.held_bytes = 0
        self.peak_held_bytes = 0

    # ---------------------------------------------------------------- giving out

    def allocate(self, nbytes: int, record: BlockRecord) -> Block:
        """A block of ``nbytes`` booked as ``record``. Raises what ``refuse`` builds when it does not fit."""
        reserved = round_up(nbytes, self.alignment_bytes)
        record.rounding_bytes = reserved - nbytes
        record.reserved_bytes = reserved
        with self._lock:
            self._drain()
            if reserved < self.small_bytes:
                self._admit(reserved, record)
                record.segment, buffer, offset = None, (self._allocate(reserved) if reserved else None), 0
                self._hold(reserved)  # not before: the system may refuse
            else:
                segment, offset = self._place(reserved, record)
                record.segment, record.offset_bytes, buffer = segment, offset, segment.buffer
            self.ledger.book(record)
        return Block(self, record, buffer, offset)

    def adopt(self, buffer: Any, record: BlockRecord) -> Block:
        """Book memory that somebody else allocated (a user's array); it counts, but is never reused."""
        with self._lock:
            self._drain()
            self._admit(record.reserved_bytes, record, ask_host=False)  # the host has given it already
            self._hold(record.reserved_bytes)
            self.ledger.book(record)
        return Block(self, record, buffer, 0)

    def recategorise(self, record: BlockRecord, category: str, layer: str | None = None) -> None:
        with self._lock:
            self.ledger.recategorise(record, category, layer)

    def _hold(self, nbytes: int) -> None:
        self.held_bytes += nbytes
        self.peak_held_bytes = max(self.peak_held_bytes, self.held_bytes)

    def _admit(self, nbytes: int, record: BlockRecord, *, ask_host: bool = True) -> None:
        """Make room for ``nbytes`` more to hold, or raise."""
        limit = self._limit()
        if limit is not None and self.held_bytes + nbytes > limit:
            self._trim(self.held_bytes + nbytes - limit)
            if self.held_bytes + nbytes > limit:
                raise self._refuse(self._refusal(record, limit, "budget"))
        if ask_host and nbytes >= self.small_bytes:
            available = self._available(nbytes)
            if available is not None and nbytes > available:
                self._trim(nbytes - available)
                available = self._available(nbytes) or 0
                if nbytes > available:
                    raise self._refuse(self._refusal(record, available, "host"))

    def _refusal(self, record: BlockRecord, limit: int, reason: str) -> Refusal:
        total_free = sum(size for size, _, _ in self._holes)
        largest = self._holes[-1][0] if self._holes else 0
        live = self.ledger.live_bytes
        return Refusal(record, limit, self.held_bytes, live, total_free, largest, reason)

    def _place(self, nbytes: int, record: BlockRecord) -> tuple[_Segment, int]:
        found = bisect_left(self._holes, (nbytes, -1, -1))
        # The arena stays for long: put into a larger hole, it would keep the rest of the segment from being given back.
        exactly = record.category == "arena"
        if found == len(self._holes) or (exactly and self._holes[found][0] != nbytes):
            self._admit(nbytes, record)
            segment = _Segment(self._next_serial, nbytes, self._allocate(nbytes))
            self._next_serial += 1
            self._segments[segment.serial] = segment
            self._hold(nbytes)
            return segment, 0
        size, serial, offset = self._holes.pop(found)
        segment = self._segments[serial]
        del segment.starts[offset], segment.ends[offset + size]
        if size > nbytes:
            self._add_hole(segment, offset + nbytes, size - nbytes)
        return segment, offset

    # ---------------------------------------------------------------- taking back

    def _release(self, record: BlockRecord) -> None:
        # Called from __del__, at any moment and in any thread, also while this thread holds the lock (the garbage
        # collector may run inside allocate): so queue it, and tidy up only if nobody else is at work.
        self._freed.append(record)
        if self._lock.acquire(blocking=False):
            try:
                self._drain()
            finally:
                self._lock.release()

    def _drain(self) -> None:
        while self._freed:
            record = self._freed.popleft()
            self.ledger.strike(record)
            segment = record.segment
            if segment is None:
                self.held_bytes -= record.reserved_bytes
                continue
            offset, size = record.offset_bytes, record.reserved_bytes
            after = segment.starts.get(offset + size)
            if after is not None:
                self._remove_hole(segment, offset + size, after)
                size += after
            before = segment.ends.get(offset)
            if before is not None:
                self._remove_hole(segment, before, offset - before)
                offset, size = before, size + offset - before
            self._add_hole(segment, offset, size)

    def _add_hole(self, segment: _Segment, offset: int, size: int) -> None:
        segment.starts[offset] = size
        segment.ends[offset + size] = offset
        insort(self._holes, (size, segment.serial, offset))

    def _remove_hole(self, segment: _Segment, offset: int, size: int) -> None:
        del segment.starts[offset], segment.ends[offset + size]
        del self._holes[bisect_left(self._holes, (size, segment.serial, offset))]

    def _trim(self, wanted_bytes: int) -> None:
        """Give whole free segments back to the system, oldest first, until ``wanted_bytes`` are gone."""
        for serial, segment in list(self._segments.items()):
            if wanted_bytes <= 0:
                return
            if segment.starts.get(0) == segment.nbytes:
                self._remove_hole(segment, 0, segment.nbytes)
                del self._segments[serial]
                self.held_bytes -= segment.nbytes
                wanted_bytes -= segment.nbytes

    def release_cached(self) -> int:
        """Give every wholly free segment back to the system; returns the bytes."""
        with self._lock:
            self._drain()
            before = self.held_bytes
            self._trim(before)
            return before - self.held_bytes

    def after_fork(self) -> None:
        """In a forked child: a fresh lock (another thread may have held the old one)."""
        self._lock = threading.Lock()

    def settle(self) -> None:
        """Book everything that was freed so far (numbers read afterwards are exact)."""
        with self._lock:
            self._drain()

    @property
    def free_bytes(self) -> int:
        """Bytes in holes: held, but not live."""
        return sum(size for size, _, _ in self._holes)

    @property
    def largest_hole_bytes(self) -> int:
        return self._holes[-1][0] if self._holes else 0

    def holes(self) -> list[tuple[int, int, int]]:
        """(size, segment serial, offset) of every hole, for reports and tests."""
        with self._lock:
            self._drain()
            return list(self._holes)
