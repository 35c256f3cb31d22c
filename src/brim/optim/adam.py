"""Adam and AdamW."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any, ClassVar

from brim.context import host_scalars
from brim.ops import pow, sqrt
from brim.ops.update_rules import adam_update, amsgrad_update
from brim.optim.optimizer import Optimizer, check_range
from brim.tensor import Tensor

__all__ = ["Adam", "AdamW"]


@lru_cache(maxsize=32)  # mostly the same for all parameters of a step
def _corrections_after(step: int, beta1: float, beta2: float) -> tuple[float, float]:
    return 1.0 - float(beta1) ** step, math.sqrt(1.0 - float(beta2) ** step)


class Adam(Optimizer):
    """Adam: steps of m / sqrt(v), running means of the gradient and its square, corrected for their start at zero.

    Source: Kingma and Ba 2015, arXiv:1412.6980; AMSGrad: Reddi et al. 2018. Weight decay is an L2 penalty here.

    Arguments:
        params: tensors or groups.
        lr: learning rate.
        betas: decay of the two running means, each in [0, 1).
        eps: added to the denominator.
        weight_decay: factor of the L2 penalty.
        amsgrad: divide by the largest second moment so far.
        maximize: ascend.

    Raises:
        ValueError: a setting out of range.
    """

    can_skip: ClassVar[bool] = True
    decoupled: ClassVar[bool] = False

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": tuple(betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
        }
        super().__init__(params, defaults)

    def check(self, settings: Mapping[str, Any]) -> None:
        super().check(settings)
        check_range("eps", settings["eps"], 0.0)
        if len(settings["betas"]) != 2:
            raise ValueError(f"betas: expected two numbers, got {settings['betas']!r}")
        for beta in settings["betas"]:
            check_range("betas", beta, 0.0, 1.0)

    def update_group(self, group: dict[str, Any], members: list[tuple[int, Tensor, Tensor]]) -> None:
        if group["finite"] is not None:  # counts before updates, so that either may share launches
            found = {id(p): self._corrections(group, self.state.setdefault(i, {}), p) for i, p, _ in members}
            group = {**group, "corrections": found}
        super().update_group(group, members)

    def update(self, group: dict[str, Any], state: dict[str, Any], param: Tensor, grad: Tensor) -> None:
        if group["finite"] is not None:
            correction1, root_of_correction2 = group["corrections"][id(param)]
        else:
            correction1, root_of_correction2 = self._corrections(group, state, param)
        beta1, beta2 = group["betas"]
        moments = [self.buffer(state, "exp_avg", param), self.buffer(state, "exp_avg_sq", param)]
        if group["amsgrad"]:
            moments.append(self.buffer(state, "max_exp_avg_sq", param))
        op = amsgrad_update if group["amsgrad"] else adam_update
        self.assign(
            group,
            op,
            [param, *moments],
            param,
            grad,
            *moments,
            group["lr"],
            beta1,
            beta2,
            group["eps"],
            group["weight_decay"],
            correction1,
            root_of_correction2,
            decoupled=self.decoupled,
            maximize=bool(group["maximize"]),
        )

    def _corrections(self, group: dict[str, Any], state: dict[str, Any], param: Tensor) -> tuple[Any, Any]:
        """1 - beta1^t and sqrt(1 - beta2^t); t counts the steps of this parameter."""
        if group["finite"] is not None:  # only the device knows which steps count
            number = self.counted(group, state, param).astype("float64")  # the difference to 1 in full
            first, second = (1.0 - pow(beta, number) for beta in group["betas"])
            return first.astype(param.dtype), sqrt(second).astype(param.dtype)
        self.count_on_host(state)
        source = group["source"]

        def corrections() -> tuple[float, float]:
            state["step"] = step = state.get("step", 0) + 1
            return _corrections_after(step, *source["betas"])

        found: tuple[Any, Any] = host_scalars(corrections, (float, float))
        return found


class AdamW(Adam):
    """Adam whose weight decay shrinks the parameters by lr * weight_decay instead of changing the gradient.

    Source: Loshchilov and Hutter 2019, arXiv:1711.05101. Arguments as of Adam; weight_decay is 0.01 by default.
    """

    decoupled: ClassVar[bool] = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, maximize=maximize)
