"""Learning-rate schedules. Each sets ``param_groups[i]["lr"]`` as a function of the number of ``step()`` calls.

The value is computed from the count alone, so that a resumed run has exactly the rates of an uninterrupted one.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

from brim.optim.optimizer import Optimizer

__all__ = [
    "CosineAnnealingLR",
    "ExponentialLR",
    "LinearWarmup",
    "MultiStepLR",
    "OneCycleLR",
    "ReduceLROnPlateau",
    "Schedule",
    "StepLR",
]


class Schedule:
    """Base of schedules: ``lr = rate(base_lr, count)``.

    Attributes:
        base_lrs: the rates of the groups when the schedule was made.
        last_epoch: how often ``step()`` was called.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        if any(group.get("hypergradient") is not None for group in optimizer.param_groups):
            raise ValueError("a schedule and hypergradient=... would both set the learning rate; use one of them")
        self.optimizer = optimizer
        self.base_lrs = [float(group["lr"]) for group in optimizer.param_groups]
        self.last_epoch = 0
        self._set()

    def rate(self, base_lr: float, count: int) -> float:
        """The learning rate after ``count`` steps."""
        raise TypeError(f"{type(self).__name__} must define rate()")

    def step(self) -> None:
        """Move on by one epoch (or step, whatever the schedule counts)."""
        self.last_epoch += 1
        self._set()

    def get_last_lr(self) -> list[float]:
        """The rates in force, one per group."""
        return [group["lr"] for group in self.optimizer.param_groups]

    def _set(self) -> None:
        for group, base_lr in zip(self.optimizer.param_groups, self.base_lrs):
            group["lr"] = self.rate(base_lr, self.last_epoch)

    def state_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {key: value for key, value in self.__dict__.items() if key != "optimizer"}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where ``state_dict`` was taken."""
        self.__dict__.update({key: value for key, value in state.items() if key in self.__dict__})
        self._set()


class StepLR(Schedule):
    """lr = base * gamma^(count // step_size)"""

    def __init__(self, optimizer: Optimizer, step_size: int, gamma: float = 0.1) -> None:
        if step_size < 1:
            raise ValueError(f"step_size: expected 1 or more, got {step_size!r}")
        self.step_size, self.gamma = step_size, gamma
        super().__init__(optimizer)

    def rate(self, base_lr: float, count: int) -> float:
        return base_lr * self.gamma ** (count // self.step_size)


class MultiStepLR(Schedule):
    """lr = base * gamma^(number of milestones reached)"""

    def __init__(self, optimizer: Optimizer, milestones: Sequence[int], gamma: float = 0.1) -> None:
        self.milestones, self.gamma = sorted(milestones), gamma
        super().__init__(optimizer)

    def rate(self, base_lr: float, count: int) -> float:
        return base_lr * self.gamma ** bisect_right(self.milestones, count)


class ExponentialLR(Schedule):
    """lr = base * gamma^count"""

    def __init__(self, optimizer: Optimizer, gamma: float) -> None:
        self.gamma = gamma
        super().__init__(optimizer)

    def rate(self, base_lr: float, count: int) -> float:
        return base_lr * self.gamma**count


class CosineAnnealingLR(Schedule):
    """lr = eta_min + (base - eta_min) (1 + cos(pi count / T_max)) / 2 (Loshchilov and Hutter 2017, no restarts)"""

    def __init__(self, optimizer: Optimizer, T_max: int, eta_min: float = 0.0) -> None:
        if T_max < 1:
            raise ValueError(f"T_max: expected 1 or more, got {T_max!r}")
        self.T_max, self.eta_min = T_max, eta_min
        super().__init__(optimizer)

    def rate(self, base_lr: float, count: int) -> float:
        return self.eta_min + (base_lr - self.eta_min) * (1 + math.cos(math.pi * count / self.T_max)) / 2


class LinearWarmup(Schedule):
    """lr = base * (start_factor + (1 - start_factor) min(1, count / total_iters))"""

    def __init__(self, optimizer: Optimizer, total_iters: int, start_factor: float = 1.0 / 3) -> None:
        if total_iters < 1 or not 0 < start_factor <= 1:
            raise ValueError(f"expected total_iters >= 1 and start_factor in (0, 1], got {total_iters}, {start_factor}")
        self.total_iters, self.start_factor = total_iters, start_factor
        super().__init__(optimizer)

    def rate(self, base_lr: float, count: int) -> float:
        return base_lr * (self.start_factor + (1 - self.start_factor) * min(1.0, count / self.total_iters))


class OneCycleLR(Schedule):
    """Cosine up from max_lr / div_factor to max_lr, then down to 1 / final_div_factor of where it began (Smith 2018).

    Momentum is left alone (PyTorch's ``cycle_momentum=False``).
    """

    def __init__(
        self,
        optimizer: Optimizer,
        max_lr: float,
        total_steps: int,
        pct_start: float = 0.3,
        div_factor: float = 25.0,
        final_div_factor: float = 1e4,
    ) -> None:
        if total_steps < 1 or not 0 <= pct_start <= 1:
            raise ValueError(f"expected total_steps >= 1 and pct_start in [0, 1], got {total_steps}, {pct_start}")
        self.max_lr, self.total_steps, self.pct_start = max_lr, total_steps, pct_start
        self.div_factor, self.final_div_factor = div_factor, final_div_factor
        super().__init__(optimizer)

    def rate(self, base_lr: float, count: int) -> float:
        first = self.max_lr / self.div_factor
        up = self.pct_start * self.total_steps - 1
        if count <= up:
            return _cosine(first, self.max_lr, count / up if up > 0 else 1.0)
        down = self.total_steps - 1 - up
        return _cosine(self.max_lr, first / self.final_div_factor, min(1.0, (count - up) / down) if down > 0 else 1.0)


def _cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2


class ReduceLROnPlateau(Schedule):
    """Multiply lr by ``factor`` when the value given to ``step(value)`` has not improved for ``patience`` calls.

    Arguments:
        optimizer: whose rates to set.
        mode: "min" or "max": what an improvement is.
        factor: below 1.
        patience: how many calls without improvement are endured.
        threshold: relative size of an improvement that counts.
        cooldown: calls after a reduction in which nothing is counted.
        min_lr: not below this.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        mode: str = "min",
        factor: float = 0.1,
        patience: int = 10,
        threshold: float = 1e-4,
        cooldown: int = 0,
        min_lr: float = 0.0,
    ) -> None:
        if mode not in ("min", "max") or not 0 < factor < 1:
            raise ValueError(f"expected mode 'min' or 'max' and factor in (0, 1), got {mode!r}, {factor!r}")
        self.mode, self.factor, self.patience, self.threshold = mode, factor, patience, threshold
        self.cooldown, self.min_lr = cooldown, min_lr
        self.best: float | None = None
        self.num_bad_epochs, self.cooldown_counter = 0, 0
        self.lrs: list[float] = []
        super().__init__(optimizer)
        self.lrs = list(self.base_lrs)

    def _set(self) -> None:
        for group, lr in zip(self.optimizer.param_groups, self.lrs):
            group["lr"] = lr

    def step(self, value: float | None = None) -> None:
        """Note the value of an epoch, such as the validation loss. Raises ValueError without one."""
        if value is None:
            raise ValueError("ReduceLROnPlateau.step() needs the value to watch, such as the validation loss")
        self.last_epoch += 1
        if self._better(float(value)):
            self.best, self.num_bad_epochs = float(value), 0
        else:
            self.num_bad_epochs += 1
        if self.cooldown_counter > 0:
            self.cooldown_counter, self.num_bad_epochs = self.cooldown_counter - 1, 0
        if self.num_bad_epochs > self.patience:
            self.lrs = [max(lr * self.factor, self.min_lr) for lr in self.lrs]
            self.cooldown_counter, self.num_bad_epochs = self.cooldown, 0
            self._set()

    def _better(self, value: float) -> bool:
        if self.best is None:
            return not math.isnan(value)
        if self.mode == "min":
            return value < self.best * (1 - self.threshold)
        return value > self.best * (1 + self.threshold)
