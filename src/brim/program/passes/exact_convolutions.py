"""Convolutions of a step that was traced for any device, planned for one that does not know the fast algorithm."""

from __future__ import annotations

from dataclasses import replace

from brim.program.ir import Program

__all__ = ["exact_convolutions"]


def exact_convolutions(program: Program) -> Program:
    """The program without the param ``fast`` of convolutions (``brim.set_conv_precision``)."""
    if not any("fast" in i.params and i.op.name.startswith("conv2d") for i in program.instructions):
        return program
    return program.with_instructions(
        [
            replace(i, params={k: v for k, v in i.params.items() if k != "fast"})
            if i.op.name.startswith("conv2d")
            else i
            for i in program.instructions
        ]
    )
