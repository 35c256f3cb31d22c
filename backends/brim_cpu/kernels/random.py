"""Kernels that draw random numbers: dropout. The stream is NumPy's Philox, so that every device can reproduce it."""

from __future__ import annotations

from typing import Any

import numpy as np

from brim.random import philox
from brim_cpu.blocks import BLOCK_ELEMENTS, blocks, carve, carve_bytes
from brim_cpu.registry import kernel

_PARTS: tuple[tuple[tuple[int, ...], Any], ...] = (((BLOCK_ELEMENTS,), "float32"), ((BLOCK_ELEMENTS,), "bool"))


@kernel("dropout", scratch=lambda ins, outs, **_: carve_bytes(*_PARTS), aliasing=True)
def _dropout(out: Any, x: Any, seed: Any, counter: Any, *, p: float, scratch: Any) -> None:
    uniform, dropped = carve(scratch, *_PARTS)
    draws = np.random.Generator(philox(int(seed), int(counter)))
    scale = out.dtype.type(1.0 / (1.0 - p) if p < 1.0 else 0.0)
    threshold = np.float32(p)
    for index in blocks(out.shape):
        target = out[(*index, ...)]
        n = target.size
        draws.random(dtype=np.float32, out=uniform[:n])
        np.less(uniform[:n], threshold, out=dropped[:n])
        np.multiply(x[(*index, ...)], scale, out=target)
        np.copyto(target, out.dtype.type(0), where=dropped[:n].reshape(target.shape))
