"""Half activations: what is kept from the forward pass for the backward pass is kept as bfloat16.

**This changes gradients**: they are computed from values rounded to 8 bits of precision. The forward pass, the loss,
the parameters and the optimizer's state stay in float32, and so does every gradient itself.
"""

from __future__ import annotations

from dataclasses import replace

from brim.op import REGISTRY
from brim.program.ir import STORE, Instruction, Program, Ref, Value
from brim.program.passes.liveness import works_in_place
from brim.spec import DTYPES, Spec

__all__ = ["half_activations"]

SMALL_BYTES = 4096
"""Values under this many bytes stay as they are: statistics and scales, where rounding would gain nothing."""

_NEAR = 8  # readings that are this many instructions apart share one value cast back

_F32, _BF16 = DTYPES["float32"], DTYPES["bfloat16"]


def half_activations(program: Program) -> Program:
    """The program in which float32 values that only the backward pass still reads are kept as bfloat16.

    Each is cast when the forward pass is done with it, and cast back just before the backward instructions that read
    it. Inputs, states, constants, results, other dtypes and values under 4 KiB are left alone. Running it again changes
    nothing.
    """
    before: dict[int, list[Instruction]] = {}
    mapping: dict[int, dict[Value, Value]] = {}
    readers = program.readers()
    instructions = program.instructions
    cast = REGISTRY["astype"]
    for n, maker in enumerate(instructions):
        if maker.phase != "forward":
            continue
        for value in maker.outs:
            numbers = readers.get(value, [])
            backward = [r for r in numbers if r < len(instructions) and instructions[r].phase == "backward"]
            others = [r for r in numbers if r not in backward]
            if not backward or not _worth_it(value, others, backward[0], instructions):
                continue
            half = Value(Spec(value.spec.shape, _BF16, value.spec.layout), op="astype", layer=value.layer)
            half.site = value.site
            last = max(others, default=n)
            # A reader that can write over the value should find it free.
            at = last if last > n and works_in_place(instructions[last]) else last + 1
            like = replace(maker, op=cast, params={"dtype": _BF16}, ins=(Ref.of(value),), outs=(half,))
            before.setdefault(at, []).append(like)
            back: Value | None = None
            nearest = -_NEAR
            for r in backward:
                if back is None or r - nearest > _NEAR:
                    back = replace(value, op="astype", category="temps")
                    wide = replace(
                        like, params={"dtype": _F32}, ins=(Ref.of(half),), outs=(back,),
                        phase="backward", layer=instructions[r].layer, site=instructions[r].site,
                    )  # fmt: skip
                    before.setdefault(r, []).append(wide)
                mapping.setdefault(r, {})[value] = back
                nearest = r
    if not before:
        return program
    made: list[Instruction] = []
    for n, instruction in enumerate(instructions):
        made += before.get(n, ())
        if n in mapping:
            new = mapping[n]
            ins = tuple(
                replace(i, value=new[i.value]) if isinstance(i, Ref) and i.value in new else i for i in instruction.ins
            )
            instruction = replace(instruction, ins=ins)
        made.append(instruction)
    return program.with_instructions(made)


def _worth_it(value: Value, others: list[int], first_backward: int, instructions: list[Instruction]) -> bool:
    """Whether a value can be given up after the forward pass, and is worth rounding."""
    if value.spec.dtype != _F32 or value.nbytes < SMALL_BYTES or value.home is not None:
        return False
    if any(r >= first_backward for r in others):  # results (one past the last), stores, a second forward pass
        return False
    return not any(instructions[r].op is STORE or _casts(instructions[r]) for r in others)


def _casts(instruction: Instruction) -> bool:
    return instruction.op.name == "astype" and instruction.params.get("dtype") == _BF16
