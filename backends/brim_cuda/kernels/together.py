"""All elements of many arrays reduced to one number in two launches: norms of gradients, and whether all are finite."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from brim.spec import DTYPES, Spec
from brim_cuda.cuda_c import arithmetic, vector_length
from brim_cuda.launch import BLOCK, C_TYPES, Call, Entry, In, Kernel, Out, Param, Scratch, Table, named_kernel, pointer
from brim_cuda.many_c import PARAMETER_BYTES_MAX
from brim_cuda.registry import Work, kernel

_INCLUDES = ("scalar.cuh", "shared.cuh", "reduce.cuh", "together.cuh")
_INT, _LONG, _U64, _BOOL = (DTYPES[name] for name in ("int32", "int64", "uint64", "bool"))
_CHUNK = 4096
"""Elements of a block, or twice, four times ... as many where that would make too many blocks."""
_BLOCKS = 8192
_OTHER_BYTES = 64
"""Room for the parameters beside the table."""


@kernel("squares_sum")
def squares_sum(ins: Sequence[Any], outs: Sequence[Spec]) -> Work:
    """The sum of all squares; half widths in float32. Not for arrays that add up in different dtypes."""
    sums = {arithmetic(x.dtype) for x in ins if isinstance(x, Spec) and x.dtype.kind != "c"}
    if len(sums) != 1 or any(x.dtype.kind != "f" and x.dtype != DTYPES["bfloat16"] for x in ins):
        raise KeyError("the CUDA backend has no kernel for squares_sum of such arrays together")
    (acc,) = sums
    return _work(f"SquaresSum<{C_TYPES[acc]}>", acc, None, ins, list(range(len(ins))), outs[0])


@kernel("all_finite")
def all_finite(ins: Sequence[Any], outs: Sequence[Spec]) -> Work:
    """Whether all are finite after a multiplication by the first input, a tensor with one element."""
    factor, *arrays = ins
    single, double = DTYPES["float32"], DTYPES["float64"]
    fits = isinstance(factor, Spec) and factor.size == 1 and factor.dtype in (single, double)
    if not arrays or not fits or any(x.dtype not in (single, double) for x in arrays):
        raise KeyError("the CUDA backend has no kernel for all_finite of such arrays")
    return _work("AllFinite<float>", _BOOL, factor.dtype, arrays, list(range(1, len(ins))), outs[0])


def _work(
    struct: str,
    acc: np.dtype[Any],
    factor: np.dtype[Any] | None,
    arrays: Sequence[Spec],
    numbers: Sequence[int],
    out: Spec,
) -> Work:
    """The launches for arrays that are the inputs of these numbers; with ``factor``, input 0 is one of this dtype."""
    chunk = _CHUNK
    while sum(-(-x.size // chunk) for x in arrays) > _BLOCKS + len(arrays):
        chunk *= 2
    alike: dict[np.dtype[Any], list[tuple[int, Spec]]] = {}
    for n, x in zip(numbers, arrays, strict=True):
        if x.size:
            alike.setdefault(x.dtype, []).append((n, x))
    calls: list[Call] = []
    count = 0
    for dtype, members in alike.items():
        while members:
            made, table = _kernel(struct, acc, factor, dtype, len(members))
            room = table["first"].shape[0]
            some, members = members[:room], members[room:]
            values = np.zeros((), table)
            blocks = 0
            for place, (_, x) in enumerate(some):
                values["size"][place], values["first"][place] = x.size, blocks
                blocks += -(-x.size // chunk)
            entries = tuple(Entry("at", (place,), In(n), dtype) for place, (n, _) in enumerate(some))
            own = (In(0),) if factor is not None else ()
            partial = Scratch(count * acc.itemsize)
            args = (*own, partial, np.int32(len(some)), np.int64(chunk), Table(values, entries))
            calls.append(Call(made, (blocks,), args, shared_bytes=BLOCK * acc.itemsize))
            count += blocks
    params = [pointer("partial", acc, const=True), pointer("y", out.dtype), Param("count", _INT)]
    text = f"""extern "C" __global__ void __launch_bounds__({BLOCK}) NAME(PARAMS) {{
    reduce_partial<{struct}>(partial, count, y);
}}
"""
    last = named_kernel("together", params, text, _INCLUDES)
    calls.append(Call(last, (1,), (Scratch(0), Out(0), np.int32(count)), shared_bytes=BLOCK * acc.itemsize))
    # Elements may come in any order, so what is dense in memory is read as it lies.
    contiguous = [False] * (numbers[0] if numbers else 0) + [not _is_dense(x) for x in arrays]
    return Work(calls, scratch_bytes=max(1, count) * acc.itemsize, contiguous=tuple(contiguous))


def _is_dense(x: Spec) -> bool:
    """True when the elements are those of a row-major array whose axes were put in another order."""
    step = 1
    for stride, dim in sorted((stride, dim) for stride, dim in zip(x.strides, x.shape, strict=True) if dim != 1):
        if stride != step:
            return x.size == 0
        step *= dim
    return True


def _kernel(
    struct: str, acc: np.dtype[Any], factor: np.dtype[Any] | None, dtype: np.dtype[Any], parts: int
) -> tuple[Kernel, np.dtype[Any]]:
    """The kernel for arrays of one dtype, and the struct that tells it of them."""
    part_bytes = _U64.itemsize + _LONG.itemsize + _INT.itemsize
    room = (PARAMETER_BYTES_MAX - _OTHER_BYTES) // part_bytes // 4 * 4
    parts = max(4, min(room, 1 << (parts - 1).bit_length()))
    fields = [("at", _U64, (parts,)), ("size", _LONG, (parts,)), ("first", _INT, (parts,))]
    table = np.dtype(fields, align=True)
    members = "\n".join(f"    {C_TYPES[d]} {name}[{dims[0]}];" for name, d, dims in fields)
    params = [] if factor is None else [pointer("factor", factor, const=True)]
    params += [pointer("partial", acc), Param("parts", _INT), Param("chunk", _LONG)]
    params += [Param("table", table, ctype="const __grid_constant__ NAME_table")]
    x = C_TYPES[dtype]
    times = f"cast<{x}>({'1.0f' if factor is None else 'factor[0]'})"
    most = 1 << (parts - 1).bit_length()
    # A grid constant stays in the parameters: others the compiler may copy to local memory, where indices vary.
    text = f"""#ifdef BRIM_EMULATION
#define __grid_constant__
#endif
struct NAME_table {{
{members}
}};
extern "C" __global__ void __launch_bounds__({BLOCK}) NAME(PARAMS) {{
    reduce_together<{struct}, {x}, {vector_length([dtype], False)}, {most}>(table, parts, chunk, {times}, partial);
}}
"""
    return named_kernel("together", params, text, _INCLUDES), table
