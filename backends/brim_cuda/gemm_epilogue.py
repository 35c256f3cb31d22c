"""Which elementwise formulas after a product cuBLASLt computes with it: recognised by what they compute, term for term.

Known are ``act(alpha x0 + beta C + bias)`` with the identity, relu or gelu_tanh (cuBLASLt's GELU is the tanh form), the
pre-activation beside it where gelu_tanh's gradient will want it, and gelu_tanh's gradient ``x0 * gelu'(x1)``. The
formula is computed on the sum itself: of half-width floats the product and the steps are not rounded in between, so
results are closer to the true ones than step by step. relu's gradient is not among them: the library keeps bits for
it, brim keeps the result.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from brim.expr import Arg, Call, Const, Expr, FusedFormula
from brim.op import REGISTRY
from brim.spec import DTYPES, Scalar, Spec
from brim_cuda.cublaslt import Epilogue
from brim_cuda.gemm import GemmPlan, plan_matmul

__all__ = ["Finish", "joins_epilogue", "match_epilogue", "plan_epilogue"]

_COMMUTATIVE = frozenset(("add", "mul", "max", "min"))
_MATMUL_INPUTS = 2


@dataclass(frozen=True, slots=True)
class Finish:
    """What follows a product, in the library's words.

    Attributes:
        epilogue: its name for it.
        alpha, beta: factors of the product and of the added matrix.
        bias, added, aux_in: numbers of the inputs of the op (2 is the first after the operands) that are the bias,
            the added matrix, and what went into the activation whose gradient this is; None without.
        out, aux_out: numbers of the outputs that are the result, and what went into the activation.
    """

    epilogue: Epilogue = Epilogue.DEFAULT
    alpha: float = 1.0
    beta: float = 0.0
    bias: int | None = None
    added: int | None = None
    aux_in: int | None = None
    out: int = 0
    aux_out: int | None = None


class _Terms:
    """Scalar expressions as numbers: equal numbers are equal expressions. Conversions between floats are left out."""

    def __init__(self) -> None:
        self.keys: list[tuple[Any, ...]] = []
        self._numbers: dict[tuple[Any, ...], int] = {}

    def number(self, *key: Any) -> int:
        if key[0] in _COMMUTATIVE:
            key = (key[0], *sorted(key[1:]))
        found = self._numbers.setdefault(key, len(self.keys))
        if found == len(self.keys):
            self.keys.append(key)
        return found

    def const(self, value: Any) -> int:
        return self.number("const", repr(float(value)))

    def tree(self, tree: Any, args: Sequence[int]) -> int:
        """The term of an expression whose ``Arg(i)`` are given terms."""
        known: dict[Expr, int] = {}

        def visit(node: Expr) -> int:
            if node not in known:
                if isinstance(node, Arg):
                    known[node] = args[node.index]
                elif isinstance(node, Const):
                    known[node] = self.const(node.value)
                else:
                    assert isinstance(node, Call)
                    known[node] = self.number(node.fn, *map(visit, node.args))
            return known[node]

        return visit(tree)

    def formula(self, formula: FusedFormula, allowed: Sequence[np.dtype[Any]]) -> list[int] | None:
        """Terms of the outputs; None where a step is not computed in the allowed floats."""
        steps: list[int] = []
        for step in formula.steps:
            if step.fn == "uniform" or step.dtype not in allowed or step.compute not in allowed:
                return None
            if any(kind == "const" and isinstance(which, complex) for kind, which in step.args):
                return None
            args = [
                steps[which] if kind == "step" else self.const(which) if kind == "const" else self.number("in", which)
                for kind, which in step.args
            ]
            steps.append(args[0] if step.fn in ("cast", "identity") else self.number(step.fn, *args))
        return [steps[which] for which in formula.outputs]


@dataclass(frozen=True, slots=True)
class _Affine:
    """alpha x0 + beta x[added] + x[bias], numbers of formula inputs."""

    alpha: float = 1.0
    beta: float = 0.0
    added: int | None = None
    bias: int | None = None


class _Matcher:
    """Reads terms; ``bias`` and ``full`` tell which inputs of the formula are vectors and matrices that fit."""

    def __init__(self, terms: _Terms, bias: set[int], full: set[int]) -> None:
        self.terms, self.bias, self.full = terms, bias, full
        self.product = terms.number("in", 0)

    def _const(self, term: int) -> float | None:
        key = self.terms.keys[term]
        return float(key[1]) if key[0] == "const" else None

    def _scaled(self, term: int) -> tuple[float, int] | None:
        """(factor, number of the input) of an input times a constant."""
        fn, *args = self.terms.keys[term]
        if fn == "in":
            return 1.0, args[0]
        if fn == "neg":
            inner = self._scaled(args[0])
            return inner and (-inner[0], inner[1])
        if fn == "mul":
            for one, other in (args, args[::-1]):
                factor, inner = self._const(one), self._scaled(other)
                if factor is not None and inner is not None and inner[0] == 1.0:
                    return factor, inner[1]
        if fn == "div":
            factor, inner = self._const(args[1]), self._scaled(args[0])
            exact = factor and math.isfinite(factor) and abs(math.frexp(factor)[0]) == 0.5  # a power of two
            if factor and exact and inner is not None and inner[0] == 1.0:
                return 1.0 / factor, inner[1]
        return None

    def affine(self, term: int) -> _Affine | None:
        scaled = self._scaled(term)
        if scaled is not None:
            return _Affine(scaled[0]) if scaled[1] == 0 and math.isfinite(scaled[0]) else None
        fn, *args = self.terms.keys[term]
        if fn not in ("add", "sub"):
            return None
        for one, other in (args, args[::-1]):
            base, more = self.affine(one), self._scaled(other)
            if base is None or more is None or not math.isfinite(more[0]) or more[0] == 0:
                continue
            factor, which = more
            if fn == "sub" and one == args[0]:
                factor = -factor
            elif fn == "sub":
                if base.bias is not None:
                    continue
                base = _Affine(-base.alpha, -base.beta, base.added, base.bias)
            if which in self.bias and factor == 1.0 and base.bias is None:
                return _Affine(base.alpha, base.beta, base.added, which)
            if which in self.full and base.added is None:
                return _Affine(base.alpha, factor, which, base.bias)
        return None

    def gelu(self, term: int) -> int:
        return self.terms.tree(REGISTRY["gelu_tanh"].formula, [term])

    def gelu_gradient(self, gradient: int, which: int) -> int:
        vjp = REGISTRY["gelu_tanh"].vjp
        assert vjp is not None
        return self.terms.tree(vjp(Arg(0), Arg(1), None), [gradient, self.terms.number("in", which)])


def _fits(spec: Any, shape: tuple[int, ...], dtype: np.dtype[Any]) -> str:
    """ "bias" for a dense vector along the last axis, "full" for a row-major array of the shape, else ""."""
    if not isinstance(spec, Spec) or spec.dtype != dtype or not spec.size:
        return ""
    last = spec.shape[-1] if spec.ndim else 0
    if last == shape[-1] == spec.size and (spec.strides[-1] == 1 or last == 1):
        return "bias"
    return "full" if spec.shape == shape and spec.contiguous else ""


def match_epilogue(ins: Sequence[Spec | Scalar], outs: Sequence[Spec], params: dict[str, Any]) -> Finish | None:
    """What a ``matmul_epilogue`` of these specs is to the library; None where it has no word for it.

    Arguments:
        ins: (a, b, *others); the formula's input 0 is their product, read as an array of ``params["shape"]``.
        outs: row-major arrays of that shape.
        params: "formula" and "shape", as in ``brim.program.passes.epilogue``.
    """
    formula, shape = params["formula"], tuple(params["shape"])
    a, b = ins[:2]
    if not isinstance(a, Spec) or not isinstance(b, Spec) or not shape or shape[-1] != b.shape[-1]:
        return None
    dtype = outs[0].dtype
    half = a.dtype.itemsize == 2
    wide = DTYPES["float32"] if half else a.dtype
    if a.dtype.kind == "c" or dtype not in ((a.dtype, wide) if half else (a.dtype,)):
        return None
    if any(out.dtype != dtype or out.shape != shape or not out.contiguous for out in outs):
        return None
    terms = _Terms()
    roots = terms.formula(formula, (a.dtype, wide))
    if roots is None or not 1 <= len(roots) <= 2:
        return None
    fits = [_fits(spec, shape, dtype) for spec in ins[_MATMUL_INPUTS:]]
    bias, full = ({n for n, word in enumerate(fits, 1) if word == kind} for kind in ("bias", "full"))
    matcher = _Matcher(terms, bias, full)
    found = _one(matcher, roots[0], wide) if len(roots) == 1 else _two(matcher, roots, wide)
    return found if found is not None and _reads_all(found, len(ins)) else None


def _reads_all(found: Finish, inputs: int) -> bool:
    return len({found.bias, found.added, found.aux_in} - {None}) == inputs - _MATMUL_INPUTS


def _finish(base: _Affine, plain: Epilogue, with_bias: Epilogue, **more: Any) -> Finish:
    number = {None: None} | {n: n + 1 for n in (base.bias, base.added) if n is not None}
    word = plain if base.bias is None else with_bias
    return Finish(word, base.alpha, base.beta, number[base.bias], number[base.added], **more)


def _one(matcher: _Matcher, root: int, wide: np.dtype[Any]) -> Finish | None:
    base = matcher.affine(root)
    if base is not None and (base.bias is None or wide == DTYPES["float32"]):
        return _finish(base, Epilogue.DEFAULT, Epilogue.BIAS)
    if wide != DTYPES["float32"]:
        return None  # the library documents activations for float32 sums
    for term in range(len(matcher.terms.keys)):
        base = matcher.affine(term)
        if base is None:
            continue
        if root == matcher.terms.number("max", term, matcher.terms.const(0)):
            return _finish(base, Epilogue.RELU, Epilogue.RELU_BIAS)
        if root == matcher.gelu(term):
            return _finish(base, Epilogue.GELU, Epilogue.GELU_BIAS)
        if base.bias is None and base.added is None:
            for which in matcher.full:
                if root == matcher.gelu_gradient(term, which):
                    return Finish(Epilogue.DGELU, base.alpha, aux_in=which + 1)
    return None


def _two(matcher: _Matcher, roots: Sequence[int], wide: np.dtype[Any]) -> Finish | None:
    if wide != DTYPES["float32"]:
        return None
    for out, aux in ((0, 1), (1, 0)):
        base = matcher.affine(roots[aux])
        if base is not None and roots[out] == matcher.gelu(roots[aux]):
            return _finish(base, Epilogue.GELU_AUX, Epilogue.GELU_AUX_BIAS, out=out, aux_out=aux)
    return None


def plan_epilogue(
    ins: Sequence[Spec | Scalar],
    outs: Sequence[Spec],
    params: dict[str, Any],
    *,
    tf32: bool = False,
    workspace_bytes: int = 4 << 20,
) -> tuple[GemmPlan, Finish] | None:
    """The plan of a ``matmul_epilogue``, and which inputs and outputs take part; None where the library cannot."""
    found = match_epilogue(ins, outs, params)
    if found is None:
        return None
    a, b = ins[:2]
    assert isinstance(a, Spec)
    assert isinstance(b, Spec)
    lead = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    made = Spec((*lead, a.shape[-2], b.shape[-1]), outs[0].dtype)
    try:
        plan = plan_matmul(
            a, b, made, epilogue=found.epilogue, alpha=found.alpha, beta=found.beta,
            added=None if found.added is None else made, tf32=tf32, workspace_bytes=workspace_bytes,
        )  # fmt: skip
    except (TypeError, ValueError):  # a layout, size or dtype that this epilogue does not go with
        return None
    return plan, found


def joins_epilogue(name: str, ins: Sequence[Spec | Scalar], outs: Sequence[Spec], params: dict[str, Any]) -> bool:
    """Whether the op ``name`` with these specs is one call of the library (see ``Backend.joins_epilogue``)."""
    return name == "matmul_epilogue" and plan_epilogue(ins, outs, params) is not None
