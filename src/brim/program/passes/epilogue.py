"""Epilogues: the elementwise group that follows a product is computed with it, so that the product is never stored.

``matmul_epilogue`` and ``conv2d_epilogue`` are a product and a formula whose input 0 is the product. Which products
gain by it is the backend's to say: a GPU computes the formula while the product is still in registers, a CPU's native
kernel while a finished tile of the result is in the caches. NumPy's kernels gain nothing: the group that works in place
on a finished product is as good.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from brim.errors import ShapeError
from brim.expr import FusedFormula, ScalarStep
from brim.op import REGISTRY, Op
from brim.program.ir import STORE, Instruction, Program, Ref, Value
from brim.program.passes.groups import Group, group_of, is_fusible
from brim.spec import Spec

__all__ = ["CONV2D_EPILOGUE", "MATMUL_EPILOGUE", "epilogue", "is_epilogue", "product_of"]

PRODUCT_INPUTS = 2


def _rule(product: Op) -> Callable[..., tuple[Spec, ...]]:
    def infer(*ins: Any, formula: FusedFormula, shape: tuple[int, ...], **params: Any) -> tuple[Spec, ...]:
        (made,) = product.infer(ins[:PRODUCT_INPUTS], params)
        if made.size != math.prod(shape):
            raise ShapeError(f"{product.name} gives shape {made.shape}, its epilogue works on shape {shape}")
        read = [which for step in formula.steps for kind, which in step.args if kind == "in"]
        if max(read, default=0) > len(ins) - PRODUCT_INPUTS:
            raise ValueError(f"an epilogue of {len(ins) - PRODUCT_INPUTS} inputs reads input {max(read)}")
        return tuple(Spec(shape, formula.steps[step].dtype) for step in formula.outputs)

    return infer


MATMUL_EPILOGUE = Op(
    "matmul_epilogue", "primitive", arity=None, rule=_rule(REGISTRY["matmul"]), doc="a product and what follows it"
)
CONV2D_EPILOGUE = Op(
    "conv2d_epilogue", "primitive", arity=None, rule=_rule(REGISTRY["conv2d"]), doc="a convolution and what follows it"
)
"""``(a, b, *others, formula, shape, **params)``: the product of a and b with ``params``, read as an array of ``shape``,
is input 0 of ``formula``; the others are its inputs 1, 2, ...; one output of ``shape`` for each of the formula's."""

_EPILOGUES = {"matmul": MATMUL_EPILOGUE, "conv2d": CONV2D_EPILOGUE}


def is_epilogue(instruction: Instruction) -> bool:
    """True for a product with a formula."""
    return instruction.op in (MATMUL_EPILOGUE, CONV2D_EPILOGUE)


def product_of(instruction: Instruction) -> tuple[Op, dict[str, Any]]:
    """The product in an epilogue: its op and params."""
    name = instruction.op.name.removesuffix("_epilogue")
    return REGISTRY[name], {k: v for k, v in instruction.params.items() if k not in ("formula", "shape")}


def epilogue(program: Program, accepts: Callable[[Instruction], bool]) -> Program:
    """The program with elementwise groups joined to the matmul or conv2d whose result they read element for element.

    The joined instruction runs at the product's place, or at the group's where the group reads something that is made
    in between. It is left apart where joining would keep more bytes alive: everything that it reads and writes is
    there at once, while a group by itself comes when inputs of the product may be gone.

    Arguments:
        accepts: whether the backend wants this joined instruction instead of the two.
    """
    readers = program.readers()
    made = program.producers()
    instructions: list[Instruction | None] = list(program.instructions)
    place = list(range(len(instructions)))  # where what stood there runs now
    for n, instruction in enumerate(program.instructions):
        if not is_fusible(instruction):
            continue
        group = group_of(instruction)
        # The latest product first: what the group reads besides is there already.
        read = {x.value for x in group.ins if isinstance(x, Ref)} & set(made)
        for value in sorted(read, key=made.__getitem__, reverse=True):
            p = made[value]
            product, keep = instructions[p], readers[value] != [n]
            if product is None or product.op.name not in _EPILOGUES or value.home is not None:
                continue
            if product.phase != instruction.phase or not _reads_all(group, value, keep):
                continue
            at = _where(program, p, n, value, group, readers, made, place)
            if at is None:
                continue
            joined = _join(product, group, value, keep)
            if accepts(joined):
                instructions[p] = instructions[n] = None
                instructions[at] = joined
                place[p] = place[n] = at
                break
    return program.with_instructions([i for i in instructions if i is not None])


def _reads_all(group: Group, value: Value, keep: bool) -> bool:
    """True when a group reads a product element for element and in no other way; in another shape unless it is kept."""
    refs = [x for x in group.ins if isinstance(x, Ref) and x.value is value]
    if len(refs) != 1 or (keep and refs[0].spec.shape != value.spec.shape):
        return False
    ref = refs[0]
    same_order = ref.spec.contiguous and value.spec.contiguous and ref.offset == 0
    return same_order and ref.spec.shape == group.shape and value.spec.size == math.prod(group.shape)


def _where(
    program: Program,
    p: int,
    n: int,
    value: Value,
    group: Group,
    readers: dict[Value, list[int]],
    made: dict[Value, int],
    place: list[int],
) -> int | None:
    """The place, p or n, where the product made at p and the group at n may run as one without more memory."""
    product = program.instructions[p]
    others = [x.value for x in group.ins if isinstance(x, Ref) and x.value is not value]
    more = sum(out.nbytes for out in group.outs) - (value.nbytes if readers[value] == [n] else 0)
    stays = all(not _takes_memory(ref.value) or max(readers[ref.value]) > n for ref in product.refs)
    if all(other not in made or place[made[other]] < p for other in others):
        return p if more <= 0 or stays else None
    later = [reader for reader in readers[value] if reader != n]
    if any(reader < n for reader in later) or not stays or _writes_between(program, p, n, product):
        return None
    return n


def _takes_memory(value: Value) -> bool:
    return value.origin in ("temp", "input") and value.home is None


def _writes_between(program: Program, p: int, n: int, product: Instruction) -> bool:
    """True when a state that the product reads is written before place n."""
    states = {ref.value.home or ref.value for ref in product.refs}
    for instruction in program.instructions[p + 1 : n]:
        written = [instruction.ins[0].value] if instruction.op is STORE else [out.home for out in instruction.outs]
        if any(state in states for state in written if state is not None):
            return True
    return False


def _join(product: Instruction, group: Group, value: Value, keep: bool) -> Instruction:
    """Both as one instruction; with ``keep``, the product itself is the last output."""
    first = next(n for n, x in enumerate(group.ins) if isinstance(x, Ref) and x.value is value)
    others = [x for n, x in enumerate(group.ins) if n != first]
    numbers = {n: 0 if n == first else n + (n < first) for n in range(len(group.ins))}
    steps = [
        ScalarStep(s.fn, s.dtype, tuple((k, numbers[w]) if k == "in" else (k, w) for k, w in s.args), s.compute)
        for s in group.formula.steps
    ]
    outputs, outs = list(group.formula.outputs), list(group.outs)
    if keep:
        dtype = value.spec.dtype
        outputs.append(len(steps))
        steps.append(ScalarStep("cast", dtype, (("in", 0),), dtype))
        outs.append(value)
    formula = FusedFormula(tuple(steps), tuple(outputs))
    params = {**product.params, "formula": formula, "shape": group.shape}
    ins = (*product.ins, *others)
    return replace(product, op=_EPILOGUES[product.op.name], ins=ins, outs=tuple(outs), params=params)
