"""Elementwise comparisons, tests of floats (NaN, infinity, sign), and logic. All give bool; none has a gradient."""

from __future__ import annotations

from brim.expr import call
from brim.op import elementwise

equal = elementwise("equal", lambda x, y: call("eq", x, y), accepts="any", returns="bool", doc="x == y")
not_equal = elementwise("not_equal", lambda x, y: call("ne", x, y), accepts="any", returns="bool", doc="x != y")
less = elementwise("less", lambda x, y: x < y, accepts="real", returns="bool", doc="x < y")
less_equal = elementwise("less_equal", lambda x, y: x <= y, accepts="real", returns="bool", doc="x <= y")
greater = elementwise("greater", lambda x, y: x > y, accepts="real", returns="bool", doc="x > y")
greater_equal = elementwise("greater_equal", lambda x, y: x >= y, accepts="real", returns="bool", doc="x >= y")

isnan = elementwise("isnan", lambda x: call("isnan", x), returns="bool", doc="True where x is NaN")
isinf = elementwise("isinf", lambda x: call("isinf", x), returns="bool", doc="True where x is +inf or -inf")
isfinite = elementwise(
    "isfinite", lambda x: call("isfinite", x), returns="bool", doc="True where x is neither infinite nor NaN"
)
signbit = elementwise(
    "signbit", lambda x: call("signbit", x), accepts="float", returns="bool", doc="True for a negative sign, -0.0 too"
)

logical_and = elementwise(
    "logical_and", lambda x, y: call("and", x, y), accepts="bool", returns="bool", doc="x and y, of bools"
)
logical_or = elementwise(
    "logical_or", lambda x, y: call("or", x, y), accepts="bool", returns="bool", doc="x or y, of bools"
)
logical_xor = elementwise(
    "logical_xor", lambda x, y: call("xor", x, y), accepts="bool", returns="bool", doc="one of x and y, not both"
)
logical_not = elementwise("logical_not", lambda x: call("not", x), accepts="bool", returns="bool", doc="not x, of bools")
