"""Progress of a training: a live line when the output is a terminal, plain lines otherwise."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from brim.train.metrics import Averages
from brim.units import format_bytes, format_duration

__all__ = ["Progress"]

_PLAIN_EVERY_S = 10.0
_LIVE_EVERY_S = 0.1


class Progress:
    """Shows loss, metrics, samples/s, remaining time and memory used of the budget.

    Arguments:
        epochs: how many epochs there will be.
        samples: samples in an epoch.
        memory: gives (bytes in use, limit in bytes or None).
        enabled: False prints nothing; ``log`` still gets its lines.
        log: called with each plain line.
    """

    def __init__(
        self,
        epochs: int,
        samples: int,
        memory: Callable[[], tuple[int, int | None]],
        enabled: bool = True,
        log: Callable[[str], None] | None = None,
    ) -> None:
        self.epochs, self.samples, self.memory = epochs, samples, memory
        self.enabled, self._log = enabled, log
        self._start_s = self._shown_s = time.perf_counter()
        self._seen = 0  # samples since the start of this process
        self._every_s = _PLAIN_EVERY_S if enabled else math.inf
        self._live: Any = None
        if enabled and sys.stdout.isatty():
            from rich.live import Live
            from rich.text import Text

            self._text, self._every_s = Text, _LIVE_EVERY_S
            self._live = Live(Text(""), refresh_per_second=10, transient=True)
            self._live.start()

    def begin(self) -> None:
        """The first step starts now: what came before is no part of the rate."""
        self._start_s = self._shown_s = time.perf_counter()

    def step(self, epoch: int, position: int, samples: int, averages: Averages) -> float:
        """After a step: ``position`` samples of the epoch are done, ``samples`` of them in this step.

        Nothing is worked out unless it is shown.

        Returns:
            The time, of ``time.perf_counter``.
        """
        self._seen += samples
        now_s = time.perf_counter()
        if now_s - self._shown_s < self._every_s:
            return now_s
        self._shown_s = now_s
        left = (self.epochs - epoch) * self.samples - position
        share = f"{100 * position // max(self.samples, 1):3d} %"
        line = self._line(epoch, averages.means(), f"{share}  {self._rate(left)}")
        if self._live is not None:
            self._live.update(self._text(line))
        else:
            print(line, flush=True)
        return now_s

    def epoch(self, epoch: int, values: Mapping[str, float]) -> None:
        """After an epoch (counted from 0): its line stays."""
        self._shown_s = time.perf_counter()
        self.message(self._line(epoch, values, self._rate((self.epochs - epoch - 1) * self.samples)))

    def message(self, line: str) -> None:
        """Print a line that stays, and log it."""
        if self._log is not None:
            self._log(line)
        if self._live is not None:
            self._live.console.print(line, highlight=False, markup=False)
        elif self.enabled:
            print(line, flush=True)

    def close(self) -> None:
        """End the live line."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _rate(self, samples_left: int) -> str:
        rate = self._seen / max(time.perf_counter() - self._start_s, 1e-9)
        if not self._seen:
            return ""
        return f"{rate:,.0f} samples/s  ETA {format_duration(samples_left / rate)}"

    def _line(self, epoch: int, values: Mapping[str, float], rest: str) -> str:
        used_bytes, limit_bytes = self.memory()
        of = f" of {format_bytes(limit_bytes)}" if limit_bytes is not None else ""
        numbers = "  ".join(f"{name} {value:.4f}" for name, value in values.items())
        return f"epoch {epoch + 1}/{self.epochs}  {numbers}  {rest}  memory {format_bytes(used_bytes)}{of}"
