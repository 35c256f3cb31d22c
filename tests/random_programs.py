"""Random programs for tests: elementwise ops, products, sums, fused groups, views, host scalars, stores."""

from __future__ import annotations

import random
from typing import Any

import numpy as np

from brim.expr import FormulaBuilder
from brim.op import REGISTRY
from brim.program.ir import FUSED, STORE, HostScalar, Instruction, Program, Ref, Value
from brim.spec import DTYPES, Spec, broadcast_shapes

__all__ = ["random_arrays", "random_program"]

_SHAPES = ((4, 3), (4, 3), (4, 3), (3,), (3, 4), (4, 1), (), (0, 3))
_UNARY, _BINARY = ("negative", "tanh", "square", "abs"), ("add", "subtract", "multiply", "maximum")
_F32 = DTYPES["float32"]


def random_program(source: random.Random, instructions: int = 12) -> Program:
    """A well-formed program; the same for the same state of ``source``."""
    return _Maker(source).make(instructions)


def random_arrays(program: Program, seed: int = 0) -> dict[Value, np.ndarray[Any, Any]]:
    """Small whole numbers for every input and state."""
    generator = np.random.default_rng(seed)
    return {
        value: generator.integers(-3, 4, value.spec.shape).astype(value.spec.dtype)
        for value in (*program.inputs, *program.states)
    }


class _Maker:
    def __init__(self, source: random.Random) -> None:
        self.source = source
        self.instructions: list[Instruction] = []
        self.readable: list[Value] = []

    def make(self, count: int) -> Program:
        inputs = [Value(self.spec(), "input") for _ in range(self.source.randint(1, 3))]
        states = [Value(self.spec(), "state") for _ in range(self.source.randint(0, 3))]
        constants = {Value(Spec((4, 3)), "constant"): np.arange(12, dtype="f4").reshape(4, 3)}
        self.readable = [*inputs, *states, *constants]
        steps = (self.unary, self.binary, self.binary, self.matmul, self.total, self.fused, self.update)
        for _ in range(count):
            self.phase = self.source.choice(("forward", "backward"))
            self.source.choice(steps)()
            if states and self.source.random() < 0.25:
                self.store(self.source.choice(states))
        for state in states:
            if self.source.random() < 0.7:
                self.store(state)
        results = [self.ref() for _ in range(self.source.randint(0, 3))]
        return Program(inputs, states, constants, self.instructions, results)

    def spec(self) -> Spec:
        return Spec(self.source.choice(_SHAPES))

    def ref(self, shape: tuple[int, ...] | None = None) -> Ref:
        """All of a value most of the time, else a view: transposed, sliced, reversed or broadcast."""
        fitting = [v for v in self.readable if shape is None or v.spec.shape == shape]
        # The newest values first, so that chains arise whose members die at once.
        value = fitting[-min(len(fitting), self.source.choice((1, 1, 1, 2, 2, 3, 5, 9)))]
        if shape is not None or value.spec.ndim != 2 or value.spec.size == 0 or self.source.random() < 0.6:
            return Ref.of(value)
        rows, columns = value.spec.shape
        return self.source.choice(
            (
                Ref(value, Spec((columns, rows), _F32, (1, columns))),
                Ref(value, Spec((rows - 1, columns), _F32, (columns, 1)), columns),
                Ref(value, Spec((rows, columns), _F32, (-columns, 1)), (rows - 1) * columns),
                Ref(value, Spec((rows, columns), _F32, (0, 1)), (rows - 1) * columns),
                Ref(value, Spec((rows * columns,), _F32)),
            )
        )

    def write(self, op: Any, ins: tuple[Any, ...], *shapes: tuple[int, ...], **params: Any) -> None:
        outs = tuple(Value(Spec(shape), op=op.name) for shape in shapes)
        self.instructions.append(Instruction(op, ins, outs, params, phase=self.phase))
        self.readable += outs

    def unary(self) -> None:
        x = self.ref()
        self.write(REGISTRY[self.source.choice(_UNARY)], (x,), x.spec.shape)

    def binary(self) -> None:
        x = self.ref()
        for _ in range(10):
            y: Any = self.source.choice((self.ref(), self.ref(), 2, 0.5, HostScalar(lambda: 3.0)))
            try:
                shape = broadcast_shapes(x.spec.shape, y.spec.shape if isinstance(y, Ref) else ())
            except ValueError:
                continue
            self.write(REGISTRY[self.source.choice(_BINARY)], (x, y), shape)
            return

    def matmul(self) -> None:
        pairs = [(x, y) for x, y in ((self.ref(), self.ref()) for _ in range(8)) if x.spec.ndim == y.spec.ndim == 2]
        for x, y in pairs:
            if x.spec.shape[1] == y.spec.shape[0]:
                self.write(REGISTRY["matmul"], (x, y), (x.spec.shape[0], y.spec.shape[1]))
                return

    def total(self) -> None:
        x = self.ref()
        if x.spec.ndim == 2:
            self.write(REGISTRY["sum"], (x,), (x.spec.shape[1],), axes=(0,), keepdims=False)

    def fused(self) -> None:
        """Two outputs, the second made of the first and of an input that the first made use of, too."""
        x = self.ref()
        y = self.ref(x.spec.shape) if any(v.spec.shape == x.spec.shape for v in self.readable) else x
        builder = FormulaBuilder([_F32, _F32])
        first = builder.call("add", [("in", 0), ("in", 1)], _F32)
        second = builder.call("mul", [first, ("in", 0)], _F32)
        formula = builder.formula([first[1], second[1]])
        self.write(FUSED, (x, y), x.spec.shape, x.spec.shape, formula=formula)

    def update(self) -> None:
        """What an optimizer does: something new from a whole value of the same shape."""
        x = self.ref()
        if x.whole:
            y = self.ref(x.spec.shape)
            self.write(REGISTRY["subtract"], (x, y), x.spec.shape)

    def store(self, state: Value) -> None:
        """Of a value of its shape, or of a reshaped one."""
        fitting = [v for v in self.readable if v.spec.size == state.spec.size and v is not state]
        if fitting:
            new = Ref(self.source.choice(fitting), state.spec)
            self.instructions.append(Instruction(STORE, (Ref.of(state), new), (), phase="update"))
            if state in self.readable:
                self.readable.remove(state)
