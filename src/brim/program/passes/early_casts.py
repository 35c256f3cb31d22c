"""Early casts: what is computed of states alone, as casts of weights are, is made together, where the first of it was.

Mixed precision casts each weight where its layer begins: one launch a layer. Together they are one launch, and their
results are there earlier than they are needed. That is done only as far as it does not raise the peak, which is mostly
reached when all of them are there anyway: the backward pass reads them again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from brim.program.ir import Instruction, Program
from brim.program.passes.groups import Group, group_of, is_fusible
from brim.program.passes.liveness import live_bytes, stored_values
from brim.program.passes.side_by_side import ARRAY_BYTES_MAX, Keys, is_small, joined

__all__ = ["early_casts"]

_PARTS = (1, 2, 4, 8, 16, 64)  # parts of the bytes that are made early, tried until the peak is no higher

_Member = tuple[int, Group, int]
"""Number of an instruction, what it computes, and the bytes that it makes."""


def early_casts(
    program: Program,
    keeps_bytes: int,
    alignment_bytes: int = 1,
    scratch_bytes: Callable[[Instruction], int] | None = None,
    peak: Callable[[Program], int] | None = None,
    array_bytes: int = ARRAY_BYTES_MAX,
) -> Program:
    """The program with elementwise instructions of one formula that read states alone joined; the same results.

    Arguments:
        program: in the order in which it would run; the order of what is not joined stays.
        keeps_bytes: up to so many bytes may be alive at any time only because of joining.
        alignment_bytes: every value takes the next multiple of it.
        scratch_bytes: working memory of an instruction; None: none.
        peak: the planned peak of a program in bytes; None: what ``live_bytes`` and the scratch come to.
        array_bytes: the largest array of an instruction.

    Returns:
        a program whose peak is no higher.
    """
    candidates = _candidates(program, alignment_bytes, array_bytes)
    if len({key for key, _ in candidates}) == len(candidates):
        return program

    def levels_of(one: Program) -> np.ndarray[Any, Any]:
        return np.array(live_bytes(one, alignment_bytes, scratch_bytes), np.int64)

    judge = peak or (lambda one: int(levels_of(one).max()))
    levels, limit_bytes, wanted_bytes = levels_of(program), judge(program), keeps_bytes
    for part in _PARTS:
        groups, kept_bytes = _groups(candidates, levels, wanted_bytes // part)
        if not groups:
            return program
        made = _with(program, groups)
        if judge(made) <= limit_bytes:
            return made
        if part == 1:
            wanted_bytes = kept_bytes
    return program


def _candidates(program: Program, alignment_bytes: int, array_bytes: int) -> list[tuple[Any, _Member]]:
    """What may run at any earlier time: nothing before it writes what it reads, since states are written afterwards."""
    keys, found = Keys(), []
    at_home = {value for value, _ in stored_values(program)}
    for n, instruction in enumerate(program.instructions):
        from_states = bool(instruction.ins) and all(ref.value.origin == "state" for ref in instruction.refs)
        stays = any(out in at_home for out in instruction.outs)
        if not from_states or stays or not is_small(instruction, array_bytes) or not is_fusible(instruction):
            continue
        group = group_of(instruction)
        if (key := keys.of(group)) is not None:
            nbytes = sum(-(-out.nbytes // alignment_bytes) * alignment_bytes for out in instruction.outs)
            found.append((key, (n, group, nbytes)))
    return found


def _groups(
    candidates: list[tuple[Any, _Member]], levels: np.ndarray[Any, Any], keeps_bytes: int
) -> tuple[list[list[_Member]], int]:
    """What is joined, and the most bytes that it keeps alive at one time; the nearest members first."""
    peak = int(levels.max())
    extra = np.zeros(len(levels), np.int64)  # bytes that are alive at each time because of joining
    latest: dict[Any, list[_Member]] = {}
    groups: list[list[_Member]] = []
    for key, member in candidates:
        group = latest.get(key)
        if group is not None:
            window = slice(group[0][0], member[0])
            fits = int(extra[window].max()) + member[2] <= keeps_bytes
            if fits and int((levels + extra)[window].max()) + member[2] <= peak:
                extra[window] += member[2]
                group.append(member)
                continue
        latest[key] = [member]
        groups.append(latest[key])
    return [group for group in groups if len(group) > 1], int(extra.max())


def _with(program: Program, groups: list[list[_Member]]) -> Program:
    instructions = program.instructions
    gone = {n for group in groups for n, _, _ in group}
    at = {
        group[0][0]: joined([one for _, one, _ in group], [instructions[n] for n, _, _ in group]) for group in groups
    }  # fmt: skip
    made: list[Instruction] = []
    for n, instruction in enumerate(instructions):
        if n in at:
            made.append(at[n])
        elif n not in gone:
            made.append(instruction)
    return program.with_instructions(made)
