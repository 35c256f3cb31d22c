"""Elementwise exponentials, logarithms and the error function. (``log``, ``sqrt`` and ``pow`` are arithmetic.)"""

from __future__ import annotations

import math

from brim.expr import call
from brim.op import Op, elementwise

_LN2, _LN10 = math.log(2.0), math.log(10.0)

exp: Op = elementwise(
    "exp", lambda x: call("exp", x), vjp=lambda g, _x, out: g * out, accepts="inexact", doc="e to the x"
)
exp2: Op = elementwise(
    "exp2", lambda x: call("exp2", x), vjp=lambda g, _x, out: g * (out * _LN2), accepts="float", doc="2 to the x"
)
expm1: Op = elementwise(
    "expm1",
    lambda x: call("expm1", x),
    vjp=lambda g, _x, out: g * (out + 1.0),
    accepts="inexact",
    doc="e to the x, less 1, accurate near 0",
)
log2: Op = elementwise(
    "log2",
    lambda x: call("log2", x),
    vjp=lambda g, x, _out: g / (x * _LN2),
    accepts="inexact",
    doc="logarithm to base 2",
)
log10: Op = elementwise(
    "log10",
    lambda x: call("log10", x),
    vjp=lambda g, x, _out: g / (x * _LN10),
    accepts="inexact",
    doc="logarithm to base 10",
)
log1p: Op = elementwise(
    "log1p",
    lambda x: call("log1p", x),
    vjp=lambda g, x, _out: g / (x + 1.0),
    accepts="inexact",
    doc="log(1 + x), accurate near 0",
)


# The gradient by x is e^x / (e^x + e^y) = e^(x - out), whose exponent is never positive.
logaddexp: Op = elementwise(
    "logaddexp",
    lambda x, y: call("logaddexp", x, y),
    vjp=lambda g, x, y, out: (lambda: g * exp(x - out), lambda: g * exp(y - out)),
    accepts="float",
    doc="log(e^x + e^y) without overflow",
)
erf: Op = elementwise(
    "erf",
    lambda x: call("erf", x),
    vjp=lambda g, x, _out: g * (2.0 / math.sqrt(math.pi) * exp(-(x * x))),
    accepts="float",
    doc="error function: 2 / sqrt(pi) times the integral of exp(-t^2) from 0 to x",
)
