"""The arena of a device: one block in which planned steps run, one step at a time, sized to the largest of them."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

from brim.memory.pool import Block

__all__ = ["Arena"]


class Arena:
    """Memory that all programs of a device take turns in. Nothing in it outlives a run.

    Arguments:
        allocate: gives a block of so many bytes, or raises BudgetExceeded.

    Attributes:
        lock: held while a program runs or is bound.
        block: the memory, None before the first program.
        lent: whether a run has ever handed out results that lie in this memory.
        generation: counts how often the memory moved, so that a program knows when to bind its arrays anew.
        tenants: what is bound to the memory; told to ``release()`` it before it moves.
    """

    def __init__(self, allocate: Callable[[int], Block]) -> None:
        self._allocate = allocate
        self.lock = threading.RLock()
        self.block: Block | None = None
        self.nbytes = 0
        self.lent = False
        self.generation = 0
        self.tenants: weakref.WeakSet[Any] = weakref.WeakSet()

    def reserve(self, nbytes: int) -> Block:
        """At least ``nbytes``. The old memory is given back before more is taken. Raises BudgetExceeded."""
        with self.lock:
            if self.block is None or nbytes > self.nbytes:
                before = self.nbytes if self.block is not None else 0
                self.release()
                try:
                    self.block = self._allocate(nbytes)
                except BaseException:
                    self.block = self._allocate(before) if before else None
                    self.nbytes = before
                    raise
                self.nbytes = nbytes
            return self.block

    def release(self) -> None:
        """Give the memory back; the next run takes it again."""
        with self.lock:
            for tenant in list(self.tenants):
                tenant.release()
            self.tenants.clear()
            self.block, self.nbytes = None, 0
            self.generation += 1
