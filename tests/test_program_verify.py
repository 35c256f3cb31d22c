"""The verifier accepts every well-formed program and finds every planted error, with instruction, op and value."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from brim.expr import FusedFormula, ScalarStep
from brim.op import REGISTRY
from brim.program.ir import FUSED, STORE, HostScalar, Instruction, Program, Ref, Value
from brim.program.verify import ProgramError, verify
from brim.spec import DTYPES, Spec
from random_programs import random_program

F32, BOOL = DTYPES["float32"], DTYPES["bool"]
SQUARE = Spec((4, 4))
TURNED = Spec((4, 4), F32, (1, 4))


def step(op: str, *ins: Any, out: Value, **params: Any) -> Instruction:
    return Instruction(REGISTRY[op], tuple(Ref.of(i) if isinstance(i, Value) else i for i in ins), (out,), params)


def store(state: Value, new: Value | Ref) -> Instruction:
    return Instruction(STORE, (Ref.of(state), new if isinstance(new, Ref) else Ref.of(new)), ())


class Small:
    """x, state -> a = x @ state; b = exp(a); store(state, b); returns a."""

    def __init__(self) -> None:
        self.x, self.state = Value(SQUARE, "input"), Value(SQUARE, "state", layer="net.0")
        self.table = Value(SQUARE, "constant")
        self.a, self.b, self.c = Value(SQUARE), Value(SQUARE), Value(SQUARE)
        self.program = Program(
            [self.x],
            [self.state],
            {self.table: np.zeros((4, 4), "f4")},
            [
                step("matmul", self.x, self.state, out=self.a),
                step("exp", self.a, out=self.b),
                store(self.state, self.b),
            ],
            [Ref.of(self.a)],
        )

    def with_third(self, instruction: Instruction) -> Program:
        return self.program.with_instructions([*self.program.instructions[:2], instruction])

    def then(self, *more: Instruction) -> Program:
        return self.program.with_instructions([*self.program.instructions, *more])


@settings(max_examples=60)
@given(st.randoms(use_true_random=False))
def test_random_programs_are_well_formed(source: random.Random) -> None:
    verify(random_program(source, 15))


def test_a_good_program_passes() -> None:
    s = Small()
    verify(s.program)
    verify(s.then(store(s.state, s.a)))  # the last store wins
    at_home = Value(SQUARE, home=s.state)
    verify(s.with_third(step("add", s.state, s.b, out=at_home)))
    again = Value(SQUARE, home=s.state)
    in_turn = [step("add", s.state, s.x, out=at_home), step("add", at_home, at_home, out=again)]
    verify(Program([s.x], [s.state], {}, in_turn, [Ref.of(again)]))
    verify(s.with_third(step("multiply", s.b, HostScalar(lambda: 2.0), out=s.c)))
    verify(s.with_third(step("exp", Ref(s.b, Spec((16,))), out=Value(Spec((16,)), home=s.state))))
    reversed_rows = Ref(s.b, Spec((4, 4), F32, (-4, 1)), 12)
    verify(s.with_third(step("exp", reversed_rows, out=s.c)))


Planted = Callable[[Small], Program]

ERRORS: dict[str, tuple[Planted, int, str]] = {
    "written twice": (lambda s: s.then(step("exp", s.a, out=s.b)), 3, "written twice"),
    "input written": (lambda s: s.then(step("exp", s.a, out=s.x)), 3, "there from the start"),
    "read too early": (
        lambda s: s.program.with_instructions(s.program.instructions[::-1]),
        0,
        "before it is written",
    ),
    "never written": (lambda s: s.with_third(step("exp", s.c, out=Value(SQUARE))), 2, "that nothing writes"),
    "result unknown": (lambda s: replace(s.program, results=[Ref.of(s.c)]), 3, "a result reads a value that nothing"),
    "past the end": (
        lambda s: s.with_third(step("exp", Ref(s.b, Spec((4, 4)), 1), out=s.c)),
        2,
        "elements 1 to 16 of 16",
    ),
    "before the start": (
        lambda s: s.with_third(step("exp", Ref(s.b, Spec((4, 4), F32, (-4, 1)), 8), out=s.c)),
        2,
        "elements -4 to 11 of 16",
    ),
    "result past the end": (
        lambda s: replace(s.program, results=[Ref(s.a, Spec((5, 4)))]),
        3,
        "elements 0 to 19 of 16",
    ),
    "read as another dtype": (
        lambda s: s.with_third(step("exp", Ref(s.b, Spec((4, 4), DTYPES["int32"])), out=s.c)),
        2,
        "as int32",
    ),
    "wrong shape": (lambda s: s.with_third(step("exp", s.b, out=Value(Spec((4, 5))))), 2, "its op gives"),
    "wrong dtype": (
        lambda s: s.with_third(step("less", s.b, s.a, out=Value(SQUARE))),
        2,
        "its op gives bool[4x4], its outputs are float32[4x4]",
    ),
    "wrong dtype by a host scalar": (
        lambda s: s.with_third(
            step("add", Ref(s.table, SQUARE), HostScalar(lambda: 1, int), out=Value(Spec((4, 4), DTYPES["int64"])))
        ),
        2,
        "its op gives float32[4x4]",
    ),
    "refused inputs": (
        lambda s: s.with_third(step("matmul", s.b, Ref(s.a, Spec((2, 8))), out=s.c)),
        2,
        "its op refuses the inputs",
    ),
    "too many outputs": (
        lambda s: s.with_third(Instruction(REGISTRY["exp"], (Ref.of(s.b),), (s.c, Value(SQUARE)))),
        2,
        "its op gives",
    ),
    "no output": (lambda s: s.with_third(Instruction(REGISTRY["exp"], (Ref.of(s.b),), ())), 2, "writes nothing"),
    "wrong arity": (lambda s: s.with_third(step("exp", s.b, s.a, out=s.c)), 2, "takes 1 inputs, got 2"),
    "no operand": (lambda s: s.with_third(step("add", s.b, "one", out=s.c)), 2, "not str"),
    "a view": (
        lambda s: s.with_third(step("permute_dims", s.b, out=s.c, axes=(1, 0))),
        2,
        "a view is a Ref",
    ),
    "layout with gaps": (
        lambda s: s.with_third(step("exp", s.b, out=Value(Spec((4, 4), F32, (8, 1))))),
        2,
        "gaps or overlaps",
    ),
    "old state": (lambda s: s.then(step("exp", s.state, out=s.c)), 3, "a state's old value"),
    "old state as a result": (lambda s: replace(s.program, results=[Ref.of(s.state)]), 3, "a state's old value"),
    "old state stored": (
        lambda s: Program(
            [s.x],
            [s.state, other := Value(SQUARE, "state")],
            {},
            [store(s.state, other), store(other, s.state)],
            [],
        ),
        1,
        "a state's old value",
    ),
    "old value at a home": (
        lambda s: Program(
            [s.x],
            [s.state],
            {},
            [
                step("add", s.x, s.x, out=(old := Value(SQUARE, home=s.state))),
                step("exp", s.x, out=Value(SQUARE, home=s.state)),
                step("exp", old, out=s.c),
            ],
            [],
        ),
        2,
        "a state's old value",
    ),
    "written over while read crooked": (
        lambda s: s.with_third(step("add", Ref(s.state, TURNED), s.b, out=Value(SQUARE, home=s.state))),
        2,
        "otherwise than element for element",
    ),
    "written over by a product that reads it": (
        lambda s: s.with_third(step("matmul", s.b, s.state, out=Value(SQUARE, home=s.state))),
        2,
        "otherwise than element for element",
    ),
    "written over in another shape": (
        lambda s: s.with_third(step("exp", s.state, out=Value(Spec((16,)), home=s.state))),
        2,
        "otherwise than element for element",
    ),
    "stored turned over itself": (
        lambda s: s.with_third(store(s.state, Ref(s.state, TURNED))),
        2,
        "otherwise than element for element",
    ),
    "store of another shape": (
        lambda s: s.with_third(store(s.state, Ref(s.b, Spec((2, 8))))),
        2,
        "it stores float32[2x8]",
    ),
    "store of another dtype": (
        lambda s: s.program.with_instructions(
            [step("less", s.x, s.x, out=(truth := Value(Spec((4, 4), BOOL)))), store(s.state, truth)]
        ),
        1,
        "it stores bool[4x4]",
    ),
    "store into no state": (lambda s: s.with_third(store(s.x, s.b)), 2, "no state of the program"),
    "store into a part": (
        lambda s: s.with_third(Instruction(STORE, (Ref(s.state, Spec((1, 4))), Ref(s.b, Spec((1, 4)))), ())),
        2,
        "a part of a state",
    ),
    "store of a number": (
        lambda s: s.with_third(Instruction(STORE, (Ref.of(s.state), 1.0), ())),
        2,
        "two Refs",
    ),
    "home unknown": (
        lambda s: s.with_third(step("exp", s.b, out=Value(SQUARE, home=Value(SQUARE, "state")))),
        2,
        "no state of the program",
    ),
    "home of another shape": (
        lambda s: s.with_third(step("sum", s.b, out=Value(Spec((4,)), home=s.state), axes=(0,), keepdims=False)),
        2,
        "another size, dtype or layout",
    ),
    "input at a home": (
        lambda s: replace(s.program, inputs=[replace(s.x, home=s.state)]),
        -1,
        "may have a home",
    ),
    "two at one home": (
        lambda s: s.with_third(fused(s, s.b, outs=(Value(SQUARE, home=s.state), Value(SQUARE, home=s.state)))),
        2,
        "two values at one home",
    ),
    "constant of another dtype": (
        lambda s: replace(s.program, constants={s.table: np.zeros((4, 4))}),
        -1,
        "its data is float64[4x4]",
    ),
    "origin wrong": (lambda s: replace(s.program, inputs=[s.x, s.a]), -1, "its origin is temp"),
}


def formula(*steps: ScalarStep, outputs: tuple[int, ...] = (0, 1)) -> FusedFormula:
    good = (
        ScalarStep("exp", F32, (("in", 0),), F32),
        ScalarStep("mul", F32, (("step", 0), ("const", 2.0)), F32),
    )
    return FusedFormula(steps or good, outputs)


def fused(s: Small, *ins: Any, outs: tuple[Value, ...] = (), f: Any = None) -> Instruction:
    refs = tuple(Ref.of(i) if isinstance(i, Value) else i for i in ins)
    return Instruction(FUSED, refs, outs or (s.c, Value(SQUARE)), {"formula": formula() if f is None else f})


def bad(fn: str, *args: tuple[str, Any], dtype: Any = F32) -> FusedFormula:
    return formula(ScalarStep("exp", F32, (("in", 0),), F32), ScalarStep(fn, dtype, args, F32))


ERRORS |= {
    "fused without a formula": (lambda s: s.with_third(fused(s, s.b, f="exp")), 2, "no param formula"),
    "fused reads a later step": (
        lambda s: s.with_third(fused(s, s.b, f=bad("neg", ("step", 1)))),
        2,
        "reads step 1 of 1",
    ),
    "fused reads no input": (lambda s: s.with_third(fused(s, s.b, f=bad("neg", ("in", 1)))), 2, "reads in 1 of 1"),
    "fused of unknown source": (
        lambda s: s.with_third(fused(s, s.b, f=bad("neg", ("out", 0)))),
        2,
        "unknown kind 'out'",
    ),
    "fused of no function": (lambda s: s.with_third(fused(s, s.b, f=bad("negate", ("in", 0)))), 2, "'negate'"),
    "fused of wrong arity": (lambda s: s.with_third(fused(s, s.b, f=bad("neg"))), 2, "has 0 arguments instead of 1"),
    "fused comparison of numbers": (
        lambda s: s.with_third(fused(s, s.b, f=bad("lt", ("in", 0), ("in", 0)))),
        2,
        "instead of bool",
    ),
    "fused gives no step": (lambda s: s.with_third(fused(s, s.b, f=formula(outputs=(0, 2)))), 2, "gives step 2 of 2"),
    "fused of too few outputs": (lambda s: s.with_third(fused(s, s.b, outs=(s.c,))), 2, "has 2 outputs, it writes 1"),
    "fused of wrong dtype": (
        lambda s: s.with_third(fused(s, s.b, outs=(s.c, Value(Spec((4, 4), BOOL))))),
        2,
        "gives float32 for an output",
    ),
    "fused of wrong shape": (
        lambda s: s.with_third(fused(s, s.b, outs=(s.c, Value(Spec((1, 4)))))),
        2,
        "larger than an output",
    ),
    "fused of shapes apart": (
        lambda s: s.with_third(fused(s, s.b, outs=(s.c, Value(Spec((4, 3)))))),
        2,
        "do not broadcast",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_a_planted_error_is_found(name: str) -> None:
    make, instruction, message = ERRORS[name]
    verify(Small().program)
    program = make(Small())
    with pytest.raises(ProgramError, match=f"^instruction {instruction}, ") as caught:
        verify(program)
    assert message in str(caught.value)
    assert caught.value.instruction == instruction
    inside = 0 <= instruction < len(program.instructions)
    assert caught.value.op == (program.instructions[instruction].op.name if inside else caught.value.op)


def test_fused_groups_that_are_well_formed() -> None:
    s = Small()
    verify(s.with_third(fused(s, s.b)))
    casts = formula(
        ScalarStep("cast", DTYPES["float16"], (("in", 0),), F32),
        ScalarStep("uniform", F32, (("in", 1), ("in", 2)), F32),
        outputs=(0, 1),
    )
    outs = (Value(Spec((4, 4), DTYPES["float16"])), Value(SQUARE))
    draws = [HostScalar(lambda: 1, int), HostScalar(lambda: 2, int)]
    verify(s.with_third(fused(s, s.b, *draws, outs=outs, f=casts)))


def test_the_error_names_the_value_and_the_line() -> None:
    s = Small()
    late = replace(step("exp", s.state, out=s.c), site=("train.py", 12))
    with pytest.raises(ProgramError) as caught:
        verify(s.then(late))
    assert caught.value.value is s.state
    assert caught.value.op == "exp"
    for part in ("exp (train.py:12)", "state of float32[4x4]", "net.0"):
        assert part in str(caught.value)
    assert isinstance(caught.value, AssertionError)
