"""Simplification: arrays that hold one number everywhere are read as that number; multiplications by one go.

Only what is equal to the last bit: ``x * 1`` is ``x``, ``x + 0`` is not (it makes 0.0 of -0.0).
"""

from __future__ import annotations

from brim.program.ir import Instruction, Program, Value
from brim.program.passes.groups import group_of, is_fusible, number_of
from brim.spec import Scalar

__all__ = ["simplify"]


def simplify(program: Program) -> Program:
    """The program whose elementwise instructions read numbers in place of values that ``fill`` made.

    The seed of a gradient and the zeros of a first momentum are such values; with their last reader they go, too.
    """
    constants: dict[Value, Scalar] = {}
    made: list[Instruction] = []
    for instruction in program.instructions:
        number = number_of(instruction)
        if number is not None and instruction.outs[0].home is None:
            constants[instruction.outs[0]] = number
        if is_fusible(instruction) and any(ref.value in constants for ref in instruction.refs):
            group = group_of(instruction).with_constants(constants)
            instruction = group.instruction(instruction)
        made.append(instruction)
    changed = program.with_instructions(made)
    readers = changed.readers()
    kept = [i for i in made if not (len(i.outs) == 1 and i.outs[0] in constants and i.outs[0] not in readers)]
    return program.with_instructions(kept)
