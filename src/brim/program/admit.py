"""The gate before a planned step: what the device holds already plus what the plan adds must be within the budget."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from brim.device import Device
from brim.errors import BudgetExceeded
from brim.memory.budget import BudgetLike, parse_budget
from brim.memory.host import read_host_memory
from brim.memory.report import LiveBlock, MemoryReport, budget_exceeded
from brim.program.fit import remedies
from brim.program.plan import Plan

__all__ = ["Refusal", "admit", "plan_report", "refusal", "staged_where_it_fits"]

Remedies = Callable[[Plan, int, Callable[[Plan], int]], Sequence[str]]


def admit(plan: Plan, device: Device, budget: BudgetLike | None = None, remedies: Remedies = remedies) -> None:
    """Return when the plan fits next to everything that is live on the device.

    Arguments:
        plan: of the step about to run.
        device: where.
        budget: a tighter budget than the device's, or None.
        remedies: lines for the report: see ``brim.program.fit.remedies``.

    Raises:
        BudgetExceeded: it does not fit; nothing was allocated.
    """
    found = refusal(plan, device, budget)
    if found is not None:
        raise found.error(remedies)


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a plan cannot run now.

    Attributes:
        limit_bytes: the tightest budget, None for none; ``limit_text`` as declared; overhead counts against it.
        needed_bytes: what the device would hold with the plan.
        available_bytes: what the machine can give, where that, and not a budget, is too little.
    """

    plan: Plan
    device: Device
    limit_bytes: int | None
    limit_text: str
    needed_bytes: int
    available_bytes: int | None

    @property
    def most_bytes(self) -> int | None:
        """The most that the device may hold: the budget, or what the machine can give where that is less."""
        if self.available_bytes is None:
            return self.limit_bytes
        return self.device.memory.live_bytes + self.available_bytes

    def needed(self, plan: Plan) -> int:
        """What the device would hold with another plan in this one's place."""
        return needed_bytes(plan, self.device)

    def error(self, remedies: Remedies) -> BudgetExceeded:
        """The error to raise, with its report. Plans other variants of the step, so none may be half made."""
        lines: Sequence[str] = []
        if self.most_bytes is not None:
            lines = remedies(self.plan, self.most_bytes, self.needed)
        return budget_exceeded(_report(self, lines))


def refusal(plan: Plan, device: Device, budget: BudgetLike | None = None) -> Refusal | None:
    """None when the plan fits next to everything that is live on the device; else why not."""
    memory = device.memory
    memory.settle()
    limit, _ = memory.tightest()
    if limit is not None and memory.pool.segment_bytes and memory.held_bytes > limit:
        memory.pool.release_cached()  # a limit that was lowered takes these, so their holes are not to be counted on
    limit, text = _limit(device, budget)
    if limit is None:
        return None
    needed = needed_bytes(plan, device)
    if needed > limit:
        gc.collect()  # nothing is refused for the sake of garbage, or of room that other programs left in the arena
        memory.arena.release()  # however small: smaller variants of the step are not to be held against it either
        memory.stage.release()
        memory.settle()
        needed = needed_bytes(plan, device)
    if needed > limit:
        return Refusal(plan.unstaged(), device, limit, text, needed, None)
    if memory.in_host_memory:
        available = read_host_memory().available_bytes
        available += memory.held_bytes - memory.live_bytes  # cached blocks are given back first
        if needed - memory.live_bytes > available:
            return Refusal(plan.unstaged(), device, limit, text, needed, available)
    return None


def _limit(device: Device, budget: BudgetLike | None) -> tuple[int | None, str]:
    """The tightest limit, and as what it was declared."""
    limit, whose = device.memory.tightest()
    text = str(whose.budget)
    if budget is not None:
        parsed = parse_budget(budget, device.name)
        own = device.memory.resolve(parsed)
        if own is not None and (limit is None or own < limit):
            limit, text = own, str(parsed)
    return limit, text


def staged_where_it_fits(plan: Plan, device: Device, budget: BudgetLike | None = None) -> Plan:
    """A plan that was not refused, without its second set of input buffers where there is no room for that."""
    if not plan.staged_bytes:
        return plan
    limit, _ = _limit(device, budget)
    growth_bytes = max(0, plan.staged_bytes - device.memory.stage.nbytes)
    fits = limit is None or needed_bytes(plan, device) + growth_bytes <= limit
    return plan if fits else plan.unstaged()


def _created_bytes(plan: Plan) -> int:
    """Memory outside the arena that is to be taken, but for the second set of input buffers."""
    return sum(r.reserved_bytes for r in plan.residents if not r.exists) - plan.staged_bytes


def needed_bytes(plan: Plan, device: Device) -> int:
    """What the device would hold while a plan runs: what is live now, overhead included, and what the plan adds.

    A second set of input buffers is not counted: where there is no room, the step runs without.
    """
    created_bytes = _created_bytes(plan)
    growth_bytes = max(0, plan.arena_bytes - device.memory.ledger.by_kind["arena"])
    added_bytes = created_bytes + growth_bytes + plan.results_bytes
    return device.memory.live_bytes + added_bytes + _stuck_bytes(plan, device)


def _stuck_bytes(plan: Plan, device: Device) -> int:
    """Where all blocks lie in segments: the holes beside live blocks that are too small for the arena to grow into."""
    pool, growth_bytes = device.memory.pool, plan.arena_bytes - device.memory.ledger.by_kind["arena"]
    filled_bytes = _created_bytes(plan) + plan.results_bytes
    if not pool.segment_bytes or growth_bytes <= 0 or plan.arena_bytes + filled_bytes <= pool.largest_hole_bytes:
        return 0
    return max(0, pool.stuck_bytes - filled_bytes)


def _report(refused: Refusal, remedies: Sequence[str]) -> MemoryReport:
    plan, available = refused.plan, refused.available_bytes
    memory = refused.device.memory
    arena_bytes = memory.ledger.by_kind["arena"]
    by_kind = memory.live_by_kind()
    by_kind["arena"] -= arena_bytes
    for kind, nbytes in plan.by_kind().items():
        if kind != "overhead":  # counted already
            by_kind[kind] = by_kind.get(kind, 0) + nbytes
    for r in plan.residents:
        if r.exists:  # counted by the ledger already
            by_kind[r.value.category] -= r.value.nbytes
            by_kind["rounding"] -= r.reserved_bytes - r.value.nbytes
    spare_bytes = max(0, arena_bytes - plan.arena_bytes) + _stuck_bytes(plan, refused.device)
    by_kind["holes"] = by_kind.get("holes", 0) + spare_bytes
    return plan_report(
        plan,
        budget_bytes=refused.limit_bytes,
        budget_text=refused.limit_text,
        needed_bytes=refused.needed_bytes,
        live_bytes=memory.live_bytes,
        by_kind=by_kind,
        available_bytes=available,
        available_text=read_host_memory().tightest_available[0] if available is not None else "",
        remedies=list(remedies),
        notes=memory.notes(memory.tightest()[1]),
        exactness=memory.exactness(),
    )


def plan_report(plan: Plan, **figures: Any) -> MemoryReport:
    """The report of a plan: what it says of itself, and figures of whoever holds it against a budget."""
    return MemoryReport(
        device=plan.device,
        what=plan.what,
        phase="plan",
        requested_bytes=0,
        by_layer=[(layer, sum(row.values())) for layer, row in plan.by_layer() if layer],
        largest=largest(plan),
        peak_at=plan.peak_at,
        **figures,
    )


def largest(plan: Plan, count: int = 5) -> list[LiveBlock]:
    """The largest blocks at the peak, equal ones together."""
    found: dict[tuple[Any, ...], list[Any]] = {}
    for b in plan.alive_at_peak():
        key = (b.op, b.layer, b.shape, b.dtype, b.nbytes, b.site, b.kind)
        found.setdefault(key, [0])[0] += 1
        if len(found) > count + 32:
            break
    blocks = [LiveBlock(op, layer, shape, dtype, nbytes, n[0], site, kind)
              for (op, layer, shape, dtype, nbytes, site, kind), n in found.items()]  # fmt: skip
    return blocks[:count]
