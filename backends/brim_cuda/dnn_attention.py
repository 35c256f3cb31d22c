"""Attention and its gradient in half-width floats as requests to cuDNN (its fused "SDPA" of FlashAttention's kind).

The logarithm of each query's sum of e^score, which brim's op keeps for the gradient, is what the library calls the
statistics of the softmax: natural logarithm, of the scaled scores, the largest score included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from brim.spec import DTYPES, Scalar, Spec
from brim_cuda.dnn import DnnTensor, input_of, output_of
from brim_cuda.launch import In, Out, Place

__all__ = ["ATTENTIONS", "AttentionGradRequest", "AttentionRequest", "attention_request"]

_HALVES = (DTYPES["float16"], DTYPES["bfloat16"])
_F32 = DTYPES["float32"]
_NUMBERS = 8
"""Rows of q, k and v have a multiple of this many numbers, 16 bytes, and so have the ways from row to row."""

_GRADIENT_ROWS = 128
"""The gradient is asked for multiples of so many rows of q and of k: in a last tile that is not full, the library's
kernels for compute capability 9.0 take zeros as scores, and e^(0 - logarithm) is infinite where all scores of a query
are below -88, so that gradients are NaN. Source: cudnn-frontend, issue 1072, pull request 628; up to cuDNN 9.30."""

ATTENTIONS = frozenset(("attention", "attention_grad"))

Asked = tuple["AttentionRequest | AttentionGradRequest", tuple[Place, ...], tuple[bool, ...]]


@dataclass(frozen=True, slots=True)
class AttentionRequest:
    """``y = softmax(q k^T scale) v`` over (batch, heads, rows, numbers), and the logarithms (batch, heads, rows, 1)."""

    q: DnnTensor
    k: DnnTensor
    v: DnnTensor
    y: DnnTensor
    logs: DnnTensor
    causal: bool
    scale: float

    forbidden_notes = ("NONDETERMINISTIC",)

    @property
    def title(self) -> str:
        return f"attention of {self.q.shape} to {self.v.shape} in {self.q.dtype}"

    @property
    def tensors(self) -> tuple[DnnTensor, ...]:
        return (self.q, self.k, self.v, self.y, self.logs)

    def build(self, cudnn: Any, graph: Any) -> None:
        """One node; the first row of q sees the first row of k, whatever their numbers are."""
        q, k, v = (input_of(cudnn, graph, n, tensor) for n, tensor in enumerate(self.tensors[:3], 1))
        y, logs = graph.sdpa(
            name="attention", q=q, k=k, v=v, is_inference=False, attn_scale=self.scale, use_causal_mask=self.causal
        )
        output_of(cudnn, y, 4, self.y)
        output_of(cudnn, logs, 5, self.logs)


@dataclass(frozen=True, slots=True)
class AttentionGradRequest:
    """The gradients of q, k and v from that of y, added up in an order that does not change."""

    q: DnnTensor
    k: DnnTensor
    v: DnnTensor
    y: DnnTensor
    g: DnnTensor
    logs: DnnTensor
    dq: DnnTensor
    dk: DnnTensor
    dv: DnnTensor
    causal: bool
    scale: float

    forbidden_notes = ("NONDETERMINISTIC",)

    @property
    def title(self) -> str:
        return f"gradient of attention of {self.q.shape} to {self.v.shape} in {self.q.dtype}"

    @property
    def tensors(self) -> tuple[DnnTensor, ...]:
        return (self.q, self.k, self.v, self.y, self.g, self.logs, self.dq, self.dk, self.dv)

    def build(self, cudnn: Any, graph: Any) -> None:
        """One node."""
        q, k, v, y, g, logs = (input_of(cudnn, graph, n, tensor) for n, tensor in enumerate(self.tensors[:6], 1))
        made = graph.sdpa_backward(
            name="attention_grad", q=q, k=k, v=v, o=y, dO=g, stats=logs, attn_scale=self.scale,
            use_causal_mask=self.causal, use_deterministic_algorithm=True,
        )  # fmt: skip
        for number, (gradient, tensor) in enumerate(zip(made, self.tensors[6:], strict=True), 7):
            output_of(cudnn, gradient, number, tensor)


def attention_request(
    name: str, ins: Sequence[Spec | Scalar], outs: Sequence[Spec], *, causal: bool, scale: float
) -> Asked | None:
    """The request for an op of ATTENTIONS, where its tensors are, and which inputs must be copied to row-major order.

    None for what is left to brim's kernels: float32, more than two leading axes, rows of numbers that are no multiple
    of 8, empty arrays; a scale that turns the order of scores round; gradients of tiles that are not full.
    """
    specs = [*ins, *outs]
    if any(not isinstance(spec, Spec) or spec.size == 0 for spec in specs) or scale <= 0.0:
        return None
    if name == "attention":
        numbers: tuple[int, ...] = (0, 1, 2, 3)
        logs_at = 4
    else:
        numbers, logs_at = (1, 2, 3, 4, 0, 6, 7, 8), 5
    halves: list[Spec] = [specs[n] for n in numbers]  # type: ignore[misc]
    logs = specs[logs_at]
    assert isinstance(logs, Spec)
    dtype = halves[0].dtype
    if dtype not in _HALVES or any(spec.dtype != dtype for spec in halves) or logs.dtype != _F32:
        return None
    if any(not 2 <= spec.ndim <= 4 or spec.shape[-1] % _NUMBERS for spec in halves):
        return None
    if any(spec.shape[:-2] != halves[0].shape[:-2] for spec in halves) or logs.shape != halves[0].shape[:-1]:
        return None
    if name == "attention_grad" and any(spec.shape[-2] % _GRADIENT_ROWS for spec in halves[:2]):
        return None
    copied = [False] * len(ins)
    tensors: list[DnnTensor] = []
    for number, spec in zip(numbers, halves, strict=True):
        if not _readable(spec):
            if number >= len(ins):
                return None
            copied[number], spec = True, Spec(spec.shape, spec.dtype)
        tensors.append(_matrices(spec))
    if logs_at < len(ins):
        copied[logs_at] = True
    elif not logs.contiguous:
        return None
    rows = DnnTensor((*tensors[0].shape[:3], 1), _packed((*tensors[0].shape[:3], 1)), _F32)
    places: list[Place] = [In(n) if n < len(ins) else Out(n - len(ins)) for n in numbers]
    at: Place = In(logs_at) if logs_at < len(ins) else Out(logs_at - len(ins))
    if name == "attention":
        q, k, v, y = tensors
        return AttentionRequest(q, k, v, y, rows, causal, scale), (*places, at), tuple(copied)
    q, k, v, y, g, *made = tensors
    request = AttentionGradRequest(q, k, v, y, g, rows, made[0], made[1], made[2], causal, scale)
    return request, (*places[:5], at, *places[5:]), tuple(copied)


def _packed(shape: tuple[int, ...]) -> tuple[int, ...]:
    return Spec(shape).strides


def _readable(spec: Spec) -> bool:
    """Whether rows are dense and start at multiples of 16 bytes from each other, none of them twice."""
    if spec.strides[-1] != 1 and spec.shape[-1] > 1:
        return False
    return all(dim == 1 or (step > 0 and step % _NUMBERS == 0) for dim, step in zip(spec.shape[:-1], spec.strides[:-1]))


def _matrices(spec: Spec) -> DnnTensor:
    """(batch, heads, rows, numbers): without heads there is one, without a batch one of one."""
    missing = 4 - spec.ndim
    shape = (*spec.shape[:-2], *(1,) * missing, *spec.shape[-2:])
    strides = (*spec.strides[:-2], *(0,) * missing, *spec.strides[-2:])
    packed = _packed(shape)
    return DnnTensor(shape, tuple(p if dim == 1 else s for dim, s, p in zip(shape, strides, packed)), spec.dtype)
