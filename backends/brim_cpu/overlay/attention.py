"""Attention of float32 and its gradients, with dropout or without: no matrix of scores is stored."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from brim.spec import Spec
from brim_cpu.native import Function
from brim_cpu.overlay import NativeKernel, overlay
from brim_cpu.overlay.matmul import BATCH_DIMS, PIECE_OPERATIONS
from brim_cpu.overlay.softmax import all_float32

_SIZES = Function("brim_attention_sizes", "p")
_FORWARD = Function("brim_attention_f32", "pppppppdiid")
_GRADIENT = Function("brim_attention_grad_f32", "pppppppppdiid")

_FEW_HEADS, _MANY_OPERATIONS = 4, 64 << 20
"""The gradients of a head are one piece of work: of few and large ones the products are cut finer."""


@functools.cache
def _sizes() -> list[int]:
    """Rows and columns of the register tile; numbers of scores and of packed keys that a thread has room for; queries
    of a block, at most."""
    found = np.zeros(5, np.int64)
    _SIZES.call(found)
    return list(map(int, found))


class _Plan:
    """What attention.cpp reads, from the specs of the operands; ``fits`` is False where it has no room."""

    def __init__(self, q: Spec, k: Spec, v: Spec, g: Spec | None, causal: bool) -> None:
        lead, (T, E), (S, D) = q.shape[:-2], q.shape[-2:], v.shape[-2:]
        tile_rows, tile_columns, scores, packed, most_queries = _sizes()
        operands = (q, k, v, q if g is None else g)
        self.contiguous = tuple(x.strides[-1] != 1 and x.shape[-1] != 1 for x in operands)
        padded = -(-S // tile_columns) * tile_columns
        most = min(most_queries, scores // (padded + tile_columns)) // tile_rows * tile_rows
        self.fits = most > 0 and len(lead) <= BATCH_DIMS
        if not self.fits:
            return
        self.heads = math.prod(lead)
        self.operations = 4 * T * S * (E + D) // (2 if causal else 1)  # of a head, backwards about twice as many
        blocks = -(-T // most)
        block = -(-T // (blocks * tile_rows)) * tile_rows
        work = self.operations // (2 * blocks) if g is None else 2 * self.operations
        self.packed_numbers = padded * (E if g is None else E + D)
        self.packed_bytes = 4 * self.heads * self.packed_numbers if self.packed_numbers > packed else 0
        strides = [
            Spec(x.shape, x.dtype).strides if copied else x.strides
            for x, copied in zip(operands, self.contiguous, strict=True)
        ]
        pad = BATCH_DIMS - len(lead)
        words = [self.heads, *(1,) * pad, *lead]
        for step in strides:
            words += [*(0,) * pad, *step[:-2]]
        words += [step[-2] for step in strides]
        words += [T, S, E, D, int(causal), block, max(1, PIECE_OPERATIONS // max(1, work))]
        self.words = np.array(words, np.int64)


def _plan(
    operands: Sequence[Any], outs: Sequence[Spec], numbers: Sequence[Any], causal: bool
) -> _Plan | None:  # fmt: skip
    """None for other dtypes and layouts of results, nothing to compute, and keys that a thread has no room for."""
    if not all_float32((*operands, *outs)) or not all(out.contiguous for out in outs):
        return None
    if any(isinstance(number, Spec) for number in numbers) or any(x.size == 0 for x in (*operands, *outs)):
        return None
    *g, q, k, v = operands
    plan = _Plan(q, k, v, g[0] if g else None, causal)
    return plan if plan.fits else None


@overlay("attention", "attention_dropout")
def attention(
    ins: Sequence[Any], outs: Sequence[Spec], *, causal: bool, scale: float, p: float = 0.0, **_: Any
) -> NativeKernel | None:
    """The result and each query's logsumexp, a block of queries at a time."""
    numbers = tuple(ins[3:])
    plan = _plan(ins[:3], outs, numbers, causal)
    if plan is None:
        return None

    def calls(made: Any, q: Any, k: Any, v: Any, seed: Any = 0, counter: Any = 0, scratch: Any = None) -> list[Any]:
        packed = scratch if plan.packed_bytes else None
        return [_FORWARD.bind(*made, q, k, v, packed, plan.words, scale, seed, counter, p)]

    return NativeKernel(calls, plan.packed_bytes, contiguous=plan.contiguous[:3] + (False,) * len(numbers))


@overlay("attention_grad", "attention_dropout_grad")
def attention_grad(
    ins: Sequence[Any], outs: Sequence[Spec], *, causal: bool, scale: float, p: float = 0.0, **_: Any
) -> NativeKernel | None:
    """From the gradient of the result and the operands: the weights are computed anew."""
    numbers = tuple(ins[6:])
    plan = _plan(ins[:4], outs, numbers, causal)
    if plan is None or (plan.heads < _FEW_HEADS and plan.operations > _MANY_OPERATIONS):
        return None

    def calls(
        made: Any, g: Any, q: Any, k: Any, v: Any, y: Any, logs: Any, seed: Any = 0, counter: Any = 0,
        scratch: Any = None,
    ) -> list[Any]:  # fmt: skip
        packed = scratch if plan.packed_bytes else None
        return [_GRADIENT.bind(*made, g, q, k, v, packed, plan.words, scale, seed, counter, p)]

    flags = (plan.contiguous[3], *plan.contiguous[:3], False, False)
    return NativeKernel(calls, plan.packed_bytes, contiguous=flags + (False,) * len(numbers))
