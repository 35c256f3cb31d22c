"""The second set of input buffers: planned, held to the byte, and never the reason of a refusal."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import brim
from brim import nn, optim
from brim.errors import BudgetExceeded
from brim.program.admit import needed_bytes
from brim.program.compile import spec
from brim.train import Trainer
from emulated import device, machine, settle

N, D = 64, 40  # inputs of 10 KiB
STAGED_BYTES = N * D * 4 + N * 8


def _step(place: Any, budget: Any = None) -> Any:
    brim.manual_seed(0)
    model = nn.Sequential(nn.Linear(D, 16), nn.ReLU(), nn.Linear(16, 3)).to(place)
    optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def step(x: brim.Tensor, y: brim.Tensor) -> brim.Tensor:
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return brim.compile(step, device=place, budget=budget)


def _batches(count: int = 4) -> list[tuple[Any, Any]]:
    rng = np.random.default_rng(5)
    return [(rng.standard_normal((N, D)).astype(np.float32), rng.integers(0, 3, N)) for _ in range(count)]


def _losses(step: Any) -> list[float]:
    return [step(x, y).item() for x, y in _batches()]


def test_on_the_cpu_there_is_no_second_set() -> None:
    step = _step("cpu")
    planned = step.plan(spec((N, D)), spec((N,), "int64"))
    assert not planned.staging
    assert planned.staged_bytes == 0
    assert planned.least_bytes == planned.peak_bytes
    _losses(step)
    assert brim.device("cpu").memory.stage.nbytes == 0
    assert "inputs" not in step.explain()


@pytest.mark.emulated
def test_it_is_planned_and_held_to_the_byte() -> None:
    settle()
    step = _step(device())
    before = machine().staged_feeds
    assert brim.audit(step, *_batches(1)[0]).ok
    planned = step.current_plan()
    assert machine().staged_feeds == before + 2
    assert planned.staged_bytes == STAGED_BYTES == device().memory.stage.nbytes
    assert planned.by_kind()["inputs"] >= STAGED_BYTES
    assert sum(planned.by_kind().values()) == planned.peak_bytes
    assert planned.peak_bytes == step.plan(spec((N, D)), spec((N,), "int64")).peak_bytes
    assert any(block.op == "stage" for block in planned.alive_at_peak())
    assert "two sets of buffers (10.5 KiB more), copied while a step computes" in step.explain()


@pytest.mark.emulated
def test_inputs_that_are_on_the_device_need_none() -> None:
    settle()
    step = _step(device())
    x, y = (brim.asarray(host, device=device()) for host in _batches(1)[0])
    before = machine().staged_feeds
    assert brim.audit(step, x, y).ok
    assert step.current_plan().staged_bytes == 0
    assert machine().staged_feeds == before
    mixed = _step(device())
    assert brim.audit(mixed, x, y.numpy()).ok
    assert mixed.current_plan().staged_bytes == N * 8
    mixed(*_batches(1)[0])  # the same program: what does not fit the stage goes without
    assert machine().staged_feeds == before + 2


@pytest.mark.emulated
def test_without_room_for_it_the_step_runs_with_one_set_to_the_same_bits() -> None:
    settle()
    free = _losses(_step(device()))
    for room_bytes, staged in ((STAGED_BYTES, True), (STAGED_BYTES - 1, False), (0, False)):
        settle()
        step = _step(device())
        needed = needed_bytes(step.plan(spec((N, D)), spec((N,), "int64")), device())
        with brim.budget(needed + room_bytes, device=device()):
            before = machine().staged_feeds
            assert _losses(step) == free
            assert (machine().staged_feeds > before) == staged
            assert step.current_plan().staging == staged
            assert brim.audit(step, *_batches(1)[0]).ok
        assert ("one set of buffers, copied between two steps" in step.explain()) != staged
        del step
    settle()
    step = _step(device())
    needed = needed_bytes(step.plan(spec((N, D)), spec((N,), "int64")), device())
    with brim.budget(needed - 1, device=device()), pytest.raises(BudgetExceeded, match="needs"):
        _losses(step)


@pytest.mark.emulated
def test_it_makes_room_for_a_larger_step() -> None:
    settle()
    small, before = _step(device()), _losses(_step(device()))
    assert _losses(small) == before
    memory = device().memory
    assert memory.stage.nbytes == STAGED_BYTES
    large = brim.compile(lambda x: (x * 2.0).sum(), device=device())
    rows = 4 * memory.arena.nbytes
    memory.arena.release()
    needed = needed_bytes(large.plan(spec((rows,))), device())
    with brim.budget(needed - STAGED_BYTES, device=device()):
        assert large(np.ones(rows, np.float32)).item() == 2 * rows
        assert not large.current_plan().staging
        assert memory.stage.nbytes == 0
    assert len(_losses(small)) == len(before), "the smaller step goes on, and takes its second set again"
    assert memory.stage.nbytes == STAGED_BYTES


@pytest.mark.emulated
def test_the_trainer_plans_it_and_trains_to_the_same_bits_without() -> None:
    x, y = _batches(1)[0]
    dataset = brim.data.ArrayDataset(np.concatenate([x, x[:7]]), np.concatenate([y, y[:7]]))

    def train(tight: bool) -> tuple[list[float], Any]:
        settle()
        brim.manual_seed(0)
        model = nn.Sequential(nn.Linear(D, 16), nn.ReLU(), nn.Linear(16, 3)).to(device())
        trainer = Trainer(model, optim.SGD(model.parameters(), lr=0.1), progress=False)
        loader = brim.data.DataLoader(dataset, N, shuffle=True, device=device())
        if tight:
            trainer.budget = needed_bytes(trainer.plan(data=loader, validation=dataset), device())
        history = trainer.fit(loader, 3, validation=dataset)
        return [row["loss"] for row in history], trainer.planned

    losses, planned = train(tight=False)
    assert planned.staged_bytes == STAGED_BYTES
    assert len(planned.programs) == 4
    again, without = train(tight=True)
    assert again == losses
    assert not without.staging
    assert without.peak_bytes == planned.peak_bytes - STAGED_BYTES
