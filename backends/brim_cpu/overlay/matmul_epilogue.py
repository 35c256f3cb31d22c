"""A matrix product with the elementwise formula that follows it, in one native call: each tile of the result goes
through the formula while it is in the caches (native/gemm_epilogue.cpp).

The product is finished in the memory of an output; sums and formula give the bits that the two give by themselves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from brim.backend import ScalarCell
from brim.expr import FusedFormula
from brim.spec import Scalar, Spec
from brim_cpu import native
from brim_cpu.fused_code import typed
from brim_cpu.overlay import NativeKernel, overlay
from brim_cpu.overlay.matmul import BATCH_DIMS, Plan, product_plan, tell_blas
from brim_cpu.overlay.program import Lines, lines_of

__all__ = ["strides_as"]

Array = np.ndarray[Any, Any]

_FUNCTIONS = {
    np.dtype("float32"): native.Function("brim_gemm_epilogue_f32", "ppppp"),
    np.dtype("float64"): native.Function("brim_gemm_epilogue_f64", "ppppp"),
}
_MAX_SLOTS, _MAX_LINES, _REGISTER_BYTES = 64, 64, 32 * 1024
_LINE_ELEMENTS, _FEW_ELEMENTS = 64, 4096
"""An instruction runs on one row at a time: shorter rows are not worth it, unless there are few of them."""


@overlay("matmul_epilogue")
def matmul_epilogue(
    ins: Sequence[Spec | Scalar], outs: Sequence[Spec], *, formula: FusedFormula, shape: tuple[int, ...], **params: Any
) -> NativeKernel | None:
    a, b = ins[:2]
    assert isinstance(a, Spec)
    assert isinstance(b, Spec)
    function = _FUNCTIONS.get(a.dtype)
    if function is None or b.dtype != a.dtype or not all(out.contiguous for out in outs):
        return None
    tell_blas()
    lead = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    made = Spec((*lead, a.shape[-2], b.shape[-1]), a.dtype)
    plan = product_plan(a, b, made)
    columns = b.shape[-1]
    if plan is None or plan.swapped or not shape or shape[-1] != columns:
        return None
    if columns < _LINE_ELEMENTS and made.size > _FEW_ELEMENTS:
        return None
    found = _instructions(formula, ins, outs, Spec(shape, a.dtype))
    if found is None:
        return None
    host, code = found
    fixed = _tables(code, plan, [Spec(shape, a.dtype), *ins[2:]], outs)
    if fixed is None:
        return None
    counts, operands, lines = fixed

    def calls(out: Any, a: Array, b: Array, *others: Any, scratch: Any = None) -> list[Callable[[], None]]:
        made = out if isinstance(out, tuple) else (out,)
        given = (made[host], *others)
        constants, cells = _constants(code, given)
        arrays = [*(given[n] for n in code.arrays), *made]
        bases = np.array([native.pointer(array) for array in arrays], np.int64)
        tables = (counts, operands, lines, constants, bases)
        addresses = np.array([native.pointer(table) for table in tables], np.int64)
        call = function.bind(made[host], a, b, plan.words, addresses)
        call.keeps += (arrays, tables)
        if cells:

            def renew() -> None:
                for place, dtype, cell in cells:
                    place[0] = dtype.type(cell.value)

            call.renewals.append(renew)
        return [call]

    return NativeKernel(calls)


def _instructions(
    formula: FusedFormula, ins: Sequence[Spec | Scalar], outs: Sequence[Spec], product: Spec
) -> tuple[int, Lines] | None:
    """The output in whose memory the product is made, and the formula's instructions; None where there are none.

    That output must be written when the product has been read for the last time, so that it needs no second place.
    """
    if any(step.fn == "uniform" for step in formula.steps):  # numbers that depend on an element's place
        return None
    given = [product, *ins[2:]]
    plain = typed(formula, given)
    scalars = [not isinstance(x, Spec) for x in given]
    for host, out in enumerate(outs):
        if out.dtype != product.dtype:
            continue
        code = lines_of(plain, scalars, [out.dtype for out in outs], frozenset({(host, 0)}))
        if code is not None and not any(code.late):
            return host, code
    return None


def _tables(
    code: Lines, plan: Plan, given: Sequence[Spec | Scalar], outs: Sequence[Spec]
) -> tuple[Array, Array, Array] | None:
    """Counts, operands and lines as gemm_epilogue.hpp has them; None where an operand has no steps for them."""
    shape = outs[0].shape
    rows = []
    for spec in (*(given[n] for n in code.arrays), *outs):
        assert isinstance(spec, Spec)
        strides = (0,) * (len(shape) - spec.ndim) + tuple(0 if d == 1 else s for d, s in zip(spec.shape, spec.strides))
        steps = strides_as(shape, strides, (*plan.batch_shape, plan.rows, plan.columns))
        if steps is None or (steps[-1] != 1 and plan.columns != 1):
            return None
        *batch, down, _ = (step * spec.dtype.itemsize for step in steps)
        rows.append((down, spec.dtype.itemsize, *(0,) * (BATCH_DIMS - len(batch)), *batch))
    slots = len(rows) + len(code.registers)
    if slots > _MAX_SLOTS or len(code.lines) > _MAX_LINES:
        return None
    block = next((b for b in (1024, 512, 256) if len(code.registers) * b * 8 <= _REGISTER_BYTES), 0)
    if not block:
        return None
    counts = (len(rows), len(code.registers), sum(c[0] >= 0 for c in code.constants), len(code.lines), block, block * 8)
    lines = [line[:5] for line in code.lines]
    return np.array(counts, np.int64), np.array(rows, np.int64), np.array(lines, np.int64)


def _constants(code: Lines, given: Sequence[Any]) -> tuple[Array, list[tuple[Array, np.dtype[Any], ScalarCell]]]:
    """The constants as gemm_epilogue.hpp has them, and those that are read anew at each run."""
    table = np.zeros((max(1, len(code.constants)), 3), np.int64)
    cells = []
    for row, (slot, dtype, value, source) in zip(table, code.constants):
        row[:2] = slot, dtype.itemsize
        place = row[2:].view(dtype)
        number = value if source is None else given[source]
        if isinstance(number, ScalarCell):
            cells.append((place, dtype, number))
        else:
            place[0] = dtype.type(number)
    return table, cells


def strides_as(shape: Sequence[int], strides: Sequence[int], target: Sequence[int]) -> tuple[int, ...] | None:
    """Strides that read an array in another shape, element for element in row-major order; None where it takes a copy.

    Axes of one element get stride 0.
    """
    if math.prod(shape) != math.prod(target) or math.prod(shape) == 0:
        return None
    runs: list[tuple[int, int]] = []  # (elements, stride), axes that follow each other merged
    for dim, step in zip(shape, strides):
        if dim == 1:
            continue
        if runs and runs[-1][1] == dim * step:
            runs[-1] = (runs[-1][0] * dim, step)
        else:
            runs.append((dim, step))
    found = [0] * len(target)
    for axis in reversed(range(len(target))):
        dim = target[axis]
        if dim == 1:
            continue
        left, step = runs.pop()
        if left % dim:
            return None
        found[axis] = step
        if left > dim:
            runs.append((left // dim, step * dim))
    return tuple(found)
