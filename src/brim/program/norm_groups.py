"""Norms with the elementwise groups before and after them: the ops, and which of their operands is what.

``layer_norm_fused``, ``batch_norm_fused`` and their gradients ``..._grad_fused`` exist only in programs, where the pass
``join_norms`` makes them. Each is a norm whose first input is computed by one formula and whose first result goes
through another one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from brim.errors import ShapeError
from brim.expr import FusedFormula, ScalarStep
from brim.op import REGISTRY, Op
from brim.program.ir import Instruction, Ref, Value
from brim.spec import Spec

__all__ = ["FUSED_NORMS", "NormGroup", "identity", "is_fused_norm", "is_norm", "norm_group", "overwritable_by_norm"]

_OWN = {"layer_norm": 2, "batch_norm": 2, "layer_norm_grad": 4, "batch_norm_grad": 4}
"""Norm -> how many inputs it has after the first one: weight and bias; or x, weight, mean and variance."""


def identity(dtype: np.dtype[Any]) -> FusedFormula:
    """The formula of what is handed on as it is."""
    return FusedFormula((ScalarStep("cast", dtype, (("in", 0),), dtype),), (0,))


def _rule(name: str) -> Callable[..., tuple[Spec, ...]]:
    norm, count = REGISTRY[name], _OWN[name]

    def infer(
        *ins: Any, before: FusedFormula, after: FusedFormula, shape: tuple[int, ...], **params: Any
    ) -> tuple[Spec, ...]:
        others = len(ins) - count
        for formula, limit in ((before, others), (after, others + 1)):
            read = [which for step in formula.steps for kind, which in step.args if kind == "in"]
            if not formula.outputs or any(which >= limit for which in read):
                raise ValueError(f"a formula of {name}_fused reads input {max(read, default=0)} of {limit}")
        made = [Spec(shape, before.steps[step].dtype) for step in before.outputs]
        first, *rest = norm.infer([made[0], *ins[:count]], params)
        if first.shape != shape:
            raise ShapeError(f"{name} gives shape {first.shape}, its formulas work on shape {shape}")
        return (*(Spec(shape, after.steps[step].dtype) for step in after.outputs), *made[1:], *rest)

    return infer


def _op(name: str) -> Op:
    doc = f"{name} of a formula, and a formula of its result"
    return Op(f"{name}_fused", "primitive", arity=None, rule=_rule(name), doc=doc)


FUSED_NORMS = {name: _op(name) for name in _OWN}
"""``(*own, *others, before, after, shape, **params)`` by the name of the norm.

``own`` are the norm's inputs but the first; ``before`` is a formula on ``others``, whose output 0 is the norm's first
input (in its dtype, so rounded to it); ``after`` is a formula whose input 0 is the norm's first result and whose inputs
1, 2, ... are ``others``. All elementwise operands broadcast to ``shape``, which is that of the norm's input. Outputs:
those of ``after``, then those of ``before`` but the first, then the norm's but the first.
"""


def is_fused_norm(instruction: Instruction) -> bool:
    """True for a norm with formulas."""
    return FUSED_NORMS.get(instruction.op.name.removesuffix("_fused")) is instruction.op


def is_norm(instruction: Instruction) -> bool:
    """True for a norm or a gradient of one, with formulas or without."""
    return instruction.op.name in FUSED_NORMS or is_fused_norm(instruction)


@dataclass(frozen=True, slots=True)
class NormGroup:
    """The parts of a norm with formulas. Operands are what they are given as: Refs and numbers, or Specs, or arrays.

    Attributes:
        norm: the op of the norm itself.
        own, others: inputs, see ``FUSED_NORMS``.
        before, after: the formulas.
        made, kept, rest: outputs of ``after``, of ``before`` but the first, of the norm but the first.
        params: of the norm itself.
    """

    norm: Op
    own: tuple[Any, ...]
    others: tuple[Any, ...]
    before: FusedFormula
    after: FusedFormula
    made: tuple[Any, ...]
    kept: tuple[Any, ...]
    rest: tuple[Any, ...]
    params: dict[str, Any]

    @property
    def first_dtype(self) -> np.dtype[Any]:
        """Dtype of the norm's first input."""
        return self.before.steps[self.before.outputs[0]].dtype

    @property
    def keeps_first(self) -> int | None:
        """Which of ``kept`` is the norm's first input; None where that is not stored."""
        first, *others = self.before.outputs
        return others.index(first) if first in others else None


def norm_group(name: str, ins: Any, outs: Any, params: dict[str, Any]) -> NormGroup:
    """Take the operands of a norm with formulas apart.

    Arguments:
        name: of its op.
        ins, outs: sequences of Refs and Values, of Specs, or of arrays.
        params: of the instruction.
    """
    norm = name.removesuffix("_fused")
    count = _OWN[norm]
    before, after = params["before"], params["after"]
    made, kept = len(after.outputs), len(before.outputs) - 1
    own = {k: v for k, v in params.items() if k not in ("before", "after", "shape")}
    return NormGroup(
        REGISTRY[norm], tuple(ins[:count]), tuple(ins[count:]), before, after,
        tuple(outs[:made]), tuple(outs[made : made + kept]), tuple(outs[made + kept :]), own,
    )  # fmt: skip


def overwritable_by_norm(instruction: Instruction, out: Value) -> list[Value]:
    """Values over which a norm, with formulas or without, may write ``out``, if its kernel may alias at all.

    Such a kernel reads an element of all elementwise operands before it writes any result of ``after`` there. What
    ``before`` gives is written earlier: over operands that nothing reads afterwards, which is known where the norm's
    first input is stored and ``after`` does not read the operand.
    """
    if not is_fused_norm(instruction):
        images = list(instruction.ins[: 2 if instruction.op.name.endswith("_grad") else 1])
        return _written_over(instruction, images) if out is instruction.outs[0] else []
    group = norm_group(instruction.op.name, instruction.ins, instruction.outs, instruction.params)
    images = [*group.others, *(group.own[:1] if group.norm.name.endswith("_grad") else ())]
    if out in group.kept:
        if group.keeps_first is None:
            return []
        later = {which - 1 for step in group.after.steps for kind, which in step.args if kind == "in"}
        images = [x for n, x in enumerate(group.others) if n not in later]
    elif out not in group.made:
        return []
    return _written_over(instruction, images)


def _written_over(instruction: Instruction, images: list[Any]) -> list[Value]:
    """What the Refs among some operands read whole, if nothing else of the instruction reads it."""
    refs = [x for x in images if isinstance(x, Ref)]
    reads = [ref.value for ref in instruction.refs]
    found = dict.fromkeys(ref.value for ref in refs if ref.whole)
    return [value for value in found if reads.count(value) == sum(ref.value is value and ref.whole for ref in refs)]
