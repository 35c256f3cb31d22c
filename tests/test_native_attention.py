"""The native kernels of attention: beside products, softmax and dropout in float64, and what a query must not see."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

import brim
from brim.spec import Spec
from native_running import RNG, bound, close, needs_library, normal, run

pytestmark = needs_library

Array = np.ndarray[Any, Any]

# Leading axes, T, S, E, D: one number of each, parts of tiles and panels, whole ones, several blocks of queries, keys
# that are packed beforehand, and causal attention with fewer and more keys than queries.
SIZES = [
    ((), 1, 1, 1, 1), ((2,), 3, 5, 4, 5), ((2, 3), 24, 24, 32, 32), ((2, 3), 64, 64, 32, 32), ((3,), 100, 100, 16, 24),
    ((2,), 37, 90, 33, 40), ((5,), 90, 37, 8, 70), ((2,), 200, 200, 64, 64), ((1,), 130, 600, 48, 32),
]  # fmt: skip
NAMES = {(0, 0): "attention", (1, 0): "attention_grad", (0, 1): "attention_dropout", (1, 1): "attention_dropout_grad"}


def seen(T: int, S: int, causal: bool) -> Array:
    return np.tri(T, S, dtype=bool) if causal else np.ones((T, S), bool)


def kept(shape: tuple[int, ...], p: float) -> Array:
    """What dropout makes of ones, with the seed and the counter that `given` has."""
    return brim.ops.dropout(brim.ones(shape), 7, 3, p=p).numpy() if p else np.ones(shape)


def reference(g: Array, q: Array, k: Array, v: Array, causal: bool, scale: float, p: float) -> list[Array]:
    """The result, the logarithms and the gradients, in float64."""
    g, q, k, v = (x.astype(np.float64) for x in (g, q, k, v))
    scores = np.where(seen(q.shape[-2], k.shape[-2], causal), q @ k.swapaxes(-1, -2) * scale, -math.inf)
    logs = np.logaddexp.reduce(scores, -1)
    weights = np.exp(scores - logs[..., None])
    mask = kept(weights.shape, p)
    slopes = mask * (g @ v.swapaxes(-1, -2))
    slopes = weights * (slopes - (weights * slopes).sum(-1, keepdims=True)) * scale
    dropped = weights * mask
    return [dropped @ v, logs, slopes @ k, slopes.swapaxes(-1, -2) @ q, dropped.swapaxes(-1, -2) @ g]


def operands(lead: tuple[int, ...], T: int, S: int, E: int, D: int) -> list[Array]:
    return [normal(*lead, *tail) for tail in ((T, D), (T, E), (S, E), (S, D))]


def native_ones(g: Array, q: Array, k: Array, v: Array, p: float = 0.0, **how: Any) -> list[Array]:
    """The same by the kernels; each runs on 1, 2 and 3 threads with the same bits."""
    numbers = (7, 3) if p else ()
    if p:
        how["p"] = p
    lead = q.shape[:-2]
    specs = [Spec(lead + x.shape[-2:], np.float32) for x in (q, k, v)]
    outs = [Spec((*lead, q.shape[-2], v.shape[-1]), np.float32), Spec(q.shape[:-1], np.float32)]
    y, logs = run(NAMES[0, p > 0], q, k, v, *numbers, outs=outs, **how)
    return [y, logs, *run(NAMES[1, p > 0], g, q, k, v, y, logs, *numbers, outs=specs, **how)]


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_beside_the_formula(size: tuple[tuple[int, ...], int, int, int, int], causal: bool, p: float) -> None:
    lead, T, S, E, D = size
    given = operands(lead, T, S, E, D)
    how = {"causal": causal, "scale": 1 / math.sqrt(E)}
    want = reference(*given, p=p, **how)
    for got, right in zip(native_ones(*given, p=p, **how), want, strict=True):
        close(got, right, 16, max(1.0, float(np.abs(right).max())))


def test_views_are_read_where_they_lie() -> None:
    """As a model has them: queries, keys and values of all heads in one array, heads side by side."""
    B, H, T, D = 2, 3, 40, 16
    joined = normal(B, T, 3, H, D)
    q, k, v = np.moveaxis(joined, (2, 3), (0, 2))
    g = normal(T, B, D, H).transpose(1, 3, 0, 2)  # its numbers are not side by side
    how = {"causal": True, "scale": 0.25}
    kernel, _ = bound("attention_grad", [g, q, k, v, normal(B, H, T, D), normal(B, H, T)], **how)
    assert kernel.contiguous[:4] == (True, False, False, False)
    plain = native_ones(*(np.ascontiguousarray(x) for x in (g, q, k, v)), **how)
    for a, b in zip(native_ones(g, q, k, v, **how), plain, strict=True):
        assert a.tobytes() == b.tobytes()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("which", range(4), ids=["g", "q", "k", "v"])
def test_what_is_not_seen_touches_nothing(which: int, bad: float) -> None:
    T, at = 50, 29
    given = operands((2,), T, T, 16, 16)
    how = {"causal": True, "scale": 0.25}
    plain = native_ones(*given, **how)
    given[which][0, at] = bad
    y, logs, dq, dk, dv = native_ones(*given, **how)
    own = which < 2  # a query's own row, else a key's, which all later queries see
    rows = np.arange(T) != at if own else np.arange(T) < at
    for got, want in ((y, plain[0]), (logs, plain[1]), (dq, plain[2])):
        np.testing.assert_allclose(got[0, rows], want[0, rows], rtol=1e-4, atol=1e-5)
        assert got[1].tobytes() == want[1].tobytes()  # the other head
    if own:  # later keys have no part in this query
        for got, want in ((dk, plain[3]), (dv, plain[4])):
            np.testing.assert_allclose(got[0, at + 1 :], want[0, at + 1 :], rtol=1e-4, atol=1e-5)
    touched = {0: dv, 1: y, 2: y, 3: y}[which]
    assert not np.isfinite(touched[0]).all()


def test_large_scores_do_not_overflow() -> None:
    given = operands((2,), 20, 20, 8, 8)
    given[1] *= 1000
    how = {"causal": True, "scale": 1.0}
    for got, right in zip(native_ones(*given, **how), reference(*given, p=0.0, **how), strict=True):
        close(got, right, 4000, max(1.0, float(np.abs(right).max())))


def test_everything_dropped() -> None:
    given = operands((2,), 20, 20, 8, 8)
    y, _, *gradients = native_ones(*given, p=1.0, causal=True, scale=0.3)
    assert not y.any()
    assert not any(x.any() for x in gradients)


def test_what_has_no_kernel() -> None:
    how = {"causal": True, "scale": 1.0}
    f32, f64 = (RNG.standard_normal((2, 3, 4)).astype(dtype) for dtype in (np.float32, np.float64))
    assert bound("attention", [f32] * 3, **how)[0] is not None
    assert bound("attention", [f64] * 3, **how)[0] is None
    assert bound("attention", [f32[:0]] * 3, **how)[0] is None
    long = np.zeros((1, 20000, 1), np.float32)  # a row of scores is too long for a thread's room
    assert bound("attention", [long] * 3, **how)[0] is None


def test_memory_grows_with_the_rows_alone() -> None:
    """Nothing of T times S: what is asked for is the size of the keys and the values."""
    x = np.zeros((4, 2048, 64), np.float32)
    how = {"causal": True, "scale": 1.0}
    assert bound("attention", [x] * 3, **how)[0].scratch_bytes == x.nbytes
    logs = np.zeros(x.shape[:-1], np.float32)
    assert bound("attention_grad", [*[x] * 5, logs], **how)[0].scratch_bytes == 2 * x.nbytes
