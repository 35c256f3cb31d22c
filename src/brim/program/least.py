"""The least memory traffic and the fewest launches that a step allows: what a planned program is measured against.

Assumed of a step in its phases (forward, backward, update):

- within a phase everything stays on the chip; between phases nothing does, so what a later phase needs goes through
  memory: an input, parameter or state that a phase needs is read once there, whatever number of its instructions read
  it; a value that crosses is written once, and read once by each phase that needs it: a saved activation, a gradient;
- each new value of a state and each result is written once;
- elementwise arithmetic, random numbers, and the joining and copying of arrays are free and may be done again anywhere,
  so of what could cross instead of each other the smallest is taken (a minimum cut: a dropout mask costs nothing, of a
  product and an activation of it one crosses). What other instructions make (products, convolutions, reductions, norms
  as traced) is made once, where the program says; updates of states stay in the phase in which they stand;
- of an array that is read by index, no more is read than is taken. Constants and numbers of the host are free.

No program with these phases moves less, whatever its fusions; one whose kernels compute something again that is no
elementwise arithmetic (attention whose scores are never stored) can. Launches: one for each product and convolution,
to which everything else could be joined.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from brim.program.ir import STORE, Instruction, Program, Ref, Value
from brim.program.passes.common import common
from brim.program.passes.dead_code import dead_code

__all__ = ["PHASES", "Least", "least", "multiplies", "read_bytes", "written_bytes"]

PHASES = ("forward", "backward", "update")

_PRODUCTS = ("matmul", "conv2d", "conv2d_grad_input", "conv2d_grad_weight", "matmul_epilogue", "conv2d_epilogue")
_FREE = ("dropout", "fused", "fused_many", "fill", "iota", "concat")
_BY_INDEX = ("take", "pick_classes", "max_pool2d_pick")  # they read as much of their first input as they write
_WRITE_INTO = {"set_slice": 1, "index_add": 2, "put": 2}  # input with what is written into a copy of the first one
_FOREVER = 2**62


@dataclass(frozen=True, slots=True)
class Least:
    """What no program of a step's phases goes below.

    Attributes:
        launches: of kernels.
        by_phase: bytes by phase; what crosses is written in the earlier one and read in the later one.
    """

    launches: int
    by_phase: dict[str, int]

    @property
    def nbytes(self) -> int:
        """Bytes read and written."""
        return sum(self.by_phase.values())


def multiplies(instruction: Instruction) -> bool:
    """True for a matrix product, a convolution, or a gradient of one, with or without an epilogue."""
    return instruction.op.name in _PRODUCTS


def _region_bytes(ref: Ref) -> int:
    """Bytes of the different elements that a Ref shows: broadcast ones once, overlapping windows at most the array."""
    count = 1
    for extent, stride in zip(ref.spec.shape, ref.spec.strides, strict=True):
        count *= extent if stride or not extent else 1
    return min(count * ref.spec.dtype.itemsize, ref.value.nbytes)


def _touched_bytes(instruction: Instruction) -> int | None:
    """Bytes that change where the output lies over the first input; None for what writes all of its output anew."""
    position = _WRITE_INTO.get(instruction.op.name)
    if position is None:
        return None
    new = instruction.ins[position]
    return _region_bytes(new) if isinstance(new, Ref) else instruction.outs[0].nbytes


def read_bytes(instruction: Instruction, in_place: bool = False) -> dict[Value, int]:
    """Bytes that an instruction reads of each value, each element once.

    Arguments:
        in_place: its output lies over its first input, so that only what changes is touched, if it changes a part.
    """
    regions: dict[Value, dict[object, int]] = {}
    ins = instruction.ins[1:] if instruction.op is STORE else instruction.ins
    for position, ref in enumerate(ins):
        if not isinstance(ref, Ref):
            continue
        nbytes = _region_bytes(ref)
        if position == 0 and instruction.op.name in _BY_INDEX:
            nbytes = min(nbytes, sum(out.nbytes for out in instruction.outs))
        touched = _touched_bytes(instruction) if position == 0 and in_place else None
        if touched is not None:
            nbytes = min(nbytes, touched if instruction.op.name == "index_add" else 0)
        where = frozenset((d, s) for d, s in zip(ref.spec.shape, ref.spec.strides, strict=True) if s and d > 1)
        regions.setdefault(ref.value, {})[ref.offset, where] = nbytes
    return {value: min(sum(found.values()), value.nbytes) for value, found in regions.items()}


def written_bytes(instruction: Instruction, in_place: bool = False) -> int:
    """Bytes that an instruction writes."""
    if instruction.op is STORE:
        return int(instruction.ins[0].spec.nbytes)
    nbytes = sum(out.nbytes for out in instruction.outs)
    touched = _touched_bytes(instruction) if in_place else None
    return nbytes if touched is None else min(nbytes, touched)


def least(program: Program) -> Least:
    """The least traffic and launches of a step.

    Arguments:
        program: as traced, before fusion; what it computes for nothing or twice does not count.
    """
    program = common(dead_code(program))
    step = _Step(program)
    launches = sum(map(multiplies, program.instructions)) or min(1, len(program.instructions))
    found = list(step.written)
    for phase in range(len(PHASES)):
        for value, (read, written) in step.read(phase).items():
            found[phase] += read
            found[max(step.of(value), 0)] += written
    return Least(launches, dict(zip(PHASES, found, strict=True)))


class _Step:
    """A program as values of a level: -1 what is there before it, else the earliest phase after which it can exist."""

    def __init__(self, program: Program) -> None:
        self.level: dict[Value, int] = {}
        self.maker: dict[Value, Instruction] = {}  # of free values
        self.ends: list[list[tuple[Ref, int]]] = [[] for _ in PHASES]  # what a phase has to read, and bytes of it
        self.written = [0 for _ in PHASES]
        self.kept: set[Value] = set()  # written anyway: new values of states, and results
        self.stored: set[Value] = set()  # whose crossing may have been counted in an earlier phase
        parts: dict[Value, int] = {}  # bytes that are written to store a value that changes a part of another
        for i in program.instructions:
            phase = PHASES.index(i.phase)
            free = i.op.kind == "elementwise" or i.op.name in _FREE
            for out in i.outs:
                self.level[out] = max((self.of(ref.value) for ref in i.refs), default=-1) if free else phase
                if free:
                    self.maker[out] = i
                parts[out] = written_bytes(i, in_place=len(i.outs) == 1)
            stored = [i.ins[1].value] if i.op is STORE else [out for out in i.outs if out.home is not None]
            self.kept.update(stored)
            if i.op is STORE:  # it can be written where it is made
                (value,) = stored
                if value in self.level:
                    phase = PHASES.index(self.maker[value].phase) if value in self.maker else self.level[value]
                self.written[phase] += min(written_bytes(i), parts.get(value, _FOREVER))
                self.ends[phase].append((i.ins[1], _region_bytes(i.ins[1])))
            else:
                self.written[phase] += sum(min(out.nbytes, parts[out]) for out in stored)
                if not free or stored:
                    reads = read_bytes(i, in_place=True)
                    self.ends[phase] += [(ref, min(_region_bytes(ref), reads[ref.value])) for ref in i.refs]
        for ref in dict.fromkeys(program.results):
            if ref.value.origin == "temp" and ref.value not in self.kept:
                self.kept.add(ref.value)
                phase = max(self.of(ref.value), 0)
                self.written[phase] += _region_bytes(ref)
                self.ends[phase].append((ref, _region_bytes(ref)))

    def of(self, value: Value) -> int:
        return self.level.get(value, -1)

    def read(self, phase: int) -> dict[Value, tuple[int, int]]:
        """What a phase reads of what was there before it: bytes read, and bytes written earlier only for that."""
        weights: dict[Value, dict[object, int]] = {}
        links: dict[Value, set[Value]] = {}
        ends: set[Value] = set()
        pending: list[tuple[Ref, int, Value | None]] = [(ref, nbytes, None) for ref, nbytes in self.ends[phase]]
        while pending:
            ref, nbytes, reader = pending.pop()
            value = ref.value
            new = value not in weights
            seen = weights.setdefault(value, {})
            key = (ref.spec, ref.offset)
            seen[key] = max(seen.get(key, 0), nbytes)
            if reader is None:
                ends.add(value)
            else:
                links.setdefault(value, set()).add(reader)
            if new and (maker := self.maker.get(value)) is not None:
                pending += [(one, _region_bytes(one), value) for one in maker.refs]
        moves = {v: self._moves(v, min(sum(found.values()), v.nbytes), phase) for v, found in weights.items()}
        self.stored |= {value for value in moves if max(self.of(value) + 1, 1) <= phase}
        costs = {value: sum(both) for value, both in moves.items()}
        cut = _minimum_cut([v for v in costs if v not in self.maker], links, ends, costs)
        return {value: moves[value] for value in cut}

    def _moves(self, value: Value, nbytes: int, phase: int) -> tuple[int, int]:
        """Bytes read and written to have a value in a phase without making it there."""
        if value.origin == "constant":
            return 0, 0
        level = self.of(value)
        crossing = 0 if value in self.stored else nbytes  # the write counts once, for the first phase to read it
        if value not in self.maker:
            if level >= phase:
                return 0, 0  # the phase makes it by itself
            return nbytes, crossing if level >= 0 and value not in self.kept else 0
        if level >= phase or phase == 0 or value in self.kept:
            return _FOREVER, 0  # computed where it is needed
        return nbytes, crossing


def _minimum_cut(
    sources: Iterable[Value], links: dict[Value, set[Value]], ends: set[Value], costs: dict[Value, int]
) -> list[Value]:
    """The values of least cost whose removal cuts every path from a source to an end (Ford and Fulkerson 1956).

    Paths are searched depth first through halves of values: (value, False) before its cost is paid, (value, True)
    after it.
    """
    flow = _Flow(links, ends, costs)
    sources = list(sources)
    for source in sources:
        while flow.room[source] > 0 and (path := flow.path([source])[0]):
            flow.send(path)
    reached = flow.path(sources)[1]
    return [v for v, after in reached if not after and (v, True) not in reached and costs[v]]


_Half = tuple[Value, bool]


class _Flow:
    """How much goes from sources to ends already, and where more could."""

    def __init__(self, links: dict[Value, set[Value]], ends: set[Value], costs: dict[Value, int]) -> None:
        self.links, self.ends, self.costs = links, ends, costs
        self.back: dict[Value, set[Value]] = {}
        for value, readers in links.items():
            for reader in readers:
                self.back.setdefault(reader, set()).add(value)
        self.room = dict(costs)
        self.flows: dict[tuple[Value, Value], int] = {}

    def path(self, starts: Iterable[Value]) -> tuple[list[_Half], dict[_Half, _Half | None]]:
        """A way to an end on which every value has room, or flow that can be sent elsewhere; and what was reached."""
        came: dict[_Half, _Half | None] = {(start, False): None for start in starts}
        pending: list[_Half] = list(came)
        while pending:
            here = value, after = pending.pop()
            nexts: list[_Half] = []
            if after:
                if value in self.ends:
                    found: list[_Half] = []
                    at: _Half | None = here
                    while at is not None:
                        found.append(at)
                        at = came[at]
                    return found[::-1], came
                nexts += [(reader, False) for reader in self.links.get(value, ())]
                if self.room[value] < self.costs[value]:
                    nexts.append((value, False))
            else:
                if self.room[value] > 0:
                    nexts.append((value, True))
                nexts += [(one, True) for one in self.back.get(value, ()) if self.flows.get((one, value), 0) > 0]
            for one in nexts:
                if one not in came:
                    came[one] = here
                    pending.append(one)
        return [], came

    def send(self, path: list[_Half]) -> None:
        """As much as fits along a path."""
        steps = list(pairwise(path))
        amount = _FOREVER
        for (a, after), (b, later) in steps:
            if a is b:
                amount = min(amount, self.costs[a] - self.room[a] if after else self.room[a])
            elif not after and later:
                amount = min(amount, self.flows[b, a])
        for (a, after), (b, later) in steps:
            if a is b:
                self.room[a] += amount if after else -amount
            elif after and not later:
                self.flows[a, b] = self.flows.get((a, b), 0) + amount
            else:
                self.flows[b, a] -= amount
