"""Choosing what to recompute: the blocks that bring a step under a limit at the least extra arithmetic.

The search is bounded in time. It considers what elementwise instructions make again, which costs little, and
families of blocks (all blocks of one depth; chains of equal layers cut into segments), of each family the blocks that
save most bytes for their arithmetic first, and as few as suffice. A quick estimate from lifetimes orders the
candidates; what is returned was planned for real.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from brim.program.ir import STORE, Program
from brim.program.passes.liveness import live_bytes
from brim.program.passes.recompute import (
    ELEMENTWISE,
    Analysis,
    arithmetic,
    blocks,
    extra_arithmetic,
    matcher,
    prefixes,
    recompute,
    shortened,
)

__all__ = ["Choice", "choose"]


@dataclass(frozen=True, slots=True)
class Choice:
    """A result of ``choose``.

    Attributes:
        layers: what to recompute: see ``recompute``; empty when nothing need be, or nothing helps.
        program: with the repetitions.
        peak_bytes: its planned peak.
        extra_arithmetic: as a fraction of the step's arithmetic without them.
        fits: whether the peak is within the limit.
        complete: False when the time ran out before the search did.
    """

    layers: tuple[str, ...]
    program: Program
    peak_bytes: int
    extra_arithmetic: float
    fits: bool
    complete: bool


def choose(
    program: Program,
    peak: Callable[[Program], int],
    limit_bytes: int,
    time_s: float = 10.0,
    before_bytes: int | None = None,
) -> Choice:
    """Blocks to recompute so that the planned peak is within a limit, at little extra arithmetic.

    When nothing suffices, the lowest peak that was found, which is never above that of recomputing every block of any
    one depth (given the time to plan them all).

    Arguments:
        program: as traced; dead code should be gone.
        peak: the planned peak of a program in bytes, after all passes and placement.
        limit_bytes: what it has to be within; equality fits.
        time_s: no further candidate is planned after this many seconds.
        before_bytes: the peak of the program as it is, where it is known.
    """
    return _Search(program, peak, limit_bytes, time_s).run(before_bytes)


class _Search:
    def __init__(self, program: Program, peak: Callable[[Program], int], limit_bytes: int, time_s: float) -> None:
        self.program, self.peak, self.limit_bytes = program, peak, limit_bytes
        # Candidates are compared without the optimizer's part, which is the same in all and runs early.
        self.core = program.with_instructions(
            [i for i in program.instructions if i.phase != "update" and i.op is not STORE]
        )
        self.analysis = Analysis(self.core)
        self.core_arithmetic = sum(map(arithmetic, self.core.instructions))
        self.arithmetic = max(1, sum(map(arithmetic, program.instructions)))
        self.deadline_s = time.monotonic() + time_s
        self.complete = True
        self.known: dict[tuple[str, ...], Choice] = {}
        self.cores: dict[tuple[str, ...], Program] = {}
        self.estimates: dict[tuple[str, ...], int] = {}

    def late(self) -> bool:
        if time.monotonic() < self.deadline_s:
            return False
        self.complete = False
        return True

    def core_of(self, layers: Sequence[str]) -> Program:
        """The part that candidates are compared by."""
        key = tuple(layers)
        if key not in self.cores:
            self.cores[key] = recompute(self.core, key, self.analysis)
        return self.cores[key]

    def planned(self, layers: Sequence[str]) -> Choice:
        """The choice of exactly these layers."""
        key = tuple(layers)
        if key not in self.known:
            made = recompute(self.program, key)
            nbytes = self.peak(made)
            extra = extra_arithmetic(self.program, made)
            self.known[key] = Choice(key, made, nbytes, extra, nbytes <= self.limit_bytes, True)
        return self.known[key]

    def estimate(self, layers: Sequence[str]) -> int:
        key = tuple(layers)
        if key not in self.estimates:
            self.estimates[key] = max(live_bytes(self.core_of(key)))
        return self.estimates[key]

    def run(self, before_bytes: int | None) -> Choice:
        if before_bytes is not None:
            fits = before_bytes <= self.limit_bytes
            self.known[()] = Choice((), self.program, before_bytes, 0.0, fits, True)
        none = self.planned(())
        families = [] if none.fits else self.families()
        # What the estimate leaves out (states, scratch, holes) hardly depends on what is recomputed.
        offset_bytes = none.peak_bytes - self.estimate(())
        candidates: list[tuple[str, ...]] = []
        for family in families:
            shortest = self.shortest(family, self.limit_bytes - offset_bytes)
            if shortest:
                candidates.append(shortest)
        candidates.sort(key=self.cost)
        found: list[Choice] = [none]
        for layers in candidates:
            if self.late() or any(one.fits for one in found):
                break
            found.append(self.planned(layers))
        if not any(one.fits for one in found):
            for family in sorted(families, key=self.estimate):
                if self.late():
                    break
                if self.estimate(family) + offset_bytes <= 1.1 * min(one.peak_bytes for one in found):
                    found.append(self.planned(family))
        fitting = [one for one in found if one.fits]
        best = min(fitting, key=lambda one: (one.extra_arithmetic, one.peak_bytes)) if fitting else None
        if best is None:
            best = min(found, key=lambda one: (one.peak_bytes, one.extra_arithmetic))
        best = self.pruned(best, self.limit_bytes - offset_bytes)
        return replace(best, layers=self.in_order(best.layers), complete=self.complete)

    def in_order(self, layers: tuple[str, ...]) -> tuple[str, ...]:
        """Layers as the step runs them, as briefly as they can be named; the program is the same."""
        found: dict[str, int] = {}
        for n, instruction in enumerate(self.program.instructions):
            for name in layers:
                if name not in found and instruction.layer and matcher(name)(instruction.layer):
                    found[name] = n
        known = dict.fromkeys(i.layer for i in self.program.instructions if i.phase == "forward" and i.layer)
        return shortened(sorted(layers, key=lambda name: found.get(name, -1)), known)

    def cost(self, layers: tuple[str, ...]) -> float:
        """Extra arithmetic as a fraction of all."""
        return (sum(map(arithmetic, self.core_of(layers).instructions)) - self.core_arithmetic) / self.arithmetic

    def families(self) -> list[tuple[str, ...]]:
        """Sets of blocks, of each the one first that saves most bytes for its arithmetic."""
        names = _best_first(blocks(self.core, None, self.analysis))
        deepest = max((name.count(".") for name in names), default=-1)
        found = [
            tuple(n for n in names if n.count(".") == depth or (n.count(".") < depth and not _has_inside(n, names)))
            for depth in range(deepest + 1)
        ]
        plain = list(found)
        children: dict[str, list[int]] = {}
        for name in prefixes(self.program):
            parent, _, last = name.rpartition(".")
            if last.isdecimal():
                children.setdefault(parent, []).append(int(last))
        for parent, numbers in sorted(children.items()):
            numbers.sort()
            prefix = parent + "." if parent else ""
            outside = tuple(n for n in names if n.count(".") == prefix.count(".") and not n.startswith(prefix))
            lengths = {2, 3, 4, 6, 8, 12, 16, math.isqrt(len(numbers)), math.isqrt(len(numbers) - 1) + 1}
            for length in sorted(n for n in lengths if 2 <= n < len(numbers)):
                pieces = [numbers[i : i + length] for i in range(0, len(numbers), length)]
                ranges = [f"{prefix}{p[0]}..{p[-1]}" if len(p) > 1 else f"{prefix}{p[0]}" for p in pieces]
                found.append((*_best_first(blocks(self.core, ranges, self.analysis)), *outside))
        if self.core_of((ELEMENTWISE,)) is not self.core:  # cheap, so it goes with everything
            found = [(ELEMENTWISE,), *((ELEMENTWISE, *family) for family in found), *plain]
        return list(dict.fromkeys(family for family in found if family))

    def shortest(self, family: tuple[str, ...], limit_bytes: int) -> tuple[str, ...]:
        """As few of a family's first blocks as bring the estimate within a limit; none if not even all do."""
        if self.estimate(family) > limit_bytes or self.late():
            return ()
        low, high = 0, len(family)  # low of them do not suffice, high do
        while high - low > 1:
            middle = (low + high) // 2
            if self.estimate(family[:middle]) <= limit_bytes:
                high = middle
            else:
                low = middle
        return family[:high]

    def pruned(self, best: Choice, limit_bytes: int) -> Choice:
        """Without blocks that are not needed to fit, the dearest first; ``limit_bytes`` is of the estimate."""
        if not best.fits:
            return best
        for name in sorted(best.layers, key=lambda one: -self.cost((one,))):
            less = tuple(n for n in best.layers if n != name)
            if not less or self.late():
                break
            if self.estimate(less) <= limit_bytes and self.planned(less).fits:
                best = self.planned(less)
        return best


def _best_first(measured: list[tuple[str, int, int]]) -> list[str]:
    """Names of blocks, those first that save most bytes for their arithmetic."""
    return [name for name, saved, cost in sorted(measured, key=lambda one: (-one[1] / max(1, one[2]), one[0]))]


def _has_inside(name: str, names: Sequence[str]) -> bool:
    return any(other.startswith(name + ".") for other in names)
