"""Dead code: instructions whose outputs nobody needs, stores that are overwritten, constants that nobody reads."""

from __future__ import annotations

from dataclasses import replace

from brim.program.ir import STORE, Instruction, Program, Value

__all__ = ["dead_code"]


def dead_code(program: Program) -> Program:
    """The program without what leads to no result and to no state.

    An instruction stays when it stores, writes at a home, or has an output that a later one (that stays) or a result
    reads; with several outputs, one is enough. Of several stores into one state only the last one counts, because
    nothing may read a state that was stored over.
    """
    needed: set[Value] = {ref.value for ref in program.results}
    overwritten: set[Value] = set()
    kept: list[Instruction] = []
    for instruction in reversed(program.instructions):
        if instruction.op is STORE:
            state, new = (ref.value for ref in instruction.refs)
            if state in overwritten:
                continue
            overwritten.add(state)
            needed.add(new)
        elif any(out.home is not None or out in needed for out in instruction.outs):
            overwritten.update(out.home for out in instruction.outs if out.home is not None)
            needed.update(ref.value for ref in instruction.refs)
        else:
            continue
        kept.append(instruction)
    return replace(
        program,
        instructions=kept[::-1],
        constants={value: data for value, data in program.constants.items() if value in needed},
    )
