"""The scalar functions of ``brim.expr`` as NumPy calls ``f(*arrays, out)`` that allocate nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from brim_cpu.erf import ERF_REGISTERS, erf

__all__ = ["EXTRA_REGISTERS", "SCALARS", "UFUNCS"]

Array = np.ndarray[Any, Any]

UFUNCS: dict[str, Any] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.true_divide,
    "floordiv": np.floor_divide,
    "mod": np.remainder,
    "pow": np.power,
    "atan2": np.arctan2,
    "hypot": np.hypot,
    "max": np.maximum,
    "min": np.minimum,
    "fmax": np.fmax,
    "fmin": np.fmin,
    "copysign": np.copysign,
    "nextafter": np.nextafter,
    "logaddexp": np.logaddexp,
    "bitand": np.bitwise_and,
    "bitor": np.bitwise_or,
    "bitxor": np.bitwise_xor,
    "shl": np.left_shift,
    "shr": np.right_shift,
    "neg": np.negative,
    "abs": np.absolute,
    "sign": np.sign,
    "floor": np.floor,
    "ceil": np.ceil,
    "trunc": np.trunc,
    "round": np.rint,
    "bitnot": np.invert,
    "conj": np.conjugate,
    "square": np.square,
    "exp": np.exp,
    "exp2": np.exp2,
    "expm1": np.expm1,
    "log": np.log,
    "log2": np.log2,
    "log10": np.log10,
    "log1p": np.log1p,
    "sqrt": np.sqrt,
    "sin": np.sin,
    "cos": np.cos,
    "tan": np.tan,
    "asin": np.arcsin,
    "acos": np.arccos,
    "atan": np.arctan,
    "sinh": np.sinh,
    "cosh": np.cosh,
    "tanh": np.tanh,
    "asinh": np.arcsinh,
    "acosh": np.arccosh,
    "atanh": np.arctanh,
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "and": np.logical_and,
    "or": np.logical_or,
    "xor": np.logical_xor,
    "not": np.logical_not,
    "isnan": np.isnan,
    "isinf": np.isinf,
    "isfinite": np.isfinite,
    "signbit": np.signbit,
}


def _identity(x: Any, out: Array) -> None:
    np.copyto(out, x, casting="unsafe")


def _where(condition: Any, x: Any, y: Any, out: Array) -> None:
    # ``out`` is a register of its own or the op's output; the evaluator never makes it x or the condition.
    if out is not y:
        np.copyto(out, y)
    np.copyto(out, x, where=condition)


def _rsqrt(x: Any, out: Array) -> None:
    np.sqrt(x, out=out)
    np.divide(out.dtype.type(1), out, out=out)


_INTEGER_SAFE = {"floor", "ceil", "trunc", "round"}


def _rounding(fn: Any) -> Callable[..., None]:
    def run(x: Any, out: Array) -> None:
        if out.dtype.kind in "biu":
            np.copyto(out, x)  # an integer is rounded already
        else:
            fn(x, out)

    return run


SCALARS: dict[str, Callable[..., None]] = {
    name: _rounding(fn) if name in _INTEGER_SAFE else fn for name, fn in UFUNCS.items()
}
SCALARS |= {"identity": _identity, "where": _where, "rsqrt": _rsqrt, "erf": erf}

EXTRA_REGISTERS: dict[str, int] = {"erf": ERF_REGISTERS}
"""Scratch registers that a function needs beside its result; it is called ``f(x, out, registers)``."""
