"""Updates of parameters by given gradients: SGD with momentum, AdamW; 10 million parameters and 235 thousand."""

from __future__ import annotations

from itertools import pairwise
from math import prod
from typing import Any

import numpy as np

from brim_bench.workload import Job, Workload
from brim_bench.workloads.training import update_since

__all__ = ["SHAPES", "WORKLOADS"]

F4 = 4  # bytes of a float32
_MLP = (784, 256, 128, 10)
SHAPES: dict[str, list[tuple[int, ...]]] = {
    "10M": [shape for _ in range(30) for shape in ((640, 520), (640,))],
    "235k": [shape for a, b in pairwise(_MLP) for shape in ((b, a), (b,))],
}


def optim(side: Any, checking: bool, which: str, size: str) -> Job:
    """One update of all parameters; their gradients stay the same."""
    rng = np.random.default_rng(0)
    parameters = [side.parameter(0.01 * rng.standard_normal(shape, np.float32)) for shape in SHAPES[size]]
    for one in parameters:
        one.grad = side.asarray(0.01 * rng.standard_normal(tuple(one.shape), np.float32))
    step = side.step(side.optimizer(which, parameters).step)

    def results() -> dict[str, Any]:
        before = [side.numpy(one).copy() for one in parameters]
        for _ in range(3):
            step()
        return {"update": update_since(side, before, parameters)}

    return Job(step, results, side.compiled(step))


def _optim(which: str, size: str, states: int) -> Workload:
    count = sum(prod(shape) for shape in SHAPES[size])
    name = {"sgd": "SGD with momentum", "adamw": "AdamW"}[which]
    # Read: parameter, gradient, states; written: parameter, states.
    return Workload(
        f"{which}_{size}", f"one update of {count:,} parameters by {name}", "optim", {"which": which, "size": size},
        nbytes=F4 * count * (3 + 2 * states), build=optim, tolerances={"update": 1e-3},
    )  # fmt: skip


WORKLOADS = (_optim("sgd", "10M", 1), _optim("adamw", "10M", 2), _optim("sgd", "235k", 1), _optim("adamw", "235k", 2))
