"""Scalar expression trees: what an elementwise op computes, for one element.

The formula of an elementwise op is traced once into a tree of ``Arg``, ``Const`` and ``Call`` nodes. Every backend
prints its code from the tree (NumPy calls, interpreter code, CUDA C), and fusion splices trees together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = [
    "SCALAR_FUNCTIONS",
    "Arg",
    "Call",
    "Const",
    "Expr",
    "FormulaBuilder",
    "FusedFormula",
    "ScalarStep",
    "call",
    "postorder",
    "substitute",
    "trace_formula",
]

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


@dataclass(frozen=True, slots=True)
class ScalarStep:
    """One line of a fused formula.

    Attributes:
        fn: a name of ``SCALAR_FUNCTIONS``; "cast" (its only argument, converted to ``dtype``); or "uniform"
            (arguments seed and counter: the number that ``brim.random`` draws for this element, float32 in [0, 1)).
        dtype: what it gives; bool for comparisons and logic, whose ``compute`` tells what they compare.
        args: ("in", number of an input), ("step", number of an earlier step) or ("const", a Python number).
        compute: dtype of the arguments (constants and scalar inputs are brought to it).
    """

    fn: str
    dtype: np.dtype[Any]
    args: tuple[tuple[str, Any], ...]
    compute: np.dtype[Any]


@dataclass(frozen=True, slots=True)
class FusedFormula:
    """Several elementwise ops as one function of scalars: what a fused group computes for each element.

    Attributes:
        steps: in order; equal steps appear once.
        outputs: for each output of the group, the number of the step that gives it.
    """

    steps: tuple[ScalarStep, ...]
    outputs: tuple[int, ...]

    def __str__(self) -> str:
        def operand(arg: tuple[str, Any]) -> str:
            return {"in": f"x{arg[1]}", "step": f"t{arg[1]}", "const": f"{arg[1]!r}"}[arg[0]]

        lines = [f"t{n}={s.fn}({', '.join(map(operand, s.args))})" for n, s in enumerate(self.steps)]
        return "; ".join(lines)


Operand = tuple[str, Any]
"""("in", number of an input), ("step", number of a step) or ("const", a Python number)."""

_BOOL = np.dtype("bool")
_LOGIC = frozenset(("and", "or", "xor", "not"))


class FormulaBuilder:
    """Collects the steps of a fused formula, each once.

    Arguments:
        inputs: dtype of each input, None for a scalar; the list may grow while the formula is built.
    """

    def __init__(self, inputs: list[np.dtype[Any] | None]) -> None:
        self.inputs = inputs
        self.steps: list[ScalarStep] = []
        self._numbers: dict[Any, int] = {}

    def dtype(self, operand: Operand) -> np.dtype[Any] | None:
        """Dtype of an operand, None for a scalar."""
        kind, which = operand
        return self.inputs[which] if kind == "in" else self.steps[which].dtype if kind == "step" else None

    def step(self, fn: str, args: Sequence[Operand], compute: np.dtype[Any], dtype: np.dtype[Any]) -> Operand:
        """The operand for this step, which is added unless an equal one is there."""
        # Constants by their text, which tells -0.0 from 0.0.
        key = (fn, compute, dtype, *((kind, repr(x) if kind == "const" else x) for kind, x in args))
        number = self._numbers.setdefault(key, len(self.steps))
        if number == len(self.steps):
            self.steps.append(ScalarStep(fn, dtype, tuple(args), compute))
        return ("step", number)

    def cast(self, operand: Operand, dtype: np.dtype[Any]) -> Operand:
        """The operand in another dtype; scalars stay as they are, because every step brings them to its own."""
        source = self.dtype(operand)
        if source is None or source == dtype:  # not "in (None, dtype)": NumPy's float64 equals None
            return operand
        return self.step("cast", (operand,), source, dtype)

    def call(self, fn: str, args: Sequence[Operand], compute: np.dtype[Any]) -> Operand:
        """A scalar function computed in ``compute``; arguments of other dtypes are converted."""
        if fn == "identity" and self.dtype(args[0]) is not None:
            return self.cast(args[0], compute)
        truth = SCALAR_FUNCTIONS[fn][1] == "bool"
        if fn in _LOGIC and all((self.dtype(arg) or _BOOL) == _BOOL for arg in args):
            compute = _BOOL
        wanted = [_BOOL if fn == "where" and n == 0 else compute for n in range(len(args))]
        args = [self.cast(arg, dtype) for arg, dtype in zip(args, wanted, strict=True)]
        dtype = _BOOL if truth else compute
        if fn == "abs" and compute.kind == "c":
            dtype = np.dtype(f"f{compute.itemsize // 2}")
        return self.step(fn, args, compute, dtype)

    def tree(
        self, tree: Expr, args: Sequence[Operand], dtypes: Sequence[np.dtype[Any]], compute: np.dtype[Any]
    ) -> Operand:
        """The operand for a whole formula.

        Arguments:
            tree: the formula.
            args: what its ``Arg`` nodes stand for.
            dtypes: the dtype to which each of them is brought first.
            compute: the dtype that the formula is computed in.
        """
        values: dict[Expr, Operand] = {}
        for node in postorder(tree):
            if isinstance(node, Arg):
                values[node] = self.cast(args[node.index], dtypes[node.index])
            elif isinstance(node, Const):
                values[node] = ("const", node.value)
            elif isinstance(node, Call):
                values[node] = self.call(node.fn, [values[arg] for arg in node.args], compute)
        return values[tree]

    def result(self, operand: Operand, compute: np.dtype[Any], dtype: np.dtype[Any]) -> int:
        """The step that gives an operand as an array of ``dtype``; a scalar passes through ``compute``."""
        found = self.cast(operand, dtype)
        if found[0] != "step":
            found = self.step("cast", (operand,), self.dtype(operand) or compute, dtype)
        return int(found[1])

    def formula(self, outputs: Sequence[int]) -> FusedFormula:
        """The formula with the steps that the outputs need."""
        needed = set(outputs)
        for number in range(len(self.steps) - 1, -1, -1):
            if number in needed:
                needed.update(which for kind, which in self.steps[number].args if kind == "step")
        numbers = {old: new for new, old in enumerate(sorted(needed))}
        steps = tuple(
            ScalarStep(s.fn, s.dtype, tuple((k, numbers[w]) if k == "step" else (k, w) for k, w in s.args), s.compute)
            for s in (self.steps[n] for n in sorted(needed))
        )
        return FusedFormula(steps, tuple(numbers[n] for n in outputs))
