"""Training on the emulated CUDA device: the CPU's numbers, the CPU's dropout masks, the planned memory to the byte."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest

import brim
from brim import nn, ops, optim
from brim.check.networks import IN_HALF, NETWORKS, compiled, make
from brim.check.place import on
from brim.check.training import OnCpu, check_network
from brim.program.compile import plan
from brim.program.plan import Plan
from digits_training import MODELS, Training, batches
from emulated import device, machine

pytestmark = pytest.mark.emulated

# Sums of up to a few hundred float32 numbers in another order, and what a few updates make of that.
RTOL, ATOL = 2e-4, 2e-5

F = nn.functional
over_models = pytest.mark.parametrize("name", MODELS)


def _same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for key, want in expected.items():
        assert (found[key].shape, found[key].dtype) == (want.shape, want.dtype), key
        np.testing.assert_allclose(found[key], want, RTOL, ATOL, err_msg=key)


def _settled_bytes() -> int:
    """Live bytes of the device, with nothing in the arena."""
    gc.collect()
    device().memory.arena.release()
    device().memory.stage.release()
    return int(brim.memory_stats(device())["live_bytes"])


# ------------------------------------------------------------------------------------------------- digits, two models


@over_models
@pytest.mark.parametrize("planned", [False, True], ids=["eager", "planned"])
def test_losses_and_state_are_the_cpus(name: str, planned: bool) -> None:
    here, there = Training(name, "cpu"), Training(name, device())
    before = there.state()
    expected, launches = here.losses(batches(), planned=False), machine().loader.launches
    # The next one starts from the same seed, or its dropout would differ.
    there = Training(name, device())
    found = there.losses(batches(), planned)
    assert machine().loader.launches > launches + 40, "nothing ran on the device"
    np.testing.assert_allclose(found, expected, RTOL, ATOL)
    _same(there.state(), here.state())
    moved = [key for key, value in before.items() if (value != there.state()[key]).any()]
    assert len(moved) == len(before)


@over_models
def test_eager_and_planned_steps_agree_on_the_device(name: str) -> None:
    eager, planned = Training(name, device()), Training(name, device())
    brim.manual_seed(6)
    one = eager.losses(batches(), planned=False)
    brim.manual_seed(6)
    other = planned.losses(batches(), planned=True)
    np.testing.assert_allclose(other, one, 1e-5, 1e-6)
    _same(planned.state(), eager.state())
    brim.manual_seed(7)
    assert Training(name, device()).losses(batches(), planned=True) == pytest.approx(one, rel=0.5)


def _masks(place: Any, planned: bool) -> list[np.ndarray]:
    """Which units dropout keeps in three training steps; its input is positive, so that zeros are its own."""
    brim.manual_seed(11)
    first, last = nn.Linear(20, 33).to(place), nn.Linear(33, 3).to(place)
    norm, drop = nn.BatchNorm1d(33).to(place), nn.Dropout(0.3)
    optimizer = optim.SGD([*first.parameters(), *norm.parameters(), *last.parameters()], lr=0.1)

    def step(x: Any) -> Any:
        dropped = drop(ops.sigmoid(norm(first(x))))
        last(dropped).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        return dropped

    run = brim.compile(step, device=place) if planned else lambda x: step(brim.asarray(x, device=place))
    rng = np.random.default_rng(0)
    found = [run(rng.standard_normal((17, 20)).astype(np.float32)).detach().numpy() for _ in range(3)]
    return [dropped != 0 for dropped in found]


def test_dropout_masks_are_the_same_to_the_bit() -> None:
    expected = _masks("cpu", planned=False)
    for planned in (False, True):
        for mask, want in zip(_masks(device(), planned), expected, strict=True):
            assert mask.tobytes() == want.tobytes()
    assert all(0.6 < mask.mean() < 0.8 for mask in expected)
    assert len({mask.tobytes() for mask in expected}) == len(expected), "each step drops others"


@over_models
def test_evaluation_is_the_cpus(name: str) -> None:
    outputs = []
    for place in ("cpu", device()):
        training = Training(name, place)
        training.losses(batches()[:2], planned=False)
        training.model.eval()
        forward = brim.compile(lambda x, model=training.model: model(x), device=training.place)
        eager = training.model(brim.asarray(batches()[2][0], device=training.place)).detach().numpy()
        planned = forward(batches()[2][0]).detach().numpy()
        np.testing.assert_allclose(planned, eager, RTOL, ATOL)
        assert planned.tobytes() == forward(batches()[2][0]).detach().numpy().tobytes(), "no dropout, no new statistics"
        outputs.append(planned)
    np.testing.assert_allclose(outputs[1], outputs[0], RTOL, ATOL)


def test_a_class_that_does_not_exist_gives_nan() -> None:
    """The CPU names it; a kernel cannot raise, and must not read beside the scores."""
    scores, classes = np.zeros((3, 4), np.float32), np.array([1, 4, -3])
    with pytest.raises(IndexError, match="class"):
        F.cross_entropy(brim.asarray(scores), brim.asarray(classes))
    x = brim.asarray(scores, device=device()).requires_grad_()
    losses = F.cross_entropy(x, brim.asarray(classes, device=device()), reduction="none")
    assert np.isnan(losses.detach().numpy()).tolist() == [False, True, True]
    losses[0].backward()
    assert np.isfinite(x.grad.numpy()[0]).all()


# ------------------------------------------------------------------------------------------------------------- memory


@over_models
def test_the_planned_peak_is_held_to_the_byte(name: str) -> None:
    others_bytes = _settled_bytes()
    training = Training(name, device())
    step = brim.compile(training.step, device=device())
    model_bytes = _settled_bytes()
    x, y = batches()[0]
    planned = step.plan(brim.spec(x.shape), brim.spec(y.shape, "int64"))
    assert _settled_bytes() == model_bytes, "planning takes no memory"
    assert training.optimizer.state_arrays() == {}
    brim.reset_peak_memory(device())
    for batch in batches():
        step(*batch)
    held_bytes = brim.memory_stats(device())["peak_bytes"] - others_bytes
    assert held_bytes == planned.peak_bytes - planned.by_kind()["overhead"]
    assert sum(planned.by_kind().values()) == planned.peak_bytes
    assert step.current_plan().hash == planned.hash


@over_models
def test_an_audit_finds_what_was_planned(name: str) -> None:
    found = brim.audit(brim.compile(Training(name, device()).step, device=device()), *batches()[0])
    assert found.ok, str(found)
    assert 0 < found.arena_written_bytes <= found.arena_bytes
    assert found.arena_bytes - found.arena_written_bytes < device().backend.alignment_bytes


@over_models
def test_a_budget_that_is_too_small_is_refused_before_anything_is_allocated(name: str) -> None:
    others_bytes = _settled_bytes()
    training = Training(name, device())
    planned = plan(training.step, *batches()[0], device=device())
    live_bytes, held_bytes, launches = _settled_bytes(), machine().held_bytes, machine().loader.launches
    state = training.state()
    enough_bytes = others_bytes + planned.least_bytes - planned.by_kind()["overhead"]  # counted in the first already
    with pytest.raises(brim.BudgetExceeded) as caught:
        brim.compile(training.step, device=device(), budget=enough_bytes - 20 * 1024)(*batches()[0])
    assert _settled_bytes() == live_bytes
    assert machine().held_bytes == held_bytes
    assert machine().loader.launches == launches, "nothing ran"
    assert training.optimizer.state_arrays() == {}
    _same(training.state(), state)
    report = caught.value.report
    assert (report.device, report.budget_bytes) == ("emulated:0", enough_bytes - 20 * 1024)
    assert report.needed_bytes == enough_bytes + report.by_kind["holes"]
    assert sum(report.by_kind.values()) == report.needed_bytes
    assert "emulated:0" in str(caught.value).splitlines()[0]
    brim.compile(training.step, device=device(), budget=report.needed_bytes)(*batches()[0])


@pytest.mark.parametrize("spare_bytes", [0, 1 << 20])
def test_what_the_gate_admits_is_never_refused_on_the_way(spare_bytes: int) -> None:
    """The room is in a free segment, which a lowered budget takes, and beside the parameters, where no arena fits."""
    _settled_bytes()
    brim.empty_cache(device())
    with brim.budget(brim.memory_stats(device())["held_bytes"] + 400 * 1024, device()):
        training = Training("mlp", device())
    x, y = (np.concatenate([array] * 13)[:400] for array in batches()[0])
    planned = plan(training.step, x, y, device=device())
    held_bytes = brim.memory_stats(device())["held_bytes"]
    free = brim.zeros(300_000, device=device())
    del free
    assert brim.memory_stats(device())["held_bytes"] > held_bytes + planned.arena_bytes > held_bytes + 400 * 1024
    new_bytes = planned.peak_bytes - sum(r.reserved_bytes for r in planned.residents if r.exists)
    limit_bytes = brim.memory_stats(device())["live_bytes"] + new_bytes - planned.by_kind()["overhead"] + spare_bytes
    launches = machine().loader.launches
    step = brim.compile(training.step, device=device())
    with brim.budget(limit_bytes, device()):
        if spare_bytes:
            assert np.isfinite(step(x, y).item())
            return
        with pytest.raises(brim.BudgetExceeded) as caught:
            step(x, y)
    assert caught.value.report.phase == "plan"
    assert caught.value.report.by_kind["holes"] > 300 * 1024
    assert machine().loader.launches == launches


# ------------------------------------------------------------------------------------------------- all test networks


@pytest.mark.parametrize("name", [*NETWORKS, *IN_HALF])
def test_networks_follow_the_cpu(name: str) -> None:
    reference = OnCpu(name)
    for planned in (False, True):
        check_network(reference, device(), planned=planned)


@pytest.mark.parametrize("name", [*NETWORKS, *IN_HALF])
def test_planned_networks_hold_what_is_planned(name: str) -> None:
    others_bytes = _settled_bytes()
    with on(device()):
        net = make(name)
        net.calls = net.calls if len(net.steps) > 1 else net.calls[:2]
        steps = compiled(net)
        brim.reset_peak_memory()
        for which, arguments in net.calls:
            steps[which](*arguments)
        held_bytes = brim.memory_stats()["peak_bytes"] - others_bytes
        kinds = {(which, *(a.shape for a in arguments)): (which, arguments) for which, arguments in net.calls}
        plans = [steps[which].plan(*arguments) for which, arguments in kinds.values()]
        programs = [program for one in plans for program in one.programs]
        planned = Plan(programs, device().name, staging=plans[0].staging)
    assert held_bytes == planned.peak_bytes
