"""Side by side: small elementwise instructions of one formula that do not depend on each other become one instruction.

A step updates each parameter by an instruction of its own, so a model of 150 parameters runs 150 small ones; each
costs a launch on a GPU, and a call and the waking of a team of threads on a CPU. The joined instruction runs where the
last of them ran, which keeps what the earlier ones read alive for longer; that is done only as far as it does not raise
the peak.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from brim.expr import FusedFormula, ScalarStep
from brim.program.ir import FUSED_MANY, STORE, HostScalar, Instruction, Operand, Program, Ref, Value
from brim.program.passes.groups import Group, group_of, is_fusible
from brim.program.passes.liveness import live_bytes, stored_values
from brim.program.passes.schedule import Order
from brim.spec import Spec

__all__ = ["ARRAY_BYTES_MAX", "Keys", "is_small", "joined", "side_by_side"]

ARRAY_BYTES_MAX = 2**20
"""Larger arrays stay by themselves: moving them takes longer than a launch."""

_LESS = (2, 4, 8, 16, 2**63)  # parts of the bytes that joining keeps, tried until the peak is no higher


def side_by_side(
    program: Program,
    keeps_bytes: int,
    alignment_bytes: int = 1,
    scratch_bytes: Callable[[Instruction], int] | None = None,
    peak: Callable[[Program], int] | None = None,
    array_bytes: int = ARRAY_BYTES_MAX,
    update_bytes: int = ARRAY_BYTES_MAX,
) -> Program:
    """The program with independent instructions of one formula on small arrays joined; the same results to the bit.

    Arguments:
        program: in the order in which it would run; the order of what is not joined stays.
        keeps_bytes: up to so many bytes may be alive at any time only because of joining.
        alignment_bytes: every value takes the next multiple of it.
        scratch_bytes: working memory of an instruction; None: none.
        peak: the planned peak of a program in bytes; None: what ``live_bytes`` and the scratch come to.
        array_bytes: the largest array of an instruction.
        update_bytes: the same where it makes new values of states and nothing else, if that is more.

    Returns:
        a program whose peak is no higher.
    """

    def levels(one: Program) -> list[int]:
        return live_bytes(one, alignment_bytes, scratch_bytes)

    judge = peak or (lambda one: max(levels(one)))
    search = _Search(program, levels(program), alignment_bytes, array_bytes, max(array_bytes, update_bytes))
    made, kept_bytes = search.joined(keeps_bytes)
    if made is program:
        return program
    limit_bytes = judge(program)
    less = [kept_bytes // divisor for divisor in _LESS if kept_bytes]
    while judge(made) > limit_bytes:  # the search adds up estimates: what groups keep together, and holes, show here
        if not less:
            return program
        made, _ = search.joined(less.pop(0))
    return made


@dataclass(eq=False, slots=True)
class _Member:
    """An instruction that may be joined: its number, what it computes, and what waiting with it costs.

    Attributes:
        limit: number of the first instruction that has to come after it.
        kept_bytes: of what nobody reads after it.
        stores: numbers of the stores of its outputs, which wait with it.
    """

    number: int
    group: Group
    limit: int
    kept_bytes: int
    stores: list[int]


class _Search:
    def __init__(
        self, program: Program, levels: Sequence[int], alignment_bytes: int, array_bytes: int, update_bytes: int
    ) -> None:
        self.program, self.levels = program, np.array(levels, np.int64)
        self.alignment_bytes = alignment_bytes
        self.readers = program.readers()
        self.after = Order(program).after()
        self.at_home = {value for value, _ in stored_values(program)}
        self.candidates: list[tuple[Any, _Member]] = []
        keys = Keys()
        for n, instruction in enumerate(program.instructions):
            is_update = all(out in self.at_home for out in instruction.outs)
            largest_bytes = update_bytes if is_update else array_bytes
            if not is_small(instruction, largest_bytes) or not is_fusible(instruction):
                continue
            group = group_of(instruction)
            if (key := keys.of(group)) is not None:
                limit, stores = self._limit(n)
                self.candidates.append((key, _Member(n, group, limit, self._kept_bytes(n), stores)))

    def _limit(self, n: int) -> tuple[int, list[int]]:
        """Before which instruction one has to run, when the stores of its outputs come along; and those stores."""
        instructions = self.program.instructions
        made = set(instructions[n].outs)
        limit, stores = len(instructions), []
        for later in self.after[n]:
            if instructions[later].op is STORE and instructions[later].ins[1].value in made:
                stores.append(later)
                limit = min([limit, *self.after[later]])
            else:
                limit = min(limit, later)
        return limit, stores

    def _kept_bytes(self, n: int) -> int:
        """Bytes that would be free after an instruction if it ran where it is."""
        values = {ref.value for ref in self.program.instructions[n].refs}
        dying = [v for v in values if v.origin in ("temp", "input") and v.home is None and self.readers[v][-1] == n]
        sizes = [v.nbytes for v in dying]
        for out in self.program.instructions[n].outs:
            if out.nbytes in sizes and out in self.readers and out not in self.at_home:
                sizes.remove(out.nbytes)  # it would have taken that memory over, and does so later
        return sum(-(-nbytes // self.alignment_bytes) * self.alignment_bytes for nbytes in sizes)

    def joined(self, keeps_bytes: int) -> tuple[Program, int]:
        """The program (the same object if nothing is joined) and the most bytes that joining keeps at one time."""
        peak = int(self.levels.max())
        extra = np.zeros(len(self.levels), np.int64)  # bytes that are alive at each time because of joining
        open_groups: dict[Any, list[_Member]] = {}
        groups: list[list[_Member]] = []
        for key, member in self.candidates:
            group = open_groups.get(key)
            if group is not None:
                window = slice(group[-1].number + 1, member.number + 1)
                kept = sum(one.kept_bytes for one in group)
                fits = (
                    min(one.limit for one in group) > member.number
                    and int(extra[window].max()) + kept <= keeps_bytes
                    and int((self.levels + extra)[window].max()) + kept <= peak
                )
                if fits:
                    extra[window] += kept
                    group.append(member)
                    continue
            open_groups[key] = [member]
            groups.append(open_groups[key])
        groups = [group for group in groups if len(group) > 1]
        return (self._with(groups) if groups else self.program), int(extra.max())

    def _with(self, groups: list[list[_Member]]) -> Program:
        instructions = self.program.instructions
        moved: set[int] = set()
        at: dict[int, list[Instruction]] = {}
        for group in groups:
            last = group[-1].number
            stores = sorted(n for one in group for n in one.stores if n < last)
            moved.update(stores, (one.number for one in group))
            at[last] = [joined([one.group for one in group], [instructions[one.number] for one in group])]
            at[last] += [instructions[n] for n in stores]
        made: list[Instruction] = []
        for n, instruction in enumerate(instructions):
            made += at.get(n, () if n in moved else (instruction,))
        return self.program.with_instructions(made)


def is_small(instruction: Instruction, largest_bytes: int) -> bool:
    """True when its outputs are row-major and small, and its inputs are laid out as they are, or have one element."""
    outs = instruction.outs
    if not outs or not all(out.spec.contiguous and 0 < out.nbytes <= largest_bytes for out in outs):
        return False
    return all(ref.spec.contiguous and ref.spec.size in (1, outs[0].spec.size) for ref in instruction.refs)


class Keys:
    """What is equal for instructions that may be joined; two formulas are one if their texts are."""

    def __init__(self) -> None:
        self.texts: dict[int, tuple[FusedFormula, str]] = {}

    def of(self, group: Group) -> Any:
        """None for what is not joined: random numbers differ by the position in their array."""
        if any(step.fn == "uniform" for step in group.formula.steps):
            return None
        size = group.outs[0].spec.size
        operands: list[Any] = []
        for x in group.ins:
            if isinstance(x, HostScalar):
                operands.append(x.kind)
            elif x.spec.size != size:  # one element for all of the part
                operands.append(("one", x.spec.dtype))
            else:
                operands.append(x.spec.dtype)
        text = repr(group.formula)  # not the formula itself: 0.0 equals -0.0, and 1 equals True
        return text, tuple(operands), tuple(out.spec.dtype for out in group.outs)


def joined(groups: Sequence[Group], instructions: Sequence[Instruction]) -> Instruction:
    """One instruction for all groups: what all of them read alike comes first, once."""
    width = len(groups[0].ins)
    size = groups[0].outs[0].spec.size
    shared = [n for n in range(width) if _is_shared([group.ins[n] for group in groups], size)]
    own = [n for n in range(width) if n not in shared]
    numbers = {old: new for new, old in enumerate((*shared, *own))}
    formula = _renumbered(groups[0].formula, numbers)
    first = [groups[0].ins[n] for n in shared]
    ins: list[Operand] = [_one(x) if isinstance(x, Ref) else x for x in first]
    for group in groups:
        whole = group.outs[0].spec.size
        ins += [_one(x) if isinstance(x, Ref) and x.spec.size != whole else x for x in (group.ins[n] for n in own)]
    outs: tuple[Value, ...] = tuple(out for group in groups for out in group.outs)
    params = {"formula": formula, "count": len(groups), "shared": len(shared)}
    last = instructions[-1]
    layer = last.layer if all(one.layer == last.layer for one in instructions) else ""
    return Instruction(FUSED_MANY, tuple(ins), outs, params, layer, last.site, last.phase)


def _is_shared(operands: Sequence[Any], size: int) -> bool:
    """True for an array of one element that all parts read, and for scalars that are always the same number."""
    first = operands[0]
    if isinstance(first, HostScalar):
        return len({_scalar_key(one) for one in operands}) == 1
    return first.spec.size != size and len({(one.value, one.offset) for one in operands}) == 1


def _one(x: Ref) -> Ref:
    """An array of one element, whatever its axes."""
    return Ref(x.value, Spec((), x.spec.dtype), x.offset)


def _scalar_key(x: Any) -> Any:
    """Equal for two host scalars only if they are always the same number of the same type."""
    if not isinstance(x, HostScalar):
        return type(x), repr(x)
    code = getattr(x.read, "__code__", None)
    if not x.args or code is None or x.read.__closure__ or x.read.__defaults__:  # it may read anything
        return id(x)
    return code, x.kind, tuple(map(_scalar_key, x.args))


def _renumbered(formula: FusedFormula, numbers: dict[int, int]) -> FusedFormula:
    """The formula with its inputs in another order."""

    def step(old: ScalarStep) -> ScalarStep:
        return replace(old, args=tuple((kind, numbers[x] if kind == "in" else x) for kind, x in old.args))

    return FusedFormula(tuple(map(step, formula.steps)), formula.outputs)
