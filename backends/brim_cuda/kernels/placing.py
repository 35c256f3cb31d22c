"""Values made from numbers, dropout, and elements moved from place to place: slices, concatenation, triangles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from brim.expr import FormulaBuilder
from brim.spec import DTYPES, Spec, is_float
from brim_cuda.cuda_c import arithmetic
from brim_cuda.elementwise import copy_calls, fused_calls
from brim_cuda.kernels.indexing import INCLUDES, copy_first, supported
from brim_cuda.launch import BLOCK, Call, In, Out, Param, blocks_for, index_dtype, named_kernel, pointer
from brim_cuda.registry import Work, kernel

_F32 = DTYPES["float32"]


@kernel("fill")
def fill(ins: Sequence[Any], outs: Sequence[Spec], **params: Any) -> Work:
    """One number everywhere."""
    return Work(copy_calls(ins[0], outs[0], In(0), Out(0)))


@kernel("iota")
def iota(ins: Sequence[Any], outs: Sequence[Spec], *, count: int, last: Any, **params: Any) -> Work:
    """start + i * step, in int64 where both are integers, else in float64."""
    (out,) = outs
    supported("iota", out.dtype)
    if count == 0:
        return Work([])
    compute = DTYPES["int64" if all(isinstance(x, int) for x in ins) else "float64"]
    index = index_dtype(outs)
    parameters = [
        pointer("y", out.dtype),
        Param("n", index),
        Param("start", compute),
        Param("step", compute),
        Param("last", out.dtype),
        Param("has_last", DTYPES["bool"]),
    ]
    text = f"""extern "C" __global__ void __launch_bounds__({BLOCK}) NAME(PARAMS) {{
    iota(y, n, start, step, last, has_last);
}}
"""
    made = named_kernel("iota", parameters, text, INCLUDES)
    final = out.dtype.type(0 if last is None else last)
    args = (Out(0), index.type(count), In(0), In(1), final, last is not None)
    return Work([Call(made, (blocks_for(count),), args)])


@kernel("dropout")
def dropout(ins: Sequence[Any], outs: Sequence[Spec], *, p: float) -> Work:
    """x / (1 - p), and 0 where the number drawn for the element is below p; nothing is stored."""
    dtype = outs[0].dtype
    compute = arithmetic(dtype)
    builder = FormulaBuilder([x.dtype if isinstance(x, Spec) else None for x in ins])
    uniform = builder.step("uniform", [("in", 1), ("in", 2)], DTYPES["uint64"], _F32)
    dropped = builder.call("lt", [uniform, ("const", p)], _F32)
    # The scale is rounded to the dtype of x first.
    scale = float(dtype.type(1.0 / (1.0 - p) if p < 1.0 else 0.0)) if is_float(dtype) else 0.0
    scaled = builder.cast(builder.call("mul", [("in", 0), ("const", scale)], compute), dtype)
    result = builder.call("where", [dropped, ("const", 0.0), scaled], dtype)
    return Work(fused_calls(builder.formula([builder.result(result, dtype, dtype)]), ins, outs), aliasing=True)


def _window(spec: Spec, index: Sequence[tuple[int, int, int]]) -> tuple[Spec, int]:
    """The part of an array that (start, step, count) of each axis choose, and where it starts."""
    shape = tuple(count for _, _, count in index)
    steps = tuple(step * stride for (_, step, _), stride in zip(index, spec.strides, strict=True))
    offset = sum(start * stride for (start, _, count), stride in zip(index, spec.strides, strict=True) if count)
    return Spec(shape, spec.dtype, steps), offset


@kernel("set_slice")
def set_slice(ins: Sequence[Any], outs: Sequence[Spec], *, index: Any, shape: Any) -> Work:
    """A copy of x with other values in a slice."""
    x, values = ins
    (out,) = outs
    calls = copy_first(x, out)
    window, offset = _window(out, index)
    if isinstance(values, Spec):
        values = Spec(values.shape[1:], values.dtype, values.strides[1:])
    calls += copy_calls(values, window, In(1), Out(0, offset)) if window.size else []
    return Work(calls, aliasing=True)


@kernel("concat")
def concat(ins: Sequence[Any], outs: Sequence[Spec], *, axis: int) -> Work:
    """Arrays one after another along an axis."""
    (out,) = outs
    calls: list[Call] = []
    start = 0
    for n, x in enumerate(ins):
        window = Spec(x.shape, out.dtype, out.strides)
        calls += copy_calls(x, window, In(n), Out(0, start * out.strides[axis]))
        start += x.shape[axis]
    return Work(calls)


@kernel("triangle")
def triangle(ins: Sequence[Any], outs: Sequence[Spec], *, k: int, upper: bool) -> Work:
    """x below (above) a diagonal, else 0."""
    x: Spec = ins[0]
    supported("triangle", x.dtype)
    contiguous = (True,)
    if x.size == 0:
        return Work([], contiguous=contiguous)
    index = index_dtype([x])
    rows, columns = x.shape[-2:]
    params = [
        pointer("x", x.dtype, const=True),
        pointer("y", x.dtype),
        *(Param(name, index) for name in ("n", "rows", "columns", "k")),
        Param("upper", DTYPES["bool"]),
    ]
    text = f"""extern "C" __global__ void __launch_bounds__({BLOCK}) NAME(PARAMS) {{
    triangle(x, y, n, rows, columns, k, upper);
}}
"""
    made = named_kernel("triangle", params, text, INCLUDES)
    limit = max(-rows, min(columns, k))  # beyond, nothing changes
    numbers = [index.type(number) for number in (x.size, rows, columns, limit)]
    args = (In(0), Out(0), *numbers, bool(upper))
    return Work([Call(made, (blocks_for(x.size),), args)], contiguous=contiguous)
