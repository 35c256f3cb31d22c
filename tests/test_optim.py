"""Optimizers, schedules and clipping: against PyTorch where it is installed, and by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import brim
from brim import optim
from brim.errors import CheckpointError

SHAPES = [(3, 4), (5,)]
STEPS = 5


def _values(seed: int, dtype: str = "float64") -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape).astype(dtype) for shape in SHAPES]


def _params(seed: int = 0) -> list[Any]:
    return [brim.asarray(v).requires_grad_() for v in _values(seed)]


def _run(optimizer: optim.Optimizer, params: list[Any], steps: range = range(STEPS)) -> None:
    for step in steps:
        for p, g in zip(params, _values(100 + step)):
            p.grad = brim.asarray(g)
        optimizer.step()


CASES: list[tuple[str, dict[str, Any]]] = [
    ("SGD", {"lr": 0.1}),
    ("SGD", {"lr": 0.1, "momentum": 0.9}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.02}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.02}),
    ("SGD", {"lr": 0.1, "momentum": 0.5, "maximize": True}),
    ("SGD", {"lr": 0.1, "maximize": True, "weight_decay": 0.1}),
    ("Adam", {}),
    ("Adam", {"lr": 0.01, "betas": (0.8, 0.99), "eps": 1e-3, "weight_decay": 0.1}),
    ("Adam", {"lr": 0.01, "amsgrad": True, "maximize": True}),
    ("AdamW", {}),
    ("AdamW", {"lr": 0.01, "weight_decay": 0.2, "amsgrad": True}),
    ("AdamW", {"lr": 0.01, "maximize": True}),
    ("RMSprop", {}),
    ("RMSprop", {"lr": 0.01, "alpha": 0.9, "momentum": 0.9, "weight_decay": 0.1}),
    ("RMSprop", {"lr": 0.01, "centered": True}),
    ("RMSprop", {"lr": 0.01, "centered": True, "momentum": 0.5, "maximize": True}),
]


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_matches_torch(name: str, settings: dict[str, Any]) -> None:
    torch = pytest.importorskip("torch", reason="PyTorch not installed")
    params = _params()
    _run(getattr(optim, name)(params, **settings), params)
    theirs = [torch.tensor(v, requires_grad=True) for v in _values(0)]
    reference = getattr(torch.optim, name)(theirs, **settings)
    for step in range(STEPS):
        for p, g in zip(theirs, _values(100 + step)):
            p.grad = torch.tensor(g)
        reference.step()
    for p, t in zip(params, theirs):
        np.testing.assert_allclose(p.numpy(), t.detach().numpy(), rtol=1e-9, atol=1e-11)
        assert not np.array_equal(p.numpy(), _values(0)[0 if p.ndim == 2 else 1])


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_state_round_trip_continues_exactly(name: str, settings: dict[str, Any]) -> None:
    kind = getattr(optim, name)
    whole = _params()
    _run(kind(whole, **settings), whole)
    params = _params()
    first = kind(params, **settings)
    _run(first, params, range(3))
    copies = [brim.asarray(p.detach().numpy().copy()).requires_grad_() for p in params]
    second = kind(copies, lr=7.0)
    second.load_state({k: v.copy() for k, v in first.state_arrays().items()}, first.state_settings())
    _run(second, copies, range(3, STEPS))
    third = kind(params, lr=7.0)
    third.load_state_dict(first.state_dict())
    _run(third, params, range(3, STEPS))
    for a, b, c in zip(whole, copies, params):
        assert np.array_equal(a.numpy(), b.numpy())
        assert np.array_equal(a.numpy(), c.numpy())


@pytest.mark.parametrize("settings", [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}])
def test_hypergradient_by_hand(settings: dict[str, Any]) -> None:
    beta, lr, momentum = 0.01, 0.1, settings.get("momentum", 0.0)
    params = _params()
    optimizer = optim.SGD(params, lr=lr, weight_decay=0.1, hypergradient=beta, **settings)
    values, velocity, direction = _values(0), [0.0, 0.0], None
    rates = []
    for step in range(STEPS):
        _run(optimizer, params, range(step, step + 1))
        d = [g + 0.1 * p for g, p in zip(_values(100 + step), values)]
        if direction is not None:
            lr += beta * sum(float((a * b).sum()) for a, b in zip(d, direction))
        velocity = [momentum * v + a for v, a in zip(velocity, d)]
        direction = [a + momentum * v for a, v in zip(d, velocity)] if settings.get("nesterov") else velocity
        values = [p - lr * u for p, u in zip(values, direction)]
        rates.append(lr)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(lr, rel=1e-12)
        for p, v in zip(params, values):
            np.testing.assert_allclose(p.numpy(), v, rtol=1e-11)
    assert len(set(rates)) == STEPS  # it moves


def test_groups_zero_grad_and_ledger() -> None:
    a, b = _params()
    optimizer = optim.SGD([{"params": [a], "lr": 0.0}, {"params": b}], lr=1.0, momentum=0.9)
    before = brim.memory_stats("cpu")["by_kind"]["optimizer"]
    _run(optimizer, [a, b], range(1))
    assert np.array_equal(a.numpy(), _values(0)[0])
    np.testing.assert_allclose(b.numpy(), _values(0)[1] - _values(100)[1])
    assert brim.memory_stats("cpu")["by_kind"]["optimizer"] - before >= a.nbytes + b.nbytes
    optimizer.zero_grad(set_to_none=False)
    assert not a.grad.numpy().any()
    optimizer.zero_grad()
    assert a.grad is None
    with pytest.raises(ValueError):
        optimizer.add_param_group({"params": [a]})


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (optim.SGD, {"lr": -1.0}),
        (optim.SGD, {"nesterov": True}),
        (optim.SGD, {"momentum": -0.1}),
        (optim.SGD, {"hypergradient": -1.0}),
        (optim.Adam, {"betas": (1.0, 0.9)}),
        (optim.Adam, {"eps": -1.0}),
        (optim.RMSprop, {"alpha": 1.5}),
        (optim.AdamW, {"weight_decay": float("nan")}),
    ],
)
def test_bad_settings(kind: Any, settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        kind(_params(), **settings)


def test_bad_params_and_states() -> None:
    with pytest.raises(ValueError):
        optim.SGD([])
    with pytest.raises(TypeError):
        optim.SGD(_params()[0])
    with pytest.raises(ValueError):
        optim.SGD([{"params": _params(), "rate": 1.0}])
    first = optim.Adam(_params())
    with pytest.raises(CheckpointError):
        optim.Adam(_params()[:1]).load_state_dict(first.state_dict())
    params = _params()
    _run(first := optim.Adam(params), params)
    with pytest.raises(CheckpointError):
        optim.Adam(params[::-1]).load_state_dict(first.state_dict())


SCHEDULES: list[tuple[str, str, dict[str, Any]]] = [
    ("StepLR", "StepLR", {"step_size": 3, "gamma": 0.5}),
    ("MultiStepLR", "MultiStepLR", {"milestones": [2, 5], "gamma": 0.1}),
    ("ExponentialLR", "ExponentialLR", {"gamma": 0.9}),
    ("CosineAnnealingLR", "CosineAnnealingLR", {"T_max": 10, "eta_min": 0.01}),
    ("LinearWarmup", "LinearLR", {"total_iters": 4, "start_factor": 0.25}),
    ("OneCycleLR", "OneCycleLR", {"max_lr": 1.0, "total_steps": 11}),
]


@pytest.mark.filterwarnings("ignore:Detected call of:UserWarning")
@pytest.mark.parametrize(("name", "theirs", "settings"), SCHEDULES)
def test_schedules_match_torch(name: str, theirs: str, settings: dict[str, Any]) -> None:
    torch = pytest.importorskip("torch", reason="PyTorch not installed")
    optimizer = optim.SGD(_params(), lr=0.2)
    schedule = getattr(optim, name)(optimizer, **settings)
    reference = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.2)
    extra = {"cycle_momentum": False} if theirs == "OneCycleLR" else {}
    other = getattr(torch.optim.lr_scheduler, theirs)(reference, **settings, **extra)
    for _ in range(10):
        assert schedule.get_last_lr()[0] == pytest.approx(reference.param_groups[0]["lr"], rel=1e-9)
        schedule.step()
        other.step()
    fresh_optimizer = optim.SGD(_params(), lr=0.2)
    fresh = getattr(optim, name)(fresh_optimizer, **settings)
    fresh.load_state_dict(schedule.state_dict())
    assert fresh.get_last_lr() == schedule.get_last_lr()


@pytest.mark.parametrize("mode", ["min", "max"])
def test_plateau_matches_torch(mode: str) -> None:
    torch = pytest.importorskip("torch", reason="PyTorch not installed")
    optimizer = optim.SGD(_params(), lr=0.2)
    schedule = optim.ReduceLROnPlateau(optimizer, mode, patience=1, cooldown=1)
    reference = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.2)
    other = torch.optim.lr_scheduler.ReduceLROnPlateau(reference, mode, patience=1, cooldown=1)
    for value in [1.0, 0.9, 0.9, 0.95, 0.9, 0.9, 0.9, 1.5, 1.5, 1.5, 1.6]:
        schedule.step(value)
        other.step(value)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(reference.param_groups[0]["lr"], rel=1e-9)
    assert optimizer.param_groups[0]["lr"] < 0.2


def test_schedule_and_hypergradient_exclude_each_other() -> None:
    with pytest.raises(ValueError):
        optim.StepLR(optim.SGD(_params(), lr=0.1, hypergradient=1e-3), 1)


@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, float("inf")])
@pytest.mark.parametrize("max_norm", [0.5, 100.0])
def test_clip_norm_matches_torch(norm_type: float, max_norm: float) -> None:
    torch = pytest.importorskip("torch", reason="PyTorch not installed")
    params, theirs = _params(), [torch.tensor(v, requires_grad=True) for v in _values(0)]
    for p, t, g in zip(params, theirs, _values(1)):
        p.grad, t.grad = brim.asarray(g), torch.tensor(g)
    norm = optim.clip_grad_norm_(params, max_norm, norm_type)
    assert norm.shape == ()
    assert float(norm) == pytest.approx(float(torch.nn.utils.clip_grad_norm_(theirs, max_norm, norm_type)), rel=1e-9)
    for p, t in zip(params, theirs):
        np.testing.assert_allclose(p.grad.numpy(), t.grad.numpy(), rtol=1e-9)


def test_clip_value_and_nan() -> None:
    params = _params()
    for p, g in zip(params, _values(1)):
        p.grad = brim.asarray(g)
    optim.clip_grad_value_(params, 0.3)
    for p, g in zip(params, _values(1)):
        np.testing.assert_array_equal(p.grad.numpy(), np.clip(g, -0.3, 0.3))
    params[0].grad = brim.asarray(np.full(SHAPES[0], np.nan))
    with pytest.raises(FloatingPointError):
        optim.clip_grad_norm_(params, 1.0, error_if_nonfinite=True)
    untouched = params[1].grad.numpy().copy()
    with pytest.raises(FloatingPointError, match="nan"):
        optim.clip_grad_norm_(params, 1.0, error_if_nonfinite=True)
    np.testing.assert_array_equal(params[1].grad.numpy(), untouched)
    assert np.isnan(float(optim.clip_grad_norm_(params, 1.0)))
    assert np.isnan(params[1].grad.numpy()).all()  # not hidden


@pytest.mark.parametrize("norm_type", [1.0, 2.0, float("inf")])
def test_clip_norm_of_half_widths_empty_and_missing_gradients(norm_type: float) -> None:
    params = [
        brim.zeros(shape, dtype=dtype) for shape, dtype in (((2,), "float16"), ((0,), "float32"), ((3,), "float32"))
    ]
    assert float(optim.clip_grad_norm_(params, 1.0, norm_type)) == 0.0
    params[0].grad, params[1].grad = brim.asarray(np.full(2, 6e4, "float16")), brim.zeros((0,))
    norm = optim.clip_grad_norm_(params, 1e-3, norm_type)  # the squares overflow float16, and so does 1 / norm
    assert norm.dtype == brim.float32
    assert float(norm) == pytest.approx(np.linalg.norm([6e4, 6e4], norm_type), rel=1e-3)
    assert params[0].grad.dtype == brim.float16
    assert float(optim.clip_grad_norm_(params, 1.0, norm_type)) == pytest.approx(1e-3, rel=1e-2)
    assert params[2].grad is None
    with pytest.raises(ValueError, match="max_norm"):
        optim.clip_grad_norm_(params, -1.0)
    with pytest.raises(ValueError, match="norm_type"):
        optim.clip_grad_norm_(params, 1.0, 0.0)
