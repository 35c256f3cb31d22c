"""Scalar expression trees: what an elementwise op computes, for one element.

The formula of an elementwise op is traced once into a tree of ``Arg``, ``Const`` and ``Call`` nodes. Every backend
prints its code from the tree (NumPy calls, interpreter code, CUDA C), and fusion splices trees together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

__all__ = ["SCALAR_FUNCTIONS", "Arg", "Call", "Const", "Expr", "call", "postorder", "substitute", "trace_formula"]

# name -> (arity, kind of result). "same": the compute dtype; "bool": a truth value.
SCALAR_FUNCTIONS: dict[str, tuple[int, str]] = {
    **dict.fromkeys(("add", "sub", "mul", "div", "floordiv", "mod", "pow", "atan2", "hypot"), (2, "same")),
    **dict.fromkeys(("max", "min", "fmax", "fmin", "copysign", "nextafter", "logaddexp"), (2, "same")),
    **dict.fromkeys(("bitand", "bitor", "bitxor", "shl", "shr"), (2, "same")),
    **dict.fromkeys(("neg", "abs", "sign", "floor", "ceil", "trunc", "round", "bitnot", "conj", "square"), (1, "same")),
    **dict.fromkeys(("exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "sqrt", "rsqrt", "erf"), (1, "same")),
    **dict.fromkeys(("sin", "cos", "tan", "asin", "acos", "atan"), (1, "same")),
    **dict.fromkeys(("sinh", "cosh", "tanh", "asinh", "acosh", "atanh"), (1, "same")),
    **dict.fromkeys(("eq", "ne", "lt", "le", "gt", "ge", "and", "or", "xor"), (2, "bool")),
    **dict.fromkeys(("not", "isnan", "isinf", "isfinite", "signbit"), (1, "bool")),
    "where": (3, "same"),
    "identity": (1, "same"),
}


class Expr:
    """A node of a formula. Operators build larger trees, so a formula reads like the mathematics it states."""

    __slots__ = ()

    def __add__(self, other: Any) -> Expr:
        return call("add", self, other)

    def __radd__(self, other: Any) -> Expr:
        return call("add", other, self)

    def __sub__(self, other: Any) -> Expr:
        return call("sub", self, other)

    def __rsub__(self, other: Any) -> Expr:
        return call("sub", other, self)

    def __mul__(self, other: Any) -> Expr:
        return call("mul", self, other)

    def __rmul__(self, other: Any) -> Expr:
        return call("mul", other, self)

    def __truediv__(self, other: Any) -> Expr:
        return call("div", self, other)

    def __rtruediv__(self, other: Any) -> Expr:
        return call("div", other, self)

    def __pow__(self, other: Any) -> Expr:
        return call("pow", self, other)

    def __neg__(self) -> Expr:
        return call("neg", self)

    def __lt__(self, other: Any) -> Expr:
        return call("lt", self, other)

    def __le__(self, other: Any) -> Expr:
        return call("le", self, other)

    def __gt__(self, other: Any) -> Expr:
        return call("gt", self, other)

    def __ge__(self, other: Any) -> Expr:
        return call("ge", self, other)


@dataclass(frozen=True, slots=True)
class Arg(Expr):
    """Input number ``index`` of the op."""

    index: int


@dataclass(frozen=True, slots=True)
class Const(Expr):
    """A constant of the formula itself (not of a call)."""

    value: bool | int | float


@dataclass(frozen=True, slots=True)
class Call(Expr):
    """A scalar function applied to nodes."""

    fn: str
    args: tuple[Expr, ...]

    @property
    def kind(self) -> str:
        return SCALAR_FUNCTIONS[self.fn][1]


def call(fn: str, *args: Any) -> Expr:
    """Build a ``Call`` node; Python numbers become constants. Raises ValueError for an unknown name or arity."""
    if fn not in SCALAR_FUNCTIONS:
        raise ValueError(f"{fn!r} is not a scalar function; known: {', '.join(SCALAR_FUNCTIONS)}")
    if len(args) != SCALAR_FUNCTIONS[fn][0]:
        raise ValueError(f"scalar function {fn} takes {SCALAR_FUNCTIONS[fn][0]} arguments, got {len(args)}")
    return Call(fn, tuple(arg if isinstance(arg, Expr) else Const(arg) for arg in args))


def trace_formula(formula: Callable[..., Any], arity: int) -> Expr:
    """The tree of a formula: ``formula`` is called once with ``arity`` argument nodes."""
    result = formula(*(Arg(index) for index in range(arity)))
    return result if isinstance(result, Expr) else Const(result)


def substitute(tree: Expr, args: tuple[Expr, ...]) -> Expr:
    """The tree with every ``Arg(i)`` replaced by ``args[i]``: how one formula is used inside another."""
    if isinstance(tree, Arg):
        return args[tree.index]
    if isinstance(tree, Call):
        return Call(tree.fn, tuple(substitute(arg, args) for arg in tree.args))
    return tree


def postorder(tree: Expr) -> Iterator[Expr]:
    """Every distinct node once, arguments before their users (equal subtrees are one node)."""
    seen: set[Expr] = set()

    def visit(node: Expr) -> Iterator[Expr]:
        if node in seen:
            return
        if isinstance(node, Call):
            for arg in node.args:
                yield from visit(arg)
        seen.add(node)
        yield node

    yield from visit(tree)
