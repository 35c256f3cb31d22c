"""A training step that is 10 % over its budget: the refusal, and every remedy of its report applied for real.

    python -m brim_bench.over_budget [--batch 32] [--blocks 6]

The step trains a residual CNN (3x3 convolutions with batch norm, 16 channels, 16x16 images) with momentum SGD. What a
remedy's line promises is compared with the peak that the ledger booked when the remedy was applied.
"""

from __future__ import annotations

import argparse
import ast
import gc
import re
import time
from collections.abc import Callable
from typing import Any

import numpy as np

import brim
from brim import nn, optim
from brim.units import format_bytes


class Residual(nn.Module):
    """relu(x + BN(conv(relu(BN(conv(x))))))"""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)

    def forward(self, x: Any) -> Any:
        """The block."""
        y = nn.functional.relu(self.norm1(self.conv1(x)))
        return nn.functional.relu(x + self.norm2(self.conv2(y)))


def training(blocks: int) -> Callable[[Any, Any], Any]:
    """The training step of a fresh network, the same numbers every time."""
    brim.manual_seed(0)
    body = [Residual(16) for _ in range(blocks)]
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), *body, nn.AvgPool2d(16), nn.Flatten(), nn.Linear(16, 10))
    optimizer = optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

    def step(x: Any, y: Any) -> Any:
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step


def batch_of(batch: int) -> tuple[np.ndarray, np.ndarray]:
    """Random images (N, 3, 16, 16) and classes (N,)."""
    rng = np.random.default_rng(0)
    return rng.standard_normal((batch, 3, 16, 16), np.float32), rng.integers(0, 10, batch)


def peaks(blocks: int, batch: int, **options: Any) -> tuple[int, int]:
    """(planned peak, the ledger's peak over a step run for real, nothing else being live), in bytes."""
    brim.device("cpu").memory.arena.release()
    step = brim.compile(training(blocks), **options)
    x, y = batch_of(batch)
    step(x, y)
    gc.collect()
    brim.reset_peak_memory()
    step(x, y)
    return step.current_plan().peak_bytes, int(brim.memory_stats()["peak_bytes"])


def applied(line: str, blocks: int, batch: int) -> str:
    """Apply what a remedy's line offers; tells what was promised, planned and held."""
    options: dict[str, Any] = {}
    if found := re.search(r"batch (\d+) instead of", line):
        batch = int(found[1])
    if found := re.search(r"recompute=(\([^)]*\))", line):
        options["recompute"] = ast.literal_eval(found[1])
    if "bfloat16" in line:
        options["activations"] = "bfloat16"
    planned, held = peaks(blocks, batch, **options)
    promised = line.partition("->")[2].split("(")[0].strip()
    same = "as promised" if promised == format_bytes(planned) and planned == held else "NOT as promised"
    return f"batch {batch} {options}: promised {promised}, planned {planned:,} B, held {held:,} B: {same}"


def main() -> None:
    """Refuse, print, apply."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--blocks", type=int, default=6)
    options = parser.parse_args()
    x, y = batch_of(options.batch)
    start = time.perf_counter()
    plan = brim.plan(training(options.blocks), x, y)
    print(f"planned in {time.perf_counter() - start:.2f} s: {plan}")
    budget = int(plan.peak_bytes / 1.1)
    largest = plan.largest_batch(budget)
    del plan  # it keeps its model alive, to plan again
    gc.collect()
    try:
        brim.compile(training(options.blocks), budget=budget)(x, y)
    except brim.BudgetExceeded as refused:
        report = refused.report
        print(refused)
    gc.collect()
    print()
    for line in report.remedies:
        if "->" in line:
            print(applied(line, options.blocks, options.batch))
    del report
    for batch in (largest, largest + 1):
        gc.collect()
        brim.device("cpu").memory.arena.release()
        try:
            brim.compile(training(options.blocks), budget=budget)(*batch_of(batch))
            print(f"batch {batch}: runs within {budget:,} B")
        except brim.BudgetExceeded as error:
            print(f"batch {batch}: {str(error).partition(chr(10))[0]}")


if __name__ == "__main__":
    main()
