"""Gradient clipping, by the norm of all gradients together or by value."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from brim import ops
from brim.autograd import no_grad
from brim.tensor import Tensor

__all__ = ["clip_grad_norm_", "clip_grad_value_"]


def clip_grad_norm_(
    parameters: Iterable[Tensor] | Tensor,
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
) -> float:
    """Scale all gradients by min(1, max_norm / (norm + 1e-6)), where the norm is of all of them as one vector.

    Returns:
        The norm before clipping.

    Raises:
        ValueError: max_norm or norm_type out of range.
        FloatingPointError: the norm is not finite and ``error_if_nonfinite`` is set; nothing was changed.
    """
    if not max_norm >= 0 or not norm_type > 0:
        raise ValueError(f"expected max_norm >= 0 and norm_type > 0, got {max_norm!r} and {norm_type!r}")
    members = _with_gradients(parameters)
    with no_grad():
        parts = [_power_sum(p.grad, norm_type) for p in members]
        norm = max(parts, default=0.0) if math.isinf(norm_type) else math.fsum(parts) ** (1.0 / norm_type)
        if any(math.isnan(part) for part in parts):
            norm = math.nan
        if error_if_nonfinite and not math.isfinite(norm):
            raise FloatingPointError(f"the norm of the gradients is {norm}; lower the learning rate or look for NaN")
        factor = max_norm / (norm + 1e-6)
        if not factor >= 1.0:  # also when it is NaN, which must not be hidden
            for p in members:
                p.grad = (p.grad * factor).book_as("grads")
    return norm


def clip_grad_value_(parameters: Iterable[Tensor] | Tensor, clip_value: float) -> None:
    """Limit every element of every gradient to [-clip_value, clip_value]. Raises ValueError if clip_value < 0."""
    if not clip_value >= 0:
        raise ValueError(f"expected clip_value >= 0, got {clip_value!r}")
    limit = float(clip_value)
    with no_grad():
        for p in _with_gradients(parameters):
            p.grad = ops.minimum(ops.maximum(p.grad, -limit), limit).book_as("grads")


def _with_gradients(parameters: Iterable[Tensor] | Tensor) -> list[Any]:
    given = [parameters] if isinstance(parameters, Tensor) else parameters
    return [p for p in given if p.grad is not None]


def _power_sum(grad: Any, norm_type: float) -> float:
    if math.isinf(norm_type):
        return float(ops.max(ops.abs(grad)).item()) if grad.size else 0.0
    if norm_type == 2.0:
        return float((grad * grad).sum().item())
    return float((ops.abs(grad) ** float(norm_type)).sum().item())
