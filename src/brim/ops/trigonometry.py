"""Elementwise circular and hyperbolic functions, their inverses, and hypot. Angles are in radians."""

from __future__ import annotations

from brim.expr import call
from brim.op import Op, elementwise
from brim.ops.arithmetic import rsqrt, where

sin: Op = elementwise("sin", lambda x: call("sin", x), vjp=lambda g, x, _out: g * cos(x), accepts="inexact", doc="sine")
cos: Op = elementwise(
    "cos", lambda x: call("cos", x), vjp=lambda g, x, _out: -g * sin(x), accepts="inexact", doc="cosine"
)
tan: Op = elementwise(
    "tan", lambda x: call("tan", x), vjp=lambda g, _x, out: g * (1.0 + out * out), accepts="inexact", doc="tangent"
)
asin: Op = elementwise(
    "asin",
    lambda x: call("asin", x),
    vjp=lambda g, x, _out: g * rsqrt((1.0 - x) * (1.0 + x)),
    accepts="inexact",
    doc="inverse sine",
)
acos: Op = elementwise(
    "acos",
    lambda x: call("acos", x),
    vjp=lambda g, x, _out: -g * rsqrt((1.0 - x) * (1.0 + x)),
    accepts="inexact",
    doc="inverse cosine",
)
atan: Op = elementwise(
    "atan",
    lambda x: call("atan", x),
    vjp=lambda g, x, _out: g / (1.0 + x * x),
    accepts="inexact",
    doc="inverse tangent",
)
# y / (x^2 + y^2) as (y / r) / r: r^2 would overflow where r does not.
atan2: Op = elementwise(
    "atan2",
    lambda y, x: call("atan2", y, x),
    vjp=lambda g, y, x, _out: (
        lambda: g * (x / hypot(x, y)) / hypot(x, y),
        lambda: -g * (y / hypot(x, y)) / hypot(x, y),
    ),
    accepts="float",
    doc="angle of the point (x, y), called as atan2(y, x)",
)
sinh: Op = elementwise(
    "sinh", lambda x: call("sinh", x), vjp=lambda g, x, _out: g * cosh(x), accepts="inexact", doc="hyperbolic sine"
)
cosh: Op = elementwise(
    "cosh", lambda x: call("cosh", x), vjp=lambda g, x, _out: g * sinh(x), accepts="inexact", doc="hyperbolic cosine"
)
tanh: Op = elementwise(
    "tanh",
    lambda x: call("tanh", x),
    vjp=lambda g, _x, out: g * (1.0 - out * out),
    accepts="inexact",
    doc="hyperbolic tangent",
)
asinh: Op = elementwise(
    "asinh",
    lambda x: call("asinh", x),
    vjp=lambda g, x, _out: g / hypot(x, 1.0),
    accepts="inexact",
    doc="inverse hyperbolic sine",
)
acosh: Op = elementwise(
    "acosh",
    lambda x: call("acosh", x),
    vjp=lambda g, x, _out: g * rsqrt(x - 1.0) * rsqrt(x + 1.0),
    accepts="inexact",
    doc="inverse hyperbolic cosine",
)
atanh: Op = elementwise(
    "atanh",
    lambda x: call("atanh", x),
    vjp=lambda g, x, _out: g / ((1.0 - x) * (1.0 + x)),
    accepts="inexact",
    doc="inverse hyperbolic tangent",
)
# The gradient at the origin is 0, the middle of its limits.
hypot: Op = elementwise(
    "hypot",
    lambda x, y: call("hypot", x, y),
    vjp=lambda g, x, y, out: (
        lambda: g * where(out == 0, 0.0, x / where(out == 0, 1.0, out)),
        lambda: g * where(out == 0, 0.0, y / where(out == 0, 1.0, out)),
    ),
    accepts="float",
    doc="sqrt(x^2 + y^2) without overflow",
)
