"""Losses: cross-entropy and its picking of classes, binary cross-entropy on logits, squared, absolute and Huber."""

from __future__ import annotations

import math
from typing import Any

from brim.errors import DTypeError, ShapeError
from brim.op import Op, float_only, primitive
from brim.ops.arithmetic import abs as _abs
from brim.ops.arithmetic import astype, clip, maximum, promote_to_inexact, where
from brim.ops.exponential import exp, log1p
from brim.ops.movement import permute_dims, reshape
from brim.ops.reduce import mean as _mean
from brim.ops.reduce import sum as _sum
from brim.ops.softmax import log_softmax
from brim.spec import Spec, is_float, is_integer

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


def _smoothed(log_p: Any, target: Any, weight: Any, ignore_index: int, reduction: str, smoothing: float) -> Any:
    classes = log_p.shape[1 if log_p.ndim > 1 else 0]
    expected = log_p.shape[:1] + log_p.shape[2:] if log_p.ndim > 1 else ()
    if target.shape != expected:
        raise ShapeError(
            f"scores of shape {log_p.shape} need classes of shape {expected}, got {target.shape}; "
            "the second axis of the scores counts the classes"
        )
    if not is_integer(target.dtype):
        raise DTypeError(f"classes must be integers, got {target.dtype}; convert with astype('int64')")
    if weight is not None and weight.shape != (classes,):
        raise ShapeError(f"class weights must have shape ({classes},), got {weight.shape}")
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
    if reduction == "mean":
        return _sum(losses) / _sum(kept)
    return reduce_loss(reshape(losses, target.shape), reduction)


def nll_loss(log_p: Any, target: Any, weight: Any = None, *, ignore_index: int = -100, reduction: str = "mean") -> Any:
    """``-weight[target] * log_p[target]``; its mean is weighted by the class weights.

    Arguments:
        log_p: log-probabilities (N, C), (N, C, d1, ...) or (C,).
        target: classes, ints (N,), (N, d1, ...) or (); entries equal to ignore_index count for nothing.
        weight: (C,) or None.
        reduction: "mean", "sum" or "none".

    Raises:
        ShapeError, DTypeError: shapes or dtypes do not match.
        IndexError: a class outside [0, C).
    """
    return _smoothed(log_p, target, weight, ignore_index, reduction, 0.0)


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
        log_p = log_softmax(x, axis=1 if x.ndim > 1 else 0)
        return _smoothed(log_p, target, weight, ignore_index, reduction, label_smoothing)
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


def mse_loss(x: Any, target: Any, *, reduction: str = "mean") -> Any:
    """``(x - target)^2``."""
    x, target = _same_shape("mse_loss", x, target)
    d = x - target
    return reduce_loss(d * d, reduction)


def l1_loss(x: Any, target: Any, *, reduction: str = "mean") -> Any:
    """``|x - target|``."""
    x, target = _same_shape("l1_loss", x, target)
    return reduce_loss(_abs(x - target), reduction)


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
