"""Ctrl-C while training: the first asks the loop to finish its step, save and end; a second one interrupts at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["on_interrupt"]


@contextmanager
def on_interrupt(ask: Callable[[], None]) -> Iterator[None]:
    """Call ``ask`` at the first SIGINT inside the block. Only the main thread can; elsewhere nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)

    def handle(number: int, frame: Any) -> None:
        signal.signal(signal.SIGINT, before)
        ask()

    if before is not signal.default_int_handler:  # somebody else deals with Ctrl-C
        yield
        return
    signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
