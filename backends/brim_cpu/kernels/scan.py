"""Running results along an axis: cumulative sums. Half-width floats are added up in float32."""

from __future__ import annotations

from typing import Any

import numpy as np

from brim_cpu.blocks import BLOCK_ELEMENTS, as_float32, blocks, carve, carve_bytes
from brim_cpu.registry import Specs, kernel

Array = np.ndarray[Any, Any]


def _parts(x: Any) -> list[tuple[tuple[int, ...], Any]]:
    block = (min(BLOCK_ELEMENTS, max(1, x.size)),)
    return [(block, as_float32(x.dtype)), (block, as_float32(x.dtype))]


def _scratch(ins: Specs, outs: Specs, **params: Any) -> int:
    x: Any = ins[0]
    return carve_bytes(*_parts(x)) if as_float32(x.dtype) != x.dtype else 0


@kernel("cumulative_sum", scratch=_scratch)
def cumulative_sum(
    out: Array, x: Array, *, scratch: Any = None, axis: int, reverse: bool, include_initial: bool
) -> None:
    """Sums of all elements up to each (from each on, when reversed)."""
    lines, target = np.moveaxis(x, axis, -1), np.moveaxis(out, axis, -1)
    if reverse:
        lines, target = lines[..., ::-1], target[..., ::-1]
    if include_initial:
        target[..., 0] = 0
        target = target[..., 1:]
    if lines.size == 0:
        return
    if as_float32(x.dtype) == x.dtype:
        np.add.accumulate(lines, axis=-1, out=target)
        return
    wide, sums = carve(scratch, *_parts(x))
    if lines.shape[-1] > wide.size:
        for line in np.ndindex(lines.shape[:-1]):
            _long_line(lines[line], target[line], wide, sums)
        return
    for index in blocks(lines.shape):
        piece = lines[index] if index else lines
        part, result = wide[: piece.size].reshape(piece.shape), sums[: piece.size].reshape(piece.shape)
        np.copyto(part, piece, casting="unsafe")
        np.add.accumulate(part, axis=-1, out=result)
        np.copyto(target[index] if index else target, result, casting="unsafe")


def _long_line(line: Array, target: Array, wide: Array, sums: Array) -> None:
    carry = sums.dtype.type(0)
    for start in range(0, line.size, wide.size):
        count = min(wide.size, line.size - start)
        part, result = wide[:count], sums[:count]
        np.copyto(part, line[start : start + count], casting="unsafe")
        part[0] += carry
        np.add.accumulate(part, out=result)
        carry = result[-1]
        np.copyto(target[start : start + count], result, casting="unsafe")
