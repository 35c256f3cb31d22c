"""Elementwise instructions as groups: typed steps on operands, which can be joined, copied into each other, simplified.

Nothing here knows about order or memory: that is ``fuse``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from brim.expr import FormulaBuilder, FusedFormula, Operand, ScalarStep
from brim.program.ir import FUSED, HostScalar, Instruction, Ref, Value
from brim.spec import Scalar, is_float

__all__ = ["Group", "group_of", "is_cheap", "is_fusible", "joined", "number_of"]

_FLOAT32 = np.dtype("float32")
_COSTLY = frozenset(("uniform", "erf", "pow", "div", "floordiv", "mod", "hypot", "atan2", "sqrt", "rsqrt", "logaddexp"))
_COSTLY |= {"exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "sin", "cos", "tan", "asin", "acos", "atan"}
_COSTLY |= {"sinh", "cosh", "tanh", "asinh", "acosh", "atanh"}


@dataclass(eq=False, slots=True)
class Group:
    """What a fused instruction computes.

    Attributes:
        formula: its steps.
        ins: Refs and host scalars; Python numbers are constants of the formula.
        outs: the values it writes; ``formula.outputs`` says which step gives each.
    """

    formula: FusedFormula
    ins: list[Ref | HostScalar]
    outs: list[Value]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.outs[0].spec.shape

    def live_steps(self) -> int:
        """The most values of steps that are needed at one time."""
        steps = self.formula.steps
        last = {which: n for n, step in enumerate(steps) for kind, which in step.args if kind == "step"}
        ends = [0] * (len(steps) + 1)
        live = most = 0
        for n in range(len(steps)):
            live += 1
            most = max(most, live)
            ends[last.get(n, n)] += 1
            live -= ends[n]
        return most

    def instruction(self, like: Instruction) -> Instruction:
        """The instruction, which is said to come from where ``like`` comes from."""
        params = {"formula": self.formula}
        return Instruction(FUSED, tuple(self.ins), tuple(self.outs), params, like.layer, like.site, like.phase)

    def without(self, gone: set[Value]) -> Group:
        """The group without some outputs, and without the steps and inputs that only they needed."""
        kept = [n for n, out in enumerate(self.outs) if out not in gone]
        made = _Joiner({})
        numbers = made.add(self)
        return made.group([(self.outs[n], numbers[n]) for n in kept])

    def with_constants(self, constants: Mapping[Value, Scalar]) -> Group:
        """The group with numbers in place of inputs that are one number everywhere; the same object if it has none."""
        if not any(isinstance(x, Ref) and x.value in constants for x in self.ins):
            return self
        made = _Joiner(constants)
        return made.group(list(zip(self.outs, made.add(self), strict=True)))


def is_fusible(instruction: Instruction) -> bool:
    """True for an elementwise instruction: a scalar formula, dropout, or a group."""
    op = instruction.op
    if any(out.home is not None for out in instruction.outs):
        return False  # it writes a state, at a certain place in the order
    return op is FUSED or op.name == "dropout" or (op.kind == "elementwise" and op.formula is not None)


def is_cheap(group: Group) -> bool:
    """True when computing it twice costs less than reading its result from memory."""
    return len(group.formula.steps) <= 4 and all(step.fn not in _COSTLY for step in group.formula.steps)


def group_of(instruction: Instruction) -> Group:
    """A fusible instruction as a group, with every conversion that its kernel does spelled out."""
    made = _Joiner({})
    if instruction.op is FUSED:
        whole = Group(instruction.params["formula"], list(instruction.ins), list(instruction.outs))
        return made.group(list(zip(whole.outs, made.add(whole), strict=True)))
    operands = [made.operand(x) for x in instruction.ins]
    out = instruction.outs[0]
    if instruction.op.name == "dropout":
        result = _dropout(made.builder, operands, out.spec.dtype, instruction.params["p"])
    else:
        ins = instruction.ins
        specs = [x.spec if isinstance(x, Ref) else x.kind(1) if isinstance(x, HostScalar) else x for x in ins]
        result = instruction.op.splice(made.builder, operands, specs, instruction.params, out.spec.dtype)
    return made.group([(out, result)])


def joined(first: Group, second: Group, gone: set[Value]) -> Group:
    """Both groups in one; ``second`` reads the outputs of ``first`` as steps. What is in ``gone`` is not stored."""
    made = _Joiner({})
    for out, operand in zip(first.outs, made.add(first), strict=True):
        made.known[out] = operand
    operands = [*made.known.values(), *made.add(second)]
    outs = zip([*first.outs, *second.outs], operands, strict=True)
    return made.group([(out, operand) for out, operand in outs if out not in gone])


def _dropout(builder: FormulaBuilder, operands: list[Operand], dtype: np.dtype[Any], p: float) -> Operand:
    """The steps of ``dropout``: the kernel's arithmetic, whose scale is rounded to the dtype of ``x`` first."""
    x, seed, counter = operands
    half = is_float(dtype) and dtype.itemsize == 2
    compute = _FLOAT32 if half else dtype
    uniform = builder.step("uniform", (seed, counter), np.dtype("uint64"), _FLOAT32)
    dropped = builder.call("lt", [uniform, ("const", p)], _FLOAT32)
    scale = float(dtype.type(1.0 / (1.0 - p) if p < 1.0 else 0.0))
    scaled = builder.call("mul", [x, ("const", scale)], compute)
    return builder.cast(builder.call("where", [dropped, ("const", 0.0), scaled], compute), dtype)


class _Joiner:
    """Builds one group from operands and the steps of others."""

    def __init__(self, constants: Mapping[Value, Scalar]) -> None:
        self.constants = constants
        self.known: dict[Value, Operand] = {}  # outputs of steps that are here already
        self.ins: list[Ref | HostScalar] = []
        self._numbers: dict[Ref | HostScalar, int] = {}
        self._dtypes: list[np.dtype[Any] | None] = []
        self.builder = FormulaBuilder(self._dtypes)

    def operand(self, x: Any) -> Operand:
        """A Ref, host scalar or number as an operand of the new group."""
        if not isinstance(x, Ref | HostScalar):
            return ("const", x)
        if isinstance(x, Ref):
            if x.value in self.known and x.whole:
                return self.known[x.value]
            if x.value in self.constants:
                return ("const", self.constants[x.value])
        if x not in self._numbers:
            self._numbers[x] = len(self.ins)
            self.ins.append(x)
            self._dtypes.append(x.spec.dtype if isinstance(x, Ref) else None)
        return ("in", self._numbers[x])

    def add(self, group: Group) -> list[Operand]:
        """Add the steps of a group; returns its outputs."""
        values: list[Operand] = []
        for step in group.formula.steps:
            args = [
                values[which] if kind == "step" else self.operand(group.ins[which]) if kind == "in" else (kind, which)
                for kind, which in step.args
            ]
            values.append(self._step(step, args))
        return [values[n] for n in group.formula.outputs]

    def _step(self, step: ScalarStep, args: list[Operand]) -> Operand:
        """A step, or what it is always equal to, to the last bit."""
        builder = self.builder
        if step.fn == "cast":
            source = builder.dtype(args[0])
            if source is not None:
                return builder.cast(args[0], step.dtype)
            if args[0][0] == "const" and is_float(step.compute) and is_float(step.dtype):
                return ("const", float(np.asarray(step.compute.type(args[0][1])).astype(step.dtype)))
        if step.fn in ("mul", "div") and is_float(step.dtype):
            # x * 1 and x / 1 are x; x + 0 is not, for it makes 0.0 of -0.0.
            for one, other in ((args[1], args[0]), (args[0], args[1]))[: 2 if step.fn == "mul" else 1]:
                if one[0] == "const" and one[1] == 1 and builder.dtype(other) is not None:
                    return other
        return builder.step(step.fn, args, step.compute, step.dtype)

    def group(self, outs: list[tuple[Value, Operand]]) -> Group:
        """The group that gives these outputs, with the inputs that they need."""
        builder = self.builder
        steps = [builder.result(operand, value.spec.dtype, value.spec.dtype) for value, operand in outs]
        formula = builder.formula(steps)
        used = sorted({which for step in formula.steps for kind, which in step.args if kind == "in"})
        numbers = {old: new for new, old in enumerate(used)}
        renamed = tuple(
            ScalarStep(s.fn, s.dtype, tuple((k, numbers[w]) if k == "in" else (k, w) for k, w in s.args), s.compute)
            for s in formula.steps
        )
        return Group(FusedFormula(renamed, formula.outputs), [self.ins[n] for n in used], [value for value, _ in outs])


def number_of(instruction: Instruction) -> Scalar | None:
    """The number that a ``fill`` instruction writes everywhere, as its dtype holds it; None for anything else."""
    if instruction.op.name != "fill" or not isinstance(instruction.ins[0], bool | int | float):
        return None
    dtype = instruction.outs[0].spec.dtype
    if not is_float(dtype) and dtype.kind not in "biu":
        return None
    value: bool | int | float = dtype.type(instruction.ins[0]).item()
    return value if math.isfinite(value) else None
