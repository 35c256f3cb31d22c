"""Timing a round: by the host's clock, or on a device by events between batches of runs that are queued in one go."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any, Protocol

from brim_bench.workload import Job

__all__ = ["Events", "time_events", "time_round"]

_BATCH_S = 2e-3  # between two events at least: an event costs microseconds
_MOST_BATCHES, _MOST_RUNS = 200, 2000


class Events(Protocol):
    """Marks on the stream that a side launches to."""

    def mark(self) -> Any:
        """An event behind everything launched so far; nothing is waited for."""

    def seconds(self, before: Any, after: Any) -> float:
        """The device's time between two marks; waits for the later one."""


def time_round(job: Job, synchronize: Callable[[], None], seconds: float, shortest_s: float) -> tuple[list[float], int]:
    """Times of single runs over about so many seconds, at least one; runs too short for the clock are timed together.

    The first run after a pause is not timed, unless it alone is longer than the round.

    Returns:
        (seconds a run, one figure for each time the clock was read; number of runs).
    """
    run, clock = job.run, time.perf_counter
    start = clock()
    run()
    synchronize()
    first_s = clock() - start
    if first_s > seconds:
        return [first_s], 1
    together = max(1, int(shortest_s / max(first_s, 1e-9)))
    found: list[float] = []
    start = clock()
    while not found or clock() - start < seconds:
        before = clock()
        for _ in range(together):
            run()
        synchronize()
        found.append((clock() - before) / together)
    return found, together * len(found)


def time_events(job: Job, events: Events, seconds: float) -> tuple[list[float], int]:
    """Times of single runs on a device, over about so many seconds.

    Runs are queued in batches with an event between each two, and nothing is waited for before the last event is
    queued: what the host needs to launch counts only where the device waits for it, as in a training. A batch
    takes each of the job's sets of arrays equally often. A first batch, which fills the queue and wakes the clocks, is
    not timed; it tells how long a run takes.

    Arguments:
        job: warmed up: compiled, captured, caches filled.
        events: of the side.
        seconds: of the round. A run longer than that is timed alone, once.

    Returns:
        (seconds a run, one figure for each batch; number of timed runs).
    """
    run, sets = job.run, max(1, job.sets)

    def batch(runs: int) -> None:
        for _ in range(runs):
            run()

    before = events.mark()
    batch(1)
    one_s = max(events.seconds(before, events.mark()), 1e-9)
    if one_s < seconds:  # a run after a pause says too much
        probe = min(max(2, int(_BATCH_S / one_s)), 1000)
        before = events.mark()
        batch(probe)
        one_s = max(events.seconds(before, events.mark()) / probe, 1e-9)
    together = max(1, min(round(_BATCH_S / one_s), int(seconds / one_s), _MOST_RUNS))
    if together > 1 or one_s * sets < seconds / 3:
        together = -(-together // sets) * sets
    count = max(1, min(_MOST_BATCHES, int(seconds / (one_s * together))))
    if one_s < seconds:
        batch(together)
    marks = [events.mark()]
    for _ in range(count):
        batch(together)
        marks.append(events.mark())
    events.seconds(marks[0], marks[-1])  # the one place where the host waits
    found = [events.seconds(a, b) / together for a, b in pairwise(marks)]
    return found, together * count
