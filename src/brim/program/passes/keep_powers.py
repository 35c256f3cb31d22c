"""Kept powers: cross entropy stores e^(x - top) of its scores, and its gradient reads them instead of the scores.

Both need the power of every score, and powers are most of what both take. The stored ones are as large as the scores,
so they are only kept where they cost no memory: in the place of scores that nobody else reads any more, or in bytes
that are free until the gradient is written over them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from brim.errors import ShapeError
from brim.op import REGISTRY, Op
from brim.program.ir import Instruction, Program, Ref, Value
from brim.program.passes.liveness import live_bytes
from brim.spec import Spec

__all__ = ["BESIDE_BYTES_MAX", "CROSS_ENTROPY_POWERS", "CROSS_ENTROPY_POWERS_GRAD", "keep_powers"]

BESIDE_BYTES_MAX = 8 * 2**20
"""Larger powers are only kept in the place of the scores: beside them they would go to memory and come back, which
takes as long as computing them again."""

_FORWARD, _GRADIENT = REGISTRY["cross_entropy"], REGISTRY["cross_entropy_grad"]


def _forward_spec(x: Spec, index: Spec, **params: Any) -> tuple[Spec, ...]:
    losses, _, total = _FORWARD.infer((x, index), params)
    return losses, total, Spec(x.shape, x.dtype)


def _gradient_spec(powers: Spec, g: Spec, index: Spec, total: Spec, **params: Any) -> Spec:
    rows = powers.shape[:1]
    if powers.ndim != 2 or not g.shape == index.shape == total.shape == rows:
        raise ShapeError(
            f"powers (N, C) need gradients, classes and sums of shape (N,), got {powers.shape} and "
            f"{g.shape}, {index.shape}, {total.shape}"
        )
    return Spec(powers.shape, powers.dtype)


CROSS_ENTROPY_POWERS = Op(
    "cross_entropy_powers", "primitive", arity=2, outputs=3, aux=2, rule=_forward_spec,
    doc="losses and sums as cross_entropy has them, and e^(x - top) of all scores",
)  # fmt: skip
"""``(x, index, ignore_index, smoothing)``: losses (N,), logarithms of sums (N,), and powers, of the shape of x.

The largest scores, which ``cross_entropy`` gives besides, are in the powers."""

CROSS_ENTROPY_POWERS_GRAD = Op(
    "cross_entropy_powers_grad", "primitive", arity=4, rule=_gradient_spec, doc="cross_entropy_grad of the kept powers"
)
"""``(powers, g, index, total, ignore_index, smoothing)``: ``cross_entropy_grad``, to the bit."""


@dataclass(eq=False, slots=True)
class _Pair:
    """A loss and its gradients, by their numbers what runs in their place."""

    made: dict[int, Instruction]
    takes_over: bool  # nobody else reads the scores after the loss


def keep_powers(
    program: Program,
    accepts: Callable[[Instruction], bool],
    peak: Callable[[Program], int] | None = None,
) -> Program:
    """The program with the powers of ``cross_entropy`` kept for its gradients; the same results to the bit.

    All losses keep theirs, or only those whose powers take over the memory of the scores, or none: the first of these
    whose peak is no higher than it was.

    Arguments:
        program: in the order in which it would run.
        accepts: whether the backend has a kernel for one of the two ops above.
        peak: the planned peak of a program in bytes; None: what ``live_bytes`` comes to.
    """
    pairs = _pairs(program, accepts)
    if not pairs:
        return program
    judge = peak or (lambda one: max(live_bytes(one)))
    limit_bytes = judge(program)
    some = [pair for pair in pairs if pair.takes_over]
    for chosen in (pairs, some) if 0 < len(some) < len(pairs) else (pairs,):
        made = {n: instruction for pair in chosen for n, instruction in pair.made.items()}
        changed = program.with_instructions([made.get(n, i) for n, i in enumerate(program.instructions)])
        if judge(changed) <= limit_bytes:
            return changed
    return program


def _pairs(program: Program, accepts: Callable[[Instruction], bool]) -> list[_Pair]:
    instructions = program.instructions
    readers: dict[Value, list[int]] = {}
    found: list[_Pair] = []
    for n, instruction in enumerate(instructions):
        if instruction.op is not _FORWARD:
            continue
        readers = readers or program.readers()
        losses, top, total = instruction.outs
        gradients = [at for at in readers.get(total, ()) if _is_gradient(instructions, at, instruction)]
        if not gradients or readers[top] != gradients:
            continue
        x = instruction.ins[0]
        powers = replace(losses, spec=Spec(x.spec.shape, x.spec.dtype))
        made = {n: replace(instruction, op=CROSS_ENTROPY_POWERS, outs=(losses, total, powers))}
        for at in gradients:
            g, _, index, _, sums = instructions[at].ins
            made[at] = replace(instructions[at], op=CROSS_ENTROPY_POWERS_GRAD, ins=(Ref.of(powers), g, index, sums))
        others = [at for at in readers[x.value] if at > n and at not in gradients]
        takes_over = x.whole and x.value.origin in ("temp", "input") and not others
        if (takes_over or powers.nbytes <= BESIDE_BYTES_MAX) and all(map(accepts, made.values())):
            found.append(_Pair(made, takes_over))
    return found


def _is_gradient(instructions: list[Instruction], at: int, forward: Instruction) -> bool:
    """True for the gradient of a loss: of the same scores and classes, with the loss's own sums."""
    if at == len(instructions) or instructions[at].op is not _GRADIENT:  # a result is read after the last one
        return False
    gradient = instructions[at]
    _, x, index, top, total = gradient.ins
    same = (x, index) == forward.ins and gradient.params == forward.params
    return same and all(ref == Ref.of(sums) for ref, sums in zip((top, total), forward.outs[1:], strict=True))
