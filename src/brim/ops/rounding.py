"""Elementwise rounding to whole numbers, which has gradient 0, and the transfer of signs."""

from __future__ import annotations

from typing import Any

from brim.expr import call
from brim.op import Op, elementwise
from brim.ops.arithmetic import where
from brim.ops.compare import signbit


def _flat(g: Any, _x: Any, _out: Any) -> Any:
    # Steps are flat between the jumps: the gradient is zero, also where the one above is not finite.
    return where(True, 0.0, g)


floor: Op = elementwise(
    "floor", lambda x: call("floor", x), vjp=_flat, accepts="real", doc="the largest whole number <= x"
)
ceil: Op = elementwise(
    "ceil", lambda x: call("ceil", x), vjp=_flat, accepts="real", doc="the smallest whole number >= x"
)
trunc: Op = elementwise("trunc", lambda x: call("trunc", x), vjp=_flat, accepts="real", doc="x without its fraction")
round: Op = elementwise(
    "round", lambda x: call("round", x), vjp=_flat, accepts="real", doc="the nearest whole number; halves go to even"
)
copysign: Op = elementwise(
    "copysign",
    lambda x, y: call("copysign", x, y),
    vjp=lambda g, x, y, _out: (lambda: where(signbit(x) == signbit(y), g, -g), lambda: where(True, 0.0, g)),
    accepts="float",
    doc="|x| with the sign of y",
)
