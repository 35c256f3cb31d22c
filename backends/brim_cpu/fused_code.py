"""From a fused formula to NumPy calls on numbered slots: conversions, registers, and where outputs are written."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from operator import itemgetter
from typing import Any

import numpy as np

from brim.backend import ScalarCell
from brim.expr import FormulaBuilder, FusedFormula, Operand, ScalarStep
from brim.random import philox
from brim.spec import Scalar, Spec
from brim_cpu.blocks import as_float32
from brim_cpu.scalars import EXTRA_REGISTERS, numpy_calls

__all__ = ["Code", "typed"]

Array = np.ndarray[Any, Any]
_BOOL = np.dtype("bool")


def typed(formula: FusedFormula, ins: Sequence[Spec | Scalar]) -> FusedFormula:
    """The same formula with every conversion spelled out as a "cast", and without arithmetic in half-width floats.

    Such a step is computed in float32 and rounded to its dtype afterwards, as the op by itself would be.
    """
    builder = FormulaBuilder([i.dtype if isinstance(i, Spec) else None for i in ins])
    numbers: list[int] = []
    for step in formula.steps:
        args: list[Operand] = [(kind, numbers[x] if kind == "step" else x) for kind, x in step.args]
        if step.fn == "uniform":
            made = builder.step(step.fn, args, step.compute, step.dtype)
        elif step.fn == "cast":
            source = builder.dtype(args[0]) or step.compute
            made = builder.step(step.fn, args, source, step.dtype)
        else:
            compute, dtype = as_float32(step.compute), as_float32(step.dtype)
            args = [
                builder.cast(arg, _BOOL if step.fn == "where" and n == 0 else compute) for n, arg in enumerate(args)
            ]
            made = builder.cast(builder.step(step.fn, args, compute, dtype), step.dtype)
        numbers.append(made[1])
    return builder.formula([numbers[n] for n in formula.outputs])


def _by_bits(step: ScalarStep) -> bool:
    """True for a "where" on numbers that have an integer of their size, whose bits can be masked."""
    return step.fn == "where" and step.dtype.kind in "biuf"


class _Draws:
    """The stream of one "uniform" step: started at each run, then drawn from block after block."""

    __slots__ = ("generator",)

    def start(self, seed: Any, counter: Any) -> None:
        self.generator = np.random.Generator(philox(_whole(seed), _whole(counter)))


def _whole(number: Any) -> int:
    value: Any = number.value if isinstance(number, ScalarCell) else number
    return int(value)


def _draw(draws: _Draws, out: Array) -> None:
    draws.generator.random(dtype=np.float32, out=out)


def _refresh(place: Array, cell: ScalarCell) -> None:
    place[()] = place.dtype.type(cell.value)


class Code:
    """The calls of a formula. Slots: the inputs, the outputs, then registers and constants.

    Arguments:
        formula: with conversions spelled out (``typed``).
        ins, outs: specs of the operands.
        aliases: ``aliases(output, input)``: whether they may be the same memory, element for element. All reads of a
            block then come before the write.

    Attributes:
        calls: (function, itemgetter of its operands from the list of slots), in order.
        registers: itemsize of each register.
        seen_as: (slot, slot of an input or output, dtype): its array, seen as another dtype of the same size.
    """

    def __init__(
        self,
        formula: FusedFormula,
        ins: Sequence[Spec | Scalar],
        outs: Sequence[Spec],
        aliases: Callable[[int, int], bool],
    ) -> None:
        self.steps, self.ins, self.outs = formula.steps, ins, outs
        self.registers: list[int] = []
        self.seen_as: list[tuple[int, int, np.dtype[Any]]] = []
        self.calls: list[tuple[Callable[..., Any], Callable[[Any], Any]]] = []
        self._views: dict[int, tuple[int, np.dtype[Any]]] = {}  # slot -> (register, dtype)
        self._slots: dict[Any, int] = {}
        self._known: dict[int, Any] = {}  # slot -> constant
        self._scalars_as: list[tuple[int, int, np.dtype[Any]]] = []
        self._scalars: list[tuple[int, int, np.dtype[Any]]] = []
        self._draws: list[tuple[int, ScalarStep]] = []
        self._next = len(ins) + len(outs)
        self._free: dict[int, list[int]] = {}
        self._uses = [0] * len(self.steps)
        for step in self.steps:
            for kind, which in step.args:
                if kind == "step":
                    self._uses[which] += 1
        self._compile(formula.outputs, aliases)

    # ------------------------------------------------------------------------------------------------- compiling

    def _compile(self, outputs: Sequence[int], aliases: Callable[[int, int], bool]) -> None:
        late: list[tuple[int, int]] = []  # (output, step) copied from the step's register at the end of the block
        place: list[int] = []  # step -> slot of its value
        for number, step in enumerate(self.steps):
            direct = None
            for out in (out for out, which in enumerate(outputs) if which == number):
                if direct is None and self._writes_early(out, number, aliases):
                    direct = len(self.ins) + out
                else:
                    late.append((out, number))
                    self._uses[number] += 1
            place.append(self._emit(step, place, direct))
        for out, number in late:
            self._call(np.copyto, (len(self.ins) + out, place[number], self._constant("unsafe")))

    def _writes_early(self, out: int, number: int, aliases: Callable[[int, int], bool]) -> bool:
        """Whether a step may write an output at once: nobody reads an aliased input in the block afterwards."""
        step = self.steps[number]
        if step.fn == "uniform" or self.outs[out].dtype != step.dtype:
            return False
        later = [arg for after in self.steps[number + 1 :] for arg in after.args]
        if step.fn == "where" and not _by_bits(step):  # writes the third argument before it reads the others
            later += step.args[:2]
        return not any(kind == "in" and aliases(out, which) for kind, which in later)

    def _emit(self, step: ScalarStep, place: list[int], direct: int | None) -> int:
        """Add the calls of a step, into the slot ``direct`` or a register; returns the slot of its value."""
        if step.fn == "uniform":
            out = self._take(step.dtype)
            self._call(_draw, (self._stream(step), out))
            return out
        args = [self._operand(step, n, place) for n in range(len(step.args))]
        dying = self._dying(step, place)
        if direct is not None:
            out = direct
        else:
            # In place where the function allows it: one array fewer in the cache.
            fit = [slot for slot in dying if self._views[slot][1] == step.dtype]
            if step.fn == "where" and not _by_bits(step):
                fit = [slot for slot in fit if slot == args[2] and slot not in args[:2]]
            out = fit[0] if fit else self._take(step.dtype)
        if _by_bits(step):
            extra = self._select(args, out, np.dtype(f"i{step.dtype.itemsize}"))
        else:
            extra = self._plain(step, args, out)
        for slot in (*extra, *dying):
            if slot != out:
                self._release(slot)
        return out

    def _plain(self, step: ScalarStep, args: list[int], out: int) -> list[int]:
        """Add the calls of a scalar function; returns the registers that it needed beside the result."""
        extra = [self._take(step.dtype) for _ in range(EXTRA_REGISTERS.get(step.fn, 0))]
        for fn, slots in numpy_calls(step.fn, args, out, extra, step.compute, self._constant):
            self._call(fn, slots)
        return extra

    def _select(self, args: list[int], out: int, whole: np.dtype[Any]) -> list[int]:
        """Add the calls of a "where" on bits: ``y ^ ((x ^ y) & mask)``, many times faster than a masked copy.

        Nothing is written to ``out`` before the last call, which works element by element.
        """
        condition, (x, y, target) = args[0], (self._as(slot, whole) for slot in (args[1], args[2], out))
        mask = self._take(whole)
        self._call(np.copyto, (mask, condition, self._constant("unsafe")))
        if self._known.get(x) == 0:
            self._call(np.subtract, (mask, self._constant(whole.type(1)), mask))
            self._call(np.bitwise_and, (y, mask, target))
            return [mask]
        self._call(np.negative, (mask, mask))
        if self._known.get(y) == 0:
            self._call(np.bitwise_and, (x, mask, target))
            return [mask]
        other = self._take(whole)
        self._call(np.bitwise_xor, (x, y, other))
        self._call(np.bitwise_and, (other, mask, other))
        self._call(np.bitwise_xor, (other, y, target))
        return [mask, other]

    def _as(self, slot: int, dtype: np.dtype[Any]) -> int:
        """The slot of the same bytes seen as another dtype of that size."""
        if slot in self._known:
            return self._constant(self._known[slot].view(dtype))
        if slot in self._views:
            return self._view(self._views[slot][0], dtype)
        if slot < len(self.ins) + len(self.outs):
            return self._slot(("bits", slot), lambda new: self.seen_as.append((new, slot, dtype)))
        return self._slot(("bits", slot), lambda new: self._scalars_as.append((new, slot, dtype)))

    def _operand(self, step: ScalarStep, n: int, place: list[int]) -> int:
        kind, which = step.args[n]
        if kind == "step":
            return place[which]
        if kind == "in" and isinstance(self.ins[which], Spec):
            return int(which)
        dtype = _BOOL if step.fn == "where" and n == 0 else step.compute
        if kind == "const":
            return self._constant(dtype.type(which))
        return self._slot(("scalar", which, dtype), lambda slot: self._scalars.append((slot, which, dtype)))

    def _dying(self, step: ScalarStep, place: list[int]) -> list[int]:
        """Slots of registers that nobody reads after this step."""
        slots = []
        for kind, which in step.args:
            if kind == "step":
                self._uses[which] -= 1
                if self._uses[which] == 0 and place[which] in self._views:
                    slots.append(place[which])
        return slots

    def _call(self, fn: Callable[..., Any], slots: Sequence[int]) -> None:
        self.calls.append((fn, itemgetter(*slots)))

    def _slot(self, key: Any, made: Callable[[int], Any]) -> int:
        if key not in self._slots:
            self._slots[key] = self._next
            made(self._next)
            self._next += 1
        return self._slots[key]

    def _constant(self, value: Any) -> int:
        return self._slot((type(value), repr(value)), lambda slot: self._known.update({slot: value}))

    def _stream(self, step: ScalarStep) -> int:
        return self._slot(("draws", step), lambda slot: self._draws.append((slot, step)))

    def _take(self, dtype: np.dtype[Any]) -> int:
        free = self._free.setdefault(dtype.itemsize, [])
        if free:
            register = free.pop()
        else:
            register = len(self.registers)
            self.registers.append(dtype.itemsize)
        return self._view(register, dtype)

    def _view(self, register: int, dtype: np.dtype[Any]) -> int:
        return self._slot(("register", register, dtype), lambda slot: self._views.update({slot: (register, dtype)}))

    def _release(self, slot: int) -> None:
        register, dtype = self._views[slot]
        self._free[dtype.itemsize].append(register)

    # --------------------------------------------------------------------------------------------------- running

    @property
    def register_slots(self) -> Iterable[int]:
        """The slots that are views of registers; two may share one register under two dtypes."""
        return self._views

    def register_bytes(self, block: int) -> int:
        """Bytes of scratch for blocks of so many elements; each register starts on a cache line."""
        return sum(_aligned(block * itemsize) for itemsize in self.registers)

    def cut(self, scratch: Array | None, block: int) -> list[Array]:
        """For each of ``register_slots`` the flat array of ``block`` elements in the scratch."""
        starts, at = [], 0
        for itemsize in self.registers:
            starts.append(at)
            at += _aligned(block * itemsize)
        if not starts:
            return []
        assert scratch is not None
        views = self._views.values()
        return [scratch[starts[r] : starts[r] + block * dtype.itemsize].view(dtype) for r, dtype in views]

    def values(self, ins: Sequence[Any]) -> tuple[list[Any], list[Callable[[], None]]]:
        """The list of slots with its constants and scalars, and what is to be called at the start of each run."""
        values: list[Any] = [None] * self._next
        starts: list[Callable[[], None]] = []
        for slot, constant in self._known.items():
            values[slot] = constant
        for slot, which, dtype in self._scalars:
            scalar = ins[which]
            if isinstance(scalar, ScalarCell):
                values[slot] = np.empty((), dtype)
                starts.append(partial(_refresh, values[slot], scalar))
            else:  # an integer that does not fit its dtype raises OverflowError
                values[slot] = dtype.type(scalar)
        for slot, scalar_slot, dtype in self._scalars_as:
            values[slot] = values[scalar_slot].view(dtype)
        for slot, step in self._draws:
            values[slot] = _Draws()
            seed, counter = (ins[which] if kind == "in" else which for kind, which in step.args)
            starts.append(partial(values[slot].start, seed, counter))
        return values, starts


def _aligned(nbytes: int) -> int:
    return -(-nbytes // 64) * 64
