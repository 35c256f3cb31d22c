"""The guard of a device's memory: which budget is in force, who asks before allocating, and how a refusal is explained.

One ``DeviceMemory`` per device joins budget, host limits, pool and ledger. Budgets nest: an inner one may only lower.
A budget is for everything that this process holds on the device: the pool, and the overhead of contexts and libraries.
Devices that compute in the host's memory are held against each other's budgets too, since what one holds the others
cannot have.
"""

from __future__ import annotations

import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from brim.backend import Backend, HostMemoryView, HostServices
from brim.context import context
from brim.errors import BudgetExceeded
from brim.memory.arena import Arena
from brim.memory.budget import Budget, BudgetLike, budget_for, budget_from_environment, parse_budget, tighter
from brim.memory.host import read_host_memory, rss_bytes
from brim.memory.ledger import CATEGORIES, BlockRecord, Ledger, user_site
from brim.memory.pool import SMALL_BYTES, Block, Pool, PoolLock, Refusal
from brim.memory.report import Exactness, LiveBlock, MemoryReport, budget_exceeded, render
from brim.spec import Spec
from brim.units import format_bytes

__all__ = ["DeviceMemory", "give_back_on_refusal"]

# The host is asked again how much it could give whenever this much has been taken since it was last asked.
_ASK_EVERY_BYTES = 16 * 2**20


class DeviceMemory:
    """Budget, pool and ledger of one device. Making it starts the device, so that its overhead is known.

    Arguments:
        name: of the device.
        backend: whose memory it is.
        index: number of the device.
        host: the host's memory; None where this is it.

    Attributes:
        ledger: every live block.
        pool: where blocks come from.
        arena: where planned steps run.
        stage: where the inputs of the next planned step arrive, on devices that want them there.
        budget: the budget in force.
        limit_bytes: what it comes to here, or None for no limit; the overhead is included.
        overhead_bytes: what context, modules and libraries of this process hold on the device.
        overhead_exactness: how that is known.
        in_host_memory: whether the device's memory is the host's.
    """

    def __init__(self, name: str, backend: Backend, index: int, host: DeviceMemory | None = None) -> None:
        self.name, self._backend, self._index = name, backend, index
        self._host = host or self
        self.ledger = Ledger(name)
        self._lock = threading.Lock()
        self._taken_since_asked = _ASK_EVERY_BYTES
        self._stack: list[tuple[Budget, int | None]] = []
        connect: Callable[[int, HostServices], None] | None = getattr(backend, "connect", None)
        if connect is not None:
            connect(index, HostServices(self._trim, self._charge_host, self._host_view))
        info = backend.memory(index)  # starts the device
        self.in_host_memory = info is None or info.unified
        self.overhead_bytes = 0 if info is None else info.overhead_bytes
        self.overhead_exactness: Exactness = "exact" if info is None else info.overhead_exactness
        shared = self.in_host_memory and self._host is not self
        self._together: list[DeviceMemory] = self._host._together if shared else []
        lock: PoolLock = self._host.pool.lock if shared else PoolLock()
        self.pool: Pool = Pool(
            lambda nbytes: backend.allocate(index, nbytes),
            self.ledger,
            alignment_bytes=backend.alignment_bytes,
            small_bytes=0 if backend.segment_bytes else SMALL_BYTES,
            segment_bytes=backend.segment_bytes,
            limit=self._pool_limit,
            available=self._available,
            refuse=self._refuse,
            relieve=self._relieve,
            lock=lock,
        )
        self.arena = Arena(lambda nbytes: self.allocate(nbytes, "arena", "arena"))
        self.stage = Arena(lambda nbytes: self.allocate(nbytes, "inputs", "stage"))
        self._together.append(self)
        try:
            self.set_budget(budget_for(budget_from_environment(), name))
        except BaseException:
            self._together.remove(self)
            raise

    # ---------------------------------------------------------------- budgets

    @property
    def budget(self) -> Budget:
        return self._stack[-1][0]

    @property
    def limit_bytes(self) -> int | None:
        return self._stack[-1][1]

    def resolve(self, budget: Budget) -> int | None:
        """What a budget comes to on this device; None for no limit."""
        total, available, headroom = self.sizes()
        # What is held already is this process's to keep, so "auto" may count on it.
        return budget.resolve(total, available + self.held_bytes, headroom)

    def sizes(self) -> tuple[int, int, int]:
        """Total, available now, and headroom of the device, in bytes; the available ones are read anew."""
        info = self._backend.memory(self._index)
        if info is not None and not info.unified:
            return info.total_bytes, info.available_bytes, info.headroom_bytes
        host = read_host_memory()
        if info is None:
            return host.limit_bytes, host.available_bytes, host.headroom_bytes
        return info.total_bytes, host.available_bytes, info.headroom_bytes

    def tightest(self) -> tuple[int | None, DeviceMemory]:
        """The limit that decides here, and the device whose budget it is: another one's, where they share memory."""
        limit, whose = self.limit_bytes, self
        for other in self._together:
            if other.limit_bytes is not None and (limit is None or other.limit_bytes < limit):
                limit, whose = other.limit_bytes, other
        return limit, whose

    def set_budget(self, budget: BudgetLike) -> None:
        """Declare the outermost budget, in the grammar of ``memory/budget.py``. Not inside a ``with`` budget."""
        if len(self._stack) > 1:
            raise RuntimeError("set_budget() inside a 'with brim.budget(...)' block; leave the block first")
        parsed = parse_budget(budget, self.name)
        resolved = self.resolve(parsed)
        self._check_overhead(parsed, resolved)
        with self._lock:
            self._stack[:] = [(parsed, resolved)]

    @contextmanager
    def lowered(self, budget: BudgetLike) -> Iterator[None]:
        """A tighter budget inside the block; what a refused operation left behind is given back on the way out."""
        parsed = parse_budget(budget, self.name)
        entry = (parsed, tighter(self.limit_bytes, self.resolve(parsed), parsed))
        self._check_overhead(*entry)
        with self._lock:
            self._stack.append(entry)
        try:
            with give_back_on_refusal():
                yield
        finally:
            with self._lock:
                self._stack.remove(entry)

    def _check_overhead(self, budget: Budget, limit_bytes: int | None) -> None:
        """Refuse a budget that is spent before the first tensor; ``auto``, which asks for no amount, is let pass."""
        if limit_bytes is None or limit_bytes >= self.overhead_bytes or budget.kind == "auto":
            return
        exact = format_bytes(limit_bytes) == format_bytes(self.overhead_bytes)
        report = self._status(limit_bytes, str(budget))
        raise BudgetExceeded(
            f"a budget of {format_bytes(limit_bytes, exact=exact)} for {self.name} is less than its overhead: context, "
            f"modules and libraries of this process hold {format_bytes(self.overhead_bytes, exact=exact)} "
            f"({self.overhead_exactness}) there before the first tensor; declare more than that, or take device 'cpu'",
            report,
        )

    def _pool_limit(self) -> int | None:
        """The most that the pool may hold: the limit less the overhead, and less what others hold in this memory."""
        if len(self._together) == 1:  # asked at every allocation
            limit = self.limit_bytes
            return None if limit is None else max(0, limit - self.overhead_bytes)
        limit, _ = self.tightest()
        return None if limit is None else max(0, limit - self.held_bytes + self.pool.held_bytes)

    def _relieve(self, wanted_bytes: int) -> None:
        """Give back what others hold in this memory without need; the lock is theirs too."""
        for other in self._together:
            if other is not self:
                before = other.pool.held_bytes
                other.pool.give_back(wanted_bytes)
                wanted_bytes -= before - other.pool.held_bytes

    def _available(self, nbytes: int) -> int | None:
        if self.limit_bytes is None or not self.in_host_memory:
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

    # ---------------------------------------------------------------- for the backend

    def _trim(self) -> int:
        pool = getattr(self, "pool", None)  # None while the device is being started
        return 0 if pool is None else pool.release_cached()

    def _charge_host(self, nbytes: int, category: str) -> Callable[[], None]:
        if category not in CATEGORIES:
            raise ValueError(f"no category of memory {category!r}; known are {', '.join(CATEGORIES)}")
        record = BlockRecord(nbytes, category, f"{self.name} staging", "", user_site())
        booked = [self._host.pool.charge(record)]
        return booked.clear

    def _host_view(self) -> HostMemoryView:
        memory = read_host_memory()
        return HostMemoryView(memory.limit_bytes, memory.available_bytes, self._host.pool.held_bytes, rss_bytes())

    # ---------------------------------------------------------------- books

    @property
    def held_bytes(self) -> int:
        """Everything that counts against the limit, overhead, cached blocks and those who share the memory included."""
        return sum(one.pool.held_bytes + one.overhead_bytes for one in self._together)

    @property
    def live_bytes(self) -> int:
        """What of ``held_bytes`` cannot be given back."""
        return sum(one.ledger.live_bytes + one.overhead_bytes for one in self._together)

    def live_by_kind(self) -> dict[str, int]:
        """``live_bytes`` by category, and "overhead"."""
        found = dict(self.ledger.by_kind)
        for other in self._together:
            if other is not self:
                for kind, nbytes in other.ledger.by_kind.items():
                    found[kind] += nbytes
        found["overhead"] = sum(one.overhead_bytes for one in self._together)
        return found

    def settle(self) -> None:
        """Book everything that was freed so far."""
        for one in self._together:
            one.pool.settle()

    def exactness(self) -> dict[str, Exactness]:
        """Class of the overhead where it is not exact, for reports."""
        classes = {one.overhead_exactness for one in self._together if one.overhead_bytes}
        worst: list[Exactness] = ["estimated", "measured"]
        return next(({"overhead": one} for one in worst if one in classes), {})

    def notes(self, whose: DeviceMemory) -> list[str]:
        """What a report says of those who share the memory; ``whose`` budget decides."""
        lines = [f"the budget is that of {whose.name}, which computes in the same memory"] if whose is not self else []
        for other in self._together:
            if other is not self and (nbytes := other.pool.held_bytes + other.overhead_bytes):
                lines.append(f"{other.name} holds {format_bytes(nbytes)} of it: the memory is the same")
        return lines

    # ---------------------------------------------------------------- explaining

    def _refuse(self, refusal: Refusal) -> BudgetExceeded:
        record = refusal.record
        shape = "x".join(map(str, record.shape)) if record.shape else ""
        what = f"{record.op} output {record.dtype}[{shape}]" if shape else f"{record.op} {record.category}"
        from_host = refusal.reason == "host"
        limit, whose = self.tightest()
        held, live = self.held_bytes, self.live_bytes
        by_kind = self.live_by_kind()
        by_kind["holes"] = held - live
        by_kind[record.category] += record.nbytes
        by_kind["rounding"] += record.rounding_bytes
        return budget_exceeded(
            MemoryReport(
                device=self.name,
                what=what,
                phase="eager",
                budget_bytes=limit,
                budget_text=str(whose.budget),
                needed_bytes=held + record.reserved_bytes,
                live_bytes=held,
                requested_bytes=record.reserved_bytes,
                by_kind=by_kind,
                by_layer=self._by_layer(),
                largest=self._largest(),
                peak_at=record.where,
                total_free_bytes=refusal.total_free_bytes,
                largest_hole_bytes=refusal.largest_hole_bytes,
                available_bytes=refusal.limit_bytes if from_host else None,
                available_text=read_host_memory().tightest_available[0] if from_host else "",
                notes=([f"in layer {record.layer}"] if record.layer else []) + self.notes(whose),
                exactness=self.exactness(),
            )
        )

    def _by_layer(self) -> list[tuple[str, int]]:
        sums: dict[str, int] = {}
        for one in self._together:
            for record in one.ledger.records:
                if record.layer:
                    sums[record.layer] = sums.get(record.layer, 0) + record.reserved_bytes
        return sorted(sums.items(), key=lambda item: (-item[1], item[0]))

    def _largest(self, count: int = 5) -> list[LiveBlock]:
        grouped: dict[tuple[Any, ...], LiveBlock] = {}
        records = [r for one in self._together for r in one.ledger.records]
        records.sort(key=lambda r: (-r.reserved_bytes, r.layer, r.op, r.where))
        for r in records:
            shape, dtype = (r.shape, str(r.dtype)) if r.shape is not None else ((r.nbytes,), "uint8")
            key = (r.op, r.layer, shape, dtype, r.nbytes, r.where, r.category)
            if key in grouped:
                grouped[key] = replace(grouped[key], count=grouped[key].count + 1)
            elif len(grouped) < count:
                grouped[key] = LiveBlock(r.op, r.layer, shape, dtype, r.nbytes, 1, r.where, r.category)
            else:
                break
        return list(grouped.values())

    def report_text(self) -> str:
        """What is held now against the budget, as ``memory/report.py`` prints it."""
        self.settle()
        limit, whose = self.tightest()
        return render(self._status(limit, str(whose.budget), self.notes(whose)))

    def _status(self, limit_bytes: int | None, budget_text: str, notes: Sequence[str] = ()) -> MemoryReport:
        held = self.held_bytes
        return MemoryReport(
            device=self.name,
            what="memory",
            phase="eager",
            budget_bytes=limit_bytes,
            budget_text=budget_text,
            needed_bytes=held,
            live_bytes=held,
            requested_bytes=0,
            by_kind={**self.live_by_kind(), "holes": held - self.live_bytes},
            by_layer=self._by_layer(),
            largest=self._largest(),
            total_free_bytes=self.pool.free_bytes,
            largest_hole_bytes=self.pool.largest_hole_bytes,
            notes=list(notes),
            exactness=self.exactness(),
        )

    def stats(self) -> dict[str, Any]:
        """The device's own books in bytes: live (overhead included), held, peaks, and live bytes by kind.

        The kinds sum to live plus holes = held; ``shared_bytes`` is what other devices hold in the same memory.
        """
        self.pool.settle()
        held, live = self.pool.held_bytes, self.ledger.live_bytes
        overhead = self.overhead_bytes
        return {
            "device": self.name,
            "budget": str(self.budget),
            "limit_bytes": self.limit_bytes,
            "live_bytes": live + overhead,
            "held_bytes": held + overhead,
            "peak_bytes": self.ledger.peak_bytes + overhead,
            "peak_held_bytes": self.pool.peak_held_bytes + overhead,
            "shared_bytes": self.held_bytes - held - overhead,
            "by_kind": {**self.ledger.by_kind, "overhead": overhead, "holes": held - live},
            "peak_by_kind": {**self.ledger.peak_by_kind, "overhead": overhead},
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
            found.memory.stage.lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
