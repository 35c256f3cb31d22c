"""Gradients of slices that make up a whole array are joined, instead of each being padded with zeros and all added.

The gradient of ``q, k, v = split(x, 3)`` is traced as three arrays of the size of x, zeros but for one slice, and two
sums: twelve times the bytes of x, where joining the three slices takes four.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from brim.op import REGISTRY
from brim.program.ir import Instruction, Program, Ref, Value
from brim.spec import Shape, Spec, is_float

__all__ = ["join_slices"]

_ADD, _CONCAT = REGISTRY["add"], REGISTRY["concat"]


def join_slices(program: Program) -> Program:
    """The program with sums of slices set into zeros, which cover an array along one axis, as ``concat`` of the slices.

    What is joined is ``slice + 0``, as the sum gives it: it makes 0 of -0, so the results are the same to the bit. More
    bytes are alive nowhere: the slices take the place of the padded arrays.
    """
    instructions = program.instructions
    if sum(map(_pads, instructions)) < 2:
        return program
    readers = program.readers()
    made = program.producers()
    terms: dict[Value, list[int]] = {}  # of a sum of padded slices: the instructions that pad
    for n, one in enumerate(instructions):
        if _pads(one):
            terms[one.outs[0]] = [n]
        elif one.op is _ADD and len(one.outs) == 1 and one.outs[0].home is None:
            values = [x.value for x in one.ins if isinstance(x, Ref) and x.whole and readers[x.value] == [n]]
            if len(values) == 2 and values[0] is not values[1] and all(value in terms for value in values):
                phases = {instructions[made[value]].phase for value in values}
                if phases == {one.phase} and all(value.spec == one.outs[0].spec for value in values):
                    terms[one.outs[0]] = terms.pop(values[0]) + terms.pop(values[1])
    renewed: dict[int, Instruction] = {}
    gone: set[int] = set()
    for value, padded in terms.items():
        found = _order(value.spec.shape, [instructions[n] for n in padded]) if len(padded) > 1 else None
        if found is None:
            continue
        axis, order = found
        pieces = []
        for n in padded:
            renewed[n], piece = _plus_zero(instructions[n])
            pieces.append(piece)
        ins = tuple(pieces[number] for number in order)
        gone |= _sums_below(instructions, made, value)
        at = made[value]
        renewed[at] = replace(instructions[at], op=_CONCAT, ins=ins, params={"axis": axis})
        gone.discard(at)
    if not renewed:
        return program
    return program.with_instructions([renewed.get(n, one) for n, one in enumerate(instructions) if n not in gone])


def _pads(instruction: Instruction) -> bool:
    """True for a slice of floats that is set into zeros."""
    if instruction.op.name != "set_slice" or instruction.outs[0].home is not None:
        return False
    zero, values = instruction.ins
    number = isinstance(zero, int | float) and not isinstance(zero, bool) and zero == 0 and str(zero) != "-0.0"
    return number and isinstance(values, Ref) and is_float(instruction.outs[0].spec.dtype)


def _order(shape: Shape, padded: list[Instruction]) -> tuple[int, list[int]] | None:
    """(axis, numbers of the slices along it) where slices are the whole array, each element once; else None."""
    indices: list[Any] = [one.params["index"] for one in padded]
    parted = [d for d, dim in enumerate(shape) if any(index[d] != (0, 1, dim) for index in indices)]
    if len(parted) != 1:
        return None
    (axis,) = parted
    order = sorted(range(len(indices)), key=lambda number: indices[number][axis][0])
    reached = 0
    for number in order:
        start, step, count = indices[number][axis]
        if start != reached or step != 1 or count == 0:
            return None
        reached += count
    return (axis, order) if reached == shape[axis] else None


def _sums_below(instructions: list[Instruction], made: dict[Value, int], value: Value) -> set[int]:
    """Numbers of the sums that make a value, itself included."""
    found: set[int] = set()
    pending = [value]
    while pending:
        n = made[pending.pop()]
        if instructions[n].op is _ADD:
            found.add(n)
            pending += [ref.value for ref in instructions[n].refs]
    return found


def _plus_zero(padded: Instruction) -> tuple[Instruction, Ref]:
    """``slice + 0`` in place of an instruction that pads a slice, and how to read it in the shape of the slice.

    It works on all of the array that the slice is, where that is so: a copy that only was there to have the elements in
    order can then go, for this reads them in any.
    """
    values: Ref = padded.ins[1]
    whole = values.spec.size == values.value.spec.size and values.offset == 0
    in_order = values.spec.contiguous and values.value.spec.contiguous
    source = Ref.of(values.value) if whole and in_order else values
    out = Value(Spec(source.spec.shape, source.spec.dtype), op="add", layer=padded.layer, site=padded.site)
    made = replace(padded, op=_ADD, ins=(source, 0.0), outs=(out,), params={})
    return made, Ref(out, Spec(values.spec.shape[1:], values.spec.dtype))
