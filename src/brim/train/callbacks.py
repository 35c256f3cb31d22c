"""Callbacks: what a Trainer calls between steps and epochs; early stopping is one."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from brim.train.trainer import Trainer

__all__ = ["Callback", "EarlyStopping", "improved"]


class Callback:
    """Does nothing at every occasion; override what is needed. ``trainer.stop(reason)`` ends the training."""

    def on_fit_begin(self, trainer: Trainer) -> None:
        """Before the first step, after a resumed state was loaded."""

    def on_step_end(self, trainer: Trainer, loss: float) -> None:
        """After each step of the optimizer; ``trainer.step`` counts them."""

    def on_epoch_end(self, trainer: Trainer, record: dict[str, Any]) -> None:
        """After each epoch, with its line of the history."""

    def on_fit_end(self, trainer: Trainer) -> None:
        """When the training is over, however it ended but by an error."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: plain values, for JSON."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where ``state_dict`` was taken."""


class EarlyStopping(Callback):
    """Stop when a value of the history has not improved by ``min_delta`` for ``patience`` epochs.

    Arguments:
        monitor: name in the history: "val_loss", "loss", "val_accuracy"...
        patience: epochs without improvement that are endured.
        min_delta: what counts as an improvement.
        mode: "min", "max", or None: "max" for accuracies, else "min".
    """

    def __init__(
        self, monitor: str = "val_loss", patience: int = 5, min_delta: float = 0.0, mode: str | None = None
    ) -> None:
        if patience < 0:
            raise ValueError(f"patience: expected 0 or more, got {patience!r}")
        self.monitor, self.patience, self.min_delta = monitor, patience, min_delta
        self.mode = mode or ("max" if "accuracy" in monitor else "min")
        self.best: float | None = None
        self.bad_epochs = 0

    def on_epoch_end(self, trainer: Trainer, record: dict[str, Any]) -> None:
        if self.monitor not in record:
            raise ValueError(f"EarlyStopping watches {self.monitor!r}, the history has {sorted(record)}")
        if improved(record[self.monitor], self.best, self.mode, self.min_delta):
            self.best, self.bad_epochs = record[self.monitor], 0
            return
        self.bad_epochs += 1
        if self.bad_epochs > self.patience:
            trainer.stop(f"{self.monitor} has not improved for {self.bad_epochs} epochs")

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "bad_epochs": self.bad_epochs}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best, self.bad_epochs = state["best"], state["bad_epochs"]


def improved(value: float, best: float | None, mode: str = "min", min_delta: float = 0.0) -> bool:
    """Whether ``value`` is better than ``best`` by more than ``min_delta``; NaN never is."""
    if math.isnan(value):
        return False
    if best is None:
        return True
    return value > best + min_delta if mode == "max" else value < best - min_delta
