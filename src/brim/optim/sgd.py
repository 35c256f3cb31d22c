"""Stochastic gradient descent: momentum, Nesterov, and a learning rate that is itself learned."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import reduce
from operator import add
from typing import Any, ClassVar

from brim.context import after_step, host_scalar, layer_scope
from brim.ops import copy, where
from brim.ops.update_rules import sgd_momentum_update, sgd_update
from brim.optim.optimizer import Optimizer, check_range, layer_of
from brim.tensor import Tensor

__all__ = ["SGD"]


class SGD(Optimizer):
    """Stochastic gradient descent: d = g + weight_decay p; v = momentum v + (1 - dampening) d; p = p - lr v.

    The first velocity is d. Nesterov steps along d + momentum v.

    With ``hypergradient=beta`` the learning rate of each group follows its own gradient: lr += beta * sum(d · u), where
    u is the direction of the step before (Baydin et al. 2018, Online Learning Rate Adaptation with Hypergradient
    Descent, arXiv:1703.04782, additive rule). The current value is in ``param_groups[i]["lr"]``.

    Arguments:
        params: tensors or groups.
        lr: learning rate.
        momentum: share of the velocity that is kept.
        dampening: share of d that does not enter the velocity.
        weight_decay: factor of the L2 penalty.
        nesterov: needs momentum and no dampening.
        maximize: ascend.
        hypergradient: beta, or None for a fixed learning rate.

    Raises:
        ValueError: a setting out of range.
    """

    can_skip: ClassVar[bool] = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        hypergradient: float | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "hypergradient": hypergradient,
        }
        super().__init__(params, defaults)

    def check(self, settings: Mapping[str, Any]) -> None:
        super().check(settings)
        check_range("momentum", settings["momentum"], 0.0)
        if settings["nesterov"] and (settings["momentum"] <= 0 or settings["dampening"] != 0):
            raise ValueError("nesterov needs momentum > 0 and dampening = 0")
        if settings["hypergradient"] is not None:
            check_range("hypergradient", settings["hypergradient"], 0.0)

    def flags(self, group: Mapping[str, Any]) -> dict[str, Any]:
        names = ("momentum", "dampening", "weight_decay")
        return {**super().flags(group), **{f"has_{name}": group[name] != 0 for name in names}}

    def update_group(self, group: dict[str, Any], members: list[tuple[int, Tensor, Tensor]]) -> None:
        if group["hypergradient"] is not None:
            group["lr"] = self._learned_rate(group, members)
        super().update_group(group, members)

    def _learned_rate(self, group: dict[str, Any], members: list[tuple[int, Tensor, Tensor]]) -> Any:
        """lr + beta sum(d u), a float64 tensor without axes; the directions u are zeros before the first step."""
        products = []
        # With plain momentum the direction of the last step is the velocity, which is kept anyway.
        name = "momentum_buffer" if group["has_momentum"] and not group["nesterov"] else "direction"
        for index, param, grad in members:
            with layer_scope(layer_of(param)):
                direction = self.buffer(self.state.setdefault(index, {}), name, param)
                d = _descent(group, param, grad)
                wide = "float32" if d.dtype.itemsize < 4 else d.dtype
                # In float64 from here: next to lr, one step's change is often less than float32 resolves.
                products.append((d.astype(wide) * direction.astype(wide)).sum().astype("float64"))
                if not group["has_momentum"]:
                    self.assign(group, copy, [direction], d)
        rate = group["lr"] + group["hypergradient"] * reduce(add, products)
        if group["finite"] is not None:
            rate = where(group["finite"], rate, group["lr"])
        source = group["source"]
        after_step(rate, lambda value: source.__setitem__("lr", value))
        return rate

    def update(self, group: dict[str, Any], state: dict[str, Any], param: Tensor, grad: Tensor) -> None:
        momentum, weight_decay = group["momentum"], group["weight_decay"]
        nesterov, maximize = bool(group["nesterov"]), bool(group["maximize"])
        lr = group["lr"].astype(param.dtype) if isinstance(group["lr"], Tensor) else group["lr"]
        if not group["has_momentum"]:
            self.assign(group, sgd_update, [param], param, grad, lr, weight_decay, maximize=maximize)
            return
        velocity = self.buffer(state, "momentum_buffer", param)
        d = _descent(group, param, grad) if nesterov and group["hypergradient"] is not None else None
        self.assign(
            group,
            sgd_momentum_update,
            [param, velocity],
            param,
            grad,
            velocity,
            lr,
            momentum,
            self._dampening(group, state, param, velocity),
            weight_decay,
            nesterov=nesterov,
            maximize=maximize,
        )
        if d is not None:
            self.assign(group, copy, [self.buffer(state, "direction", param)], d + momentum * velocity)

    def _dampening(self, group: dict[str, Any], state: dict[str, Any], param: Tensor, velocity: Tensor) -> Any:
        """The first velocity is d undamped."""
        if not group["has_dampening"]:
            self.first_use(velocity)
            return 0.0
        if group["finite"] is not None:  # only the device knows which step is the first that counts
            number = self.counted(group, state, param, before=0 if self.first_use(velocity) else 1)
            return where(number > 1.0, group["dampening"], 0.0).astype(param.dtype)
        return group["dampening"] * host_scalar(lambda: 0.0 if self.first_use(velocity) else 1.0)


def _descent(group: dict[str, Any], param: Tensor, grad: Tensor) -> Tensor:
    d = -grad if group["maximize"] else grad
    return d + group["weight_decay"] * param if group["has_weight_decay"] else d
