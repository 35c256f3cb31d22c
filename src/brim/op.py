"""The op record: one op, stated once. Rule for output specs, formula or body, gradient; and the registry of all ops.

Four kinds share one record:

- *elementwise*: one scalar formula, from which every backend derives its code;
- *primitive*: each backend supplies a kernel ``kernel(out, *ins, scratch=None, **params)`` that allocates nothing;
- *view*: no kernel at all, only a rule from the input's layout to the output's (reshape, permute, slice, expand);
- *composite*: a body of other ops that works everywhere; a backend may lay a kernel over it under the same name. One
  without a gradient is for gradients: where they are differentiated again, its body runs and its ops record themselves.

A gradient is a function of Tensors written with ops. It receives the gradients of the outputs, the inputs and the
outputs, in this order, and the params by keyword. **An argument whose name starts with an underscore is not kept in
memory for the backward pass: the function gets its Spec instead.** It returns one entry an input: a Tensor, None, or
a function without arguments that is called only when that input's gradient is wanted.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from brim.context import context
from brim.errors import DTypeError
from brim.expr import Arg, Call, Expr, FormulaBuilder, FusedFormula, Operand, call, substitute, trace_formula
from brim.spec import (
    DTYPES,
    Scalar,
    Spec,
    broadcast_shapes,
    default_float,
    is_complex,
    is_float,
    is_inexact,
    is_integer,
    promote,
)

__all__ = ["REGISTRY", "Op", "composite", "elementwise", "formula_of", "primitive", "set_eager_interpreter", "view"]

REGISTRY: dict[str, Op] = {}

_eager: Any = None


def set_eager_interpreter(interpreter: Any) -> None:
    """Name the object whose ``apply(op, args, params, out)`` runs ops when nothing is being traced."""
    global _eager
    _eager = interpreter


class Op:
    """One operation. Calling it is the only way anything is computed.

    Attributes:
        name: unique; backends register kernels under it.
        kind: "elementwise", "primitive", "view" or "composite".
        arity: number of inputs, or None when it varies (concat).
        doc: one sentence for the table of ops.
        outputs: number of outputs; the last ``aux`` of them carry no gradient.
        vjp: the gradient (see the module's docstring), or None.
        formula: the expression tree of an elementwise op.
        body: the function of a composite.
        keeps_inputs, keeps_outputs: what the gradient reads, so what stays in memory until the backward pass.
    """

    __slots__ = (
        "_rule",
        "accepts",
        "arity",
        "aux",
        "body",
        "doc",
        "formula",
        "keeps_inputs",
        "keeps_outputs",
        "kind",
        "name",
        "outputs",
        "promoted",
        "returns",
        "view_rule",
        "vjp",
    )

    def __init__(
        self,
        name: str,
        kind: str,
        *,
        arity: int | None,
        outputs: int = 1,
        aux: int = 0,
        rule: Callable[..., Any] | None = None,
        vjp: Callable[..., Any] | None = None,
        formula: Expr | None = None,
        body: Callable[..., Any] | None = None,
        view_rule: Callable[..., Any] | None = None,
        accepts: str = "any",
        returns: str = "same",
        promoted: tuple[int, ...] | None = None,
        doc: str | None = None,
    ) -> None:
        if name in REGISTRY:
            raise ValueError(f"an op named {name!r} exists already")
        self.name, self.kind, self.arity, self.outputs, self.aux = name, kind, arity, outputs, aux
        self._rule, self.vjp, self.formula, self.body, self.view_rule = rule, vjp, formula, body, view_rule
        self.accepts, self.returns, self.promoted = accepts, returns, promoted
        self.doc = (doc or "").strip().partition("\n")[0]
        self.keeps_inputs, self.keeps_outputs = _kept(name, vjp, arity, outputs, aux)
        REGISTRY[name] = self

    def __repr__(self) -> str:
        return f"<brim op {self.name} ({self.kind})>"

    def __call__(self, *args: Any, **params: Any) -> Any:
        """Run (or trace, or splice into a formula) this op."""
        if self.formula is not None:
            for arg in args:
                if isinstance(arg, Expr):
                    return substitute(self.formula, tuple(a if isinstance(a, Expr) else _const(a) for a in args))
        if context.autocast is not None:
            args = context.autocast.operands(self.name, args)
        interpreter = context.interpreter
        return (_eager if interpreter is None else interpreter).apply(self, args, params, None)

    def into(self, out: Any, *args: Any, **params: Any) -> Any:
        """Run this op and write its outputs into existing tensors (which may be among the inputs).

        Arguments:
            out: a Tensor, or a tuple of Tensors (None where an output should be newly made).
        """
        interpreter = context.interpreter
        return (_eager if interpreter is None else interpreter).apply(self, args, params, out)

    def has_kernel(self, device: Any, *ins: Any, **params: Any) -> bool:
        """Whether a device has a kernel of its own for this composite; where not, its body would run.

        Arguments:
            device: where the inputs are.
            ins: the inputs: tensors, or specs of them, and Python numbers.
        """
        interpreter = context.interpreter
        return bool((_eager if interpreter is None else interpreter).has_kernel(self, device, ins, params))

    def infer(self, ins: Sequence[Spec | Scalar], params: dict[str, Any]) -> tuple[Spec, ...]:
        """Specs of the outputs, from specs of the inputs alone. Raises ShapeError, DTypeError."""
        if self.kind == "elementwise":
            _, result = self.dtypes(ins, params)
            return (Spec(broadcast_shapes(*(i.shape for i in ins if isinstance(i, Spec))), result),)
        if self._rule is None:
            interpreter = context.interpreter
            return (_eager if interpreter is None else interpreter).infer(self, ins, params)
        specs = self._rule(*ins, **params)
        return (specs,) if isinstance(specs, Spec) else tuple(specs)

    def dtypes(self, ins: Sequence[Spec | Scalar], params: dict[str, Any]) -> tuple[np.dtype[Any], np.dtype[Any]]:
        """Of an elementwise op: the dtype its formula is computed in, and the dtype of its result."""
        taking_part = ins if self.promoted is None else [ins[i] for i in self.promoted]
        compute = promote(*(i.dtype if isinstance(i, Spec) else i for i in taking_part))
        if self.promoted is not None:
            for index, operand in enumerate(ins):
                is_bool = operand.dtype.kind == "b" if isinstance(operand, Spec) else isinstance(operand, bool)
                if index not in self.promoted and not is_bool:
                    raise DTypeError(f"{self.name}: input {index} must be bool, got {_dtype_name(operand)}")
        compute = _accept(self.name, self.accepts, compute)
        if self.returns == "same":
            return compute, compute
        if self.returns == "bool":
            return compute, DTYPES["bool"]
        if self.returns == "param":
            return compute, params["dtype"]
        return compute, DTYPES["float32" if compute.itemsize == 8 else "float64"] if is_complex(compute) else compute

    def splice(
        self,
        builder: FormulaBuilder,
        operands: Sequence[Operand],
        ins: Sequence[Spec | Scalar],
        params: dict[str, Any],
        dtype: np.dtype[Any],
    ) -> Operand:
        """Add an elementwise op to a fused formula, with every conversion: the operand for its result in ``dtype``.

        Half-width floats are computed in float32 and rounded once, at the end.
        """
        assert self.formula is not None
        if is_plain_call(self.formula) and self.formula.fn == "identity" and isinstance(ins[0], Spec):  # type: ignore[attr-defined]
            return builder.cast(operands[0], dtype)
        compute, _ = self.dtypes(ins, params)
        if is_float(compute) and compute.itemsize == 2:
            compute = default_float
        dtypes = [
            compute if self.promoted is None or index in self.promoted else DTYPES["bool"] for index in range(len(ins))
        ]
        result = builder.tree(self.formula, operands, dtypes, compute)
        if builder.dtype(result) is None:
            return ("step", builder.result(result, compute, dtype))
        return builder.cast(result, dtype)


def _dtype_name(operand: Spec | Scalar) -> str:
    return str(operand.dtype) if isinstance(operand, Spec) else type(operand).__name__


def _const(value: Any) -> Expr:
    return call("identity", value).args[0]  # type: ignore[attr-defined]


def _accept(name: str, accepts: str, dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The compute dtype for inputs that meet in ``dtype``, or DTypeError."""
    if accepts == "any":
        return dtype
    if accepts in ("numeric", "real"):
        if accepts == "real" and is_complex(dtype):
            raise DTypeError(f"{name} is not defined for complex numbers, got {dtype}")
        return DTYPES["int64"] if dtype.kind == "b" else dtype
    if accepts in ("inexact", "float"):
        if accepts == "float" and is_complex(dtype):
            raise DTypeError(f"{name} is not defined for complex numbers, got {dtype}")
        return dtype if is_inexact(dtype) else default_float
    if accepts == "bits" and (is_integer(dtype) or dtype.kind == "b"):
        return dtype
    if accepts == "bits":
        raise DTypeError(f"{name} works on integers and bools, got {dtype}")
    if accepts == "integer" and is_integer(dtype):
        return dtype
    if accepts == "bool" and dtype.kind == "b":
        return dtype
    raise DTypeError(f"{name} expects {accepts} inputs, got {dtype}; convert with astype()")


def _kept(
    name: str, vjp: Callable[..., Any] | None, arity: int | None, outputs: int, aux: int
) -> tuple[tuple[bool, ...], tuple[bool, ...]]:
    if vjp is None:
        return (), ()
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [p.name for p in inspect.signature(vjp).parameters.values() if p.kind in kinds]
    inputs = 1 if arity is None else arity  # a varying number of inputs arrives as one tuple
    want = (outputs - aux) + inputs + outputs
    if len(names) != want:
        raise ValueError(f"gradient of {name}: takes {want} arguments (gradients, inputs, outputs), has {names}")
    kept = [not n.startswith("_") for n in names[outputs - aux :]]
    return tuple(kept[:inputs]), tuple(kept[inputs:])


def elementwise(
    name: str,
    formula: Callable[..., Any],
    vjp: Callable[..., Any] | None = None,
    *,
    accepts: str = "numeric",
    returns: str = "same",
    promoted: tuple[int, ...] | None = None,
    doc: str | None = None,
) -> Op:
    """An op that computes every element by one scalar formula.

    Arguments:
        name: unique name.
        formula: function of expression nodes (``brim.expr``), called once.
        vjp: gradient; see the module's docstring.
        accepts: "any", "numeric" (bools become int64), "real", "inexact" (integers become float32), "float"
            (the same, without complex), "bits" (integers and bools), "integer", "bool".
        returns: "same" (the compute dtype), "bool", "real" (of a complex number), "param" (the param ``dtype``).
        promoted: inputs that take part in promotion (default all); the others must be bool.
        doc: one sentence for the table of ops.
    """
    arity = len(inspect.signature(formula).parameters)
    tree = trace_formula(formula, arity)
    return Op(
        name,
        "elementwise",
        arity=arity,
        vjp=vjp,
        formula=tree,
        accepts=accepts,
        returns=returns,
        promoted=promoted,
        doc=doc,
    )


def primitive(
    name: str,
    spec: Callable[..., Any],
    vjp: Callable[..., Any] | None = None,
    *,
    arity: int | None = 1,
    outputs: int = 1,
    aux: int = 0,
    doc: str | None = None,
) -> Op:
    """An op for which every backend has a kernel. ``spec(*in_specs, **params)`` gives the output spec(s)."""
    return Op(name, "primitive", arity=arity, outputs=outputs, aux=aux, rule=spec, vjp=vjp, doc=doc)


def view(
    name: str, rule: Callable[..., tuple[Spec, int] | None], vjp: Callable[..., Any] | None, doc: str | None = None
) -> Op:
    """An op that only reads its input differently.

    ``rule(spec, **params)`` gives the output's Spec (with layout) and its offset in elements from the input's first
    element, or None when no view of that layout exists; the input is then copied to row-major order first.
    """

    def spec(x: Spec, **params: Any) -> Spec:
        found = rule(x, **params) or rule(Spec(x.shape, x.dtype), **params)
        if found is None:
            raise AssertionError(f"view {name} has no rule for a contiguous input")
        return found[0]

    return Op(name, "view", arity=1, rule=spec, vjp=vjp, view_rule=rule, doc=doc)


def composite(
    name: str, *, vjp: Callable[..., Any] | None = None, outputs: int = 1, aux: int = 0
) -> Callable[[Callable[..., Any]], Op]:
    """Decorator: an op whose body is made of other ops. Positional parameters are inputs, keyword-only ones params.

    With ``*xs`` the number of inputs varies.
    """

    def register(body: Callable[..., Any]) -> Op:
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        given = [p.kind for p in inspect.signature(body).parameters.values()]
        arity = None if inspect.Parameter.VAR_POSITIONAL in given else sum(kind in kinds for kind in given)
        return Op(name, "composite", arity=arity, outputs=outputs, aux=aux, vjp=vjp, body=body, doc=body.__doc__)

    return register


def formula_of(op: Op, ins: Sequence[Spec | Scalar], out: Spec, params: dict[str, Any]) -> FusedFormula:
    """The typed steps of one elementwise op."""
    builder = FormulaBuilder([i.dtype if isinstance(i, Spec) else None for i in ins])
    result = op.splice(builder, [("in", n) for n in range(len(ins))], ins, params, out.dtype)
    return builder.formula([builder.result(result, out.dtype, out.dtype)])


def is_plain_call(tree: Expr) -> bool:
    """True for a formula that is one scalar function of the inputs in order."""
    return isinstance(tree, Call) and tree.args == tuple(Arg(i) for i in range(len(tree.args)))


def float_only(name: str, dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The dtype itself, or DTypeError when it is no float."""
    if not is_float(dtype):
        raise DTypeError(f"{name} expects a float dtype, got {dtype}; convert with astype('float32')")
    return dtype
