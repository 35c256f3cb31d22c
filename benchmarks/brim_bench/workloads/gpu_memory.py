"""Updates of 10 million and of a billion parameters on a device, and the ways of data to it."""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle
from math import prod
from typing import Any

import numpy as np

from brim_bench.workload import Job, Workload, with_tiny
from brim_bench.workloads import mlp
from brim_bench.workloads.optimizers import SHAPES
from brim_bench.workloads.rotating import count_sets, in_turn
from brim_bench.workloads.training import CHECKED_STEPS, classifier_step

__all__ = ["DATA_PATHS", "UPDATES"]

_SHAPES: dict[str, list[tuple[int, ...]]] = {
    "10M": SHAPES["10M"],
    "1G": [shape for _ in range(60) for shape in ((4096, 4096), (4096,))],
    "tiny": [(30, 20), (20,), (7, 5)],
}


def gpu_update(side: Any, checking: bool, which: str, size: str) -> Job:
    """One update of all parameters; their gradients stay the same."""
    count = sum(prod(shape) for shape in _SHAPES[size])
    sets, steps = count_sets(side, _touched(which, count)), []
    first: list[Any] = []
    for _ in range(sets):
        parameters = []
        for number, shape in enumerate(_SHAPES[size]):
            parameters.append(side.parameter(side.noise(shape, number % 4)))  # few blocks, made once
            parameters[-1].grad = side.noise(shape, 4 + number % 4)
        first = first or parameters
        steps.append(side.step(side.optimizer(which, parameters).step))

    def results() -> dict[str, Any]:
        before = [side.sample(one) for one in first]
        for _ in range(CHECKED_STEPS):
            steps[0]()
        moved = [(side.sample(one) - old).reshape(-1) for one, old in zip(first, before, strict=True)]
        return {"update": np.concatenate(moved)}

    return Job(in_turn(steps), results, tuple(one for step in steps for one in side.compiled(step)), sets)


def _touched(which: str, count: int) -> float:
    return 4.0 * count * {"sgd": 3, "adamw": 4}[which]


def gpu_feed(side: Any, checking: bool, batch: int, samples: int, resident: bool) -> Job:
    """Training steps of the MLP on batches as they come from a data set, one after another, epoch after epoch."""
    rng = np.random.default_rng(0)
    x, y = rng.random((samples, 784), np.float32), rng.integers(0, 10, samples)
    model = side.load(mlp.network(side, True), seed=1)
    parameters = list(model.parameters())
    step = classifier_step(side, model, side.optimizer("sgd", parameters))

    def results() -> dict[str, Any]:
        # Orders differ from library to library: the losses of a batch that both know, after whatever came before.
        one = side.asarray(x[:batch]), side.asarray(y[:batch])
        return {"losses": np.asarray([float(side.numpy(step(*one))) for _ in range(CHECKED_STEPS)])}

    return Job(_epochs(side.feed(x, y, batch, resident), step), results, side.compiled(step))


def _epochs(batches: Any, step: Callable[..., Any]) -> Callable[[], Any]:
    """Each call takes the next batch, at the end of an epoch the first one of another."""
    pending = (batch for _ in cycle((0,)) for batch in batches)
    return lambda: step(*next(pending))


def gpu_upload(side: Any, checking: bool, megabytes: int) -> Job:
    """An array of the host to the device."""
    host = np.random.default_rng(0).random((megabytes, 250_000), np.float32)
    kept: list[Any] = [None]

    def run() -> None:
        kept[0] = side.asarray(host)

    def results() -> dict[str, Any]:
        run()
        return {"copy": side.sample(kept[0])}

    return Job(run, results)


def _update(which: str, size: str, name: str) -> Workload:
    count = sum(prod(shape) for shape in _SHAPES[size])
    title = {"sgd": "SGD with momentum", "adamw": "AdamW"}[which]
    states = {"sgd": 1, "adamw": 2}[which]
    return Workload(
        f"gpu_{which}_{name}", f"one update of {count:,} parameters by {title}", "gpu_update",
        {"which": which, "size": size}, nbytes=4.0 * count * (3 + 2 * states), build=gpu_update,
        tolerances={"update": 1e-3}, needs_bytes=1.1 * max(_touched(which, count), 300e6) + 2**30, random=False,
        fuses=False, importance=2,
    )  # fmt: skip


def _feed(batch: int, samples: int, resident: bool) -> Workload:
    where = "that lies on the device" if resident else "on the host"
    return Workload(
        f"gpu_feed_{'resident' if resident else 'host'}",
        f"training step of the MLP, batch {batch:,}, with its batch out of a data set of {samples:,} samples {where}",
        "gpu_feed", {"batch": batch, "samples": samples, "resident": resident}, flops=mlp.step_flops(batch),
        nbytes=mlp.step_bytes(batch), build=gpu_feed, tolerances={"losses": 5e-3}, needs_bytes=2 * 2**30,
        random=False, importance=2,
    )  # fmt: skip


def _upload(megabytes: int) -> Workload:
    return Workload(
        "gpu_upload", f"copy of {megabytes} MB of the host's ordinary memory to the device", "gpu_upload",
        {"megabytes": megabytes}, build=gpu_upload, tolerances={"copy": 0.0}, needs_bytes=2 * 2**30, random=False,
        fuses=False, importance=4,
    )  # fmt: skip


UPDATES = tuple(
    with_tiny(_update, {"size": "tiny"}, which=which, size=size, name=size)
    for size in ("10M", "1G")
    for which in ("sgd", "adamw")
)

DATA_PATHS = (
    *[with_tiny(_feed, {"batch": 8, "samples": 40}, batch=1024, samples=60_000, resident=one) for one in (False, True)],
    with_tiny(_upload, {"megabytes": 1}, megabytes=256),
)
