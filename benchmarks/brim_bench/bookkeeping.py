"""What the Trainer adds to a step: loading, metrics, callbacks, progress, checks. `python -m brim_bench.bookkeeping`.

Epochs of ``Trainer.fit`` take turns with the bare compiled step, on one batch that lies ready in the cache and on
batches of a loader. The median time of a step is told, the least of all rounds, so that what else the machine does
disturbs it little.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise, repeat
from typing import Any

import numpy as np

import brim
from brim import data, nn, optim
from brim.train import Callback

__all__ = ["main", "measure"]

_SAMPLES = 25_600
_NETWORKS: dict[str, tuple[tuple[int, ...], int]] = {  # sizes of the layers, batch size
    "tiny": ((16, 16, 10), 32),
    "mlp_b128": ((784, 256, 256, 10), 128),
}
_CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.thread_time}

Array = np.ndarray[Any, Any]


class _Times(Callback):
    """The clock after each step."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock, self.seen_s = clock, list[float]()

    def on_fit_begin(self, trainer: brim.Trainer) -> None:
        self.seen_s.clear()

    def on_step_end(self, trainer: brim.Trainer, loss: float) -> None:
        self.seen_s.append(self.clock())


def _network(sizes: Sequence[int]) -> tuple[nn.Module, optim.Optimizer]:
    brim.manual_seed(0)
    layers: list[nn.Module] = []
    for a, b in pairwise(sizes[:-1]):
        layers += [nn.Linear(a, b), nn.BatchNorm1d(b), nn.ReLU(), nn.Dropout(0.2)]
    model = nn.Sequential(*layers, nn.Linear(sizes[-2], sizes[-1]))
    return model, optim.SGD(model.parameters(), lr=0.01, momentum=0.9)


def _bare(sizes: Sequence[int], clock: Callable[[], float]) -> Callable[[Iterable[Any]], list[float]]:
    """``run(batches)``: the clock after each compiled step."""
    model, optimizer = _network(sizes)

    def train_step(x: Any, y: Any) -> Any:
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    step = brim.compile(train_step, copy=False)

    def run(batches: Iterable[Any]) -> list[float]:
        seen_s = []
        for x, y in batches:
            float(step(x, y))
            seen_s.append(clock())
            del x, y  # as the Trainer does: the next batch is written into the same memory
        return seen_s

    return run


def _median_step_s(seen_s: Sequence[float]) -> float:
    return statistics.median(np.diff(seen_s))


def measure(
    name: str, rounds: int = 5, clock: str = "wall", metrics: Sequence[str] = ("accuracy",)
) -> dict[str, float]:
    """Seconds a step of one of the networks.

    Arguments:
        name: "tiny" or "mlp_b128".
        rounds: how often the two take turns.
        clock: "wall", or "cpu" for the calling thread's (with one thread: on a busy machine).
        metrics: the Trainer's.

    Returns:
        {"bare_s": of the compiled step, "loaded_s": of it with the loader, "trainer_s": of a step in ``Trainer.fit``}.
    """
    sizes, batch = _NETWORKS[name]
    rng = np.random.default_rng(0)
    x, y = rng.random((_SAMPLES, sizes[0]), np.float32), rng.integers(0, sizes[-1], _SAMPLES)
    model, optimizer = _network(sizes)
    times = _Times(_CLOCKS[clock])
    trainer = brim.Trainer(model, optimizer, metrics=metrics, callbacks=[times], progress=False)
    bare, dataset = _bare(sizes, _CLOCKS[clock]), data.ArrayDataset(x, y)
    ready = dataset.batch(range(batch))
    loader = data.DataLoader(dataset, batch, shuffle=True)
    found: dict[str, list[float]] = {"bare_s": [], "loaded_s": [], "trainer_s": []}
    for _ in range(rounds):
        trainer.fit(dataset, 1, batch_size=batch)
        found["trainer_s"].append(_median_step_s(times.seen_s))
        found["bare_s"].append(_median_step_s(bare(repeat(ready, len(loader)))))
        found["loaded_s"].append(_median_step_s(bare(loader.arrays())))
    return {name: min(seconds) for name, seconds in found.items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=brim.get_threads())
    parser.add_argument("--clock", choices=sorted(_CLOCKS), default="wall")
    options = parser.parse_args()
    brim.set_threads(options.threads)
    print(f"{options.threads} threads, {options.clock} time; microseconds a step")
    for name in _NETWORKS:
        for metrics in ((), ("accuracy",)):
            found = measure(name, options.rounds, options.clock, metrics)
            bare, loaded, trainer = (1e6 * found[key] for key in ("bare_s", "loaded_s", "trainer_s"))
            what = f"{name}, metrics {', '.join(metrics) or 'none'}"
            print(
                f"{what:27} bare {bare:8.1f}   with loader {loaded:8.1f}   Trainer {trainer:8.1f}: "
                f"{trainer - bare:6.1f} more than bare, {trainer - loaded:6.1f} more than with loader"
            )


if __name__ == "__main__":
    main()
