"""Sides of a benchmark whose device is a clock that is told what a run takes, in this process."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

from bench_documents import LIMITS
from brim_bench.child import _Server
from brim_bench.players import PlayerFailed
from brim_bench.sides import Unsupported
from brim_bench.sides.brim_side import Brim
from brim_bench.workload import Job, Workload

PEER, COMPILER = "fake_peers:Quick", "fake_peers:Compiler"
GPU_LIMITS = {
    **LIMITS, "device": "cuda:0, Some Card", "product_rates": {"float32": 5e13, "tf32": 4e14, "bfloat16": 8e14},
    "memory": [{"level": "memory", "holds_bytes": None, "bytes_per_s": 3e12}],
}  # fmt: skip
CARD = {"name": "Some Card", "uuid": "GPU-0f0e", "total_bytes": 80 << 30, "free_bytes": 70 << 30, "l2_bytes": 1 << 10}


class Clocked(Brim):
    """brim on the CPU, beside a device's clock on which every run takes ``run_s``."""

    run_s: ClassVar[float] = 1e-3
    scale: ClassVar[float] = 1.0

    def __init__(self, *_: Any) -> None:
        super().__init__("cpu", 1)
        self.now_s, self.runs = 0.0, 0

    def build(self, workload: Workload, checking: bool) -> Job:
        job = super().build(workload, checking)

        def run() -> Any:
            self.now_s += self.run_s
            self.runs += 1
            return job.run()

        def all_results() -> dict[str, Any]:
            return {name: self.scale * value for name, value in job.results().items()}

        return replace(job, run=run, results=all_results)

    def events(self) -> Any:
        return self

    def mark(self) -> float:
        return self.now_s

    def seconds(self, before: float, after: float) -> float:
        return after - before

    def card(self) -> dict[str, Any]:
        return dict(CARD)

    def state(self) -> dict[str, float]:
        return {"sm_clock_hz": 1.98e9, "temperature_celsius": 50.0 + (self.runs > 100), "power_watts": 400.0}

    def memory_figures(self, job: Job) -> dict[str, float]:
        return {**super().memory_figures(job), "held_peak_bytes": 3 << 20, "reserved_peak_bytes": 4 << 20}


class Slower(Clocked):
    """Takes twice as long."""

    name: ClassVar[str] = PEER
    run_s: ClassVar[float] = 2e-3

    def memory_figures(self, job: Job) -> dict[str, float]:
        return {"held_peak_bytes": 5 << 20, "reserved_peak_bytes": 8 << 20}


class Compiler(Slower):
    """Cannot compile."""

    name: ClassVar[str] = COMPILER
    compiles: ClassVar[bool] = True

    def step(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        raise Unsupported("the compiler gave up")

    _last = step


class InProcess:
    """A player without a process; what it says goes through JSON as ever."""

    sides: ClassVar[dict[str, type[Clocked]]] = {"brim": Clocked, PEER: Slower, COMPILER: Compiler}
    asked: ClassVar[list[tuple[str, str]]] = []

    def __init__(self, side: str, *_: Any, tiny: bool = True, **__: Any) -> None:
        self.side, self.pid, self.timeout_s = side, None, 600.0
        self.server = _Server(self.sides[side](), tiny)

    def start(self) -> dict[str, Any]:
        return self.ask("hello")

    def ask(self, what: str, **details: Any) -> dict[str, Any]:
        self.asked.append((self.side, what))
        try:
            answer: dict[str, Any] = json.loads(json.dumps(self.server.answer({"do": what, **details})))
        except Exception as error:
            raise PlayerFailed(str(error), self.server.side.refuses(error)) from error
        return answer

    def settle(self) -> None:
        pass

    def stop(self) -> None:
        pass
