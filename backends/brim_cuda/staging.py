"""A buffer of pinned host memory for copies to and from the device: reused, capped, and booked as host memory.

CuPy's pinned pool rounds up to a power of two and never gives back: a copy of 1.1 GiB would pin 2 GiB for good. Here a
large copy goes through the buffer in pieces.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from brim.units import format_bytes

__all__ = ["PinnedStaging"]

_PAGE_BYTES = 4096


class PinnedStaging:
    """A reusable buffer of pinned host memory.

    Arguments:
        allocate: pins so many bytes and returns the buffer; it goes back with its last reference.
        charge: books so many bytes as host memory, or raises BudgetExceeded; returns what books them out again.
        cap_bytes: never more than this is pinned.

    Attributes:
        nbytes: pinned now.
    """

    def __init__(
        self,
        allocate: Callable[[int], Any],
        charge: Callable[[int], Callable[[], object]],
        cap_bytes: int = 32 * 2**20,
    ) -> None:
        if cap_bytes < _PAGE_BYTES or cap_bytes % _PAGE_BYTES:
            raise ValueError(
                f"the cap is whole pages of {_PAGE_BYTES} bytes, got {format_bytes(cap_bytes, exact=True)}"
            )
        self._allocate, self._charge, self.cap_bytes = allocate, charge, cap_bytes
        self._buffer: Any = None
        self._credit: Callable[[], object] | None = None
        self._lock = threading.RLock()
        self._lent = False
        self.nbytes = 0

    @contextmanager
    def lend(self, nbytes: int) -> Iterator[Any]:
        """The buffer, of at least min(nbytes, cap) bytes; others wait until the block is left.

        Whoever borrows it waits for the device inside the block: the next one overwrites it.

        Raises:
            BudgetExceeded: the host has no room for a larger one; the smaller one is gone then.
            RuntimeError: this thread has it already.
        """
        with self._lock:
            if self._lent:
                raise RuntimeError("the staging buffer is lent already; leave the inner block before the next copy")
            self.reserve(nbytes)
            self._lent = True
            try:
                yield self._buffer
            finally:
                self._lent = False

    def reserve(self, nbytes: int) -> None:
        """Have min(nbytes, cap) bytes at least. Raises BudgetExceeded: see ``lend``."""
        with self._lock:
            wanted = min(-(-nbytes // _PAGE_BYTES) * _PAGE_BYTES, self.cap_bytes)
            if wanted > self.nbytes:
                self.release()  # first: never the old and the new at once
                credit = self._charge(wanted)
                try:
                    self._buffer = self._allocate(wanted)
                except BaseException:
                    credit()
                    raise
                self._credit, self.nbytes = credit, wanted

    def pieces(self, nbytes: int) -> Iterator[tuple[int, int]]:
        """(offset, bytes) of the pieces in which so much goes through the buffer."""
        for offset in range(0, nbytes, self.cap_bytes):
            yield offset, min(self.cap_bytes, nbytes - offset)

    def release(self) -> None:
        """Give the memory back; the next copy takes it again."""
        with self._lock:
            credit, self._credit = self._credit, None
            self._buffer, self.nbytes = None, 0
            if credit is not None:
                credit()
