"""Rows of a tensor that are gathered where they are needed: an argument of planned steps without memory of its own.

A planned step gathers them straight into its arena, with the ``take`` kernel; anywhere else they become a tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from brim.backend import BoundKernel
from brim.device import Device
from brim.op import REGISTRY
from brim.spec import Spec
from brim.tensor import Tensor, empty

__all__ = ["Gathered", "bind_take"]

_TAKE = REGISTRY["take"]


def bind_take(source: Spec, count: int, device: Device) -> BoundKernel:
    """The kernel that gathers ``count`` rows."""
    index = Spec((count,), np.dtype("int64"))
    out = Spec((count, *source.shape[1:]), source.dtype)
    kernel = device.backend.bind(_TAKE, [source, index], [out], {"axis": 0})
    assert not kernel.scratch_bytes
    return kernel


class Gathered:
    """``source[indices]``, not gathered yet.

    Arguments:
        source: row-major, (N, ...).
        indices: int64 (n,), from 0 to N - 1, on the same device.
        kernel: ``bind_take`` of both.
        host: gives the same rows as a NumPy array.
    """

    requires_grad = False

    def __init__(self, source: Tensor, indices: Tensor, kernel: BoundKernel, host: Callable[[], Any]) -> None:
        self._source, self._indices, self._kernel, self._host = source, indices, kernel, host
        self.device = source.device
        self.shape = (*indices.shape, *source.shape[1:])
        self.dtype = source.dtype

    def __len__(self) -> int:
        return self.shape[0]

    def write_into(self, target: Any) -> None:
        """Gather into a row-major array of the device, of this shape and dtype."""
        with self.device.backend.running(self.device.index):
            self._kernel.run(target, self._source.array, self._indices.array, axis=0)

    def tensor(self) -> Tensor:
        """A new tensor. Raises BudgetExceeded when it does not fit."""
        made = empty(self.shape, dtype=self.dtype, device=self.device, op="take").book_as("inputs")
        if made.size:
            self.write_into(made.array)
        return made

    def numpy(self) -> Any:
        """The rows as a NumPy array, from the host's own copy."""
        return self._host()
