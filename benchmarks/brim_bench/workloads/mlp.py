"""The MLP 784-256-256-10 with batch norm, ReLU and dropout 0.2: training steps, inference, an epoch with its data."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np

from brim_bench.workload import Job, Workload
from brim_bench.workloads.training import STEP_TOLERANCES, training_job

__all__ = ["EPOCH", "INFERENCE", "STEPS", "network", "step_bytes", "step_flops"]

F4 = 4  # bytes of a float32
_SIZES = (784, 256, 256, 10)
_WEIGHTS = sum(a * b for a, b in pairwise(_SIZES))
_PARAMETERS = _WEIGHTS + sum(_SIZES[1:]) + 2 * sum(_SIZES[1:-1])
_SAMPLES = 60_000


def network(side: Any, checking: bool) -> Any:
    """The MLP, without dropout where results are compared."""
    nn, layers = side.nn, []
    for a, b in pairwise(_SIZES[:-1]):
        layers += [nn.Linear(a, b), nn.BatchNorm1d(b), nn.ReLU(), nn.Dropout(0.0 if checking else 0.2)]
    return nn.Sequential(*layers, nn.Linear(*_SIZES[-2:]))


def _batch(side: Any, batch: int) -> tuple[Any, Any]:
    rng = np.random.default_rng(0)
    x, y = rng.random((batch, _SIZES[0]), np.float32), rng.integers(0, _SIZES[-1], batch)
    return side.asarray(x), side.asarray(y)


def mlp_step(side: Any, checking: bool, batch: int) -> Job:
    """Forward, cross entropy, backward, SGD with momentum."""
    return training_job(side, network(side, checking), "sgd", *_batch(side, batch))


def mlp_infer(side: Any, checking: bool, batch: int) -> Job:
    """Scores of a batch in evaluation mode."""
    model = side.load(network(side, checking), seed=1).eval()
    x, _ = _batch(side, batch)
    infer = side.inference(model)
    return Job(lambda: infer(x), lambda: {"scores": side.numpy(infer(x))}, side.compiled(infer))


def mlp_epoch(side: Any, checking: bool, batch: int) -> Job:
    """Every sample once, shuffled and batched by the library's own loader, with one training step a batch."""
    samples = batch if checking else _SAMPLES
    rng = np.random.default_rng(0)
    x, y = rng.random((samples, _SIZES[0]), np.float32), rng.integers(0, _SIZES[-1], samples)
    loader = side.loader(x, y, batch)

    def epoch(step: Callable[[Any, Any], Any]) -> Callable[[], float]:
        def run() -> float:
            for one in loader:
                loss = step(*one)
            return float(side.numpy(loss))

        return run

    return training_job(side, network(side, checking), "sgd", *_batch(side, batch), run=epoch)


def step_flops(batch: int) -> float:
    """Operations of a training step."""
    # Three products a layer, but for the gradient of the input, which nobody needs.
    return 2.0 * batch * (3 * _WEIGHTS - _SIZES[0] * _SIZES[1])


# Each parameter is read forward and backward and updated (read, gradient, velocity; written, velocity); the batch is
# read; each activation of the hidden layers is written and read again.
def step_bytes(batch: int) -> float:
    """Least traffic of a training step."""
    return F4 * (6 * _PARAMETERS + batch * (_SIZES[0] + 4 * sum(_SIZES[1:-1])))


STEPS = tuple(
    Workload(
        f"mlp_step_b{batch}", f"training step of an MLP 784-256-256-10 (batch norm, dropout, SGD), batch {batch:,}",
        "mlp_step", {"batch": batch}, flops=step_flops(batch), nbytes=step_bytes(batch),
        build=mlp_step, tolerances=STEP_TOLERANCES,
    )
    for batch in (32, 128, 1024)
)  # fmt: skip

INFERENCE = tuple(
    Workload(
        f"mlp_infer_b{batch}", f"inference of the same MLP, batch {batch}", "mlp_infer", {"batch": batch},
        flops=2.0 * batch * _WEIGHTS, nbytes=F4 * (_PARAMETERS + batch * (_SIZES[0] + _SIZES[-1])),
        build=mlp_infer, tolerances={"scores": 1e-4},
    )
    for batch in (1, 256)
)  # fmt: skip

EPOCH = (
    Workload(
        "mlp_epoch_b128",
        f"an epoch of the same MLP on {_SAMPLES:,} samples, batch 128, with the library's data loader",
        "mlp_epoch", {"batch": 128}, flops=step_flops(_SAMPLES),
        nbytes=step_bytes(128) * _SAMPLES / 128 + 2 * F4 * _SAMPLES * _SIZES[0],
        build=mlp_epoch, tolerances=STEP_TOLERANCES,
    ),
)  # fmt: skip
