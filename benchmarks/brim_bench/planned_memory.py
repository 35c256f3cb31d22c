"""Peak memory of training steps: what brim plans, what it then holds, and what PyTorch holds for the same step.

    python -m brim_bench.planned_memory [--only mlp,cnn] [--kinds]

Every network is written once, for either library. Counted is the same on both sides, in bytes as asked for by the
library: parameters, gradients, optimizer state, inputs, activations, temporaries. brim's figures also contain rounding
to 64 bytes and the workspace of its kernels; what PyTorch's kernels take elsewhere (oneDNN, BLAS) is not in PyTorch's.

Method. brim: ``memory_stats()["peak_bytes"]`` over three compiled steps, from before the model is built. PyTorch: its
profiler records each allocation and release of its CPU allocator (``profile_memory=True``); the running sum from
before the model is built to the end of three steps has the peak that is printed. The method is checked first on arrays
of known size.
"""

from __future__ import annotations

import argparse
import gc
import platform
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

import brim
from brim.units import format_bytes
from brim_bench.networks import NETWORKS, Made, of_brim, of_torch

STEPS = 3


def measure_brim(make: Callable[[Any], Made]) -> tuple[brim.Plan, int]:
    """The plan, made before anything ran, and the bytes that were held at most."""
    memory = brim.device("cpu").memory
    gc.collect()
    memory.arena.release()
    others_bytes = brim.memory_stats()["live_bytes"]
    brim.manual_seed(0)
    step, arguments, options = make(of_brim())
    run = brim.compile(step, **options)
    plan = run.plan(*(brim.spec(a.shape, a.dtype) for a in arguments))
    brim.reset_peak_memory()
    for _ in range(STEPS):
        run(*arguments)
    return plan, brim.memory_stats()["peak_bytes"] - others_bytes


def _live_bytes(profile: Any, kind: Any) -> Iterator[int]:
    """Live bytes after each allocation and release that a profile recorded."""
    found: list[tuple[int, int]] = []

    def walk(events: Any) -> None:
        for event in events:
            if event.tag == kind.Allocation:
                found.append((event.start_time_ns, event.extra_fields.alloc_size))
            walk(event.children)

    walk(profile.profiler.kineto_results.experimental_event_tree())
    live_bytes = 0
    for _, nbytes in sorted(found, key=lambda event: event[0]):
        live_bytes += nbytes
        yield live_bytes


def measure_torch(torch: Any, run: Callable[[], None]) -> int:
    """The most bytes of PyTorch's CPU allocator that were live while ``run`` ran, of those that it made."""
    from torch._C._profiler import _EventType
    from torch.profiler import ProfilerActivity, profile

    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    return max(_live_bytes(recorded, _EventType))


def check_method(torch: Any) -> None:
    """Raise unless the method finds what is known: two of three arrays of 4 MB live at once, then three."""

    def two() -> None:
        a = torch.ones(1000, 1000)
        b = a + 1  # noqa: F841  # alive beside a
        del a
        c = torch.empty(1000, 1000)  # noqa: F841  # takes the place of a

    def three() -> None:
        a = torch.ones(1000, 1000)
        kept = [a * 2, a * 3]  # noqa: F841

    for run, expected_bytes in ((two, 8_000_000), (three, 12_000_000)):
        found_bytes = measure_torch(torch, run)
        if not 0 <= found_bytes - expected_bytes <= 64:  # the numbers 1, 2, 3 become arrays of one element
            raise AssertionError(f"the profiler's events give {found_bytes} bytes where {expected_bytes} are known")


def torch_peak_bytes(torch: Any, make: Callable[[Any], Made]) -> int:
    """PyTorch's peak of the same training."""

    def run() -> None:
        torch.manual_seed(0)
        step, arguments, _ = make(of_torch(torch))
        tensors = [torch.tensor(a) for a in arguments]
        for _ in range(STEPS):
            step(*tensors)

    return measure_torch(torch, run)


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="names of networks, separated by commas")
    parser.add_argument("--kinds", action="store_true", help="print what brim's peak is made of")
    options = parser.parse_args()
    try:
        import torch
    except ImportError:
        torch = None
    else:
        check_method(torch)
    versions = f"NumPy {np.__version__}" + (f", PyTorch {torch.__version__}" if torch is not None else "")
    print(f"{platform.machine()}, Python {platform.python_version()}, {versions}; method: see --help\n")
    print("| network | planned (bytes) | held (bytes) | difference | PyTorch (bytes) | brim / PyTorch |")
    print("|---|---:|---:|---:|---:|---:|")
    made: list[tuple[str, brim.Plan]] = []
    for make in NETWORKS:
        if options.only and make.__name__ not in options.only.split(","):
            continue
        plan, held_bytes = measure_brim(make)
        made.append((make.__name__, plan))
        row = f"| {make.__name__}: {make.__doc__} | {plan.peak_bytes:,} | {held_bytes:,} "
        row += f"| {held_bytes - plan.peak_bytes} "
        if torch is None:
            print(row + "| not installed | |")
            continue
        peak_bytes = torch_peak_bytes(torch, make)
        print(row + f"| {peak_bytes:,} | {plan.peak_bytes / peak_bytes:.2f} |", flush=True)
    for name, plan in made if options.kinds else ():
        print(f"\n{name}: {', '.join(f'{kind} {format_bytes(n)}' for kind, n in plan.by_kind().items())}")
        print(f"  at {plan.peak_at}")
        for block in plan.alive_at_peak(8):
            print(f"  {block.nbytes:>12,} {block.kind:<12} {block.op:<16} {block.layer:<20} {block.shape}")


if __name__ == "__main__":
    main()
