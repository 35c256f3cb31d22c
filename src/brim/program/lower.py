"""From a program to kernels and bytes: which kernel runs each instruction, and where everything lies in the arena.

No memory is touched and no kernel runs: a ``Prepared`` program is numbers and records, made on shapes alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from brim.backend import Backend, BoundKernel
from brim.op import REGISTRY
from brim.program.ir import STORE, HostScalar, Instruction, Program, Ref, Value
from brim.program.passes.in_place import in_place
from brim.program.place import MemoryMap, plan_memory
from brim.program.verify import verify
from brim.spec import Spec

__all__ = ["COPY", "Bound", "Pass", "Prepared", "arena_bytes", "bind", "prepare", "scratch_bytes"]

Pass = Callable[[Program], Program]

COPY = REGISTRY["copy"]

_ROUND_BYTES = 64
"""No kernel asks for addresses that are multiples of more."""


@dataclass(eq=False, slots=True)
class Prepared:
    """A program whose every instruction has a kernel and every value its bytes.

    Attributes:
        program: after all passes.
        kernels: one for each instruction.
        memory: offsets and lifetimes in the arena.
        alignment_bytes: of the device.
    """

    program: Program
    kernels: list[BoundKernel]
    memory: MemoryMap
    alignment_bytes: int


def bind(instruction: Instruction, backend: Backend) -> BoundKernel:
    """The backend's kernel for an instruction. Raises KeyError when it has none."""
    if instruction.op is STORE:
        state, new = instruction.ins
        return backend.bind(COPY, [new.spec], [state.spec], {})
    ins = [_operand(i) for i in instruction.ins]
    return backend.bind(instruction.op, ins, [out.spec for out in instruction.outs], instruction.params)


Bound = dict[Instruction, BoundKernel]
"""The kernels of instructions that were bound already."""


def _bind_once(instruction: Instruction, backend: Backend, bound: Bound) -> BoundKernel:
    found = bound.get(instruction)
    if found is None:
        found = bound[instruction] = bind(instruction, backend)
    return found


def scratch_bytes(instruction: Instruction, backend: Backend, bound: Bound) -> int:
    """Working memory of an instruction. Raises KeyError when the backend has no kernel for it."""
    kernel = _bind_once(instruction, backend, bound)
    return kernel.scratch_bytes + kernel.library_bytes


def arena_bytes(program: Program, backend: Backend, bound: Bound) -> int:
    """The arena of a program as it is, placed."""
    return prepare(program, backend, (), check=False, bound=bound).memory.arena_bytes


def _operand(operand: Any) -> Any:
    if isinstance(operand, Ref):
        return operand.spec
    return operand.kind(1) if isinstance(operand, HostScalar) else operand


def _start(ref: Ref) -> int:
    """Bytes from the start of a value, which is aligned, to what is read of it."""
    return ref.offset * ref.spec.dtype.itemsize


def _legalize(program: Program, backend: Backend) -> Program:
    """Copies where a kernel wants row-major inputs, or inputs that start at round addresses, and gets others."""
    out: list[Instruction] = []
    for instruction in program.instructions:
        if any(not ref.spec.contiguous or _start(ref) % _ROUND_BYTES for ref in instruction.refs) and (
            instruction.op is not STORE
        ):
            kernel = bind(instruction, backend)
            flags = (*kernel.contiguous, *(False,) * (len(instruction.ins) - len(kernel.contiguous)))
            ins = list(instruction.ins)
            for position, (needed, operand) in enumerate(zip(flags, instruction.ins, strict=False)):
                if not isinstance(operand, Ref):
                    continue
                off = _start(operand) % kernel.aligned_bytes != 0
                if off or (needed and not operand.spec.contiguous):
                    made = Value(Spec(operand.spec.shape, operand.spec.dtype), op="copy", layer=instruction.layer)
                    made.site = instruction.site
                    out.append(replace(instruction, op=COPY, ins=(operand,), outs=(made,), params={}))
                    ins[position] = Ref.of(made)
            instruction = replace(instruction, ins=tuple(ins))
        out.append(instruction)
    return program.with_instructions(out) if len(out) > len(program.instructions) else program


def prepare(
    program: Program, backend: Backend, passes: Sequence[Pass], *, check: bool = True, bound: Bound | None = None
) -> Prepared:
    """Run the passes, choose kernels, place everything.

    Arguments:
        program: as traced.
        backend: whose kernels are chosen; only asked what they need, nothing runs.
        passes: functions from program to program, in order.
        check: verify the program after every pass.
        bound: kernels that need not be bound again; what is bound here is added.

    Raises:
        ProgramError: a pass made a program that is not well formed.
    """
    if check:
        verify(program)
    for one in passes:
        program = one(program)
        if check:
            verify(program)
    program = _legalize(program, backend)
    known: Bound = {} if bound is None else bound
    program = in_place(program, lambda instruction: _bind_once(instruction, backend, known).aliasing)
    if check:
        verify(program)
    kernels = [_bind_once(instruction, backend, known) for instruction in program.instructions]
    memory = plan_memory(
        program,
        [kernel.scratch_bytes + kernel.library_bytes for kernel in kernels],
        [kernel.aliasing for kernel in kernels],
        backend.alignment_bytes,
    )
    return Prepared(program, kernels, memory, backend.alignment_bytes)
