"""Dynamic loss scaling: skipped steps leave everything as it was, the scale follows its rule, planned is eager."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import brim
from brim import nn, optim
from brim.check.place import on
from brim.errors import CheckpointError, DTypeError
from emulated import device as emulated_device
from small_training import random_floats

F = nn.functional
OPTIMIZERS: dict[str, Callable[[Any], optim.Optimizer]] = {
    "sgd": lambda params: optim.SGD(params, lr=0.1),
    "momentum": lambda params: optim.SGD(params, lr=0.1, momentum=0.9, dampening=0.3, weight_decay=0.01),
    "nesterov": lambda params: optim.SGD(params, lr=0.1, momentum=0.9, nesterov=True, hypergradient=1e-3),
    "hypergradient": lambda params: optim.SGD(params, lr=0.1, hypergradient=1e-3),
    "adam": lambda params: optim.Adam(params, lr=0.01),
    "amsgrad": lambda params: optim.AdamW(params, lr=0.01, amsgrad=True),
    "rmsprop": lambda params: optim.RMSprop(params, lr=0.01),
    "centered": lambda params: optim.RMSprop(params, lr=0.01, momentum=0.5, centered=True),
}
over_optimizers = pytest.mark.parametrize("name", OPTIMIZERS)


class _Training:
    """A classifier in float16, whose gradients overflow where a row of the batch is marked by a huge factor.

    Arguments:
        half: of autocast; None trains in float32, without one.
        scaler: settings of the GradScaler; None trains without.
    """

    def __init__(
        self, name: str, planned: bool, half: str | None = "float16", scaler: dict[str, Any] | None = None
    ) -> None:
        brim.manual_seed(4)
        self.model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
        self.optimizer = OPTIMIZERS[name](self.model.parameters())
        settings = {"init_scale": 64.0, "growth_interval": 3, **(scaler or {})}
        self.scaler = optim.GradScaler(**settings)
        self.half, self.norms = half, scaler is not None
        self.run = brim.compile(self.step) if planned else lambda *arrays: self.step(*map(brim.asarray, arrays))

    def step(self, x: Any, y: Any, factor: Any) -> Any:
        with brim.autocast(self.half or "float16", enabled=self.half is not None):
            loss = F.cross_entropy(self.model(x), y)
        self.scaler.scale(loss * factor).backward()
        self.scaler.unscale_(self.optimizer)
        norm = optim.clip_grad_norm_(self.model.parameters(), 0.5)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        return loss, norm

    def steps(self, factors: list[float]) -> list[tuple[float, float, float]]:
        """Loss, norm of the gradients, and the scale after each step."""
        found = []
        for n, factor in enumerate(factors):
            arguments = random_floats(6, 5, seed=n), np.arange(6) % 3, np.array(factor, np.float32)
            loss, norm = self.run(*arguments)
            found.append((float(loss), float(np.nan_to_num(float(norm), nan=np.inf)), self.scaler.get_scale()))
        return found

    def state(self) -> dict[str, Any]:
        found: dict[str, Any] = {n: np.array(p.detach().numpy()) for n, p in self.model.named_parameters()}
        found |= {n: np.array(a) for n, a in self.optimizer.state_arrays().items()}
        return {n: a.tobytes() for n, a in found.items()} | {"lr": self.optimizer.param_groups[0]["lr"]}


FINE, OVERFLOW = 1.0, 1e7  # the latter times a scale of 1 or more is beyond float16, and is no infinity by itself


@pytest.mark.parametrize("planned", [False, True], ids=["eager", "planned"])
@over_optimizers
def test_a_step_that_overflows_changes_nothing(name: str, planned: bool) -> None:
    training = _Training(name, planned)
    assert [scale for _, _, scale in training.steps([FINE, FINE])] == [64.0, 64.0]
    before = training.state()
    ((_, norm, scale),) = training.steps([OVERFLOW])
    assert not np.isfinite(norm)
    assert training.state() == before
    assert scale == 32.0
    assert [scale for _, _, scale in training.steps([FINE] * 4)] == [32.0, 32.0, 64.0, 64.0]
    after = training.state()
    assert all(after[key] != before[key] for key in before if key != "lr"), "and it trains on"


@over_optimizers
def test_planned_is_eager_and_skipped_steps_are_as_if_they_never_were(name: str) -> None:
    factors = [OVERFLOW, OVERFLOW, FINE, FINE, OVERFLOW, FINE, FINE, FINE, FINE]
    eager, planned = _Training(name, False), _Training(name, True)
    found, other = eager.steps(factors), planned.steps(factors)
    assert [values[0::2] for values in found] == [values[0::2] for values in other]
    np.testing.assert_array_equal(np.array(found)[:, 1], np.array(other)[:, 1])
    assert eager.state() == planned.state()
    # The same without a scale and its skipping, on the other batches alone, in float32: no power of two rounds there.
    scaled, plain = _Training(name, False, half=None), _Training(name, False, half=None, scaler={"enabled": False})
    for training, skips in ((scaled, True), (plain, False)):
        for n, factor in enumerate(factors):
            infinite = factor == OVERFLOW
            if skips or not infinite:
                arguments = random_floats(6, 5, seed=n), np.arange(6) % 3
                training.run(*arguments, np.array(np.inf if infinite else 1.0, np.float32))
    one, two = scaled.state(), plain.state()
    for key in two:
        if key == "lr":
            assert one[key] == pytest.approx(two[key], rel=1e-6)
        else:
            a, b = np.frombuffer(one[key], "f4"), np.frombuffer(two[key], "f4")
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7, err_msg=key)
    steps = {key: np.frombuffer(value, "f4").tolist() for key, value in one.items() if key.endswith(".step")}
    assert set(map(tuple, steps.values())) == ({(6.0,)} if steps else set()), "counts of steps leave skipped ones out"
    assert bool(steps) == (name in ("adam", "amsgrad", "momentum"))


def test_nothing_is_read_back() -> None:
    training = _Training("adam", True)
    training.steps([FINE])
    program = training.run.program()
    assert len(program.results) == 2, "the step's own results, none for the host to look at"
    assert training.run._latest().traced.receivers == []
    assert training.run.explain().count("traced for") == 1
    training.steps([OVERFLOW, FINE])
    assert training.run.explain().count("traced for") == 1, "a skipped step is the same program"


def test_the_update_is_chosen_in_place() -> None:
    """No copies of parameters or states are kept to go back to: the choice is part of the update's own pass."""
    training = _Training("adam", True)
    training.steps([FINE])
    updates = [i for i in training.run.program().instructions if any(out.home is not None for out in i.outs)]
    assert {i.op.name for i in updates} <= {"fused", "fused_many"}
    assert sum(out.spec.shape != () for i in updates for out in i.outs) == 3 * 4


def test_the_scale_grows_no_further_than_float32() -> None:
    largest = float(np.float32(2.0**127))
    training = _Training("sgd", False, half=None, scaler={"init_scale": largest, "growth_interval": 1})
    loss = brim.asarray(0.0).requires_grad_()
    (weight,) = [brim.asarray([1.0]).requires_grad_()]
    optimizer = optim.SGD([weight], lr=0.1)
    for _ in range(2):
        training.scaler.scale((weight * 1e-30).sum() + loss).backward()
        training.scaler.step(optimizer)
        training.scaler.update()
        optimizer.zero_grad()
    assert training.scaler.get_scale() == largest


def test_settings_may_change_between_runs_of_a_planned_step() -> None:
    training = _Training("sgd", True)
    assert training.steps([FINE] * 3)[-1][2] == 128.0
    training.scaler.growth_factor, training.scaler.growth_interval = 4.0, 1
    assert training.steps([FINE, FINE])[-1][2] == 128.0 * 16
    training.scaler.backoff_factor = 0.125
    assert training.steps([OVERFLOW])[-1][2] == 256.0
    assert training.run.explain().count("traced for") == 1
    training.scaler.enabled = False
    training.steps([FINE])
    assert training.scaler.get_scale() == 1.0
    assert training.run.explain().count("traced for") == 2


@pytest.mark.parametrize("planned", [False, True], ids=["eager", "planned"])
def test_state_is_saved_and_continued(planned: bool) -> None:
    whole = _Training("adam", planned)
    factors = [FINE, OVERFLOW, FINE, FINE, FINE, FINE]
    whole.steps(factors[:3])
    saved = whole.scaler.state_dict()
    assert saved == {
        "scale": 32.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 3, "_growth_tracker": 1,
    }  # fmt: skip
    arrays, settings = whole.optimizer.state_arrays(), whole.optimizer.state_settings()
    arrays = {name: np.array(array) for name, array in arrays.items()}
    weights = {name: np.array(value.numpy()) for name, value in whole.model.state_dict().items()}
    expected = whole.steps(factors), whole.state()
    other = _Training("adam", planned)
    other.steps([FINE, FINE])  # a planned step goes on with what is loaded
    for training in (other, _Training("adam", planned)):
        training.model.load_state_dict(weights)
        training.optimizer.load_state(arrays, settings)
        training.scaler.load_state_dict(saved)
        assert (training.steps(factors), training.state()) == expected


def test_counts_move_between_host_and_device() -> None:
    """A run may continue with loss scaling, or without: Adam's count of steps goes with it."""
    training = _Training("adam", True)
    training.steps([FINE, OVERFLOW, FINE])
    assert training.optimizer.state_arrays()["0.step"] == 2.0
    training.scaler.enabled = False
    training.steps([FINE])
    assert training.optimizer.state[0]["step"] == 3
    assert isinstance(training.optimizer.state[0]["step"], int)
    training.scaler.enabled = True
    training.steps([FINE, FINE])
    assert training.optimizer.state_arrays()["0.step"] == 5.0
    planned = training.run.plan(random_floats(6, 5), np.arange(6) % 3, np.array(1, np.float32))
    assert planned.peak_bytes > 0
    assert training.optimizer.state_arrays()["0.step"] == 5.0


def test_planning_makes_no_counts() -> None:
    training = _Training("adam", True)
    training.run.plan(random_floats(6, 5), np.arange(6) % 3, np.array(1, np.float32))
    assert training.optimizer.state_arrays() == {}
    assert training.optimizer.state == {n: {} for n in training.optimizer.state}


# ------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "settings",
    [
        {"init_scale": 0.0}, {"init_scale": float("inf")}, {"growth_factor": 0.5}, {"backoff_factor": 1.0},
        {"backoff_factor": 0.0}, {"growth_interval": 0},
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="expected"):
        optim.GradScaler(**settings)


def test_calls_out_of_order_are_refused() -> None:
    weight = brim.asarray([1.0]).requires_grad_()
    optimizer, scaler = optim.SGD([weight], lr=0.1), optim.GradScaler()
    with pytest.raises(RuntimeError, match="no gradients"):
        scaler.step(optimizer)
    with pytest.raises(RuntimeError, match="nothing was unscaled"):
        scaler.update()
    scaler.scale(weight.sum()).backward()
    scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match="unscaled already"):
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert weight.numpy() == pytest.approx([0.9])


def test_parameters_of_half_width_are_refused() -> None:
    weight = brim.ones((2,), dtype="float16").requires_grad_()
    scaler = optim.GradScaler()
    scaler.scale(weight.sum()).backward()
    with pytest.raises(DTypeError, match="float32 parameters"):
        scaler.unscale_(optim.SGD([weight], lr=0.1))


class _Sign(optim.Optimizer):
    """p - lr sign(g)"""

    def update(self, group: Any, state: Any, param: Any, grad: Any) -> None:
        param.write(param - group["lr"] * brim.sign(grad))


def test_an_optimizer_that_cannot_skip_is_refused_and_told_how() -> None:
    weight = brim.asarray([1.0]).requires_grad_()
    optimizer, scaler = _Sign([weight], {"lr": 0.5}), optim.GradScaler()
    scaler.scale(weight.sum()).backward()
    with pytest.raises(TypeError, match="can_skip"):
        scaler.step(optimizer)
    assert weight.numpy() == 1.0
    optimizer.step()
    assert weight.numpy() == 0.5


def test_a_count_of_another_shape_is_refused() -> None:
    weight = brim.ones((3,)).requires_grad_()
    optimizer = optim.Adam([weight])
    settings = optimizer.state_settings()
    with pytest.raises(CheckpointError, match="step of parameter 0"):
        optimizer.load_state({"0.step": np.ones(3, np.float32)}, settings)
    with pytest.raises(CheckpointError, match="exp_avg of parameter 0"):
        optimizer.load_state({"0.exp_avg": np.array(1, np.float32)}, settings)


# ------------------------------------------------------------------------------------------------- elsewhere


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="PyTorch not installed")
def test_the_scale_follows_pytorchs() -> None:
    import torch

    mine, theirs = optim.GradScaler(init_scale=8.0, growth_interval=2), None
    theirs = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
    weight, other = brim.asarray([1.0]).requires_grad_(), torch.ones(1, requires_grad=True)
    optimizer, their_optimizer = optim.SGD([weight], lr=0.1), torch.optim.SGD([other], lr=0.1)
    for factor in [1.0, np.inf, 1.0, 1.0, 1.0, np.nan, np.inf, 1.0, 1.0, 1.0, 1.0]:
        mine.scale((weight * factor).sum()).backward()
        theirs.scale((other * factor).sum()).backward()
        mine.step(optimizer)
        theirs.step(their_optimizer)
        mine.update()
        theirs.update()
        optimizer.zero_grad()
        their_optimizer.zero_grad()
        assert mine.get_scale() == theirs.get_scale()
        assert mine.state_dict() == theirs.state_dict()
        assert weight.numpy() == pytest.approx(other.detach().numpy())


@pytest.mark.emulated
@pytest.mark.parametrize("name", ["adam", "momentum"])
def test_the_cuda_backend_skips_too(name: str) -> None:
    here = _Training(name, False)
    factors = [FINE, OVERFLOW, FINE, FINE, FINE]
    expected = here.steps(factors)
    for planned in (False, True):
        with on(emulated_device()):
            there = _Training(name, planned, scaler={"device": emulated_device()})
            assert [scale for *_, scale in there.steps(factors[:1])] == [64.0]
            before = there.state()
            assert [scale for *_, scale in there.steps([OVERFLOW])] == [32.0]
            assert there.state() == before
            there = _Training(name, planned, scaler={"device": emulated_device()})
            found = there.steps(factors)
        assert [scale for *_, scale in found] == [scale for *_, scale in expected] == [64.0, 32.0, 32.0, 32.0, 64.0]
        np.testing.assert_allclose([loss for loss, *_ in found], [loss for loss, *_ in expected], rtol=4e-3)
