"""Rows of the table for the update rules of optimizers, against the formulas written out in NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np

from brim.check.table import In, Row
from brim.ops import update_rules as rules
from brim.ops.together import all_finite, squares_sum

P = In((5, 7))
MEAN = In((5, 7), 0.1, 0.5)
FLOAT = ("float32", "float64")


def _sgd(p: Any, g: Any) -> Any:
    return p - 0.1 * (g + 0.01 * p)


def _momentum(p: Any, g: Any, v: Any, *, nesterov: bool) -> Any:
    d = -g + 0.01 * p
    v = 0.9 * v + 0.8 * d
    return p - 0.1 * (d + 0.9 * v if nesterov else v), v


def _adam(p: Any, g: Any, m: Any, v: Any, *, decoupled: bool) -> Any:
    d = g if decoupled else g + 0.01 * p
    m, v = 0.9 * m + 0.1 * d, 0.99 * v + 0.01 * d * d
    start = p * (1 - 0.1 * 0.01) if decoupled else p
    return start - 0.1 / 0.5 * m / (np.sqrt(v) / 0.7 + 1e-3), m, v


def _amsgrad(p: Any, g: Any, m: Any, v: Any, top: Any) -> Any:
    d = g + 0.01 * p
    m, v = 0.9 * m + 0.1 * d, 0.99 * v + 0.01 * d * d
    top = np.maximum(top, v)
    return p - 0.1 / 0.5 * m / (np.sqrt(top) / 0.7 + 1e-3), m, v, top


def _rmsprop(p: Any, g: Any, s: Any, u: Any) -> Any:
    d = g + 0.01 * p
    s = 0.9 * s + 0.1 * d * d
    u = 0.8 * u + d / (np.sqrt(s) + 1e-3)
    return p - 0.1 * u, s, u


def _rmsprop_plain(p: Any, g: Any, s: Any) -> Any:
    out, s, _ = _rmsprop(p, g, s, np.zeros_like(p))
    return out, s


def _rmsprop_centered(p: Any, g: Any, s: Any, a: Any, u: Any) -> Any:
    d = g + 0.01 * p
    s = 0.9 * s + 0.1 * d * d
    a = 0.9 * a + 0.1 * d
    u = 0.8 * u + d / (np.sqrt(s - a * a) + 1e-3)
    return p - 0.1 * u, s, a, u


def _squares(*xs: Any) -> Any:
    return sum((np.abs(x) ** 2).sum() for x in xs)


def _all_finite(factor: Any, *xs: Any) -> Any:
    return all(np.isfinite(factor * x).all() for x in xs)


def _infinite(at: tuple[int, ...]) -> Any:
    """Numbers with one that is too large at a place."""

    def values(rng: np.random.Generator) -> Any:
        array = rng.uniform(-2.0, 2.0, (4, 6))
        array[at] = np.inf
        return array

    return values


_ADAM = (0.1, 0.9, 0.99, 1e-3, 0.01, 0.5, 0.7)
_NOTE = "updates are not differentiated"
_GRADS = (In((5, 7)), In((3,)), In((1,)), In((2, 3, 4)), In(()))

ROWS = [
    Row("squares_sum", _GRADS, _squares, dtypes=("float32", "float64", "float16", "bfloat16", "complex64"),
        tolerance={"float16": (2e-5, 2e-5), "bfloat16": (2e-5, 2e-5)}),
    Row("squares_sum with nothing in some", (In((0,)), In((2, 0)), In((3, 70))), _squares, covers=("squares_sum",),
        call=lambda *xs: squares_sum(*xs), dtypes=FLOAT),
    Row("all_finite", (In((), 0.5, 1.0), *_GRADS), _all_finite, dtypes=FLOAT, grad=False),
    Row("all_finite not", (In((), 0.5, 1.0), P, In((4, 6), values=_infinite((3, 5))), P), _all_finite,
        call=lambda factor, *xs: all_finite(factor, *xs), covers=("all_finite",), dtypes=FLOAT, grad=False),
    Row("sgd_update", (P, P), _sgd, call=lambda p, g: rules.sgd_update(p, g, 0.1, 0.01, maximize=False),
        covers=("sgd_update",), dtypes=FLOAT, grad=False, note=_NOTE),
    *(
        Row(f"sgd_momentum_update nesterov={nesterov}", (P, P, P),
            lambda p, g, v, nesterov=nesterov: _momentum(p, g, v, nesterov=nesterov),
            call=lambda p, g, v, nesterov=nesterov: rules.sgd_momentum_update(
                p, g, v, 0.1, 0.9, 0.2, 0.01, nesterov=nesterov, maximize=True),
            covers=("sgd_momentum_update",), dtypes=FLOAT, grad=False, note=_NOTE)
        for nesterov in (False, True)
    ),
    *(
        Row(f"adam_update decoupled={decoupled}", (P, P, P, MEAN),
            lambda p, g, m, v, decoupled=decoupled: _adam(p, g, m, v, decoupled=decoupled),
            call=lambda p, g, m, v, decoupled=decoupled: rules.adam_update(
                p, g, m, v, *_ADAM, decoupled=decoupled, maximize=False),
            covers=("adam_update",), dtypes=FLOAT, grad=False, note=_NOTE)
        for decoupled in (False, True)
    ),
    Row("amsgrad_update", (P, P, P, MEAN, MEAN), _amsgrad,
        call=lambda p, g, m, v, top: rules.amsgrad_update(p, g, m, v, top, *_ADAM, decoupled=False, maximize=False),
        covers=("amsgrad_update",), dtypes=FLOAT, grad=False, note=_NOTE),
    Row("rmsprop_update", (P, P, MEAN, P), _rmsprop,
        call=lambda p, g, s, u: rules.rmsprop_update(p, g, s, u, 0.1, 0.9, 1e-3, 0.01, 0.8, maximize=False),
        covers=("rmsprop_update",), dtypes=FLOAT, grad=False, note=_NOTE),
    Row("rmsprop_plain_update", (P, P, MEAN), _rmsprop_plain,
        call=lambda p, g, s: rules.rmsprop_plain_update(p, g, s, 0.1, 0.9, 1e-3, 0.01, maximize=False),
        covers=("rmsprop_plain_update",), dtypes=FLOAT, grad=False, note=_NOTE),
    Row("rmsprop_centered_update", (P, P, In((5, 7), 1.0, 2.0), In((5, 7), -0.3, 0.3), P), _rmsprop_centered,
        call=lambda p, g, s, a, u: rules.rmsprop_centered_update(
            p, g, s, a, u, 0.1, 0.9, 1e-3, 0.01, 0.8, maximize=False),
        covers=("rmsprop_centered_update",), dtypes=FLOAT, grad=False, note=_NOTE),
]  # fmt: skip
