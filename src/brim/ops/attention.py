"""Attention, softmax(q k^T scale) v, as one op where a backend has a kernel for it.

Elsewhere it is the products and the softmax that it is made of, which the backends' kernels for these compute.
"""

from __future__ import annotations

import math
from typing import Any

from brim.autocast import as_one
from brim.op import composite
from brim.ops.arithmetic import log, where
from brim.ops.dropout import dropout
from brim.ops.exponential import exp
from brim.ops.reduce import max as _max
from brim.ops.reduce import sum as _sum
from brim.ops.softmax import (
    _causal_softmax_grad,
    _lower_triangle,
    _softmax_grad,
    causal_softmax,
    softmax,
    widened,
)
from brim.precision import product_params
from brim.spec import is_float

__all__ = ["attention"]


def _weights(scores: Any, causal: bool, scale: float, visible: Any = None) -> Any:
    return causal_softmax(scores, scale=scale, visible=visible) if causal else softmax(scores * scale)


# In bodies, `tf32` says nothing: their products ask for the precision themselves.


def _slopes(slopes: Any, weights: Any, causal: bool, scale: float) -> Any:
    """The gradient of the scores (before they are scaled), from that of the weights."""
    if causal:
        return _causal_softmax_grad(slopes, weights, scale=scale)
    return _softmax_grad(slopes, weights, axis=weights.ndim - 1) * scale


@composite("attention_grad", outputs=3)
def _attention_grad(
    g: Any, q: Any, k: Any, v: Any, y: Any, logs: Any, *, causal: bool, scale: float, tf32: bool = False
) -> tuple[Any, Any, Any]:
    """the gradients of attention with respect to q, k and v"""
    # y and the logarithms are for kernels. Here the weights are made anew: differentiated again, they count as
    # functions of q and k.
    weights = _weights(q @ k.mT, causal, scale)
    slopes = _slopes(g @ v.mT, weights, causal, scale)
    return slopes @ k, slopes.mT @ q, weights.mT @ g


def _logs(scores: Any, causal: bool, scale: float) -> Any:
    """Of each row the logarithm of its sum of e^score."""
    wide = widened(scores) * scale
    if causal:
        wide = where(_lower_triangle(wide), wide, -math.inf)
    top = _max(wide, axis=-1, keepdims=True)
    return (top + log(_sum(exp(wide - top), axis=-1, keepdims=True)))[..., 0]


@composite("attention", vjp=lambda g, q, k, v, y, logs, **how: _attention_grad(g, q, k, v, y, logs, **how),
           outputs=2, aux=1)  # fmt: skip
def _attention(q: Any, k: Any, v: Any, *, causal: bool, scale: float, tf32: bool = False) -> tuple[Any, Any]:
    """softmax(q k^T scale) v, and of each query the logarithm of its sum of e^score"""
    scores = q @ k.mT
    return _weights(scores, causal, scale) @ v, _logs(scores, causal, scale)


@composite("attention_dropout_grad", outputs=3)
def _attention_dropout_grad(
    g: Any, q: Any, k: Any, v: Any, y: Any, logs: Any, seed: Any, counter: Any, *, causal: bool, scale: float,
    p: float, tf32: bool = False,
) -> tuple[Any, Any, Any]:  # fmt: skip
    """the gradients of attention_dropout with respect to q, k and v; the same weights are dropped"""
    weights = _weights(q @ k.mT, causal, scale)
    slopes = _slopes(dropout(g @ v.mT, seed, counter, p=p), weights, causal, scale)
    return slopes @ k, slopes.mT @ q, dropout(weights, seed, counter, p=p).mT @ g


@composite(
    "attention_dropout",
    vjp=lambda g, q, k, v, seed, counter, y, logs, **how: (
        *_attention_dropout_grad(g, q, k, v, y, logs, seed, counter, **how),
        None,
        None,
    ),
    outputs=2,
    aux=1,
)
def _attention_dropout(
    q: Any, k: Any, v: Any, seed: Any, counter: Any, *, causal: bool, scale: float, p: float, tf32: bool = False
) -> tuple[Any, Any]:
    """dropout(softmax(q k^T scale)) v, and of each query the logarithm of its sum of e^score"""
    scores = q @ k.mT
    weights = dropout(_weights(scores, causal, scale), seed, counter, p=p)
    return weights @ v, _logs(scores, causal, scale)


def _alike(q: Any, k: Any, v: Any) -> bool:
    """Whether these are floats of one dtype, batched over the same axes, with a value for each key."""
    return (
        is_float(q.dtype)
        and q.dtype == k.dtype == v.dtype
        and q.ndim >= 2
        and q.shape[:-2] == k.shape[:-2] == v.shape[:-2]
        and q.shape[-1] == k.shape[-1]
        and k.shape[-2] == v.shape[-2]
    )


@as_one("attention")
def attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    causal: bool = False,
    scale: float | None = None,
    visible: Any = None,
    dropout_p: float = 0.0,
    seed: Any = 0,
    counter: Any = 0,
) -> Any:
    """``softmax(q @ k.mT * scale) @ v``: each row of q gets the rows of v, weighted by how its key's match.

    A backend with a kernel for it stores no scores, so that memory grows linearly with T and S: on CUDA for float32,
    float16 and bfloat16 and rows of up to 128 numbers, on the CPU natively for float32, when q, k and v have the same
    leading axes. It adds up in float32. On CUDA half-width products, and those of float32 where TF32 is chosen
    (``brim.set_float32_precision``), run on tensor cores, for which weights are rounded to the dtype of v. In full
    float32, a query that does not see a key is untouched by it, even by its NaN. Elsewhere it is two products and a
    softmax.

    Source: T. Dao et al., "FlashAttention", NeurIPS 2022; the running softmax of M. Milakov and N. Gimelshein,
    "Online normalizer calculation for softmax", 2018.

    Arguments:
        q: (..., T, E).
        k, v: (..., S, E) and (..., S, D).
        causal: row t of q sees the rows of k and v up to t.
        scale: 1/sqrt(E) when None.
        visible: with causal, bools (T, S), True up to the diagonal, where they are at hand.
        dropout_p: share of the weights that is dropped, in [0, 1]: those that ``ops.dropout`` drops from an array of
            shape (..., T, S) under the same seed and counter. No mask is stored; the gradient draws it again.
        seed, counter: name the draw; ``brim.random.next_counter()`` gives the next one.

    Returns:
        (..., T, D).
    """
    factor = 1.0 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    how = {"causal": bool(causal), "scale": factor}
    if _alike(q, k, v):
        exactly = {**how, **product_params(q.dtype)}
        if dropout_p == 0.0:
            if _attention.has_kernel(q.device, q, k, v, **exactly):
                return _attention(q, k, v, **exactly)[0]
        else:
            exactly["p"] = float(dropout_p)
            if _attention_dropout.has_kernel(q.device, q, k, v, seed, counter, **exactly):
                return _attention_dropout(q, k, v, seed, counter, **exactly)[0]
    weights = _weights(q @ k.mT, causal, factor, visible)
    return (dropout(weights, seed, counter, p=dropout_p) if dropout_p else weights) @ v
