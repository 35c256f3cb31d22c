"""Elementwise operations on the bits of integers; on bools the same names mean logic. None has a gradient."""

from __future__ import annotations

from brim.expr import call
from brim.op import Op, elementwise

bitwise_and: Op = elementwise(
    "bitwise_and", lambda x, y: call("bitand", x, y), accepts="bits", doc="bits set in x and in y"
)
bitwise_or: Op = elementwise(
    "bitwise_or", lambda x, y: call("bitor", x, y), accepts="bits", doc="bits set in x or in y"
)
bitwise_xor: Op = elementwise(
    "bitwise_xor", lambda x, y: call("bitxor", x, y), accepts="bits", doc="bits set in one of x and y, not in both"
)
bitwise_invert: Op = elementwise("bitwise_invert", lambda x: call("bitnot", x), accepts="bits", doc="every bit flipped")
bitwise_left_shift: Op = elementwise(
    "bitwise_left_shift", lambda x, y: call("shl", x, y), accepts="integer", doc="x * 2**y, dropping what overflows"
)
bitwise_right_shift: Op = elementwise(
    "bitwise_right_shift", lambda x, y: call("shr", x, y), accepts="integer", doc="floor(x / 2**y)"
)
