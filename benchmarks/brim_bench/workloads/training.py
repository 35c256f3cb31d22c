"""What all training steps share: the step of a classifier, and what is compared of it between two libraries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from brim_bench.workload import Job

__all__ = ["CHECKED_STEPS", "STEP_TOLERANCES", "classifier_step", "training_job", "update_since"]

CHECKED_STEPS = 3
STEP_TOLERANCES = {"losses": 2e-3, "update": 2e-2}
"""After three steps. Gradients that are zero but for rounding (a bias before batch norm) may differ altogether."""


def update_since(side: Any, before: list[Any], parameters: list[Any]) -> np.ndarray[Any, Any]:
    """How far all parameters have moved, one after another in one array."""
    return np.concatenate([(side.numpy(p) - b).reshape(-1) for b, p in zip(before, parameters, strict=True)])


def classifier_step(side: Any, model: Any, optimizer: Any) -> Callable[[Any, Any], Any]:
    """(inputs, classes) -> loss: gradients to none, forward, cross entropy over the last axis, backward, update."""
    forward = side.wrapped(model)

    def step(x: Any, y: Any) -> Any:
        optimizer.zero_grad()
        with side.casts():
            scores = forward(x)
            loss = side.F.cross_entropy(scores.reshape(-1, scores.shape[-1]), y.reshape(-1))
        loss.backward()
        optimizer.step()
        return loss

    return side.step(step)


def training_job(side: Any, model: Any, which: str, x: Any, y: Any, run: Callable[..., Any] | None = None) -> Job:
    """A Job of training steps of ``model`` on one batch.

    Arguments:
        model: in training mode; its weights are set here, to the same values for every library.
        which: the optimizer, "sgd" or "adamw".
        x, y: the batch.
        run: ``run(step)`` gives what is timed, if not one step.
    """
    model = side.load(model, seed=1)
    parameters = list(model.parameters())
    step = classifier_step(side, model, side.optimizer(which, parameters))

    def results() -> dict[str, Any]:
        before = [side.numpy(one).copy() for one in parameters]
        losses = [float(side.numpy(step(x, y))) for _ in range(CHECKED_STEPS)]
        return {"losses": np.asarray(losses), "update": update_since(side, before, parameters)}

    return Job((lambda: step(x, y)) if run is None else run(step), results, side.compiled(step))
