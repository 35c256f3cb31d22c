"""What passes share: putting values in the place of others throughout a program, which itself is never changed."""

from __future__ import annotations

from dataclasses import replace

from brim.program.ir import Instruction, Program, Ref, Value

__all__ = ["replace_values", "same_memory", "same_memory_layout"]


def replace_values(program: Program, mapping: dict[Value, Value]) -> Program:
    """The program with every value that ``mapping`` names replaced, wherever it is written, read or a home.

    Arguments:
        mapping: old -> new value of the same number of elements, dtype and layout. Chains (a -> b, b -> c) are
            followed. Values at the home of a replaced state are made anew at the new one.

    Raises:
        ValueError: a value in whose place one of another size, dtype or layout is put.
    """
    for old, new in mapping.items():
        if not same_memory_layout(old, new):
            raise ValueError(
                f"a value of {old.spec} cannot be replaced by one of {new.spec}: Refs would read other elements"
            )
    final: dict[Value, Value] = {}

    def of(value: Value) -> Value:
        if value not in final:
            new = value
            while new in mapping:
                new = mapping[new]
            if new.home is not None and (home := of(new.home)) is not new.home:
                new = replace(new, home=home)
            final[value] = new
        return final[value]

    def ref(operand: object) -> object:
        if not isinstance(operand, Ref) or of(operand.value) is operand.value:
            return operand
        return replace(operand, value=of(operand.value))

    def instruction(old: Instruction) -> Instruction:
        ins, outs = tuple(map(ref, old.ins)), tuple(map(of, old.outs))
        unchanged = all(a is b for a, b in zip((*ins, *outs), (*old.ins, *old.outs), strict=True))
        return old if unchanged else replace(old, ins=ins, outs=outs)

    return replace(
        program,
        inputs=[of(value) for value in program.inputs],
        states=[of(value) for value in program.states],
        constants={of(value): data for value, data in program.constants.items()},
        instructions=[instruction(i) for i in program.instructions],
        results=[replace(r, value=of(r.value)) for r in program.results],
    )


def same_memory_layout(a: Value, b: Value) -> bool:
    """True when element for element two values have the same dtype and lie at the same place from their start."""
    x, y = a.spec, b.spec
    return x.shape == y.shape and x.dtype == y.dtype and (x.strides == y.strides or (x.contiguous and y.contiguous))


def same_memory(a: Value, b: Value) -> bool:
    """True when two values fill the same bytes, in the same order or both in row-major order of different shapes."""
    x, y = a.spec, b.spec
    flat = x.contiguous and y.contiguous and x.size == y.size and x.dtype == y.dtype
    return flat or same_memory_layout(a, b)
