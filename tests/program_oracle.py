"""Programs run the plain way, for tests: one NumPy array a value, one kernel call an instruction, nothing clever.

``run_program`` is the reference that passes and the real runner are compared with. It can also run a program in the
memory that ``plan_memory`` gave it, where a wrong lifetime or a wrong sharing destroys a value that is still needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

import brim
from brim.backend import BoundKernel
from brim.expr import FusedFormula
from brim.op import REGISTRY
from brim.program.ir import FUSED, FUSED_MANY, STORE, HostScalar, Instruction, Program, Ref, Value, parts_of
from brim.program.norm_groups import is_fused_norm, norm_group
from brim.program.passes.loss_gradient import CROSS_ENTROPY_WITH_GRAD
from brim.program.place import MemoryMap
from brim.program.verify import verify
from brim.random import philox
from brim.spec import DTYPES, Spec
from brim_cpu import backend
from brim_cpu.scalars import NATIVE
from random_programs import random_arrays

__all__ = ["Outcome", "evaluate_fused", "kernels_of", "run_program"]

Array = np.ndarray[Any, Any]

CPU = backend()
_POISON = 0xC3  # memory that nobody has written holds this byte


@dataclass
class Outcome:
    """What a run leaves behind, all copies.

    Attributes:
        results: one array a result.
        states: the value of each state after the run.
        values: every value, as it was when it was written (inputs, states and constants as they were before).
    """

    results: list[Array]
    states: dict[Value, Array]
    values: dict[Value, Array] = field(default_factory=dict)


def run_program(
    program: Program,
    given: Mapping[Value, Any],
    memory: MemoryMap | None = None,
    scalars: Mapping[int, Any] | None = None,
) -> Outcome:
    """Run a program on NumPy arrays.

    Arguments:
        program: anything that ``verify`` accepts.
        given: an array for each input and state.
        memory: None gives every value memory of its own, also those with a home. A map puts values and scratch at its
            offsets of one arena, and values with a home into their state's memory.
        scalars: id of a host scalar -> its number, instead of calling ``read``.
    """
    run = _Run(program, memory)
    for value in (*program.inputs, *program.states):
        run.put(value, given[value])
    for value, data in program.constants.items():
        run.put(value, data)
    numbers: dict[int, Any] = {}
    for scalar in program.scalars():
        args = [numbers[id(a)] if isinstance(a, HostScalar) else a for a in scalar.args]
        chosen = scalars is not None and id(scalar) in scalars
        numbers[id(scalar)] = scalars[id(scalar)] if chosen else scalar.read(*args)  # type: ignore[index]
    with np.errstate(all="ignore"):  # inf and nan are numbers like others, as on every device
        for n, instruction in enumerate(program.instructions):
            run.step(n, instruction, numbers)
    results = [run.array(ref).copy() for ref in program.results]
    states = {state: run.array(Ref(run.lies_in.get(state, state), state.spec)).copy() for state in program.states}
    return Outcome(results, states, run.log)


def changed_by(one_pass: Callable[[Program], Program], program: Program) -> Program:
    """A program after a pass, checked: well formed, the argument unchanged, the same results and states to the bit."""
    text = str(program)
    after = one_pass(program)
    assert str(program) == text
    verify(after)
    arrays = random_arrays(program)
    wanted, found = run_program(program, arrays), run_program(after, arrays)
    for a, b in zip(wanted.results, found.results, strict=True):
        np.testing.assert_array_equal(a, b)
    for state in program.states:
        np.testing.assert_array_equal(wanted.states[state], found.states[state])
    return after


def kernels_of(program: Program) -> list[BoundKernel | None]:
    """The CPU kernel of each instruction; None for those that the interpreter evaluates itself."""
    return [_kernel(instruction) for instruction in program.instructions]


def _kernel(instruction: Instruction) -> BoundKernel | None:
    if instruction.op in (STORE, FUSED, FUSED_MANY):
        return None
    ins = [i.spec if isinstance(i, Ref) else i.kind(1) if isinstance(i, HostScalar) else i for i in instruction.ins]
    try:
        return CPU.bind(instruction.op, ins, [out.spec for out in instruction.outs], instruction.params)
    except KeyError:
        return None


class _Run:
    def __init__(self, program: Program, memory: MemoryMap | None) -> None:
        self.memory = memory
        self.arena = _poisoned(memory.arena_bytes if memory is not None else 0)
        self.own: dict[Value, Array] = {}
        self.outside = {*program.states, *program.constants}
        self.lies_in: dict[Value, Value] = {}  # state -> the value that is its newest, where it has memory of its own
        self.log: dict[Value, Array] = {}

    def bytes_of(self, value: Value) -> Array:
        """The memory of a value, flat."""
        if self.memory is not None and value.home is not None:
            return self.bytes_of(value.home)
        if self.memory is not None and value not in self.outside:
            at = self.memory.offset_bytes(value)
            assert at + value.nbytes <= len(self.arena), "a value lies outside of the arena"
            return self.arena[at : at + value.nbytes]
        if value not in self.own:
            self.own[value] = _poisoned(value.nbytes)
        return self.own[value]

    def array(self, ref: Ref) -> Array:
        return CPU.view(self.bytes_of(ref.value), ref.offset * ref.spec.dtype.itemsize, ref.spec)

    def put(self, value: Value, data: Any) -> None:
        np.copyto(self.array(Ref.of(value)), data)
        self.log[value] = np.array(data, value.spec.dtype).reshape(value.spec.shape)

    def step(self, n: int, instruction: Instruction, numbers: dict[int, Any]) -> None:
        ins = [
            self.array(i) if isinstance(i, Ref) else numbers[id(i)] if isinstance(i, HostScalar) else i
            for i in instruction.ins
        ]
        if instruction.op is STORE:
            state = instruction.ins[0].value
            np.copyto(self.array(instruction.ins[0]), ins[1])
            self.lies_in.pop(state, None)
            return
        if instruction.op is FUSED_MANY:
            # The parts run in any order, each evaluated apart, then written.
            for part in reversed(parts_of(instruction)):
                self.step(n, replace(instruction, op=FUSED, ins=part[0], outs=part[1]), numbers)
            return
        outs = [self.array(Ref.of(out)) for out in instruction.outs]
        kernel = _kernel(instruction)
        if kernel is None:
            # Evaluated apart, then written: as safe for outputs in the memory of inputs as a kernel that may alias.
            made = evaluate(instruction, ins, [out.spec for out in instruction.outs])
            for out, result in zip(outs, made, strict=True):
                np.copyto(out, result)
        else:
            scratch = self.scratch(n, kernel)
            flags = (*kernel.contiguous, *(False,) * len(ins))
            args = [np.ascontiguousarray(x) if flags[k] and isinstance(x, np.ndarray) else x for k, x in enumerate(ins)]
            target = outs[0] if len(outs) == 1 else tuple(outs)
            kernel.run(target, *args, scratch=scratch, **instruction.params)
        for value, out in zip(instruction.outs, outs, strict=True):
            self.log[value] = out.copy()
            if value.home is not None and self.memory is None:
                self.lies_in[value.home] = value

    def scratch(self, n: int, kernel: BoundKernel) -> Array | None:
        if not kernel.scratch_bytes:
            return None
        if self.memory is None:
            return _poisoned(kernel.scratch_bytes)
        at = self.memory.scratch_offset_bytes(n)
        scratch = self.arena[at : at + kernel.scratch_bytes]
        scratch[:] = _POISON
        return scratch


def _poisoned(nbytes: int) -> Array:
    memory = CPU.allocate(0, nbytes)
    memory[:] = _POISON
    return memory


def evaluate(instruction: Instruction, ins: list[Any], outs: list[Spec]) -> list[Array]:
    """The outputs of a fused group, or of a composite by its body."""
    if instruction.op is FUSED:
        return evaluate_fused(instruction.params["formula"], ins, outs)
    if instruction.op is CROSS_ENTROPY_WITH_GRAD:
        return evaluate_loss(instruction, ins, outs)
    if is_fused_norm(instruction):
        return evaluate_norm(instruction, ins, outs)
    args = [brim.asarray(np.ascontiguousarray(x)) if isinstance(x, np.ndarray) else x for x in ins]
    made = instruction.op(*args, **instruction.params)
    return [t.array for t in (made if isinstance(made, tuple) else (made,))]


def evaluate_loss(instruction: Instruction, ins: list[Any], outs: list[Spec]) -> list[Array]:
    """The loss, then its gradient."""
    x, index, g = ins
    forward, gradient = REGISTRY["cross_entropy"], REGISTRY["cross_entropy_grad"]
    specs = forward.infer([_operand(x), _operand(index)], instruction.params)
    losses, *sums = _run_alone(Instruction(forward, (), (), instruction.params), [x, index], list(specs))
    given = [np.ascontiguousarray(g), x, index, *sums]
    return [losses, *_run_alone(Instruction(gradient, (), (), instruction.params), given, outs[1:])]


def evaluate_norm(instruction: Instruction, ins: list[Any], outs: list[Spec]) -> list[Array]:
    """The outputs of a norm with formulas: formula, norm, formula, each by itself."""
    shape = instruction.params["shape"]
    group = norm_group(instruction.op.name, ins, outs, instruction.params)
    wanted = [Spec(shape, group.first_dtype), *group.kept]
    first, *kept = evaluate_fused(group.before, list(group.others), wanted)
    norm = Instruction(group.norm, (), (), group.params)
    specs = group.norm.infer([Spec(shape, group.first_dtype), *map(_operand, group.own)], group.params)
    made, *rest = _run_alone(norm, [first, *group.own], list(specs))
    return [*evaluate_fused(group.after, [made, *group.others], list(group.made)), *kept, *rest]


def _operand(x: Any) -> Any:
    return Spec(x.shape, x.dtype) if isinstance(x, np.ndarray) else x


def _run_alone(instruction: Instruction, ins: list[Any], outs: list[Spec]) -> list[Array]:
    """One op by its kernel, or by its body where it has none."""
    try:
        kernel = CPU.bind(instruction.op, list(map(_operand, ins)), outs, instruction.params)
    except KeyError:
        return evaluate(instruction, ins, outs)
    made = [np.empty(out.shape, out.dtype) for out in outs]
    scratch = _poisoned(kernel.scratch_bytes) if kernel.scratch_bytes else None
    kernel.run(made[0] if len(made) == 1 else tuple(made), *ins, scratch=scratch, **instruction.params)
    return made


def evaluate_fused(formula: FusedFormula, ins: list[Any], outs: list[Spec]) -> list[Array]:
    """The outputs of a fused formula, one NumPy call a step on whole arrays; half precision is computed in float32.

    Arguments:
        formula: its inputs are numbered as ``ins``.
        ins: arrays that broadcast to the outputs' shape, and Python numbers.
        outs: one spec an output.
    """
    shape = outs[0].shape
    made: list[Array] = []

    def operand(arg: tuple[str, Any], dtype: np.dtype[Any]) -> Any:
        source, which = arg
        x = which if source == "const" else ins[which] if source == "in" else made[which]
        if isinstance(x, np.ndarray):
            return np.broadcast_to(x, shape).astype(dtype)
        return np.full(shape, x, dtype)

    for step in formula.steps:
        if step.fn == "uniform":
            seed, counter = (int(np.asarray(ins[w] if s == "in" else w)) for s, w in step.args)
            made.append(np.random.Generator(philox(seed, counter)).random(shape, np.float32))
            continue
        if step.fn == "cast":
            made.append(operand(step.args[0], step.compute).astype(step.dtype))
            continue
        half = step.compute in (DTYPES["float16"], DTYPES["bfloat16"])
        compute = DTYPES["float32"] if half else step.compute
        args = [operand(arg, compute) for arg in step.args]
        if step.fn == "where":
            args[0] = operand(step.args[0], DTYPES["bool"])
        with np.errstate(all="ignore"):
            out = np.asarray(_function(step.fn, compute)(*args))
        made.append(out.astype(step.dtype))
    return [made[number] for number in formula.outputs]


_NUMPY_NAMES = {
    "sub": "subtract",
    "mul": "multiply",
    "div": "true_divide",
    "floordiv": "floor_divide",
    "mod": "remainder",
    "pow": "power",
    "atan2": "arctan2",
    "max": "maximum",
    "min": "minimum",
    "bitand": "bitwise_and",
    "bitor": "bitwise_or",
    "bitxor": "bitwise_xor",
    "bitnot": "invert",
    "shl": "left_shift",
    "shr": "right_shift",
    "neg": "negative",
    "round": "rint",
    "asin": "arcsin",
    "acos": "arccos",
    "atan": "arctan",
    "asinh": "arcsinh",
    "acosh": "arccosh",
    "atanh": "arctanh",
    "eq": "equal",
    "ne": "not_equal",
    "lt": "less",
    "le": "less_equal",
    "gt": "greater",
    "ge": "greater_equal",
    "and": "logical_and",
    "or": "logical_or",
    "xor": "logical_xor",
    "not": "logical_not",
    "identity": "array",
}


def _native(function: Any, *args: Array) -> Array:
    out = np.empty_like(args[0])
    function(*args, out)
    return out


def _function(fn: str, compute: np.dtype[Any]) -> Any:
    """A scalar function of ``brim.expr`` on whole arrays; where it is native, with the native one's last bits."""
    if (fn, compute) in NATIVE:
        return partial(_native, NATIVE[fn, compute])
    if fn == "rsqrt":
        return lambda x: compute.type(1) / np.sqrt(x)
    if fn == "erf":
        return lambda x: np.vectorize(math.erf, otypes=["f8"])(x)
    if fn in ("floor", "ceil", "trunc", "round") and compute.kind in "biu":
        return np.array
    return getattr(np, _NUMPY_NAMES.get(fn, fn))
