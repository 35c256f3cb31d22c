"""Update rules of optimizers: composites from a parameter, its gradient and the state to their next values.

Learning rates and other numbers that change between steps are inputs, never params: one record of a step serves all.
"""

from __future__ import annotations

from typing import Any

from brim.op import composite
from brim.ops.arithmetic import maximum, sqrt


def _descent(param: Any, grad: Any, weight_decay: Any, maximize: bool) -> Any:
    """The gradient to descend along, with the L2 penalty's."""
    return (-grad if maximize else grad) + weight_decay * param


@composite("sgd_update")
def sgd_update(param: Any, grad: Any, lr: Any, weight_decay: Any, *, maximize: bool) -> Any:
    """p - lr (g + weight_decay p)"""
    return param - lr * _descent(param, grad, weight_decay, maximize)


@composite("sgd_momentum_update", outputs=2)
def sgd_momentum_update(
    param: Any,
    grad: Any,
    velocity: Any,
    lr: Any,
    momentum: Any,
    dampening: Any,
    weight_decay: Any,
    *,
    nesterov: bool,
    maximize: bool,
) -> Any:
    """d = g + weight_decay p; v = momentum v + (1 - dampening) d; p - lr v, or p - lr (d + momentum v) for Nesterov"""
    d = _descent(param, grad, weight_decay, maximize)
    velocity = momentum * velocity + (1.0 - dampening) * d
    return param - lr * (d + momentum * velocity if nesterov else velocity), velocity


def _adam_moments(param: Any, grad: Any, m: Any, v: Any, beta1: Any, beta2: Any, decay: Any, flags: Any) -> Any:
    decoupled, maximize = flags
    d = (-grad if maximize else grad) if decoupled else _descent(param, grad, decay, maximize)
    return m + (1.0 - beta1) * (d - m), beta2 * v + (1.0 - beta2) * (d * d)


def _adam_step(
    param: Any, m: Any, v: Any, lr: Any, eps: Any, decay: Any, corrections: tuple[Any, Any], decoupled: bool
) -> Any:
    if decoupled:
        param = param * (1.0 - lr * decay)
    correction1, root_of_correction2 = corrections
    return param - (lr / correction1) * (m / (sqrt(v) / root_of_correction2 + eps))


@composite("adam_update", outputs=3)
def adam_update(
    param: Any,
    grad: Any,
    m: Any,
    v: Any,
    lr: Any,
    beta1: Any,
    beta2: Any,
    eps: Any,
    weight_decay: Any,
    correction1: Any,
    root_of_correction2: Any,
    *,
    decoupled: bool,
    maximize: bool,
) -> Any:
    """m, v: running means of d and d^2; p - lr/(1 - beta1^t) m / (sqrt(v)/sqrt(1 - beta2^t) + eps)"""
    m, v = _adam_moments(param, grad, m, v, beta1, beta2, weight_decay, (decoupled, maximize))
    corrections = (correction1, root_of_correction2)
    return _adam_step(param, m, v, lr, eps, weight_decay, corrections, decoupled), m, v


@composite("amsgrad_update", outputs=4)
def amsgrad_update(
    param: Any,
    grad: Any,
    m: Any,
    v: Any,
    v_max: Any,
    lr: Any,
    beta1: Any,
    beta2: Any,
    eps: Any,
    weight_decay: Any,
    correction1: Any,
    root_of_correction2: Any,
    *,
    decoupled: bool,
    maximize: bool,
) -> Any:
    """As adam_update, with the largest v so far in place of v."""
    m, v = _adam_moments(param, grad, m, v, beta1, beta2, weight_decay, (decoupled, maximize))
    v_max = maximum(v_max, v)
    corrections = (correction1, root_of_correction2)
    return _adam_step(param, m, v_max, lr, eps, weight_decay, corrections, decoupled), m, v, v_max


@composite("rmsprop_update", outputs=3)
def rmsprop_update(
    param: Any,
    grad: Any,
    square_avg: Any,
    velocity: Any,
    lr: Any,
    alpha: Any,
    eps: Any,
    weight_decay: Any,
    momentum: Any,
    *,
    maximize: bool,
) -> Any:
    """s = alpha s + (1 - alpha) d^2; u = momentum u + d / (sqrt(s) + eps); p - lr u"""
    d = _descent(param, grad, weight_decay, maximize)
    square_avg = alpha * square_avg + (1.0 - alpha) * (d * d)
    velocity = momentum * velocity + d / (sqrt(square_avg) + eps)
    return param - lr * velocity, square_avg, velocity


@composite("rmsprop_plain_update", outputs=2)
def rmsprop_plain_update(
    param: Any, grad: Any, square_avg: Any, lr: Any, alpha: Any, eps: Any, weight_decay: Any, *, maximize: bool
) -> Any:
    """s = alpha s + (1 - alpha) d^2; p - lr d / (sqrt(s) + eps)"""
    d = _descent(param, grad, weight_decay, maximize)
    square_avg = alpha * square_avg + (1.0 - alpha) * (d * d)
    return param - lr * (d / (sqrt(square_avg) + eps)), square_avg


@composite("rmsprop_centered_update", outputs=4)
def rmsprop_centered_update(
    param: Any,
    grad: Any,
    square_avg: Any,
    grad_avg: Any,
    velocity: Any,
    lr: Any,
    alpha: Any,
    eps: Any,
    weight_decay: Any,
    momentum: Any,
    *,
    maximize: bool,
) -> Any:
    """As rmsprop_update, with sqrt(s - a^2) in place of sqrt(s), where a is the running mean of d."""
    d = _descent(param, grad, weight_decay, maximize)
    square_avg = alpha * square_avg + (1.0 - alpha) * (d * d)
    grad_avg = grad_avg + (1.0 - alpha) * (d - grad_avg)
    velocity = momentum * velocity + d / (sqrt(square_avg - grad_avg * grad_avg) + eps)
    return param - lr * velocity, square_avg, grad_avg, velocity
