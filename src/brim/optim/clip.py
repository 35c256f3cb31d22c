"""Gradient clipping, by the norm of all gradients together or by value."""

from __future__ import annotations

import math
from collections.abc import Iterable
from numbers import Real
from typing import Any

from brim import ops
from brim.autocast import suspended
from brim.autograd import no_grad
from brim.context import phase_scope
from brim.creation import zeros
from brim.ops.together import squares_sum
from brim.tensor import Tensor

__all__ = ["clip_grad_norm_", "clip_grad_value_"]


def clip_grad_norm_(
    parameters: Iterable[Tensor] | Tensor,
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
) -> Tensor:
    """Scale all gradients by min(1, max_norm / (norm + 1e-6)), where the norm is of all of them as one vector.

    A norm that is NaN makes all gradients NaN. Gradients of half width are squared and added in float32.

    Arguments:
        parameters: a tensor or tensors; those without a gradient do not count.
        max_norm: at least 0. In a planned step it is the same in every run, unless it is ``context.host_scalar(...)``.
        norm_type: p of the norm, above 0; infinity for the largest absolute value.
        error_if_nonfinite: read the norm and raise when it is not finite (not inside a planned step).

    Returns:
        The norm before clipping, a tensor without axes; ``float(norm)`` reads it.

    Raises:
        ValueError: max_norm or norm_type out of range.
        FloatingPointError: the norm is not finite and ``error_if_nonfinite`` is set; nothing was changed.
    """
    p = float(norm_type)
    if not p > 0 or (isinstance(max_norm, Real) and not max_norm >= 0):
        raise ValueError(f"expected max_norm >= 0 and norm_type > 0, got {max_norm!r} and {norm_type!r}")
    members = _with_gradients(parameters)
    with no_grad(), suspended(), phase_scope("update"):
        grads = [member.grad for member in members if member.grad.size]
        if not grads:
            return zeros((), device=members[0].grad.device if members else None)
        norm: Tensor = _norm(grads, p)
        if error_if_nonfinite and not math.isfinite(norm):
            raise FloatingPointError(
                f"the norm of the gradients is {float(norm)}; lower the learning rate or look for NaN"
            )
        factor = ops.minimum(max_norm / (norm + 1e-6), 1.0)
        for member in members:
            member.grad = _scaled(member.grad, factor).book_as("grads")
    return norm


def clip_grad_value_(parameters: Iterable[Tensor] | Tensor, clip_value: float) -> None:
    """Limit every element of every gradient to [-clip_value, clip_value]. Raises ValueError if clip_value < 0."""
    if not clip_value >= 0:
        raise ValueError(f"expected clip_value >= 0, got {clip_value!r}")
    limit = float(clip_value)
    with no_grad(), suspended(), phase_scope("update"):
        for p in _with_gradients(parameters):
            p.grad = ops.minimum(ops.maximum(p.grad, -limit), limit).book_as("grads")


def _with_gradients(parameters: Iterable[Tensor] | Tensor) -> list[Any]:
    given = [parameters] if isinstance(parameters, Tensor) else parameters
    return [p for p in given if p.grad is not None]


def _wide(grad: Any) -> Any:
    """Float32 for half widths: their squares overflow, and a small factor would become 0."""
    return grad.astype("float32") if grad.dtype.itemsize < 4 else grad


def _norm(grads: list[Any], p: float) -> Any:
    """The p-norm of all gradients as one vector, on the device of the first."""
    if p == 2.0:
        by_device: dict[Any, list[Any]] = {}
        for grad in grads:
            by_device.setdefault(grad.device, []).append(grad)
        parts = [squares_sum(*some) for some in by_device.values()]
    else:
        parts = [_part(grad, p) for grad in grads]
    parts = [part.to(grads[0].device) for part in parts]
    if math.isinf(p):
        return ops.max(ops.stack(parts))
    total = parts[0] if len(parts) == 1 else ops.sum(ops.stack(parts))
    return ops.sqrt(total) if p == 2.0 else total ** (1.0 / p)


def _part(grad: Any, p: float) -> Any:
    magnitudes = ops.abs(_wide(grad))
    return ops.max(magnitudes) if math.isinf(p) else (magnitudes**p).sum()


def _scaled(grad: Any, factor: Any) -> Any:
    wide = _wide(grad)
    return (wide * factor.to(device=grad.device, dtype=wide.dtype)).astype(grad.dtype)
