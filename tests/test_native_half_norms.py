"""Native batch norm of float16 and bfloat16 against float64: either order in memory, images of any size, weights of
either width; the same bits with any number of threads."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import brim
from brim.spec import DTYPES, Spec
from brim_cpu import native
from native_kernels import dense_last, image, run_native

pytestmark = pytest.mark.skipif(not native.available(), reason=native.status())

Array = np.ndarray[Any, Any]
HALVES = {name: DTYPES[name] for name in ("bfloat16", "float16")}
ROUNDING = {"bfloat16": 2.0**-8, "float16": 2.0**-11}
WIDE = np.dtype("float32")
EPS = 1e-5
SHAPES = [(5, 6, 9, 11), (3, 40, 1, 2), (70, 17, 4, 4), (2, 3, 40, 41), (40, 600, 1, 1), (9, 130, 5, 3)]


def close(found: Array, wanted: Array, rounding: float) -> None:
    found, wanted = found.astype(np.float64), wanted.reshape(found.shape)
    scale = 4e-6 * float(np.abs(wanted).max())
    np.testing.assert_array_less(np.abs(found - wanted), 1.01 * rounding * np.abs(wanted) + scale + 1e-6)


@pytest.mark.parametrize("half_weights", [True, False], ids=["half_weights", "wide_weights"])
@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", HALVES)
def test_batch_norm_and_its_gradients(name: str, shape: tuple[int, ...], last: bool, half_weights: bool) -> None:
    dtype, rng, C = HALVES[name], np.random.default_rng(0), shape[1]
    x, g = (image(rng, shape, last).astype(dtype, order="K") for _ in range(2))
    kind = dtype if half_weights else WIDE
    w, b = (rng.standard_normal(C).astype(np.float32).astype(kind) for _ in range(2))
    out = dense_last(shape, dtype) if last else Spec(shape, dtype)
    wide, wide_g = x.astype(np.float64), g.astype(np.float64)
    scale, shift = (v.astype(np.float64)[:, None, None] for v in (w, b))
    axes: Any = {"axis": (0, 2, 3), "keepdims": True}
    mean, var = wide.mean(**axes), wide.var(**axes)
    rstd = 1 / np.sqrt(var + EPS)
    normal = (wide - mean) * rstd
    each = Spec((1, C, 1, 1), WIDE)
    results = run_native("batch_norm", [x, w, b], [out, each, each], {"eps": EPS})
    y, means, variances = results
    close(y, normal * scale + shift, ROUNDING[name])
    close(means, mean, 1e-6)
    close(variances, var, 1e-5)
    ins, sums = [g, x, w, means, variances], [Spec((C,), kind)] * 2
    gradients = run_native("batch_norm_grad", ins, [out, *sums], {"eps": EPS})
    spread = wide_g.mean(**axes) + normal * (wide_g * normal).mean(**axes)
    close(gradients[0], (wide_g - spread) * rstd * scale, ROUNDING[name])
    rounding = ROUNDING[name] if half_weights else 1e-5
    close(gradients[1], (wide_g * normal).sum(**axes), rounding)
    close(gradients[2], wide_g.sum(**axes), rounding)
    alone = run_native("batch_norm", [x, w, b], [out, each, each], {"eps": EPS}, threads=1)
    alone += run_native("batch_norm_grad", ins, [out, *sums], {"eps": EPS}, threads=1)
    assert all(a.tobytes() == c.tobytes() for a, c in zip(alone, results + gradients, strict=True))


@pytest.mark.parametrize("name", HALVES)
def test_batch_norm_without_weights(name: str) -> None:
    x = image(np.random.default_rng(0), (4, 5, 6, 7)).astype(HALVES[name])
    wide = x.astype(np.float64)
    mean, var = wide.mean((0, 2, 3), keepdims=True), wide.var((0, 2, 3), keepdims=True)
    close(brim.ops.batch_norm(brim.asarray(x))[0].numpy(), (wide - mean) / np.sqrt(var + EPS), ROUNDING[name])


@pytest.mark.parametrize("name", HALVES)
def test_not_finite_numbers_stay_in_their_channel(name: str) -> None:
    x = image(np.random.default_rng(0), (4, 20, 3, 3)).astype(HALVES[name])
    x[2, 7, 1, 1] = np.inf
    y = brim.ops.batch_norm(brim.asarray(x))[0].numpy().astype(np.float32)
    assert np.isnan(y[:, 7]).all()
    assert np.isfinite(np.delete(y, 7, axis=1)).all()
