"""Refusing and fitting: a refusal leaves all as it was, remedies are true to the byte, batches are found exactly."""

from __future__ import annotations

import dataclasses
import functools
import gc
import pickle
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import brim
from brim import nn, optim
from brim.errors import BudgetExceeded, BudgetSyntaxError
from brim.memory.host import read_host_memory
from brim.program import fit
from brim.program.admit import admit, refusal
from brim.program.compile import CompiledStep
from brim.program.compile import compile as compile_step
from brim.program.plan import Options
from brim.units import format_bytes

F = nn.functional
CPU = brim.device("cpu")
BATCH = 24


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No arena of another test, and no search for remedies where none are looked at."""
    monkeypatch.setattr(fit, "SEARCH_TIME_S", 0.0)
    _empty()
    yield
    _empty()


@pytest.fixture
def _unhurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as it takes to search everything."""
    monkeypatch.setattr(fit, "SEARCH_TIME_S", 120.0)
    monkeypatch.setattr(fit, "FIT_TIME_S", 120.0)


@pytest.fixture(autouse=True, scope="module")
def _quick_collections() -> Iterator[None]:
    """What other tests left behind need not be looked at in every collection."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def _empty() -> None:
    gc.collect()
    CPU.memory.arena.release()
    CPU.memory.pool.settle()


class _Residual(nn.Module):
    def __init__(self, C: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(C, C, 3, padding=1, bias=False), nn.BatchNorm2d(C)
        self.conv2, self.bn2 = nn.Conv2d(C, C, 3, padding=1, bias=False), nn.BatchNorm2d(C)

    def forward(self, x: Any) -> Any:
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + x)


class _Mean(nn.Module):
    def forward(self, x: Any) -> Any:
        return x.mean((2, 3))


class Training:
    """A network in training: its step and a batch for it."""

    def __init__(self, kind: str) -> None:
        brim.manual_seed(3)
        rng = np.random.default_rng(0)
        if kind == "mlp":
            hidden = [layer for _ in range(4) for layer in (nn.Linear(24, 24), nn.Tanh(), nn.Dropout(0.1))]
            self.model: nn.Module = nn.Sequential(*hidden, nn.Linear(24, 3))
            self.optimizer: optim.Optimizer = optim.Adam(self.model.parameters(), lr=0.01)
            self.x = rng.standard_normal((20 * BATCH, 24)).astype("f4")
        else:
            blocks = nn.Sequential(*[_Residual(4) for _ in range(3)])
            self.model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), blocks, _Mean(), nn.Linear(4, 3))
            self.optimizer = optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9)
            self.x = rng.standard_normal((BATCH, 2, 8, 8)).astype("f4")
        self.y = rng.integers(0, 3, len(self.x))

    def step(self, x: Any, y: Any) -> Any:
        loss = F.cross_entropy(self.model(x), y)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss

    def arguments(self, batch: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        return self.x[:batch], self.y[:batch]

    def values(self) -> dict[str, Any]:
        found = {name: value.numpy().tobytes() for name, value in self.model.state_dict().items()}
        return {**found, **{name: array.tobytes() for name, array in self.optimizer.state_arrays().items()}}


KINDS = ["mlp", "cnn"]


def _live() -> int:
    CPU.memory.pool.settle()
    return int(brim.memory_stats()["live_bytes"])


@functools.cache
def _needs(kind: str) -> int:
    """The peak of the ledger in one planned step of a new network."""
    training = Training(kind)
    brim.reset_peak_memory()
    loss = compile_step(training.step)(*training.arguments())
    del loss
    peak = int(brim.memory_stats()["peak_bytes"])
    del training
    _empty()
    return peak


def _refused(kind: str, budget: int, **options: Any) -> BudgetExceeded:
    training = Training(kind)
    with pytest.raises(BudgetExceeded) as caught:
        compile_step(training.step, budget=budget, **options)(*training.arguments())
    error = caught.value.with_traceback(None)  # which holds this frame, and so the network
    del training, caught
    _empty()
    return error


# -------------------------------------------------------------------- the gate


@pytest.mark.parametrize("kind", KINDS)
def test_the_peak_itself_fits_and_one_byte_less_does_not(kind: str) -> None:
    peak = _needs(kind)
    training = Training(kind)
    step = compile_step(training.step, budget=peak)
    brim.reset_peak_memory()
    step(*training.arguments())
    assert brim.memory_stats()["peak_bytes"] == peak
    del training, step
    _empty()
    error = _refused(kind, peak - 1)
    assert error.report.needed_bytes == peak
    assert error.report.excess_bytes == 1


def test_a_refusal_leaves_everything_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training("cnn")
    step = compile_step(training.step, budget=_live() + 50_000)
    before, live, state = training.values(), _live(), brim.random.get_state()
    allocations = brim.memory_stats()["allocations"]
    ran: list[str] = []
    monkeypatch.setattr("brim.program.run.Runner.run", lambda *_: ran.append("run"))
    with pytest.raises(BudgetExceeded):
        step(*training.arguments())
    assert not ran
    assert training.values() == before
    assert (_live(), brim.memory_stats()["allocations"], brim.random.get_state()) == (live, allocations, state)
    assert CPU.memory.arena.nbytes == 0
    assert all(p.grad is None for p in training.model.parameters())


def test_after_a_refusal_a_smaller_step_runs_while_the_error_is_kept() -> None:
    peak = _needs("cnn")
    training = Training("cnn")
    step = compile_step(training.step, budget=peak - 1)
    with pytest.raises(BudgetExceeded) as caught:
        step(*training.arguments())
    live = _live()
    loss = step(*training.arguments(8))
    assert np.isfinite(loss.item())
    assert caught.value.report is not None
    assert _live() > live
    # A refused larger batch leaves the smaller one's program in place.
    with pytest.raises(BudgetExceeded):
        step(*training.arguments())
    step(*training.arguments(8))
    assert step.explain().count("traced") == 1


def test_budgets_of_device_block_and_step_the_tightest_counts() -> None:
    peak = _needs("mlp")
    training = Training("mlp")
    for outer, own in ((peak - 1, None), (peak - 1, 2 * peak), (2 * peak, peak - 1)):
        step = compile_step(training.step, budget=own)
        with pytest.raises(BudgetExceeded) as caught, brim.budget(outer):
            step(*training.arguments())
        assert caught.value.report.budget_bytes == peak - 1
    with brim.budget(2 * peak), brim.budget(peak):
        with pytest.raises(BudgetSyntaxError), brim.budget(2 * peak):
            pass
        compile_step(training.step)(*training.arguments())


def test_a_budget_under_what_is_held() -> None:
    training = Training("mlp")
    error = _refused("mlp", 1000)
    assert error.report.live_bytes > 1000
    assert len(error.report.remedies) == 1
    assert error.report.remedies[0].startswith("nothing fits: the parameters and their state alone need")
    del training


def test_room_that_a_larger_program_left_is_given_back_before_a_refusal() -> None:
    def double(x: Any) -> Any:
        return x * 2.0

    brim.compile(double)(np.zeros(100_000, np.float32))
    assert CPU.memory.arena.nbytes >= 400_000
    gc.collect()
    others_bytes = brim.memory_stats()["live_bytes"] - CPU.memory.arena.nbytes
    small = np.ones(100, np.float32)
    budget_bytes = others_bytes + brim.plan(double, small).peak_bytes
    assert brim.compile(double, budget=budget_bytes)(small).tolist() == [2.0] * 100
    assert CPU.memory.arena.nbytes < 4096
    with pytest.raises(BudgetExceeded):
        brim.compile(double, budget=budget_bytes - 1)(small)


def test_admit_counts_what_is_live_beside_the_plan() -> None:
    training = Training("cnn")
    plan = CompiledStep(training.step).plan(*training.arguments())
    live = _live()
    created = sum(r.reserved_bytes for r in plan.residents if not r.exists)
    needed = live + created + plan.arena_bytes + plan.results_bytes
    admit(plan, CPU, needed)
    assert refusal(plan, CPU, needed - 1) is not None
    other = brim.zeros(10_000)
    assert refusal(plan, CPU, needed) is not None
    admit(plan, CPU, needed + other.nbytes + 63)
    del other
    CPU.memory.arena.reserve(plan.arena_bytes + 64)  # another step's arena is used again
    admit(plan, CPU, needed + 64)
    assert refusal(plan, CPU, needed) is None  # what is larger than need be is given back first
    assert refusal(plan, CPU, needed - 1) is not None


@pytest.mark.usefixtures("_unhurried")
def test_a_machine_without_room_refuses_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the machine can give counts like a budget, and remedies are measured against it."""
    peak = _needs("mlp")
    training = Training("mlp")
    host = read_host_memory()
    spare = CPU.memory.pool.held_bytes - _live()  # counted as available: it is given back first
    room = (peak - _live()) * 3 // 4
    monkeypatch.setattr(
        "brim.program.admit.read_host_memory", lambda: dataclasses.replace(host, available_bytes=room - spare)
    )
    with pytest.raises(BudgetExceeded) as caught, brim.budget(100 * peak):
        compile_step(training.step)(*training.arguments())
    report = caught.value.report
    assert report.shortage_bytes > 0
    assert report.excess_bytes < 0
    assert re.match(r"batch \d+ instead of \d+ -> ", report.remedies[0])
    found = int(report.remedies[0].split()[1])
    with brim.budget(100 * peak):
        compile_step(training.step)(*training.arguments(found))


# -------------------------------------------------------------------- the report


@pytest.mark.usefixtures("_unhurried")
@pytest.mark.parametrize(("kind", "share"), [("mlp", 0.97), ("mlp", 0.3), ("cnn", 0.5)])
def test_the_report_adds_up(kind: str, share: float) -> None:
    peak = _needs(kind)
    budget = int(peak * share)
    error = _refused(kind, budget)
    report, text = error.report, str(error)
    first = text.splitlines()[0]
    assert len(text.splitlines()) <= 20
    assert sum(report.by_kind.values()) == report.needed_bytes == peak
    for size in (peak, budget, peak - budget):
        assert format_bytes(size) in first
    assert "Nothing was run" in first
    assert report.remedies
    assert isinstance(error, MemoryError)


def test_the_error_travels_between_processes() -> None:
    error = _refused("mlp", _live() + 60_000)
    data = pickle.dumps(error)
    assert len(data) < 20_000  # numbers and texts, no arrays
    code = "import pickle, sys; e = pickle.load(sys.stdin.buffer)"
    code += "; print(isinstance(e, MemoryError), e.report.excess_bytes)"
    out = subprocess.run([sys.executable, "-c", code], input=data, capture_output=True, check=True).stdout
    assert out.decode().split() == ["True", str(error.report.excess_bytes)]


# -------------------------------------------------------------------- remedies

_LINE = re.compile(r"(?P<what>.+?) -> (?P<peak>[0-9.,]+ \S+)(?: \((?P<more>.*)\))?$")


def _apply(kind: str, what: str) -> int:
    """Do what a line says, and return the peak that the ledger saw."""
    options: dict[str, Any] = {}
    if found := re.search(r"recompute=(\(.*?\))", what):
        options["recompute"] = eval(found[1])
    if 'activations="bfloat16"' in what:
        options["activations"] = "bfloat16"
    found = re.search(r"batch (\d+)", what)
    assert options or found
    training = Training(kind)
    step = compile_step(training.step, **options)
    brim.reset_peak_memory()
    loss = step(*training.arguments(int(found[1]) if found else None))
    assert np.isfinite(loss.item())
    del loss
    peak = int(brim.memory_stats()["peak_bytes"])
    del training, step
    _empty()
    return peak


@pytest.mark.usefixtures("_unhurried")
@pytest.mark.parametrize(("kind", "share"), [("mlp", 0.95), ("mlp", 0.5), ("cnn", 0.8), ("cnn", 0.35)])
def test_every_remedy_is_true(kind: str, share: float) -> None:
    before = _needs(kind)
    budget = int(before * share)
    lines = _refused(kind, budget).report.remedies
    fitting = [line for line in lines if not line.startswith(("not enough", "nothing"))]
    assert fitting
    assert not any(line.startswith("not searched") for line in lines)
    for line in fitting:
        found = _LINE.match(line)
        assert found is not None, line
        peak = _apply(kind, found["what"])
        assert peak <= budget
        assert found["peak"] in (format_bytes(peak), format_bytes(peak, exact=True))
        if beyond := re.match(r"(\d+): (.*), does not fit", found["more"] or ""):
            more = _apply(kind, re.sub(r"batch \d+", f"batch {beyond[1]}", found["what"]))
            assert more > budget
            assert beyond[2] in (format_bytes(more), format_bytes(more, exact=True))
    for text in (line.removeprefix("not enough: ") for line in lines if line.startswith("not enough")):
        for part in text.split("; "):
            found = _LINE.match(part)
            assert found is not None, part
            peak = _apply(kind, found["what"])
            assert budget < peak < before
            assert found["peak"] in (format_bytes(peak), format_bytes(peak, exact=True))


@pytest.mark.usefixtures("_unhurried")
def test_the_remedies_that_one_expects() -> None:
    peak = _needs("cnn")
    lines = _refused("cnn", int(0.8 * peak)).report.remedies
    assert re.match(r"batch \d+ instead of 24 -> ", lines[0])
    assert any(line.startswith("recompute=(") for line in lines)
    assert any(line.startswith('activations="bfloat16" -> ') for line in lines)


@pytest.mark.usefixtures("_unhurried")
def test_options_already_on_are_not_offered() -> None:
    peak = _needs("cnn")
    text = " ".join(_refused("cnn", int(0.55 * peak), recompute=["1.*"]).report.remedies)
    assert "recompute=" not in text
    assert "bfloat16" in text
    text = " ".join(_refused("cnn", int(0.72 * peak), activations="bfloat16").report.remedies)
    assert "bfloat16" not in text
    assert "recompute=" in text
    text = " ".join(_refused("cnn", int(0.1 * peak), activations="bfloat16", recompute=["1.*"]).report.remedies)
    assert "recompute=" not in text
    assert "bfloat16" not in text


@pytest.mark.usefixtures("_unhurried")
def test_where_single_remedies_do_not_suffice_they_are_combined() -> None:
    training = Training("cnn")

    def step(x: Any) -> Any:  # no batch to make smaller
        return training.step(x[0], brim.zeros(BATCH, dtype="int64"))

    plan = CompiledStep(step).plan(training.arguments()[0][None])
    both = plan.vary(Options(("1.*",), "bfloat16")).peak_bytes
    assert both < min(plan.vary(Options(("1.*",))).peak_bytes, plan.vary(Options((), "bfloat16")).peak_bytes)
    lines = fit.remedies(plan, both)
    assert re.match(r'recompute=\(.*\) with activations="bfloat16" -> ', lines[0])
    assert lines[1].startswith("not enough: ")


@pytest.mark.usefixtures("_unhurried")
def test_when_nothing_fits_that_is_said() -> None:
    training = Training("cnn")
    plan = CompiledStep(training.step).plan(*training.arguments())
    lines = fit.remedies(plan, plan.resident_bytes + 5000)
    assert lines[0].startswith(
        f"nothing fits: the parameters and their state alone need {format_bytes(plan.resident_bytes)}; batch 1"
    )
    assert all("->" not in line or line.startswith("not enough") for line in lines)
    assert not any("instead of" in line for line in lines)


def test_what_takes_too_long_is_not_searched() -> None:
    training = Training("cnn")
    plan = CompiledStep(training.step).plan(*training.arguments())
    text = "\n".join(fit.remedies(plan, int(0.8 * plan.peak_bytes), time_s=0.0))
    assert "not searched" in text
    assert "a smaller batch" in text
    assert "layers to recompute" in text


@pytest.mark.usefixtures("_unhurried")
def test_alternatives_are_planned_and_listed() -> None:
    training = Training("cnn")
    whole = CompiledStep(training.step).plan(*training.arguments())
    half = CompiledStep(training.step).plan(*training.arguments(12))
    most = CompiledStep(training.step).plan(*training.arguments(23))
    whole.alternatives += [("2 micro-batches of 12", lambda: half), ("23 at once", lambda: most)]
    lines = fit.remedies(whole, half.peak_bytes)
    assert f"2 micro-batches of 12 -> {format_bytes(half.peak_bytes)}" in "\n".join(lines)
    assert any(line.startswith("not enough") and "23 at once" in line for line in lines)


# -------------------------------------------------------------------- fit="recompute"


@pytest.mark.usefixtures("_unhurried")
def test_fit_recompute_runs_and_gives_the_same_bits() -> None:
    peak = _needs("cnn")
    said: list[str] = []
    found = []
    for budget in (None, int(0.8 * peak)):
        training = Training("cnn")
        step = CompiledStep(training.step, budget=budget, fit="recompute", report=said.append)
        brim.reset_peak_memory()
        losses = [step(*training.arguments()).item() for _ in range(3)]
        found.append((losses, training.values()))
        if budget is not None:
            assert brim.memory_stats()["peak_bytes"] <= budget
            assert step.current_plan().options.recompute
        del training, step
        _empty()
    assert found[0] == found[1]
    (line,) = said
    assert re.match(r"step: recompute=\(.*\) to fit: peak .* of .*, \d+\.\d % more work$", line)


def test_fit_recompute_refuses_what_cannot_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit, "FIT_TIME_S", 0.5)
    training = Training("cnn")
    step = CompiledStep(training.step, budget=_live() + 20_000, fit="recompute", report=pytest.fail)
    before, live = training.values(), _live()
    with pytest.raises(BudgetExceeded):
        step(*training.arguments())
    assert (training.values(), _live()) == (before, live)
