"""Cross entropy with its gradient: one instruction that reads the scores once and writes the losses and the gradient.

The gradient of a loss is known as soon as the loss is, but for what comes down from above; that is a number known
before the losses are (one over the rows that count, times the scale of the loss), so it can be computed first. The
scores need not be kept for the backward pass then: the gradient lies in their place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from brim.errors import ShapeError
from brim.op import REGISTRY, Op
from brim.program.ir import STORE, Instruction, Program, Ref, Value, is_pure
from brim.program.passes.dead_code import dead_code
from brim.program.passes.liveness import live_bytes
from brim.spec import Spec

__all__ = ["CROSS_ENTROPY_WITH_GRAD", "HOISTED_BYTES_MAX", "loss_gradient"]

HOISTED_BYTES_MAX = 2**20
"""What is computed earlier so that the gradient can be: a few numbers, and one an input row."""

_FORWARD, _GRADIENT, _COPY = REGISTRY["cross_entropy"], REGISTRY["cross_entropy_grad"], REGISTRY["copy"]


def _specs(x: Spec, index: Spec, g: Spec, *, ignore_index: int, smoothing: float) -> tuple[Spec, ...]:
    losses, *_ = _FORWARD.infer((x, index), {"ignore_index": ignore_index, "smoothing": smoothing})
    if g.shape != index.shape:
        raise ShapeError(f"a gradient for each of the {index.shape} losses is expected, got {g.shape}")
    return losses, Spec(x.shape, x.dtype)


CROSS_ENTROPY_WITH_GRAD = Op(
    "cross_entropy_with_grad", "primitive", arity=3, outputs=2, rule=_specs, doc="cross_entropy and its gradient"
)
"""``(x, index, g, ignore_index, smoothing)``: the losses (N,) of ``cross_entropy`` and, for gradients g (N,) of them,
what ``cross_entropy_grad`` gives, which may lie where the scores do."""


def loss_gradient(
    program: Program,
    accepts: Callable[[Instruction], bool],
    peak: Callable[[Program], int] | None = None,
) -> Program:
    """The program with losses and their gradients computed together; the same results to the bit.

    Arguments:
        program: in the order in which it would run.
        accepts: whether the backend wants the op above with these operands.
        peak: the planned peak of a program in bytes; None: what ``live_bytes`` comes to.

    Returns:
        a program whose peak is no higher.
    """
    judge = peak or (lambda one: max(live_bytes(one)))
    limit_bytes: int | None = None
    for forward in [i for i in program.instructions if i.op is _FORWARD]:
        made = _together(program, forward, accepts)
        if made is None:
            continue
        if limit_bytes is None:
            limit_bytes = judge(program)
        if judge(made) <= limit_bytes:
            program = made
    return program


def _together(
    program: Program, forward: Instruction, accepts: Callable[[Instruction], bool]
) -> Program | None:  # fmt: skip
    """The program with one loss and its gradient as one instruction; None where that cannot be."""
    instructions = program.instructions
    at, readers = instructions.index(forward), program.readers()
    losses, *sums = forward.outs
    numbers = {reader for one in sums for reader in readers.get(one, ())}
    if len(numbers) != 1 or (number := numbers.pop()) == len(instructions):
        return None
    gradient = instructions[number]
    if gradient.op is not _GRADIENT or gradient.ins[1:] != (*forward.ins, *map(Ref.of, sums)):
        return None
    if gradient.params != forward.params or any(out.home for i in (forward, gradient) for out in i.outs):
        return None
    g = _source(program, gradient.ins[0])
    earlier = _earlier(program, at, number, g)
    if earlier is None:
        return None
    joined = replace(forward, op=CROSS_ENTROPY_WITH_GRAD, ins=(*forward.ins, g), outs=(losses, *gradient.outs))
    if not accepts(joined):
        return None
    moved = [replace(instructions[n], phase=forward.phase) for n in earlier]
    left = [i for n, i in enumerate(instructions) if n > at and n != number and n not in earlier]
    return dead_code(program.with_instructions([*instructions[:at], *moved, joined, *left]))


def _source(program: Program, g: Ref) -> Ref:
    """What a gradient is a copy of, if it is one: one number for all rows need not be written for each."""
    made = program.producers()
    while g.whole and g.value in made and (maker := program.instructions[made[g.value]]).op is _COPY:
        g = maker.ins[0]
    return g


def _earlier(program: Program, at: int, number: int, g: Ref) -> list[int] | None:
    """The instructions after ``at`` that make ``g``, which the gradient at ``number`` is given.

    None where they cannot run before ``at``: they need its results, do more than compute a few numbers, or read a state
    that is written over.
    """
    made = program.producers()
    wanted: set[int] = set()
    pending: list[object] = [g]
    while pending:
        ref = pending.pop()
        if not isinstance(ref, Ref) or (n := made.get(ref.value, -1)) < at or n in wanted:
            continue
        if n == at or not is_pure(program.instructions[n]):
            return None
        wanted.add(n)
        pending += program.instructions[n].ins
    found = sorted(wanted)
    if sum(out.nbytes for n in found for out in program.instructions[n].outs) > HOISTED_BYTES_MAX:
        return None
    read = {ref.value.home or ref.value for n in found for ref in program.instructions[n].refs}
    return None if read & _written(program.instructions[at:number]) else found


def _written(instructions: list[Instruction]) -> set[Value]:
    """The states that instructions write."""
    found = {i.ins[0].value for i in instructions if i.op is STORE}
    return found | {out.home for i in instructions for out in i.outs if out.home is not None}
