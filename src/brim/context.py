"""What the current thread is doing: recording gradients or not, inside which layer, under which interpreter."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["context", "layer_scope", "set_grad_enabled"]


class _Context(threading.local):
    """Per-thread state; every thread starts with gradients on, outside any layer, running eagerly."""

    grad_enabled: bool = True
    layer: str = ""
    interpreter: Any = None  # None: the eager interpreter


context = _Context()


@contextmanager
def set_grad_enabled(enabled: bool) -> Iterator[None]:
    """Record operations for gradients inside the block, or not."""
    before = context.grad_enabled
    context.grad_enabled = enabled
    try:
        yield
    finally:
        context.grad_enabled = before


@contextmanager
def layer_scope(path: str) -> Iterator[None]:
    """Blocks allocated inside are booked under this layer path."""
    before = context.layer
    context.layer = path
    try:
        yield
    finally:
        context.layer = before
