"""How a step's inputs come from the host: copied at once, or ordered and not waited for, through a stage if need be.

The stage is a second set of input buffers, one for all programs of a device, as large as the largest of them needs. It
is planned (``Plan.staged_bytes``) and never the reason of a refusal: without room for it, or when something else needs
the room later, inputs are copied straight to their places, in the order of launches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from brim.device import Device
from brim.errors import BudgetExceeded
from brim.memory.pool import round_up
from brim.spec import Spec
from brim.units import format_bytes

__all__ = ["Feeding"]


class Feeding:
    """The inputs of one program.

    Arguments:
        device: where it runs.
        staged_bytes: size of the second set of input buffers; 0 for none.

    Attributes:
        later: whether the device takes inputs without being waited for.
    """

    def __init__(self, device: Device, staged_bytes: int) -> None:
        self._device, self.staged_bytes = device, staged_bytes
        self._feed: Callable[..., None] | None = getattr(device.backend, "feed", None)
        self.later = self._feed is not None
        self._view: Any = None

    def put(self, pairs: Sequence[tuple[Any, Any]]) -> None:
        """Copy (device array, host array) each; the host arrays may be written again afterwards."""
        assert self._feed is not None
        view = None
        if self.staged_bytes:
            unit = self._device.backend.alignment_bytes
            if sum(round_up(target.nbytes, unit) for target, _ in pairs) <= self.staged_bytes:
                view = self._stage()
        self._feed(pairs, view, self._device.memory.stage.generation)

    def _stage(self) -> Any:
        if self._view is None:
            stage = self._device.memory.stage
            try:
                block = stage.reserve(self.staged_bytes)
            except BudgetExceeded:  # what else is held has grown since the step was planned
                self.staged_bytes = 0
                return None
            spec = Spec((self.staged_bytes,), np.dtype("u1"))
            self._view = self._device.backend.view(block.buffer, block.offset_bytes, spec)
            stage.tenants.add(self)
        return self._view

    def release(self) -> None:
        """Drop the array over the stage, which is about to move."""
        self._view = None

    def describe(self) -> list[str]:
        """A line for ``step.explain()``; none where inputs are copied at once."""
        if not getattr(self._device.backend, "stages_inputs", False):
            return []
        if self.staged_bytes:
            size = format_bytes(self.staged_bytes)
            return [f"inputs from the host: two sets of buffers ({size} more), copied while a step computes"]
        return ["inputs from the host: one set of buffers, copied between two steps"]
