"""Kernels along one axis: cumulative sums, and one class picked of each row (with its transpose)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from brim.spec import DTYPES, Spec
from brim_cuda.cuda_c import arithmetic
from brim_cuda.kernels.indexing import supported
from brim_cuda.launch import BLOCK, Call, In, Out, Param, blocks_for, index_dtype, named_kernel, pointer
from brim_cuda.registry import Work, kernel

_INCLUDES = ("scalar.cuh", "shared.cuh", "indexing.cuh", "lines.cuh")
_LONG = 256
"""Elements of a line from which a block adds it up, where there are too few lines for a thread each."""
_MANY_LINES = 16384


@kernel("cumulative_sum")
def cumulative_sum(
    ins: Sequence[Any], outs: Sequence[Spec], *, axis: int, reverse: bool, include_initial: bool
) -> Work:
    """Sums of all elements up to each; half-width floats in float32."""
    x: Spec = ins[0]
    (out,) = outs
    supported("cumulative_sum", x.dtype)
    if out.size == 0:
        return Work([], contiguous=(True,))
    length, inner = x.shape[axis], math.prod(x.shape[axis + 1 :])
    lines = math.prod(x.shape[:axis]) * inner
    by_block = length > _LONG and lines < _MANY_LINES
    index = index_dtype([x, out])
    params = [
        pointer("x", x.dtype, const=True),
        pointer("y", out.dtype),
        *(Param(name, index) for name in ("lines", "length", "inner")),
        Param("reverse", DTYPES["bool"]),
        Param("initial", DTYPES["bool"]),
    ]
    way = "block" if by_block else "thread"
    text = f"""extern "C" __global__ void __launch_bounds__({BLOCK}) NAME(PARAMS) {{
    running_sums_by_{way}(x, y, lines, length, inner, reverse, initial);
}}
"""
    made = named_kernel("running", params, text, _INCLUDES)
    numbers = [index.type(number) for number in (lines, length, inner)]
    args = (In(0), Out(0), *numbers, bool(reverse), bool(include_initial))
    blocks = min(lines, 32768) if by_block else blocks_for(lines)
    shared = BLOCK * arithmetic(x.dtype).itemsize if by_block else 0
    return Work([Call(made, (blocks,), args, shared_bytes=shared)], contiguous=(True,))


def _classes(name: str, ins: Sequence[Any], out: Spec, classes: int, count: int, ignore_index: int) -> Work:
    given, index = ins
    supported(name, given.dtype, index.dtype)
    if count == 0:
        return Work([], contiguous=(True, True))
    wide = index_dtype([given, index, out])
    params = [
        pointer("x", given.dtype, const=True),
        pointer("index", index.dtype, const=True),
        pointer("y", out.dtype),
        Param("n", wide),
        Param("classes", wide),
        Param("ignored", DTYPES["int64"]),
    ]
    text = f"""extern "C" __global__ void __launch_bounds__({BLOCK}) NAME(PARAMS) {{
    {name}(x, index, y, n, classes, ignored);
}}
"""
    made = named_kernel("classes", params, text, _INCLUDES)
    args = (In(0), In(1), Out(0), wide.type(count), wide.type(classes), ignore_index)
    return Work([Call(made, (blocks_for(count),), args)], contiguous=(True, True))


@kernel("pick_classes")
def pick_classes(ins: Sequence[Any], outs: Sequence[Spec], *, ignore_index: int) -> Work:
    """One number of each row, 0 where the class is ``ignore_index``."""
    return _classes("pick_classes", ins, outs[0], ins[0].shape[1], outs[0].size, ignore_index)


@kernel("put_classes")
def put_classes(ins: Sequence[Any], outs: Sequence[Spec], *, classes: int, ignore_index: int) -> Work:
    """A row of zeros for each number, with the number at its class."""
    return _classes("put_classes", ins, outs[0], classes, outs[0].size, ignore_index)
