"""How CUDA kernels are registered, ``@kernel("name")`` on a function of specs, and how a kernel is chosen for an op."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from brim.backend import BoundKernel
from brim.expr import FusedFormula
from brim.op import Op
from brim.spec import Scalar, Spec
from brim_cuda import kernels
from brim_cuda.dnn import ALIGNMENT_BYTES, Dnn, DnnUnsupported
from brim_cuda.dnn_attention import ATTENTIONS, attention_request
from brim_cuda.dnn_conv import CONVOLUTIONS, conv_request
from brim_cuda.elementwise import elementwise_calls, fused_calls
from brim_cuda.launch import DnnCall, Loader, Scratch
from brim_cuda.steps import Step, bound

__all__ = ["KERNELS", "Work", "bind", "dnn_work", "kernel", "work_of"]


@dataclass(frozen=True, slots=True)
class Work:
    """What an op does on operands of certain specs, decided without a device.

    Attributes:
        calls: launches, products and calls of cuDNN, in order.
        scratch_bytes: working memory that they use.
        contiguous: which inputs must be row-major.
        aliasing: whether an output may be one of the inputs, element for element.
    """

    calls: Sequence[Step]
    scratch_bytes: int = 0
    contiguous: tuple[bool, ...] = ()
    aliasing: bool = False


Binder = Callable[..., Work]
KERNELS: dict[str, Binder] = {}


def kernel(*names: str) -> Callable[[Binder], Binder]:
    """Decorator: register ``f(ins, outs, **params) -> Work`` for ops; with several names it gets ``name=`` too.

    The function raises KeyError for specs that it has no kernel for.
    """

    def register(binder: Binder) -> Binder:
        for name in names:
            if name in KERNELS:
                raise ValueError(f"a CUDA kernel for {name!r} exists already")
            KERNELS[name] = (
                binder if len(names) == 1 else lambda *args, name=name, **params: binder(*args, name=name, **params)
            )
        return binder

    return register


@cache
def _import_kernels() -> None:
    for family in pkgutil.iter_modules(kernels.__path__):
        importlib.import_module(f"{kernels.__name__}.{family.name}")


def work_of(op: Op, ins: Sequence[Spec | Scalar], outs: Sequence[Spec], params: dict[str, Any]) -> Work:
    """The launches for an op on these specs. Raises KeyError where there is no kernel."""
    _import_kernels()
    if op.kind == "elementwise" and op.name not in KERNELS:
        return Work(elementwise_calls(op, ins, outs[0], params), aliasing=True)
    if op.name == "fused":
        return Work(fused_calls(params["formula"], ins, outs), aliasing=True)
    return KERNELS[op.name](ins, outs, **params)


def dnn_work(
    dnn: Dnn, op: Op, ins: Sequence[Spec | Scalar], outs: Sequence[Spec], params: dict[str, Any]
) -> Work | None:  # fmt: skip
    """What cuDNN does for an op on these specs, None where it is not asked or has no plan."""
    asked: Any = None
    if op.name in CONVOLUTIONS:
        asked = conv_request(op.name, ins, outs, params)
    elif op.name in ATTENTIONS:
        asked = attention_request(op.name, ins, outs, **params)
    if asked is None:
        return None
    request, places, contiguous = asked
    try:
        plan = dnn.plan(request)
    except DnnUnsupported:
        return None
    workspace = Scratch(0) if plan.workspace_bytes else None
    return Work((DnnCall(plan, places, workspace),), plan.workspace_bytes, contiguous)


def bind(
    loader: Loader,
    op: Op,
    ins: Sequence[Spec | Scalar],
    outs: Sequence[Spec],
    params: dict[str, Any],
    dnn: Dnn | None = None,
) -> BoundKernel:
    """The kernel for an op on these specs, run by a loader. Raises KeyError where there is none.

    Arguments:
        dnn: what is preferred where it has a plan.
    """
    work = None if dnn is None else dnn_work(dnn, op, ins, outs, params)
    if work is None:
        work = work_of(op, ins, outs, params)
    return bound(
        loader,
        work.calls,
        title=_title(op, ins, params),
        scratch_bytes=work.scratch_bytes,
        contiguous=work.contiguous or (False,) * len(ins),
        aliasing=work.aliasing,
        aligned_bytes=ALIGNMENT_BYTES if any(isinstance(step, DnnCall) for step in work.calls) else 1,
    )


def _title(op: Op, ins: Sequence[Spec | Scalar], params: dict[str, Any]) -> str:
    """The op and its operands, for messages; of a fused group what it consists of."""
    name = op.name
    if name == "fused":
        name = f"fused {_functions(params['formula'])}"
    elif "before" in params and "after" in params:
        name = f"{name} {_functions(params['before'])}, {_functions(params['after'])}"
    return f"{name}({', '.join(str(i) if isinstance(i, Spec) else type(i).__name__ for i in ins)})"


def _functions(formula: FusedFormula) -> str:
    """What a formula consists of."""
    return "+".join(dict.fromkeys(step.fn for step in formula.steps))
