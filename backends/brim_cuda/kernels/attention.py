"""Attention and its gradient, tile by tile: no matrix of scores, so memory grows linearly with the sequences.

float16, bfloat16 and float32 under TF32 take the tensor cores (``attention_mma.cuh``); float32 in full, and GPUs older
than compute capability 8.0, plain float32 arithmetic from shared memory (``attention.cuh``). Arrays have any strides,
so that heads are read where the projection before them wrote them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from brim.spec import DTYPES, Spec
from brim_cuda.cuda_c import walk_dtype
from brim_cuda.launch import C_TYPES, Call, In, Out, Param, Scratch, index_dtype, named_kernel, pointer
from brim_cuda.layout import broadcast_strides, merged
from brim_cuda.registry import Work, kernel

__all__ = ["attention", "attention_dropout", "attention_dropout_grad", "attention_grad"]

_INCLUDES = ("scalar.cuh", "shared.cuh", "rows.cuh", "philox.cuh", "attended.cuh", "attention.cuh")
_MMA_INCLUDES = (*_INCLUDES, "mma.cuh", "attention_mma.cuh", "attention_mma_grad.cuh")
_DTYPES = tuple(DTYPES[name] for name in ("float32", "float16", "bfloat16"))
_F32, _U64 = DTYPES["float32"], DTYPES["uint64"]
_MAX_NUMBERS = 128
"""Of a row of q, k or v: more do not fit in shared memory beside each other."""
_OWN, _THREADS, _PART = 32, 128, 16
"""OWN, ATTENTION_THREADS and ACROSS in ``attention.cuh``."""
_MOST_PARTS = 80
_FEW_NUMBERS = 64
"""Up to here, registers are enough for larger tiles."""
_MAX_BLOCKS = 32768
_ROWS = 64
"""ROWS in ``attention_mma.cuh``."""
_SHARED_BYTES = 48 << 10
"""What every GPU gives a block without being asked for more."""
_FEW_BYTES = 128
"""Of a row, up to which the tiles of ``attention_mma.cuh`` are larger and a block's own rows stay in registers."""
_MOST_BYTES = 256
_SCALES = (1e-30, 1e30)
"""The tensor cores' kernels multiply the largest score by the scale, which must not turn the order round."""

_Operand = tuple[str, Spec | None, Any]
"""A parameter's name, the array of matrices that it points to (None: float32, one a query), and the argument."""


@dataclass(frozen=True, slots=True)
class _How:
    """The params of attention, and the numbers of the inputs ``seed`` and ``counter`` where weights are dropped."""

    causal: bool
    scale: float
    tf32: bool = False
    p: float = 0.0
    draw: tuple[int, int] | None = None


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

    At most 45 632 bytes, and 128 for the bits of dropout: under the 48 KiB that every GPU gives a block.
    """
    rows = 32 if numbers <= _FEW_NUMBERS else 16
    return rows, _F32.itemsize * ((own * _OWN + rows) * (numbers + 1) + squares * _OWN * (rows + 1))


@dataclass(frozen=True, slots=True)
class _Tiling:
    """How a kernel of ``attention_mma.cuh`` is instantiated.

    Attributes:
        rows: of a tile.
        shared_bytes: tiles, rows of its own, and the bits of dropout.
        blocks: that a multiprocessor must hold at once, so how many registers a thread may have (65536 / 128 threads).
        flags: the template's arguments that are only this kernel's.
    """

    rows: int
    shared_bytes: int
    blocks: int
    flags: str = ""


def _by_query(numbers: int, itemsize: int, *, forward: bool) -> _Tiling:
    """Of the forward pass and of the gradient of q: two pairs of tiles, through which the block's own rows come too."""
    row_bytes = numbers * itemsize
    few = row_bytes <= _FEW_BYTES
    rows = 64 if few and forward else 32
    return _Tiling(rows, 4 * rows * (row_bytes + 16) + _ROWS * rows // 8, 3 if few else 2)


def _by_key(numbers: int, itemsize: int) -> _Tiling:
    """Of the gradients of k and v: the largest tiles that fit, two pairs of them if they do."""
    row_bytes = numbers * itemsize
    hold = row_bytes <= _FEW_BYTES
    for rows, stages in ((32, 2), (16, 2), (16, 1)):
        tile_rows = 2 * stages * rows + (0 if hold else 2 * _ROWS)
        shared_bytes = tile_rows * (row_bytes + 16) + rows * _ROWS // 8
        if shared_bytes <= _SHARED_BYTES:
            break
    return _Tiling(rows, shared_bytes, 3 if row_bytes <= 64 else 2, f", {stages}, {str(hold).lower()}")


class _Launches:
    """What the launches for one op share: matrices (queries or keys, numbers), batched over the leading axes."""

    def __init__(self, q: Spec, v: Spec, arrays: Sequence[Spec], how: _How) -> None:
        self.lead, self.queries, self.depth = q.shape[:-2], q.shape[-2], q.shape[-1]
        self.keys, self.width = v.shape[-2], v.shape[-1]
        self.dtype, self.index = q.dtype, index_dtype([*arrays, Spec((*self.lead, self.queries))])
        self.numbers = _padded(max(self.depth, self.width))
        self.how = how
        self.matrices = math.prod(self.lead)
        self.exact = -(-max(self.depth, self.width) // 16) * 16
        in_order = _SCALES[0] < how.scale < _SCALES[1]
        self.on_tensor_cores = (
            in_order and (q.dtype != _F32 or how.tf32) and self.exact * q.dtype.itemsize <= _MOST_BYTES
        )

    def _given(self, operands: Sequence[_Operand]) -> list[tuple[Param, Any]]:
        """Parameters and arguments: pointers, and at the end what describes the arrays."""
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
        shapes = np.array((self.queries, self.keys, self.depth, self.width, down, right), attended)
        return [
            *(
                (pointer(name, _F32 if x is None else x.dtype, const=isinstance(place, In)), place)
                for name, x, place in operands
            ),
            (Param("shapes", attended, ctype=f"Attended<{itype}, {count}>"), shapes),
            (Param("batch", batch.dtype, ctype=f"Walk<{itype}, {count}, {ndim}>"), batch),
        ]

    def _kept(self) -> tuple[list[tuple[Param, Any]], str]:
        """Parameters and arguments for dropout, and the object that says which weights are kept."""
        if self.how.draw is None:
            return [], "AllKept{1.0f}"
        seed, counter = self.how.draw
        given: list[tuple[Param, Any]] = [
            (Param("factor", _F32), np.float32(1.0 / (1.0 - self.how.p))),
            (Param("p", _F32), np.float32(self.how.p)),
            (Param("seed", _U64), In(seed)),
            (Param("draw", _U64), In(counter)),
        ]
        return given, "Dropout{factor, p, seed, draw}"

    def row_sums(self, operands: Sequence[_Operand]) -> Call:
        """A warp a row."""
        given = self._given(operands)
        rows = self.matrices * self.queries
        given.append((Param("rows", self.index), self.index.type(rows)))
        text = """extern "C" __global__ void NAME(PARAMS) {
    attention_row_sums(g, y, sums, rows, shapes, batch);
}
"""
        return _call("attention_row_sums", given, text, _INCLUDES, -(-rows // (_THREADS // 32)), 0)

    def tiled(
        self, function: str, operands: Sequence[_Operand], rows: int, *, own: int, squares: int, tiling: _Tiling
    ) -> Call:  # fmt: skip
        """A launch in which a block has a tile of rows at a time.

        Arguments:
            function: in ``attention.cuh``; with ``_mma`` after its name, in ``attention_mma.cuh``.
            operands: in the order of its parameters.
            rows: of each matrix, that are dealt out.
            own, squares: matrices of owned rows and of scores in shared memory, without tensor cores.
            tiling: with tensor cores.
        """
        given, (drawing, how) = self._given(operands), self._kept()
        pointers = ", ".join(name for name, _, _ in operands)
        rest = "scale, shapes, batch, how"
        given += [
            (Param("scale", _F32), np.float32(self.how.scale)),
            (Param("matrices", self.index), self.index.type(self.matrices)),
            (Param("tiles", self.index), self.index.type(self.matrices * -(-rows // _OWN))),
            *drawing,
        ]
        tile, shared_bytes = _tile(self.numbers, own, squares)
        shared_bytes += _OWN * tile // 8 if drawing else 0
        causal = str(self.how.causal).lower()
        plain = f"{function}<{causal}, {self.numbers}, {tile}>({pointers}, tiles, {rest});"
        if not self.on_tensor_cores:
            blocks_at_once = 2 if drawing and self.numbers > _MOST_PARTS else 4  # with 4, registers would be spilled
            text = f"""extern "C" __global__ void __launch_bounds__({_THREADS}, {blocks_at_once}) NAME(PARAMS) {{
    const auto how = {how};
    {plain}
}}
"""
            blocks = self.matrices * -(-rows // _OWN)
            return _call(function, given, text, _INCLUDES, blocks, shared_bytes)
        text = f"""extern "C" __global__ void __launch_bounds__({_THREADS}, {tiling.blocks}) NAME(PARAMS) {{
    const auto how = {how};
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
    {plain}
#else
    {function}_mma<{causal}, {self.exact}, {tiling.rows}{tiling.flags}>({pointers}, matrices, {rest});
#endif
}}
"""
        blocks = self.matrices * -(-rows // _ROWS)
        return _call(f"{function}_mma", given, text, _MMA_INCLUDES, blocks, max(shared_bytes, tiling.shared_bytes))


def _call(
    name: str, given: Sequence[tuple[Param, Any]], text: str, includes: Sequence[str], blocks: int, shared_bytes: int
) -> Call:  # fmt: skip
    made = named_kernel(name, [param for param, _ in given], text, includes)
    args = tuple(place for _, place in given)
    return Call(made, (min(blocks, _MAX_BLOCKS),), args, threads=_THREADS, shared_bytes=shared_bytes)


def _forward(name: str, ins: Sequence[Any], outs: Sequence[Spec], how: _How) -> Work:
    q, k, v = ins[:3]
    y, logs = outs
    _check(name, q, k, v, y)
    if logs.size == 0:
        return Work([])
    launches = _Launches(q, v, (q, k, v, y), how)
    operands = [("q", q, In(0)), ("k", k, In(1)), ("v", v, In(2)), ("y", y, Out(0)), ("logs", None, Out(1))]
    tiling = _by_query(launches.exact, q.dtype.itemsize, forward=True)
    return Work([launches.tiled("attention", operands, launches.queries, own=1, squares=1, tiling=tiling)])


def _backward(name: str, ins: Sequence[Any], outs: Sequence[Spec], how: _How) -> Work:
    g, q, k, v, y, logs = ins[:6]
    dq, dk, dv = outs
    _check(name, q, k, v, g, y)
    if g.shape != y.shape or logs.dtype != _F32 or logs.shape != q.shape[:-1]:
        raise KeyError(f"the CUDA backend has no kernel for {name} of {g}, {y} and {logs}")
    contiguous = (False,) * 5 + (True,) + (False,) * (len(ins) - 6)
    launches = _Launches(q, v, (g, q, k, v, y, *outs), how)
    if launches.matrices == 0:
        return Work([], contiguous=contiguous)
    given: list[_Operand] = [("g", g, In(0)), ("q", q, In(1)), ("k", k, In(2)), ("v", v, In(3))]
    sums: _Operand = ("sums", None, Scratch(0))
    saved: list[_Operand] = [*given, ("logs", None, In(5)), sums]
    calls = []
    if launches.queries:  # without, the gradients of k and v are zeros
        queries, tiling = launches.queries, _by_query(launches.exact, q.dtype.itemsize, forward=False)
        calls.append(launches.row_sums([given[0], ("y", y, In(4)), sums]))
        operands: list[_Operand] = [*saved, ("dq", dq, Out(0))]
        calls.append(launches.tiled("attention_grad_queries", operands, queries, own=2, squares=1, tiling=tiling))
    keys = [*saved, ("dk", dk, Out(1)), ("dv", dv, Out(2))]
    tiling = _by_key(launches.exact, q.dtype.itemsize)
    calls.append(launches.tiled("attention_grad_keys", keys, launches.keys, own=2, squares=2, tiling=tiling))
    return Work(calls, scratch_bytes=logs.size * _F32.itemsize, contiguous=contiguous)


@kernel("attention")
def attention(ins: Sequence[Any], outs: Sequence[Spec], *, causal: bool, scale: float, tf32: bool = False) -> Work:
    """softmax(q k^T scale) v with a running largest score and sum, and the logarithm of each query's sum."""
    return _forward("attention", ins, outs, _How(causal, scale, tf32))


@kernel("attention_grad")
def attention_grad(ins: Sequence[Any], outs: Sequence[Spec], *, causal: bool, scale: float, tf32: bool = False) -> Work:
    """From the result and the logarithms: weights are made again, by query for q, and by key for k and v."""
    return _backward("attention_grad", ins, outs, _How(causal, scale, tf32))


@kernel("attention_dropout")
def attention_dropout(
    ins: Sequence[Any], outs: Sequence[Spec], *, causal: bool, scale: float, p: float, tf32: bool = False
) -> Work:
    """Attention whose weights are dropped where brim's dropout would drop them; no mask is stored."""
    if not 0.0 < p < 1.0:
        raise KeyError(f"the CUDA backend has no kernel for attention that drops a share of {p}")
    return _forward("attention_dropout", ins, outs, _How(causal, scale, tf32, p, (3, 4)))


@kernel("attention_dropout_grad")
def attention_dropout_grad(
    ins: Sequence[Any], outs: Sequence[Spec], *, causal: bool, scale: float, p: float, tf32: bool = False
) -> Work:
    """The same weights are dropped again, drawn anew from the seed and the counter."""
    if not 0.0 < p < 1.0:
        raise KeyError(f"the CUDA backend has no kernel for attention that drops a share of {p}")
    return _backward("attention_dropout_grad", ins, outs, _How(causal, scale, tf32, p, (6, 7)))
