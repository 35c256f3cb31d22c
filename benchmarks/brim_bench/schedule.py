"""What of a run is left out, and why: workloads too large for the card, and those that there is no time for."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from brim.units import format_bytes
from brim_bench.workload import Workload

__all__ = ["SHARE", "Budget", "by_importance", "room"]

SHARE = 0.9
"""Of a card's free memory that workloads may need by their own account."""


def room(workload: Workload, sides: int, card: Mapping[str, Any]) -> tuple[bool, str]:
    """(whether all sides can hold their arrays at once, why not even one of them can, or an empty string).

    Arguments:
        workload: what is to run.
        sides: how many processes want the memory.
        card: as of ``Side.card``; an empty one has room for everything.
    """
    free_bytes = card.get("free_bytes")
    if free_bytes is None:
        return True, ""
    if workload.needs_bytes > SHARE * free_bytes:
        needs, free = format_bytes(workload.needs_bytes), format_bytes(free_bytes)
        return False, f"a side needs about {needs}, the device has {free} free"
    return sides * workload.needs_bytes <= SHARE * free_bytes, ""


def by_importance(workloads: Iterable[Workload]) -> list[Workload]:
    """The most important first, otherwise as they come."""
    return sorted(workloads, key=lambda one: one.importance)


_BUILD_S = {True: 12.0, False: 2.0}  # of a side, by whether it compiles; results and warming up included
_PAUSE_S = 0.05  # between two rounds


class Budget:
    """The time of a run. What a workload takes is planned before it begins, and learnt from those that have ended.

    Arguments:
        seconds: of all workloads together.
        clock: gives seconds.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        if not seconds > 0:
            raise ValueError(f"expected more than 0 minutes, got {seconds / 60:g}")
        self.seconds, self._clock, self._start_s = seconds, clock, clock()
        self._planned_s = self._took_s = 0.0

    def left_s(self) -> float:
        """Until the end; less than 0 behind it."""
        return self.seconds - (self._clock() - self._start_s)

    def plan_s(self, workload: Workload, compiles: Sequence[bool], rounds: int, round_s: float) -> float:
        """What a workload is expected to take.

        Arguments:
            workload: it.
            compiles: for each side, whether it compiles.
            rounds, round_s: of each side.
        """
        taking_part = [one for one in compiles if workload.fuses or not one]
        one_s = max(round_s, workload.seconds) + _PAUSE_S
        planned_s = sum(_BUILD_S[one] + rounds * one_s for one in taking_part)
        # Twice as fast as planned is luck, four times as slow an accident: neither is held against the next one whole.
        factor = min(4.0, max(0.5, self._took_s / self._planned_s)) if self._planned_s else 1.0
        return planned_s * factor

    def refusal(self, planned_s: float) -> str:
        """Why there is no time for it, or an empty string."""
        left_s = max(0.0, self.left_s())
        return "" if planned_s <= left_s else f"about {planned_s:.0f} s, of which {left_s:.0f} s were left"

    def learn(self, planned_s: float, took_s: float) -> None:
        """What was planned for a workload, and what it took."""
        self._planned_s, self._took_s = self._planned_s + planned_s, self._took_s + took_s
