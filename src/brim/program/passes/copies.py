"""Copies that need not be: readers of a copy read its source, where they find the same elements there."""

from __future__ import annotations

from dataclasses import replace

from brim.expr import Call, postorder
from brim.program.ir import FUSED, STORE, Instruction, Program, Ref, Value

__all__ = ["copies"]

_ARITHMETIC = (
    "add",
    "sub",
    "mul",
    "div",
    "max",
    "min",
    "neg",
    "abs",
    "square",
    "sqrt",
    "where",
    "identity",
    "copysign",
)
_TESTS = ("eq", "ne", "lt", "le", "gt", "ge", "and", "or", "xor", "not", "isnan", "isinf", "isfinite", "signbit")
_EXACT = frozenset((*_ARITHMETIC, *_TESTS))


def copies(program: Program) -> Program:
    """The program without ``copy`` and same-dtype ``astype`` instructions whose readers may as well read the source.

    A copy goes when its source cannot change while the copy is read and when no more bytes are alive without it:

    - of elements that lie in row-major order: all its readers read the source. A ``store`` only takes the source if it
      is all of a value, which can then be written straight into the state;
    - of other elements (a transposed matrix): its only reader is exact elementwise arithmetic, and reads the source in
      its layout with the same bits; sums and products might add in another order.

    A copy of a state stays when the step writes the state, or hands the copy out.
    """
    readers = program.readers()
    written = _written_states(program)
    death = {value: max(numbers) for value, numbers in readers.items()}
    sources: dict[Value, Ref] = {}
    renewed: dict[Value, Value] = {}
    makers: dict[Value, Instruction] = {}
    kept: list[Instruction] = []
    for n, instruction in enumerate(program.instructions):
        instruction = _reading(instruction, sources)
        if _is_copy(instruction):
            source, out = instruction.ins[0], instruction.outs[0]
            reading = readers.get(out, [])
            if _may_go(program, source, out, reading, death, written, makers):
                sources[out] = source
                death[source.value] = max(death.get(source.value, n), *reading, n)
                if source.whole and source.value.origin == "temp" and source.value.category == "temps" != out.category:
                    renewed[source.value] = replace(source.value, category=out.category, layer=out.layer)
                continue
        kept.append(instruction)
        makers.update((out, instruction) for out in instruction.outs)
    if not sources:
        return program
    results = [_through(ref, sources) for ref in program.results]
    kept = [_renamed(instruction, renewed) for instruction in kept]
    return replace(program, instructions=kept, results=[_through_names(ref, renewed) for ref in results])


def _is_copy(instruction: Instruction) -> bool:
    if instruction.op.name not in ("copy", "astype") or instruction.outs[0].home is not None:
        return False
    source = instruction.ins[0]
    return isinstance(source, Ref) and source.spec.dtype == instruction.outs[0].spec.dtype


def _written_states(program: Program) -> set[Value]:
    written = {i.ins[0].value for i in program.instructions if i.op is STORE}
    return written | {out.home for i in program.instructions for out in i.outs if out.home is not None}


def _may_go(
    program: Program,
    source: Ref,
    out: Value,
    reading: list[int],
    death: dict[Value, int],
    written: set[Value],
    makers: dict[Value, Instruction],
) -> bool:
    """True when the readers of ``out`` may read ``source``."""
    value = source.value
    last = max(reading, default=-1)
    state = value if value.origin == "state" else value.home
    if state is not None and (state in written or last == len(program.instructions)):
        return False
    longer = death.get(value, -1) < last
    if longer and state is None and value.origin != "constant" and value.nbytes > out.nbytes:
        return False  # more bytes would be alive for longer
    instructions = program.instructions
    inside = [instructions[n] for n in reading if n < len(instructions)]
    if source.spec.contiguous and out.spec.contiguous:
        return _takes_over(source, makers.get(value), [reader for reader in inside if reader.op is STORE])
    if source.spec.strides == out.spec.strides and source.whole:
        return True  # both lie in the same other order
    return len(reading) == len(inside) == 1 and _is_exact(inside[0]) and _reads_once(inside[0], out)


def _takes_over(source: Ref, maker: Instruction | None, stores: list[Instruction]) -> bool:
    """True when a source can be written straight into the states that a copy of it is stored in."""
    if not stores:
        return True
    if maker is None or not source.whole or source.value.origin != "temp":
        return False
    states = {store.ins[0].value for store in stores}
    reads = {ref.value.home or ref.value for ref in maker.refs}
    return maker.op is FUSED or maker.op.kind == "elementwise" or not states & reads


def _is_exact(instruction: Instruction) -> bool:
    """True for elementwise arithmetic whose every bit is fixed, in whatever order a library reads the elements."""
    formula = instruction.op.formula
    return formula is not None and all(n.fn in _EXACT for n in postorder(formula) if isinstance(n, Call))


def _reads_once(reader: Instruction, value: Value) -> bool:
    """True when an instruction reads all of a row-major value, as it lies, and only once."""
    found = [ref for ref in reader.refs if ref.value is value]
    return len(found) == 1 and found[0].whole and value.spec.contiguous


def _through(ref: Ref, sources: dict[Value, Ref]) -> Ref:
    """What reads the source, where ``ref`` reads the copy."""
    source = sources.get(ref.value)
    if source is None:
        return ref
    if source.spec.contiguous or source.spec.strides == ref.value.spec.strides:
        return Ref(source.value, ref.spec, source.offset + ref.offset)  # any view of it: the elements lie alike
    return source


def _reading(instruction: Instruction, sources: dict[Value, Ref]) -> Instruction:
    if not any(ref.value in sources for ref in instruction.refs):
        return instruction
    return replace(instruction, ins=tuple(_through(x, sources) if isinstance(x, Ref) else x for x in instruction.ins))


def _through_names(ref: Ref, renewed: dict[Value, Value]) -> Ref:
    return replace(ref, value=renewed[ref.value]) if ref.value in renewed else ref


def _renamed(instruction: Instruction, renewed: dict[Value, Value]) -> Instruction:
    """The instruction with values that are now known to be more than temporaries (a gradient, an activation)."""
    ins = tuple(_through_names(x, renewed) if isinstance(x, Ref) else x for x in instruction.ins)
    return replace(instruction, ins=ins, outs=tuple(renewed.get(out, out) for out in instruction.outs))
