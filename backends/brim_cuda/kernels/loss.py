"""Cross-entropy of rows against classes, and its gradient: one launch each, or one for both; no log-probabilities are
stored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from brim.spec import DTYPES, Scalar, Spec
from brim_cuda.cuda_c import arithmetic
from brim_cuda.kernels.indexing import supported
from brim_cuda.kernels.rows import INCLUDES, Lines, call
from brim_cuda.kernels.softmax import floats
from brim_cuda.launch import BLOCK, C_TYPES, Call, In, Out, Param, index_dtype, named_kernel, pointer
from brim_cuda.registry import Work, kernel

__all__ = ["joins_loss_gradient"]

_MAX_BLOCKS = 32768


def _call(
    function: str, arrays: list[tuple[Param, Any]], x: Spec, specs: Sequence[Spec], how: dict[str, Any], shared: int
) -> Call:
    compute, index = arithmetic(x.dtype), index_dtype(specs)
    rest = [
        (Param("ignored", DTYPES["int64"]), how["ignore_index"]),
        (Param("smoothing", compute), compute.type(how["smoothing"])),
    ]
    return call(function, arrays, Lines(x.shape[0], x.shape[1]), rest, index, "loss", shared_bytes=shared)


_LONG = 16384
"""Rows of so many classes have a block of 1,024 threads each, so that few rows are under way and stay in the caches."""
_HELD_BYTES = {256: 96, 1024: 64}
"""What a thread of such a block keeps of a row in registers, at most."""


def _dealt(x: Spec) -> tuple[int, int, int, int]:
    """(threads of a block, threads of a row, elements of a unit, units that a thread holds) for rows of scores."""
    count, compute = x.shape[1], arithmetic(x.dtype)
    v = next(v for v in (8, 4, 2, 1) if count % v == 0)
    threads = 1024 if count >= _LONG else BLOCK
    units = count // v
    lanes = threads if threads > BLOCK else Lines(x.shape[0], units).lanes
    most = max(1, _HELD_BYTES[threads] // (v * compute.itemsize))
    return threads, lanes, v, min(-(-units // lanes), most)


def _rows(x: Spec, arrays: Sequence[tuple[Param, Any]], specs: Sequence[Spec], how: dict[str, Any], g: int) -> Call:
    """The launch of ``cross_entropy_rows``.

    Arguments:
        arrays: (parameter, argument) of x, index and losses; then of top and total, or of g and y.
        g: elements from one gradient to the next; -1: there is no gradient.
    """
    threads, lanes, v, held = _dealt(x)
    compute, index = arithmetic(x.dtype), index_dtype(specs)
    rest = [
        (Param("lines", index), index.type(x.shape[0])),
        (Param("count", index), index.type(x.shape[1])),
        (Param("g_step", index), index.type(max(g, 0))),
        (Param("ignored", DTYPES["int64"]), how["ignore_index"]),
        (Param("smoothing", compute), compute.type(how["smoothing"])),
        (Param("lanes", DTYPES["int32"]), lanes),
        (Param("across", DTYPES["bool"]), False),
    ]
    names = [param.name for param, _ in arrays]
    none = f"({C_TYPES[compute]}*)nullptr", f"(const {C_TYPES[x.dtype]}*)nullptr", f"({C_TYPES[x.dtype]}*)nullptr"
    names = [*names, *none[1:]] if g < 0 else [*names[:3], none[0], none[0], *names[3:]]
    operands = [*arrays, *rest]
    given = ", ".join([*names, *(param.name for param, _ in rest)])
    text = f"""extern "C" __global__ void __launch_bounds__({threads}) NAME(PARAMS) {{
    cross_entropy_rows<{str(g >= 0).lower()}, {v}, {held}>({given});
}}
"""
    kernel = named_kernel("loss", [p for p, _ in operands], text, (*INCLUDES, "softmax.cuh", "loss.cuh"))
    blocks = min(-(-x.shape[0] // (threads // lanes)), _MAX_BLOCKS)
    shared = 2 * compute.itemsize * threads if lanes > 1 else 0
    return Call(kernel, (blocks,), tuple(a for _, a in operands), threads=threads, shared_bytes=shared)


@kernel("cross_entropy")
def cross_entropy(ins: Sequence[Any], outs: Sequence[Spec], **how: Any) -> Work:
    """Losses, largest scores and logarithms of sums, from one reading of the scores."""
    x, index = ins
    losses, top, total = outs
    floats("cross_entropy", x, losses, top, total)
    supported("cross_entropy", index.dtype)
    contiguous = (True, True)
    if x.size == 0:
        return Work([], contiguous=contiguous)
    compute = arithmetic(x.dtype)
    arrays = [
        (pointer("x", x.dtype, const=True), In(0)),
        (pointer("index", index.dtype, const=True), In(1)),
        (pointer("losses", losses.dtype), Out(0)),
        (pointer("top", compute), Out(1)),
        (pointer("total", compute), Out(2)),
    ]
    return Work([_rows(x, arrays, [x, index], how, -1)], contiguous=contiguous)


@kernel("cross_entropy_with_grad")
def cross_entropy_with_grad(ins: Sequence[Any], outs: Sequence[Spec], **how: Any) -> Work:
    """Losses and their gradient from one reading of the scores, which the gradient may lie over."""
    x, index, g = ins
    losses, out = outs
    floats("cross_entropy_with_grad", x, g, losses, out)
    supported("cross_entropy_with_grad", index.dtype)
    step = g.strides[0] if g.size > 1 else 0
    contiguous = (True, True, step < 0)
    if x.size == 0:
        return Work([], contiguous=contiguous)
    arrays = [
        (pointer("x", x.dtype, const=True), In(0)),
        (pointer("index", index.dtype, const=True), In(1)),
        (pointer("losses", losses.dtype), Out(0)),
        (pointer("g", g.dtype, const=True), In(2)),
        (pointer("y", out.dtype), Out(1)),
    ]
    call = _rows(x, arrays, [x, index, g], how, 1 if step < 0 else step)
    return Work([call], contiguous=contiguous, aliasing=True)


def joins_loss_gradient(
    name: str, ins: Sequence[Spec | Scalar], outs: Sequence[Spec], params: dict[str, Any]
) -> bool:  # fmt: skip
    """Whether a loss and its gradient are one launch."""
    try:
        return name == "cross_entropy_with_grad" and bool(cross_entropy_with_grad(ins, outs, **params).calls)
    except KeyError:
        return False


@kernel("cross_entropy_grad")
def cross_entropy_grad(ins: Sequence[Any], outs: Sequence[Spec], **how: Any) -> Work:
    """One reading of the scores and one writing of their gradient."""
    g, x, index, top, total = ins
    (out,) = outs
    floats("cross_entropy_grad", g, x, top, total, out)
    if {top.dtype, total.dtype} != {arithmetic(x.dtype)}:
        raise KeyError("the CUDA backend has no kernel for cross_entropy_grad with sums in another dtype than its own")
    supported("cross_entropy_grad", index.dtype)
    contiguous = (True,) * 5
    if out.size == 0:
        return Work([], contiguous=contiguous)
    arrays: list[tuple[Param, Any]] = [
        (pointer(name, spec.dtype, const=True), In(n))
        for n, (name, spec) in enumerate(zip(("g", "x", "index", "top", "total"), ins, strict=True))
    ]
    arrays.append((pointer("y", out.dtype), Out(0)))
    return Work(
        [_call("cross_entropy_grad_lines", arrays, x, [x, index], how, 0)], contiguous=contiguous, aliasing=True
    )
