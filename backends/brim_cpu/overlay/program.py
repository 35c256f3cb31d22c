"""From a fused formula to a program of the native interpreter (native/vm.cpp): numbered lines, registers, strides."""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from brim.expr import SCALAR_FUNCTIONS, FusedFormula, ScalarStep
from brim_cpu import native
from brim_cpu.overlay.chains import Chains, Line, chains_of, depth_first, link_codes

__all__ = [
    "MAX_DIMS",
    "STREAM_BYTES",
    "Layout",
    "Lines",
    "code_of",
    "completed_for_tiles",
    "fits",
    "layout",
    "lines_of",
    "math_functions",
]

_NAMES = {
    "float32": "f32",
    "float64": "f64",
    "float16": "f16",
    "bfloat16": "bf16",
    "int32": "i32",
    "int64": "i64",
    "uint8": "u8",
    "bool": "bool",
}
_UNIFORM = -1
MAX_DIMS, _MAX_SLOTS, _MAX_LINES = 8, 96, 512
_BLOCKS = (1024, 512, 256, 128)
_REGISTER_BYTES = 64 * 1024
_CHUNKS, _TAILS, _SEAMLESS, _COMPLETED = 18, 20, 21, 7  # places in a header; how many words vm.cpp fills
_CACHE_BYTES = 24 * 1024
"""What registers may take of a first-level cache; operands stream through the rest."""

_ROUNDING = frozenset(("floor", "ceil", "trunc", "round"))
STREAM_BYTES = 8 * 1024 * 1024
"""Larger outputs are collected in a register and written past the caches (kStreamBytes of simd.hpp)."""
CHAINS = True
"""False: every line runs by itself. The results are the same; tests compare them."""
PREFETCH_ELEMENTS = 1 << 15
"""Chains ask ahead for arrays of at least so many elements: smaller ones are mostly in a near cache."""
PREFETCH_BYTES = 2048
"""How far ahead: with 1.5 to 3 KiB an update of parameters in main memory takes 0.65 to 0.8 of the time without."""
PIECE_ELEMENTS, PIECE_BYTES, PIECE_BYTES_MAX = 16 * 1024, 128 * 1024, 4 * 1024 * 1024
"""What one thread takes at a time of a small call: so many elements, fewer where an element is many bytes, because
threads wait for each other's last piece; and at most of a large one, in bytes of all arrays together."""
PIECES, MAX_PIECES = 256, 4096
"""A large call is cut into PIECES, as far as they are not too large: each starts reading every array anew, and where
they lie in main memory pieces of 128 KiB take 1.4 times as long as those of 1 MiB. Never into more than MAX_PIECES."""
MATH_TABLE = 3
"""Number of the table of vm.cpp whose functions differ from NumPy's in their last bits."""


@functools.cache
def _codes() -> dict[str, int]:
    """Code of each instruction by its name."""
    room = ctypes.create_string_buffer(1 << 16)
    native.Function("brim_vm_names", "pi").bind(ctypes.addressof(room), len(room))()
    pairs = (line.split() for line in room.value.decode().splitlines())
    return {name: int(code) for code, name in pairs}


def math_functions() -> list[str]:
    """Names of the float32 functions that are computed natively in other ways than NumPy computes them."""
    return [name.partition(".")[0] for name, code in _codes().items() if code >> 16 == MATH_TABLE]


@dataclass
class Lines:
    """A formula's instructions. Slots: the arrays (inputs that are no scalars, then outputs), then registers.

    Attributes:
        lines: (code, d, a, b, c) each.
        registers: itemsize of each.
        constants: (slot, or -1 for a seed or counter; dtype; the value, or None; number of the input, or None).
        late: for each output, whether it must be written after the whole block.
        chains: which lines run as chains.
    """

    arrays: list[int]
    late: list[bool]
    lines: list[Line] = field(default_factory=list)
    registers: list[int] = field(default_factory=list)
    constants: list[tuple[int, np.dtype[Any], Any, int | None]] = field(default_factory=list)
    chains: Chains = field(default_factory=Chains)

    def add_chains(self) -> None:
        """Find the chains, once all lines are there."""
        numbers = {slot: number for number, (slot, *_) in enumerate(self.constants) if slot >= 0}
        self.chains = chains_of(self.lines, _codes(), numbers, len(self.arrays), len(self.late))

    def only_chained(self) -> list[bool]:
        """For each constant, whether nobody but chains reads it."""
        inside = {n for start, (count, _) in self.chains.at.items() for n in range(start, start + count)}
        others = {slot for n, line in enumerate(self.lines) if n not in inside for slot in line[2:]}
        return [slot not in others for slot, *_ in self.constants]


def code_of(step: ScalarStep) -> int | None:
    """The instruction of a typed step (``fused_code.typed``); None where the interpreter has none."""
    if step.fn == "uniform":
        return _UNIFORM
    compute, dtype = _NAMES.get(step.compute.name), _NAMES.get(step.dtype.name)
    if compute is None or dtype is None:
        return None
    if step.fn == "where":
        return _codes().get(f"where.{step.dtype.itemsize}")
    copies = step.fn in ("cast", "identity") or (step.fn in _ROUNDING and step.compute.kind in "biu")
    if copies and step.compute == step.dtype:
        return _codes().get(f"copy.{step.dtype.itemsize}")
    if step.fn == "cast":
        return _codes().get(f"cast.{compute}.{dtype}")
    expected = "bool" if SCALAR_FUNCTIONS[step.fn][1] == "bool" else compute
    return _codes().get(f"{step.fn}.{compute}") if dtype == expected else None


def lines_of(
    formula: FusedFormula, scalars: Sequence[bool], out_dtypes: Sequence[np.dtype[Any]], aliases: frozenset[Any]
) -> Lines | None:
    """The program of a typed formula; None where the interpreter lacks a function or has too little room.

    Arguments:
        formula: with conversions spelled out (``fused_code.typed``).
        scalars: which inputs are Python numbers.
        out_dtypes: of the outputs.
        aliases: pairs (output, input) that are the same memory, element for element.
    """
    formula = depth_first(formula)
    codes = [code_of(step) for step in formula.steps]
    if None in codes or any(formula.steps[n].dtype != dtype for n, dtype in zip(formula.outputs, out_dtypes)):
        return None
    writer = _Writer(formula, scalars, aliases)
    for number, code in enumerate(codes):
        assert code is not None
        writer.add(number, code)
    made = writer.made
    fits = len(made.arrays) + len(made.late) + len(made.registers) <= _MAX_SLOTS and len(made.lines) <= _MAX_LINES
    if not fits:
        return None
    if CHAINS:
        made.add_chains()
    return made


def fits(made: Lines, itemsizes: Sequence[int]) -> bool:
    """Whether there is room where every array, of these itemsizes, needs a register of its own."""
    slots = 2 * len(itemsizes) + len(made.registers)
    return slots <= _MAX_SLOTS and (sum(itemsizes) + sum(made.registers)) * _BLOCKS[-1] <= _REGISTER_BYTES


class _Writer:
    def __init__(self, formula: FusedFormula, scalars: Sequence[bool], aliases: frozenset[Any]) -> None:
        self.formula, self.aliases = formula, aliases
        arrays = [n for n, scalar in enumerate(scalars) if not scalar]
        self.made = Lines(arrays, [False] * len(formula.outputs))
        self.slot_of_input = {n: slot for slot, n in enumerate(arrays)}
        self.first_register = len(arrays) + len(formula.outputs)
        self.place: list[int] = []
        self.free: dict[int, list[int]] = {}
        self.constants: dict[Any, int] = {}
        self.uses = [0] * len(formula.steps)
        for step in formula.steps:
            for kind, which in step.args:
                if kind == "step":
                    self.uses[which] += 1

    def add(self, number: int, code: int) -> None:
        step = self.formula.steps[number]
        if code == _UNIFORM:
            args = [self.number(step, n) for n in range(2)]
        else:
            args = [self.operand(step, n) for n in range(len(step.args))]
        outputs = [self.first_output() + o for o, which in enumerate(self.formula.outputs) if which == number]
        dying = self.dying(step)
        if outputs:
            d = outputs[0]
        else:  # in place where an argument of that size is read for the last time
            fit = [slot for slot in dying if self.itemsize(slot) == step.dtype.itemsize]
            d = fit[0] if fit else self.take(step.dtype.itemsize)
        self.emit(code, d, args)
        for other in outputs[1:]:
            self.emit(_codes()[f"copy.{step.dtype.itemsize}"], other, [d])
        for output in outputs:
            self.made.late[output - self.first_output()] = self.read_later(number, output - self.first_output())
        for slot in dying:
            if slot != d:
                self.free.setdefault(self.itemsize(slot), []).append(slot)
        self.place.append(d)

    def emit(self, code: int, d: int, args: Sequence[int]) -> None:
        a, b, c = (*args, *(d,) * (3 - len(args)))
        self.made.lines.append((code, d, a, b, c))

    def read_later(self, number: int, output: int) -> bool:
        """Whether an input that lies where this output lies is read after the step."""
        later = [arg for step in self.formula.steps[number + 1 :] for arg in step.args]
        return any(kind == "in" and (output, which) in self.aliases for kind, which in later)

    def first_output(self) -> int:
        return len(self.made.arrays)

    def itemsize(self, slot: int) -> int:
        return self.made.registers[slot - self.first_register]

    def take(self, itemsize: int) -> int:
        free = self.free.get(itemsize)
        if free:
            return free.pop()
        self.made.registers.append(itemsize)
        return self.first_register + len(self.made.registers) - 1

    def dying(self, step: ScalarStep) -> list[int]:
        """Registers that nobody reads after this step."""
        slots = []
        for kind, which in step.args:
            if kind == "step":
                self.uses[which] -= 1
                if self.uses[which] == 0 and self.place[which] >= self.first_register:
                    slots.append(self.place[which])
        return slots

    def operand(self, step: ScalarStep, n: int) -> int:
        kind, which = step.args[n]
        if kind == "step":
            return self.place[which]
        if kind == "in" and which in self.slot_of_input:
            return self.slot_of_input[which]
        dtype = np.dtype(bool) if step.fn == "where" and n == 0 else step.compute
        key = (kind, repr(which), dtype)
        if key not in self.constants:
            self.made.registers.append(dtype.itemsize)  # never reused: it keeps its value from block to block
            self.constants[key] = slot = self.first_register + len(self.made.registers) - 1
            value, source = (None, which) if kind == "in" else (which, None)
            self.made.constants.append((slot, dtype, value, source))
        return self.constants[key]

    def number(self, step: ScalarStep, n: int) -> int:
        """A seed or counter: the number of its constant."""
        kind, which = step.args[n]
        value, source = (None, which) if kind == "in" else (which, None)
        self.made.constants.append((-1, np.dtype("uint64"), value, source))
        return len(self.made.constants) - 1


@dataclass(frozen=True)
class Layout:
    """A program for arrays of certain shapes and strides, as the arrays of int64 that vm.cpp reads.

    Attributes:
        chunks: how many blocks it takes.
        elements: of the formula.
        element_bytes: of all arrays, for one element.
        seamless: the blocks of a piece are run as one.
    """

    header: np.ndarray[Any, Any]
    arrays: np.ndarray[Any, Any]
    registers: np.ndarray[Any, Any]
    lines: np.ndarray[Any, Any]
    links: np.ndarray[Any, Any]
    only_chained: tuple[bool, ...]
    chunks: int
    elements: int
    element_bytes: int
    seamless: bool

    def piece_chunks(self, call_bytes: int) -> int:
        """How many blocks one thread takes at a time, in a call that works on so many bytes."""
        elements = PIECE_ELEMENTS
        if self.elements > PIECE_ELEMENTS:
            least = min(PIECE_ELEMENTS, PIECE_BYTES // self.element_bytes)
            most = max(PIECE_BYTES_MAX, call_bytes // MAX_PIECES) // self.element_bytes
            elements = max(min(call_bytes // PIECES // self.element_bytes, most), least, _BLOCKS[0])
        return max(1, -(-elements * self.chunks // max(1, self.elements)))


def layout(
    made: Lines,
    shape: tuple[int, ...],
    itemsizes: Sequence[int],
    strides: Sequence[tuple[int, ...]],
    logical_order: bool,
    updated: Sequence[bool],
) -> Layout | None:
    """Complete a program for arrays of these strides (in bytes, one for each axis of ``shape``); None without room.

    Arguments:
        itemsizes, strides: of the arrays, outputs last.
        logical_order: elements must be visited in row-major order of ``shape``, because their numbers matter.
        updated: for each output, whether it lies where an input lies: then it is in the caches when it is written.
    """
    merged_shape, merged = _merge(shape, strides, logical_order)
    if len(merged_shape) > MAX_DIMS:
        return None
    first_output, size = len(made.arrays), math.prod(shape)
    registers = list(made.registers)
    rows, count = [], len(itemsizes)
    dense = [steps == _row_major(merged_shape, itemsize) for itemsize, steps in zip(itemsizes, merged)]
    for n, (itemsize, steps) in enumerate(zip(itemsizes, merged)):
        is_output = n >= first_output
        late = is_output and made.late[n - first_output]
        streamed = is_output and size * itemsize >= STREAM_BYTES and not updated[n - first_output]
        stand_in = -1
        if late or streamed or not dense[n]:
            stand_in = count + len(registers)
            registers.append(itemsize)
        padded = (*steps, *(0,) * (MAX_DIMS - len(steps)))
        rows.append((itemsize, is_output, stand_in, late, streamed, *padded, 0, 0))
    if count + len(registers) > _MAX_SLOTS:
        return None
    wide = sum(registers)
    block = next((b for b in _BLOCKS if b * wide <= _CACHE_BYTES), _BLOCKS[-1])
    offsets, at = [], 0
    for itemsize in registers:
        offsets.append((at, itemsize))
        at += block * itemsize  # a multiple of 64, as blocks are
    if at > _REGISTER_BYTES:
        return None
    lines, links = _with_chains(made, [n for n in range(first_output) if dense[n]] if size >= PREFETCH_ELEMENTS else [])
    dims = (*merged_shape, *(1,) * (MAX_DIMS - len(merged_shape)))
    counts = (len(merged_shape), count, len(registers), len(made.constants), len(lines), len(links), block)
    header = np.array((*counts, *dims, *(0,) * _COMPLETED), np.int64)
    table, places = np.array(rows, np.int64), np.array(offsets, np.int64)
    code, chained = np.array(lines, np.int64), np.array(links or [(0, 0, 0, 0)], np.int64)
    native.Function("brim_vm_prepare", "pppp").bind(header, table, code, chained)()
    numbers = int(header[_CHUNKS]), size, sum(itemsizes), bool(header[_SEAMLESS])
    return Layout(header, table, places, code, chained, tuple(made.only_chained()), *numbers)


def completed_for_tiles(plan: Layout) -> np.ndarray[Any, Any]:
    """The header for ranges of elements that begin and end anywhere: such blocks have parts of vectors at their end."""
    header = plan.header.copy()
    header[_TAILS], header[_SEAMLESS] = 1, 0
    return header


def _with_chains(made: Lines, ahead: Sequence[int]) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Lines and links as vm.cpp reads them; chains ask early for the arrays ``ahead``."""
    links: list[tuple[int, ...]] = []
    lines: list[tuple[int, ...]] = []
    for n, line in enumerate(made.lines):
        count, first = made.chains.at.get(n, (0, 0))
        lines.append((*line, count, len(links), 0))
        if not count:
            continue
        end = next(n for n in range(first, len(made.chains.links)) if made.chains.links[n][0] == link_codes()["end"])
        streams = [slot for start, slot in made.chains.streams if start == n and slot in ahead]
        at: dict[int, list[int]] = {}  # spread, because a processor waits for few lines of memory at a time
        for number, slot in enumerate(streams):
            at.setdefault(first + number * (end - first) // len(streams), []).append(slot)
        for number in range(first, end + 1):
            links += [(link_codes()["prefetch"], slot, PREFETCH_BYTES, 0) for slot in at.get(number, ())]
            links.append((*made.chains.links[number], 0))
    return lines, links


def _row_major(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    steps, at = [], itemsize
    for dim in reversed(shape):
        steps.append(at)
        at *= dim
    return tuple(reversed(steps))


def _merge(
    shape: tuple[int, ...], strides: Sequence[tuple[int, ...]], logical_order: bool
) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
    """Shape and strides with axes in the order of the last array's memory, neighbours merged where all allow it."""
    axes = [axis for axis, dim in enumerate(shape) if dim != 1]
    if not logical_order:
        axes.sort(key=lambda axis: -abs(strides[-1][axis]))
    merged_shape: list[int] = []
    merged: list[list[int]] = [[] for _ in strides]
    for axis in axes:
        dim = shape[axis]
        if merged_shape and all(m[-1] == s[axis] * dim for m, s in zip(merged, strides)):
            merged_shape[-1] *= dim
            for m, s in zip(merged, strides):
                m[-1] = s[axis]
        else:
            merged_shape.append(dim)
            for m, s in zip(merged, strides):
                m.append(s[axis])
    if not merged_shape:
        return (1,), [(0,) for _ in strides]
    return tuple(merged_shape), [tuple(m) for m in merged]
