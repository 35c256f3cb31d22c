"""RMSprop."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from brim.ops.update_rules import rmsprop_centered_update, rmsprop_plain_update, rmsprop_update
from brim.optim.optimizer import Optimizer, check_range
from brim.tensor import Tensor

__all__ = ["RMSprop"]


class RMSprop(Optimizer):
    """RMSprop: steps of d / (sqrt(s) + eps), where s is the running mean of d^2 (Tieleman, Hinton 2012).

    Arguments:
        params: tensors or groups.
        lr: learning rate.
        alpha: decay of the running mean, in [0, 1).
        eps: added to the denominator.
        weight_decay: factor of the L2 penalty.
        momentum: share of the velocity that is kept.
        centered: subtract the square of the running mean of d, so that the denominator is a deviation.
        maximize: ascend.

    Raises:
        ValueError: a setting out of range.
    """

    can_skip: ClassVar[bool] = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        centered: bool = False,
        *,
        maximize: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "alpha": alpha,
            "eps": eps,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "centered": centered,
            "maximize": maximize,
        }
        super().__init__(params, defaults)

    def check(self, settings: Mapping[str, Any]) -> None:
        super().check(settings)
        check_range("alpha", settings["alpha"], 0.0, 1.0)
        check_range("eps", settings["eps"], 0.0)
        check_range("momentum", settings["momentum"], 0.0)

    def flags(self, group: Mapping[str, Any]) -> dict[str, Any]:
        return {**super().flags(group), "has_momentum": group["momentum"] != 0}

    def update(self, group: dict[str, Any], state: dict[str, Any], param: Tensor, grad: Tensor) -> None:
        buffers = [self.buffer(state, "square_avg", param)]
        numbers = [group[name] for name in ("lr", "alpha", "eps", "weight_decay", "momentum")]
        op = rmsprop_update
        if group["centered"]:
            buffers.append(self.buffer(state, "grad_avg", param))
            op = rmsprop_centered_update
        if group["centered"] or group["has_momentum"]:
            buffers.append(self.buffer(state, "momentum_buffer", param))
        else:
            op, numbers = rmsprop_plain_update, numbers[:-1]
        operands = (param, grad, *buffers, *numbers)
        self.assign(group, op, [param, *buffers], *operands, maximize=bool(group["maximize"]))
