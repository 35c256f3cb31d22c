"""Operators and methods of Tensor: every one forwards to an op, nothing is computed here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from brim import ops
from brim.context import context
from brim.errors import ShapeError
from brim.op import Op

__all__ = ["TensorMethods"]


def _binary(op: Any, doc: str) -> Callable[[Any, Any], Any]:
    def method(self: Any, other: Any) -> Any:
        return op(self, other)

    method.__doc__ = doc
    return method


def _reflected(op: Any, doc: str) -> Callable[[Any, Any], Any]:
    def method(self: Any, other: Any) -> Any:
        return op(other, self)

    method.__doc__ = doc
    return method


def _in_place(op: Op, doc: str) -> Callable[[Any, Any], Any]:
    def method(self: Any, other: Any) -> Any:
        if context.grad_enabled and self.requires_grad and self.is_leaf:
            raise RuntimeError(
                "a leaf that requires gradients cannot be changed in place while gradients are recorded; "
                "update it under brim.no_grad(), or write x = x + y"
            )
        return op.into(self, self, other)

    method.__doc__ = doc
    return method


def _unary(fn: Any, doc: str | None = None) -> Callable[[Any], Any]:
    def method(self: Any) -> Any:
        return fn(self)

    method.__doc__ = doc or getattr(fn, "doc", None) or getattr(fn, "__doc__", None)
    return method


class TensorMethods:
    """Mixin with the forwarding methods."""

    __slots__ = ()
    __array_priority__ = 1000  # NumPy arrays on the left let the tensor's operator decide
    __array_ufunc__ = None

    __add__, __radd__ = _binary(ops.add, "x + y"), _reflected(ops.add, "y + x")
    __sub__, __rsub__ = _binary(ops.subtract, "x - y"), _reflected(ops.subtract, "y - x")
    __mul__, __rmul__ = _binary(ops.multiply, "x * y"), _reflected(ops.multiply, "y * x")
    __truediv__, __rtruediv__ = _binary(ops.divide, "x / y"), _reflected(ops.divide, "y / x")
    __floordiv__, __rfloordiv__ = _binary(ops.floor_divide, "x // y"), _reflected(ops.floor_divide, "y // x")
    __mod__, __rmod__ = _binary(ops.remainder, "x % y"), _reflected(ops.remainder, "y % x")
    __pow__, __rpow__ = _binary(ops.pow, "x ** y"), _reflected(ops.pow, "y ** x")
    __matmul__, __rmatmul__ = _binary(ops.matmul, "x @ y"), _reflected(ops.matmul, "y @ x")
    __and__, __rand__ = _binary(ops.bitwise_and, "x & y"), _reflected(ops.bitwise_and, "y & x")
    __or__, __ror__ = _binary(ops.bitwise_or, "x | y"), _reflected(ops.bitwise_or, "y | x")
    __xor__, __rxor__ = _binary(ops.bitwise_xor, "x ^ y"), _reflected(ops.bitwise_xor, "y ^ x")
    __lshift__, __rshift__ = _binary(ops.bitwise_left_shift, "x << y"), _binary(ops.bitwise_right_shift, "x >> y")
    __lt__, __le__ = _binary(ops.less, "x < y"), _binary(ops.less_equal, "x <= y")
    __gt__, __ge__ = _binary(ops.greater, "x > y"), _binary(ops.greater_equal, "x >= y")
    __iadd__, __isub__ = _in_place(ops.add, "x += y"), _in_place(ops.subtract, "x -= y")
    __imul__, __itruediv__ = _in_place(ops.multiply, "x *= y"), _in_place(ops.divide, "x /= y")
    __neg__, __pos__, __abs__ = _unary(ops.negative), _unary(ops.positive), _unary(ops.abs)
    __invert__ = _unary(ops.bitwise_invert)
    __hash__ = object.__hash__

    def __eq__(self, other: object) -> Any:
        return ops.equal(self, other)

    def __ne__(self, other: object) -> Any:
        return ops.not_equal(self, other)

    def __getitem__(self, index: Any) -> Any:
        return ops.get_item(self, index)

    abs, sign, sqrt, rsqrt, square = map(_unary, (ops.abs, ops.sign, ops.sqrt, ops.rsqrt, ops.square))
    exp, log, log1p, expm1 = map(_unary, (ops.exp, ops.log, ops.log1p, ops.expm1))
    sin, cos, tanh, erf = map(_unary, (ops.sin, ops.cos, ops.tanh, ops.erf))
    sigmoid, relu = _unary(ops.sigmoid), _unary(ops.relu)
    floor, ceil, round = _unary(ops.floor), _unary(ops.ceil), _unary(ops.round)
    isnan, isfinite = _unary(ops.isnan), _unary(ops.isfinite)

    def astype(self, dtype: Any, *, copy: bool = False) -> Any:
        """The same values in another dtype."""
        return ops.astype(self, dtype, copy=copy)

    def copy(self) -> Any:
        """A row-major copy in memory of its own."""
        return ops.copy(self)

    def clip(self, min: Any = None, max: Any = None) -> Any:
        """Limited to [min, max]."""
        return ops.clip(self, min, max)

    def sum(self, axis: Any = None, *, dtype: Any = None, keepdims: bool = False) -> Any:
        """Sum over axes."""
        return ops.sum(self, axis, dtype=dtype, keepdims=keepdims)

    def mean(self, axis: Any = None, *, keepdims: bool = False) -> Any:
        """Mean over axes."""
        return ops.mean(self, axis, keepdims=keepdims)

    def max(self, axis: Any = None, *, keepdims: bool = False) -> Any:
        """Largest over axes."""
        return ops.max(self, axis, keepdims=keepdims)

    def min(self, axis: Any = None, *, keepdims: bool = False) -> Any:
        """Smallest over axes."""
        return ops.min(self, axis, keepdims=keepdims)

    def prod(self, axis: Any = None, *, keepdims: bool = False) -> Any:
        """Product over axes."""
        return ops.prod(self, axis, keepdims=keepdims)

    def var(self, axis: Any = None, *, correction: float = 0, keepdims: bool = False) -> Any:
        """Variance over axes; correction=1 divides by n - 1."""
        return ops.var(self, axis, correction=correction, keepdims=keepdims)

    def std(self, axis: Any = None, *, correction: float = 0, keepdims: bool = False) -> Any:
        """Standard deviation over axes."""
        return ops.std(self, axis, correction=correction, keepdims=keepdims)

    def any(self, axis: Any = None, *, keepdims: bool = False) -> Any:
        """True where any element is not zero."""
        return ops.any(self, axis, keepdims=keepdims)

    def all(self, axis: Any = None, *, keepdims: bool = False) -> Any:
        """True where no element is zero."""
        return ops.all(self, axis, keepdims=keepdims)

    def argmax(self, axis: int | None = None, *, keepdims: bool = False) -> Any:
        """Index of the first largest element."""
        return ops.argmax(self, axis, keepdims=keepdims)

    def argmin(self, axis: int | None = None, *, keepdims: bool = False) -> Any:
        """Index of the first smallest element."""
        return ops.argmin(self, axis, keepdims=keepdims)

    def reshape(self, *shape: Any, copy: bool | None = None) -> Any:
        """Another shape, one size may be -1: ``x.reshape(2, -1)`` or ``x.reshape((2, -1))``."""
        given = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        return ops.reshape(self, given, copy=copy)

    def flatten(self) -> Any:
        """One axis."""
        return ops.reshape(self, (-1,)) if self.size else ops.reshape(self, (0,))  # type: ignore[attr-defined]

    def permute_dims(self, axes: Any) -> Any:
        """A view with the axes in another order."""
        return ops.permute_dims(self, axes)

    def broadcast_to(self, shape: Any) -> Any:
        """A view repeated along axes of size 1."""
        return ops.broadcast_to(self, shape)

    def expand_dims(self, axis: int) -> Any:
        """A new axis of size 1."""
        return ops.expand_dims(self, axis)

    def squeeze(self, axis: Any) -> Any:
        """Without axes of size 1."""
        return ops.squeeze(self, axis)

    def take(self, indices: Any, *, axis: int | None = None) -> Any:
        """Elements along an axis by an integer tensor."""
        return ops.take(self, indices, axis=axis)

    def fill_(self, value: float) -> Any:
        """Overwrite every element with one number; returns the tensor."""
        return self.write(value)  # type: ignore[attr-defined]

    @property
    def mT(self) -> Any:
        """The last two axes swapped."""
        return ops.matrix_transpose(self)

    @property
    def T(self) -> Any:
        """Transpose of a matrix. Raises ShapeError unless there are two axes."""
        if self.ndim != 2:  # type: ignore[attr-defined]
            raise ShapeError(f"T is for 2 axes, this tensor has shape {self.shape}; use mT or permute_dims()")  # type: ignore[attr-defined]
        return ops.matrix_transpose(self)
