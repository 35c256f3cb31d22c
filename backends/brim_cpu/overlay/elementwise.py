"""Elementwise ops and fused groups on the native interpreter.

What a function computes depends on the function and its dtype alone, never on the group that it is in, so that eager
and planned steps agree to the bit: where a group as a whole is left to NumPy, its exp or tanh still runs natively.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from brim.backend import BoundKernel, ScalarCell
from brim.expr import FusedFormula, ScalarStep
from brim.op import Op, formula_of, is_plain_call
from brim.spec import Scalar, Spec
from brim_cpu import native, scalars
from brim_cpu.fused_code import typed
from brim_cpu.overlay.program import MAX_DIMS, Layout, Lines, code_of, fits, layout, lines_of, math_functions
from brim_cpu.scalars import UFUNCS

__all__ = [
    "Interpreter",
    "Numbers",
    "bind_elementwise",
    "bind_formula",
    "bind_many",
    "broadcast_strides",
    "install",
    "pieces",
    "program_of",
    "renew_before",
]

Array = np.ndarray[Any, Any]
Call = Callable[[], None]

_RUN = native.Function("brim_vm_run", "pppi")
_KEPT_LAYOUTS, _KEPT_PROGRAMS = 256, 1024
_programs: dict[Any, Interpreter | None] = {}  # by formula and dtypes: a step has many of one kind

SMALL_ELEMENTS = 4096
"""Up to so many elements one NumPy call costs less than a native one, where both give the same bits."""
_SAME_BITS = frozenset(("add", "sub", "mul", "div", "neg", "abs", "sqrt", "square", "eq", "ne", "lt", "le", "gt", "ge"))


class Interpreter:
    """A typed formula as a native program, for arrays of any shapes and strides.

    Arguments:
        formula: with conversions spelled out (``fused_code.typed``).
        scalars: which inputs are Python numbers.
        out_dtypes: of the outputs.

    Raises:
        KeyError: the interpreter lacks one of the functions.
    """

    def __init__(self, formula: FusedFormula, scalars: Sequence[bool], out_dtypes: Sequence[np.dtype[Any]]) -> None:
        self.formula, self.scalars, self.out_dtypes = formula, tuple(scalars), tuple(out_dtypes)
        self.ordered = any(step.fn == "uniform" for step in formula.steps)
        self.lines: dict[frozenset[Any], Lines] = {}
        self.layouts: dict[Any, tuple[Lines, Layout]] = {}
        made = lines_of(formula, self.scalars, self.out_dtypes, frozenset())
        if made is None:
            raise KeyError("a function that the interpreter lacks")
        self.lines[frozenset()] = made
        self.arrays = made.arrays

    def call(self, outs: Sequence[Array], ins: Sequence[Any]) -> Call | None:
        """A call that evaluates the formula on these arrays; None where the program gets too large for them."""
        task = self.task(outs, ins, {})
        return None if task is None else _call([task])

    def task(self, outs: Sequence[Array], ins: Sequence[Any], numbers: dict[Any, Numbers]) -> _Task | None:
        """What is to run on these arrays; None where the program gets too large for them.

        Arguments:
            numbers: those of the tasks before, which tasks with the same numbers use too.
        """
        arrays = [ins[n] for n in self.arrays]
        found = self._layout(outs, arrays)
        if found is None:
            return None
        made, plan = found
        key = (id(made), plan.only_chained, *(id(x) for x, scalar in zip(ins, self.scalars) if scalar))
        if key not in numbers:
            numbers[key] = Numbers(made, plan, ins)
        return _Task(plan, numbers[key], [*arrays, *outs])

    def _layout(self, outs: Sequence[Array], arrays: Sequence[Array]) -> tuple[Lines, Layout] | None:
        key: Any = tuple((array.shape, array.strides, native.pointer(array)) for array in (*arrays, *outs))
        aliases = frozenset(
            (o, self.arrays[i])
            for o, out in enumerate(key[len(arrays) :])
            for i, given in enumerate(key[: len(arrays)])
            if out[2] == given[2]
        )
        key = (aliases, *((shape, strides) for shape, strides, _ in key))
        found = self.layouts.get(key)
        if found is None:
            made = self.lines.get(aliases)
            if made is None:
                made = lines_of(self.formula, self.scalars, self.out_dtypes, aliases)
                if made is None:
                    return None
                self.lines[aliases] = made
            shape = outs[0].shape
            every = (*arrays, *outs)
            steps = [broadcast_strides(array, len(shape)) for array in every]
            updated = [any(o == out for out, _ in aliases) for o in range(len(outs))]
            plan = layout(made, shape, [array.itemsize for array in every], steps, self.ordered, updated)
            if plan is None:
                return None
            if len(self.layouts) >= _KEPT_LAYOUTS:
                self.layouts.clear()
            found = self.layouts[key] = (made, plan)
        return found


def broadcast_strides(array: Array, ndim: int) -> tuple[int, ...]:
    """Strides in bytes that read an array in the outputs' shape."""
    own = tuple(0 if dim == 1 else step for dim, step in zip(array.shape, array.strides))
    return (0,) * (ndim - array.ndim) + own


def _as(dtype: np.dtype[Any], value: Any) -> Any:
    """A Python number in a dtype; an integer that does not fit raises OverflowError."""
    return dtype.type(int(value) if dtype.kind == "u" and dtype.itemsize == 8 else value)


class Numbers:
    """A program's constants as vm.cpp reads them.

    Attributes:
        cells: those that are read anew at each run.
    """

    def __init__(self, made: Lines, plan: Layout, ins: Sequence[Any]) -> None:
        self.given, self.cells = ins, list[_Cell]()
        self.values = np.zeros(max(1, len(made.constants)), np.uint64)
        self.table = np.zeros((len(self.values), 3), np.int64)
        for n, (slot, dtype, value, source) in enumerate(made.constants):
            place = self.values[n : n + 1]
            self.table[n] = slot, plan.only_chained[n], native.pointer(place)
            given = value if source is None else ins[source]
            if isinstance(given, ScalarCell):
                self.cells.append(_Cell(given, dtype, place, self.table[n]))
            else:
                place.view(dtype)[0] = _as(dtype, given)


class _Task:
    """A program with the arrays and numbers that it runs on; ``record`` has the addresses that vm.cpp reads."""

    def __init__(self, plan: Layout, numbers: Numbers, operands: Sequence[Array]) -> None:
        self.plan, self.numbers, self.operands = plan, numbers, operands
        self.bases = np.array([native.pointer(array) for array in operands], np.int64)
        parts = (plan.header, plan.arrays, plan.registers, numbers.table, plan.lines, plan.links, self.bases)
        self.record = [native.pointer(part) for part in parts]


class _Cell:
    """A cell's number in memory that native code reads; ``last`` is what was written there."""

    __slots__ = ("cell", "dtype", "last", "memory", "row")

    def __init__(self, cell: ScalarCell, dtype: np.dtype[Any], memory: Array, row: Array) -> None:
        self.cell, self.dtype, self.last, self.memory, self.row = cell, dtype, object(), memory, row

    def write(self, value: Any) -> None:
        self.memory.view(self.dtype)[0] = _as(self.dtype, value)
        self.last = value


class _Cells:
    """The float32 cells of a call side by side in memory: written at once, in a quarter of the time of one by one."""

    def __init__(self, cells: Sequence[_Cell]) -> None:
        self.cells = [cell.cell for cell in cells]
        self.memory = np.zeros(max(1, len(cells)), np.uint64)
        self.struct = struct.Struct("=" + "f4x" * len(cells))
        for n, cell in enumerate(cells):
            cell.row[2] = native.pointer(self.memory[n : n + 1])

    def write(self) -> None:
        numbers = [cell.value for cell in self.cells]
        try:
            self.struct.pack_into(self.memory.data, 0, *numbers)
        except OverflowError:  # struct refuses what NumPy rounds to infinity
            with np.errstate(over="ignore"):
                self.memory.view(np.float32)[::2] = np.array(numbers, np.float64)


def pieces(tasks: Sequence[_Task]) -> tuple[list[tuple[int, int, int]], list[int]]:
    """Spans (number of the task, first block, the block after the last), and the spans at which pieces start or end."""
    spans, starts, filled = list[tuple[int, int, int]](), [0], 0.0
    call_bytes = sum(task.plan.elements * task.plan.element_bytes for task in tasks)
    for n, task in enumerate(tasks):
        step = task.plan.piece_chunks(call_bytes)
        for begin in range(0, task.plan.chunks, step):
            end = min(begin + step, task.plan.chunks)
            spans.append((n, begin, end))
            filled += (end - begin) / step
            if filled > 0.75:  # small spans make a piece together
                starts.append(len(spans))
                filled = 0.0
    if starts[-1] != len(spans):
        starts.append(len(spans))
    return spans, starts


def _call(tasks: Sequence[_Task]) -> Call:
    """One call that runs all tasks, cut into pieces over all of them."""
    spans, starts = pieces(tasks)
    records, ranges = np.array([task.record for task in tasks], np.int64), np.array(spans, np.int64)
    call = _RUN.bind(records, ranges, np.array(starts, np.int64), len(starts) - 1)
    call.keeps += (tasks,)
    renew_before(call, list(dict.fromkeys(cell for task in tasks for cell in task.numbers.cells)))
    return call


def renew_before(call: Any, cells: Sequence[_Cell]) -> None:
    """Write the numbers of these cells anew before each run of a bound call."""
    floats = _Cells([cell for cell in cells if cell.dtype == np.float32])
    others = [cell for cell in cells if cell.dtype != np.float32]
    if floats.cells:
        call.keeps += (floats,)
        call.renewals.append(floats.write)
    if others:

        def renew() -> None:
            for cell in others:
                value = cell.cell.value
                if value is not cell.last:
                    cell.write(value)

        call.renewals.append(renew)


def bind_formula(
    formula: FusedFormula, ins: Sequence[Spec | Scalar], outs: Sequence[Spec], small: Callable[..., None] | None = None
) -> BoundKernel | None:
    """The native kernel of a fused group; None where NumPy's is to run.

    Arguments:
        small: a NumPy kernel that gives the same bits, for few elements.
    """
    program = program_of(formula, ins, outs)
    if program is None:
        return None
    size = outs[0].size

    def prepare(out: Any, *given: Any, scratch: Any = None, **params: Any) -> list[Call]:
        if size == 0:
            return []
        call = program.call(out if isinstance(out, tuple) else (out,), given)
        assert call is not None  # the room is enough for operands of any layout
        return [call]

    def run(out: Any, *given: Any, scratch: Any = None, **params: Any) -> None:
        for call in prepare(out, *given):
            call()

    use_small = small is not None and size <= SMALL_ELEMENTS
    return BoundKernel(small if use_small and small is not None else run, aliasing=True, prepare=prepare)


def program_of(formula: FusedFormula, ins: Sequence[Spec | Scalar], outs: Sequence[Spec]) -> Interpreter | None:
    """The program for operands of these specs; None where NumPy's kernel is to run."""
    if not native.available() or outs[0].ndim > MAX_DIMS:
        return None
    out_dtypes = [out.dtype for out in outs]
    kinds = _kinds(ins)
    steps = [(step.fn, step.dtype, step.compute, repr(step.args)) for step in formula.steps]  # 0.0 equals -0.0
    key = (*steps, formula.outputs, *kinds, None, *out_dtypes)
    if key not in _programs:
        if len(_programs) >= _KEPT_PROGRAMS:
            _programs.clear()
        _programs[key] = _made(typed(formula, ins), kinds, out_dtypes)
    return _programs[key]


def _made(
    formula: FusedFormula, kinds: Sequence[np.dtype[Any] | None], out_dtypes: Sequence[np.dtype[Any]]
) -> Interpreter | None:
    try:
        program = Interpreter(formula, [kind is None for kind in kinds], out_dtypes)
    except KeyError:
        return None
    dtypes = [kind for kind in (*kinds, *out_dtypes) if kind is not None]
    return program if fits(program.lines[frozenset()], [dtype.itemsize for dtype in dtypes]) else None


def _kinds(ins: Sequence[Spec | Scalar]) -> tuple[np.dtype[Any] | None, ...]:
    """Equal for operands that one program serves."""
    return tuple(x.dtype if isinstance(x, Spec) else None for x in ins)


def bind_elementwise(
    op: Op, ins: Sequence[Spec | Scalar], out: Spec, params: dict[str, Any], direct: Callable[..., None] | None
) -> BoundKernel | None:
    """The native kernel of an elementwise op; None where NumPy's is to run."""
    plain = is_plain_call(op.formula) if op.formula is not None else False
    same = plain and op.formula.fn in _SAME_BITS  # type: ignore[union-attr]
    return bind_formula(formula_of(op, ins, out, params), ins, (out,), direct if same else None)


def bind_many(
    ins: Sequence[Spec | Scalar], outs: Sequence[Spec], formula: FusedFormula, count: int, shared: int
) -> BoundKernel | None:
    """The kernel of one formula on many groups of arrays, in one call; the first inputs are shared."""
    own, made = (len(ins) - shared) // count, len(outs) // count

    def cut(out: Sequence[Any], given: Sequence[Any]) -> Iterator[tuple[tuple[Any, ...], tuple[Any, ...]]]:
        for n in range(count):
            first = shared + n * own
            yield tuple(out[n * made : (n + 1) * made]), (*given[:shared], *given[first : first + own])

    parts = list(cut(outs, ins))
    programs = [program_of(formula, given, out) for out, given in parts]
    if None in programs:
        return None

    def prepare(out: Any, *given: Any, scratch: Any = None, **params: Any) -> list[Call]:
        tasks, numbers = list[_Task](), dict[Any, Numbers]()
        for program, (into, operands) in zip(programs, cut(out if isinstance(out, tuple) else (out,), given)):
            if into[0].size and program is not None:
                task = program.task(into, operands, numbers)
                assert task is not None  # the room is enough for operands of any layout
                tasks.append(task)
        return [_call(tasks)] if tasks else []

    def run(out: Any, *given: Any, scratch: Any = None, **params: Any) -> None:
        for call in prepare(out, *given):
            call()

    return BoundKernel(run, aliasing=True, prepare=prepare)


class _OneFunction:
    """A native function on whole arrays, called as a ufunc is: ``f(*arguments, out)``."""

    def __init__(self, fn: str, dtype: np.dtype[Any], arguments: int) -> None:
        step = ScalarStep(fn, dtype, tuple(("in", n) for n in range(arguments)), dtype)
        assert code_of(step) is not None
        self.dtype = dtype
        self.program = Interpreter(FusedFormula((step,), (0,)), [False] * arguments, [dtype])

    def __call__(self, *operands: Any) -> None:
        *arguments, out = operands
        if out.size:
            call = self.program.call([out], [np.asarray(x, self.dtype) for x in arguments])
            assert call is not None
            call()


def install() -> None:
    """Let NumPy's evaluator call native functions where their bits differ from NumPy's."""
    if scalars.NATIVE or not native.available():
        return
    dtype = np.dtype("float32")
    for fn in math_functions():
        arguments = UFUNCS[fn].nin if fn in UFUNCS else 1
        scalars.NATIVE[fn, dtype] = _OneFunction(fn, dtype, arguments)
