"""Training steps a second of one MLP: run eagerly by brim, planned by brim, and by PyTorch where it is installed.

    python -m brim_bench.planned_steps [--batches 32,128,1024] [--rounds 9] [--seconds 0.4]

The MLP is 784-256-256-10 with batch norm, ReLU and dropout 0.2 after the hidden layers, cross entropy, SGD with
momentum 0.9, float32. The contestants take turns in one process, round after round; printed are medians over the rounds
with the range, and the median of the ratios within a round. PyTorch runs eagerly with as many threads as brim may use
processors.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable
from itertools import pairwise

import numpy as np

import brim
from brim import nn, optim

SIZES = (784, 256, 256, 10)


def batch_of(batch: int) -> tuple[np.ndarray, np.ndarray]:
    """Random images (N, 784) and classes (N,)."""
    rng = np.random.default_rng(0)
    return rng.random((batch, SIZES[0]), np.float32), rng.integers(0, SIZES[-1], batch)


def brim_step(batch: int, planned: bool) -> Callable[[], object]:
    """One training step of brim; the arguments are tensors that exist, as in the PyTorch step."""
    brim.manual_seed(0)
    layers: list[nn.Module] = []
    for a, b in pairwise(SIZES[:-1]):
        layers += [nn.Linear(a, b), nn.BatchNorm1d(b), nn.ReLU(), nn.Dropout(0.2)]
    model = nn.Sequential(*layers, nn.Linear(SIZES[-2], SIZES[-1]))
    optimizer = optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    x, y = map(brim.asarray, batch_of(batch))

    def step(x: brim.Tensor, y: brim.Tensor) -> brim.Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        return loss

    run = brim.compile(step) if planned else step
    return lambda: run(x, y)


def torch_step(batch: int) -> Callable[[], object] | None:
    """The same step of PyTorch, or None where it is not installed."""
    try:
        import torch
    except ImportError:
        return None
    torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    torch.manual_seed(0)
    layers: list[torch.nn.Module] = []
    for a, b in pairwise(SIZES[:-1]):
        layers += [torch.nn.Linear(a, b), torch.nn.BatchNorm1d(b), torch.nn.ReLU(), torch.nn.Dropout(0.2)]
    model = torch.nn.Sequential(*layers, torch.nn.Linear(SIZES[-2], SIZES[-1]))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    x, y = map(torch.from_numpy, batch_of(batch))

    def step() -> object:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        return loss

    return step


def seconds_per_step(step: Callable[[], object], seconds: float) -> float:
    """Mean time of a step over about so many seconds."""
    count, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds or count < 3:
        step()
        count += 1
    return elapsed / count


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", default="32,128,1024")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=0.4)
    options = parser.parse_args()
    print(
        f"{platform.machine()}, {os.cpu_count()} processors, Python {platform.python_version()}, NumPy {np.__version__}"
    )
    print("| batch | contestant | steps/s (median) | range | time against brim planned |\n|---:|---|---:|---:|---:|")
    for batch in map(int, options.batches.split(",")):
        found = {"brim planned": brim_step(batch, True), "brim eager": brim_step(batch, False)}
        if (torch := torch_step(batch)) is not None:
            found["PyTorch eager"] = torch
        times: dict[str, list[float]] = {name: [] for name in found}
        for step in found.values():
            seconds_per_step(step, options.seconds / 2)
        for _ in range(options.rounds):
            for name, step in found.items():
                times[name].append(seconds_per_step(step, options.seconds))
        for name, took in times.items():
            rates = sorted(1 / t for t in took)
            ratio = statistics.median(a / b for a, b in zip(took, times["brim planned"], strict=True))
            middle, span = f"{statistics.median(rates):,.0f}", f"{rates[0]:,.0f} to {rates[-1]:,.0f}"
            print(f"| {batch} | {name} | {middle} | {span} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
