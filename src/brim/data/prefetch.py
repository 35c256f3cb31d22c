"""Prefetcher: results computed ahead of time on one thread, at most a few at once, without a way to leak the thread.

Both directions are ``SimpleQueue``s: the consumer hands out tickets, one per result that may be in the making or
waiting, and the thread hands back results. There are no locks of our own, and ``SimpleQueue.put`` may be called from a
garbage collection at any instant, so that dropping a Prefetcher always stops its thread.
"""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable, Iterable
from typing import Any, Generic, TypeVar

__all__ = ["Prefetcher"]

T = TypeVar("T")

_CHECK_S = 0.5  # how often a waiting consumer looks whether the thread lives (and, on Windows, notices Ctrl-C)


class _Flag:
    """Set by the consumer, read by the thread; a bare attribute because an Event's lock is not safe in a finalizer."""

    stopped = False


def _work(
    compute: Callable[[int], Any],
    keys: Iterable[int],
    tickets: queue.SimpleQueue[bool],
    ready: queue.SimpleQueue[tuple[Any, BaseException | None]],
    flag: _Flag,
) -> None:
    # A function, not a method: the thread must not keep its Prefetcher alive.
    for key in keys:
        tickets.get()
        if flag.stopped:
            return
        try:
            result = compute(key)
        except BaseException as error:  # everything goes to the consumer, who raises it
            ready.put((None, error))
            return
        ready.put((result, None))
        del result  # the queue holds the only reference while this thread waits


def _stop(tickets: queue.SimpleQueue[bool], flag: _Flag) -> None:
    flag.stopped = True
    tickets.put(True)  # wakes the thread if it waits


class Prefetcher(Generic[T]):
    """``compute(key)`` for each key in order, on a daemon thread that runs at most ``depth`` results ahead.

    Arguments:
        compute: called on the thread; must not refer to the Prefetcher's owner, or the owner is never collected.
        keys: what to compute.
        depth: how many results may be waiting or in the making, at least 1.
    """

    def __init__(self, compute: Callable[[int], T], keys: Iterable[int], depth: int) -> None:
        self._tickets: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._ready: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
        flag = _Flag()
        for _ in range(depth):
            self._tickets.put(True)
        self._thread = threading.Thread(
            target=_work, args=(compute, keys, self._tickets, self._ready, flag), name="brim-prefetch", daemon=True
        )
        self._finalizer = weakref.finalize(self, _stop, self._tickets, flag)
        self._thread.start()

    def get(self) -> T:
        """The next result; blocks until it is there. An error of ``compute`` is raised here with its traceback.

        After any exception, an interrupt included, the caller should close this Prefetcher and start another: a result
        may have been lost on the way.
        """
        while True:
            try:
                result, error = self._ready.get(timeout=_CHECK_S)
                break
            except queue.Empty:
                if not self._thread.is_alive() and self._ready.empty():
                    raise RuntimeError("the prefetch thread is gone (was the process forked?)") from None
        if error is not None:
            try:
                raise error
            finally:
                del error  # the traceback refers to this frame: no cycle
        self._tickets.put(True)
        return result

    def close(self) -> None:
        """Stop the thread: it ends after the result it is computing, if any. Never blocks."""
        self._finalizer()
