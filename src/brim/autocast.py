"""Mixed precision: which ops compute in half width inside ``brim.autocast``, which in float32; one table for all.

An op asks here before it runs (``Op.__call__``), and so does a function that the table names: to autocast it is one op,
and what it is made of runs as it is written. Casts are ordinary ops, so they are recorded, traced and differentiated:
parameters stay float32, and so do their gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ContextDecorator, contextmanager
from functools import wraps
from typing import Any, TypeVar

import numpy as np

from brim.context import context
from brim.spec import DTYPES, default_float

__all__ = ["FLOAT32", "KEPT", "LOW", "WIDEST", "Casts", "as_one", "autocast", "numerics", "suspended"]

# ------------------------------------------------------------------------------------------------------- the table
#
# Compared with "Autocast Op Reference" of PyTorch (docs.pytorch.org/docs/stable/amp.html). As there: products and
# convolutions run low; losses, sums, exponentials, logarithms and powers in float32; arithmetic on several tensors in
# the widest dtype of them; float64, complex numbers and integers are left alone; writes into a given tensor, and sums
# whose dtype is given, too; backward formulas run in the dtypes that the forward pass chose. Different here:
#
# - layer_norm, batch_norm and causal_softmax give the dtype that they are given. They compute in float32 inside, on
#   every device, and round once at the end; a float32 result would only double the activations. (PyTorch lists
#   layer_norm under float32 and does not list batch_norm; its causal softmax is part of fused attention, low as here.)
# - mean, var and std are float32 like the sums that they are made of; PyTorch does not list them on CUDA.
# - exp2, logaddexp, logsumexp, acosh, atanh are float32 like their relatives; tensordot is low, as the product it is.
# - 1 / x written as a division keeps its dtype; PyTorch treats it as a reciprocal.
# - The table is the same on all devices; PyTorch's differs between CUDA and the CPU.

LOW = frozenset((
    "matmul", "conv2d", "attention", "attention_dropout",
    # functions
    "linear", "scaled_dot_product_attention",
))  # fmt: skip
"""Float operands are cast to the dtype of the context; sums inside are float32 all the same."""

FLOAT32 = frozenset((
    # what leaves the range of half-width floats, or is steep
    "exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "logaddexp", "pow", "reciprocal", "rsqrt", "softplus",
    "tan", "sinh", "cosh", "acos", "asin", "acosh", "atanh",
    # sums and products over many elements
    "sum", "prod", "cumulative_sum", "softmax", "log_softmax", "logsumexp", "cross_entropy",
    # functions
    "mean", "var", "std",
    "nll_loss", "bce_with_logits", "mse_loss", "l1_loss", "huber_loss",
))  # fmt: skip
"""Operands of half width are cast to float32."""

WIDEST = frozenset((
    "add", "subtract", "multiply", "divide", "floor_divide", "remainder", "where", "maximum", "minimum", "clip",
    "atan2", "hypot", "copysign", "concat",
    "equal", "not_equal", "less", "less_equal", "greater", "greater_equal",
))  # fmt: skip
"""Operands meet in the widest dtype among them: ``brim.spec.promote`` sees to that with or without autocast."""

KEPT = frozenset((
    # one operand, and no more range than it has
    "negative", "positive", "abs", "sign", "square", "sqrt", "erf", "sin", "cos", "tanh", "atan", "asinh",
    "floor", "ceil", "trunc", "round", "relu", "leaky_relu", "sigmoid", "silu", "gelu", "gelu_tanh", "elu",
    "dropout", "max", "min", "max_pool2d", "max_pool2d_pick", "avg_pool2d",
    # float32 inside, whatever comes in
    "layer_norm", "batch_norm", "batch_norm_inference", "causal_softmax",
    # movement and what is asked for by dtype
    "astype", "copy", "reshape", "permute_dims", "broadcast_to", "slice", "set_slice", "take", "index_add", "put",
    "positions", "fill", "iota", "triangle", "pick_classes", "put_classes", "argsort", "sort", "transfer",
    # bools and integers
    "isnan", "isinf", "isfinite", "signbit", "any", "all", "argmax", "argmin",
    "logical_and", "logical_or", "logical_xor", "logical_not",
    "bitwise_and", "bitwise_or", "bitwise_xor", "bitwise_invert", "bitwise_left_shift", "bitwise_right_shift",
    # only called by backward formulas and optimizers, where autocast is off
    "conv2d_grad_input", "conv2d_grad_weight", "max_pool2d_grad", "avg_pool2d_grad",
    "softmax_grad", "log_softmax_grad", "causal_softmax_grad", "logsumexp_grad", "cross_entropy_grad",
    "batch_norm_grad", "layer_norm_grad", "attention_grad", "attention_dropout_grad",
    "sgd_update", "sgd_momentum_update", "adam_update", "amsgrad_update", "rmsprop_update", "rmsprop_plain_update",
    "rmsprop_centered_update", "squares_sum", "all_finite",
    # made by the passes over a traced program, which autocast has gone through already
    "store", "fused", "fused_many", "matmul_epilogue", "conv2d_epilogue",
    "cross_entropy_powers", "cross_entropy_powers_grad", "cross_entropy_with_grad",
    "layer_norm_fused", "layer_norm_grad_fused", "batch_norm_fused", "batch_norm_grad_fused",
))  # fmt: skip
"""The op does what it does without autocast. So does any op that the table does not name (one of a user's own)."""

# ------------------------------------------------------------------------------------------------- inside a context

_HALVES = {name: DTYPES[name] for name in ("bfloat16", "float16")}
_CAST = frozenset((*_HALVES.values(), default_float))
_TOO_WIDE = frozenset(DTYPES[name] for name in ("float64", "complex64", "complex128"))


class Casts:
    """Autocast at work: what operands become, and the casts of parameters, each made once.

    Arguments:
        dtype: "bfloat16" or "float16".
    """

    __slots__ = ("_made", "dtype")

    def __init__(self, dtype: np.dtype[Any]) -> None:
        self.dtype = dtype
        self._made: dict[int, tuple[Any, Any, int, Any]] = {}  # id -> tensor, its block and version then, its cast

    def operands(self, name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The operands of the op or function of this name, cast as the table says."""
        if name in LOW:
            wanted = self.dtype
        elif name in FLOAT32:
            wanted = default_float
        else:
            return args
        if any(hasattr(arg, "spec") and arg.dtype in _TOO_WIDE for arg in args):
            return args
        return tuple(self._cast(arg, wanted) if hasattr(arg, "spec") else arg for arg in args)

    def _cast(self, x: Any, wanted: np.dtype[Any]) -> Any:
        if x.dtype == wanted or x.dtype not in _CAST:
            return x
        if wanted == default_float or x._node is not None or not x.requires_grad:
            return x.astype(wanted)
        tensor, block, version, made = self._made.get(id(x), (None, None, 0, None))
        same = tensor is x and block is x._block and version == x.version
        # A cast made under no_grad has no gradient; the record of one is used up by backward().
        if not same or (context.grad_enabled and (made._node is None or made._node.saved is None)):
            made = x.astype(wanted)
            self._made[id(x)] = x, x._block, x.version, made
        return made


class autocast(ContextDecorator):
    """Mixed precision inside a block or a function: products in half width, what needs the range in float32.

    Parameters stay float32 and get float32 gradients; each is cast once, for as long as it keeps its values. Call
    ``backward()`` inside or outside, it is the same: gradients are computed in the dtypes of the forward pass.
    ``brim.autocast`` nests, holds for the thread that enters it, and is recorded by a step that is traced inside it:
    called in another state, the step is traced anew. Which op does what: ``LOW``, ``FLOAT32``, ``WIDEST``, ``KEPT`` in
    ``brim/autocast.py``.

    Source: P. Micikevicius et al., "Mixed precision training", ICLR 2018.

    Arguments:
        dtype: "bfloat16" (the range of float32), or "float16" (more digits; its gradients need
            ``brim.optim.GradScaler``); a dtype, too.
        enabled: False switches autocast off inside.

    Raises:
        ValueError: another dtype.
    """

    def __init__(self, dtype: Any = "bfloat16", enabled: bool = True) -> None:
        name = getattr(dtype, "name", dtype)
        if name not in _HALVES:
            raise ValueError(
                f"autocast computes in 'bfloat16' or 'float16', got {dtype!r}; enabled=False computes in full"
            )
        self.dtype, self.enabled = _HALVES[name], bool(enabled)
        self._outer: list[Casts | None] = []

    def _recreate_cm(self) -> autocast:
        return autocast(self.dtype, self.enabled)  # a decorated function may run in several threads

    def __enter__(self) -> None:
        outer = context.autocast
        self._outer.append(outer)
        if not self.enabled:
            context.autocast = None
        elif outer is None or outer.dtype != self.dtype:
            context.autocast = Casts(self.dtype)

    def __exit__(self, *error: object) -> None:
        context.autocast = self._outer.pop()


@contextmanager
def suspended() -> Iterator[None]:
    """Ops inside run as they are written: bodies of composites, backward formulas, optimizers."""
    before = context.autocast
    context.autocast = None
    try:
        yield
    finally:
        context.autocast = before


@contextmanager
def renewed() -> Iterator[None]:
    """Autocast as it is, but with casts of its own: those of a step that is traced are no tensors outside it."""
    before = context.autocast
    context.autocast = None if before is None else Casts(before.dtype)
    try:
        yield
    finally:
        context.autocast = before


@contextmanager
def restored(state: tuple[str | None, str | None]) -> Iterator[None]:
    """Numerics inside the block as ``numerics()`` was when it gave ``state``."""
    before = context.autocast, context.products
    name, context.products = state
    if name is None:
        context.autocast = None
    elif context.autocast is None or context.autocast.dtype.name != name:
        context.autocast = Casts(_HALVES[name])
    try:
        yield
    finally:
        context.autocast, context.products = before


def numerics() -> tuple[str | None, str | None]:
    """What this thread has chosen of how ops compute: autocast's dtype, precision of float32 products; None: neither.

    A traced step depends on both.
    """
    return (None if context.autocast is None else context.autocast.dtype.name), context.products


_F = TypeVar("_F", bound=Callable[..., Any])


def as_one(name: str) -> Callable[[_F], _F]:
    """Decorator: to autocast, the function is one op of this name in the table. Tensors that it gets as arguments of
    their own are cast; what it is made of runs as it is written."""

    def wrap(function: _F) -> _F:
        @wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            casts = context.autocast
            if casts is None:
                return function(*args, **kwargs)
            given = casts.operands(name, (*args, *kwargs.values()))
            with suspended():
                return function(*given[: len(args)], **dict(zip(kwargs, given[len(args) :], strict=True)))

        return run  # type: ignore[return-value]

    return wrap
