"""Casts of weights made together and early, as far as the peak has room."""

from __future__ import annotations

from brim.program.ir import Instruction, Program, Ref, Value
from brim.program.passes.early_casts import early_casts
from brim.program.passes.liveness import live_bytes
from brim.spec import DTYPES, Spec
from brim_cpu import backend
from program_oracle import changed_by
from update_programs import (
    MANY,
    joined,
    many_of,
    names,
    room,
    step,
)

CPU = backend()


def casts(count: int) -> Program:
    """Layer after layer: a weight is cast, and the largest element of the cast is found."""
    weights = [Value(Spec((256 - n,)), "state") for n in range(count)]
    steps: list[Instruction] = []
    for weight in weights:
        half, out = Value(weight.spec.with_dtype(DTYPES["bfloat16"])), Value(Spec((), DTYPES["bfloat16"]))
        steps.append(step("astype", weight, out=half, dtype=DTYPES["bfloat16"]))
        steps.append(step("max", half, out=out, axes=(0,), keepdims=False))
    return Program([], weights, {}, steps, [Ref.of(i.outs[0]) for i in steps[1::2]])


def test_casts_of_weights_are_made_early_where_the_peak_has_room() -> None:
    program = room(casts(6), 2**16)
    assert not many_of(joined(program)), "each is read before the next is made"
    after = changed_by(lambda one: early_casts(one, MANY), program)
    (many,) = many_of(after)
    assert many.params["count"] == 6
    assert after.instructions.index(many) == 2, "where the first one was"
    assert max(live_bytes(after)) == max(live_bytes(program))
    few = changed_by(lambda one: early_casts(one, 1024), program)
    assert [i.params["count"] for i in many_of(few)] == [3, 3]
    assert not many_of(early_casts(casts(6), MANY)), "it would raise the peak"
    assert early_casts(program, 0) is program


def test_early_casts_go_by_the_judge() -> None:
    program = room(casts(8), 2**16)

    def peak(one: Program) -> int:
        return max((i.params["count"] for i in many_of(one)), default=2)

    found = changed_by(lambda one: early_casts(one, MANY, peak=peak), program)
    assert [i.params["count"] for i in many_of(found)] == [2] * 4
    assert early_casts(program, MANY, peak=lambda one: len(many_of(one))) is program


def test_casts_of_what_the_step_makes_stay() -> None:
    program = room(casts(4), 2**16)
    weight, half = next(program.instructions[2].refs).value, program.instructions[2].outs[0]
    made = Value(weight.spec)
    steps = [step("exp", weight, out=made), step("astype", made, out=half, dtype=DTYPES["bfloat16"])]
    program = program.with_instructions([*program.instructions[:2], *steps, *program.instructions[3:]])
    after = changed_by(lambda one: early_casts(one, MANY), program)
    assert [i.params["count"] for i in many_of(after)] == [3]
    assert names(after)[2:5] == ["exp", "astype", "max"]
