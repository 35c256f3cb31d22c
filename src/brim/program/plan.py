"""What a step will need, before it runs: peak memory to the byte, where it is, what it is made of, what would fit.

A plan covers one or several programs that take turns in one arena (training step, last batch, evaluation). Its peak is
the resident memory (parameters, state, constants), the arena, and the results that are handed out.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from brim.device import device as find_device
from brim.io.atomic import atomic_write
from brim.memory.budget import BudgetLike, parse_budget
from brim.memory.pool import round_up
from brim.memory.report import KINDS
from brim.program.batch import batch_of, largest_batch, with_batch
from brim.program.compare import PlanDifference, compare
from brim.program.document import arena_blocks, document
from brim.program.html import to_html
from brim.program.ir import Program, Value
from brim.program.least import least
from brim.program.lower import Prepared
from brim.program.options import NO_OPTIONS, Options, option_passes
from brim.program.profiles import find_profile
from brim.program.schema import timeline
from brim.program.traffic import Traffic, traffic_of
from brim.spec import Spec
from brim.units import format_bytes

__all__ = [
    "AliveBlock",
    "Options",
    "Plan",
    "PlannedProgram",
    "Resident",
    "batch_of",
    "largest_batch",
    "residents_of",
    "with_batch",
]


@dataclass(frozen=True, slots=True)
class Resident:
    """Memory that is there all the time: a parameter, a buffer, optimizer state, a constant.

    Attributes:
        key: the same for the same memory in different programs.
        exists: whether the memory is held already.
    """

    key: Any
    value: Value
    reserved_bytes: int
    exists: bool


@dataclass(frozen=True, slots=True)
class AliveBlock:
    """One array that is alive at the peak.

    Attributes:
        kind: one of ``brim.memory.report.KINDS``.
        first, last: numbers of the instructions between which it lives; -1 is before the first.
    """

    op: str
    layer: str
    kind: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    offset_bytes: int | None
    first: int
    last: int
    site: str


@dataclass(eq=False)
class PlannedProgram:
    """One program of a plan.

    Attributes:
        name: "training step", "last batch", "evaluation", ...
        prepared: the program with its places.
        residents: memory outside the arena that it needs.
        n_results: how many of the program's results are handed out as copies.
        host_inputs: which of the program's inputs come from the host; all of them when None.
        traced: the program before any pass, where it is to be planned with other options.
        lower: prepares a traced program with options.
        options: what it was prepared with.
    """

    name: str
    prepared: Prepared
    residents: list[Resident]
    n_results: int
    traced: Program | None = None
    lower: Callable[[Program, Options], Prepared] | None = None
    options: Options = NO_OPTIONS
    host_inputs: Sequence[bool] | None = None
    kinds: dict[Value, str] = field(init=False)

    def __post_init__(self) -> None:
        program = self.prepared.program
        self.kinds = {}
        phases = {out: i.phase for i in program.instructions for out in i.outs}
        saved: set[Value] = set()
        for instruction in program.instructions:
            if instruction.phase == "backward":
                saved.update(ref.value for ref in instruction.refs)
        for value in [*phases, *program.inputs]:
            kind = value.category
            if kind == "temps" and value in saved and phases.get(value) == "forward":
                kind = "activations"
            self.kinds[value] = kind

    @property
    def arena_bytes(self) -> int:
        return self.prepared.memory.arena_bytes

    @property
    def staged_bytes(self) -> int:
        """Bytes of a second set of the inputs that come from the host, each rounded up."""
        inputs = self.prepared.program.inputs
        from_host = [True] * len(inputs) if self.host_inputs is None else self.host_inputs
        unit = self.prepared.alignment_bytes
        return sum(round_up(value.nbytes, unit) for value, own in zip(inputs, from_host, strict=False) if own)

    def vary(self, options: Options) -> PlannedProgram:
        """The same step planned with other options; itself where that is impossible."""
        if self.lower is None or self.traced is None:
            return self
        return replace(self, prepared=self.lower(self.traced, options), options=options)

    @cached_property
    def results_bytes(self) -> int:
        """Bytes of the copies that a run hands out, rounded as the pool rounds."""
        unit = self.prepared.alignment_bytes
        return sum(round_up(ref.spec.nbytes, unit) for ref in self.prepared.program.results[: self.n_results])

    def traffic(self) -> Traffic:
        """Kernels and bytes of one run, against the least that the step as traced needs with these options."""
        source = self.prepared.program if self.traced is None else self.traced
        for one in option_passes(self.options):
            source = one(source)
        return traffic_of(self.prepared, least(source))

    def alive_at(self, at: int) -> list[AliveBlock]:
        """Everything in the arena while instruction ``at`` runs, largest first."""
        memory, program = self.prepared.memory, self.prepared.program
        found = []
        for what, nbytes, offset in memory.alive_at(at):
            if isinstance(what, Value):
                first, last = memory.lifetimes[what]
                found.append(
                    AliveBlock(
                        what.op,
                        what.layer,
                        self.kinds[what],
                        what.spec.shape,
                        str(what.spec.dtype),
                        what.nbytes,
                        offset,
                        first,
                        last,
                        what.where,
                    )
                )
            else:
                one = program.instructions[at]
                found.append(
                    AliveBlock(
                        one.op.name, one.layer, "workspace", (nbytes,), "uint8", nbytes, offset, at, at, one.where
                    )
                )
        return sorted(found, key=lambda block: (-block.nbytes, block.first))

    @cached_property
    def hash(self) -> str:
        """A fingerprint of the instructions and places: equal hashes run alike."""
        text = str(self.prepared.program) + repr(
            [self.prepared.memory.offset_bytes(v) for v in self.kinds if v.home is None]
        )
        return hashlib.sha256(text.encode()).hexdigest()[:16]


class Plan:
    """The memory that a step will need.

    Arguments:
        programs: what takes turns in the arena; the first is the step itself.
        device: name of the device or profile that it is planned for.
        what: what the plan is of, for messages.
        budget: the declared budget, for reports.
        replan: makes the plan for other input specs (one list of shapes per input), or None when that is impossible.
        input_shapes: shapes of the step's inputs.
        estimated: True when the device was described by a profile.
        overhead_bytes: what the process holds on the device besides: libraries, context.
        overhead_exactness: "exact", "measured" or "estimated": how that is known.
        profile: name of the profile that describes the device, if one was used.
        options: what the programs were planned with.
        alternatives: (text, plan maker) of further ways to need less, offered when this plan does not fit: the text
            says what to do ("2 micro-batches of 32"), the maker plans it.
        staging: whether inputs arrive in a second set of buffers while the step before runs.
    """

    def __init__(
        self,
        programs: Sequence[PlannedProgram],
        device: str,
        what: str = "training step",
        budget: BudgetLike | None = None,
        replan: Callable[[list[tuple[int, ...]]], Plan] | None = None,
        input_shapes: Sequence[tuple[int, ...]] = (),
        estimated: bool = False,
        overhead_bytes: int = 0,
        profile: str | None = None,
        options: Options = NO_OPTIONS,
        alternatives: Sequence[tuple[str, Callable[[], Plan]]] = (),
        overhead_exactness: str = "exact",
        staging: bool = False,
    ) -> None:
        self.programs, self.device, self.what, self.budget = list(programs), device, what, budget
        self.replan, self.input_shapes = replan, list(input_shapes)
        self.estimated, self.overhead_bytes, self.profile = estimated, overhead_bytes, profile
        self.options, self.alternatives = options, list(alternatives)
        self.overhead_exactness, self.staging = overhead_exactness, staging

    def vary(self, options: Options) -> Plan:
        """The same step planned with other options."""
        return self.with_programs([program.vary(options) for program in self.programs], options)

    def with_programs(self, programs: Sequence[PlannedProgram], options: Options) -> Plan:
        """The same plan of other programs."""
        return Plan(
            programs,
            self.device,
            self.what,
            self.budget,
            self.replan,
            self.input_shapes,
            self.estimated,
            self.overhead_bytes,
            self.profile,
            options,
            overhead_exactness=self.overhead_exactness,
            staging=self.staging,
        )

    def unstaged(self) -> Plan:
        """The same plan with one set of input buffers: inputs are copied between two steps, not during one."""
        made = self.with_programs(self.programs, self.options)
        made.alternatives, made.staging = self.alternatives, False
        return made

    def within(self, limit_bytes: int | None) -> Plan:
        """The plan as it would run within a limit: without a second set of input buffers where there is no room."""
        return self if limit_bytes is None or self.peak_bytes <= limit_bytes else self.unstaged()

    @property
    def exactness(self) -> dict[str, str]:
        """Class of each figure that is not exact: "bound", "measured" or "estimated"."""
        found = {}
        if any(kernel.library_bytes for p in self.programs for kernel in p.prepared.kernels):
            found["workspace"] = "bound"
        if self.overhead_bytes and self.overhead_exactness != "exact":
            found["overhead"] = self.overhead_exactness
        if self.estimated:
            found |= dict.fromkeys(("peak", "arena", "workspace", "overhead"), "estimated")
        return found

    # ---------------------------------------------------------------- the peak

    @cached_property
    def residents(self) -> list[Resident]:
        """Memory outside the arena, each piece once."""
        found = {r.key: r for program in self.programs for r in program.residents}
        if nbytes := self.staged_bytes:
            value = Value(Spec((nbytes,), np.dtype("u1")), category="inputs", op="stage")
            found["stage"] = Resident("stage", value, nbytes, False)
        return list(found.values())

    @property
    def staged_bytes(self) -> int:
        """Bytes of the second set of input buffers, 0 for none."""
        return max((p.staged_bytes for p in self.programs), default=0) if self.staging else 0

    @property
    def resident_bytes(self) -> int:
        return sum(r.reserved_bytes for r in self.residents)

    @property
    def arena_bytes(self) -> int:
        """Bytes of the arena: that of the program which needs most."""
        return max((p.arena_bytes for p in self.programs), default=0)

    @property
    def results_bytes(self) -> int:
        """Bytes of the results that one run hands out, at most."""
        return max((p.results_bytes for p in self.programs), default=0)

    @property
    def peak_bytes(self) -> int:
        """The most memory that the step and everything it needs ever hold on the device."""
        return self.resident_bytes + self.arena_bytes + self.results_bytes + self.overhead_bytes

    @property
    def least_bytes(self) -> int:
        """The peak without a second set of input buffers: what is held against budgets."""
        return self.peak_bytes - self.staged_bytes

    @property
    def peak_program(self) -> PlannedProgram:
        """The program that sets the size of the arena."""
        return max(self.programs, key=lambda p: p.arena_bytes)

    @property
    def peak_at(self) -> str:
        """The op, layer and source line at the peak."""
        program = self.peak_program
        at = program.prepared.memory.peak_at
        instructions = program.prepared.program.instructions
        if not 0 <= at < len(instructions):
            return f"{program.name}, before its first instruction"
        one = instructions[at]
        of = f"{one.phase} of {one.layer}" if one.layer else one.phase
        where = f"   {one.where}" if one.where else ""
        return f"{one.op.name} in {of} ({program.name}, instruction {at} of {len(instructions)}){where}"

    def by_kind(self) -> dict[str, int]:
        """Bytes at the peak by kind (``brim.memory.report.KINDS``); they add up to ``peak_bytes``."""
        found = dict.fromkeys(KINDS, 0)
        for resident in self.residents:
            found[resident.value.category] += resident.value.nbytes
            found["rounding"] += resident.reserved_bytes - resident.value.nbytes
        program = self.peak_program
        memory = program.prepared.memory
        unit = program.prepared.alignment_bytes
        for block in program.alive_at(memory.peak_at):
            found[block.kind] += block.nbytes
            found["rounding"] += round_up(block.nbytes, unit) - block.nbytes
        found["holes"] = memory.arena_bytes - memory.peak_live_bytes
        found["temps"] += self.results_bytes
        found["overhead"] = self.overhead_bytes
        return {kind: nbytes for kind, nbytes in found.items() if nbytes}

    def by_layer(self) -> list[tuple[str, dict[str, int]]]:
        """(layer, bytes at the peak by kind), the layer with most first; "" is what belongs to no layer."""
        rows: dict[str, dict[str, int]] = {}
        entries = [(r.value.layer, r.value.category, r.value.nbytes) for r in self.residents]
        entries += [(b.layer, b.kind, b.nbytes) for b in self.alive_at_peak() if b.offset_bytes is not None]
        for layer, kind, nbytes in entries:
            row = rows.setdefault(layer, {})
            row[kind] = row.get(kind, 0) + nbytes
        return sorted(rows.items(), key=lambda item: (-sum(item[1].values()), item[0]))

    def alive_at_peak(self, top: int | None = None) -> list[AliveBlock]:
        """Everything that is alive at the peak, residents included, largest first."""
        blocks = self.peak_program.alive_at(self.peak_program.prepared.memory.peak_at)
        for r in self.residents:
            v = r.value
            blocks.append(
                AliveBlock(v.op, v.layer, v.category, v.spec.shape, str(v.spec.dtype), v.nbytes, None, -1, -1, v.where)
            )
        blocks.sort(key=lambda block: -block.nbytes)
        return blocks if top is None else blocks[:top]

    def timeline(self, program: int = 0) -> list[tuple[str, dict[str, int]]]:
        """For each instruction of a program: its label, and the bytes alive in the arena by kind while it runs."""
        planned = self.programs[program]
        instructions = planned.prepared.program.instructions
        by_kind = timeline(len(instructions), arena_blocks(planned), ())["by_kind"]
        return [
            (f"{one.op.name} {one.layer}".strip(), {kind: row[at + 1] for kind, row in by_kind.items() if row[at + 1]})
            for at, one in enumerate(instructions)
        ]

    def traffic(self, program: int = 0) -> Traffic:
        """Kernels, bytes and arithmetic of one run of a program (the step itself), against the least possible."""
        return self.programs[program].traffic()

    @property
    def hash(self) -> str:
        """A fingerprint of all programs."""
        return hashlib.sha256("".join(p.hash for p in self.programs).encode()).hexdigest()[:16]

    # ---------------------------------------------------------------- budgets

    def limit_bytes(self, budget: BudgetLike) -> int | None:
        """What a budget comes to for this plan's device; bytes are what they say, whatever this machine has."""
        parsed = parse_budget(budget, self.device)
        if parsed.kind == "bytes":
            return int(parsed.amount)
        if self.profile is not None:
            total_bytes = find_profile(self.profile).memory_bytes
            return parsed.resolve(total_bytes, total_bytes)
        memory = find_device(self.device).memory
        total_bytes, available_bytes, headroom_bytes = memory.sizes()
        return parsed.resolve(total_bytes, available_bytes + memory.overhead_bytes, headroom_bytes)

    def fits(self, budget: BudgetLike) -> bool:
        """True when the peak is within the budget (equality fits); a second set of inputs can be done without."""
        limit = self.limit_bytes(budget)
        return limit is None or self.least_bytes <= limit

    def largest_batch(self, budget: BudgetLike) -> int:
        """The largest batch whose plan fits: b fits and b + 1 does not. 0 when not even one sample fits.

        Raises:
            ValueError: the step cannot be planned for other batches: no inputs share a first axis.
        """
        limit = self.limit_bytes(budget)
        if limit is None:
            raise ValueError("largest_batch needs a budget that is a limit; with 'off' every batch fits")
        return largest_batch(self, limit)

    # ---------------------------------------------------------------- handing on

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain data, see docs/plan-schema.md."""
        from importlib.metadata import version  # slow, and for reports alone

        plan = self if self.budget is None else self.within(self.limit_bytes(self.budget))
        return document(plan, version("brim"))

    def to_json(self, path: str | Path | None = None) -> str:
        """The plan as JSON (docs/plan-schema.md), also written to a file where a path is given."""
        return _written(path, json.dumps(self.to_dict(), separators=(",", ":")))

    def to_html(self, path: str | Path | None = None) -> str:
        """The plan as one HTML page that works offline, also written to a file where a path is given."""
        return _written(path, to_html(self.to_dict()))

    def diff(self, other: Plan) -> PlanDifference:
        """What ``other`` needs more (or less) than this plan: of the peak, by kind, by layer."""
        return compare(self, other)

    def __repr__(self) -> str:
        text = " | ".join(f"{kind} {format_bytes(nbytes)}" for kind, nbytes in self.by_kind().items())
        return f"<Plan of {self.what}: peak {format_bytes(self.peak_bytes)} on {self.device}: {text}>"


def _written(path: str | Path | None, text: str) -> str:
    if path is not None:
        with atomic_write(path) as file:
            file.write(text.encode())
    return text


def residents_of(refs: Sequence[tuple[Any, Value, bool]], alignment_bytes: int) -> list[Resident]:
    """Resident memory from (key, value, exists)."""
    return [Resident(key, value, round_up(value.nbytes, alignment_bytes), exists) for key, value, exists in refs]
