"""Placement: every value of a step gets its bytes in one arena, from when it is first and last needed.

``place`` is pure geometry: rectangles whose extent in time is given and whose place in memory is sought, so that the
arena is as low as possible. ``plan_memory`` derives the rectangles from a Program, with in-place reuse, and answers
what lies where and when. The problem is NP-hard; greedy orders come within a few percent of the lower bound (the most
bytes that are live at once), most often exactly to it. Compare Pisarchyk and Lee, "Efficient memory management for deep
neural net inference", 2020.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from brim.program.ir import FUSED, FUSED_MANY, Instruction, Program, Ref, Value, part_of, parts_of
from brim.program.norm_groups import is_norm, overwritable_by_norm

__all__ = ["Interval", "MemoryMap", "Placement", "Scratch", "overwritable", "place", "plan_memory"]

_Ints = np.ndarray[Any, np.dtype[np.int64]]
_ATTEMPTS_MIN, _ATTEMPTS_MAX = 8, 100
_PLACEMENTS = 30_000  # attempts times intervals, between these two numbers of attempts


@dataclass(frozen=True, slots=True)
class Interval:
    """Something that needs ``size_bytes`` from instruction ``first`` through instruction ``last``.

    Times are instruction numbers, both inclusive; -1 is before the first instruction, n after the last of n.
    """

    size_bytes: int
    first: int
    last: int
    key: Any = None


@dataclass(frozen=True, slots=True)
class Placement:
    """Where each interval lies.

    Attributes:
        offsets: bytes from the arena's start, one an interval, multiples of the alignment.
        arena_bytes: the highest end of any interval.
        peak_bytes: most bytes live at one time, each rounded up to the alignment: no arena can be smaller.
        order: the order of placing that gave the lowest arena.
    """

    offsets: list[int]
    arena_bytes: int
    peak_bytes: int
    order: str

    @property
    def holes_bytes(self) -> int:
        """What placement lost: the arena beyond the most bytes live at one time."""
        return self.arena_bytes - self.peak_bytes


def place(intervals: Sequence[Interval], alignment_bytes: int = 64, *, attempts_max: int | None = None) -> Placement:
    """Offsets in one arena such that intervals which overlap in time do not overlap in memory.

    Arguments:
        intervals: what to place; those of zero bytes take no space and lie at 0.
        alignment_bytes: offsets are multiples of it, sizes are rounded up to it.
        attempts_max: how many orders to try at most; None decides by the number of intervals, so that the time stays
            near two seconds for 10,000 of them. Always at least one. The result depends on nothing else.

    Raises:
        ValueError: a negative size, an interval that ends before it begins, or an alignment below 1.
    """
    if alignment_bytes < 1:
        raise ValueError(f"an alignment is a positive number of bytes, got {alignment_bytes}")
    for interval in intervals:
        if interval.size_bytes < 0 or interval.last < interval.first:
            raise ValueError(f"an interval has a size >= 0 and ends no earlier than it begins, got {interval}")
    shapes = _Shapes(intervals, alignment_bytes)
    live = shapes.live_bytes()
    peak = int(live.max(initial=0))
    items = np.flatnonzero(shapes.sizes)
    if not len(items):
        return Placement([0] * len(intervals), 0, 0, "size")
    if attempts_max is None:
        attempts_max = max(_ATTEMPTS_MIN, min(_ATTEMPTS_MAX, _PLACEMENTS // len(items)))

    best: _Ints | None = None
    best_height, best_name, best_order, stuck = int(shapes.sizes.sum()) + 1, "", items, -1
    attempts = 0
    for name, order, tightest in _orders(shapes, items, live):
        offsets, height, last_placed = _fill(shapes, order, best_height, tightest)
        attempts += 1
        if offsets is not None:
            best, best_height, best_name, best_order, stuck = offsets, height, name, order, last_placed
        if best_height == peak or attempts >= attempts_max:
            break
    # Improve the best order: what sticks out at the top is placed earlier, where there is more choice.
    order = best_order
    while best_height > peak and attempts < attempts_max:
        order = _earlier(order, stuck)
        offsets, height, stuck = _fill(shapes, order, best_height, False)
        attempts += 1
        if offsets is not None:
            best, best_height, best_name = offsets, height, "improved"
    assert best is not None  # the first attempt is always below the sum of all sizes plus one
    return Placement(best.tolist(), best_height, peak, best_name)


def _round_up(nbytes: int, alignment_bytes: int) -> int:
    return -(-nbytes // alignment_bytes) * alignment_bytes


class _Shapes:
    """The intervals as arrays; times count from 0."""

    def __init__(self, intervals: Sequence[Interval], alignment_bytes: int) -> None:
        n = len(intervals)
        self.sizes = np.fromiter((_round_up(i.size_bytes, alignment_bytes) for i in intervals), np.int64, n)
        first = np.fromiter((i.first for i in intervals), np.int64, n)
        last = np.fromiter((i.last for i in intervals), np.int64, n)
        # Only the order of the times matters, so few instructions may stand for many.
        times, both = np.unique(np.concatenate((first, last)), return_inverse=True)
        self.first, self.last = both[:n].astype(np.int32), both[n:].astype(np.int32)
        self.times = len(times)

    def live_bytes(self) -> _Ints:
        change = np.zeros(self.times + 1, np.int64)
        np.add.at(change, self.first, self.sizes)
        np.subtract.at(change, self.last + 1, self.sizes)
        return np.cumsum(change)[: self.times]


def _orders(shapes: _Shapes, items: _Ints, live: _Ints) -> Iterator[tuple[str, _Ints, bool]]:
    """(name, items in the order of placing, whether the tightest gap is taken instead of the lowest)."""
    size, first, last = shapes.sizes[items], shapes.first[items].astype(np.int64), shapes.last[items].astype(np.int64)
    duration = last - first + 1
    # np.lexsort sorts by the last key first; ties end with the position, so that the order is always the same.
    by_size = items[np.lexsort((items, first, -duration, -size))]
    yield "size", by_size, False
    busiest = _busiest(live, first, last)
    yield "busiest", items[np.lexsort((items, first, -duration, -size, -busiest))], False
    yield "area", items[np.lexsort((items, first, -size, -size * duration))], False
    yield "duration", items[np.lexsort((items, first, -size, -duration))], False
    yield "size, tightest gap", by_size, True
    yield "birth", items[np.lexsort((items, -size, -last, first))], False
    yield "death", items[np.lexsort((items, -size, first, -last))], False
    yield "birth, tightest gap", items[np.lexsort((items, -size, -last, first))], True


def _busiest(live: _Ints, first: _Ints, last: _Ints) -> _Ints:
    """The most bytes live at any time of each interval: range maxima from a table of doubling widths."""
    table = [live]
    width = 1
    while 2 * width <= len(live):
        table.append(np.maximum(table[-1][:-width], table[-1][width:]))
        width *= 2
    level = np.array([int(d).bit_length() - 1 for d in last - first + 1], np.int64)
    return np.array(
        [max(table[k][f], table[k][t - (1 << k) + 1]) for k, f, t in zip(level, first, last, strict=True)], np.int64
    )


def _earlier(order: _Ints, item: int) -> _Ints:
    """The order with one item moved to half its position."""
    at = int(np.flatnonzero(order == item)[0])
    return np.insert(np.delete(order, at), at // 2, item)


def _fill(shapes: _Shapes, order: _Ints, limit: int, tightest: bool) -> tuple[_Ints | None, int, int]:
    """Place items one by one, each in the lowest (or tightest) gap between those already there.

    Returns:
        (offsets of all, height, the item that ends highest), or (None, end, item) as soon as one would reach the limit.
    """
    n = len(order)
    # What is placed, sorted by its start: start, end, first, last.
    starts, ends = np.empty(n, np.int64), np.empty(n, np.int64)
    firsts, lasts = np.empty(n, np.int32), np.empty(n, np.int32)
    offsets = np.zeros(len(shapes.sizes), np.int64)
    height, highest = 0, -1
    todo = zip(
        order.tolist(),
        shapes.sizes[order].tolist(),
        shapes.first[order].tolist(),
        shapes.last[order].tolist(),
        strict=True,
    )
    for count, (item, size, first, last) in enumerate(todo):
        beside = ((firsts[:count] <= last) & (lasts[:count] >= first)).nonzero()[0]
        at = _gap(starts[beside], ends[beside], size, tightest) if len(beside) else 0
        end = at + size
        if end >= limit:
            return None, end, item
        if end > height:
            height, highest = end, item
        offsets[item] = at
        spot = int(starts[:count].searchsorted(at))
        for array, entry in ((starts, at), (ends, end), (firsts, first), (lasts, last)):
            array[spot + 1 : count + 1] = array[spot:count]
            array[spot] = entry
    return offsets, height, highest


def _gap(starts: _Ints, ends: _Ints, size: int, tightest: bool) -> int:
    """Where ``size`` bytes fit beside blocks that are sorted by start (and may lie over each other)."""
    tops = np.maximum.accumulate(ends)
    if not tightest and starts[0] >= size:
        return 0
    rooms = starts[1:] - tops[:-1]
    fits = (rooms >= size).nonzero()[0]
    if not tightest:
        return int(tops[fits[0]] if len(fits) else tops[-1])
    if len(fits):
        k = fits[rooms[fits].argmin()]
        if starts[0] < size or rooms[k] < starts[0]:
            return int(tops[k])
    return 0 if starts[0] >= size else int(tops[-1])


@dataclass(frozen=True, slots=True)
class Scratch:
    """Stands for the working memory of one instruction, where values are listed."""

    instruction: int


@dataclass(frozen=True, slots=True)
class MemoryMap:
    """What lies where in the arena, and when.

    Values of the arena are inputs and temporaries without a home; states, constants and values at a home lie elsewhere.

    Attributes:
        arena_bytes: size of the arena.
        alignment_bytes: every offset is a multiple of it; each value takes its bytes rounded up to it.
        live_bytes: bytes taken at each time, rounding included: entry 0 is before the first instruction (time -1),
            entry t + 1 while instruction t runs, the last one after the last instruction.
        lifetimes: value -> (first, last) instruction at which its memory is needed, both inclusive.
        shares: value -> the value in whose memory it was put, which is read for the last time when it is written.
        order: the order of placing that was best.
    """

    arena_bytes: int
    alignment_bytes: int
    live_bytes: list[int]
    lifetimes: dict[Value, tuple[int, int]]
    shares: dict[Value, Value]
    order: str
    _offsets: dict[Value | Scratch, int]
    _scratch: list[int]

    @property
    def peak_live_bytes(self) -> int:
        """Most bytes taken at one time, rounding included, holes not."""
        return max(self.live_bytes)

    @property
    def peak_at(self) -> int:
        """The first instruction at which that many bytes are taken (-1: before the first one)."""
        return self.live_bytes.index(self.peak_live_bytes) - 1

    @property
    def holes_bytes(self) -> int:
        """The arena beyond the peak: what placement lost."""
        return self.arena_bytes - self.peak_live_bytes

    def offset_bytes(self, value: Value) -> int:
        """Where a value starts. Raises KeyError for one that is not in the arena."""
        if value not in self._offsets:
            raise KeyError(f"a {value.origin} of {value.spec}{' at a home' if value.home else ''} is not in the arena")
        return self._offsets[value]

    def scratch_offset_bytes(self, n: int) -> int:
        """Where the working memory of instruction ``n`` starts; 0 where it has none."""
        return self._offsets.get(Scratch(n), 0)

    def alive_at(self, n: int) -> list[tuple[Value | Scratch, int, int]]:
        """(value or scratch, its bytes before rounding, its offset) of everything in the arena at time ``n``.

        The rounded bytes add up to ``live_bytes[n + 1]``: of two values that share memory, the later one is listed.
        """
        given = {old for new, old in self.shares.items() if self.lifetimes[new][0] == n}
        found: list[tuple[Value | Scratch, int, int]] = [
            (value, value.nbytes, self._offsets[value])
            for value, (first, last) in self.lifetimes.items()
            if first <= n <= last and value.nbytes and value not in given
        ]
        if 0 <= n < len(self._scratch) and self._scratch[n]:
            found.append((Scratch(n), self._scratch[n], self.scratch_offset_bytes(n)))
        return found


def plan_memory(
    program: Program, scratch: Sequence[int], aliasing: Sequence[bool], alignment_bytes: int = 64
) -> MemoryMap:
    """Place everything that a program needs beside its states and constants in one arena.

    Arguments:
        program: in the order in which it will run.
        scratch: bytes of working memory of each instruction (scratch and library bytes).
        aliasing: of each instruction, whether an output may share memory, element for element, with an input of the
            same spec: all inputs' element i is read before any output's element i is written.
        alignment_bytes: of the device.

    Raises:
        ValueError: ``scratch`` or ``aliasing`` has not one entry an instruction.
    """
    n = len(program.instructions)
    if len(scratch) != n or len(aliasing) != n:
        raise ValueError(
            f"{n} instructions need {n} entries, got {len(scratch)} for scratch, {len(aliasing)} for aliasing"
        )
    lifetimes = _lifetimes(program)
    shares = _shares(program, aliasing, lifetimes)
    owner: dict[Value, Value] = {}
    for new, old in shares.items():  # in the order of instructions: the old one's owner is known
        owner[new] = owner.get(old, old)
    spans = {value: span for value, span in lifetimes.items() if value not in owner}
    for value, whose in owner.items():
        spans[whose] = (spans[whose][0], max(spans[whose][1], lifetimes[value][1]))

    intervals = [Interval(value.nbytes, *span, value) for value, span in spans.items()]
    intervals += [Interval(nbytes, at, at, Scratch(at)) for at, nbytes in enumerate(scratch) if nbytes]
    placement = place(intervals, alignment_bytes)
    offsets = {interval.key: at for interval, at in zip(intervals, placement.offsets, strict=True)}
    for value, whose in owner.items():
        offsets[value] = offsets[whose]

    change = [0] * (n + 3)
    for interval in intervals:
        rounded = _round_up(interval.size_bytes, alignment_bytes)
        change[interval.first + 1] += rounded
        change[interval.last + 2] -= rounded
    live, level = [], 0
    for step in change[: n + 2]:
        level += step
        live.append(level)
    return MemoryMap(
        placement.arena_bytes,
        alignment_bytes,
        live,
        lifetimes,
        shares,
        placement.order,
        offsets,
        list(scratch),
    )


def _lifetimes(program: Program) -> dict[Value, tuple[int, int]]:
    """First and last instruction of every value in the arena."""
    readers = program.readers()
    found = {value: (-1, max(readers.get(value, [-1]))) for value in program.inputs if value.home is None}
    for at, instruction in enumerate(program.instructions):
        for value in instruction.outs:
            if value.home is None:
                found[value] = (at, max(readers.get(value, [at])))
    return found


def _shares(program: Program, aliasing: Sequence[bool], lifetimes: dict[Value, tuple[int, int]]) -> dict[Value, Value]:
    """New value -> the dying value whose memory it takes over, in the order of instructions."""
    shares: dict[Value, Value] = {}
    for at, instruction in enumerate(program.instructions):
        if not aliasing[at]:
            continue
        for _, outs in parts_of(instruction):
            taken: set[Value] = set()
            for out in outs:
                if out.home is not None or not out.nbytes:
                    continue
                for old in _dying(instruction, out, at, lifetimes):
                    if old not in taken and _same_layout(out, old):
                        shares[out] = old
                        taken.add(old)
                        break
    return shares


def _dying(instruction: Instruction, out: Value, at: int, lifetimes: dict[Value, tuple[int, int]]) -> list[Value]:
    """Values of the arena that an instruction is the last to read, and over which it may therefore write an output."""
    return [v for v in overwritable(instruction, out) if v in lifetimes and lifetimes[v][1] == at]


def overwritable(instruction: Instruction, out: Value) -> list[Value]:
    """Values that an instruction reads element for element, so that it may write ``out`` over them if it may alias.

    A primitive that may alias (a scatter, a slice update, dropout) changes its first input in place; it reads its other
    inputs all along. Elementwise and composite kernels work element by element throughout. Of a joined instruction,
    only the part that makes ``out`` does: in which order the parts run is not known.
    """
    ins = instruction.ins
    if is_norm(instruction):
        return overwritable_by_norm(instruction, out)
    if instruction.op is FUSED_MANY:
        own = [i for i in part_of(instruction, out) if isinstance(i, Ref)]
        crooked = {i.value for i in own if not i.whole}
        reads = Counter(ref.value for ref in instruction.refs)
        reads.subtract(i.value for i in own)  # what is left are other parts' reads
        return [value for value in dict.fromkeys(i.value for i in own) if not reads[value] and value not in crooked]
    if instruction.op is not FUSED and instruction.op.kind == "primitive":
        ins = ins[:1]
    crooked = {ref.value for ref in instruction.refs if not ref.whole}
    if len(ins) < len(instruction.ins):
        crooked |= {ref.value for ref in instruction.ins[1:] if isinstance(ref, Ref)}
    return list(dict.fromkeys(i.value for i in ins if isinstance(i, Ref) and i.value not in crooked))


def _same_layout(a: Value, b: Value) -> bool:
    return a.spec.shape == b.spec.shape and a.spec.dtype == b.spec.dtype and (
        a.spec.strides == b.spec.strides or (a.spec.contiguous and b.spec.contiguous)
    )  # fmt: skip
