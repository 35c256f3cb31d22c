"""Sets of arrays that runs take in turn, so that no run finds its inputs in the device's last cache.

Rotated are the inputs of single operations and the batches of steps: what a program is given anew. Weights and states
of a training stay where the step before left them, as in a training. Results lie where each library's allocator puts
them; operations that are bound by memory are large enough that this does not matter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["MOST_SETS", "count_sets", "in_turn"]

MOST_SETS = 128
"""Of arrays too small to fill the cache otherwise; a step is planned and captured for each."""


def count_sets(side: Any, nbytes: float) -> int:
    """How many sets of ``nbytes`` are needed; 1 on a device without ``rotation_bytes``."""
    return max(1, min(MOST_SETS, math.ceil(side.rotation_bytes / nbytes))) if nbytes > 0 else 1


def in_turn(runs: Sequence[Callable[[], Any]]) -> Callable[[], Any]:
    """Calls the first, then the second, and after the last one the first again."""
    if len(runs) == 1:
        return runs[0]
    position = -1

    def run() -> Any:
        nonlocal position
        position = (position + 1) % len(runs)
        return runs[position]()

    return run
