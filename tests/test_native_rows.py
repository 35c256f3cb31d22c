"""The native kernels of rows and reductions: softmax and losses, sums and extremes, dropout."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest

import brim
from brim import nn
from brim.random import philox
from brim_cpu import native
from brim_cpu.registry import KERNELS
from native_running import RNG, SHAPES, body, bound, channels_last, close, needs_library, normal, numpy_kernel, run

pytestmark = needs_library

Array = np.ndarray[Any, Any]

SPECIAL = [
    np.array([[1, np.nan, 2, 3], [-np.inf, 0, 1, 2], [np.inf, 0, 1, 2], [-np.inf] * 4], np.float32),
    np.array([[88, -88, 0, 1], [3e38, -3e38, 1, 0], [1e-40, 2e-40, -1e-42, 0], [-1e4, -1e4, -1e4, -2e4]], np.float32),
    np.array([[np.nan] * 70, [np.inf] * 70, [-3e38] * 70, [0] * 69 + [np.nan]], np.float32),
]


# ------------------------------------------------------------------------------------------------------- softmax


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
def test_softmax(name: str, shape: tuple[int, int]) -> None:
    x = normal(*shape) * 3
    y = run(name, x, axis=1)
    close(y, body(name, x, axis=1), 4)
    g = normal(*shape)
    wide = body(name + "_grad", g, y, axis=1)
    close(run(name + "_grad", g, y, axis=1), wide, 8, max(np.abs(g).max(), np.abs(wide).max()))


@pytest.mark.parametrize("x", SPECIAL, ids=["nan-inf", "large-small", "rows"])
@pytest.mark.parametrize("name", ["softmax", "log_softmax", "logsumexp"])
def test_softmax_of_special_numbers(name: str, x: Array) -> None:
    params: dict[str, Any] = {"axes": (1,), "keepdims": False} if name == "logsumexp" else {"axis": 1}
    close(run(name, x, **params), body(name, x, **params), 4)


def test_powers_in_softmax_are_within_one_unit() -> None:
    below = -np.sort(RNG.uniform(18, 87, 50000)).astype(np.float32)  # the sum with 1 = e^0 is 1
    found = run("softmax", np.stack([np.zeros_like(below), below], 1), axis=1)
    assert (found[:, 0] == 1).all()
    exact = np.exp(below.astype(np.float64))
    fused = not native.status().startswith("x86-64 ")  # without a fused multiply-add each step is rounded twice
    assert np.max(np.abs(found[:, 1] - exact) / np.spacing(exact.astype(np.float32))) <= (1.0 if fused else 1.1)
    denormal = np.array([[0, -88], [0, -103], [0, -200], [0, -3e38], [0, -np.inf]], np.float32)
    found = run("softmax", denormal, axis=1)
    assert (np.abs(found[:, 1] - np.exp(denormal[:, 1].astype(np.float64))) < np.finfo(np.float32).tiny).all()
    assert (found[2:, 1] == 0).all()


@pytest.mark.parametrize("columns", [15, 16, 17, 33, 63, 64, 65])
def test_rows_in_registers_agree_with_longer_ones(columns: int) -> None:
    x, g = normal(9, columns) * 4, normal(9, columns)
    longer = np.full((9, 80), -np.inf, np.float32)
    longer[:, :columns] = x
    y = run("softmax", x, axis=1)
    np.testing.assert_array_equal(y, run("softmax", longer, axis=1)[:, :columns])
    wide_y, wide_g = np.zeros((2, 9, 80), np.float32)
    wide_y[:, :columns], wide_g[:, :columns] = y, g
    wide = run("softmax_grad", wide_g, wide_y, axis=1)
    np.testing.assert_array_equal(run("softmax_grad", g, y, axis=1), wide[:, :columns])


def test_softmax_in_place_and_with_strides() -> None:
    x = normal(37, 130)
    want = run("softmax", x, axis=1)
    np.testing.assert_array_equal(run("softmax", np.asfortranarray(x), axis=1), want)
    kernel, _ = bound("softmax", [x], axis=1)
    assert kernel.aliasing
    kernel.run(x, x, scratch=None, axis=1)
    np.testing.assert_array_equal(x, want)
    assert bound("softmax", [x], axis=0)[0] is None  # only rows
    assert bound("softmax", [x.astype(np.float64)], axis=1)[0] is None


@pytest.mark.parametrize("shape", [(1, 1), (3, 5, 5), (2, 2, 64, 64), (4, 33, 20), (4, 20, 33), (1, 1, 1)], ids=str)
def test_causal_softmax(shape: tuple[int, ...]) -> None:
    x, g = normal(*shape), normal(*shape)
    hidden = ~np.tri(shape[-2], shape[-1], dtype=bool)
    x[..., hidden] = np.nan  # not read
    y = run("causal_softmax", x, scale=0.5)
    close(y, body("causal_softmax", x, scale=0.5), 4)
    assert (y[..., hidden] == 0).all()
    g[..., hidden] = np.nan
    close(run("causal_softmax_grad", g, y, scale=0.5), body("causal_softmax_grad", g, y, scale=0.5), 8)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_logsumexp(shape: tuple[int, int]) -> None:
    x = normal(*shape)
    for axes in ((1,), (0, 1)):
        total = run("logsumexp", x, axes=axes, keepdims=True)
        close(total, body("logsumexp", x, axes=axes, keepdims=True), 4)
        g = normal(*total.shape)
        close(run("logsumexp_grad", g, x, total, axes=axes), body("logsumexp_grad", g, x, total, axes=axes), 32)
    if min(shape) > 1:
        assert bound("logsumexp", [x], axes=(0,), keepdims=False)[0] is None


# ------------------------------------------------------------------------------------------------- cross-entropy


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("dtype", ["int32", "int64"])
def test_cross_entropy(shape: tuple[int, int], smoothing: float, dtype: str) -> None:
    x = normal(*shape) * 3
    index = RNG.integers(0, shape[1], shape[0]).astype(dtype)
    index[:: max(2, shape[0] // 3)] = -100
    how = {"ignore_index": -100, "smoothing": smoothing}
    losses, top, total = run("cross_entropy", x, index, **how)
    want = body("cross_entropy", x, index, **how)
    close(losses, want[0], 8, np.abs(x).max() + 1)
    np.testing.assert_array_equal(top, want[1])
    close(total, want[2], 4, max(1.0, np.abs(want[2]).max()))
    g = normal(shape[0])
    gradient = run("cross_entropy_grad", g, x, index, top, total, **how)
    close(gradient, body("cross_entropy_grad", g, x, index, top, total, **how), 16, np.abs(g).max())
    assert (gradient[index == -100] == 0).all()
    even = run("cross_entropy_grad", np.full(shape[0], g[0]), x, index, top, total, **how)
    for same in (np.broadcast_to(g[:1], g.shape), np.full(3 * shape[0], g[0])[::3]):
        np.testing.assert_array_equal(run("cross_entropy_grad", same, x, index, top, total, **how), even)


@pytest.mark.parametrize("x", SPECIAL, ids=["nan-inf", "large-small", "rows"])
def test_cross_entropy_of_special_numbers(x: Array) -> None:
    index, how = np.arange(len(x)), {"ignore_index": -100, "smoothing": 0.0}
    for got, want in zip(run("cross_entropy", x, index, **how), body("cross_entropy", x, index, **how), strict=True):
        close(got, want, 4)


def test_large_gradients_of_cross_entropy() -> None:
    rows, columns = 44, 50257  # written past the caches; rows begin anywhere in a cache line
    x, index, g = normal(rows, columns), RNG.integers(0, columns, rows), normal(rows)
    how = {"ignore_index": -100, "smoothing": 0.1}
    _, top, total = run("cross_entropy", x, index, **how)
    for aligned in (True, False):
        got = run("cross_entropy_grad", g, x, index, top, total, aligned=aligned, **how)
        for part in (slice(0, 3), slice(40, 44)):
            want = run("cross_entropy_grad", g[part], x[part], index[part], top[part], total[part], **how)
            np.testing.assert_array_equal(got[part], want)


@pytest.mark.parametrize("wrong", [-1, 5, 2**40])
def test_a_class_that_does_not_exist(wrong: int) -> None:
    with pytest.raises(IndexError, match=f"class {wrong} does not exist: there are 5"):
        run("cross_entropy", normal(3, 5), np.array([0, wrong, 4]), ignore_index=-100, smoothing=0.0)
    x = brim.asarray(normal(3, 5))
    with pytest.raises(IndexError, match=f"class {wrong} does not exist"):
        nn.functional.cross_entropy(x, brim.asarray(np.array([0, wrong, 4])))
    run("cross_entropy", normal(3, 5), np.array([0, wrong, 4]), ignore_index=wrong, smoothing=0.0)


# ---------------------------------------------------------------------------------------------------- reductions


REDUCED = [
    (1,), (5,), (100000,), (200001,), (3, 5), (5000, 3), (70000, 1), (1, 70000), (3, 70000), (4000, 129), (130, 1000),
    (7, 6, 5), (64, 10, 49), (2, 3, 4, 5), (40, 3, 1, 700), (9, 1, 11),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("shape", REDUCED, ids=str)
def test_reductions(shape: tuple[int, ...], dtype: Any) -> None:
    x = normal(*shape, dtype=dtype)
    every = itertools.chain.from_iterable(
        itertools.combinations(range(len(shape)), n) for n in range(1, len(shape) + 1)
    )
    for axes in every:
        if len(shape) == 4 and axes == (0, 2):
            continue  # too many changes between axes that are kept and axes that are not: NumPy's kernel
        exact = x.astype(np.longdouble).sum(axes)
        size = np.abs(x).astype(np.float64).sum(axes).max()
        got = run("sum", x, axes=axes, keepdims=False)
        close(got, exact, 2 + math.log2(1 + x.size // max(1, got.size)) / 2, size)
        for name in ("max", "min"):
            want = numpy_kernel(name, x, axes=axes, keepdims=True)
            np.testing.assert_array_equal(run(name, x, axes=axes, keepdims=True), want)
    for name in ("argmax", "argmin"):
        for axis in (None, *range(len(shape))):
            want = numpy_kernel(name, x, axis=axis, keepdims=False)
            np.testing.assert_array_equal(run(name, x, axis=axis, keepdims=False), want)


@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("shape", [(70, 130), (3, 200000), (5000, 3)], ids=str)
def test_extremes_of_special_numbers_and_ties(shape: tuple[int, int], dtype: Any) -> None:
    x = RNG.integers(-3, 4, shape).astype(dtype)  # many ties
    cases = [x.copy(), x.copy(), x.copy(), np.full(shape, np.nan, dtype), np.full(shape, -np.inf, dtype)]
    cases[1][RNG.random(shape) < 0.001] = np.nan
    cases[1][-1, -1] = np.nan
    cases[2][RNG.random(shape) < 0.5] = np.inf
    for case in cases:
        for axes in ((0,), (1,), (0, 1)):
            for name in ("max", "min"):
                want = numpy_kernel(name, case, axes=axes, keepdims=False)
                np.testing.assert_array_equal(run(name, case, axes=axes, keepdims=False), want)
        for axis in (0, 1, None):
            for name in ("argmax", "argmin"):
                want = numpy_kernel(name, case, axis=axis, keepdims=False)
                np.testing.assert_array_equal(run(name, case, axis=axis, keepdims=False), want)


def test_sums_of_special_numbers() -> None:
    x = normal(50, 300)
    x[3, 7], x[4, 8], x[5, 9], x[5, 10] = np.nan, np.inf, np.inf, -np.inf
    x[6], x[7] = 1e-42, -3e38
    for axes in ((0,), (1,), (0, 1)):
        with np.errstate(over="ignore", invalid="ignore"):
            want = numpy_kernel("sum", x, axes=axes, keepdims=False)
        got = run("sum", x, axes=axes, keepdims=False)
        np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
        np.testing.assert_array_equal(np.isinf(got), np.isinf(want))
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)


def test_sum_is_as_accurate_as_pairwise() -> None:
    x = np.full(2**24 + 7, 0.1, np.float32)
    exact = float(np.float32(0.1)) * x.size
    assert abs(float(run("sum", x, axes=(0,), keepdims=False)) - exact) <= 2e-7 * exact
    columns = run("sum", x[: 2**24].reshape(-1, 2), axes=(0,), keepdims=False)
    np.testing.assert_allclose(columns, exact / 2, rtol=2e-6)


def test_reductions_of_other_layouts() -> None:
    x = normal(4, 6, 5, 7)
    last = channels_last(x)
    for axes in ((0, 2, 3), (0, 1, 2, 3), (2, 3)):
        np.testing.assert_allclose(run("sum", last, axes=axes, keepdims=False), x.sum(axes), rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(run("max", last, axes=axes, keepdims=False), x.max(axes))
    for view in (x[:, ::2], np.broadcast_to(x[:1], x.shape), x.transpose(3, 1, 2, 0)[::-1]):
        assert bound("sum", [view], axes=(1,), keepdims=False)[0] is None  # NumPy's kernel
    np.testing.assert_array_equal(run("argmax", last, axis=1, keepdims=False), x.argmax(1))


@pytest.mark.parametrize("dtype", ["int32", "int64", "uint8", "bool"])
@pytest.mark.parametrize("shape", REDUCED, ids=str)
def test_positions_in_whole_numbers(shape: tuple[int, ...], dtype: str) -> None:
    info = np.iinfo(dtype if dtype != "bool" else np.uint8)
    for low, high in ((0, 2), (info.min, info.max)):
        x = RNG.integers(low, high, shape, endpoint=True, dtype=info.dtype).astype(dtype)
        for case in (x, np.full_like(x, low), np.full_like(x, high)):
            for name, axis in itertools.product(("argmax", "argmin"), (None, *range(len(shape)))):
                want = numpy_kernel(name, case, axis=axis, keepdims=True)
                np.testing.assert_array_equal(run(name, case, axis=axis, keepdims=True), want)


@pytest.mark.parametrize("name", ["sum", "max", "argmax"])
def test_what_is_left_to_numpy(name: str) -> None:
    params: dict[str, Any] = {"axis": 0} if name == "argmax" else {"axes": (0,)}
    for dtype in ("int16", "float16", "uint64") if name == "argmax" else ("int64", "float16", "bool"):
        assert bound(name, [np.ones((3, 4), dtype)], keepdims=False, **params)[0] is None
    if name == "sum":
        assert bound(name, [np.ones((0, 4), np.float32)], keepdims=False, **params)[0] is None
        assert brim.sum(brim.zeros((0, 4)), axis=0).tolist() == [0.0] * 4


# ------------------------------------------------------------------------------------------------------- dropout


@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("n", [0, 1, 7, 8, 9, 127, 255, 256, 257, 5000, 100003])
def test_dropout(n: int, dtype: Any) -> None:
    x = normal(n, dtype=dtype)
    x[::5] = np.nan
    for p in (0.0, 1e-9, 0.3, 0.999, 1 - 2**-26, 1.0):
        for seed, counter in ((0, 0), (1234, 77), (2**64 - 1, 2**40)):
            u = np.random.Generator(philox(seed, counter)).random(n, dtype=np.float32)
            scale = dtype(1 / (1 - p) if p < 1 else 0)
            want = np.where(u < np.float32(p), dtype(0), x * scale)
            got = run("dropout", x, seed, counter, p=p)
            assert got.tobytes() == want.tobytes()


def test_dropout_of_large_and_strided_arrays() -> None:
    x = normal(2100, 1030)
    record, out = KERNELS["dropout"], np.empty_like(x)
    for given in (x, x.T, x[::-1]):
        out = np.empty(given.shape, given.dtype)
        scratch = np.empty(record.scratch([], [], p=0.2), np.uint8)  # type: ignore[misc]
        record.run(out, np.ascontiguousarray(given), 3, 4, p=0.2, scratch=scratch)
        for aligned in (True, False):
            assert run("dropout", given, 3, 4, p=0.2, aligned=aligned).tobytes() == out.tobytes()
