"""All CUDA kernels that the tests know of, by what leads to them; as a program, what NVRTC makes of them.

``python tests/cuda_kernels.py`` needs NVRTC (``pip install nvidia-cuda-nvrtc-cu12``), and no GPU.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np

import brim
from brim.check.networks import IN_HALF, NETWORKS, compiled, make
from brim.op import REGISTRY
from brim.spec import DTYPES, Spec
from brim_cuda.launch import Call, Kernel
from brim_cuda.nvrtc import compile_cubin, find_nvrtc, nvrtc_version
from brim_cuda.registry import Work, work_of
from brim_cuda.source import translation_unit
from brim_cuda.steps import Steps
from emulating import recorded
from test_cuda_attention import attention_calls
from test_cuda_attention_mma import launches
from test_cuda_composites import composite_calls
from test_cuda_composites import works as composite_works
from test_cuda_elementwise import random_formula, work_for
from test_cuda_fused_norms import NAMES, cases
from test_cuda_together import calls as together_calls

__all__ = ["MAX_REGISTERS", "REGISTERS_OF_BLOCK", "Compilation", "by_origin", "calls_by_origin", "most_registers"]

MAX_REGISTERS = 128
"""Of a thread, unless launch bounds say otherwise: two blocks of 256 threads on a multiprocessor."""
REGISTERS_OF_BLOCK = 65536
"""What the threads of a block have together; a launch that wants more fails (CUDA C++ Programming Guide, table of
compute capabilities)."""

PROFILE = "h100-80gb"


def calls_of(works: Sequence[Work]) -> list[Call]:
    """Their launches of kernels."""
    return [call for work in works for call in work.calls if isinstance(call, Call)]


def of_planned_networks() -> list[Call]:
    """Those of the test networks as they are planned for a GPU: fused groups, joined updates, and all between."""
    found: list[Call] = []
    for name in (*NETWORKS, *IN_HALF):
        net = make(name)
        steps_of = compiled(net)
        for which in sorted({which for which, _ in net.calls}):
            arguments = next(given for number, given in net.calls if number == which)
            planned = brim.plan(steps_of[which], *arguments, device_profile=PROFILE)
            for bound in planned.programs[0].prepared.kernels:
                steps = getattr(bound.run, "__self__", None)
                assert isinstance(steps, Steps), f"{name}: a kernel that is not CUDA's"
                found += [step for step in steps.steps if isinstance(step, Call)]
    return found


def of_attention() -> list[Call]:
    """Of attention: those for tensor cores take the compiler half a second each, so a few of every kind."""
    few: list[tuple[str, int, dict[str, Any]]] = [
        ("float16", 64, {"causal": True}), ("bfloat16", 128, {"causal": False}), ("float32", 64, {"tf32": True}),
        ("float16", 24, {"p": 0.1}), ("bfloat16", 128, {"p": 0.1}), ("float32", 64, {"p": 0.1, "causal": False}),
        ("float32", 128, {"p": 0.1}),
    ]  # fmt: skip
    found = calls_of(composite_works(attention_calls()))
    return found + [call for dtype, numbers, how in few for call in launches(dtype, numbers, **how)]


def wide_losses() -> list[Work]:
    """Losses of rows that a block of 1,024 threads takes, alone and with their gradients."""
    found: list[Work] = []
    for dtype, classes in product(("float32", "bfloat16"), (50257, 50304)):
        x, index = Spec((8, classes), DTYPES[dtype]), Spec((8,), DTYPES["int64"])
        g, params = Spec((8,), DTYPES[dtype], (0,)), {"ignore_index": -100, "smoothing": 0.0}
        for name, ins in (("cross_entropy", [x, index]), ("cross_entropy_with_grad", [x, index, g])):
            found.append(work_of(REGISTRY[name], ins, REGISTRY[name].infer(ins, params), params))
    return found


def calls_by_origin() -> dict[str, list[Call]]:
    """Launches by what needs them."""
    return {
        "table of ops": calls_of([work for one in recorded() if (work := one.work()) is not None]),
        "composites": calls_of(composite_works(composite_calls())),
        "attention": of_attention(),
        "fused norms": calls_of(composite_works([one for name in NAMES for one in cases(name)[::9]])),
        "losses of many classes": calls_of(wide_losses()),
        "many arrays at once": calls_of(composite_works(list(together_calls().values()))),
        "planned networks": of_planned_networks(),
        "random formulas": calls_of([work_for(*random_formula(np.random.default_rng(seed))) for seed in range(10)]),
    }


def by_origin(calls: dict[str, list[Call]] | None = None) -> dict[str, list[Kernel]]:
    """Kernels of these launches by what needs them, each under the first that does."""
    groups: dict[str, list[Kernel]] = {}
    seen: set[Kernel] = set()
    for name, launched in (calls_by_origin() if calls is None else calls).items():
        groups[name] = [kernel for kernel in dict.fromkeys(call.kernel for call in launched) if kernel not in seen]
        seen.update(groups[name])
    return groups


class Compilation:
    """What NVRTC made of kernels for one architecture.

    Attributes:
        cubin: the code.
        log: what the compiler said.
        registers, spill_bytes, stack_bytes: of each kernel, in the compiler's order, which ``names`` has.
        elapsed_s: how long it took.
    """

    def __init__(self, kernels: Sequence[Kernel], arch: str) -> None:
        start_s = time.perf_counter()
        done = compile_cubin(translation_unit(kernels), arch, ["--ptxas-options=-v"])
        self.elapsed_s = time.perf_counter() - start_s
        self.cubin, self.log = done.cubin, done.log
        self.names = re.findall(r"Compiling entry function '(\w+)'", done.log)
        self.registers = [int(n) for n in re.findall(r"Used (\d+) registers", done.log)]
        self.spill_bytes = [int(n) for n in re.findall(r"(\d+) bytes spill stores", done.log)]
        self.stack_bytes = [int(n) for n in re.findall(r"(\d+) bytes stack frame", done.log)]


def most_registers(kernel: Kernel) -> int:
    """Registers that a thread may have: by the kernel's own launch bounds, else two blocks of 256 threads."""
    bounds = re.search(r"__launch_bounds__\((\d+), (\d+)\)", kernel.source)
    if bounds is None:
        return MAX_REGISTERS
    return min(255, REGISTERS_OF_BLOCK // (int(bounds[1]) * int(bounds[2])) // 8 * 8)


def main() -> int:
    """Compile all for sm_80 and sm_90 and print a table; 1 without NVRTC."""
    if find_nvrtc() is None:
        print("NVRTC was not found: pip install nvidia-cuda-nvrtc-cu12")
        return 1
    print(f"NVRTC {'.'.join(map(str, nvrtc_version()))}")
    groups = by_origin()
    for arch in ("sm_80", "sm_90"):
        for name, kernels in groups.items():
            made = Compilation(kernels, arch)
            assert len(made.registers) == len(kernels)
            print(
                f"{arch}  {name:<18}{len(kernels):>5} kernels  at most {max(made.registers)} registers, "
                f"{max(made.spill_bytes)} bytes spilled, {max(made.stack_bytes)} bytes of stack  {made.elapsed_s:.1f} s"
            )
    print(f"{sum(map(len, groups.values()))} kernels, each for two architectures")
    return 0


if __name__ == "__main__":
    sys.exit(main())
