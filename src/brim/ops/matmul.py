"""Matrix products and what is made of them: matmul, matrix_transpose, tensordot, vecdot."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from brim.autocast import as_one
from brim.errors import DTypeError, ShapeError
from brim.op import Op, primitive
from brim.ops.arithmetic import astype, multiply
from brim.ops.movement import permute_dims, reshape, swapaxes
from brim.ops.reduce import sum as _sum
from brim.precision import product_params
from brim.spec import DTYPES, Spec, broadcast_shapes, normalize_axis, promote


def _matmul_spec(a: Spec, b: Spec, *, tf32: bool = False) -> Spec:
    if a.ndim < 2 or b.ndim < 2 or a.dtype != b.dtype:
        raise ShapeError(f"the primitive matmul needs matrices of one dtype, got {a} and {b}; use brim.matmul")
    if a.shape[-1] != b.shape[-2]:
        raise ShapeError(
            f"matmul: the last axis of {a.shape} (size {a.shape[-1]}) and the second last of {b.shape} "
            f"(size {b.shape[-2]}) must be equal"
        )
    return Spec((*broadcast_shapes(a.shape[:-2], b.shape[:-2]), a.shape[-2], b.shape[-1]), a.dtype)


_matmul: Op = primitive(
    "matmul",
    _matmul_spec,
    vjp=lambda g, a, b, _out, *, tf32=False: (lambda: _grad_left(g, a, b), lambda: _grad_right(g, a, b)),
    arity=2,
    doc="product of matrices over leading batch axes; float16 and bfloat16 are added up in float32",
)


def _is_transposed(x: Any) -> bool:
    """True for a transposed view of row-major matrices: its gradient is made in that layout and needs no copy."""
    return x.spec.layout is not None and not x.spec.contiguous and matrix_transpose(x).spec.contiguous


def _grad_left(g: Any, a: Any, b: Any) -> Any:
    if _is_transposed(a):
        return matrix_transpose(matmul(b, matrix_transpose(g)))
    return matmul(g, matrix_transpose(b))


def _grad_right(g: Any, a: Any, b: Any) -> Any:
    if b.ndim == 2 and a.ndim > 2 and math.prod(a.shape[:-2]) > 1 and a.shape[:-2] == g.shape[:-2]:
        # one matrix product sums over the batch, without a matrix for every member of it
        rows = math.prod(a.shape[:-1])
        a, g = reshape(a, (rows, a.shape[-1])), reshape(g, (rows, g.shape[-1]))
    if _is_transposed(b):
        return matrix_transpose(matmul(matrix_transpose(g), a))
    return matmul(matrix_transpose(a), g)


def _readable(x: Any) -> Any:
    """``x``, or a copy where matrix libraries cannot read its layout: one of the last two axes must be dense."""
    spec = getattr(x, "spec", None)
    if spec is None or spec.layout is None:
        return x
    rows, columns = spec.shape[-2:]
    row_stride, column_stride = spec.layout[-2:]
    by_rows = (column_stride == 1 or columns == 1) and (row_stride >= columns or rows == 1)
    by_columns = (row_stride == 1 or rows == 1) and (column_stride >= rows or columns == 1)
    return x if by_rows or by_columns else x.copy()


@as_one("matmul")
def matmul(x: Any, y: Any) -> Any:
    """Matrix product: ``out[..., i, j] = sum_k x[..., i, k] * y[..., k, j]``.

    Arguments:
        x: (..., M, K), or (K,) read as a row that is gone from the result.
        y: (..., K, N), or (K,) read as a column that is gone from the result.

    Returns:
        (..., M, N) with the leading axes broadcast. float16 and bfloat16 are added up in float32, bools in int64.

    Raises:
        ShapeError: a scalar, unequal K, or leading axes that do not broadcast.
    """
    if x.ndim == 0 or y.ndim == 0:
        raise ShapeError(f"matmul needs at least one axis on both sides, got shapes {x.shape} and {y.shape}")
    if x.shape[-1] != y.shape[-2 if y.ndim > 1 else 0]:
        raise ShapeError(
            f"matmul: the last axis of {x.shape} and axis {-2 if y.ndim > 1 else 0} of {y.shape} must have equal sizes"
        )
    dtype = promote(x.dtype, y.dtype)
    if dtype.kind == "b":
        dtype = DTYPES["int64"]
    x, y = astype(x, dtype), astype(y, dtype)
    row, column = x.ndim == 1, y.ndim == 1
    if row:
        x = reshape(x, (1, x.shape[0]))
    if column:
        y = reshape(y, (y.shape[0], 1))
    lead = x.shape[:-1]
    how = product_params(dtype)
    if x.ndim > 2 and y.ndim == 2 and getattr(x, "spec", None) is not None and x.spec.contiguous:
        out = _matmul(reshape(x, (math.prod(lead), x.shape[-1])), _readable(y), **how)
        out = reshape(out, (*lead, y.shape[-1]))
    else:
        out = _matmul(_readable(x), _readable(y), **how)
    if row or column:
        kept = out.shape[:-2] + (() if row else out.shape[-2:-1]) + (() if column else out.shape[-1:])
        out = reshape(out, kept)
    return out


def matrix_transpose(x: Any) -> Any:
    """A view with the last two axes exchanged. Raises ShapeError for fewer than two axes."""
    if x.ndim < 2:
        raise ShapeError(f"matrix_transpose needs at least two axes, got shape {x.shape}")
    return swapaxes(x, -2, -1)


def tensordot(x: Any, y: Any, axes: int | Sequence[Sequence[int]] = 2) -> Any:
    """Sum of products over pairs of axes.

    Arguments:
        axes: N: the last N axes of ``x`` with the first N of ``y``; or two sequences of axes, paired in order.

    Returns:
        The remaining axes of ``x``, then those of ``y``.
    """
    if isinstance(axes, Sequence):
        first, second = (tuple(a) if isinstance(a, Sequence) else (a,) for a in axes)
    else:
        if not 0 <= axes <= min(x.ndim, y.ndim):
            raise ShapeError(f"tensordot over {axes} axes of tensors with {x.ndim} and {y.ndim} axes")
        first, second = tuple(range(x.ndim - axes, x.ndim)), tuple(range(axes))
    first = tuple(normalize_axis(a, x.ndim) for a in first)
    second = tuple(normalize_axis(a, y.ndim) for a in second)
    sizes_x, sizes_y = tuple(x.shape[a] for a in first), tuple(y.shape[a] for a in second)
    if sizes_x != sizes_y or len(set(first)) != len(first) or len(set(second)) != len(second):
        raise ShapeError(f"tensordot over axes {first} of {x.shape} and {second} of {y.shape}: sizes must pair up")
    keep_x = tuple(a for a in range(x.ndim) if a not in first)
    keep_y = tuple(a for a in range(y.ndim) if a not in second)
    rows, columns = tuple(x.shape[a] for a in keep_x), tuple(y.shape[a] for a in keep_y)
    inner = math.prod(sizes_x)
    left = reshape(permute_dims(x, keep_x + first), (math.prod(rows), inner))
    right = reshape(permute_dims(y, second + keep_y), (inner, math.prod(columns)))
    return reshape(matmul(left, right), rows + columns)


def vecdot(x: Any, y: Any, axis: int = -1) -> Any:
    """``sum_k conj(x[..., k]) * y[..., k]`` along one axis, the others broadcast (real inputs only)."""
    dtype = promote(x.dtype, y.dtype)
    if dtype.kind == "c":
        raise DTypeError("vecdot of complex tensors: write (brim.conj(x) * y).sum(axis)")
    shape = broadcast_shapes(x.shape, y.shape)
    least = min(x.ndim, y.ndim)
    last = normalize_axis(axis, least) - least
    if x.shape[last] != y.shape[last]:
        raise ShapeError(f"vecdot: axis {axis} of {x.shape} and {y.shape} must have equal sizes")
    return _sum(multiply(x, y), axis=len(shape) + last, dtype=dtype)


__all__ = ["matmul", "matrix_transpose", "tensordot", "vecdot"]
