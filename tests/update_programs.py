"""Small programs whose instructions may be joined, and what was joined in one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from brim.expr import FormulaBuilder, FusedFormula
from brim.op import REGISTRY
from brim.program.ir import FUSED, FUSED_MANY, STORE, HostScalar, Instruction, Program, Ref, Value
from brim.program.passes.side_by_side import side_by_side
from brim.spec import DTYPES, Spec
from brim_cpu import backend
from program_oracle import changed_by

CPU = backend()
F32 = DTYPES["float32"]
MANY = 2**40


def momentum_formula() -> FusedFormula:
    """v = momentum v + g; p = p - lr v, of inputs p, v, g, lr, momentum."""
    builder = FormulaBuilder([F32, F32, F32, None, None])
    velocity = builder.call("add", [builder.call("mul", [("in", 4), ("in", 1)], F32), ("in", 2)], F32)
    param = builder.call("sub", [("in", 0), builder.call("mul", [("in", 3), velocity], F32)], F32)
    return builder.formula([param[1], velocity[1]])


def step(name: str, *ins: Any, out: Value, **params: Any) -> Instruction:
    return Instruction(REGISTRY[name], tuple(Ref.of(i) if isinstance(i, Value) else i for i in ins), (out,), params)


def store(state: Value, new: Value) -> Instruction:
    return Instruction(STORE, (Ref.of(state), Ref(new, state.spec)), (), phase="update")


class Updates:
    """A step that makes one gradient after another and updates a parameter with each at once.

    Arguments:
        shapes: of the parameters.
        rates: the learning rate of each.
        from_states: gradients are made of the parameters, not of inputs, which would live from the start.
    """

    def __init__(
        self, shapes: list[tuple[int, ...]], rates: list[Any] | None = None, from_states: bool = False
    ) -> None:
        self.rate, self.momentum = HostScalar(lambda: 0.25), HostScalar(lambda: 0.5)
        self.params = [Value(Spec(shape), "state") for shape in shapes]
        self.velocities = [Value(Spec(shape), "state") for shape in shapes]
        self.inputs = [] if from_states else [Value(Spec(shape), "input") for shape in shapes]
        self.instructions: list[Instruction] = []
        for n, (p, v, x) in enumerate(zip(self.params, self.velocities, self.inputs or self.params)):
            grad, new_p, new_v = Value(p.spec), Value(p.spec), Value(p.spec)
            self.instructions.append(step("square", x, out=grad))
            refs = tuple(map(Ref.of, (p, v, grad)))
            rate = rates[n] if rates else self.rate
            operands = (*refs, rate, self.momentum)
            update = Instruction(FUSED, operands, (new_p, new_v), {"formula": momentum_formula()}, f"layer{n}")
            self.instructions += [replace(update, phase="update"), store(v, new_v), store(p, new_p)]

    def program(self, *results: Value) -> Program:
        states = [*self.params, *self.velocities]
        return Program(self.inputs, states, {}, self.instructions, [Ref.of(v) for v in results])


def joined(program: Program, keeps_bytes: int = MANY, **options: Any) -> Program:
    return changed_by(lambda one: side_by_side(one, keeps_bytes, **options), program)


def names(program: Program) -> list[str]:
    return [i.op.name for i in program.instructions]


def many_of(program: Program) -> list[Instruction]:
    return [i for i in program.instructions if i.op is FUSED_MANY]


def room(program: Program, nbytes: int = 4096) -> Program:
    """The program after two values of this size, which raise its peak to the size of both."""
    x, made, total = Value(Spec((nbytes // 4,)), "input"), Value(Spec((nbytes // 4,))), Value(Spec(()))
    first = [step("square", x, out=made), step("sum", made, out=total, axes=(0,), keepdims=False)]
    return replace(program, inputs=[*program.inputs, x], instructions=[*first, *program.instructions])


def constant_formula(number: Any) -> FusedFormula:
    builder = FormulaBuilder([F32])
    return builder.formula([builder.call("add", [("in", 0), ("const", number)], F32)[1]])
