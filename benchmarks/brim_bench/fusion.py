"""Kernels and bytes of a training step before passes, after fusion, after all passes, and the least possible.

    python -m brim_bench.fusion [--only mlp_step_b128,gpt2_b8] [--devices cpu,h100-80gb] [--op-table]

The steps are planned, not run: no device is needed, and the two large networks have shapes and no weights. "Traced" is
the step as written, one kernel an operation (its updates in place already, which the placing of values does); "fused"
is after the passes up to and with ``fuse``; "planned" is what would run. ``brim.program.traffic`` says what is counted,
``brim.program.least`` what the least assumes.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable
from typing import Any

import brim
from brim import nn, optim
from brim.models import GPT2, GPT2_SIZES, next_token_loss, resnet50
from brim.program.passes import default_passes
from brim.program.profiles import ProfileDevice
from brim.program.traffic import Traffic
from brim.units import format_bytes
from brim_bench.sides.brim_side import Brim
from brim_bench.workload import Job
from brim_bench.workloads.images import cnn_step
from brim_bench.workloads.language import lm_step
from brim_bench.workloads.mlp import mlp_step

__all__ = ["STEPS", "passes_through_fusion", "traffics"]

Step = tuple[Callable[..., Any], tuple[Any, ...]]
"""A function and the arguments or specs that it is planned for."""


class _Recording(Brim):
    """A side that notes a workload's step and its arguments instead of running it."""

    recorded: Step

    def step(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        def record(*arguments: Any) -> None:
            self.recorded = fn, arguments

        return record


def _workload(build: Callable[..., Job], *arguments: Any) -> Step:
    side = _Recording()
    build(side, False, *arguments).run()
    return side.recorded


def _without_memory(
    make: Callable[[], nn.Module], loss: Callable[[Any, Any], Any], which: Callable[..., Any], *specs: brim.Spec
) -> Step:
    with brim.meta():
        model = make()
        optimizer = which(model.parameters())

    def step(x: Any, y: Any) -> Any:
        result = loss(model(x), y)
        result.backward()
        optimizer.step()
        optimizer.zero_grad()
        return result

    return step, specs


def _gpt2() -> Step:
    tokens = brim.spec((8, 1024), "int64")
    which = lambda parameters: optim.AdamW(parameters, lr=3e-4)  # noqa: E731
    return _without_memory(lambda: GPT2(**GPT2_SIZES["gpt2"], dropout=0.1), next_token_loss, which, tokens, tokens)


def _resnet50() -> Step:
    specs = brim.spec((64, 3, 224, 224)), brim.spec((64,), "int64")
    which = lambda parameters: optim.SGD(parameters, lr=0.1, momentum=0.9)  # noqa: E731
    return _without_memory(resnet50, nn.functional.cross_entropy, which, *specs)


STEPS: dict[str, Callable[[], Step]] = {
    "mlp_step_b128": lambda: _workload(mlp_step, 128),
    "lenet_step_b64": lambda: _workload(cnn_step, "lenet", 64),
    "resnet8_step_b64": lambda: _workload(cnn_step, "resnet8", 64),
    "resnet18_step_b64": lambda: _workload(cnn_step, "resnet18", 64),
    "lm_step_b32": lambda: _workload(lm_step, 32),
    "gpt2_b8": _gpt2,
    "resnet50_b64": _resnet50,
}
"""Workloads of ``brim bench`` by their names; GPT-2 small on 8 x 1024 tokens; ResNet-50 on 64 x 3 x 224 x 224."""


def passes_through_fusion(backend: Any) -> list[Any]:
    """The passes of a backend from the first through ``fuse``."""
    found = list(default_passes(backend))
    names = [getattr(one, "func", one).__name__ for one in found]
    return found[: names.index("fuse") + 1]


def traffics(step: Step, device: str) -> tuple[Traffic, Traffic, Traffic]:
    """What a step moves as traced, after fusion, and as planned.

    Arguments:
        device: "cpu", or the name of a device profile.
    """
    fn, arguments = step
    profile = None if device == "cpu" else device
    place = brim.device("cpu")
    backend = place.backend if profile is None else ProfileDevice(profile, place).backend

    def one(passes: Any) -> Traffic:
        compiled = brim.compile(fn, passes=passes, device="cpu")
        return brim.plan(compiled, *arguments, device_profile=profile).traffic()

    return one(()), one(passes_through_fusion(backend)), one(None)


def _row(name: str, device: str, found: tuple[Traffic, Traffic, Traffic]) -> str:
    least = found[-1].least
    cells = [f"{one.total.launches:,} | {format_bytes(one.total.nbytes)}" for one in found]
    ratio = found[-1].total.nbytes / least.nbytes
    cells += [f"{least.launches:,} | {format_bytes(least.nbytes)}", f"{ratio:.2f}"]
    return f"| {name} | {device} | {' | '.join(cells)} |"


def main() -> None:
    """Plan and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(STEPS), help="names of steps, separated by commas")
    parser.add_argument("--devices", default="cpu,h100-80gb", help="cpu, or names of device profiles")
    parser.add_argument("--op-table", action="store_true", help="also what each planned step moves by phase and op")
    options = parser.parse_args()
    native = str(brim.device("cpu").backend.native_status()).partition(" (/")[0]
    print(f"{platform.machine()}, Python {platform.python_version()}, brim {brim.__version__}, CPU kernels: {native}\n")
    print("| step | device | traced: kernels | bytes | fused: kernels | bytes | planned: kernels | bytes ", end="")
    print("| least: kernels | bytes | planned / least |\n|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|")
    tables: list[str] = []
    for name in options.only.split(","):
        step = STEPS[name]()
        for device in options.devices.split(","):
            found = traffics(step, device)
            print(_row(name, device, found), flush=True)
            tables.append(f"\n{name}, {device}:\n\n{found[-1]}")
    for table in tables if options.op_table else ():
        print(table)


if __name__ == "__main__":
    main()
