"""A residual CNN trained in 60 % of the memory that its step needs: ``fit="recompute"`` chooses what is computed again.

    python -m brim_bench.recompute [--batch 64] [--blocks 10] [--share 0.6] [--steps 8]

Prints the plan with and without, whether the losses are the same to the last bit, and the time of a step of both, taken
in turns.
"""

from __future__ import annotations

import argparse
import statistics
import time

import brim
from brim.units import format_bytes
from brim_bench.over_budget import batch_of, training


def main() -> None:
    """Train both ways, and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--blocks", type=int, default=10)
    parser.add_argument("--share", type=float, default=0.6)
    parser.add_argument("--steps", type=int, default=8)
    options = parser.parse_args()
    x, y = batch_of(options.batch)
    plain = brim.compile(training(options.blocks))
    losses = [plain(x, y).item()]
    whole = plain.current_plan().peak_bytes
    live = brim.memory_stats()["live_bytes"]
    # The other training's memory counts against the budget as well: it is added, so that both can be alive.
    arena = plain.current_plan().arena_bytes
    budget = int(options.share * whole) + live - arena
    start = time.perf_counter()
    small = brim.compile(training(options.blocks), budget=budget, fit="recompute")
    brim.device("cpu").memory.arena.release()
    losses_small = [small(x, y).item()]
    took = time.perf_counter() - start
    found = small.current_plan().peak_bytes
    print(f"planned peak {format_bytes(whole)}; with recomputation {format_bytes(found)}: {100 * found / whole:.1f} %")
    print(f"choosing, planning and the first step took {took:.2f} s")
    times: dict[str, list[float]] = {"plain": [], "recomputed": []}
    for _ in range(options.steps):
        for name, step, kept in (("plain", plain, losses), ("recomputed", small, losses_small)):
            start = time.perf_counter()
            kept.append(step(x, y).item())
            times[name].append(time.perf_counter() - start)
    same = "are the same to the last bit" if losses == losses_small else "DIFFER"
    print(f"losses of {len(losses)} steps {same}: {losses[0]} ... {losses[-1]}")
    medians = {name: statistics.median(took) for name, took in times.items()}
    print(", ".join(f"{name} {1e3 * seconds:.1f} ms a step" for name, seconds in medians.items()))
    ratio = statistics.median(b / a for a, b in zip(times["plain"], times["recomputed"], strict=True))
    print(f"time of a recomputed step against a plain one: {ratio:.2f}")


if __name__ == "__main__":
    main()
