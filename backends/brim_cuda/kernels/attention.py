"""Attention and its gradient, tile by tile: no matrix of scores, so memory grows linearly with the sequences.

Plain float32 arithmetic from shared memory, without tensor cores. Arrays have any strides, so that heads are read where
the projection before them wrote them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from brim.spec import DTYPES, Spec
from brim_cuda.cuda_c import walk_dtype
from brim_cuda.launch import C_TYPES, Call, In, Out, Param, Scratch, index_dtype, named_kernel, pointer
from brim_cuda.layout import broadcast_strides, merged
from brim_cuda.registry import Work, kernel

__all__ = ["attention", "attention_grad"]

_INCLUDES = ("scalar.cuh", "shared.cuh", "rows.cuh", "attention.cuh")
_DTYPES = tuple(DTYPES[name] for name in ("float32", "float16", "bfloat16"))
_F32 = DTYPES["float32"]
_MAX_NUMBERS = 128
"""Of a row of q, k or v: more do not fit in shared memory beside each other."""
_OWN, _THREADS, _PART = 32, 128, 16
"""OWN, ATTENTION_THREADS and ACROSS in ``attention.cuh``."""
_MOST_PARTS = 80
_FEW_NUMBERS = 64
"""Up to here, registers are enough for larger tiles."""
_MAX_BLOCKS = 32768

_Operand = tuple[str, Spec | None, Any]
"""A parameter's name, the array of matrices that it points to (None: float32, one a query), and the argument."""


def _check(name: str, q: Spec, k: Spec, v: Spec, *others: Spec) -> None:
    """KeyError for what these kernels are not for; the composite's body takes it."""
    alike = q.ndim >= 2 and k.shape[:-2] == v.shape[:-2] == q.shape[:-2] and k.shape[-2] == v.shape[-2]
    if not alike or any(x.dtype != q.dtype for x in (k, v, *others)) or q.dtype not in _DTYPES:
        raise KeyError(f"the CUDA backend has no kernel for {name} of {q}, {k} and {v}")
    if not (1 <= q.shape[-1] <= _MAX_NUMBERS and 1 <= v.shape[-1] <= _MAX_NUMBERS and k.shape[-2] >= 1):
        raise KeyError(f"the CUDA backend has no kernel for {name} of heads of {q.shape[-1]} and {v.shape[-1]} numbers")


def _padded(numbers: int) -> int:
    """W in ``attention.cuh``. Between 80 and 128 the compiler would spill registers, which it does not for 128."""
    padded = -(-numbers // _PART) * _PART
    return padded if padded <= _MOST_PARTS else _MAX_NUMBERS


def _tile(numbers: int, own: int, squares: int) -> tuple[int, int]:
    """Rows of a tile and bytes of shared memory, for ``own`` owned matrices and ``squares`` of scores.

    At most 45 632 bytes: under the 48 KiB that every GPU gives a block without being asked for more.
    """
    rows = 32 if numbers <= _FEW_NUMBERS else 16
    return rows, _F32.itemsize * ((own * _OWN + rows) * (numbers + 1) + squares * _OWN * (rows + 1))


class _Launches:
    """What the launches for one op share: matrices (queries or keys, numbers), batched over the leading axes."""

    def __init__(self, q: Spec, v: Spec, arrays: Sequence[Spec], *, causal: bool, scale: float) -> None:
        self.lead, self.queries, self.depth = q.shape[:-2], q.shape[-2], q.shape[-1]
        self.keys, self.width = v.shape[-2], v.shape[-1]
        self.dtype, self.index = q.dtype, index_dtype([*arrays, Spec((*self.lead, self.queries))])
        self.numbers = _padded(max(self.depth, self.width))
        self.causal, self.scale = causal, np.float32(scale)
        self.matrices = math.prod(self.lead)

    def call(
        self, function: str, operands: Sequence[_Operand], rows: int, *, own: int = 0, squares: int = 0
    ) -> Call:  # fmt: skip
        """A launch of a function of ``attention.cuh``.

        Arguments:
            operands: in the order of its parameters.
            rows: of each matrix, that are dealt out.
            own, squares: matrices of owned rows and of scores in shared memory; 0: a warp a row, without.
        """
        arrays = [x for _, x, _ in operands if x is not None]
        lead = [broadcast_strides(Spec(x.shape[:-2], x.dtype, x.strides[:-2]), self.lead) for x in arrays]
        sizes, steps = merged(self.lead, lead)
        count, ndim, itype = len(arrays), len(sizes), C_TYPES[self.index]
        attended = np.dtype(
            [(name, self.index) for name in ("queries", "keys", "depth", "width")]
            + [(name, self.index, (count,)) for name in ("down", "right")]
        )
        down, right = ([x.strides[axis] for x in arrays] for axis in (-2, -1))
        batch = np.zeros((), walk_dtype(count, ndim, self.index))
        batch["shape"], batch["stride"] = sizes, steps
        given: list[tuple[Param, Any]] = [
            (pointer(name, _F32 if x is None else x.dtype, const=isinstance(place, In)), place)
            for name, x, place in operands
        ]
        tiles = self.matrices * (-(-rows // _OWN) if own else rows)
        given.append((Param("tiles", self.index), self.index.type(tiles)))
        if own:
            given.append((Param("scale", _F32), self.scale))
        shapes = np.array((self.queries, self.keys, self.depth, self.width, down, right), attended)
        given.append((Param("shapes", attended, ctype=f"Attended<{itype}, {count}>"), shapes))
        given.append((Param("batch", batch.dtype, ctype=f"Walk<{itype}, {count}, {ndim}>"), batch))
        tile, shared_bytes = _tile(self.numbers, own, squares) if own else (0, 0)
        flags = f"<{str(self.causal).lower()}, {self.numbers}, {tile}>" if own else ""
        text = f"""extern "C" __global__ void __launch_bounds__({_THREADS}, 4) NAME(PARAMS) {{
    {function}{flags}({", ".join(param.name for param, _ in given)});
}}
"""
        made = named_kernel(function, [param for param, _ in given], text, _INCLUDES)
        blocks = min(tiles if own else -(-tiles // (_THREADS // 32)), _MAX_BLOCKS)
        return Call(made, (blocks,), tuple(place for _, place in given), threads=_THREADS, shared_bytes=shared_bytes)


@kernel("attention")
def attention(ins: Sequence[Any], outs: Sequence[Spec], *, causal: bool, scale: float) -> Work:
    """softmax(q k^T scale) v with a running largest score and sum, and the logarithm of each query's sum."""
    (q, k, v), (y, logs) = ins, outs
    _check("attention", q, k, v, y)
    if logs.size == 0:
        return Work([])
    launches = _Launches(q, v, (q, k, v, y), causal=causal, scale=scale)
    operands = [("q", q, In(0)), ("k", k, In(1)), ("v", v, In(2)), ("y", y, Out(0)), ("logs", None, Out(1))]
    return Work([launches.call("attention", operands, launches.queries, own=1, squares=1)])


@kernel("attention_grad")
def attention_grad(ins: Sequence[Any], outs: Sequence[Spec], *, causal: bool, scale: float) -> Work:
    """From the result and the logarithms: weights are made again, by query for q, and by key for k and v."""
    g, q, k, v, y, logs = ins
    dq, dk, dv = outs
    _check("attention_grad", q, k, v, g, y)
    if g.shape != y.shape or logs.dtype != _F32 or logs.shape != q.shape[:-1]:
        raise KeyError(f"the CUDA backend has no kernel for attention_grad of {g}, {y} and {logs}")
    contiguous = (False,) * 5 + (True,)
    launches = _Launches(q, v, (g, q, k, v, y, *outs), causal=causal, scale=scale)
    if launches.matrices == 0:
        return Work([], contiguous=contiguous)
    given: list[_Operand] = [("g", g, In(0)), ("q", q, In(1)), ("k", k, In(2)), ("v", v, In(3))]
    sums: _Operand = ("sums", None, Scratch(0))
    saved: list[_Operand] = [*given, ("logs", None, In(5)), sums]
    calls = []
    if launches.queries:  # without, the gradients of k and v are zeros
        queries = launches.queries
        calls.append(launches.call("attention_row_sums", [given[0], ("y", y, In(4)), sums], queries))
        calls.append(launches.call("attention_grad_queries", [*saved, ("dq", dq, Out(0))], queries, own=2, squares=1))
    keys = [*saved, ("dk", dk, Out(1)), ("dv", dv, Out(2))]
    calls.append(launches.call("attention_grad_keys", keys, launches.keys, own=2, squares=2))
    return Work(calls, scratch_bytes=logs.size * _F32.itemsize, contiguous=contiguous)
