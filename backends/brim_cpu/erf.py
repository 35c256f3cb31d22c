"""The error function, which NumPy lacks, written with NumPy calls on scratch registers.

Method: the rational approximations of W. J. Cody, "Rational Chebyshev approximations for the error function",
Math. Comp. 23 (1969), in three ranges of \\|x\\|; relative error below 1e-15 in float64.
"""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["ERF_REGISTERS", "erf"]

Array = np.ndarray[Any, Any]

ERF_REGISTERS = 5

# |x| <= 0.46875: erf(x) = x P(x^2) / Q(x^2)
_P1 = (
    3.20937758913846947e03,
    3.77485237685302021e02,
    1.13864154151050156e02,
    3.16112374387056560e00,
    1.85777706184603153e-1,
)
_Q1 = (2.84423683343917062e03, 1.28261652607737228e03, 2.44024637934444173e02, 2.36012909523441209e01, 1.0)
# 0.46875 < |x| <= 4: erfc(x) = exp(-x^2) P(x) / Q(x)
_P2 = (
    1.23033935479799725e03,
    2.05107837782607147e03,
    1.71204761263407058e03,
    8.81952221241769090e02,
    2.98635138197400131e02,
    6.61191906371416295e01,
    8.88314979438837594e00,
    5.64188496988670089e-1,
    2.15311535474403846e-8,
)
_Q2 = (
    1.23033935480374942e03,
    3.43936767414372164e03,
    4.36261909014324716e03,
    3.29079923573345963e03,
    1.62138957456669019e03,
    5.37181101862009858e02,
    1.17693950891312499e02,
    1.57449261107098347e01,
    1.0,
)
_SPLIT = 0.46875
_FLAT = {2: 4.0, 4: 4.0, 8: 6.0}  # beyond this erf is +-1 to the last bit


def _polynomial(out: Array, x: Array, coefficients: tuple[float, ...]) -> None:
    out.fill(coefficients[-1])
    for c in reversed(coefficients[:-1]):
        np.multiply(out, x, out=out)
        np.add(out, out.dtype.type(c), out=out)


def erf(x: Any, out: Array, *registers: Array) -> None:
    """``out = erf(x)``; ``registers`` are five arrays like ``out``. NaN stays NaN."""
    size, top, bottom, near, mask = registers
    kind = out.dtype.type
    np.absolute(x, out=size)
    np.minimum(size, kind(_FLAT[out.dtype.itemsize]), out=size)
    _polynomial(top, size, _P2)
    _polynomial(bottom, size, _Q2)
    np.divide(top, bottom, out=top)
    np.square(size, out=mask)
    np.negative(mask, out=near)
    np.exp(near, out=near)
    np.multiply(top, near, out=top)
    np.subtract(kind(1), top, out=top)  # erf(|x|) beyond the split
    # Below the split 1 - erfc(x) would cancel digits, so another quotient is taken there.
    np.minimum(mask, kind(_SPLIT * _SPLIT), out=mask)
    _polynomial(near, mask, _P1)
    _polynomial(bottom, mask, _Q1)
    np.divide(near, bottom, out=near)
    np.multiply(near, size, out=near)
    flags = mask.reshape(-1).view(np.bool_)[: mask.size].reshape(mask.shape)
    np.greater(size, kind(_SPLIT), out=flags)
    np.copyto(near, top, where=flags)
    np.copysign(near, x, out=out)
