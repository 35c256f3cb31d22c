"""Steps as graphs: a program's launches, captured once and replayed with one launch of the whole.

The launches of a step run twice in the usual way (CUDA loads code at its first use, and cuBLASLt chooses its kernels),
then they are captured on the device's stream and replayed from then on. Numbers that change from step to step (learning
rate, step count, counters of random numbers) are arguments of kernels: before each replay they are written into the
nodes of those kernels. What cannot be captured is launched as before, and says why.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from brim_cuda.dnn import Execute
from brim_cuda.lowlevel import LowLevelError
from brim_cuda.steps import Launch, failure

__all__ = ["CaptureRefused", "Graph", "Graphed", "wanted"]

WARM_RUNS = 2
SHORTEST = 3
"""Fewer launches are not worth a graph: a replay costs about as much as two of them."""


class CaptureRefused(Exception):
    """Why launches could not become a graph; nothing of the attempt is left."""


class Graph(Protocol):
    """Captured launches. They go with the last reference to it."""

    def renew(self, number: int, values: Sequence[Any]) -> None:
        """Give launch ``number`` other arguments (packed, as ``launch.Loader`` takes them) from now on."""

    def replay(self) -> None:
        """Launch everything, in order, on the current stream."""


def wanted(environ: Any = os.environ) -> bool:
    """Whether steps become graphs: unless ``BRIM_CUDA_GRAPHS`` is 0."""
    return str(environ.get("BRIM_CUDA_GRAPHS", "1")).strip().lower() not in ("0", "off", "no", "false")


class Graphed:
    """Launches that become a graph; a call without arguments, as each of them.

    Arguments:
        calls: launches on fixed memory.
        capture: makes a graph of them, or raises CaptureRefused.

    Attributes:
        reason: why they are launched one by one, "" while nothing speaks against a graph.
        runs, replays: how often they ran, and how often as a graph.
    """

    def __init__(
        self, calls: Sequence[Callable[[], None]], capture: Callable[[Sequence[Callable[[], None]]], Graph]
    ) -> None:
        self.calls, self._capture = list(calls), capture
        self._changing = [(n, call) for n, call in enumerate(self.calls) if isinstance(call, Launch) and call.cells]
        self._graph: Graph | None = None
        self.reason = ""
        self.runs = self.replays = 0

    def __call__(self) -> None:
        self.runs += 1
        if self._graph is None and (self.reason or self.runs <= WARM_RUNS or not self._captured()):
            for call in self.calls:
                call()
            return
        assert self._graph is not None
        try:
            for number, call in self._changing:
                call.renew()
                self._graph.renew(number, call.values)
            self._graph.replay()
        except LowLevelError as error:
            device = next((call.device for call in self.calls if isinstance(call, Launch)), None)
            raise failure("a step's graph", error, device) from error
        self.replays += 1

    def _captured(self) -> bool:
        try:
            self._graph = self._capture(self.calls)
        except CaptureRefused as error:
            self.reason = str(error)
        return self._graph is not None

    def describe(self) -> str:
        """One line for ``step.explain()``."""
        by_dnn = sum(isinstance(call, Execute) for call in self.calls)
        launches = f"{len(self.calls)} launches" + (f" ({by_dnn} by cuDNN)" if by_dnn else "")
        if self.reason:
            return f"{launches}, one by one: {self.reason}"
        how = "replayed as one graph" if self._graph is not None else f"to be captured after {WARM_RUNS} runs"
        return f"{launches}, {how}, {len(self._changing)} with numbers that change from step to step"
