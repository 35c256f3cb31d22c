"""Elementwise arithmetic: add, subtract, multiply, divide, powers, roots, minimum and maximum, clip, and copies."""

from __future__ import annotations

from typing import Any

from brim.errors import DTypeError
from brim.expr import call
from brim.op import Op, elementwise
from brim.spec import as_dtype, is_complex, is_inexact

add: Op = elementwise("add", lambda x, y: x + y, vjp=lambda g, _x, _y, _out: (g, g), doc="x + y")
subtract: Op = elementwise("subtract", lambda x, y: x - y, vjp=lambda g, _x, _y, _out: (g, lambda: -g), doc="x - y")
multiply: Op = elementwise(
    "multiply", lambda x, y: x * y, vjp=lambda g, x, y, _out: (lambda: g * y, lambda: g * x), doc="x * y"
)
divide: Op = elementwise(
    "divide",
    lambda x, y: x / y,
    vjp=lambda g, _x, y, out: (lambda: g / y, lambda: -g * out / y),
    accepts="inexact",
    doc="x / y; integers give float32",
)
floor_divide: Op = elementwise(
    "floor_divide", lambda x, y: call("floordiv", x, y), accepts="real", doc="floor(x / y), rounded towards -inf"
)
remainder: Op = elementwise(
    "remainder",
    lambda x, y: call("mod", x, y),
    vjp=lambda g, x, y, _out: (g, lambda: -g * floor_divide(x, y)),
    accepts="real",
    doc="x - y * floor(x / y), with the sign of y",
)


def _pow_grad_base(g: Any, x: Any, y: Any) -> Any:
    if isinstance(y, int | float):
        return g * (y * x ** (y - 1)) if y != 0 else g * 0.0
    return g * where(y == 0, 0.0, y * x ** (y - 1))


def _pow_grad_exponent(g: Any, x: Any, y: Any, out: Any) -> Any:
    # d(x^y)/dy = x^y log x, and 0 where x == 0 (the limit for y > 0)
    return g * where(x == 0, 0.0, out * log(where(x == 0, 1.0, x)))


pow: Op = elementwise(
    "pow",
    lambda x, y: x**y,
    vjp=lambda g, x, y, out: (lambda: _pow_grad_base(g, x, y), lambda: _pow_grad_exponent(g, x, y, out)),
    doc="x to the power y",
)
where: Op = elementwise(
    "where",
    lambda condition, x, y: call("where", condition, x, y),
    vjp=lambda g, condition, _x, _y, _out: (None, lambda: where(condition, g, 0.0), lambda: where(condition, 0.0, g)),
    accepts="any",
    promoted=(1, 2),
    doc="x where the condition holds, else y",
)
log: Op = elementwise(
    "log", lambda x: call("log", x), vjp=lambda g, x, _out: g / x, accepts="inexact", doc="natural logarithm"
)
negative: Op = elementwise("negative", lambda x: -x, vjp=lambda g, _x, _out: -g, doc="-x")
positive: Op = elementwise("positive", lambda x: call("identity", x), vjp=lambda g, _x, _out: g, doc="x")
abs: Op = elementwise(
    "abs", lambda x: call("abs", x), vjp=lambda g, x, _out: g * sign(x), returns="real", doc="absolute value"
)
sign: Op = elementwise("sign", lambda x: call("sign", x), vjp=lambda g, _x, _out: where(True, 0.0, g), doc="-1, 0 or 1")
square: Op = elementwise("square", lambda x: call("square", x), vjp=lambda g, x, _out: g * (2.0 * x), doc="x * x")
sqrt: Op = elementwise(
    "sqrt", lambda x: call("sqrt", x), vjp=lambda g, _x, out: g / (2.0 * out), accepts="inexact", doc="square root"
)
rsqrt: Op = elementwise(
    "rsqrt",
    lambda x: call("rsqrt", x),
    vjp=lambda g, _x, out: g * (-0.5 * out * out * out),
    accepts="float",
    doc="1 / sqrt(x)",
)
reciprocal: Op = elementwise(
    "reciprocal", lambda x: 1 / x, vjp=lambda g, _x, out: -g * out * out, accepts="inexact", doc="1 / x"
)


def _half_on_ties(g: Any, x: Any, y: Any, out: Any) -> Any:
    # Equal inputs share the gradient, so that maximum(x, x) has gradient 1.
    return where(x == y, 0.5 * g, where(x == out, g, 0.0))


maximum: Op = elementwise(
    "maximum",
    lambda x, y: call("max", x, y),
    vjp=lambda g, x, y, out: (lambda: _half_on_ties(g, x, y, out), lambda: _half_on_ties(g, y, x, out)),
    accepts="real",
    doc="the larger; NaN where either is NaN",
)
minimum: Op = elementwise(
    "minimum",
    lambda x, y: call("min", x, y),
    vjp=lambda g, x, y, out: (lambda: _half_on_ties(g, x, y, out), lambda: _half_on_ties(g, y, x, out)),
    accepts="real",
    doc="the smaller; NaN where either is NaN",
)
_clip: Op = elementwise(
    "clip",
    lambda x, low, high: call("min", call("max", x, low), high),
    vjp=lambda g, x, low, high, _out: (
        lambda: where((x >= low) & (x <= high), g, 0.0),
        lambda: where(x < low, g, 0.0),
        lambda: where(x > high, g, 0.0),
    ),
    accepts="real",
    doc="x limited to [low, high]",
)


def clip(x: Any, min: Any = None, max: Any = None) -> Any:
    """``x`` limited to ``[min, max]``; either bound may be missing, a number or a tensor that broadcasts."""
    if min is None and max is None:
        return positive(x)
    if min is None:
        return minimum(x, max)
    return maximum(x, min) if max is None else _clip(x, min, max)


_astype: Op = elementwise(
    "astype",
    lambda x: call("identity", x),
    vjp=lambda g, _x, _out, *, dtype: g,
    accepts="any",
    returns="param",
    doc="the same values in another dtype",
)
copy: Op = elementwise(
    "copy", lambda x: call("identity", x), vjp=lambda g, _x, _out: g, accepts="any", doc="a row-major copy"
)


class _AsType:
    """``astype(x, dtype)``; keeps the op's ``into`` for writes."""

    into = _astype.into

    def __call__(self, x: Any, dtype: Any, *, copy: bool = False) -> Any:
        """``x`` converted to ``dtype``: truncation towards zero from float to int, nearest between floats.

        Raises:
            DTypeError: complex to real (take the real part with ``brim.real``).
        """
        kind = as_dtype(dtype)
        if kind == x.dtype and not copy:
            return x
        if is_complex(x.dtype) and not is_complex(kind) and kind.kind != "b":
            raise DTypeError(f"astype from {x.dtype} to {kind} would drop the imaginary part; use brim.real(x)")
        return _astype(x, dtype=kind)


astype = _AsType()


def promote_to_inexact(x: Any) -> Any:
    """``x`` itself when float or complex, else as float32: for means, softmax and other results with fractions."""
    return x if is_inexact(x.dtype) else astype(x, "float32")
