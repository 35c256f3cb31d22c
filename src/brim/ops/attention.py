"""Attention, softmax(q k^T scale) v, as one op where a backend has a kernel for it.

Elsewhere it is the products and the softmax that it is made of, which the backends' kernels for these compute.
"""

from __future__ import annotations

import math
from typing import Any

from brim.autocast import as_one
from brim.op import composite
from brim.ops.arithmetic import log, where
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
from brim.spec import is_float

__all__ = ["attention"]


def _weights(scores: Any, causal: bool, scale: float, visible: Any = None) -> Any:
    return causal_softmax(scores, scale=scale, visible=visible) if causal else softmax(scores * scale)


@composite("attention_grad", outputs=3)
def _attention_grad(
    g: Any, q: Any, k: Any, v: Any, y: Any, logs: Any, *, causal: bool, scale: float
) -> tuple[Any, Any, Any]:
    """the gradients of attention with respect to q, k and v"""
    # y and the logarithms are for kernels. Here the weights are made anew: differentiated again, they count as
    # functions of q and k.
    weights = _weights(q @ k.mT, causal, scale)
    slopes = g @ v.mT
    if causal:
        slopes = _causal_softmax_grad(slopes, weights, scale=scale)
    else:
        slopes = _softmax_grad(slopes, weights, axis=weights.ndim - 1) * scale
    return slopes @ k, slopes.mT @ q, weights.mT @ g


@composite(
    "attention",
    vjp=lambda g, q, k, v, y, logs, *, causal, scale: _attention_grad(g, q, k, v, y, logs, causal=causal, scale=scale),
    outputs=2,
    aux=1,
)
def _attention(q: Any, k: Any, v: Any, *, causal: bool, scale: float) -> tuple[Any, Any]:
    """softmax(q k^T scale) v, and of each query the logarithm of its sum of e^score"""
    scores = q @ k.mT
    wide = widened(scores) * scale
    if causal:
        wide = where(_lower_triangle(wide), wide, -math.inf)
    top = _max(wide, axis=-1, keepdims=True)
    logs = top + log(_sum(exp(wide - top), axis=-1, keepdims=True))
    return _weights(scores, causal, scale) @ v, logs[..., 0]


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
    q: Any, k: Any, v: Any, *, causal: bool = False, scale: float | None = None, visible: Any = None
) -> Any:  # fmt: skip
    """``softmax(q @ k.mT * scale) @ v``: each row of q gets the rows of v, weighted by how its key's match.

    A backend with a kernel for it stores no scores, so that memory grows linearly with T and S: on CUDA for float32,
    float16 and bfloat16 and rows of up to 128 numbers, when q, k and v have the same leading axes. It computes in
    float32 and rounds once; a query that does not see a key is untouched by it, even by its NaN. Elsewhere it is two
    products and a softmax.

    Source: T. Dao et al., "FlashAttention", NeurIPS 2022; the running softmax of M. Milakov and N. Gimelshein,
    "Online normalizer calculation for softmax", 2018.

    Arguments:
        q: (..., T, E).
        k, v: (..., S, E) and (..., S, D).
        causal: row t of q sees the rows of k and v up to t.
        scale: 1/sqrt(E) when None.
        visible: with causal, bools (T, S), True up to the diagonal, where they are at hand.

    Returns:
        (..., T, D).
    """
    factor = 1.0 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    if _alike(q, k, v) and _attention.has_kernel(q.device, q, k, v, causal=bool(causal), scale=factor):
        return _attention(q, k, v, causal=bool(causal), scale=factor)[0]
    return _weights(q @ k.mT, causal, factor, visible) @ v
