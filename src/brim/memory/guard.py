"""The guard of a device's memory: which budget is in force, who asks before allocating, and how a refusal is explained.

One ``DeviceMemory`` per device joins budget, host limits, pool and ledger. Budgets nest: an inner one may only lower.
"""

from __future__ import annotations

import os
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from brim.backend import Backend
from brim.context import context
from brim.errors import BudgetExceeded
from brim.memory.arena import Arena
from brim.memory.budget import Budget, BudgetLike, budget_for, budget_from_environment, parse_budget, tighter
from brim.memory.host import read_host_memory
from brim.memory.ledger import BlockRecord, Ledger, user_site
from brim.memory.pool import Block, Pool, Refusal
from brim.memory.report import LiveBlock, MemoryReport, budget_exceeded, render
from brim.spec import Spec

__all__ = ["DeviceMemory", "give_back_on_refusal"]

# The host is asked again how much it could give whenever this much has been taken since it was last asked.
_ASK_EVERY_BYTES = 16 * 2**20


class DeviceMemory:
    """Budget, pool and ledger of one device.

    Attributes:
        ledger: every live block.
        pool: where blocks come from.
        arena: where planned steps run.
        budget: the budget in force.
        limit_bytes: what it comes to here, or None for no limit.
    """

    def __init__(self, name: str, backend: Backend, index: int) -> None:
        self.name, self._backend, self._index = name, backend, index
        self.ledger = Ledger(name)
        self.pool = Pool(
            lambda nbytes: backend.allocate(index, nbytes),
            self.ledger,
            alignment_bytes=backend.alignment_bytes,
            limit=lambda: self.limit_bytes,
            available=self._available,
            refuse=self._refuse,
        )
        self.arena = Arena(lambda nbytes: self.allocate(nbytes, "arena", "arena"))
        self._lock = threading.Lock()
        self._taken_since_asked = _ASK_EVERY_BYTES
        self._stack: list[tuple[Budget, int | None]] = []
        self.set_budget(budget_for(budget_from_environment(), name))

    # ---------------------------------------------------------------- budgets

    @property
    def budget(self) -> Budget:
        return self._stack[-1][0]

    @property
    def limit_bytes(self) -> int | None:
        return self._stack[-1][1]

    def _resolve(self, budget: Budget) -> int | None:
        total, available, headroom = self.sizes()
        # What the pool holds already is this process's to keep, so "auto" may count on it.
        return budget.resolve(total, available + self.pool.held_bytes, headroom)

    def sizes(self) -> tuple[int, int, int]:
        info = self._backend.memory(self._index)
        host = read_host_memory()
        if info is None:
            return host.limit_bytes, host.available_bytes, host.headroom_bytes
        return info.total_bytes, info.available_bytes, host.headroom_bytes

    def set_budget(self, budget: BudgetLike) -> None:
        """Declare the outermost budget, in the grammar of ``memory/budget.py``. Not inside a ``with`` budget."""
        if len(self._stack) > 1:
            raise RuntimeError("set_budget() inside a 'with brim.budget(...)' block; leave the block first")
        parsed = parse_budget(budget, self.name)
        resolved = self._resolve(parsed)
        with self._lock:
            self._stack[:] = [(parsed, resolved)]

    @contextmanager
    def lowered(self, budget: BudgetLike) -> Iterator[None]:
        """A tighter budget inside the block; what a refused operation left behind is given back on the way out."""
        parsed = parse_budget(budget, self.name)
        entry = (parsed, tighter(self.limit_bytes, self._resolve(parsed), parsed))
        with self._lock:
            self._stack.append(entry)
        try:
            with give_back_on_refusal():
                yield
        finally:
            with self._lock:
                self._stack.remove(entry)

    def _available(self, nbytes: int) -> int | None:
        if self.limit_bytes is None or not self._backend.shares_host_memory:
            return None
        self._taken_since_asked += nbytes
        if self._taken_since_asked < _ASK_EVERY_BYTES:
            return None
        self._taken_since_asked = 0
        return read_host_memory().available_bytes

    # ---------------------------------------------------------------- blocks

    def allocate(self, nbytes: int, category: str, op: str, spec: Spec | None = None) -> Block:
        """A block booked with the current layer and the user's line. Raises BudgetExceeded when it does not fit."""
        record = BlockRecord(nbytes, category, op, context.layer, user_site())
        if spec is not None:
            record.shape, record.dtype = spec.shape, spec.dtype
        return self.pool.allocate(nbytes, record)

    def adopt(self, buffer: Any, spec: Spec, category: str, op: str) -> Block:
        """Book memory that the user allocated; it counts against the budget."""
        record = BlockRecord(spec.nbytes, category, op, context.layer, user_site(), 0, spec.shape, spec.dtype)
        return self.pool.adopt(buffer, record)

    # ---------------------------------------------------------------- explaining

    def _refuse(self, refusal: Refusal) -> BudgetExceeded:
        record = refusal.record
        shape = "x".join(map(str, record.shape)) if record.shape else ""
        what = f"{record.op} output {record.dtype}[{shape}]" if shape else f"{record.op} {record.category}"
        from_host = refusal.reason == "host"
        notes = [f"in layer {record.layer}"] if record.layer else []
        by_kind = dict(self.ledger.by_kind)
        by_kind["holes"] = refusal.held_bytes - refusal.live_bytes
        by_kind[record.category] += record.nbytes
        by_kind["rounding"] += record.rounding_bytes
        return budget_exceeded(
            MemoryReport(
                device=self.name,
                what=what,
                phase="eager",
                budget_bytes=self.limit_bytes if from_host else refusal.limit_bytes,
                budget_text=str(self.budget),
                needed_bytes=refusal.held_bytes + record.reserved_bytes,
                live_bytes=refusal.held_bytes,
                requested_bytes=record.reserved_bytes,
                by_kind=by_kind,
                by_layer=self._by_layer(),
                largest=self._largest(),
                peak_at=record.where,
                total_free_bytes=refusal.total_free_bytes,
                largest_hole_bytes=refusal.largest_hole_bytes,
                available_bytes=refusal.limit_bytes if from_host else None,
                available_text=read_host_memory().tightest_available[0] if from_host else "",
                notes=notes,
            )
        )

    def _by_layer(self) -> list[tuple[str, int]]:
        sums: dict[str, int] = {}
        for record in self.ledger.records:
            if record.layer:
                sums[record.layer] = sums.get(record.layer, 0) + record.reserved_bytes
        return sorted(sums.items(), key=lambda item: (-item[1], item[0]))

    def _largest(self, count: int = 5) -> list[LiveBlock]:
        grouped: dict[tuple[Any, ...], LiveBlock] = {}
        for r in self.ledger.snapshot():
            key = (r.op, r.layer, r.shape, str(r.dtype), r.nbytes, r.where, r.category)
            if key in grouped:
                old = grouped[key]
                grouped[key] = LiveBlock(*key[:5], old.count + 1, *key[5:])  # type: ignore[arg-type]
            elif len(grouped) < count:
                op, layer, shape, dtype, nbytes, site, kind = key
                grouped[key] = LiveBlock(op, layer, shape or (), dtype, nbytes, 1, site, kind)
            else:
                break
        return list(grouped.values())

    def report_text(self) -> str:
        """What is held now against the budget, as ``memory/report.py`` prints it."""
        self.pool.settle()
        held = self.pool.held_bytes
        by_kind = {**self.ledger.by_kind, "holes": held - self.ledger.live_bytes}
        return render(
            MemoryReport(
                device=self.name,
                what="memory",
                phase="eager",
                budget_bytes=self.limit_bytes,
                budget_text=str(self.budget),
                needed_bytes=held,
                live_bytes=held,
                requested_bytes=0,
                by_kind=by_kind,
                by_layer=self._by_layer(),
                largest=self._largest(),
                total_free_bytes=self.pool.free_bytes,
                largest_hole_bytes=self.pool.largest_hole_bytes,
            )
        )

    def stats(self) -> dict[str, Any]:
        """Live, peak, held and limit in bytes, and live bytes by kind (they sum to live plus holes = held)."""
        self.pool.settle()
        held, live = self.pool.held_bytes, self.ledger.live_bytes
        return {
            "device": self.name,
            "budget": str(self.budget),
            "limit_bytes": self.limit_bytes,
            "live_bytes": live,
            "held_bytes": held,
            "peak_bytes": self.ledger.peak_bytes,
            "peak_held_bytes": self.pool.peak_held_bytes,
            "by_kind": {**self.ledger.by_kind, "holes": held - live},
            "peak_by_kind": dict(self.ledger.peak_by_kind),
            "allocations": self.ledger.allocations,
        }

    def reset_peak(self) -> None:
        """Start new high-water marks at what is live and held now."""
        self.pool.settle()
        self.ledger.reset_peak()
        self.pool.peak_held_bytes = self.pool.held_bytes


@contextmanager
def give_back_on_refusal() -> Iterator[None]:
    """When a BudgetExceeded passes, clear the frames it carries, so that what they held is free at once.

    A traceback keeps every frame below alive, and with them the tensors of the step that failed.
    """
    try:
        yield
    except BudgetExceeded as error:
        clear_frames(error)
        raise


def clear_frames(error: BaseException) -> None:
    """Drop the local variables of all finished frames of an error and of what it was raised from."""
    seen: set[int] = set()
    pending: list[BaseException | None] = [error]
    while pending:
        one = pending.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        traceback.clear_frames(one.__traceback__)
        pending += [one.__cause__, one.__context__]


def _after_fork_in_child() -> None:
    """Locks held by other threads at the fork would stay locked for ever in the child."""
    device_module = sys.modules.get("brim.device")
    for found in list(getattr(device_module, "_devices", {}).values()):
        if found.memory is not None:
            found.memory.pool.after_fork()
            found.memory.arena.lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
