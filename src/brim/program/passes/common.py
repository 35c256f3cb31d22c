"""Common subexpressions: what is computed twice from the same values is computed once, where that costs no memory."""

from __future__ import annotations

from typing import Any

from brim.program.ir import HostScalar, Instruction, Program, Ref, Value, is_pure
from brim.program.passes.rewrite import replace_values

__all__ = ["common"]


def common(program: Program) -> Program:
    """The program with identical pure instructions of one phase merged into the first of them.

    A value at hand for longer is memory: so instructions of different phases stay apart (the backward pass may rather
    compute something again than keep it), and two of one phase are merged only when the first one's outputs are still
    needed at the second, or when at least as many bytes of inputs are needed shorter instead.
    Reading the same value always gives the same elements, because nothing may read a state that was written over.
    """
    readers = program.readers()
    made = program.producers()
    first: dict[Any, Instruction] = {}
    mapping: dict[Value, Value] = {}
    kept: list[Instruction] = []
    for n, instruction in enumerate(program.instructions):
        key = _key(instruction, mapping) if is_pure(instruction) else None
        earlier = first.get(key) if key is not None else None
        if earlier is None or not _costs_nothing(earlier, instruction, n, mapping, readers, made):
            kept.append(instruction)
            if key is not None:
                first[key] = instruction  # the nearest one is the cheapest to merge the next one with
            continue
        for old, new in zip(instruction.outs, earlier.outs, strict=True):
            mapping[old] = new
            readers[new] = sorted({*readers.get(new, ()), *readers.get(old, ())})
        for value in {mapping.get(ref.value, ref.value) for ref in instruction.refs}:
            readers[value] = [reader for reader in readers[value] if reader != n]
    return replace_values(program.with_instructions(kept), mapping) if mapping else program


def _key(instruction: Instruction, mapping: dict[Value, Value]) -> Any:
    """Equal for instructions that compute the same; None where that cannot be told."""

    def operand(x: Any) -> Any:
        if isinstance(x, Ref):
            return mapping.get(x.value, x.value), x.spec, x.offset
        return x if isinstance(x, HostScalar) else (type(x), repr(x))  # repr tells 0.0 from -0.0

    ins = tuple(map(operand, instruction.ins))
    params = tuple((name, repr(value), value) for name, value in sorted(instruction.params.items()))
    key = (instruction.op, instruction.phase, ins, params, tuple(out.spec for out in instruction.outs))
    try:
        hash(key)
    except TypeError:  # a param that is a list or an array
        return None
    return key


def _costs_nothing(
    earlier: Instruction,
    later: Instruction,
    n: int,
    mapping: dict[Value, Value],
    readers: dict[Value, list[int]],
    made: dict[Value, int],
) -> bool:
    """True when reading what ``earlier`` gave instead of computing ``later`` at ``n`` keeps no more bytes alive."""
    death = {out: max(readers.get(out, [made[out]])) for out in earlier.outs}
    longer = [out for out in earlier.outs if death[out] < n]
    if not longer:
        return True
    since = min(death[out] for out in longer)
    freed = 0
    for value in {mapping.get(ref.value, ref.value) for ref in later.refs}:
        if value.home is not None or value.origin not in ("temp", "input"):
            continue  # it takes its bytes whether it is read or not
        others = [reader for reader in readers[value] if reader != n]
        if max(others, default=made.get(value, -1)) <= since:
            freed += value.nbytes
        elif max(others) < n:
            return False  # part of the time only: not worth working out
    return freed >= sum(out.nbytes for out in longer)
