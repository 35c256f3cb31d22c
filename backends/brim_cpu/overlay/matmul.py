"""Matrix products of float32 and float64 on the team of threads: where each operand lies, and how the work is cut."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np

from brim.spec import Spec
from brim_cpu import native, openblas
from brim_cpu.overlay import NativeKernel, overlay

__all__ = ["BATCH_DIMS", "Plan", "product_plan", "tell_blas"]

Array = np.ndarray[Any, Any]

_SET_BLAS = native.Function("brim_set_blas", "pppp")
_GEMM = {
    np.dtype("float32"): native.Function("brim_gemm_f32", "pppp"),
    np.dtype("float64"): native.Function("brim_gemm_f64", "pppp"),
}
BATCH_DIMS = 4

PIECE_OPERATIONS = 1 << 20
"""Multiplications and additions of a piece, at least: some microseconds; less is not worth another thread's waking."""
TILE_OPERATIONS = 128 << 20
"""A large product is cut into tiles of about so many: each packs its operands anew."""
FEW_ROWS, FEW_ROWS_BYTES = 4, 384 * 1024
"""Products of so few rows read B once, which takes the time; so many bytes of it are a piece, at least."""


@functools.cache
def tell_blas() -> None:
    """Give the native library NumPy's OpenBLAS, where there is one; without it all products are brim's own."""
    found = openblas.find()
    if found is not None:
        _SET_BLAS.bind(*found)()


@overlay("matmul")
def matmul(ins: Any, outs: Any, **params: Any) -> NativeKernel | None:
    a, b = ins
    (out,) = outs
    function = _GEMM.get(out.dtype)
    if function is None or a.dtype != out.dtype or b.dtype != out.dtype:
        return None
    tell_blas()
    plan = product_plan(a, b, out)
    if plan is None:
        return None

    def calls(out: Array, a: Array, b: Array, scratch: Any = None) -> list[Any]:
        x, y = (b, a) if plan.swapped else (a, b)
        return [function.bind(out, x, y, plan.words)]

    return NativeKernel(calls)


class Plan:
    """A product as gemm.cpp reads it.

    Attributes:
        swapped: the transposed result is computed, from b and a.
        batch_shape, rows, columns: how the result is cut into matrices; batch axes may be merged, also with rows.
    """

    def __init__(self, words: list[int], swapped: bool, batch_shape: tuple[int, ...], rows: int, columns: int) -> None:
        self.words, self.swapped = np.array(words, np.int64), swapped
        self.batch_shape, self.rows, self.columns = batch_shape, rows, columns


def product_plan(a: Spec, b: Spec, out: Spec) -> Plan | None:
    """How a product of these specs is computed; None where an operand has no side that BLAS can read."""
    m, k, n = a.shape[-2], a.shape[-1], b.shape[-1]
    if out.size == 0 or k == 0:
        return None
    lead = out.shape[:-2]
    steps = [_broadcast_strides(spec, lead) for spec in (a, b, out)]
    sides = [_side(spec) for spec in (a, b, out)]
    if None in sides:
        return None
    (ta, lda), (tb, ldb), (swapped, ldc) = sides  # type: ignore[misc]
    # A right operand that all products share: the left ones are one tall matrix.
    if lead and not ta and not swapped and not any(steps[1]) and _stacked(a, lda) and _stacked(out, ldc):
        m, lead, steps = m * math.prod(lead), (), [(), (), ()]
    if n == 1 and m > 1 and ldc == 1 and not ta:  # a vector: its elements are dot products, as of a row of out.T
        swapped = True
    if swapped:  # out.T = b.T a.T
        m, n = n, m
        ta, lda, tb, ldb = not tb, ldb, not ta, lda
        steps = [steps[1], steps[0], steps[2]]
    if m == 1 and lda == 1:  # one row is one row, however it is stored
        ta, lda = False, k
    if n == 1 and ldb == 1:
        tb, ldb = True, k
    lead, steps = _merged(lead, steps)
    if len(lead) > BATCH_DIMS:
        return None
    batch = math.prod(lead)
    tile_m, tile_n, per_piece = _tiles(m, n, k, batch, out.dtype.itemsize)
    pad = BATCH_DIMS - len(lead)
    words = [int(ta), int(tb), m, n, k, lda, ldb, ldc, tile_m, tile_n, per_piece, batch]
    words += [*(1,) * pad, *lead]
    for step in steps:
        words += [*(0,) * pad, *step]
    return Plan(words, bool(swapped), lead, m, n)


def _side(spec: Spec) -> tuple[bool, int] | None:
    """(whether it is stored transposed, its leading dimension); None where neither side is contiguous."""
    rows, columns = spec.shape[-2:]
    down, across = spec.strides[-2:]
    if (across == 1 or columns == 1) and (rows == 1 or down >= columns):
        return False, max(columns, 1) if rows == 1 else down
    if (down == 1 or rows == 1) and (columns == 1 or across >= rows):
        return True, max(rows, 1) if columns == 1 else across
    return None


def _broadcast_strides(spec: Spec, lead: tuple[int, ...]) -> tuple[int, ...]:
    own = tuple(0 if dim == 1 else step for dim, step in zip(spec.shape[:-2], spec.strides[:-2]))
    return (0,) * (len(lead) - len(own)) + own


def _stacked(spec: Spec, leading: int) -> bool:
    """True when the matrices of a batch lie one below the other, at one distance from row to row."""
    expected = leading * spec.shape[-2]
    for dim, step in zip(reversed(spec.shape[:-2]), reversed(spec.strides[:-2])):
        if dim != 1 and step != expected:
            return False
        expected *= dim
    return spec.shape[-2] == 1 or spec.strides[-2] == leading


def _merged(lead: tuple[int, ...], steps: list[tuple[int, ...]]) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
    """Batch axes without those of one element, neighbours merged where all operands allow it."""
    shape: list[int] = []
    merged: list[list[int]] = [[] for _ in steps]
    for axis, dim in enumerate(lead):
        if dim == 1:
            continue
        if shape and all(m[-1] == s[axis] * dim for m, s in zip(merged, steps)):
            shape[-1] *= dim
            for m, s in zip(merged, steps):
                m[-1] = s[axis]
        else:
            shape.append(dim)
            for m, s in zip(merged, steps):
                m.append(s[axis])
    return tuple(shape), [tuple(m) for m in merged]


def _tiles(m: int, n: int, k: int, batch: int, itemsize: int) -> tuple[int, int, int]:
    """Rows and columns of a tile, and how many tiles are one piece of work; by the shapes alone."""
    work = 2 * m * n * k
    if batch > 1 and work < TILE_OPERATIONS:
        return m, n, max(1, PIECE_OPERATIONS // max(1, work))
    if m <= FEW_ROWS:
        pieces = max(1, min(64, n * k * itemsize // FEW_ROWS_BYTES))
    else:
        pieces = max(2 if work >= 2 * PIECE_OPERATIONS else 1, min(64, work // TILE_OPERATIONS))
    cuts = (pieces - 1).bit_length()  # halvings; more pieces than asked for rather than less
    halvings = range(1) if m <= FEW_ROWS else range(cuts + 1)
    wide = 128 if m <= FEW_ROWS else 32  # few rows: what the registers hold of a row of B, else a packed panel
    tiles = [(_cut(m, 1 << down, 12), _cut(n, 1 << (cuts - down), wide)) for down in halvings]
    return *min(tiles, key=lambda tile: _cost(m, n, *tile)), 1


def _cost(m: int, n: int, tile_m: int, tile_n: int) -> float:
    """Time of a product cut into such tiles, if all take as long as the largest, relative to one that is not cut.

    Each column of tiles packs A anew, each row of tiles packs B, which is read from farther away: measured, an element
    costs as much as 8 and 24 products.
    """
    tiles = -(-m // tile_m) * -(-n // tile_n)
    return tiles * tile_m * tile_n / (m * n) * (1 + 24 / tile_m + 8 / tile_n)


def _cut(size: int, parts: int, multiple: int) -> int:
    return min(size, -(-size // (parts * multiple)) * multiple)
