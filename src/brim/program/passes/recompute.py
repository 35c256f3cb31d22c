"""Recomputation: what a block makes for the backward pass is not kept, but made a second time just before it is needed.

A block is named by the path of a layer ("stage1.block0": everything inside it), or of several neighbours that are
treated as one ("stage1.0..3": the layers 0, 1, 2 and 3 of stage1); "stage1.*" names every layer of stage1, each as a
block of its own. ":elementwise" is no block, but all that ``rematerialise.py`` finds. Of each call of a block, its
inputs and outputs stay; the forward instructions that lead from there to what its backward pass reads are repeated
right before the first such reading. Compare Chen, Xu, Zhang and Guestrin, "Training deep nets with sublinear memory
cost", 2016.

Instructions are repeated as they are, with the same operands and host scalars (so a dropout draws the same mask), and
only where they still read the same state; therefore results are the same to the last bit. State is never written
twice. ``recompute`` runs before fusion, on the program as traced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from brim.program.ir import STORE, Instruction, Program, Ref, Value, is_pure
from brim.program.passes.rematerialise import rematerialise

__all__ = [
    "ELEMENTWISE",
    "Analysis",
    "arithmetic",
    "blocks",
    "expanded",
    "extra_arithmetic",
    "matcher",
    "prefixes",
    "recompute",
    "shortened",
]

ELEMENTWISE = ":elementwise"
"""Among layers: everything that a few elementwise instructions make again."""

_MEMORY_BOUND = 16


def recompute(program: Program, layers: Sequence[str], analysis: Analysis | None = None) -> Program:
    """The program in which the named blocks keep nothing for the backward pass but their inputs and outputs.

    Arguments:
        layers: layer paths, ranges of them ("0..3"), all inside one ("blocks.*"), and ":elementwise". A name inside
            another one's block is covered by it. A name that no forward instruction belongs to changes nothing.
        analysis: of the program, where there is one already.

    Raises:
        ValueError: a range that is not two numbers.
    """
    replays = (analysis or Analysis(program)).replays(layers)
    made = _repeated(program, replays) if any(r.instructions for r in replays) else program
    return rematerialise(made) if ELEMENTWISE in layers else made


def _repeated(program: Program, replays: Sequence[_Replay]) -> Program:
    inserted: dict[int, list[Instruction]] = {}
    for one in replays:  # the last block first: also where several begin at one place
        inserted.setdefault(one.at, []).extend(one.instructions)
    mapping = {old: new for one in replays for old, new in one.values.items()}
    first = {old: one.at for one in replays for old in one.values}
    made: list[Instruction] = []
    for n, instruction in enumerate(program.instructions):
        made += inserted.get(n, ())
        if instruction.phase == "backward" and instruction.op is not STORE:
            ins = tuple(
                replace(i, value=mapping[i.value])
                if isinstance(i, Ref) and i.value in mapping and n >= first[i.value]
                else i
                for i in instruction.ins
            )
            if any(a is not b for a, b in zip(ins, instruction.ins, strict=True)):
                instruction = replace(instruction, ins=ins)
        made.append(instruction)
    return program.with_instructions(made)


def blocks(
    program: Program, names: Iterable[str] | None = None, analysis: Analysis | None = None
) -> list[tuple[str, int, int]]:
    """Blocks that could be recomputed: (name, bytes that need not be kept any more, extra arithmetic).

    Arguments:
        names: which blocks to look at; by default every dotted prefix of a layer that has forward instructions, in the
            order of first use.
        analysis: of the program, where there is one already.

    Returns:
        Those that save anything. Extra arithmetic is in floating-point operations: see ``arithmetic``.
    """
    analysis = analysis or Analysis(program)
    found = []
    for name in prefixes(program) if names is None else names:
        replays = analysis.replays([name])
        saved = sum(one.saved_bytes for one in replays)
        if saved > 0:
            found.append((name, saved, sum(arithmetic(i) for one in replays for i in one.instructions)))
    return found


def prefixes(program: Program) -> list[str]:
    """Every dotted prefix of a layer that has forward instructions, in the order of first use."""
    found: dict[str, None] = {}
    for instruction in program.instructions:
        if instruction.phase == "forward" and instruction.layer:
            parts = instruction.layer.split(".")
            found.update(dict.fromkeys(".".join(parts[: depth + 1]) for depth in range(len(parts))))
    return list(found)


def arithmetic(instruction: Instruction) -> int:
    """Work of an instruction in floating-point operations, roughly: two a multiply-add.

    An element of anything else counts as 16: memory limits it, which is so many times slower than a matrix product.
    """
    name = instruction.op.name
    sizes = [ref.spec.size for ref in instruction.refs]
    written = sum(out.spec.size for out in instruction.outs)
    if name == "matmul":
        left = instruction.ins[0].spec
        return 2 * written * (left.shape[-1] if left.shape else 1)
    if name == "conv2d":
        return 2 * written * sizes[1] // max(1, instruction.ins[1].spec.shape[0])
    if name == "conv2d_grad_input":
        return 2 * sizes[0] * sizes[1] // max(1, instruction.ins[1].spec.shape[0])
    if name == "conv2d_grad_weight":
        return 2 * sizes[0] * written // max(1, instruction.outs[0].spec.shape[0])
    return _MEMORY_BOUND * max([written, *sizes])


def extra_arithmetic(before: Program, after: Program) -> float:
    """How much more work a program is than another, as a fraction of the other's."""
    base = sum(map(arithmetic, before.instructions))
    return (sum(map(arithmetic, after.instructions)) - base) / base if base else 0.0


def matcher(name: str) -> Callable[[str], bool]:
    """Tells whether a layer path is inside the block of that name."""
    if name == ELEMENTWISE:
        return lambda layer: True
    if name == "*" or name.endswith(".*"):
        outer = name[:-1]
        return lambda layer: layer.startswith(outer)
    if ".." not in name:
        inside = name + "."
        return lambda layer: layer == name or layer.startswith(inside)
    start, _, end = name.partition("..")
    parent, _, first = start.rpartition(".")
    if not (first.isdecimal() and end.isdecimal()):
        raise ValueError(f"a range of layers is a path that ends in a number, two dots and a number, got {name!r}")
    prefix = parent + "." if parent else ""
    low, high = int(first), int(end)

    def within(layer: str) -> bool:
        if not layer.startswith(prefix):
            return False
        number = layer[len(prefix) :].partition(".")[0]
        return number.isdecimal() and low <= int(number) <= high

    return within


def expanded(layers: Sequence[str], known: Iterable[str]) -> list[str]:
    """Names without "*": it is replaced by the layers that there are, in their order."""
    found: list[str] = []
    for name in layers:
        if name == "*" or name.endswith(".*"):
            outer = name[:-1]
            found += [outer + layer[len(outer) :].partition(".")[0] for layer in known if layer.startswith(outer)]
        else:
            found.append(name)
    return list(dict.fromkeys(found))


def shortened(layers: Sequence[str], known: Iterable[str]) -> tuple[str, ...]:
    """The same blocks, with "blocks.*" for all of a layer's, where all are there."""
    known = list(known)
    parents = dict.fromkeys(name.rpartition(".")[0] for name in layers if ".." not in name)
    for parent in parents:
        star = f"{parent}.*" if parent else "*"
        inside = expanded([star], known)
        if len(inside) > 2 and set(inside) <= set(layers):
            at = min(layers.index(name) for name in inside)
            layers = [*layers[:at], star, *(name for name in layers[at:] if name not in inside)]
    return tuple(layers)


@dataclass(eq=False, slots=True)
class _Replay:
    """What is repeated for one call of a block.

    Attributes:
        at: number of the instruction before which it is.
        instructions: the repeated ones, with new outputs.
        values: old value -> the one that backward instructions read instead.
        saved_bytes: bytes that are kept no longer, less those that are kept for it.
    """

    at: int
    instructions: list[Instruction]
    values: dict[Value, Value]
    saved_bytes: int


class Analysis:
    """A program's readers and writes, found once for many questions."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.instructions = program.instructions
        self.made = program.producers()
        self.readers = program.readers()
        self.writes: dict[Value, list[int]] = {}
        for n, instruction in enumerate(program.instructions):
            if instruction.op is STORE:
                self.writes.setdefault(instruction.ins[0].value, []).append(n)
            for out in instruction.outs:
                if out.home is not None:
                    self.writes.setdefault(out.home, []).append(n)
        self.numbers_by_layer: dict[str, list[int]] = {}
        for n, instruction in enumerate(program.instructions):
            if instruction.phase == "forward" and instruction.layer and instruction.op is not STORE:
                self.numbers_by_layer.setdefault(instruction.layer, []).append(n)

    def replays(self, layers: Sequence[str]) -> list[_Replay]:
        """Of every call of the named blocks, the last one first."""
        runs: list[tuple[int, list[int], Callable[[str], bool]]] = []
        taken: set[int] = set()
        names = expanded([name for name in layers if name != ELEMENTWISE], self.numbers_by_layer)
        for name in _outermost(names):
            inside = matcher(name)
            numbers = sorted(
                n for layer, found in self.numbers_by_layer.items() if inside(layer) for n in found if n not in taken
            )
            taken.update(numbers)
            run: list[int] = []
            for n in numbers:
                if run and n != run[-1] + 1:
                    runs.append((run[0], run, inside))
                    run = []
                run.append(n)
            if run:
                runs.append((run[0], run, inside))
        found: list[_Replay] = []
        needed: set[Value] = set()  # what the repetitions so far read
        for _, run, inside in sorted(runs, key=lambda entry: -entry[0]):
            one = self._replay(run, inside, needed)
            if one is not None:
                found.append(one)
                needed.update(ref.value for i in one.instructions for ref in i.refs)
        return found

    def _replay(self, run: list[int], inside: Callable[[str], bool], needed: set[Value]) -> _Replay | None:
        members = set(run)
        end = len(self.instructions)
        kept: set[Value] = set()
        dropped: dict[Value, int] = {}  # value -> its first reading in the backward pass
        for n in run:
            for value in self.instructions[n].outs:
                readers = self.readers.get(value, ())
                backward = [r for r in readers if r < end and self.instructions[r].phase == "backward"]
                leaves = any(r < end and r not in members and self.instructions[r].phase == "forward" for r in readers)
                elsewhere = any(not inside(self.instructions[r].layer) for r in backward)
                if end in readers or value in needed or (leaves and elsewhere):
                    kept.add(value)
                elif backward:
                    dropped[value] = backward[0]
        while dropped:
            at = min(dropped.values())
            wanted, stuck = self._closure(dropped, members, kept, at)
            if not stuck:
                return self._build(wanted, dropped, at, members)
            for value in stuck:
                kept.add(value)
                dropped.pop(value, None)
        return None

    def _closure(
        self, dropped: Iterable[Value], members: set[int], kept: set[Value], at: int
    ) -> tuple[list[int], list[Value]]:
        """Numbers of the instructions to repeat before ``at``, and values that cannot be made again there."""
        wanted: set[int] = set()
        stuck: list[Value] = []
        pending = [self.made[value] for value in dropped]
        while pending:
            n = pending.pop()
            if n in wanted:
                continue
            instruction = self.instructions[n]
            if not is_pure(instruction) or any(self._overwritten(ref.value, n, at) for ref in instruction.refs):
                stuck += [out for out in instruction.outs if out not in kept]
                continue
            wanted.add(n)
            for ref in instruction.refs:
                maker = self.made.get(ref.value)
                if maker is not None and maker in members and ref.value not in kept:
                    pending.append(maker)
        return sorted(wanted), stuck

    def _overwritten(self, value: Value, n: int, at: int) -> bool:
        """Whether a state no longer holds at ``at`` what instruction ``n`` read of it."""
        state = value.home or value
        return any(n <= write < at for write in self.writes.get(state, ()))

    def _build(self, wanted: list[int], dropped: dict[Value, int], at: int, members: set[int]) -> _Replay:
        fresh: dict[Value, Value] = {}
        repeated: list[Instruction] = []
        for n in wanted:
            old = self.instructions[n]
            outs = tuple(replace(out, category="temps") for out in old.outs)
            fresh.update(zip(old.outs, outs, strict=True))
            # What is read from inside but is kept has no new value: then the old one is read.
            ins = tuple(
                replace(i, value=fresh[i.value]) if isinstance(i, Ref) and i.value in fresh else i for i in old.ins
            )
            repeated.append(replace(old, ins=ins, outs=outs, phase="backward"))
        sources = {ref.value for i in repeated for ref in i.refs} - set(fresh.values())
        longer = sum(v.nbytes for v in sources if v.origin == "temp" and max(self.readers[v]) < at)
        saved = sum(value.nbytes for value in dropped) - longer
        return _Replay(at, repeated, {old: fresh[old] for old in dropped}, saved)


def _outermost(layers: Sequence[str]) -> list[str]:
    """Names without those that another one covers, the widest first."""

    def covers(outer: str, inner: str) -> bool:
        if ".." not in inner:
            return matcher(outer)(inner)
        start, _, end = inner.partition("..")
        parent = start.rpartition(".")[0]
        last = f"{parent}.{end}" if parent else end
        return matcher(outer)(start) and matcher(outer)(last)

    names = list(dict.fromkeys(layers))
    for name in names:
        matcher(name)
    return [n for n in names if not any(m != n and covers(m, n) and not (covers(n, m) and n < m) for m in names)]
