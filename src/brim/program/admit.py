"""The gate before a planned step: what the device holds already plus what the plan adds must be within the budget."""

from __future__ import annotations

from typing import Any

from brim.device import Device
from brim.memory.budget import BudgetLike, parse_budget
from brim.memory.host import read_host_memory
from brim.memory.report import LiveBlock, MemoryReport, budget_exceeded
from brim.program.plan import Plan

__all__ = ["admit"]


def admit(plan: Plan, device: Device, budget: BudgetLike | None = None, remedies: Any = None) -> None:
    """Return when the plan fits next to everything that is live on the device.

    Arguments:
        plan: of the step about to run.
        device: where.
        budget: a tighter budget than the device's, or None.
        remedies: called with (plan, bytes the plan may need) when it does not fit; gives lines for the report.

    Raises:
        BudgetExceeded: it does not fit; nothing was allocated.
    """
    memory = device.memory
    memory.pool.settle()
    limit, text = memory.limit_bytes, str(memory.budget)
    if budget is not None:
        own = parse_budget(budget, device.name).resolve(*memory.sizes())
        if own is not None and (limit is None or own < limit):
            limit, text = own, str(parse_budget(budget, device.name))
    ledger = memory.ledger
    arena_bytes = ledger.by_kind["arena"]
    created_bytes = sum(r.reserved_bytes for r in plan.residents if not r.exists)
    growth_bytes = max(0, plan.arena_bytes - arena_bytes)
    new_bytes = created_bytes + growth_bytes + plan.results_bytes
    needed_bytes = ledger.live_bytes + new_bytes
    available = read_host_memory().available_bytes if device.backend.shares_host_memory and limit is not None else None
    if available is not None:
        available += memory.pool.held_bytes - ledger.live_bytes  # cached blocks are given back before more is taken
    over = limit is not None and needed_bytes > limit
    short = available is not None and new_bytes > available
    if not (over or short):
        return
    other_bytes = needed_bytes - plan.peak_bytes
    raise budget_exceeded(
        _report(plan, device, limit, text, needed_bytes, available if short and not over else None,
                remedies(plan, limit - other_bytes) if remedies and over and limit is not None else [])  # fmt: skip
    )


def _report(
    plan: Plan, device: Device, limit: int | None, text: str, needed_bytes: int, available: int | None, remedies: Any
) -> MemoryReport:
    ledger = device.memory.ledger
    by_kind = {k: v for k, v in ledger.by_kind.items() if k != "arena"}
    existing = {r.key for r in plan.residents if r.exists}
    for kind, nbytes in plan.by_kind().items():
        by_kind[kind] = by_kind.get(kind, 0) + nbytes
    for r in plan.residents:  # counted by the ledger already
        if r.key in existing:
            by_kind[r.value.category] -= r.value.nbytes
            by_kind["rounding"] -= r.reserved_bytes - r.value.nbytes
    spare_bytes = max(0, ledger.by_kind["arena"] - plan.arena_bytes)
    by_kind["holes"] = by_kind.get("holes", 0) + spare_bytes
    layers = [(layer, sum(row.values())) for layer, row in plan.by_layer() if layer]
    return MemoryReport(
        device=plan.device,
        what=plan.what,
        phase="plan",
        budget_bytes=limit,
        budget_text=text,
        needed_bytes=needed_bytes,
        live_bytes=ledger.live_bytes,
        requested_bytes=0,
        by_kind=by_kind,
        by_layer=layers,
        largest=largest(plan),
        peak_at=plan.peak_at,
        available_bytes=available,
        available_text=read_host_memory().tightest_available[0] if available is not None else "",
        remedies=list(remedies),
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
