"""The native kernels of batch norm and layer norm, and steps in which they run."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

import brim
from brim import nn
from brim.spec import Spec
from native_running import RNG, SHAPES, body, channels_last, close, needs_library, normal, numpy_only, run, spec_of

pytestmark = needs_library

Array = np.ndarray[Any, Any]

# --------------------------------------------------------------------------------------------------------- norms

IMAGES = [
    (2, 1), (5, 3), (128, 256), (3000, 7), (40, 600), (1, 3, 2), (3, 5, 17), (6, 20, 49), (4, 2, 5000), (64, 3, 1500),
    (2, 9, 3, 3), (3, 4, 33, 31), (2, 8, 40, 40), (33, 1, 8, 8), (1, 2, 1, 2, 3),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("shape", IMAGES, ids=str)
@pytest.mark.parametrize("order", ["plain", "channels last"])
def test_batch_norm(shape: tuple[int, ...], order: str, dtype: Any) -> None:
    place = channels_last if order == "channels last" else np.asarray
    x, g = place(normal(*shape, dtype=dtype) * 2 + 3), place(normal(*shape, dtype=dtype))
    weight, bias = normal(shape[1], dtype=dtype), normal(shape[1], dtype=dtype)
    outs = None
    if order == "channels last" and len(shape) > 2:
        statistics = Spec((1, shape[1], *(1,) * (len(shape) - 2)), np.dtype(dtype))
        outs = [spec_of(x), statistics, statistics]
    # The mean is rounded: numbers of a channel that differ little from it lose digits in the difference.
    lost = max(1.0, float(np.abs(x).max()) / math.sqrt(float(x.var(axis=(0, *range(2, x.ndim))).min()) + 1e-5))
    for w, b in ((weight, bias), (1.0, 0.0), (weight, 0.5)):
        found = run("batch_norm", x, w, b, outs=outs, eps=1e-5)
        for got, want, scale in zip(found, body("batch_norm", x, w, b, eps=1e-5), (8 * lost, 8, None), strict=True):
            close(got, want, 32, scale)
    _, mean, var = found
    vector = Spec(weight.shape, weight.dtype)
    found = run("batch_norm_grad", g, x, weight, mean, var, outs=outs and [outs[0], vector, vector], eps=1e-5)
    wanted = body("batch_norm_grad", g, x, weight, mean, var, eps=1e-5)
    rstd = 1 / math.sqrt(max(1e-5, float(var.min())))
    for got, want, scale in zip(found, wanted, (8 * rstd, *(8 * math.sqrt(x.size),) * 2), strict=True):
        close(got, want, 8, scale)


def test_batch_norm_of_images_that_lie_otherwise() -> None:
    x = normal(6, 5, 4, 7)
    want = run("batch_norm", x, 1.0, 0.0, eps=1e-5)
    for other in (x[:, :, ::-1], x.transpose(0, 1, 3, 2), np.broadcast_to(x[:1], x.shape), channels_last(x)):
        plain = np.ascontiguousarray(other)
        for got, expected in zip(
            run("batch_norm", other, 1.0, 0.0, eps=1e-5), run("batch_norm", plain, 1.0, 0.0, eps=1e-5), strict=True
        ):
            np.testing.assert_array_equal(got, expected)
    assert len(want) == 3


def test_batch_norm_of_a_large_mean() -> None:
    # The deviations are 1e-4 of the mean; a sum of squares less the square of the sum would have no correct digit.
    x = (normal(50, 4, 300) + 1e4).astype(np.float32)
    for shape in ((50, 4, 300), (50 * 300, 4)):
        given = np.ascontiguousarray(np.moveaxis(x, 1, -1)).reshape(shape) if len(shape) == 2 else x
        _, mean, var = run("batch_norm", given, 1.0, 0.0, eps=1e-5)
        wide = given.astype(np.float64)
        axes = (0, 2)[: len(shape) - 1]
        np.testing.assert_allclose(var.reshape(-1), wide.var(axes), rtol=1e-6)
        np.testing.assert_allclose(mean.reshape(-1), wide.mean(axes), rtol=1e-7)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf], ids=str)
def test_batch_norm_of_special_numbers(value: float) -> None:
    x = normal(8, 3, 20)
    x[2, 1, 3] = value
    for given in (x, x[:, :, 0].copy()):
        if given.ndim == 2:
            given[2, 1] = value
        y, mean, var = run("batch_norm", given, 1.0, 0.0, eps=1e-5)
        assert np.isnan(y[:, 1]).all()
        assert np.isfinite(y[:, ::2]).all()
        assert np.isnan(var.reshape(-1)[1])
        assert not np.isfinite(mean.reshape(-1)[1])


@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_layer_norm(shape: tuple[int, int], dtype: Any) -> None:
    x, g = normal(*shape, dtype=dtype) * 2 + 3, normal(*shape, dtype=dtype)
    weight, bias = normal(shape[1], dtype=dtype), normal(shape[1], dtype=dtype)
    for w, b in ((weight, bias), (1.0, 0.0), (weight, 0.5), (1.0, bias)):
        found = run("layer_norm", x, w, b, ndim=1, eps=1e-5)
        for got, want, scale in zip(found, body("layer_norm", x, w, b, ndim=1, eps=1e-5), (16, 8, None), strict=True):
            close(got, want, 8, scale)
    _, mean, var = found
    rstd = 1 / math.sqrt(max(1e-5, float(var.min())))
    for w in (weight, 2.0):
        found = run("layer_norm_grad", g, x, w, mean, var, ndim=1, eps=1e-5)
        wanted = body("layer_norm_grad", g, x, w, mean, var, ndim=1, eps=1e-5)
        for got, want, scale in zip(
            found, wanted, (8 * rstd, *(8 * math.sqrt(x.size) * max(1, rstd),) * 2), strict=True
        ):
            close(got, np.asarray(want).reshape(got.shape), 8, scale)


def test_layer_norm_over_several_axes() -> None:
    x, weight, bias = normal(3, 4, 5, 6), normal(5, 6), normal(5, 6)
    got = run("layer_norm", x, weight, bias, ndim=2, eps=1e-3)
    for one, want in zip(got, body("layer_norm", x, weight, bias, ndim=2, eps=1e-3), strict=True):
        close(one, want)


@pytest.mark.parametrize("aligned", [True, False], ids=["on lines", "off lines"])
def test_large_results_are_written_past_the_caches(aligned: bool) -> None:
    def check(name: str, x: Array, **params: Any) -> None:
        y, mean, var = run(name, x, 1.0, 0.0, aligned=aligned, **params, eps=1e-5)
        close(y, (x - mean.astype(np.float64)) / np.sqrt(var.astype(np.float64) + 1e-5))
        g = np.roll(x, 1, -1)
        found = run(name + "_grad", g, x, 1.0, mean, var, outs=None, aligned=aligned, **params, eps=1e-5)
        close(found[0], body(name + "_grad", g, x, 1.0, mean, var, **params, eps=1e-5)[0])

    x = normal(2200, 1030)  # more than 8 MiB
    check("layer_norm", x, ndim=1)
    check("layer_norm", x[:2100, :1024].copy(), ndim=1)
    check("batch_norm", x.reshape(-1)[: 12 * 3 * 62944].reshape(12, 3, 62944))
    check("batch_norm", x.reshape(-1)[: 34000 * 64].reshape(-1, 64))


# ------------------------------------------------------------------------------- the framework around the kernels


def _step(x: Any, y: Any, table: Any) -> Any:
    model = table["model"]
    loss = nn.functional.cross_entropy(model(x), y, label_smoothing=0.1)
    loss.backward()
    gradients = [p.grad for p in model.parameters()]
    for p in model.parameters():
        p.grad = None
    return loss, gradients


def test_eager_and_planned_steps_run_the_same_kernels() -> None:
    brim.random.manual_seed(3)
    layers = [
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 64, 40),
        nn.LayerNorm(40), nn.Dropout(0.3), nn.BatchNorm1d(40), nn.Linear(40, 10),
    ]  # fmt: skip
    model = nn.Sequential(*layers)
    x, y = normal(12, 3, 8, 8), RNG.integers(0, 10, 12)
    start = brim.random.get_state()

    def step(x: Any, y: Any) -> Any:
        return _step(x, y, {"model": model})

    eager_loss, eager = step(brim.asarray(x), brim.asarray(y))
    brim.random.set_state(start)
    planned = brim.compile(step)
    loss, gradients = planned(x, y)
    assert loss.numpy().tobytes() == eager_loss.numpy().tobytes()
    for a, b in zip(eager, gradients, strict=True):
        assert a.numpy().tobytes() == b.numpy().tobytes()
    plan = brim.plan(step, brim.spec(x.shape), brim.spec(y.shape, "int64"))
    names = {instruction.op.name for instruction in plan.programs[0].prepared.program.instructions}
    names = {name.removesuffix("_fused") for name in names}
    assert {"batch_norm", "batch_norm_grad", "layer_norm_grad", "cross_entropy_powers_grad"} <= names


@pytest.mark.parametrize("name", ["softmax", "layer_norm", "batch_norm", "cross_entropy"])
def test_second_derivatives_go_through_the_bodies(name: str) -> None:
    x = brim.asarray(normal(6, 5)).requires_grad_(True)
    functions = {
        "softmax": lambda x: brim.square(brim.softmax(x)).sum(),
        "layer_norm": lambda x: brim.square(nn.functional.layer_norm(x, (5,)) + x).sum(),
        "batch_norm": lambda x: brim.square(brim.ops.norm.batch_norm(x)[0] + x).sum(),
        "cross_entropy": lambda x: brim.square(
            nn.functional.cross_entropy(x, brim.asarray(np.arange(6) % 5), reduction="none")
        ).sum(),
    }

    def second() -> Array:
        (first,) = brim.grad(functions[name](x), [x], create_graph=True)
        (again,) = brim.grad(brim.square(first).sum(), [x])
        return again.numpy()

    found = second()
    with numpy_only():
        np.testing.assert_allclose(found, second(), rtol=2e-3, atol=2e-4)
