"""NumPy kernels that make values from numbers alone."""

from __future__ import annotations

from typing import Any

import numpy as np

from brim_cpu.blocks import BLOCK_ELEMENTS
from brim_cpu.registry import kernel

Array = np.ndarray[Any, Any]


@kernel("fill")
def fill(out: Array, value: Any, scratch: Any = None, *, shape: Any, dtype: Any, device: str) -> None:
    out.fill(value)


@kernel("iota", library=lambda ins, outs, **params: 8 * min(params["count"], BLOCK_ELEMENTS) + 4096)
def iota(
    out: Array, start: Any, step: Any, scratch: Any = None, *, count: int, last: Any, dtype: Any, device: str
) -> None:
    whole = isinstance(start, int) and isinstance(step, int)
    for first in range(0, count, BLOCK_ELEMENTS):
        block = np.arange(first, min(first + BLOCK_ELEMENTS, count), dtype=np.int64 if whole else np.float64)
        np.multiply(block, step, out=block)
        np.add(block, start, out=block)
        np.copyto(out[first : first + len(block)], block, casting="unsafe")
        del block  # before the next one is made
    if last is not None:
        out[-1] = last
