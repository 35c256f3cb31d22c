"""What is known of an array before it exists: shape, dtype and layout, and the rules that combine them.

``Spec`` describes an array without holding one; its ``nbytes`` is exact. Broadcasting and dtype promotion are decided
here and nowhere else.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import ml_dtypes
import numpy as np

from brim.errors import DTypeError, ShapeError

__all__ = [
    "DTYPES",
    "Scalar",
    "Shape",
    "Spec",
    "as_dtype",
    "as_shape",
    "broadcast_shapes",
    "default_float",
    "is_complex",
    "is_float",
    "is_inexact",
    "is_integer",
    "normalize_axes",
    "normalize_axis",
    "promote",
    "row_major",
]

Shape = tuple[int, ...]
Scalar = bool | int | float | complex

DTYPES: dict[str, np.dtype[Any]] = {
    name: np.dtype(name)
    for name in (
        "bool",
        "int8",
        "int16",
        "int32",
        "int64",
        "uint8",
        "uint16",
        "uint32",
        "uint64",
        "float16",
        "float32",
        "float64",
        "complex64",
        "complex128",
    )
}
DTYPES["bfloat16"] = np.dtype(ml_dtypes.bfloat16)

default_float = DTYPES["float32"]
_FLOATS = frozenset(DTYPES[name] for name in ("float16", "bfloat16", "float32", "float64"))
_COMPLEX = frozenset(DTYPES[name] for name in ("complex64", "complex128"))
_SUPPORTED = frozenset(DTYPES.values())


@lru_cache(maxsize=256)
def _named_dtype(name: Any) -> np.dtype[Any]:
    if isinstance(name, str) and name in DTYPES:
        return DTYPES[name]
    try:
        dtype = np.dtype(name).newbyteorder("=")
    except TypeError as error:
        raise DTypeError(f"{name!r} is not a dtype; brim knows {', '.join(DTYPES)}") from error
    if dtype not in _SUPPORTED:
        raise DTypeError(f"dtype {dtype} is not supported; brim knows {', '.join(DTYPES)}")
    return dtype


def as_dtype(dtype: Any) -> np.dtype[Any]:
    """The NumPy dtype object for a name, a NumPy or Python type, or a dtype. Raises DTypeError if brim lacks it."""
    if isinstance(dtype, np.dtype) and dtype in _SUPPORTED:
        return dtype
    if dtype is float:
        return default_float
    return _named_dtype(dtype)


def is_float(dtype: np.dtype[Any]) -> bool:
    """True for float16, bfloat16, float32 and float64."""
    return dtype in _FLOATS


def is_complex(dtype: np.dtype[Any]) -> bool:
    """True for complex64 and complex128."""
    return dtype in _COMPLEX


def is_inexact(dtype: np.dtype[Any]) -> bool:
    """True for floats and complex numbers."""
    return dtype in _FLOATS or dtype in _COMPLEX


def is_integer(dtype: np.dtype[Any]) -> bool:
    """True for signed and unsigned integers (not bool)."""
    return dtype.kind in "iu"


def _rank(dtype: np.dtype[Any]) -> int:
    if dtype.kind == "b":
        return 0
    if dtype.kind in "iu":
        return 1
    return 3 if dtype in _COMPLEX else 2


@lru_cache(maxsize=1024)
def _promote_pair(a: np.dtype[Any], b: np.dtype[Any]) -> np.dtype[Any]:
    if a == b:
        return a
    rank_a, rank_b = _rank(a), _rank(b)
    if rank_a != rank_b and max(rank_a, rank_b) < 3:
        return a if rank_a > rank_b else b  # integers and booleans never widen a float
    if {a, b} == {DTYPES["float16"], DTYPES["bfloat16"]}:
        return default_float
    if DTYPES["bfloat16"] in (a, b):
        other = b if a == DTYPES["bfloat16"] else a
        return other
    if 3 in (rank_a, rank_b) and min(rank_a, rank_b) < 2:
        return a if rank_a == 3 else b
    promoted = np.promote_types(a, b)
    if is_float(promoted) and rank_a == rank_b == 1:
        raise DTypeError(f"{a} and {b} have no common integer dtype; convert one with astype()")
    return promoted


_SCALAR_RANK = {bool: 0, int: 1, float: 2, complex: 3}


def promote(*operands: np.dtype[Any] | Scalar) -> np.dtype[Any]:
    """The dtype in which operands meet.

    Array API rules within a kind; between kinds a float wins over integers and keeps its width (as in PyTorch);
    float16 with bfloat16 gives float32; a Python scalar never widens an array, it only lifts its kind
    (``int32 array + 0.5`` is float32).

    Arguments:
        operands: dtypes of arrays, and Python scalars.

    Raises:
        DTypeError: uint64 with a signed integer.
    """
    dtype: np.dtype[Any] | None = None
    scalar_rank = -1
    for operand in operands:
        if isinstance(operand, np.dtype):
            dtype = operand if dtype is None else _promote_pair(dtype, operand)
        else:
            scalar_rank = max(scalar_rank, _SCALAR_RANK[type(operand)])
    if dtype is None:
        return (DTYPES["bool"], DTYPES["int64"], default_float, DTYPES["complex64"])[scalar_rank]
    if scalar_rank > _rank(dtype):
        if scalar_rank == 1:
            return DTYPES["int64"]
        if scalar_rank == 2:
            return default_float
        return DTYPES["complex128"] if dtype == DTYPES["float64"] else DTYPES["complex64"]
    return dtype


def as_shape(shape: int | Iterable[int]) -> Shape:
    """A tuple of non-negative ints from an int or an iterable. Raises ShapeError for anything else."""
    try:
        dims = (operator.index(shape),) if not isinstance(shape, Iterable) else tuple(map(operator.index, shape))
    except TypeError as error:
        raise ShapeError(f"a shape is an int or a sequence of ints, not {shape!r}") from error
    if any(dim < 0 for dim in dims):
        raise ShapeError(f"a shape has no negative sizes: {dims}")
    return dims


@lru_cache(maxsize=4096)
def _broadcast_pair(a: Shape, b: Shape) -> Shape:
    if len(a) < len(b):
        a = (1,) * (len(b) - len(a)) + a
    elif len(b) < len(a):
        b = (1,) * (len(a) - len(b)) + b
    out = []
    for m, n in zip(a, b, strict=True):
        if m != n and m != 1 and n != 1:
            raise ValueError
        out.append(n if m == 1 else m)
    return tuple(out)


def broadcast_shapes(*shapes: Shape) -> Shape:
    """The common shape under NumPy broadcasting. Raises ShapeError naming every shape."""
    out: Shape = ()
    for shape in shapes:
        if out != shape:
            try:
                out = _broadcast_pair(out, shape)
            except ValueError:
                listed = " and ".join(map(str, shapes))
                raise ShapeError(
                    f"shapes {listed} do not broadcast: aligned from the right, sizes must be equal or 1"
                ) from None
    return out


@lru_cache(maxsize=4096)
def row_major(shape: Shape) -> tuple[int, ...]:
    """Strides in elements of a contiguous array."""
    strides, step = [], 1
    for dim in reversed(shape):
        strides.append(step)
        step *= max(dim, 1)
    return tuple(reversed(strides))


def normalize_axis(axis: int, ndim: int, what: str = "axis") -> int:
    """The non-negative axis for ``axis`` in an array of ``ndim`` axes. Raises ShapeError when out of range."""
    try:
        index = operator.index(axis)
    except TypeError as error:
        raise ShapeError(f"{what} is an int, not {axis!r}") from error
    if not -ndim <= index < ndim:
        raise ShapeError(f"{what} {index} is out of range for an array of {ndim} axes")
    return index % ndim if ndim else 0


def normalize_axes(axes: int | Sequence[int] | None, ndim: int) -> tuple[int, ...]:
    """Sorted, distinct, non-negative axes; None means all. Raises ShapeError for duplicates."""
    if axes is None:
        return tuple(range(ndim))
    given = (axes,) if not isinstance(axes, Sequence) else tuple(axes)
    out = tuple(sorted(normalize_axis(axis, ndim) for axis in given))
    if len(set(out)) != len(out):
        raise ShapeError(f"axes {tuple(given)} name one axis twice")
    return out


@dataclass(frozen=True, slots=True)
class Spec:
    """Shape, dtype and layout of an array that need not exist.

    Arguments:
        shape: sizes of the axes.
        dtype: a NumPy dtype (``bfloat16`` comes from ml_dtypes).
        layout: strides in elements, or None for contiguous row-major order.
    """

    shape: Shape
    dtype: np.dtype[Any] = default_float
    layout: tuple[int, ...] | None = None

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the elements themselves (a broadcast view counts every element)."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def strides(self) -> tuple[int, ...]:
        """Strides in elements."""
        return row_major(self.shape) if self.layout is None else self.layout

    @property
    def contiguous(self) -> bool:
        """True when the elements lie in row-major order without gaps."""
        if self.layout is None or self.size == 0:
            return True
        want = row_major(self.shape)
        return all(dim == 1 or a == b for dim, a, b in zip(self.shape, self.layout, want, strict=True))

    def with_dtype(self, dtype: np.dtype[Any]) -> Spec:
        return Spec(self.shape, dtype, self.layout)

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape)) if self.shape else "scalar"
        return f"{self.dtype}[{shape}]" + ("" if self.layout is None else f" strides {self.layout}")
