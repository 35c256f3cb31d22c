"""Streams and events that keep books: which copies are ordered after which, and what the host may know of them.

Everything happens when it is ordered, in one thread, so wrong orders would go unseen. Instead every stream and the host
carry a vector clock: for each stream, how many of its copies are known to be over. A copy that touches memory which
another copy, not known to be over, touches too, is an error, unless both only read; so is a pinned buffer that the host
has written anew before it knew that its last copy was over. What is copied to the host arrives when the host waits.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["HOST_TO_DEVICE", "Books", "Event", "Stream"]

HOST_TO_DEVICE, DEVICE_TO_HOST, DEVICE_TO_DEVICE = 1, 2, 3

Clock = dict[int, int]


@dataclass
class _Access:
    stream: int
    tick: int
    start: int
    end: int
    writes: bool
    pinned: bool


def _join(into: Clock, other: Clock) -> None:
    for stream, tick in other.items():
        into[stream] = max(into.get(stream, 0), tick)


class Books:
    """What one device and the host know.

    Attributes:
        waits: how often the host waited for something that it did not know to be over: its stalls.
        check: called before anything; raises when the device is lost.
    """

    def __init__(self, check: Callable[[], None]) -> None:
        self.check = check
        self.host: Clock = {}
        self.streams: dict[int, Stream] = {}
        self.waits = 0
        self._accesses: list[_Access] = []
        self._arriving: list[tuple[int, int, int, bytes]] = []  # stream, tick, address, what the host will find there

    def copy(self, target: int, source: int, nbytes: int, kind: int, pointer: int) -> None:
        """Order a copy on a stream."""
        stream = self.streams[pointer]
        _join(stream.clock, self.host)
        tick = stream.clock[pointer] = stream.clock.get(pointer, 0) + 1
        self._enter(stream, _Access(pointer, tick, source, source + nbytes, False, kind == HOST_TO_DEVICE))
        self._enter(stream, _Access(pointer, tick, target, target + nbytes, True, kind == DEVICE_TO_HOST))
        if kind == DEVICE_TO_HOST:
            self._arriving.append((pointer, tick, target, ctypes.string_at(source, nbytes)))
        else:
            ctypes.memmove(target, source, nbytes)

    def forget(self, start: int, nbytes: int) -> None:
        """Memory that goes back; the driver waits for the device then."""
        self._accesses = [one for one in self._accesses if one.start >= start + nbytes or start >= one.end]

    def _enter(self, stream: Stream, new: _Access) -> None:
        kept = []
        for old in self._accesses:
            if old.start >= new.end or new.start >= old.end or (old.stream, old.tick) == (new.stream, new.tick):
                kept.append(old)
                continue
            ordered = stream.clock.get(old.stream, 0) >= old.tick
            if new.pinned and not new.writes and self.host.get(old.stream, 0) < old.tick:
                raise AssertionError("a pinned buffer was written before the host knew that its last copy was over")
            if (old.writes or new.writes) and not ordered:
                raise AssertionError(
                    f"stream {new.stream} {'writes' if new.writes else 'reads'} what a copy on stream {old.stream} "
                    f"{'writes' if old.writes else 'reads'}, and has not waited for it"
                )
            if not (ordered and new.start <= old.start and old.end <= new.end):
                kept.append(old)
        self._accesses = [*kept, new]

    def learn(self, clock: Clock) -> None:
        """The host waits."""
        self.check()
        if any(self.host.get(stream, 0) < tick for stream, tick in clock.items()):
            self.waits += 1
        _join(self.host, clock)
        for entry in list(self._arriving):
            stream, tick, target, values = entry
            if self.host.get(stream, 0) >= tick:
                ctypes.memmove(target, values, len(values))
                self._arriving.remove(entry)


class Stream:
    """As ``cupy.cuda.Stream``; ``current`` is the list of those that were made current."""

    def __init__(self, books: Books, current: list[Any]) -> None:
        self.books, self._current = books, current
        self.ptr = 77 + len(books.streams)
        books.streams[self.ptr] = self
        self.clock: Clock = {}

    def __enter__(self) -> Stream:
        self._current.append(self)
        return self

    def __exit__(self, *error: object) -> None:
        assert self._current.pop() is self

    def wait_event(self, event: Event) -> None:
        _join(self.clock, event.clock)

    def synchronize(self) -> None:
        self.books.learn(self.clock)


class Event:
    """As ``cupy.cuda.Event``."""

    def __init__(self, books: Books) -> None:
        self.books = books
        self.clock: Clock = {}

    def record(self, stream: Stream) -> None:
        self.books.check()
        self.clock = {**stream.clock}

    def synchronize(self) -> None:
        self.books.learn(self.clock)
