"""Remedies: what would make a step fit, each planned for real and shown with its own peak.

Nothing is suggested that was not planned; options already on are not offered; what helps but does not suffice is listed
apart; when nothing fits, that is said, with the least that is needed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace

from brim.errors import TraceError
from brim.program.batch import BatchSearch, batch_of, with_batch
from brim.program.ir import Program
from brim.program.lower import Prepared
from brim.program.passes.choose import Choice, choose
from brim.program.passes.dead_code import dead_code
from brim.program.pause import collector_paused
from brim.program.place import plan_memory
from brim.program.plan import Options, Plan
from brim.units import format_bytes

__all__ = ["choose_recomputation", "describe", "remedies"]

SEARCH_TIME_S = float(os.environ.get("BRIM_SEARCH_SECONDS", "2"))
"""No further plan is made for a report after this many seconds; what is left says "not searched"."""

FIT_TIME_S = 10.0
"""The same for the search of ``fit="recompute"``."""


def peak_of(plan: Plan) -> int:
    """What counts against the limit when nothing else is live."""
    return plan.least_bytes


def remedies(
    plan: Plan, limit_bytes: int, needed: Callable[[Plan], int] = peak_of, time_s: float | None = None
) -> list[str]:
    """Lines for the report of a plan that does not fit.

    Arguments:
        plan: the plan that was refused.
        limit_bytes: what has to suffice.
        needed: the bytes that count for a plan: its peak, and what else is live on the device.
        time_s: when to stop planning; ``SEARCH_TIME_S`` by default.
    """
    with collector_paused():
        return _Remedies(plan, limit_bytes, needed, SEARCH_TIME_S if time_s is None else time_s).lines()


def choose_recomputation(
    plan: Plan, limit_bytes: int, needed: Callable[[Plan], int] = peak_of, time_s: float | None = None
) -> Choice | None:
    """Layers of the plan's first program to recompute so that it fits; None when it cannot be planned again."""
    entry = plan.programs[0]
    if entry.lower is None or entry.traced is None:
        return None
    lower, rest = entry.lower, replace(plan.options, recompute=())

    def peak(program: Program) -> int:
        first = replace(entry, prepared=lower(program, rest))
        return needed(plan.with_programs([first, *plan.programs[1:]], plan.options))

    before_bytes = None if plan.options.recompute else needed(plan)
    found = choose(dead_code(entry.traced), peak, limit_bytes, FIT_TIME_S if time_s is None else time_s, before_bytes)
    if len(plan.programs) > 1 and found.layers:  # the others are planned with the same options
        nbytes = needed(plan.vary(replace(rest, recompute=found.layers)))
        found = replace(found, peak_bytes=nbytes, fits=nbytes <= limit_bytes)
    return found


def describe(name: str, choice: Choice, limit_bytes: int) -> str:
    """The line that says what ``fit="recompute"`` did."""
    peak, limit = _texts(choice.peak_bytes, limit_bytes)
    return (
        f"{name}: {_recompute_text(choice.layers)} to fit: peak {peak} of {limit}, "
        f"{100 * choice.extra_arithmetic:.1f} % more work"
    )


class _Remedies:
    def __init__(self, plan: Plan, limit_bytes: int, needed: Callable[[Plan], int], time_s: float) -> None:
        self.plan, self.limit_bytes, self.needed = plan, limit_bytes, needed
        self.start_s, self.time_s = time.monotonic(), time_s
        self.share = 1.0  # of the time, that may have gone by
        self.before_bytes = needed(plan)
        self.fitting: list[tuple[int, str]] = []  # (rank among the lines, text)
        self.not_enough: list[str] = []
        self.unknown: list[str] = []
        self.least: tuple[int, str] | None = None  # the least that any variant needs at batch 1

    def late(self) -> bool:
        return self.left_s() <= 0

    def left_s(self) -> float:
        return self.start_s + self.share * self.time_s - time.monotonic()

    def lines(self) -> list[str]:
        if self.needed(self.bare()) > self.limit_bytes:
            self.floor(None)
            return [self.nothing()]
        half = self.half()
        self.share = 0.5
        chosen = self.recomputation()
        self.share = 0.9
        self.batch(None)
        self.share = 1.0
        for text, make in self.plan.alternatives:
            if self.late():
                self.unknown.append(text)
            else:
                self.offer(1, text, self.needed(make()))
        if not self.fitting:
            self.combination(half, chosen)
        found = [text for _, text in sorted(self.fitting)]
        if not found and (not self.unknown or (self.least is not None and self.least[0] > self.limit_bytes)):
            found.append(self.nothing())
        if self.not_enough:
            found.append("not enough: " + "; ".join(self.not_enough))
        if self.unknown:
            found.append("not searched (set BRIM_SEARCH_SECONDS=60): " + "; ".join(self.unknown))
        return found

    def offer(self, rank: int, text: str, nbytes: int, more: str = "") -> bool:
        """List a variant where it belongs; True when it fits."""
        if nbytes <= self.limit_bytes:
            peak, _ = _texts(nbytes, self.limit_bytes)
            self.fitting.append((rank, f"{text} -> {peak}{more}"))
            return True
        if nbytes < self.before_bytes:
            self.not_enough.append(f"{text} -> {_texts(nbytes, self.limit_bytes)[0]}")
        return False

    # ---------------------------------------------------------------- single remedies

    def batch(self, options: Options | None, text: str = "") -> None:
        """The largest batch that fits, with other options where they are given."""
        try:
            batch = batch_of(self.plan.input_shapes)
            if self.plan.replan is None or batch < 2:
                return
            vary = None if options is None else (lambda plan: plan.vary(options))
            search = BatchSearch(self.plan, self.limit_bytes, self.needed, self.late, vary)
            found = search.run()
        except (ValueError, TraceError):  # no batch, or one that the step has built in
            return
        if found is None:
            self.unknown.append(f"{text}a smaller batch")
        elif found:
            peak, more = search.known[found], search.known.get(found + 1)
            assert peak is not None
            shown, _, beyond = _texts(peak, self.limit_bytes, more or 0)
            note = f" ({found + 1}: {beyond}, does not fit)" if more is not None else ""
            instead = f" instead of {batch}" if found < batch else ""
            self.fitting.append((4 if text else 0, f"{text}batch {found}{instead} -> {shown}{note}"))

    def half(self) -> bool:
        """bfloat16 activations; True when they help."""
        if self.plan.options.activations is not None or self.plan.programs[0].lower is None:
            return False
        nbytes = self.needed(self.plan.vary(replace(self.plan.options, activations="bfloat16")))
        self.offer(3, 'activations="bfloat16"', nbytes, " (less precise gradients)")
        return nbytes < self.before_bytes

    def recomputation(self) -> Choice | None:
        """The least recomputation that fits, or the one that needs least memory."""
        if self.plan.options.recompute:
            return None
        choice = choose_recomputation(self.plan, self.limit_bytes, self.needed, self.left_s())
        if choice is None:
            return None
        if not choice.fits and not choice.complete:
            self.unknown.append("further layers to recompute" if choice.layers else "layers to recompute")
        if not choice.layers:
            return None
        arithmetic = f" ({100 * choice.extra_arithmetic:.1f} % more work)"
        self.offer(2, _recompute_text(choice.layers), choice.peak_bytes, arithmetic)
        return choice

    # ---------------------------------------------------------------- several at once, or nothing

    def combination(self, half: bool, chosen: Choice | None) -> None:
        """Recomputation and bfloat16 together; where even they do not suffice, with a smaller batch."""
        options, parts = self.plan.options, []
        if half:
            options = replace(options, activations="bfloat16")
        if self.late():
            self.unknown.append("combinations")
            return
        if chosen is not None and half:
            # What suits half activations may be other layers than without.
            again = choose_recomputation(self.plan.vary(options), self.limit_bytes, self.needed, self.left_s())
            chosen = again if again is not None and again.layers else chosen
        if chosen is not None:
            options = replace(options, recompute=chosen.layers)
            parts.append(_recompute_text(chosen.layers))
        if half:
            parts.append('activations="bfloat16"')
        if len(parts) == 2:
            nbytes = self.needed(self.plan.vary(options))
            if self.offer(4, " with ".join(parts), nbytes):
                return
        self.floor(options if parts else None)
        if parts and (self.least is None or self.least[0] <= self.limit_bytes):
            self.batch(options, " with ".join(parts) + " and ")

    def floor(self, options: Options | None) -> None:
        """What the smallest batch needs."""
        try:
            smallest = with_batch(self.plan, 1)
            nbytes = self.needed(smallest)
            if options is not None:
                nbytes = min(nbytes, self.needed(smallest.vary(options)))
            self.least = nbytes, "batch 1 needs" if options is None else "batch 1 with all of that needs"
        except (ValueError, TraceError):  # no batch, or none of one sample
            return

    def bare(self) -> Plan:
        """The plan with nothing but its residents."""
        programs = []
        for one in self.plan.programs:
            empty = Program([], [], {}, [], [], one.prepared.program.device)
            memory = plan_memory(empty, [], [], one.prepared.alignment_bytes)
            prepared = Prepared(empty, [], memory, one.prepared.alignment_bytes)
            programs.append(replace(one, prepared=prepared, n_results=0))
        return self.plan.with_programs(programs, self.plan.options)

    def nothing(self) -> str:
        """That nothing fits, and the least that is needed."""
        alone = self.plan.resident_bytes + self.plan.overhead_bytes
        besides = self.needed(self.bare()) - alone
        text = f"nothing fits: the parameters and their state alone need {format_bytes(alone)}"
        if besides > 0:
            text += f", {format_bytes(besides)} are held besides"
        if self.least is not None:
            text += f"; {self.least[1]} {_texts(self.least[0], self.limit_bytes)[0]}"
        return text


def _recompute_text(layers: tuple[str, ...]) -> str:
    """``recompute=("a", "b")``, as it is to be written; a long list is not cut here but by the report."""
    return f"recompute=({', '.join(map(repr, layers))}{',' if len(layers) == 1 else ''})"


def _texts(nbytes: int, limit_bytes: int, *others: int) -> list[str]:
    """Sizes as text, to the byte where they would be printed alike."""
    sizes = [nbytes, limit_bytes, *others]
    alike = len({format_bytes(n) for n in sizes}) < len(set(sizes))
    return [format_bytes(n, exact=alike) for n in sizes]
