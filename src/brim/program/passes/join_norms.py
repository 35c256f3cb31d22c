"""Norms joined with the elementwise groups around them, so that what they hand to each other is not read back.

What comes before a norm (the sum that layer norm normalises, the mask on the gradient that batch norm is given) is
computed while the norm reads; it is stored only if somebody else needs it. What comes after (an activation, a sum with
the shortcut, dropout) is computed before the norm's result is stored. Which norms gain by it is the backend's to say.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from brim.expr import FusedFormula, ScalarStep
from brim.program.ir import STORE, Instruction, Program, Ref, Value
from brim.program.norm_groups import FUSED_NORMS, identity, is_fused_norm, is_norm, norm_group
from brim.program.passes.groups import Group, group_of, is_fusible
from brim.program.passes.liveness import live_bytes

__all__ = ["HOLES", "join_norms"]

HOLES = 1 / 256
"""By so much the planned peak may be higher: what placing other lifetimes leaves unused is luck, either way."""


def join_norms(
    program: Program,
    accepts: Callable[[Instruction], bool],
    peak: Callable[[Program], int] | None = None,
) -> Program:
    """The program with elementwise groups joined to the norms that they follow or precede.

    A group and a norm run as one at the place of the later of them, or of the earlier one where that is not possible,
    if no other instruction has to run in between. The results are the same to the bit if the backend's kernels are.

    Arguments:
        program: in the order in which it would run.
        accepts: whether the backend wants this joined instruction instead of the two.
        peak: the planned peak of a program in bytes; None: what ``live_bytes`` comes to.

    Returns:
        a program that keeps no more bytes alive at its peak, and whose planned peak is no higher but for ``HOLES``.
    """
    if not any(_is_norm(i) for i in program.instructions):
        return program
    estimate_bytes = max(live_bytes(program))
    limit_bytes: float | None = None
    tried: list[int] = []
    for sides, limit in ((_BOTH, None), (_BOTH, estimate_bytes), (_AFTER, estimate_bytes), (_BEFORE, estimate_bytes)):
        made = program
        for side in sides:
            made = side(made, accepts, limit).run()
        if made is program or len(made.instructions) in tried or max(live_bytes(made)) > estimate_bytes:
            continue
        tried.append(len(made.instructions))
        if peak is None:
            return made
        if limit_bytes is None:
            limit_bytes = peak(program) * (1 + HOLES)
        if peak(made) <= limit_bytes:
            return made
    return program


def _is_norm(instruction: Instruction) -> bool:
    return is_norm(instruction) and all(out.home is None for out in instruction.outs)


@dataclass(eq=False, slots=True)
class _Pair:
    """A norm and a group by their numbers, and by which value they meet."""

    norm: int
    group: int
    value: Value


class _Search(ABC):
    """Joins the pairs of one side as long as it pays.

    Arguments:
        limit_bytes: how many bytes may be alive by the estimate; None: it does not matter.
    """

    def __init__(self, program: Program, accepts: Callable[[Instruction], bool], limit_bytes: int | None) -> None:
        self.program, self.accepts, self.limit_bytes = program, accepts, limit_bytes
        self.instructions: list[Instruction | None] = list(program.instructions)
        self.place = list(range(len(self.instructions)))  # where what stood there runs now
        self.readers, self.made = program.readers(), program.producers()

    @abstractmethod
    def pairs(self) -> Iterable[_Pair]:
        """What might be joined, the best first where there is a choice."""

    @abstractmethod
    def join(self, norm: Instruction, group: Group, value: Value, keep: bool) -> Instruction:
        """Both as one instruction; ``keep``: the value that they meet by is stored, too."""

    def run(self) -> Program:
        for pair in self.pairs():
            norm, other = self.instructions[pair.norm], self.instructions[pair.group]
            if norm is None or other is None or norm.phase != other.phase:
                continue
            if norm is not self.program.instructions[pair.norm] or not is_fusible(other):
                continue  # one of them is part of another pair already
            first, second = sorted((pair.norm, pair.group))
            at = self._where(first, second)
            if at is None:
                continue
            keep = self.readers[pair.value] != [second]
            joined = self.join(norm, group_of(other), pair.value, keep)
            if not self.accepts(joined):
                continue
            old = self.instructions[first], self.instructions[second]
            self.instructions[first] = self.instructions[second] = None
            self.instructions[at] = joined
            if self.limit_bytes is not None and max(live_bytes(self._program())) > self.limit_bytes:
                self.instructions[first], self.instructions[second] = old
                continue
            self.place[first] = self.place[second] = at
        return self._program() if None in self.instructions else self.program

    def _program(self) -> Program:
        return self.program.with_instructions([i for i in self.instructions if i is not None])

    def _where(self, first: int, second: int) -> int | None:
        """Where both may run as one: the place of the second, or of the first; None if nowhere."""
        a, b = self.instructions[first], self.instructions[second]
        assert a is not None
        assert b is not None
        later = [self._at(reader) for out in a.outs for reader in self.readers.get(out, ()) if reader != second]
        if all(reader > second for reader in later) and not self._written_between(first, second, a):
            return second
        made = [self.made[ref.value] for ref in b.refs if ref.value in self.made]
        if all(self._at(n) < first for n in made if n != first) and not self._written_between(first, second, b):
            return first
        return None

    def _at(self, number: int) -> int:
        return self.place[number] if number < len(self.place) else number

    def _written_between(self, first: int, second: int, mover: Instruction) -> bool:
        """True when a state that an instruction reads is written between two places."""
        states = {ref.value.home or ref.value for ref in mover.refs}
        for instruction in self.instructions[first + 1 : second]:
            if instruction is None:
                continue
            written = [instruction.ins[0].value] if instruction.op is STORE else [out.home for out in instruction.outs]
            if any(state in states for state in written if state is not None):
                return True
        return False


class _After(_Search):
    """Groups that read a norm's first result."""

    def pairs(self) -> Iterable[_Pair]:
        for n, instruction in enumerate(self.program.instructions):
            if not is_fusible(instruction):
                continue
            # The latest norm first: what the group reads besides is there already.
            read = {ref.value for ref in instruction.refs} & set(self.made)
            for value in sorted(read, key=self.made.__getitem__, reverse=True):
                norm = self.program.instructions[self.made[value]]
                if _is_norm(norm) and _is_plain_after(norm) and norm.outs[0] is value and _meet(instruction, value):
                    yield _Pair(self.made[value], n, value)

    def join(self, norm: Instruction, group: Group, value: Value, keep: bool) -> Instruction:
        parts = _parts(norm)
        others = _Others(parts.others)
        numbers = [0 if isinstance(x, Ref) and x.value is value else others.number(x) + 1 for x in group.ins]
        steps, outputs, outs = _renamed(group.formula, numbers), [*group.formula.outputs], [*group.outs]
        if keep:
            outputs.append(len(steps))
            steps.append(ScalarStep("cast", value.spec.dtype, (("in", 0),), value.spec.dtype))
            outs.append(value)
        after = FusedFormula(tuple(steps), tuple(outputs))
        return _fused(norm, parts.own, others.found, parts.before, after, (*outs, *parts.kept, *parts.rest), value)


class _Before(_Search):
    """Groups that make a norm's first input."""

    def pairs(self) -> Iterable[_Pair]:
        for n, instruction in enumerate(self.program.instructions):
            if not _is_norm(instruction) or (value := _first_input(instruction)) is None or value not in self.made:
                continue
            maker = self.program.instructions[self.made[value]]
            if is_fusible(maker) and value.spec.shape == maker.outs[0].spec.shape:
                yield _Pair(n, self.made[value], value)

    def join(self, norm: Instruction, group: Group, value: Value, keep: bool) -> Instruction:
        parts = _parts(norm)
        others = _Others(())
        steps = _renamed(group.formula, [others.number(x) for x in group.ins])
        step = dict(zip(group.outs, group.formula.outputs, strict=True))
        kept = [out for out in group.outs if out is not value or keep]
        before = FusedFormula(tuple(steps), (step[value], *(step[out] for out in kept)))
        # What follows the norm reads the same operands under new numbers; the value itself (number 1) it does not read.
        numbers = [0, -1, *(others.number(x) + 1 for x in parts.others[1:])]
        after = FusedFormula(tuple(_renamed(parts.after, numbers)), parts.after.outputs)
        return _fused(norm, parts.own, others.found, before, after, (*parts.made, *kept, *parts.rest), value)


_AFTER, _BEFORE, _BOTH = (_After,), (_Before,), (_After, _Before)


class _Others:
    """Operands that both formulas read, each once."""

    def __init__(self, known: Iterable[Any]) -> None:
        self.found: list[Any] = list(known)

    def number(self, operand: Any) -> int:
        for n, one in enumerate(self.found):
            if one is operand or (isinstance(operand, Ref) and one == operand):
                return n
        self.found.append(operand)
        return len(self.found) - 1


def _parts(norm: Instruction) -> Any:
    """A norm, with or without formulas, as one with formulas."""
    if is_fused_norm(norm):
        return norm_group(norm.op.name, norm.ins, norm.outs, norm.params)
    first, *own = norm.ins
    params = {
        **norm.params, "before": identity(first.spec.dtype), "after": identity(norm.outs[0].spec.dtype)
    }  # fmt: skip
    return norm_group(f"{norm.op.name}_fused", (*own, first), norm.outs, params)


def _is_plain_after(norm: Instruction) -> bool:
    return not is_fused_norm(norm) or norm.params["after"] == identity(norm.outs[0].spec.dtype)


def _first_input(norm: Instruction) -> Value | None:
    """The value that a norm's first input is, whole; None where it is computed by a formula or is another reading."""
    first = norm.ins[0]
    if is_fused_norm(norm):
        group = norm_group(norm.op.name, norm.ins, norm.outs, norm.params)
        first = group.others[0] if group.others else None
        if not isinstance(first, Ref) or group.before != identity(first.spec.dtype):
            return None
        if any(arg == ("in", 1) for step in group.after.steps for arg in step.args):
            return None  # what follows the norm reads it, too
    reads = [ref for ref in norm.refs if isinstance(first, Ref) and ref.value is first.value]
    return first.value if len(reads) == 1 and reads[0].whole else None


def _meet(group: Instruction, value: Value) -> bool:
    """True when a group reads a value element for element and in no other way."""
    refs = [ref for ref in group.refs if ref.value is value]
    return all(ref.whole for ref in refs) and group.outs[0].spec.shape == value.spec.shape


def _renamed(formula: FusedFormula, numbers: list[int]) -> list[ScalarStep]:
    """The steps of a formula whose input ``n`` is now called ``numbers[n]``."""
    return [
        ScalarStep(s.fn, s.dtype, tuple((k, numbers[w]) if k == "in" else (k, w) for k, w in s.args), s.compute)
        for s in formula.steps
    ]


def _fused(
    norm: Instruction,
    own: Iterable[Any],
    others: Iterable[Any],
    before: FusedFormula,
    after: FusedFormula,
    outs: tuple[Value, ...],
    value: Value,
) -> Instruction:
    params = {k: v for k, v in norm.params.items() if k not in ("before", "after", "shape")}
    params |= {"before": before, "after": after, "shape": value.spec.shape}
    op = FUSED_NORMS[norm.op.name.removesuffix("_fused")]
    return replace(norm, op=op, ins=(*own, *others), outs=outs, params=params)
