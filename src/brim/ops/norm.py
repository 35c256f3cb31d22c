"""Batch and layer normalisation: zero mean and unit variance over some axes, then a learned scale and shift.

Each has a composite for all three gradients together, which a backend may have a kernel for: two passes over memory
give all of them. Where it has none, or only some gradients exist, they are computed apart, and only those wanted.
"""

from __future__ import annotations

from typing import Any

from brim.autocast import as_one
from brim.errors import ShapeError
from brim.op import Op, composite
from brim.ops.arithmetic import astype, rsqrt
from brim.ops.movement import reshape
from brim.ops.reduce import mean as _mean
from brim.ops.reduce import sum as _sum
from brim.ops.softmax import widened

__all__ = ["batch_norm", "batch_norm_inference", "layer_norm"]


def _normalize(x: Any, weight: Any, bias: Any, axes: tuple[int, ...], eps: float) -> tuple[Any, Any, Any]:
    wide = widened(x)
    mean = _mean(wide, axis=axes, keepdims=True)
    centred = wide - mean
    var = _mean(centred * centred, axis=axes, keepdims=True)
    out = centred * rsqrt(var + eps) * weight + bias
    return astype(out, x.dtype), mean, var


def _normalize_grad(
    grads: tuple[Any, Any, Any], x: Any, weight: Any, mean: Any, var: Any, axes: tuple[int, ...], eps: float
) -> tuple[Any, Any, Any]:
    """Gradients of x (exact, with mean and var as functions of x), and of weight and bias before summing."""
    g, g_mean, g_var = grads
    centred = widened(x) - mean
    rstd = rsqrt(var + eps)
    count = 1
    for axis in axes:
        count *= x.shape[axis]
    normal = centred * rstd

    def of_x() -> Any:
        total = None
        if g is not None:
            scaled = g * weight
            spread = _mean(scaled, axis=axes, keepdims=True) + normal * _mean(scaled * normal, axis=axes, keepdims=True)
            total = (scaled - spread) * rstd
        if g_mean is not None:
            part = (g_mean * (1.0 / count)).broadcast_to(x.shape)
            total = part if total is None else total + part
        if g_var is not None:
            part = g_var * centred * (2.0 / count)
            total = part if total is None else total + part
        return total

    return of_x, lambda: None if g is None else g * normal, lambda: g


def _together(gradients: Op, params: dict[str, Any], g: Any, *operands: Any) -> tuple[Any, Any, Any] | None:
    """The three entries from one call of a composite, made when the first is wanted; None where it has no kernel."""
    if g is None or not gradients.has_kernel(g.device, g, *operands, **params):
        return None
    found: list[Any] = []

    def entry(n: int) -> Any:
        if not found:
            found.extend(gradients(g, *operands, **params))
        return found[n]

    return lambda: entry(0), lambda: entry(1), lambda: entry(2)


def _like_weight(total: Any, weight: Any) -> Any:
    """A sum over the batch in the dtype of the weight; as it is where the weight is a number."""
    return astype(total, weight.dtype) if hasattr(weight, "shape") else total


def _channel_axes(ndim: int) -> tuple[int, ...]:
    return (0, *range(2, ndim))


def _per_channel(v: Any, ndim: int) -> Any:
    """A vector of C values shaped to broadcast against (N, C, ...); a Python number stays as it is."""
    return reshape(v, (1, -1) + (1,) * (ndim - 2)) if hasattr(v, "shape") else v


def _batch_norm_grad(
    g: Any, g_mean: Any, g_var: Any, x: Any, weight: Any, _bias: Any, _out: Any, mean: Any, var: Any, *, eps: float
) -> tuple[Any, Any, Any]:
    axes = _channel_axes(x.ndim)
    if g_mean is None and g_var is None:
        together = _together(_batch_norm_grads, {"eps": eps}, g, x, weight, mean, var)
        if together is not None:
            return together
    scale = _per_channel(weight, x.ndim)
    of_x, of_weight, of_bias = _normalize_grad((g, g_mean, g_var), x, scale, mean, var, axes, eps)

    def summed(fn: Any) -> Any:
        return lambda: None if g is None else _sum(fn(), axis=axes)

    return of_x, summed(of_weight), summed(of_bias)


@composite("batch_norm_grad", outputs=3)
def _batch_norm_grads(g: Any, x: Any, weight: Any, mean: Any, var: Any, *, eps: float) -> tuple[Any, Any, Any]:
    """gradients of batch_norm's input, weight and bias, when mean and variance go nowhere else"""
    axes, scale = _channel_axes(x.ndim), _per_channel(weight, x.ndim)
    of_x, of_weight, of_bias = _normalize_grad((g, None, None), x, scale, mean, var, axes, eps)
    sums = (_like_weight(_sum(widened(part), axis=axes), weight) for part in (of_weight(), of_bias()))
    return (astype(of_x(), x.dtype), *sums)


@composite("batch_norm", vjp=_batch_norm_grad, outputs=3)
def _batch_norm(x: Any, weight: Any, bias: Any, *, eps: float) -> tuple[Any, Any, Any]:
    """normalised over all axes but the second, times weight plus bias; also mean and biased variance"""
    return _normalize(x, _per_channel(weight, x.ndim), _per_channel(bias, x.ndim), _channel_axes(x.ndim), eps)


def _check_channels(x: Any, vectors: tuple[Any, ...]) -> None:
    if x.ndim < 2:
        raise ShapeError(f"batch_norm needs input (N, C, ...), got shape {x.shape}")
    for v in vectors:
        if hasattr(v, "shape") and v.shape != (x.shape[1],):
            raise ShapeError(f"batch_norm of input {x.shape} needs vectors of shape ({x.shape[1]},), got {v.shape}")


def batch_norm(x: Any, weight: Any = None, bias: Any = None, *, eps: float = 1e-5) -> tuple[Any, Any, Any]:
    """``(x - mean) / sqrt(var + eps) * weight + bias`` with mean and biased variance of this batch, per channel.

    Source: S. Ioffe and C. Szegedy, "Batch normalization", ICML 2015.

    Arguments:
        x: (N, C) or (N, C, ...).
        weight, bias: (C,), or None for 1 and 0.

    Returns:
        The result, and mean and biased variance of shape (1, C, 1, ...) (float32 for half-width input).

    Raises:
        ShapeError: shapes do not match, or there is only one value per channel (its variance says nothing).
    """
    _check_channels(x, (weight, bias))
    if x.size == x.shape[1]:
        raise ShapeError(
            f"batch_norm in training needs more than one value per channel, got input of shape {x.shape}; "
            "use a larger batch (drop_last=True in the loader), or eval()"
        )
    return _batch_norm(x, 1.0 if weight is None else weight, 0.0 if bias is None else bias, eps=float(eps))


@as_one("batch_norm_inference")
def batch_norm_inference(
    x: Any, mean: Any, var: Any, weight: Any = None, bias: Any = None, *, eps: float = 1e-5
) -> Any:
    """``(x - mean) / sqrt(var + eps) * weight + bias`` with given statistics, one multiply and one add an element.

    Arguments:
        x: (N, C) or (N, C, ...).
        mean, var, weight, bias: (C,); weight and bias may be None for 1 and 0.
    """
    _check_channels(x, (mean, var, weight, bias))
    scale = rsqrt(var + eps)
    if weight is not None:
        scale = scale * weight
    shift = -(mean * scale) if bias is None else bias - mean * scale
    return astype(x * _per_channel(scale, x.ndim) + _per_channel(shift, x.ndim), x.dtype)


def _layer_norm_grad(
    g: Any, g_mean: Any, g_var: Any, x: Any, weight: Any, _bias: Any, _out: Any, mean: Any, var: Any,
    *, ndim: int, eps: float,
) -> tuple[Any, Any, Any]:  # fmt: skip
    axes = tuple(range(x.ndim - ndim, x.ndim))
    if g_mean is None and g_var is None:
        together = _together(_layer_norm_grads, {"ndim": ndim, "eps": eps}, g, x, weight, mean, var)
        if together is not None:
            return together
    return _normalize_grad((g, g_mean, g_var), x, weight, mean, var, axes, eps)


@composite("layer_norm_grad", outputs=3)
def _layer_norm_grads(
    g: Any, x: Any, weight: Any, mean: Any, var: Any, *, ndim: int, eps: float
) -> tuple[Any, Any, Any]:
    """gradients of layer_norm's input, weight and bias, when mean and variance go nowhere else"""
    axes = tuple(range(x.ndim - ndim, x.ndim))
    of_x, of_weight, of_bias = _normalize_grad((g, None, None), x, weight, mean, var, axes, eps)
    batch = tuple(range(x.ndim - ndim))
    sums = (_like_weight(_sum(widened(part), axis=batch), weight) for part in (of_weight(), of_bias()))
    return (astype(of_x(), x.dtype), *sums)


@composite("layer_norm", vjp=_layer_norm_grad, outputs=3)
def _layer_norm(x: Any, weight: Any, bias: Any, *, ndim: int, eps: float) -> tuple[Any, Any, Any]:
    """normalised over the last ndim axes, times weight plus bias; also mean and biased variance"""
    return _normalize(x, weight, bias, tuple(range(x.ndim - ndim, x.ndim)), eps)


def layer_norm(
    x: Any, normalized_shape: tuple[int, ...], weight: Any = None, bias: Any = None, *, eps: float = 1e-5
) -> Any:
    """``(x - mean) / sqrt(var + eps) * weight + bias`` over the last axes of each element of the batch.

    Source: J. L. Ba, J. R. Kiros and G. E. Hinton, "Layer normalization", arXiv:1607.06450.

    Arguments:
        x: (..., *normalized_shape).
        weight, bias: normalized_shape, or None for 1 and 0.

    Raises:
        ShapeError: the last axes of x are not normalized_shape.
    """
    shape = tuple(normalized_shape)
    if not shape or x.shape[-len(shape) :] != shape:
        raise ShapeError(f"layer_norm over {shape} needs input (..., {', '.join(map(str, shape))}), got {x.shape}")
    for v in (weight, bias):
        if v is not None and v.shape != shape:
            raise ShapeError(f"layer_norm over {shape} needs weight and bias of that shape, got {v.shape}")
    w, b = 1.0 if weight is None else weight, 0.0 if bias is None else bias
    return _layer_norm(x, w, b, ndim=len(shape), eps=float(eps))[0]
