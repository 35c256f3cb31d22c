"""Native kernels of float16 and bfloat16 by way of float32, a slice at a time: against NumPy's kernels and float64,
slices that do not come out even, either order in memory, sums over slices; the same bits with any number of threads."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import brim
from brim.spec import DTYPES, Spec
from brim_cpu import native
from brim_cpu.overlay import half_slices
from native_kernels import dense_last, image, native_kernel, run_native, run_numpy

pytestmark = pytest.mark.skipif(not native.available(), reason=native.status())

Array = np.ndarray[Any, Any]
HALVES = {name: DTYPES[name] for name in ("bfloat16", "float16")}
ROUNDING = {"bfloat16": 2.0**-8, "float16": 2.0**-11}
WINDOW = {"kernel": (3, 3), "stride": (2, 2), "padding": (1, 1)}
CONV = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 1}
over_halves = pytest.mark.parametrize("name", HALVES)
over_orders = pytest.mark.parametrize("last", [False, True], ids=["first", "last"])


@pytest.fixture(autouse=True)
def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two images of the tests' size at a time: of five, one is left over."""
    monkeypatch.setattr(half_slices, "SLICE_BYTES", 2 * 4 * 2 * 6 * 9 * 11)


def images(shape: tuple[int, ...], last: bool, dtype: Any, seed: int = 0) -> Array:
    return image(np.random.default_rng(seed), shape, last).astype(dtype)


def spec(shape: tuple[int, ...], last: bool, dtype: Any) -> Spec:
    return dense_last(shape, dtype) if last else Spec(shape, dtype)


def close(found: Array, wanted: Array, rounding: float, scale: float = 1e-6) -> None:
    """Both rounded once, of float32 results in another order of sums."""
    found, wanted = found.astype(np.float64), wanted.astype(np.float64)
    assert found.shape == wanted.shape
    assert (np.abs(found - wanted) <= 2.1 * rounding * np.abs(wanted) + scale * np.abs(wanted).max() + 1e-7).all()


def convolutions(name: str, last: bool) -> list[tuple[str, list[Array], Spec, dict[str, Any]]]:
    dtype, shape, w_shape, out = HALVES[name], (5, 6, 9, 11), (7, 6, 3, 3), (5, 7, 9, 11)
    x, g, w = images(shape, last, dtype), images(out, last, dtype, 1), images(w_shape, False, dtype, 2)
    return [
        ("conv2d", [x, w], spec(out, last, dtype), CONV),
        ("conv2d_grad_input", [g, w], spec(shape, last, dtype), {**CONV, "size": shape[2:]}),
        ("conv2d_grad_weight", [g, x], Spec(w_shape, dtype), {**CONV, "kernel": (3, 3)}),
    ]


@over_orders
@over_halves
def test_convolutions_as_numpy(name: str, last: bool) -> None:
    for op, ins, out, params in convolutions(name, last):
        (found,), (wanted,) = run_native(op, ins, [out], params), run_numpy(op, ins, [out], params)
        close(found, wanted, ROUNDING[name])
        (alone,) = run_native(op, ins, [out], params, threads=1)
        assert found.tobytes() == alone.tobytes()


@over_halves
def test_convolutions_of_images_in_another_order(name: str) -> None:
    dtype = HALVES[name]
    x = images((5, 9, 11, 6), False, dtype).transpose(0, 3, 2, 1)  # neither row-major nor channels-last
    w = images((7, 6, 3, 3), False, dtype, 1)
    out = Spec((5, 7, 11, 9), dtype)
    (found,), (wanted,) = run_native("conv2d", [x, w], [out], CONV), run_numpy("conv2d", [x, w], [out], CONV)
    close(found, wanted, ROUNDING[name])


@over_halves
def test_fast_convolutions_round_to_nearly_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(half_slices, "SLICE_BYTES", 1 << 18)
    dtype, shape = HALVES[name], (5, 32, 16, 16)
    x, w = images(shape, True, dtype), images((32, 32, 3, 3), False, dtype, 1)
    out = spec(shape, True, dtype)
    (exact,) = run_native("conv2d", [x, w], [out], CONV)
    (fast,) = run_native("conv2d", [x, w], [out], {**CONV, "fast": True})
    close(fast, exact, ROUNDING[name], scale=2e-5)


@over_orders
@over_halves
def test_pools_as_numpy(name: str, last: bool) -> None:
    dtype, shape, small = HALVES[name], (5, 6, 9, 11), (5, 6, 5, 6)
    x, g = images(shape, last, dtype), images(small, last, dtype, 1)
    x[1, 2, 3, 4] = np.nan
    results = [spec(small, last, dtype), spec(small, last, np.dtype("int32"))]
    how = {**WINDOW, "dilation": (1, 1)}
    found, wanted = run_native("max_pool2d", [x], results, how), run_numpy("max_pool2d", [x], results, how)
    np.testing.assert_array_equal(found[0].astype(np.float32), wanted[0].astype(np.float32))
    np.testing.assert_array_equal(found[1], wanted[1])
    back = spec(shape, last, dtype)
    cases: list[tuple[str, list[Array], Spec, dict[str, Any]]] = [
        ("max_pool2d_grad", [g, found[1]], back, {**how, "size": shape[2:]}),
        ("avg_pool2d", [x], results[0], {**WINDOW, "count_include_pad": False}),
        ("avg_pool2d_grad", [g], back, {**WINDOW, "count_include_pad": True, "size": shape[2:]}),
    ]
    for op, ins, out, params in cases:
        (made,), (numpy,) = run_native(op, ins, [out], params), run_numpy(op, ins, [out], params)
        assert (np.isnan(made) == np.isnan(numpy)).all(), op
        close(np.nan_to_num(made.astype(np.float32)), np.nan_to_num(numpy.astype(np.float32)), ROUNDING[name])


@over_halves
def test_softmax_and_its_gradient(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(half_slices, "SLICE_BYTES", 4 * 2 * 50 * 4)
    dtype, rng = HALVES[name], np.random.default_rng(0)
    x, g = (rng.standard_normal((3, 7, 50)).astype(np.float32).astype(dtype) for _ in range(2))
    wide, wide_g = x.astype(np.float64), g.astype(np.float64)
    e = np.exp(wide - wide.max(-1, keepdims=True))
    soft = e / e.sum(-1, keepdims=True)
    out, how = Spec(x.shape, dtype), {"axis": 2}
    (found,) = run_native("softmax", [x], [out], how)
    close(found, soft, ROUNDING[name])
    close(run_native("log_softmax", [x], [out], how)[0], np.log(soft), ROUNDING[name])
    y = found.astype(np.float64)
    close(run_native("softmax_grad", [g, found], [out], how)[0],
          y * (wide_g - (wide_g * y).sum(-1, keepdims=True)), ROUNDING[name])  # fmt: skip
    log = np.log(soft).astype(dtype)
    want = wide_g - np.exp(log.astype(np.float64)) * wide_g.sum(-1, keepdims=True)
    close(run_native("log_softmax_grad", [g, log], [out], how)[0], want, ROUNDING[name])
    assert native_kernel("softmax", [x], [out], {"axis": 1}) is None


@pytest.mark.parametrize("weights", ["half", "wide"])
@over_halves
def test_layer_norm_and_its_gradients(name: str, weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(half_slices, "SLICE_BYTES", 4 * 2 * 40 * 4)
    dtype, rng = HALVES[name], np.random.default_rng(0)
    shape, rows = (3, 5, 4, 10), (3, 5, 1, 1)
    x, g = (rng.standard_normal(shape).astype(np.float32).astype(dtype) for _ in range(2))
    kind = dtype if weights == "half" else np.dtype("float32")
    w, b = (rng.standard_normal((4, 10)).astype(np.float32).astype(kind) for _ in range(2))
    wide, wide_g = x.astype(np.float64), g.astype(np.float64)
    scale, shift = (v.astype(np.float64) for v in (w, b))
    mean, var = wide.mean((2, 3), keepdims=True), wide.var((2, 3), keepdims=True)
    rstd = 1 / np.sqrt(var + 1e-5)
    normal = (wide - mean) * rstd
    how, each = {"ndim": 2, "eps": 1e-5}, Spec(rows, np.dtype("float32"))
    out, means, variances = run_native("layer_norm", [x, w, b], [Spec(shape, dtype), each, each], how)
    close(out, normal * scale + shift, ROUNDING[name])
    close(means, mean, 1e-6)
    close(variances, var, 1e-6)
    sums = [Spec((4, 10), kind)] * 2
    dx, dw, db = run_native("layer_norm_grad", [g, x, w, means, variances], [Spec(shape, dtype), *sums], how)
    scaled = wide_g * scale
    spread = scaled.mean((2, 3), keepdims=True) + normal * (scaled * normal).mean((2, 3), keepdims=True)
    close(dx, (scaled - spread) * rstd, ROUNDING[name])
    rounding = ROUNDING[name] if weights == "half" else 1e-6
    close(dw, (wide_g * normal).sum((0, 1)), rounding)
    close(db, wide_g.sum((0, 1)), rounding)


@over_halves
def test_layer_norm_without_weights(name: str) -> None:
    x = np.random.default_rng(0).standard_normal((6, 30)).astype(np.float32).astype(HALVES[name])
    wide = x.astype(np.float64)
    normal = (wide - wide.mean(1, keepdims=True)) / np.sqrt(wide.var(1, keepdims=True) + 1e-5)
    close(brim.ops.layer_norm(brim.asarray(x), (30,)).numpy(), normal, ROUNDING[name])
