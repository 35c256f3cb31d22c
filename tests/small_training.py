"""A small model in training, the same at each start: for tests that compare compiled steps with eager ones."""

from __future__ import annotations

from typing import Any

import numpy as np

import brim
from brim import nn, optim
from brim.program.compile import compile as compile_step

__all__ = ["Training", "random_floats"]


def random_floats(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


class Training:
    """A small model in training, eagerly and compiled from the same start."""

    def __init__(self, **settings: Any) -> None:
        brim.manual_seed(1)
        self.model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.2), nn.Linear(6, 3))
        self.optimizer = optim.SGD(self.model.parameters(), **{"lr": 0.1, "momentum": 0.9, **settings})
        self.compiled = compile_step(self.step)

    def step(self, x: Any, y: Any) -> Any:
        loss = nn.functional.cross_entropy(self.model(brim.asarray(x)), brim.asarray(y))
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss

    def batch(self, n: int = 5, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
        return random_floats(n, 4, seed=seed), np.random.default_rng(seed).integers(0, 3, n)

    def traces(self) -> list[str]:
        return [line for line in self.compiled.explain().splitlines() if line.startswith("traced for")]

    def values(self) -> dict[str, bytes]:
        found = {name: value.numpy().tobytes() for name, value in self.model.state_dict().items()}
        return found | {name: array.tobytes() for name, array in self.optimizer.state_arrays().items()}
