"""The layers as functions of their inputs and weights. Argument names follow PyTorch's functional interface."""

from __future__ import annotations

import math
from typing import Any

from brim import ops, random
from brim.autocast import as_one
from brim.errors import ShapeError
from brim.ops.loss import cross_entropy, huber_loss, l1_loss, mse_loss, nll_loss
from brim.ops.pool import avg_pool2d, max_pool2d
from brim.spec import normalize_axis

__all__ = [
    "avg_pool2d",
    "batch_norm",
    "binary_cross_entropy_with_logits",
    "conv2d",
    "cross_entropy",
    "dropout",
    "embedding",
    "flatten",
    "gelu",
    "huber_loss",
    "l1_loss",
    "layer_norm",
    "leaky_relu",
    "linear",
    "log_softmax",
    "max_pool2d",
    "mse_loss",
    "nll_loss",
    "relu",
    "scaled_dot_product_attention",
    "sigmoid",
    "silu",
    "softmax",
    "tanh",
]


@as_one("linear")
def linear(x: Any, weight: Any, bias: Any = None) -> Any:
    """``x @ weight.T + bias``: x (..., in), weight (out, in), bias (out,) or None."""
    if x.ndim == 0 or x.shape[-1] != weight.shape[1]:
        raise ShapeError(
            f"linear with weight {weight.shape} (out, in) needs input (..., {weight.shape[1]}), got {x.shape}"
        )
    out = ops.matmul(x, ops.permute_dims(weight, (1, 0)))
    return out if bias is None else out + bias


def flatten(x: Any, start_dim: int = 0, end_dim: int = -1) -> Any:
    """The axes from start_dim to end_dim made one (a view where possible)."""
    if x.ndim == 0:
        return ops.reshape(x, (1,))
    first, last = normalize_axis(start_dim, x.ndim), normalize_axis(end_dim, x.ndim)
    if first > last:
        raise ShapeError(f"flatten needs start_dim <= end_dim, got {start_dim} and {end_dim} for shape {x.shape}")
    return ops.reshape(x, (*x.shape[:first], math.prod(x.shape[first : last + 1]), *x.shape[last + 1 :]))


def relu(x: Any) -> Any:
    """``max(x, 0)``."""
    return ops.relu(x)


def leaky_relu(x: Any, negative_slope: float = 0.01) -> Any:
    """``x`` where positive, else ``negative_slope * x``."""
    return ops.leaky_relu(x, negative_slope)


def gelu(x: Any, approximate: str = "none") -> Any:
    """``x Phi(x)``, exact ("none") or by the formula with tanh ("tanh")."""
    if approximate not in ("none", "tanh"):
        raise ValueError(f"approximate must be 'none' or 'tanh', got {approximate!r}")
    return ops.gelu(x) if approximate == "none" else ops.gelu_tanh(x)


def silu(x: Any) -> Any:
    """``x sigmoid(x)``."""
    return ops.silu(x)


def tanh(x: Any) -> Any:
    """``tanh(x)``."""
    return ops.tanh(x)


def sigmoid(x: Any) -> Any:
    """``1 / (1 + exp(-x))``."""
    return ops.sigmoid(x)


def softmax(x: Any, dim: int = -1) -> Any:
    """``exp(x) / sum(exp(x))`` along ``dim``."""
    return ops.softmax(x, axis=dim)


def log_softmax(x: Any, dim: int = -1) -> Any:
    """``log(softmax(x))`` along ``dim``."""
    return ops.log_softmax(x, axis=dim)


@as_one("scaled_dot_product_attention")
def scaled_dot_product_attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
) -> Any:
    """``softmax(query @ key.mT * scale) @ value``.

    Without a mask it is ``ops.attention``, which stores no (L, S) scores where the backend has a kernel for it (on
    CUDA: float32, float16, bfloat16, E and D up to 128), with dropout or without. With a mask they are stored.

    Source: A. Vaswani et al., "Attention is all you need", NeurIPS 2017.

    Arguments:
        query: (..., L, E).
        key, value: (..., S, E) and (..., S, D).
        attn_mask: broadcasts to (..., L, S): bools, True where a query sees a key; or numbers that are added.
        dropout_p: share of the weights that is dropped, also in evaluation: pass 0 there. Takes one draw of the global
            counter.
        is_causal: query l sees the keys up to l; not with attn_mask.
        scale: 1/sqrt(E) when None.

    Returns:
        (..., L, D).
    """
    if is_causal and attn_mask is not None:
        raise ValueError("attention is either causal or has a mask: pass is_causal=True or attn_mask, not both")
    if attn_mask is None:
        draw = _draw_for_dropout(dropout_p)
        return ops.attention(query, key, value, causal=is_causal, scale=scale, dropout_p=dropout_p, **draw)
    scores = (query @ key.mT) * (1.0 / math.sqrt(query.shape[-1]) if scale is None else float(scale))
    seen = attn_mask.dtype.kind == "b"
    weights = ops.softmax(ops.where(attn_mask, scores, -math.inf) if seen else scores + attn_mask)
    return dropout(weights, dropout_p) @ value


def dropout(x: Any, p: float = 0.5, training: bool = True) -> Any:
    """Each element zero with probability p, else divided by 1 - p. Takes one draw of the global counter in training."""
    draw = _draw_for_dropout(p, training)
    return ops.dropout(x, p=p, **draw) if draw else x


def _draw_for_dropout(p: float, training: bool = True) -> dict[str, Any]:
    """``seed`` and ``counter`` of a new draw; none where nothing is dropped. Raises ValueError: p is not in [0, 1]."""
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"dropout probability must be in [0, 1], got {p}")
    return dict(zip(("seed", "counter"), random.next_counter(), strict=True)) if training and p else {}


def batch_norm(
    x: Any,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    eps: float = 1e-5,
) -> Any:
    """Normalised per channel by the batch's statistics (training, or no running ones) or the running ones.

    The running statistics are only read here; ``nn.BatchNorm1d`` updates its own.
    """
    if training or running_mean is None:
        return ops.batch_norm(x, weight, bias, eps=eps)[0]
    return ops.batch_norm_inference(x, running_mean, running_var, weight, bias, eps=eps)


def layer_norm(
    x: Any, normalized_shape: tuple[int, ...], weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Any:
    """Normalised over the last axes; see ``brim.ops.layer_norm``."""
    return ops.layer_norm(x, normalized_shape, weight, bias, eps=eps)


def binary_cross_entropy_with_logits(
    x: Any, target: Any, weight: Any = None, *, pos_weight: Any = None, reduction: str = "mean"
) -> Any:
    """See ``brim.ops.bce_with_logits``."""
    return ops.bce_with_logits(x, target, weight, pos_weight=pos_weight, reduction=reduction)


def conv2d(
    x: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
) -> Any:
    """See ``brim.ops.conv2d``."""
    return ops.conv2d(x, weight, bias, stride=stride, padding=padding, dilation=dilation, groups=groups)


def embedding(index: Any, weight: Any, padding_idx: int | None = None) -> Any:
    """``weight[index]``; see ``brim.ops.embedding``."""
    return ops.embedding(index, weight, padding_idx=padding_idx)
