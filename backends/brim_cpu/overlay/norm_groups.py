"""Norms with the formulas before and after them (``brim.program.norm_groups``), each in one native call: a formula runs
on a tile of elements while the norm has it in the first-level cache (native/vm_tile.hpp).

Sums and formulas give the bits that they give by themselves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from brim.expr import FusedFormula, ScalarStep
from brim.spec import Scalar, Spec
from brim_cpu import native
from brim_cpu.overlay import NativeKernel, overlay
from brim_cpu.overlay.elementwise import Interpreter, Numbers, broadcast_strides, program_of, renew_before
from brim_cpu.overlay.norm import scratch_bytes, value_of
from brim_cpu.overlay.program import STREAM_BYTES, completed_for_tiles, layout, lines_of

__all__ = ["Tile"]

Array = np.ndarray[Any, Any]

_FLOAT32 = np.dtype("float32")
_ROWS = native.Function("brim_layer_norm_fused_f32", "pppppppp" + "d" + "p" + "d" + "iid")
_ROWS_GRAD = native.Function("brim_layer_norm_grad_fused_f32", "ppppppppp" + "d" + "pp" + "iid")
_LONGEST_ROW = 4096
"""kLongestRow of layer_norm.cpp: what fits into tiles on a thread's stack."""


@dataclass(frozen=True)
class Tile:
    """Stands for the array that a kernel has in a tile only: nowhere in memory, but laid out as the others are."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    itemsize: int

    @property
    def ndim(self) -> int:
        return len(self.shape)


class _Formula:
    """A formula as the program of a tile.

    Arguments:
        ins, outs: Specs and numbers; the tile is one of them.
        image: Spec of the tile.
        ordered: elements are visited in row-major order.
    """

    def __init__(
        self, formula: FusedFormula, ins: Sequence[Spec | Scalar], outs: Sequence[Spec], image: Spec, ordered: bool
    ) -> None:
        found = program_of(formula, ins, outs)
        if found is None:
            raise KeyError("a function that the interpreter lacks")
        self.program: Interpreter = found
        self.ordered = ordered
        strides = tuple(step * image.dtype.itemsize for step in image.strides)
        self.tile = Tile(image.shape, strides, image.dtype.itemsize)

    def words(self, outs: Sequence[Any], ins: Sequence[Any], cached: bool) -> tuple[Array, Numbers, list[Any]]:
        """What vm_tile.hpp reads, the numbers in it, and what must be kept as long.

        Arguments:
            cached: the norm reads the outputs at once: they are not written past the caches.
        """
        program = self.program
        every = [*(ins[n] for n in program.arrays), *outs]
        at = [0 if x is self.tile else native.pointer(x) for x in every]
        given = len(program.arrays)
        aliases = frozenset(
            (o, program.arrays[i]) for o in range(len(outs)) for i in range(given) if at[given + o] == at[i] != 0
        )
        made = program.lines.get(aliases)
        if made is None:
            made = lines_of(program.formula, program.scalars, program.out_dtypes, aliases)
            assert made is not None  # aliases change no instruction
            program.lines[aliases] = made
        updated = [cached or x is self.tile or any(o == n for o, _ in aliases) for n, x in enumerate(outs)]
        steps = [broadcast_strides(x, self.tile.ndim) for x in every]
        plan = layout(made, self.tile.shape, [x.itemsize for x in every], steps, self.ordered, updated)
        assert plan is not None  # the room is enough for operands of any layout
        numbers, header = Numbers(made, plan, ins), completed_for_tiles(plan)
        bases = np.array(at, np.int64)
        parts = (header, plan.arrays, plan.registers, numbers.table, plan.lines, plan.links, bases)
        slot = next((n for n, x in enumerate(every) if x is self.tile), -1)
        large = math.prod(self.tile.shape) * self.tile.itemsize >= STREAM_BYTES
        words = np.array([*map(native.pointer, parts), slot, large], np.int64)
        return words, numbers, [parts, every]


class _Group:
    """A norm with formulas on operands of certain specs.

    Attributes:
        before, after: programs; None where the formula hands on what it is given.
        stored: which of the outputs the formula before stores the norm's first input in; None: in none.
        read: which of the operands the norm's first input is, where no formula makes it.

    Raises:
        KeyError: no native kernel does it.
    """

    def __init__(
        self,
        own: Sequence[Any],
        others: Sequence[Spec | Scalar],
        outs: Sequence[Spec],
        formulas: tuple[FusedFormula, FusedFormula],
        image: Spec,
        ordered: bool,
    ) -> None:
        before, after = formulas
        self.own, self.count = len(own), len(own) + len(others)
        self.made, self.kept = len(after.outputs), len(before.outputs) - 1
        first, *stored = before.outputs
        kept = outs[self.made : self.made + self.kept]
        self.stored = self.made + stored.index(first) if first in stored else None
        self.read = _handed_on(before, others)
        self.before = self.after = None
        if self.read is None and self.stored is None:
            self.before = _Formula(before, others, [image, *kept], image, ordered)
        elif self.read is None:
            self.before = _Formula(FusedFormula(before.steps, tuple(stored)), others, kept, image, ordered)
        if _handed_on(after, [image]) is None or outs[0].layout != image.layout:
            self.after = _Formula(after, [image, *others], outs[: self.made], image, ordered)

    def calls(self, outs: Sequence[Any], ins: Sequence[Any], call: Callable[..., Any]) -> list[Any]:
        """The bound call: ``call(before, after, first input, own, result, other results)``."""
        own, others = ins[: self.own], ins[self.own :]
        made, kept, rest = outs[: self.made], outs[self.made : self.made + self.kept], outs[self.made + self.kept :]
        words: list[Any] = [None, None]
        numbers, keeps = list[Numbers](), list[Any]()
        first = None if self.read is None else others[self.read]
        if self.stored is not None:
            first = outs[self.stored]
        found = []
        if self.before is not None:
            into = [self.before.tile] if self.stored is None else []
            found.append((0, self.before.words([*into, *kept], others, cached=True)))
        if self.after is not None:
            found.append((1, self.after.words(made, [self.after.tile, *others], cached=False)))
        for which, (table, used, alive) in found:
            words[which] = table
            numbers.append(used)
            keeps.append(alive)
        bound = call(*words, first, own, None if self.after is not None else made[0], rest)
        bound.keeps += (keeps, numbers)
        renew_before(bound, [cell for one in numbers for cell in one.cells])
        return [bound]


def _handed_on(formula: FusedFormula, given: Sequence[Any]) -> int | None:
    """Which operand a formula gives as its only result, as it is; None: it computes something."""
    if len(formula.steps) != 1 or formula.outputs != (0,):
        return None
    step: ScalarStep = formula.steps[0]
    (kind, which), *more = step.args
    if more or step.fn not in ("cast", "identity") or kind != "in" or not isinstance(given[which], Spec):
        return None
    return int(which) if given[which].dtype == step.dtype == _FLOAT32 else None


def _vectors(vectors: Sequence[Any], size: int) -> bool:
    """Whether these are float32 vectors of a size, or numbers."""
    return all(not isinstance(v, Spec) or (v.dtype == _FLOAT32 and v.size == size) for v in vectors)


# ------------------------------------------------------------------------------------------------------- layer norm


def _rows(
    own: Sequence[Any], others: Sequence[Any], outs: Sequence[Spec], formulas: Any, shape: tuple[int, ...], ndim: int
) -> tuple[_Group, int, int] | None:
    """The group, how many rows there are, and how long they are; None where there is no kernel."""
    n, size = math.prod(shape[len(shape) - ndim :]), math.prod(shape)
    whole = [x for x in (*others, *outs) if isinstance(x, Spec) and x.shape == shape]
    if not 0 < n <= _LONGEST_ROW or not size or not all(x.contiguous for x in whole):
        return None
    if any(step.fn == "uniform" for formula in formulas for step in formula.steps):
        return None  # drawing numbers takes so long that nothing is gained
    if len(outs) > 3 and size * 4 >= STREAM_BYTES:
        return None  # two large results that are written in turns take longer than one after the other
    try:
        group = _Group(own, others, outs, formulas, Spec(shape, _FLOAT32), ordered=True)
    except KeyError:
        return None
    if group.read is not None and others[group.read].shape != shape:
        return None
    return group, size // n, n


@overlay("layer_norm_fused")
def layer_norm_fused(
    ins: Sequence[Any], outs: Sequence[Spec], *, before: Any, after: Any, shape: tuple[int, ...], ndim: int, eps: float
) -> NativeKernel | None:
    """Float32 rows that fit into a tile."""
    own, others = ins[:2], ins[2:]
    found = _rows(own, others, outs, (before, after), shape, ndim)
    if found is None or not _first_is_float(before) or not _vectors(own, found[2]):
        return None
    group, rows, n = found
    if not _vectors(outs[-2:], rows):
        return None
    numbers = sum(not isinstance(v, Spec) for v in own)

    def calls(out: Any, *given: Any, scratch: Any = None) -> list[Any]:
        def call(before: Any, after: Any, x: Any, own: Any, result: Any, rest: Any) -> Any:
            weight, bias = own
            return _ROWS.bind(
                before, after, result, *rest, scratch, x, *value_of(weight), *value_of(bias), rows, n, eps
            )  # fmt: skip

        return group.calls(out, given, call)

    contiguous = (True, True, *(False for _ in others))
    return NativeKernel(calls, numbers * n * 4, contiguous, aliasing=True)


@overlay("layer_norm_grad_fused")
def layer_norm_grad_fused(
    ins: Sequence[Any], outs: Sequence[Spec], *, before: Any, after: Any, shape: tuple[int, ...], ndim: int, eps: float
) -> NativeKernel | None:
    """Float32 rows that fit into a tile."""
    own, others = ins[:4], ins[4:]
    x, weight, *statistics = own
    found = _rows(own, others, outs, (before, after), shape, ndim)
    if found is None or not _first_is_float(before) or x.dtype != _FLOAT32 or x.shape != shape:
        return None
    group, rows, n = found
    if not _vectors((weight, *outs[-2:]), n) or not _vectors(statistics, rows):
        return None
    nbytes = scratch_bytes("layer", rows, n) * 4 + (0 if isinstance(weight, Spec) else n * 4)

    def calls(out: Any, *given: Any, scratch: Any = None) -> list[Any]:
        def call(before: Any, after: Any, g: Any, own: Any, result: Any, rest: Any) -> Any:
            x, weight, mean, var = own
            return _ROWS_GRAD.bind(
                before, after, result, *rest, scratch, g, x, *value_of(weight), mean, var, rows, n, eps
            )

        return group.calls(out, given, call)

    contiguous = (True, True, True, True, *(False for _ in others))
    return NativeKernel(calls, nbytes, contiguous, aliasing=True)


def _first_is_float(before: FusedFormula) -> bool:
    return before.steps[before.outputs[0]].dtype == _FLOAT32
