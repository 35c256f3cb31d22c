"""Elementwise comparisons, tests of floats (NaN, infinity, sign), and logic. All give bool; none has a gradient."""

from __future__ import annotations

from brim.expr import call
from brim.op import Op, elementwise

equal: Op = elementwise("equal", lambda x, y: call("eq", x, y), accepts="any", returns="bool", doc="x == y")
not_equal: Op = elementwise("not_equal", lambda x, y: call("ne", x, y), accepts="any", returns="bool", doc="x != y")
less: Op = elementwise("less", lambda x, y: x < y, accepts="real", returns="bool", doc="x < y")
less_equal: Op = elementwise("less_equal", lambda x, y: x <= y, accepts="real", returns="bool", doc="x <= y")
greater: Op = elementwise("greater", lambda x, y: x > y, accepts="real", returns="bool", doc="x > y")
greater_equal: Op = elementwise("greater_equal", lambda x, y: x >= y, accepts="real", returns="bool", doc="x >= y")

isnan: Op = elementwise("isnan", lambda x: call("isnan", x), returns="bool", doc="True where x is NaN")
isinf: Op = elementwise("isinf", lambda x: call("isinf", x), returns="bool", doc="True where x is +inf or -inf")
isfinite: Op = elementwise(
    "isfinite", lambda x: call("isfinite", x), returns="bool", doc="True where x is neither infinite nor NaN"
)
signbit: Op = elementwise(
    "signbit", lambda x: call("signbit", x), accepts="float", returns="bool", doc="True for a negative sign, -0.0 too"
)

logical_and: Op = elementwise(
    "logical_and", lambda x, y: call("and", x, y), accepts="bool", returns="bool", doc="x and y, of bools"
)
logical_or: Op = elementwise(
    "logical_or", lambda x, y: call("or", x, y), accepts="bool", returns="bool", doc="x or y, of bools"
)
logical_xor: Op = elementwise(
    "logical_xor", lambda x, y: call("xor", x, y), accepts="bool", returns="bool", doc="one of x and y, not both"
)
logical_not: Op = elementwise(
    "logical_not", lambda x: call("not", x), accepts="bool", returns="bool", doc="not x, of bools"
)
