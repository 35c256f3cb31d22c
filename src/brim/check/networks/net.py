"""A network in training as a check runs it: modules, optimizers, steps, and the batches that they are called with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import brim
from brim import nn, optim

__all__ = ["STEPS", "Array", "Net", "batches", "calls_of", "classes", "classifier", "floats"]

F = nn.functional
Array = np.ndarray[Any, Any]
Maker = Callable[[np.random.Generator], Array]

STEPS = 5
"""Batches of a run."""


@dataclass
class Net:
    """One network in training.

    Attributes:
        modules: what is trained.
        optimizers: what trains it.
        steps: the functions that a user would compile; most networks have one.
        calls: (which of the steps, its arguments as NumPy arrays), in the order of a run.
        options: further options for ``brim.compile``.
        rounding: relative rounding of what it computes in where that is less than its weights have; 0 for the weights'.
    """

    modules: list[nn.Module]
    optimizers: list[optim.Optimizer]
    steps: tuple[Callable[..., Any], ...]
    calls: list[tuple[int, tuple[Array, ...]]]
    options: dict[str, Any] = field(default_factory=dict)
    rounding: float = 0.0

    def state(self) -> dict[str, Array | float]:
        """Copies of all parameters, gradients, buffers and optimizer state, and the optimizers' numbers."""
        found: dict[str, Any] = {}
        for m, module in enumerate(self.modules):
            for name, p in module.named_parameters():
                found[f"{m}.{name}"] = np.array(p.detach().numpy())
                found[f"{m}.{name}.grad"] = None if p.grad is None else np.array(p.grad.numpy())
            for name, b in module.named_buffers():
                found[f"{m}.{name}"] = np.array(b.numpy())
        for o, optimizer in enumerate(self.optimizers):
            for name, array in optimizer.state_arrays().items():
                found[f"optimizer {o}.{name}"] = np.array(array)
            settings = optimizer.state_settings()
            settings["state"] = {index: values for index, values in settings["state"].items() if values}
            found[f"optimizer {o}"] = settings
        found["random"] = brim.random.get_state()
        return found


def batches(*makes: Maker, count: int = STEPS) -> list[tuple[Array, ...]]:
    """The same batches at every call: one array of each maker."""
    rng = np.random.default_rng(7)
    return [tuple(make(rng) for make in makes) for _ in range(count)]


def calls_of(*makes: Maker) -> list[tuple[int, tuple[Array, ...]]]:
    """Batches for the only step of a network, in the form of ``Net.calls``."""
    return [(0, batch) for batch in batches(*makes)]


def floats(*shape: int) -> Maker:
    """Makes float32 arrays of standard normal numbers."""
    return lambda rng: rng.standard_normal(shape).astype(np.float32)


def classes(count: int, *shape: int) -> Maker:
    """Makes int64 arrays of classes 0..count-1."""
    return lambda rng: rng.integers(0, count, shape)


def classifier(model: nn.Module, optimizer: optim.Optimizer) -> Callable[..., Any]:
    """The usual step: cross entropy, gradients, update."""

    def step(x: Any, y: Any) -> Any:
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step
