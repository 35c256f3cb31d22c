"""How many bytes a program keeps alive at each instruction: a quick estimate that passes choose by.

Placement knows it to the byte, but needs a backend and every kernel's scratch. Passes only compare two orders of the
same instructions, and for that lifetimes are enough: what is written in a state's memory, or over an input that dies,
takes nothing; scratch and rounding are left out unless a pass asks for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from brim.program.ir import FUSED, FUSED_MANY, STORE, Instruction, Program, Ref, Value, parts_of
from brim.program.norm_groups import is_fused_norm, overwritable_by_norm

__all__ = ["live_bytes", "stored_values", "works_in_place"]

_IN_PLACE = (
    "dropout",
    "cross_entropy_grad",
    "cross_entropy_powers",
    "cross_entropy_powers_grad",
    "cross_entropy_with_grad",
)


def works_in_place(instruction: Instruction) -> bool:
    """True when a kernel may, as a rule, write its output over an input of the same size."""
    op = instruction.op
    return op is FUSED or op is FUSED_MANY or op.kind == "elementwise" or op.name in _IN_PLACE


def live_bytes(
    program: Program, alignment_bytes: int = 1, scratch_bytes: Callable[[Instruction], int] | None = None
) -> list[int]:
    """Bytes in the arena while each instruction runs, as far as lifetimes tell; never empty.

    Arguments:
        program: in the order in which it would run.
        alignment_bytes: every value counts as the next multiple of it.
        scratch_bytes: working memory of an instruction, which counts where it is given.
    """

    def size_bytes(value: Value) -> int:
        return -(-value.nbytes // alignment_bytes) * alignment_bytes

    instructions = program.instructions
    last = _last_reads(program)
    at_home = {value for value, _ in stored_values(program)}
    change = [0] * (len(instructions) + 2)
    for value in program.inputs:
        _count(change, size_bytes(value), 0, last.get(value, 0))
    end: dict[Value, int] = {}
    taken: set[Value] = set()  # values whose memory another one took over
    for n, instruction in enumerate(instructions):
        for ins, outs in parts_of(instruction):
            dying: list[Value] = []
            if works_in_place(instruction):
                dying = [
                    ref.value
                    for ref in ins
                    if isinstance(ref, Ref) and ref.whole and end.get(ref.value) == n and ref.value not in taken
                ]
            for out in outs:
                if out.home is not None or out in at_home:
                    continue
                end[out] = last.get(out, n)
                if is_fused_norm(instruction):
                    over = overwritable_by_norm(instruction, out)
                    dying = [value for value in over if end.get(value) == n and value not in taken]
                old = next((v for v in dying if v.nbytes == out.nbytes and v not in taken), None)
                start = n
                if old is not None:
                    taken.add(old)
                    start = n + 1  # until then it is counted as the old one
                _count(change, size_bytes(out), start, end[out])
    levels, level = [], 0
    for delta in change[: len(instructions) + 1]:
        level += delta
        levels.append(level)
    if scratch_bytes is not None:
        for n, instruction in enumerate(instructions):
            levels[n] += scratch_bytes(instruction)
    return levels


def _count(change: list[int], nbytes: int, first: int, last: int) -> None:
    if last >= first:
        change[first] += nbytes
        change[last + 1] -= nbytes


def _last_reads(program: Program) -> dict[Value, int]:
    last: dict[Value, int] = {}
    for n, instruction in enumerate(program.instructions):
        for operand in instruction.ins:
            if type(operand) is Ref:
                last[operand.value] = n
    for ref in program.results:
        last[ref.value] = len(program.instructions)
    return last


def stored_values(program: Program) -> Iterable[tuple[Value, int]]:
    """(value, number of the instruction that makes it) of new values that may be written straight into their state.

    That is so when every read of the old value comes before the new one is made (or is made by the same instruction).
    """
    made: dict[Value, int] = {}
    read: dict[Value, int] = {}
    stores: dict[Value, tuple[Value, bool]] = {}
    for n, instruction in enumerate(program.instructions):
        ins = instruction.ins
        if instruction.op is STORE:
            stores[ins[0].value] = (ins[1].value, ins[1].whole)
            ins = ins[1:]
        for operand in ins:
            if type(operand) is Ref and operand.value.origin == "state":
                read[operand.value] = n
        for out in instruction.outs:
            made[out] = n
    for ref in program.results:
        read[ref.value] = len(program.instructions)
    found: dict[Value, int] = {}
    for state, (value, whole) in stores.items():
        at = made.get(value)
        if whole and at is not None and read.get(state, -1) <= at and value not in found:
            found[value] = at
    return found.items()
