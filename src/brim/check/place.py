"""Where a check runs: tensors made without naming a device go there, and its memory is left as it was found."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

from brim.context import context
from brim.device import Device

__all__ = ["on", "settle"]


@contextmanager
def on(device: Device) -> Iterator[None]:
    """Inside the block, for the calling thread, ``device`` is the default device."""
    before = context.default_device
    context.default_device = device
    try:
        yield
    finally:
        context.default_device = before


def settle(device: Device) -> int:
    """Give back what is garbage, the arena and what is held for reuse; returns the bytes that are live then."""
    gc.collect()
    device.memory.arena.release()
    device.memory.stage.release()
    device.memory.pool.release_cached()
    return device.memory.ledger.live_bytes
