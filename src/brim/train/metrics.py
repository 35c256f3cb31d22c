"""Metrics of a batch, computed on the host, and their averages over an epoch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from brim.errors import ShapeError

__all__ = ["METRICS", "Averages", "Metric", "accuracy", "find_metrics", "mean_absolute_error", "top5_accuracy"]

Metric = Callable[[np.ndarray[Any, Any], np.ndarray[Any, Any]], float]
"""``metric(outputs, targets)``: the mean over a batch of (N, ...) arrays."""


def accuracy(outputs: np.ndarray[Any, Any], targets: np.ndarray[Any, Any]) -> float:
    """Share of samples whose largest output of shape (N, classes) is at the target (N,)."""
    hits = np.count_nonzero(_scores(outputs, targets).argmax(axis=1) == targets)
    return hits / len(targets) if len(targets) else math.nan


def top5_accuracy(outputs: np.ndarray[Any, Any], targets: np.ndarray[Any, Any]) -> float:
    """Share of samples whose target is among the five largest outputs."""
    ranked = np.argsort(-_scores(outputs, targets), axis=1, kind="stable")[:, :5]
    return float(np.mean((ranked == targets[:, None]).any(axis=1)))


def mean_absolute_error(outputs: np.ndarray[Any, Any], targets: np.ndarray[Any, Any]) -> float:
    """Mean of |output - target| over all elements."""
    return float(np.mean(np.abs(outputs.astype(np.float64) - targets)))


METRICS: dict[str, Metric] = {"accuracy": accuracy, "top5_accuracy": top5_accuracy, "mae": mean_absolute_error}


def _scores(outputs: np.ndarray[Any, Any], targets: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    if outputs.ndim != 2 or targets.shape != outputs.shape[:1]:
        raise ShapeError(
            f"accuracy expects outputs (N, classes) and targets (N,), got {outputs.shape} and {targets.shape}; "
            "pass metrics=() or metrics=('mae',) where there are no classes"
        )
    return outputs


def find_metrics(wanted: Iterable[str | Metric]) -> dict[str, Metric]:
    """Metrics by name; a function of one's own is called by its ``__name__``. Raises ValueError for unknown names."""
    found: dict[str, Metric] = {}
    for one in [wanted] if isinstance(wanted, str) else wanted:
        if callable(one):
            found[getattr(one, "__name__", type(one).__name__)] = one
        elif one in METRICS:
            found[one] = METRICS[one]
        else:
            raise ValueError(f"unknown metric {one!r}; known are {', '.join(METRICS)}, or pass a function")
    return found


class Averages:
    """Means of several values over samples, from means over batches."""

    def __init__(self) -> None:
        self.samples = 0
        self.sums: dict[str, float] = {}

    def add(self, samples: int, values: dict[str, float]) -> None:
        """Take in the means of a batch of so many samples."""
        self.samples += samples
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value * samples

    def means(self) -> dict[str, float]:
        """The means so far."""
        return {name: value / max(self.samples, 1) for name, value in self.sums.items()}

    def state_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {"samples": self.samples, "sums": dict(self.sums)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where ``state_dict`` was taken."""
        self.samples, self.sums = state["samples"], dict(state["sums"])
