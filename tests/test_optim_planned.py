"""Optimizers in a planned step: recorded once and run again, they do exactly what they do eagerly."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import brim
from brim import nn, optim
from brim.context import context, host_scalar
from brim.errors import DeviceError, TraceError
from replaying import Recorder

SHAPES = [(3, 4), (5,)]
STEPS = 5

CASES: list[tuple[str, dict[str, Any]]] = [
    ("SGD", {"lr": 0.1, "weight_decay": 0.02}),
    ("SGD", {"lr": 0.1, "momentum": 0.9}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.02}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    ("SGD", {"lr": 0.1, "hypergradient": 0.01}),
    ("SGD", {"lr": 0.1, "hypergradient": 0.01, "weight_decay": 0.1, "maximize": True}),
    ("SGD", {"lr": 0.1, "hypergradient": 0.01, "momentum": 0.9, "dampening": 0.3}),
    ("SGD", {"lr": 0.1, "hypergradient": 0.01, "momentum": 0.9, "nesterov": True}),
    ("Adam", {"lr": 0.01, "weight_decay": 0.1}),
    ("Adam", {"lr": 0.01, "amsgrad": True}),
    ("AdamW", {"lr": 0.01}),
    ("RMSprop", {"lr": 0.01}),
    ("RMSprop", {"lr": 0.01, "centered": True}),
    ("RMSprop", {"lr": 0.01, "momentum": 0.5}),
]


def _values(seed: int, dtype: str = "float32") -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape).astype(dtype) for shape in SHAPES]


class Loop:
    """Parameters, gradients in fixed memory, and one step of training that clips."""

    def __init__(self, name: str, settings: dict[str, Any], dtype: str = "float32") -> None:
        self.params: list[Any] = [brim.asarray(v).requires_grad_() for v in _values(0, dtype)]
        self.grads = [brim.asarray(v) for v in _values(1, dtype)]
        self.dtype = dtype
        self.optimizer = getattr(optim, name)(self.params, **settings)

    def feed(self, step: int) -> None:
        for grad, value in zip(self.grads, _values(100 + step, self.dtype)):
            grad.write(value)
        if "hypergradient" not in self.optimizer.defaults or self.optimizer.defaults["hypergradient"] is None:
            self.optimizer.param_groups[0]["lr"] = 0.1 / (step + 1)
        self.optimizer.param_groups[0]["weight_decay"] *= 1.5

    def run(self) -> None:
        for p, grad in zip(self.params, self.grads):
            p.grad = grad
        optim.clip_grad_norm_(self.params, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def state(self) -> dict[str, Any]:
        return self.optimizer.state_settings()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("name", "settings"), CASES)
def test_replay_is_eager(name: str, settings: dict[str, Any], dtype: str) -> None:
    eager, planned = Loop(name, settings, dtype), Loop(name, settings, dtype)
    recorder = Recorder()
    rates = set()
    for step in range(STEPS):
        eager.feed(step)
        eager.run()
        planned.feed(step)
        if step == 0:
            with recorder.recording():
                planned.run()
        else:
            recorder.replay()
        rates.add(planned.state()["param_groups"][0]["lr"])
        assert planned.state() == eager.state()  # step counts and learning rates, to the last bit
        for p, q in zip(planned.params, eager.params):
            assert p.dtype == dtype
            assert np.array_equal(p.detach().numpy(), q.detach().numpy())
        arrays = eager.optimizer.state_arrays()
        assert list(planned.optimizer.state_arrays()) == list(arrays)
        for key, array in planned.optimizer.state_arrays().items():
            assert np.array_equal(array, arrays[key])
    assert len(rates) == STEPS
    assert not recorder.stale()
    assert {phase for _, phase, _ in recorder.ops} == {"update"}  # clipping, and the step


@pytest.mark.parametrize(
    ("name", "settings", "change"),
    [
        ("SGD", {"momentum": 0.9}, {"nesterov": True}),
        ("SGD", {"momentum": 0.9}, {"momentum": 0.0}),
        ("SGD", {"momentum": 0.9}, {"dampening": 0.5}),
        ("SGD", {}, {"hypergradient": 0.1}),
        ("Adam", {}, {"amsgrad": True}),
        ("Adam", {}, {"maximize": True}),
        ("RMSprop", {}, {"centered": True}),
        ("RMSprop", {}, {"momentum": 0.5}),
    ],
)
def test_flags_are_guarded(name: str, settings: dict[str, Any], change: dict[str, Any]) -> None:
    loop, recorder = Loop(name, settings), Recorder()
    with recorder.recording():
        loop.run()
    loop.optimizer.param_groups[0]["lr"] = 0.5
    assert not recorder.stale()
    loop.optimizer.param_groups[0].update(change)
    assert recorder.stale()


@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_a_refused_step_leaves_no_state(name: str) -> None:
    settings: dict[str, Any] = {"momentum": 0.9, "dampening": 0.5} if name == "SGD" else {}
    loop, other, recorder = Loop(name, settings), Loop(name, settings), Recorder()
    with recorder.recording():
        loop.run()
    for p, value in zip(loop.params, _values(0)):
        p.detach().write(value)
    assert loop.optimizer.state_arrays()
    for forget in recorder.forgets:
        forget()
    assert loop.optimizer.state_arrays() == {}
    if name == "Adam":  # the recorder's first run counted
        for state in loop.optimizer.state.values():
            del state["step"]
    for each in (loop, other):
        each.run()
    for p, q in zip(loop.params, other.params):
        assert np.array_equal(p.detach().numpy(), q.detach().numpy())


def test_loading_keeps_the_buffers_of_a_planned_step() -> None:
    settings = {"momentum": 0.9, "dampening": 0.5}
    loop, whole, recorder = Loop("SGD", settings), Loop("SGD", settings), Recorder()
    with recorder.recording():
        loop.run()
    whole.run()
    saved = {key: array.copy() for key, array in loop.optimizer.state_arrays().items()}, loop.optimizer.state_settings()
    values = [p.detach().numpy().copy() for p in loop.params]
    recorder.replay()
    buffers = [state["momentum_buffer"] for state in loop.optimizer.state.values()]
    loop.optimizer.load_state(*saved)
    for p, value in zip(loop.params, values):
        p.detach().write(value)
    assert all(state["momentum_buffer"] is b for state, b in zip(loop.optimizer.state.values(), buffers))
    assert not recorder.stale()
    recorder.replay()
    whole.run()
    for p, q in zip(loop.params, whole.params):
        assert np.array_equal(p.detach().numpy(), q.detach().numpy())
    fresh = Loop("SGD", settings)
    loop.optimizer.load_state_dict(fresh.optimizer.state_dict())  # without buffers: the recorded step has lost its own
    assert recorder.stale()


def test_a_further_group_makes_a_step_stale() -> None:
    loop, recorder = Loop("SGD", {}), Recorder()
    with recorder.recording():
        loop.run()
    assert not recorder.stale()
    loop.optimizer.add_param_group({"params": [brim.zeros((2,), requires_grad=True)]})
    assert recorder.stale()


def test_zeroed_gradients_replay() -> None:
    loop, recorder = Loop("SGD", {}), Recorder()
    for p, grad in zip(loop.params, loop.grads):
        p.grad = grad
    with recorder.recording():
        loop.optimizer.zero_grad(set_to_none=False)
    loop.feed(3)
    assert loop.grads[0].numpy().any()
    recorder.replay()
    assert not loop.grads[0].numpy().any()
    assert loop.params[0].grad is loop.grads[0]


def test_updates_run_in_the_layer_of_the_parameter() -> None:
    loop, recorder = Loop("SGD", {}), Recorder()
    for p, layer in zip(loop.params, ("first", "second")):
        p.book_as("params", layer)
    with recorder.recording():
        loop.run()
    assert [layer for name, _, layer in recorder.ops if name == "sgd_update"] == ["first", "second"]
    assert context.phase == "forward"
    assert context.layer == ""


def test_the_limit_of_a_recorded_clipping_may_change() -> None:
    loop, recorder, limits = Loop("SGD", {}), Recorder(), [1.0, 0.25]
    for p, grad in zip(loop.params, loop.grads):
        p.grad = grad
    with recorder.recording():
        optim.clip_grad_norm_(loop.params, host_scalar(lambda: limits.pop(0)))
        recorder.after_step(optim.clip_grad_norm_(loop.params, 100.0), (norms := []).append)
    recorder.replay()
    assert norms == pytest.approx([1.0, 0.25], rel=1e-5)


def test_reading_the_norm_inside_a_step_is_refused() -> None:
    loop, recorder = Loop("SGD", {}), Recorder()
    for p, grad in zip(loop.params, loop.grads):
        p.grad = grad
    with pytest.raises(TraceError), recorder.recording():
        optim.clip_grad_norm_(loop.params, 1.0, error_if_nonfinite=True)
    assert context.interpreter is None


def test_the_learned_rate_moves_by_less_than_float32_resolves() -> None:
    loop = Loop("SGD", {"lr": 0.1, "hypergradient": 1e-12})
    for step in range(STEPS):
        loop.feed(step)
        loop.run()
    rate = loop.optimizer.param_groups[0]["lr"]
    assert rate != 0.1
    assert rate == pytest.approx(0.1, abs=1e-9)


@pytest.mark.parametrize(("name", "settings"), [c for c in CASES if "hypergradient" not in c[1]])
def test_steps_of_a_model_without_memory(name: str, settings: dict[str, Any]) -> None:
    before = brim.memory_stats()["live_bytes"]
    with brim.meta():
        model = nn.Linear(10**6, 10**6)
        optimizer = getattr(optim, name)(model.parameters(), **settings)
        for p in model.parameters():
            p.grad = brim.empty(p.shape)
        norm = optim.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    with pytest.raises(DeviceError, match="meta"):
        float(norm)
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, brim.Tensor):
                assert value.device.is_meta
                assert value._block.record.category == "optimizer"
    assert model.weight.device.is_meta
    assert brim.memory_stats()["live_bytes"] == before
