"""Losses: cross-entropy and its picking of classes, binary cross-entropy on logits, squared, absolute and Huber."""

from __future__ import annotations

import math
from typing import Any

from brim.autocast import as_one
from brim.errors import DTypeError, ShapeError
from brim.op import Op, composite, float_only, primitive
from brim.ops.arithmetic import abs as _abs
from brim.ops.arithmetic import astype, clip, log, maximum, promote_to_inexact, where
from brim.ops.exponential import exp, log1p
from brim.ops.movement import permute_dims, reshape
from brim.ops.reduce import max as _max
from brim.ops.reduce import mean as _mean
from brim.ops.reduce import sum as _sum
from brim.ops.softmax import log_softmax, softmax, widened
from brim.spec import Spec, default_float, is_float, is_integer

__all__ = ["bce_with_logits", "cross_entropy", "huber_loss", "l1_loss", "mse_loss", "nll_loss", "reduce_loss"]

# ------------------------------------------------------------------------------------------------ picking classes


def _pick_spec(x: Spec, index: Spec, *, ignore_index: int) -> Spec:
    if x.ndim != 2 or index.shape != x.shape[:1]:
        raise ShapeError(f"picking classes needs scores (N, C) and classes (N,), got {x.shape} and {index.shape}")
    if not is_integer(index.dtype):
        raise DTypeError(f"classes must be integers, got {index.dtype}; convert with astype('int64')")
    return Spec(index.shape, x.dtype)


def _put_spec(g: Spec, index: Spec, *, classes: int, ignore_index: int) -> Spec:
    return Spec((index.shape[0], classes), float_only("put_classes", g.dtype))


pick_classes: Op = primitive(
    "pick_classes",
    _pick_spec,
    vjp=lambda g, _x, index, _out, *, ignore_index: (
        put_classes(g, index, classes=_x.shape[1], ignore_index=ignore_index),
        None,
    ),
    arity=2,
    doc="x[n, index[n]] for every row n, and 0 where index[n] is ignore_index",
)
put_classes: Op = primitive(
    "put_classes",
    _put_spec,
    vjp=lambda g, _x, index, _out, *, classes, ignore_index: (
        pick_classes(g, index, ignore_index=ignore_index),
        None,
    ),
    arity=2,
    doc="rows of zeros with g[n] at index[n]: the gradient of pick_classes",
)

# ------------------------------------------------------------------------------------------------ cross-entropy


def reduce_loss(values: Any, reduction: str) -> Any:
    """The mean, the sum, or the values themselves ("none")."""
    if reduction == "mean":
        return _mean(values)
    if reduction == "sum":
        return _sum(values)
    if reduction == "none":
        return values
    raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")


def _class_last(x: Any) -> Any:
    """(N, C, d1, ...) as (N, d1, ..., C); (C,) stays."""
    return x if x.ndim < 3 else permute_dims(x, (0, *range(2, x.ndim), 1))


@composite("cross_entropy_grad")
def _rows_grad(
    g: Any, x: Any, index: Any, top: Any, total: Any, *, ignore_index: int, smoothing: float
) -> Any:  # fmt: skip
    """the gradient of cross_entropy: g (softmax(x) - q) for each row, with q the smoothed class"""
    # The sums are for kernels. Here they are made anew: differentiated again, they count as functions of x.
    kept = reshape(where(index != ignore_index, widened(g), 0.0), (-1, 1))
    classes = x.shape[1]
    hit = put_classes(kept.reshape((-1,)), index, classes=classes, ignore_index=ignore_index)
    spread = kept * (softmax(widened(x), axis=1) - smoothing / classes)
    return astype(spread - hit * (1.0 - smoothing), x.dtype)


def _rows_vjp(
    g: Any, x: Any, index: Any, _losses: Any, top: Any, total: Any, *, ignore_index: int, smoothing: float
) -> tuple[Any, None]:
    return _rows_grad(g, x, index, top, total, ignore_index=ignore_index, smoothing=smoothing), None


@composite("cross_entropy", vjp=_rows_vjp, outputs=3, aux=2)
def _rows(x: Any, index: Any, *, ignore_index: int, smoothing: float) -> tuple[Any, Any, Any]:
    """-sum_c q_c log_softmax(x)_c of each row, its largest score, and the log of its sum of e^(x - largest)"""
    wide = widened(x)
    top = _max(wide, axis=1, keepdims=True)
    z = wide - top
    total = log(_sum(exp(z), axis=1, keepdims=True))
    losses = -pick_classes(z - total, index, ignore_index=ignore_index)
    if smoothing:
        spread = where(index != ignore_index, _sum(total - z, axis=1), 0.0)
        losses = losses * (1.0 - smoothing) + spread * (smoothing / x.shape[1])
    return astype(losses, x.dtype), reshape(top, (-1,)), reshape(total, (-1,))


def _check_classes(scores: Any, target: Any, weight: Any) -> None:
    classes = scores.shape[1 if scores.ndim > 1 else 0]
    expected = scores.shape[:1] + scores.shape[2:] if scores.ndim > 1 else ()
    if target.shape != expected:
        raise ShapeError(
            f"scores of shape {scores.shape} need classes of shape {expected}, got {target.shape}; "
            "the second axis of the scores counts the classes"
        )
    if not is_integer(target.dtype):
        raise DTypeError(f"classes must be integers, got {target.dtype}; convert with astype('int64')")
    if weight is not None and weight.shape != (classes,):
        raise ShapeError(f"class weights must have shape ({classes},), got {weight.shape}")


def _losses_by_kernel(x: Any, target: Any, how: dict[str, Any]) -> Any:
    """The losses (N,) by a backend's kernel, which stores no log-probabilities; None where it has none."""
    classes, dtype = x.shape[1 if x.ndim > 1 else 0], x.dtype if is_float(x.dtype) else default_float
    specs = Spec((target.size, classes), dtype), Spec((target.size,), target.dtype)
    if x.size == 0 or not _rows.has_kernel(x.device, *specs, **how):
        return None
    rows = reshape(_class_last(promote_to_inexact(x)), (-1, classes))
    return _rows(rows, reshape(target, (-1,)), **how)[0]


def _losses(log_p: Any, target: Any, weight: Any, ignore_index: int, smoothing: float) -> tuple[Any, Any]:
    """The losses (N,), and what each counts in the mean."""
    classes = log_p.shape[1 if log_p.ndim > 1 else 0]
    rows = reshape(_class_last(log_p), (-1, classes))
    index = reshape(target, (-1,))
    losses = -pick_classes(rows, index, ignore_index=ignore_index)
    kept: Any
    if weight is None:
        kept = astype(index != ignore_index, rows.dtype)
    else:
        kept = pick_classes(weight.broadcast_to(rows.shape), index, ignore_index=ignore_index)
        losses = losses * kept
    if smoothing:
        spread = -_sum(rows if weight is None else rows * weight, axis=1)
        spread = where(index != ignore_index, spread, 0.0)
        losses = losses * (1.0 - smoothing) + spread * (smoothing / classes)
    return losses, kept


def _reduced(losses: Any, kept: Any, target: Any, reduction: str) -> Any:
    if reduction == "mean":
        return _sum(losses) / _sum(kept)
    return reduce_loss(reshape(losses, target.shape), reduction)


@as_one("nll_loss")
def nll_loss(log_p: Any, target: Any, weight: Any = None, *, ignore_index: int = -100, reduction: str = "mean") -> Any:
    """``-weight[target] * log_p[target]``; its mean is weighted by the class weights.

    Arguments:
        log_p: log-probabilities (N, C), (N, C, d1, ...) or (C,).
        target: classes, ints (N,), (N, d1, ...) or (); entries equal to ignore_index count for nothing.
        weight: (C,) or None.
        reduction: "mean", "sum" or "none".

    Raises:
        ShapeError, DTypeError: shapes or dtypes do not match.
        IndexError: a class outside [0, C); a GPU cannot tell, there the loss is NaN.
    """
    _check_classes(log_p, target, weight)
    losses, kept = _losses(log_p, target, weight, ignore_index, 0.0)
    return _reduced(losses, kept, target, reduction)


@as_one("cross_entropy")
def cross_entropy(
    x: Any,
    target: Any,
    weight: Any = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    """``-sum_c weight_c q_c log_softmax(x)_c``, where q is the target smoothed by ``label_smoothing``.

    Label smoothing: C. Szegedy et al., "Rethinking the Inception architecture", CVPR 2016.

    Arguments:
        x: scores (N, C), (N, C, d1, ...) or (C,).
        target: classes, ints (N,), (N, d1, ...) or (); or probabilities of the shape of x.
        weight: (C,) or None.
        ignore_index: a class that counts for nothing.
        reduction: "mean" (weighted by the class weights), "sum" or "none".
        label_smoothing: in [0, 1]: this share of q is spread evenly over the classes.
    """
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")
    if not (x.ndim == 0 or is_float(target.dtype)):
        _check_classes(x, target, weight)
        how = {"ignore_index": ignore_index, "smoothing": float(label_smoothing)}
        losses = _losses_by_kernel(x, target, how) if weight is None else None
        if losses is not None:
            kept = astype(reshape(target, (-1,)) != ignore_index, losses.dtype)
        else:
            log_p = log_softmax(x, axis=1 if x.ndim > 1 else 0)
            losses, kept = _losses(log_p, target, weight, ignore_index, label_smoothing)
        return _reduced(losses, kept, target, reduction)
    if target.shape != x.shape or x.ndim == 0:
        raise ShapeError(f"target probabilities must have the shape of the scores, {x.shape}, got {target.shape}")
    axis = 1 if x.ndim > 1 else 0
    classes = x.shape[axis]
    if label_smoothing:
        target = target * (1.0 - label_smoothing) + label_smoothing / classes
    if weight is not None:
        if weight.shape != (classes,):
            raise ShapeError(f"class weights must have shape ({classes},), got {weight.shape}")
        target = target * reshape(weight, (classes,) + (1,) * max(0, x.ndim - 2))
    return reduce_loss(-_sum(target * log_softmax(x, axis=axis), axis=axis), reduction)


# ------------------------------------------------------------------------------------------------ regression, binary


def _same_shape(name: str, x: Any, target: Any) -> tuple[Any, Any]:
    if x.shape != target.shape:
        raise ShapeError(f"{name} needs prediction and target of one shape, got {x.shape} and {target.shape}")
    return promote_to_inexact(x), promote_to_inexact(target)


@as_one("bce_with_logits")
def bce_with_logits(x: Any, target: Any, weight: Any = None, *, pos_weight: Any = None, reduction: str = "mean") -> Any:
    """``-(target log sigmoid(x) + (1 - target) log(1 - sigmoid(x)))``, computed without overflow.

    Arguments:
        x, target: of one shape; target in [0, 1].
        weight: factor that broadcasts against x, or None.
        pos_weight: factor of the first term (for rare positives), or None.
    """
    x, target = _same_shape("bce_with_logits", x, target)
    # log(1 + exp(-x)) = log1p(exp(-|x|)) + max(-x, 0)
    softplus = log1p(exp(-_abs(x))) + maximum(-x, 0.0)
    if pos_weight is None:
        values = (1.0 - target) * x + softplus
    else:
        values = (1.0 - target) * x + (1.0 + (pos_weight - 1.0) * target) * softplus
    return reduce_loss(values if weight is None else values * weight, reduction)


@as_one("mse_loss")
def mse_loss(x: Any, target: Any, *, reduction: str = "mean") -> Any:
    """``(x - target)^2``."""
    x, target = _same_shape("mse_loss", x, target)
    d = x - target
    return reduce_loss(d * d, reduction)


@as_one("l1_loss")
def l1_loss(x: Any, target: Any, *, reduction: str = "mean") -> Any:
    """``|x - target|``."""
    x, target = _same_shape("l1_loss", x, target)
    return reduce_loss(_abs(x - target), reduction)


@as_one("huber_loss")
def huber_loss(x: Any, target: Any, *, delta: float = 1.0, reduction: str = "mean") -> Any:
    """``d^2 / 2`` where ``|d| <= delta`` (d = x - target), else ``delta (|d| - delta / 2)``.

    Source: P. J. Huber, "Robust estimation of a location parameter", Ann. Math. Statist. 35 (1964).
    """
    if not (delta > 0.0 and math.isfinite(delta)):
        raise ValueError(f"delta must be positive, got {delta}")
    x, target = _same_shape("huber_loss", x, target)
    d = x - target
    inner = clip(d, -delta, delta)  # the gradient of the loss
    return reduce_loss(inner * (d - 0.5 * inner), reduction)
