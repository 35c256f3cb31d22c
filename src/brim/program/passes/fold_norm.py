"""Folding for inference: a scale and shift a channel after a product or convolution become part of weight and bias.

Batch norm with given statistics is ``x * scale + shift``, so after ``x = product(a, w) + b`` it is
``product(a, w * scale) + (b * scale + shift)``: two vectors and one scaled weight instead of arithmetic on every
activation. Results differ from the unfolded ones by the rounding of a few operations, relative to the largest terms.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from brim.op import REGISTRY
from brim.program.ir import Instruction, Program, Ref, Value
from brim.spec import Spec

__all__ = ["fold_norm"]

WEIGHT_PER_RESULT = 1 / 8
"""A weight is scaled in each run, in memory of its own: only where it has at most this many elements for one of the
result. Else the scale stays behind the product, as one multiplication; on larger weights folding gained no time."""

_PRODUCTS = {"matmul": -1, "conv2d": 1}
"""Op -> the axis of its result along which every index has weights of its own."""


@dataclass(slots=True)
class _Affine:
    """``product * scale + shift`` with vectors (or numbers); None where there is none."""

    chain: list[Instruction] = field(default_factory=list)
    scale: Any = None
    shift: Any = None
    made: list[Instruction] = field(default_factory=list)


def fold_norm(program: Program) -> Program:
    """The program of an evaluation with scales and shifts a channel folded; a program with a backward phase as it is.

    A chain of additions and multiplications follows a matmul or conv2d, each with numbers or with vectors along the
    axis of the outputs, which are made of states and constants by elementwise arithmetic. With at least one vector as a
    factor the chain becomes one addition (or two instructions: ``WEIGHT_PER_RESULT``).
    """
    if any(instruction.phase == "backward" for instruction in program.instructions):
        return program
    return _Folder(program).run()


class _Folder:
    def __init__(self, program: Program) -> None:
        self.program = program
        self.readers = program.readers()
        self.made = program.producers()
        self.done: set[int] = set()  # instructions that are in the new program, or that nobody needs any more
        self.out: list[Instruction] = []
        self.early: dict[Value, bool] = {}

    def run(self) -> Program:
        changed = False
        for n, instruction in enumerate(self.program.instructions):
            if n in self.done:
                continue
            affine = self.affine_after(instruction)
            if affine is None:
                self.emit(n)
                continue
            changed = True
            self.done.add(n)
            self.fold(instruction, affine)
        return self.program.with_instructions(self.out) if changed else self.program

    def emit(self, n: int) -> None:
        self.out.append(self.program.instructions[n])
        self.done.add(n)

    # ---- what can be folded ----

    def affine_after(self, product: Instruction) -> _Affine | None:
        """What follows a product, where folding it changes anything for the better."""
        if product.op.name not in _PRODUCTS or not isinstance(product.ins[1], Ref):
            return None
        if product.op.name == "matmul" and product.ins[1].spec.ndim != 2:
            return None
        affine, value = _Affine(), product.outs[0]
        while (found := self.next_step(value)) is not None:
            instruction, other = found
            vector = self.vector(other, product)
            if vector is None or instruction.outs[0].spec.dtype != product.outs[0].spec.dtype:
                break
            self.extend(affine, instruction, vector)
            value = instruction.outs[0]
        if not isinstance(affine.scale, Ref) or (len(affine.chain) < 3 and not self.scales_weight(product)):
            return None
        return affine

    def next_step(self, value: Value) -> tuple[Instruction, Any] | None:
        """The only reader of a value, if it adds or multiplies something; and what."""
        reading = self.readers.get(value, [])
        if len(reading) != 1 or reading[0] >= len(self.program.instructions) or value.home is not None:
            return None
        instruction = self.program.instructions[reading[0]]
        positions = [n for n, x in enumerate(instruction.ins) if isinstance(x, Ref) and x.value is value]
        known = {"add": (0, 1), "multiply": (0, 1), "subtract": (0,)}.get(instruction.op.name, ())
        if len(positions) != 1 or positions[0] not in known or instruction.outs[0].home is not None:
            return None
        here = instruction.ins[positions[0]]
        if not here.whole or instruction.outs[0].spec.shape != value.spec.shape:
            return None
        return instruction, instruction.ins[1 - positions[0]]

    def vector(self, operand: Any, product: Instruction) -> Any:
        """An operand as a number or a Ref of shape (C,) that can be there before the product; None for any other."""
        if isinstance(operand, bool | int | float):
            return float(operand)
        shape = product.outs[0].spec.shape
        axis = _PRODUCTS[product.op.name] % len(shape)
        if not isinstance(operand, Ref) or operand.spec.dtype != product.outs[0].spec.dtype:
            return None
        missing = len(shape) - operand.spec.ndim
        kept = [n for n, dim in enumerate(operand.spec.shape) if dim != 1]
        if any(n + missing != axis for n in kept) or not self.is_early(operand.value, shape[axis]):
            return None
        strides = (operand.spec.strides[kept[0]] if kept else 0,)
        return Ref(operand.value, Spec((shape[axis],), operand.spec.dtype, strides), operand.offset)

    def is_early(self, value: Value, size: int) -> bool:
        """True for a small value that is made of states and constants element by element."""
        if value.origin in ("state", "constant"):
            return True
        n = self.made.get(value)
        if n is None or value.spec.size > size or value.home is not None:
            return False
        if value not in self.early:
            maker = self.program.instructions[n]
            self.early[value] = maker.op.kind == "elementwise" and all(self.is_early(r.value, size) for r in maker.refs)
        return self.early[value]

    def extend(self, affine: _Affine, instruction: Instruction, c: Any) -> None:
        affine.chain.append(instruction)
        name = instruction.op.name
        if name == "multiply":
            affine.scale = c if affine.scale is None else self.combine(affine, instruction, "multiply", affine.scale, c)
            if affine.shift is not None:
                affine.shift = self.combine(affine, instruction, "multiply", affine.shift, c)
        elif affine.shift is None and (name == "add" or isinstance(c, float)):
            affine.shift = c if name == "add" else -c
        elif affine.shift is None:
            affine.shift = self.combine(affine, instruction, "multiply", c, -1.0)
        else:
            affine.shift = self.combine(affine, instruction, name, affine.shift, c)

    def combine(self, affine: _Affine, like: Instruction, name: str, a: Any, b: Any) -> Any:
        """``a name b`` as a number, or as a vector made by a new instruction."""
        if isinstance(a, float) and isinstance(b, float):
            return {"multiply": a * b, "add": a + b, "subtract": a - b}[name]
        vector = a if isinstance(a, Ref) else b
        made = Value(Spec(vector.spec.shape, vector.spec.dtype), op=name, layer=like.layer, site=like.site)
        affine.made.append(replace(like, op=REGISTRY[name], ins=(a, b), outs=(made,), params={}))
        return Ref.of(made)

    def scales_weight(self, product: Instruction) -> bool:
        """True when the weight is small enough to be scaled in each run."""
        weight = product.ins[1]
        own = weight.value.origin in ("state", "constant") and weight.spec.size == weight.value.spec.size
        return own and weight.spec.size <= WEIGHT_PER_RESULT * product.outs[0].spec.size

    # ---- folding ----

    def fold(self, product: Instruction, affine: _Affine) -> None:
        for instruction in affine.made:
            for ref in instruction.refs:
                self.make(ref.value)
        for operand in (affine.scale, affine.shift):
            if isinstance(operand, Ref):
                self.make(operand.value)
        self.out += affine.made
        self.done.update(self.made[one.outs[0]] for one in affine.chain)
        last = affine.chain[-1].outs[0]
        like = affine.chain[-1]
        ndim = last.spec.ndim
        axis = _PRODUCTS[product.op.name] % ndim
        if self.scales_weight(product):
            product = self.with_scaled_weight(product, affine.scale, like)
        else:
            scaled = last if affine.shift is None else replace(product.outs[0], op="multiply")
            self.out.append(product)
            ins = (Ref.of(product.outs[0]), _along(affine.scale, axis, ndim))
            product = replace(like, op=REGISTRY["multiply"], ins=ins, outs=(scaled,), params={})
        if affine.shift is None:
            self.out.append(replace(product, outs=(last,)))
            return
        self.out.append(product)
        ins = (Ref.of(product.outs[0]), _along(affine.shift, axis, ndim))
        self.out.append(replace(like, op=REGISTRY["add"], ins=ins, outs=(last,), params={}))

    def make(self, value: Value) -> None:
        """Put what makes a small value here, unless it is there already."""
        n = self.made.get(value)
        if n is None or n in self.done:
            return
        for ref in self.program.instructions[n].refs:
            self.make(ref.value)
        self.emit(n)

    def with_scaled_weight(self, product: Instruction, scale: Ref, like: Instruction) -> Instruction:
        """The product with ``weight * scale`` in place of the weight, which keeps its order in memory."""
        weight = product.ins[1]
        axes = _memory_order(weight.spec)
        channel = 0 if product.op.name == "conv2d" else weight.spec.ndim - 1
        shape = tuple(weight.spec.shape[axis] for axis in axes)
        dense = Spec(shape, weight.spec.dtype, tuple(weight.spec.strides[axis] for axis in axes))
        step = scale.spec.strides[0]
        beside = tuple(dim if axis == channel else 1 for axis, dim in zip(axes, shape, strict=True))
        steps = tuple(step if axis == channel else 0 for axis in axes)
        made = Value(Spec(shape, weight.spec.dtype), op="multiply", layer=product.layer, site=like.site)
        ins = (replace(weight, spec=dense), Ref(scale.value, Spec(beside, scale.spec.dtype, steps), scale.offset))
        self.out.append(replace(like, op=REGISTRY["multiply"], ins=ins, outs=(made,), params={}))
        back = tuple(made.spec.strides[axes.index(axis)] for axis in range(len(axes)))
        return replace(product, ins=(product.ins[0], Ref(made, Spec(weight.spec.shape, weight.spec.dtype, back))))


def _memory_order(spec: Spec) -> list[int]:
    """The axes from the one with the largest stride to the densest."""
    return sorted(range(spec.ndim), key=lambda axis: (-spec.strides[axis], axis))


def _along(vector: Any, axis: int, ndim: int) -> Any:
    """A vector shaped to broadcast along one axis of an array of ``ndim`` axes; a number stays."""
    if not isinstance(vector, Ref):
        return vector
    after = ndim - axis - 1
    spec = Spec((*vector.spec.shape, *(1,) * after), vector.spec.dtype, (*vector.spec.strides, *(0,) * after))
    return Ref(vector.value, spec, vector.offset)
