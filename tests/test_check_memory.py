"""``brim check``, memory: leaks, budgets that are passed or not kept, refusals, two processes on one device."""

from __future__ import annotations

import mmap
import re
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import pytest

import brim
import brim.op
from brim.check import memory, pair
from brim.check.compare import Mismatch
from brim.check.long_run import LongRun
from brim.check.networks import NETWORKS, compiled, make
from brim.check.result import Check, Result, Skip, perform
from brim.check.two_processes import SPARE_BYTES
from brim.memory.host import read_host_memory
from brim.program.compile import CompiledStep
from second_device import results_of

CPU = brim.device("cpu")
SHORT = LongRun(width=16, steps=12)
pytestmark = pytest.mark.usefixtures("fresh_kernels")


# ---------------------------------------------------------------- memory


def memory_results(device: Any, **options: Any) -> dict[str, Result]:
    return results_of(memory.checks(device, **{"quick": True, "names": ["mlp"], "long_run": SHORT, **options}))


def memory_row(device: Any, name: str) -> Result:
    (check,) = (c for c in memory.checks(device, quick=True, names=["mlp"], long_run=SHORT) if c.name == name)
    return perform(check)


PEAK, RUN, REFUSED, TENSOR, OVERHEAD = (
    "mlp, planned = held",
    "12 steps within a budget",
    "mlp, a refused step",
    "a refused tensor",
    "overhead",
)


def test_networks_are_users_code_in_reports() -> None:
    net = make("mlp")
    plan = compiled(net)[0].plan(*net.calls[0][1])
    sites = {block.site.rpartition("/")[2].partition(":")[0] for block in plan.alive_at_peak() if block.site}
    assert sites
    assert sites <= {"dense.py", "net.py"}


def test_memory_passes_on_the_cpu() -> None:
    found = memory_results(CPU)
    assert {name: r.outcome for name, r in found.items()} == {
        PEAK: "passed", RUN: "passed", REFUSED: "passed", TENSOR: "passed", OVERHEAD: "skipped",
    }  # fmt: skip
    run = found[RUN].figures
    assert run["most_bytes"] == run["budget_bytes"] == run["needed_bytes"]  # on the host to the byte
    assert run["samples"] >= 20
    assert run["steps"] >= 12


def test_memory_passes_on_a_device_of_its_own(second: Any) -> None:
    device, backend = second
    backend.counted = lambda: device.memory.held_bytes + 2**20
    found = memory_results(device)
    assert {name: r.reason for name, r in found.items() if r.outcome != "passed"} == {}
    assert found[OVERHEAD].compared == "1.0 MiB (exact) counted, 1.0 MiB not"
    run = found[RUN].figures
    assert run["needed_bytes"] < run["most_bytes"] <= run["budget_bytes"]
    backend.counted = lambda: None
    assert "nobody tells" in memory_row(device, OVERHEAD).reason


def test_a_step_that_leaks_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Any] = []
    call = CompiledStep.__call__

    def leaking(self: Any, *args: Any, **kwargs: Any) -> Any:
        kept.append(brim.zeros(1000))
        return call(self, *args, **kwargs)

    monkeypatch.setattr(CompiledStep, "__call__", leaking)
    found = memory_results(CPU)
    assert found[PEAK].outcome == found[RUN].outcome == found[REFUSED].outcome == "failed"
    assert re.fullmatch(r"planned 2\d,\d{3} B, but held 4\d,\d{3} B", found[PEAK].reason)  # as many as kernels need
    assert found[REFUSED].reason.startswith("the refusal changed live bytes from ")
    kept.clear()


def test_what_a_network_leaves_behind_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Any] = []
    build = NETWORKS["mlp"]

    def keeping(times: int = 1) -> Any:
        net = build(times)
        kept.append(net.modules[0][0].bias)
        return net

    monkeypatch.setitem(NETWORKS, "mlp", keeping)
    result = memory_row(CPU, PEAK)
    assert result.outcome == "failed"
    assert "still held when the network is gone" in result.reason


def test_use_over_the_budget_fails(second: Any) -> None:
    device, backend = second
    calls = iter(range(10**9))
    backend.counted = lambda: device.memory.held_bytes + (100 * 2**20 if next(calls) == 9 else 0)
    result = memory_row(device, RUN)
    assert result.outcome == "failed"
    assert "the driver showed" in result.reason
    backend.counted = lambda: device.memory.held_bytes + 100 * 2**20
    assert "more than it may be" in memory_row(device, OVERHEAD).reason


def test_a_driver_that_fails_while_it_is_watched_fails_the_row(second: Any) -> None:
    device, backend = second
    calls = iter(range(10**9))

    def lost() -> int:
        if next(calls) > 8:
            raise RuntimeError("device lost")
        return 0

    backend.counted = lost
    result = memory_row(device, RUN)
    assert (result.outcome, result.reason) == ("failed", "RuntimeError: device lost")


def test_memory_that_brim_does_not_count_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Any] = []
    call = CompiledStep.__call__

    def leaking(self: Any, *args: Any, **kwargs: Any) -> Any:
        fresh = np.frombuffer(mmap.mmap(-1, 8 * 2**20), np.uint8)  # the heap may have pages that were touched before
        fresh[:] = 1
        kept.append(fresh)
        return call(self, *args, **kwargs)

    monkeypatch.setattr(CompiledStep, "__call__", leaking)
    result = memory_row(CPU, RUN)
    kept.clear()
    assert result.outcome == "failed"
    assert result.reason.startswith("the process grew by ")


def test_a_long_run_that_learns_nothing_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(brim.optim.Adam, "step", lambda self: None)
    assert memory_row(CPU, RUN).reason.startswith("the loss did not fall: ")


def test_what_does_not_fit_the_budget_in_force_is_skipped() -> None:
    tight = CPU.memory.held_bytes + 4096
    with brim.budget(tight, "cpu"):
        assert memory_row(CPU, RUN).reason.startswith("it needs ")
        assert memory_row(CPU, TENSOR).outcome == "passed"
    with brim.budget(CPU.memory.held_bytes + 64, "cpu"):
        result = memory_row(CPU, RUN)
    assert result.outcome == "skipped"
    assert result.reason.startswith("its model alone does not fit: ")


def test_a_budget_that_is_not_enforced_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    make = CompiledStep.__init__
    monkeypatch.setattr(
        CompiledStep, "__init__", lambda self, fn, *, budget=None, **more: make(self, fn, budget=None, **more)
    )
    reason = memory_row(CPU, REFUSED).reason
    assert re.fullmatch(r"a step that needs [\d,]+ B ran under a budget of one byte less", reason)
    monkeypatch.setattr(CPU.memory.pool, "_limit", lambda: None)
    assert "was made where the budget left" in memory_row(CPU, TENSOR).reason


# ---------------------------------------------------------------- two processes


def test_two_processes_on_the_cpu() -> None:
    try:
        both, refused = pair.check_coexistence(CPU), pair.check_shared_refusal(CPU)
    except Skip as skip:
        pytest.skip(str(skip))
    assert both.figures["first_bytes"] == both.figures["second_bytes"] == pair.SMALL_BYTES - SPARE_BYTES
    assert "Nothing was allocated" in refused.figures["message"]


class FakeProcess:
    """Another process of a device with memory of its own, which never ran. ``replies``: what they say, in order."""

    replies: ClassVar[list[dict[str, Any]]] = []
    losses: ClassVar[list[list[float]]] = []
    budgets: ClassVar[list[str]] = []

    def __init__(self, device: Any, budget: str, nbytes: int | None = None, *, touch: bool) -> None:
        self.budget = budget
        self.budgets.append(budget)
        self.reply = self.replies.pop(0)

    def __enter__(self) -> FakeProcess:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def go_on(self) -> dict[str, Any]:
        return {"losses": self.losses.pop(0)}


HOLDS = {"outcome": "holds", "bytes": 450 * 2**20}
NO = {"outcome": "refused", "error": "BudgetExceeded", "message": "not enough\nby far"}


@pytest.mark.parametrize(
    ("together", "replies", "losses", "expected"),
    [
        (True, [HOLDS, HOLDS], [[2.0, 1.0], [2.0, 1.0]], "45 % each: 450.0 MiB and 450.0 MiB held at once"),
        (True, [HOLDS, NO], [], "failed: a process under 45% was refused: not enough"),
        (True, [HOLDS, HOLDS], [[2.0, 1.0], [2.0, 1.5]], "failed: two processes trained the same model differently"),
        (True, [HOLDS, HOLDS], [[1.0, 2.0], [1.0, 2.0]], "failed: two processes trained the same model differently"),
        (False, [HOLDS, NO], [[2.0, 1.0]], "60 % refused beside 60 % (450.0 MiB)"),
        (False, [HOLDS, HOLDS], [[2.0, 1.0]], "failed: two processes hold 60 % each"),
        (False, [NO], [], "failed: a process under 60% was refused: not enough"),
    ],
)
def test_two_processes_on_a_device_of_its_own(
    together: bool, replies: Any, losses: Any, expected: str, second: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pair, "available_backends", lambda: {"second": None})
    monkeypatch.setattr(pair, "Process", FakeProcess)
    FakeProcess.replies, FakeProcess.losses, FakeProcess.budgets = list(replies), list(losses), []
    check = pair.check_coexistence if together else pair.check_shared_refusal
    result = perform(Check("memory", "", "pair", lambda: check(second[0])))
    said = result.compared if result.outcome == "passed" else f"{result.outcome}: {result.reason}"
    assert said.startswith(expected)
    assert set(FakeProcess.budgets) == {"45%" if together else "60%"}


def test_two_processes_are_skipped_where_they_cannot_be_tried(second: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    device, backend = second
    with pytest.raises(Skip, match="second was registered in this process only"):
        pair.check_coexistence(device)
    monkeypatch.setattr(pair, "available_backends", lambda: {"second": None, "cpu": None})
    info = backend.memory(0)
    backend.memory = lambda index: replace(info, available_bytes=info.total_bytes // 2)
    with pytest.raises(Skip, match=r"it needs 90 % of second:0's 1.0 GiB, 512.0 MiB are free now"):
        pair.check_coexistence(device)
    with pytest.raises(Skip, match="it needs 65 %"):
        pair.check_shared_refusal(device)
    host = read_host_memory()
    monkeypatch.setattr(pair, "read_host_memory", lambda: replace(host, available_bytes=100 * 2**20))
    with pytest.raises(Skip, match=r"it needs 512.0 MiB available, so that nobody feels it; 100.0 MiB are"):
        pair.check_coexistence(CPU)
    with pytest.raises(Skip, match=r"it needs 2.0 GiB available"):
        pair.check_shared_refusal(CPU)


def test_memory_given_beside_a_neighbour_is_judged_by_what_was_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pair, "Process", FakeProcess)
    host = read_host_memory()
    gone = 2**32 - pair.NEIGHBOUR_BYTES
    readings = [2**32, *[2**32, gone] * 3]  # room; before, and beside the neighbour
    monkeypatch.setattr(pair, "read_host_memory", lambda: replace(host, available_bytes=readings.pop(0)))
    FakeProcess.replies, FakeProcess.losses = [HOLDS] * 6, [[2.0, 1.0]] * 3
    with pytest.raises(Mismatch, match=r"3.9 GiB were given where 3.8 GiB were available"):
        pair.check_shared_refusal(CPU)
    readings[:] = [2**32, *[2**32, gone] * 2, *[2**32] * 2]  # others gave back what the neighbour took
    FakeProcess.replies, FakeProcess.losses = [HOLDS] * 6, [[2.0, 1.0]] * 3
    with pytest.raises(Skip, match="other programs took and gave back memory"):
        pair.check_shared_refusal(CPU)


def test_a_process_that_fails_is_a_failed_row() -> None:
    with (
        pytest.raises(Mismatch, match=r"another process ended with code 1: .*'6G' can be read in two ways"),
        pair.Process(CPU, "6G", touch=False),
    ):
        pass
