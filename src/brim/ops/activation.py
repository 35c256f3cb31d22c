"""Elementwise activation functions of neural networks. Each is finite, with a finite gradient, for every finite input.

The logistic function is written with tanh, 1 / (1 + e^-x) = (1 + tanh(x / 2)) / 2, only where its absolute error is
what counts; where small values must keep their relative accuracy it is e^min(x, 0) / (1 + e^-|x|).
"""

from __future__ import annotations

import math
from typing import Any

from brim.expr import call
from brim.op import Op, elementwise
from brim.ops.arithmetic import abs, clip, maximum, minimum, where
from brim.ops.exponential import erf, exp, expm1, log1p
from brim.ops.trigonometry import tanh

_SQRT_HALF = math.sqrt(0.5)
_SQRT_2_OVER_PI = math.sqrt(2.0 / math.pi)
_CUBIC = 0.044715

relu: Op = elementwise(
    "relu",
    lambda x: call("max", x, 0),
    vjp=lambda g, _x, out: where(out > 0, g, 0.0),
    accepts="real",
    doc="max(x, 0); gradient 0 at 0",
)


_leaky_relu: Op = elementwise(
    "leaky_relu",
    lambda x, slope: call("where", x > 0, x, x * slope),
    vjp=lambda g, x, slope, _out: (
        lambda: where(x > 0, g, g * slope),
        lambda: where(x > 0, 0.0, g * x),
    ),
    accepts="float",
    doc="x where positive, else slope * x",
)


def leaky_relu(x: Any, slope: Any = 0.01) -> Any:
    """``x`` where positive, else ``slope * x``; the slope is a number or a tensor that broadcasts (PReLU)."""
    return _leaky_relu(x, slope)


def _sigmoid(x: Any) -> Any:
    # e^min(x, 0) / (1 + e^-|x|): no exponent is positive, and the far left keeps its relative accuracy.
    return exp(minimum(x, 0)) / (1 + exp(-abs(x)))


sigmoid: Op = elementwise(
    "sigmoid",
    _sigmoid,
    vjp=lambda g, _x, out: g * (out * (1.0 - out)),
    accepts="float",
    doc="logistic function 1 / (1 + e^-x)",
)
silu: Op = elementwise(
    "silu",
    lambda x: x * _sigmoid(x),
    vjp=lambda g, x, _out: _silu_grad(g, x),
    accepts="float",
    doc="x * sigmoid(x), also called swish (Elfwing et al. 2018)",
)


def _silu_grad(g: Any, x: Any) -> Any:
    s = sigmoid(x)
    return g * (s * (1.0 + x * (1.0 - s)))


_gelu_erf: Op = elementwise(
    "gelu",
    lambda x: 0.5 * x * (1 + erf(x * _SQRT_HALF)),
    vjp=lambda g, x, _out: (
        g * (0.5 * (1.0 + erf(x * _SQRT_HALF)) + x * ((0.5 * _SQRT_2_OVER_PI) * exp(-0.5 * (x * x))))
    ),
    accepts="float",
    doc="x times the standard normal distribution function at x (Hendrycks and Gimpel 2016)",
)


def _gelu_tanh_argument(x: Any) -> Any:
    # Beyond |x| = 10 the tanh is 1 in every dtype; without the limit the cube would overflow to inf * 0 = NaN.
    x = clip(x, -10, 10)
    return _SQRT_2_OVER_PI * (x + _CUBIC * (x * x * x))


def _gelu_tanh_grad(g: Any, x: Any) -> Any:
    t = tanh(_gelu_tanh_argument(x))
    near = clip(x, -10, 10)
    slope = _SQRT_2_OVER_PI * (1.0 + (3.0 * _CUBIC) * (near * near))
    return g * (0.5 * (1.0 + t) + 0.5 * near * ((1.0 - t * t) * slope))


gelu_tanh: Op = elementwise(
    "gelu_tanh",
    lambda x: 0.5 * x * (1 + tanh(_gelu_tanh_argument(x))),
    vjp=lambda g, x, _out: _gelu_tanh_grad(g, x),
    accepts="float",
    doc="gelu with the distribution function approximated by tanh",
)


def gelu(x: Any, approximate: str = "none") -> Any:
    """``x`` times the standard normal distribution function at ``x``.

    Arguments:
        approximate: "none" for the exact form with erf, "tanh" for the approximation that GPT-2 uses.

    Raises:
        ValueError: another ``approximate``.
    """
    if approximate not in ("none", "tanh"):
        raise ValueError(f"gelu: approximate is 'none' or 'tanh', got {approximate!r}")
    return _gelu_erf(x) if approximate == "none" else gelu_tanh(x)


softplus: Op = elementwise(
    "softplus",
    lambda x: maximum(x, 0) + log1p(exp(-abs(x))),
    vjp=lambda g, x, _out: g * sigmoid(x),
    accepts="float",
    doc="log(1 + e^x), a smooth max(x, 0)",
)

_elu: Op = elementwise(
    "elu",
    lambda x, alpha: call("where", x > 0, x, alpha * expm1(minimum(x, 0))),
    vjp=lambda g, x, alpha, out: (
        lambda: where(x > 0, g, g * (out + alpha)),
        lambda: where(x > 0, 0.0, g * expm1(minimum(x, 0.0))),
    ),
    accepts="float",
    doc="x where positive, else alpha * (e^x - 1) (Clevert et al. 2015)",
)


def elu(x: Any, alpha: Any = 1.0) -> Any:
    """``x`` where positive, else ``alpha * (e^x - 1)``."""
    return _elu(x, alpha)


def hardtanh(x: Any, low: float = -1.0, high: float = 1.0) -> Any:
    """``x`` limited to ``[low, high]``."""
    return clip(x, low, high)
