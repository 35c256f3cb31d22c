"""Rows of composites that are reached from others: gradients that are composites of their own, and cross-entropy."""

from __future__ import annotations

from typing import Any

import numpy as np

from brim import ops
from brim.check.table import Bad, In, Row
from brim.errors import DTypeError, ShapeError
from brim.op import REGISTRY
from brim.ops.softmax import widened

LOOSE = {"float16": (2e-2, 2e-2), "bfloat16": (1e-1, 1e-1), "float32": (1e-4, 1e-4)}
LABELS = np.array([2, 0, -100, 3, 3])


def _softmax(x: Any, axis: int) -> Any:
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def _triangle(x: Any) -> Any:
    return np.tril(np.ones(x.shape[-2:], bool))


def _causal(x: Any, *, scale: float) -> Any:
    return _softmax(np.where(_triangle(x), x * scale, -np.inf), -1)


def _causal_grad(g: Any, out: Any, *, scale: float) -> Any:
    seen, out = np.where(_triangle(g), (g, out), 0.0)
    return scale * out * (seen - (seen * out).sum(-1, keepdims=True))


def _attention_scores(q: Any, k: Any, causal: bool, scale: float) -> Any:
    scores = q @ np.swapaxes(k, -1, -2) * scale
    return np.where(_triangle(scores), scores, -np.inf) if causal else scores


def _attention(q: Any, k: Any, v: Any, *, causal: bool, scale: float) -> Any:
    scores = _attention_scores(q, k, causal, scale)
    return _softmax(scores, -1) @ v, np.log(np.exp(scores).sum(-1))


def _attention_grad(g: Any, q: Any, k: Any, v: Any, *, causal: bool, scale: float) -> Any:
    weights = _softmax(_attention_scores(q, k, causal, scale), -1)
    slopes = g @ np.swapaxes(v, -1, -2)
    slopes = weights * (slopes - (weights * slopes).sum(-1, keepdims=True)) * scale
    return slopes @ k, np.swapaxes(slopes, -1, -2) @ q, np.swapaxes(weights, -1, -2) @ g


def _with_result(g: Any, q: Any, k: Any, v: Any, **how: Any) -> Any:
    """The gradients, from what the forward pass gives: the kernel relies on it."""
    return REGISTRY["attention_grad"](g, q, k, v, *REGISTRY["attention"](q, k, v, **how), **how)


def _kept(shape: tuple[int, ...], p: float) -> Any:
    """Which weights brim's dropout keeps under seed 7 and counter 3, divided by 1 - p."""
    draws = np.random.Generator(np.random.Philox(counter=[0, 0, 3, 0], key=[7, 0]))
    return (draws.random(shape, dtype=np.float32) >= np.float32(p)) / (1.0 - p)


def _attention_dropout(q: Any, k: Any, v: Any, *, causal: bool, scale: float, p: float) -> Any:
    scores = _attention_scores(q, k, causal, scale)
    return (_softmax(scores, -1) * _kept(scores.shape, p)) @ v, np.log(np.exp(scores).sum(-1))


def _attention_dropout_grad(g: Any, q: Any, k: Any, v: Any, *, causal: bool, scale: float, p: float) -> Any:
    weights = _softmax(_attention_scores(q, k, causal, scale), -1)
    kept = _kept(weights.shape, p)
    slopes = kept * (g @ np.swapaxes(v, -1, -2))
    slopes = weights * (slopes - (weights * slopes).sum(-1, keepdims=True)) * scale
    return slopes @ k, np.swapaxes(slopes, -1, -2) @ q, np.swapaxes(weights * kept, -1, -2) @ g


def _dropped(q: Any, k: Any, v: Any, **how: Any) -> Any:
    return REGISTRY["attention_dropout"](q, k, v, 7, 3, **how)


def _dropped_with_result(g: Any, q: Any, k: Any, v: Any, **how: Any) -> Any:
    return REGISTRY["attention_dropout_grad"](g, q, k, v, *_dropped(q, k, v, **how), 7, 3, **how)


def _targets(x: Any, index: Any, ignore_index: int, smoothing: float) -> Any:
    """(N, C): what the classes are to have, 0 in rows that are ignored."""
    hit = np.arange(x.shape[1]) == index[:, None]
    spread = (1.0 - smoothing) * hit + smoothing / x.shape[1]
    return np.where((index == ignore_index)[:, None], 0.0, spread)


def _losses(x: Any, index: Any, *, ignore_index: int, smoothing: float) -> Any:
    top = x.max(1)
    total = np.log(np.exp(x - top[:, None]).sum(1))
    log_p = x - top[:, None] - total[:, None]
    return -(_targets(x, index, ignore_index, smoothing) * log_p).sum(1), top, total


def _losses_grad(g: Any, x: Any, index: Any, *, ignore_index: int, smoothing: float) -> Any:
    q = _targets(x, index, ignore_index, smoothing)
    return g[:, None] * np.where((index == ignore_index)[:, None], 0.0, _softmax(x, 1) - q)


def _with_sums(g: Any, x: Any, index: Any, **how: Any) -> Any:
    """The gradient, from the sums that the forward kernel gives: its kernel relies on them."""
    _, top, total = REGISTRY["cross_entropy"](x, index, **how)
    return REGISTRY["cross_entropy_grad"](g, x, index, top, total, **how)


def _with_wide_statistics(name: str) -> Any:
    """A norm's gradient from statistics in the dtype that they have: float32 for half-width floats."""
    return lambda g, x, w, mean, var, **how: REGISTRY[name](g, x, w, widened(mean), widened(var), **how)


def _norm_grads(g: Any, x: Any, w: Any, mean: Any, var: Any, axes: Any, batch: Any, eps: float) -> Any:
    rstd = 1 / np.sqrt(var + eps)
    normal = (x - mean) * rstd
    scaled = g * w
    level, slope = scaled.mean(axes, keepdims=True), (scaled * normal).mean(axes, keepdims=True)
    return (scaled - level - normal * slope) * rstd, (g * normal).sum(batch), g.sum(batch)


_labels = In((5,), dtype="int64", values=lambda rng: LABELS)
_statistics = In((4, 1, 1)), In((4, 1, 1), 0.5, 2.0)
_channels = In((1, 3, 1)), In((1, 3, 1), 0.5, 2.0)
_HOW = {"ignore_index": -100, "smoothing": 0.1}
_BIG = In((1024, 1024))
_MANY = In((4096,), 0, 255, "int64")
_CAUSAL, _ALL = {"causal": True, "scale": 0.4}, {"causal": False, "scale": 0.4}
_HEADS = In((2, 4, 256, 64), -1.0, 1.0)

ROWS = [
    Row(
        "softmax_grad",
        (In((3, 4)), In((3, 4), 0.0, 1.0)),
        lambda g, out, *, axis: out * (g - (g * out).sum(axis, keepdims=True)),
        {"axis": 1},
        tolerance=LOOSE,
        big=(_BIG, _BIG),
    ),
    Row(
        "log_softmax_grad",
        (In((3, 4)), In((3, 4), -3.0, 0.0)),
        lambda g, out, *, axis: g - np.exp(out) * g.sum(axis, keepdims=True),
        {"axis": 0},
        tolerance=LOOSE,
        big=(_BIG, _BIG),
    ),
    Row(
        "logsumexp_grad",
        (In((3, 1)), In((3, 4)), In((3, 1), 1.0, 3.0)),
        lambda g, x, out, *, axes: g * np.exp(x - out),
        {"axes": (1,)},
        tolerance=LOOSE,
        big=(In((1024, 1)), _BIG, In((1024, 1), 1.0, 3.0)),
    ),
    Row(
        "causal_softmax",
        (In((2, 4, 4)),),
        _causal,
        {"scale": 0.5},
        call=ops.causal_softmax,
        covers=("causal_softmax",),
        torch=lambda t, x: (x * 0.5).masked_fill(t.ones(4, 4).triu(1).bool(), -np.inf).softmax(-1),
        big=(_BIG,),
        bad=(Bad((In((4,)),), ShapeError),),
    ),
    Row(
        "causal_softmax_grad",
        (In((2, 4, 3)), In((2, 4, 3), 0.0, 1.0)),
        _causal_grad,
        {"scale": 0.5},
        tolerance=LOOSE,
        big=(_BIG, _BIG),
    ),
    *(
        Row(
            "attention",
            (In((2, 3, 4)), In((2, keys, 4)), In((2, keys, 5))),
            _attention,
            how,
            tolerance=LOOSE,
            torch=lambda t, q, k, v, how=how: t.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=how["causal"], scale=how["scale"]
            ),
            big=(_HEADS,) * 3,
            bad=(
                Bad((In((2, 3, 4)), In((2, 5, 3)), In((2, 5, 4))), ShapeError, how),
                Bad((In((2, 3, 4)), In((2, 5, 4)), In((2, 4, 4))), ShapeError, how),
            ),
        )
        for keys, how in ((3, _CAUSAL), (5, _ALL))
    ),
    *(
        Row(
            "attention_grad",
            (In((2, 6, 5)), In((2, 6, 4)), In((2, keys, 4)), In((2, keys, 5))),
            _attention_grad,
            how,
            call=_with_result,
            covers=("attention_grad",),
            tolerance=LOOSE,
            big=(_HEADS,) * 4,
        )
        for keys, how in ((3, _CAUSAL), (5, _ALL))
    ),
    *(
        Row(
            "attention_dropout",
            (In((2, 3, 4)), In((2, keys, 4)), In((2, keys, 5))),
            _attention_dropout,
            {**how, "p": 0.3},
            call=_dropped,
            covers=("attention_dropout",),
            tolerance=LOOSE,
            big=(_HEADS,) * 3,
        )
        for keys, how in ((3, _CAUSAL), (5, _ALL))
    ),
    *(
        Row(
            "attention_dropout_grad",
            (In((2, 6, 5)), In((2, 6, 4)), In((2, keys, 4)), In((2, keys, 5))),
            _attention_dropout_grad,
            {**how, "p": 0.3},
            call=_dropped_with_result,
            covers=("attention_dropout_grad",),
            tolerance=LOOSE,
            big=(_HEADS,) * 4,
        )
        for keys, how in ((3, _CAUSAL), (5, _ALL))
    ),
    Row("cross_entropy", (In((5, 4)), _labels), _losses, _HOW, tolerance=LOOSE, big=(In((4096, 256)), _MANY)),
    Row(
        "cross_entropy_grad",
        (In((5,)), In((5, 4)), _labels),
        _losses_grad,
        _HOW,
        call=_with_sums,
        covers=("cross_entropy_grad",),
        tolerance=LOOSE,
        big=(In((4096,)), In((4096, 256)), _MANY),
    ),
    Row(
        "cross_entropy of images",
        (In((2, 4, 3)), In((2, 3), 0, 3, "int64")),
        lambda x, t: -np.take_along_axis(np.log(_softmax(x, 1)), t[:, None], 1).mean(),
        call=ops.cross_entropy,
        covers=("cross_entropy",),
        tolerance=LOOSE,
        torch="torch.nn.functional.cross_entropy",
        bad=(
            Bad((In((2, 4, 3)), In((2, 4), 0, 3, "int64")), ShapeError),
            Bad((In((2, 4)), In((2,), dtype="bool")), DTypeError),
        ),
    ),
    Row(
        "layer_norm_grad",
        (In((4, 3, 5)), In((4, 3, 5)), In((3, 5)), *_statistics),
        lambda g, x, w, mean, var, *, ndim, eps: _norm_grads(g, x, w, mean, var, (1, 2), (0,), eps),
        {"ndim": 2, "eps": 1e-3},
        call=_with_wide_statistics("layer_norm_grad"),
        covers=("layer_norm_grad",),
        tolerance=LOOSE,
        big=(
            In((64, 32, 512)), In((64, 32, 512)), In((32, 512)),
            In((64, 1, 1)), In((64, 1, 1), 0.5, 2.0),
        ),
    ),
    Row(
        "batch_norm_grad",
        (In((4, 3, 5)), In((4, 3, 5)), In((3,)), *_channels),
        lambda g, x, w, mean, var, *, eps: _norm_grads(g, x, w[:, None], mean, var, (0, 2), (0, 2), eps),
        {"eps": 1e-3},
        call=_with_wide_statistics("batch_norm_grad"),
        covers=("batch_norm_grad",),
        tolerance=LOOSE,
        big=(
            In((64, 32, 512)), In((64, 32, 512)), In((32,)),
            In((1, 32, 1)), In((1, 32, 1), 0.5, 2.0),
        ),
    ),
]  # fmt: skip
