"""Copies to the device that the host does not wait for: pinned buffers used in turn, and a stream of copies.

The host writes values into a pinned buffer, orders the copy, and goes on. A buffer is written again only when the event
behind its last copy has come, which with two buffers is nearly always so long ago that nothing is waited for.

A step's inputs have a fixed place in the arena, which the step before may still be reading. So they are copied into a
second device buffer, the *stage*, on a stream of copies, while the step before computes; the stream of launches waits
for that copy and moves them into the arena, device to device, at a hundred times the rate of the bus. One stage is
enough for two batches under way (one in the arena, one on its way): it is free again when its move is done, at the
very start of a step. The other way, a graph that reads two buffers in turn, would save the move, and need each graph
twice, or new arguments for every node that reads an input. Without a stage the copy goes straight to its place, in the
order of launches; the host does not wait then either, but the bus and the kernels do not overlap.

How far the host may run ahead: of batch n, the host waits until the copy of batch n - 2 is done (for batches of one
piece; see ``PinnedRing``), which began when step n - 3 had moved its inputs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np

from brim.errors import BudgetExceeded
from brim_cuda.staging import PinnedStaging

__all__ = ["ALIGNMENT_BYTES", "Feed", "Fetch", "PinnedRing", "staged_bytes"]

ALIGNMENT_BYTES = 512
"""Every input starts at a multiple of it in a stage."""

SLOTS = 2

Array = np.ndarray[Any, Any]


def staged_bytes(sizes: Sequence[int]) -> int:
    """Bytes of a stage for inputs of so many bytes."""
    return sum(-(-nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES for nbytes in sizes)


class _Slot:
    """A pinned buffer, and the event behind the copy that reads it; ``used`` tells whether there ever was one."""

    def __init__(self, staging: PinnedStaging, event: Any) -> None:
        self.staging, self.event, self.used = staging, event, False

    def wait(self) -> None:
        if self.used:
            self.event.synchronize()


class PinnedRing:
    """Pinned buffers that are lent in turn.

    Arguments:
        new_staging: makes one of the buffers; all have one cap.
        new_event: makes an event of the device.
    """

    def __init__(self, new_staging: Callable[[], PinnedStaging], new_event: Callable[[], Any]) -> None:
        self._slots = [_Slot(new_staging(), new_event()) for _ in range(SLOTS)]
        self._next = 0

    @property
    def cap_bytes(self) -> int:
        """The most that goes through one buffer at a time."""
        return self._slots[0].staging.cap_bytes

    @property
    def nbytes(self) -> int:
        """Pinned now."""
        return sum(slot.staging.nbytes for slot in self._slots)

    @contextmanager
    def lend(self, nbytes: int) -> Iterator[tuple[Any, Any]]:
        """A buffer of at least ``nbytes``, and the event to record behind the last copy that reads it.

        The host waits here for the copy that read the buffer before. Where the host's budget has no room for a second
        buffer, the first one is used each time.

        Raises:
            BudgetExceeded: the host has no room for one such buffer.
        """
        slot = self._slots[self._next]
        slot.wait()
        try:
            slot.staging.reserve(nbytes)
        except BudgetExceeded:
            slot.used = False  # it is gone
            large = [other for other in self._slots if other.staging.nbytes >= nbytes]
            if not large:
                raise
            slot = large[0]
            slot.wait()
        self._next = (self._slots.index(slot) + 1) % SLOTS
        with slot.staging.lend(nbytes) as buffer:
            slot.used = True
            yield buffer, slot.event


class Feed:
    """Orders copies from host memory to one device.

    Arguments:
        runtime: ``cupy.cuda.runtime``.
        launches: the stream of launches.
        copies: the stream of copies, another one.
        ring: buffers.
        new_event: makes an event of the device.
    """

    def __init__(
        self, runtime: Any, launches: Any, copies: Any, ring: PinnedRing, new_event: Callable[[], Any]
    ) -> None:
        self._runtime, self._launches, self._copies, self.ring = runtime, launches, copies, ring
        self._moved = new_event()  # behind the last use of the stage on the stream of launches
        self._stage: tuple[int, int] | None = None  # address and generation of the stage that it speaks of
        self._lock = threading.Lock()

    def put(self, pairs: Sequence[tuple[int, Array]], stage_address: int | None = None, generation: int = 0) -> None:
        """Let device memory have these values before anything that is launched from now on.

        Arguments:
            pairs: (address, flat uint8 array); the array may be written again when this returns.
            stage_address: memory of ``staged_bytes`` of their sizes, or None to copy without a stage.
            generation: another number when the stage is another memory, whatever its address.
        """
        offsets, total = [], 0
        for _, data in pairs:
            offsets.append(total)
            total += staged_bytes([data.size])
        with self._lock:
            if stage_address is None:
                self._load(pairs, offsets, total, self._launches, None)
                return
            if self._stage != (stage_address, generation):  # what was launched so far may use this memory
                self._moved.record(self._launches)
                self._stage = stage_address, generation
            self._copies.wait_event(self._moved)
            self._load(pairs, offsets, total, self._copies, stage_address)
            kind, stream = self._runtime.memcpyDeviceToDevice, self._launches.ptr
            for (address, data), offset in zip(pairs, offsets, strict=True):
                if data.size:
                    self._runtime.memcpyAsync(address, stage_address + offset, data.size, kind, stream)
            self._moved.record(self._launches)

    def _load(
        self,
        pairs: Sequence[tuple[int, Array]],
        offsets: Sequence[int],
        total: int,
        stream: Any,
        stage_address: int | None,
    ) -> None:
        """Through the buffers, as many bytes of all inputs side by side as a buffer takes at a time."""
        cap, kind = self.ring.cap_bytes, self._runtime.memcpyHostToDevice
        for start in range(0, total, cap):
            end = min(start + cap, total)
            with self.ring.lend(end - start) as (buffer, event):
                pinned = np.frombuffer(buffer, np.uint8, end - start)
                try:
                    for (address, data), offset in zip(pairs, offsets, strict=True):
                        begin, stop = max(offset, start), min(offset + data.size, end)
                        if begin >= stop:
                            continue
                        pinned[begin - start : stop - start] = data[begin - offset : stop - offset]
                        if stage_address is None:
                            source = buffer.ptr + begin - start
                            self._runtime.memcpyAsync(address + begin - offset, source, stop - begin, kind, stream.ptr)
                    if stage_address is not None:
                        self._runtime.memcpyAsync(stage_address + start, buffer.ptr, end - start, kind, stream.ptr)
                finally:  # also behind what was ordered before an interrupt
                    event.record(stream)
                    if stream is not self._launches:
                        self._launches.wait_event(event)


class Fetch:
    """A small device array that the host wants to read again and again, without waiting for what is launched after it.

    Arguments:
        working: makes the device and its stream the current ones, and its errors DeviceErrors.
        runtime: ``cupy.cuda.runtime``.
        stream: of launches.
        source: the device array.
        staging: pinned memory of its size, its own.
        event: its own.
    """

    def __init__(
        self,
        working: Callable[[str], AbstractContextManager[Any]],
        runtime: Any,
        stream: Any,
        source: Any,
        staging: PinnedStaging,
        event: Any,
    ) -> None:
        self._working, self._runtime, self._stream = working, runtime, stream
        self._source, self._staging, self._event = source, staging, event

    def start(self) -> None:
        """Order a copy behind what was launched so far. A second one waits for the first, being on the same stream."""
        with self._working("a copy from"):
            kind, source = self._runtime.memcpyDeviceToHost, self._source
            with self._staging.lend(source.nbytes) as buffer:
                self._runtime.memcpyAsync(buffer.ptr, source.data.ptr, source.nbytes, kind, self._stream.ptr)
            self._event.record(self._stream)

    def value(self) -> Array:
        """The values that were copied; the host waits for what was launched before ``start``, and for nothing else."""
        with self._working("a copy from"):
            self._event.synchronize()
        with self._staging.lend(self._source.nbytes) as buffer:
            flat = np.frombuffer(buffer, np.uint8, self._source.nbytes).copy()
        return flat.view(self._source.dtype).reshape(self._source.shape)
