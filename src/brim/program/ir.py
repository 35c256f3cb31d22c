"""The form in which a step is planned: instructions over values, each value written exactly once.

A ``Value`` is one array with memory of its own. A ``Ref`` is how an instruction reads one: a layout inside the value,
so views (reshape, slice, transpose) are no instructions at all. State (parameters, running statistics, optimizer state)
are values that exist before the first instruction; a new value of a state is written back by a ``store`` instruction,
or, once a pass has found that nobody reads the old one any more, lives at ``home`` in the state's own memory.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

import numpy as np

from brim.errors import TraceError
from brim.op import Op
from brim.spec import Scalar, Spec

__all__ = [
    "FUSED",
    "FUSED_MANY",
    "STORE",
    "HostScalar",
    "Instruction",
    "Program",
    "Ref",
    "Value",
    "is_pure",
    "part_of",
    "parts_of",
]

STORE = Op("store", "primitive", arity=2, outputs=0, rule=lambda state, new: (), doc="write a state's new value back")
"""``store(state, new)``: the state's memory takes over the elements of ``new``; no output."""

FUSED = Op("fused", "primitive", arity=None, rule=None, doc="several elementwise ops in one pass over memory")
"""``fused(*ins, formula=FusedFormula)``: see ``brim.expr.FusedFormula``; the instruction's outs carry the specs."""

FUSED_MANY = Op("fused_many", "primitive", arity=None, rule=None, doc="one fused formula on many groups of arrays")
"""``fused_many(*ins, formula=FusedFormula, count=int, shared=int)``: ``count`` parts that know nothing of each other.

The first ``shared`` inputs (scalars, and arrays of one element) are the first inputs of every part; what follows are
the further inputs of each part in turn, and so the outputs. The arrays of a part are row-major and of one size, or of
one element; those inputs have one element in all parts that are larger.
"""


_serial = itertools.count()


@dataclass(eq=False, slots=True)
class Value:
    """One array of a step, written by one instruction, or there before the first.

    Attributes:
        spec: shape, dtype and layout; the layout is dense (a permutation of row-major order, None for row-major).
        origin: "input" (copied in before each run), "state" (memory of a tensor that outlives the step), "constant"
            (host data, uploaded once) or "temp".
        category: what the ledger books it as: see ``brim.memory.ledger.CATEGORIES``.
        op, layer, site: the op that makes it, in which layer, at which line of the user's code.
        home: the state whose memory this value lives in; None for the arena.
    """

    spec: Spec
    origin: str = "temp"
    category: str = "temps"
    op: str = ""
    layer: str = ""
    site: tuple[str, int] | None = None
    home: Value | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of its elements, before rounding to the device's alignment."""
        return self.spec.nbytes

    @property
    def where(self) -> str:
        """``file:line`` of the user's code, or an empty string."""
        return f"{self.site[0]}:{self.site[1]}" if self.site else ""


@dataclass(frozen=True, slots=True)
class Ref:
    """A reading of a value: ``spec`` (with strides in elements) starting ``offset`` elements into it."""

    value: Value
    spec: Spec
    offset: int = 0

    @classmethod
    def of(cls, value: Value) -> Ref:
        """All of a value, as it lies."""
        return cls(value, value.spec)

    @property
    def whole(self) -> bool:
        """True when it reads every element exactly in the value's own layout."""
        return self.offset == 0 and self.spec.shape == self.value.spec.shape and (
            self.spec.strides == self.value.spec.strides or (self.spec.contiguous and self.value.spec.contiguous)
        )  # fmt: skip


class HostScalar:
    """A number that the host computes anew before each run: a learning rate, a step count, a random counter.

    Arithmetic with numbers and other host scalars gives host scalars. ``read`` is called once a run, by ``Program``.
    """

    __slots__ = ("args", "kind", "read", "serial")

    def __init__(self, read: Callable[..., Any], kind: type = float, args: tuple[Any, ...] = ()) -> None:
        self.read, self.kind, self.args = read, kind, args
        self.serial = next(_serial)

    def _with(self, function: Callable[[Any, Any], Any], other: Any, swapped: bool) -> Any:
        if not isinstance(other, bool | int | float | HostScalar):
            return NotImplemented
        kind = float if float in (self.kind, getattr(other, "kind", type(other))) else int
        args = (other, self) if swapped else (self, other)
        return HostScalar(function, kind, args)

    def __add__(self, other: Any) -> Any:
        return self._with(lambda a, b: a + b, other, False)

    def __radd__(self, other: Any) -> Any:
        return self._with(lambda a, b: a + b, other, True)

    def __sub__(self, other: Any) -> Any:
        return self._with(lambda a, b: a - b, other, False)

    def __rsub__(self, other: Any) -> Any:
        return self._with(lambda a, b: a - b, other, True)

    def __mul__(self, other: Any) -> Any:
        return self._with(lambda a, b: a * b, other, False)

    def __rmul__(self, other: Any) -> Any:
        return self._with(lambda a, b: a * b, other, True)

    def __truediv__(self, other: Any) -> Any:
        return self._divide(other, False)

    def __rtruediv__(self, other: Any) -> Any:
        return self._divide(other, True)

    def _divide(self, other: Any, swapped: bool) -> Any:
        made = self._with(lambda a, b: a / b, other, swapped)
        if made is not NotImplemented:
            made.kind = float
        return made

    def _refuse(self) -> NoReturn:
        raise TraceError(
            "a step branches on a number that may change from step to step (a learning rate, a counter): only one "
            "branch would be recorded. Decide with brim.context.baked(lambda: ...), which records the step anew on a "
            "change"
        )

    __bool__ = __float__ = __int__ = __index__ = _refuse

    def __neg__(self) -> HostScalar:
        return HostScalar(lambda a: -a, self.kind, (self,))


Operand = Ref | HostScalar | Scalar


@dataclass(eq=False, slots=True)
class Instruction:
    """One op on values. Never changed once it is in a program: passes make new ones (``dataclasses.replace``).

    Attributes:
        op: the op record; ``STORE``, ``FUSED`` and ``FUSED_MANY`` exist only in programs.
        ins: what it reads: Refs, host scalars, Python numbers.
        outs: the values it writes, whole.
        params: the op's params.
        layer, site: where it comes from.
        phase: "forward", "backward" or "update".
    """

    op: Op
    ins: tuple[Any, ...]
    outs: tuple[Value, ...]
    params: dict[str, Any] = field(default_factory=dict)
    layer: str = ""
    site: tuple[str, int] | None = None
    phase: str = "forward"

    @property
    def refs(self) -> Iterator[Ref]:
        """The Refs among its inputs."""
        return (i for i in self.ins if isinstance(i, Ref))

    @property
    def where(self) -> str:
        return f"{self.site[0]}:{self.site[1]}" if self.site else ""


def parts_of(instruction: Instruction) -> list[tuple[tuple[Any, ...], tuple[Value, ...]]]:
    """(inputs, outputs) of each part of ``fused_many``, the shared inputs first; of another instruction, its own."""
    if instruction.op is not FUSED_MANY:
        return [(instruction.ins, instruction.outs)]
    count, shared = instruction.params["count"], instruction.params["shared"]
    own = (len(instruction.ins) - shared) // count
    made = len(instruction.outs) // count
    first = instruction.ins[:shared]
    return [
        (
            (*first, *instruction.ins[shared + n * own : shared + (n + 1) * own]),
            instruction.outs[n * made : (n + 1) * made],
        )
        for n in range(count)
    ]


def part_of(instruction: Instruction, out: Value) -> tuple[Any, ...]:
    """The inputs that the part of ``fused_many`` which makes ``out`` has for itself (the shared ones are of all)."""
    count, shared = instruction.params["count"], instruction.params["shared"]
    own = (len(instruction.ins) - shared) // count
    start = shared + instruction.outs.index(out) // (len(instruction.outs) // count) * own
    return instruction.ins[start : start + own]


def is_pure(instruction: Instruction) -> bool:
    """True when running it again changes nothing but its outputs: everything but ``store`` and writes at a home."""
    return instruction.op is not STORE and all(out.home is None for out in instruction.outs)


@dataclass(eq=False, slots=True)
class Program:
    """A step as straight-line code.

    Attributes:
        inputs: values copied in before each run, in the order of the step's arguments.
        states: values that live in tensors which outlive the step.
        constants: values with host data, uploaded once.
        instructions: in the order in which they run.
        results: what is read after the last instruction: the step's results and what the host wants to know.
        device: name of the device it is planned for.
        host_reads: numbers that the host computes before each run, whether or not an instruction still uses them.
    """

    inputs: list[Value]
    states: list[Value]
    constants: dict[Value, np.ndarray[Any, Any]]
    instructions: list[Instruction]
    results: list[Ref]
    device: str = "cpu"
    host_reads: tuple[HostScalar, ...] = ()

    def with_instructions(self, instructions: list[Instruction]) -> Program:
        """The same program with other instructions."""
        return replace(self, instructions=instructions)

    def producers(self) -> dict[Value, int]:
        """Value -> number of the instruction that writes it."""
        return {out: n for n, instruction in enumerate(self.instructions) for out in instruction.outs}

    def readers(self) -> dict[Value, list[int]]:
        """Value -> numbers of the instructions that read it, in order; results count as one past the last."""
        found: dict[Value, list[int]] = {}
        for n, instruction in enumerate(self.instructions):
            for operand in instruction.ins:
                if type(operand) is Ref:  # asked very often: no generator, no isinstance
                    numbers = found.get(operand.value)
                    if numbers is None:
                        found[operand.value] = [n]
                    elif numbers[-1] != n:
                        numbers.append(n)
        for ref in self.results:
            found.setdefault(ref.value, []).append(len(self.instructions))
        return found

    def scalars(self) -> list[HostScalar]:
        """Every host scalar that is needed, in the order in which the step asked for them, each once."""
        seen: dict[int, HostScalar] = {}
        pending: list[Any] = list(self.host_reads)
        for instruction in self.instructions:
            pending += instruction.ins
        while pending:
            one = pending.pop()
            if isinstance(one, HostScalar) and id(one) not in seen:
                seen[id(one)] = one
                pending += one.args
        return sorted(seen.values(), key=lambda scalar: scalar.serial)

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        names: dict[Value, str] = {}

        def name(value: Value) -> str:
            if value not in names:
                letter = {"input": "in", "state": "state", "constant": "const"}.get(value.origin, "")
                names[value] = f"%{letter}{len(names)}"
            return names[value]

        def operand(x: Any) -> str:
            if isinstance(x, HostScalar):
                return f"<host {x.kind.__name__}>"
            if not isinstance(x, Ref):
                return repr(x)
            shape = "" if x.whole else f"{list(x.spec.shape)}" + (f"+{x.offset}" if x.offset else "")
            return name(x.value) + shape

        for kind, values in (("input", self.inputs), ("state", self.states), ("constant", list(self.constants))):
            for value in values:
                yield f"{kind} {name(value)}: {value.spec}  {value.layer}".rstrip()
        for n, i in enumerate(self.instructions):
            outs = ", ".join(f"{name(o)}: {o.spec}" + (f" at {name(o.home)}" if o.home else "") for o in i.outs)
            params = "".join(f" {k}={v}" for k, v in i.params.items() if k not in ("device", "formula"))
            if "formula" in i.params:
                params += f" [{i.params['formula']}]"
            args = ", ".join(map(operand, i.ins))
            made = f"{outs} = " if outs else ""
            yield f"{n:4d} {made}{i.op.name}({args}){params}  # {i.phase} {i.layer} {i.where}".rstrip()
        yield "return " + ", ".join(map(operand, self.results))
