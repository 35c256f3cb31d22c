"""The process of one side: it builds workloads and times rounds as it is told, one line of JSON each way.

    python -m brim_bench.child brim --device cpu --threads 2

Requests: {"do": "hello"}, "check" and "build" (with "workload"), "round" (with "seconds"), "memory", "drop". Each is
answered by one line; a failure by {"error": ..., "unsupported": ...}. The process ends with its standard input.
On a device also "card" and "state". With ``--tiny`` workloads have the sizes of a rehearsal.
``--once first_step`` or ``--once rss`` runs one workload, prints the largest resident set in bytes, and ends.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import os
import sys
import time
from typing import Any

import psutil

from brim_bench.digest import digest
from brim_bench.sides import Side, Unsupported, find_side
from brim_bench.timing import time_events, time_round
from brim_bench.workload import Job, Workload
from brim_bench.workloads import EVERY, WORKLOADS
from brim_bench.workloads.process import FIRST_STEP, RSS

__all__ = ["main", "peak_resident_bytes"]

_SHORTEST_S = {True: 2e-4, False: 5e-3}  # of what is timed at once: on the CPU, on a device with launches to wait for


def peak_resident_bytes() -> int:
    """The most physical memory that this process has used."""
    info = psutil.Process().memory_info()
    if hasattr(info, "peak_wset"):  # Windows
        return int(info.peak_wset)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class _Resident:
    """Growth of the resident set since a moment: its peak where the system can reset that, else what is left of it."""

    def __init__(self) -> None:
        gc.collect()
        with contextlib.suppress(OSError, AttributeError):  # glibc keeps what was freed: the next user would hide in it
            ctypes.CDLL(None).malloc_trim(0)
        self.before_bytes, self.resets = psutil.Process().memory_info().rss, False
        with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # starts the high-water mark anew
            self.resets = True

    def growth(self) -> dict[str, float]:
        now_bytes = psutil.Process().memory_info().rss
        if self.resets:
            with open("/proc/self/status") as file:
                peak = next(line for line in file if line.startswith("VmHWM"))
            return {"rss_growth_bytes": max(0, int(peak.split()[1]) * 1024 - self.before_bytes)}
        return {"rss_left_bytes": max(0, now_bytes - self.before_bytes)}


class _Server:
    """Answers requests on a side."""

    def __init__(self, side: Side, tiny: bool = False) -> None:
        self.side = side
        self.job: Job | None = None
        self.checked: tuple[str, float] | None = None  # the job that stands was compared already; how long it took
        self.workloads: dict[str, Workload] = {one.name: (tiny and one.tiny) or one for one in EVERY}
        self.resident: _Resident | None = None

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        return getattr(self, f"do_{request.pop('do')}")(**request)

    def do_hello(self) -> dict[str, Any]:
        side = self.side
        return {
            "side": side.name, "version": side.version(), "threads": side.threads_used(), "facts": side.facts(),
            "import_code": side.import_code,
        }  # fmt: skip

    def do_card(self) -> dict[str, Any]:
        return {"card": self.side.card()}

    def do_state(self) -> dict[str, Any]:
        return {"state": self.side.state()}

    def _forget(self) -> None:
        self.job = self.checked = None
        self.side.start_memory()
        self.resident = _Resident()

    def do_check(self, workload: str) -> dict[str, Any]:
        """Results to compare. Where nothing is random, what was built for them is what is timed, too."""
        self._forget()
        one, start = self.workloads[workload], time.perf_counter()
        job = self.side.build(one, True)
        found = {name: digest(value) for name, value in job.results().items()}
        if not one.random:
            self.job, self.checked = job, (workload, time.perf_counter() - start)
        return {"results": found}

    def do_build(self, workload: str, warm_seconds: float) -> dict[str, Any]:
        """Build and warm up: compiled, captured, caches filled, pages touched."""
        if self.job is not None and self.checked is not None and self.checked[0] == workload:
            job, first_s = self.job, self.checked[1]
            self.checked = None  # a second time it is built anew
        else:
            self._forget()
            start = time.perf_counter()
            self.job = job = self.side.build(self.workloads[workload], False)
            job.run()
            self.side.synchronize()
            first_s = time.perf_counter() - start
        runs = 0
        for _ in range(job.sets):  # each set of arrays has a step of its own, which is captured in its third run
            for _ in range(3 if job.sets > 1 else 1):
                job.run()
        self.side.synchronize()
        start = time.perf_counter()
        while (took_s := time.perf_counter() - start) < warm_seconds or (runs < 3 and took_s < 2):
            job.run()
            self.side.synchronize()
            runs += 1
        return {"first_s": first_s}

    def _built(self) -> Job:
        if self.job is None:
            raise ValueError("no workload is built")
        return self.job

    def do_round(self, seconds: float) -> dict[str, Any]:
        events = self.side.events()
        if events is not None:
            times, runs = time_events(self._built(), events, seconds)
            return {"times": times, "runs": runs}
        shortest_s = _SHORTEST_S[self.side.device.partition(":")[0] == "cpu"]
        times, runs = time_round(self._built(), self.side.synchronize, seconds, shortest_s)
        return {"times": times, "runs": runs}

    def do_memory(self) -> dict[str, Any]:
        assert self.resident is not None
        growth = self.resident.growth()
        return {"memory": growth | self.side.memory_figures(self._built())}

    def do_drop(self) -> dict[str, Any]:
        self.job = self.checked = None
        self.side.start_memory()
        return {}


def _serve(side_name: str, options: Any) -> None:
    # What the libraries print must not come between the answers: they get the standard error stream.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    server: _Server | None = None
    for line in sys.stdin:
        try:
            if server is None:
                side = find_side(side_name)
                server = _Server(side(options.device, options.threads, options.eager), options.tiny)
            answer = server.answer(json.loads(line))
        except Exception as error:
            refused = isinstance(error, Unsupported) if server is None else server.side.refuses(error)
            answer = {"error": f"{type(error).__name__}: {error}", "unsupported": refused}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def main() -> None:
    """Serve, or run one workload."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("side")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--once", choices=("first_step", "rss"))
    options = parser.parse_args()
    if options.once is None:
        _serve(options.side, options)
        return
    name = {"first_step": FIRST_STEP, "rss": RSS}[options.once]
    side = find_side(options.side)(options.device, options.threads, options.eager)
    side.build(next(one for one in WORKLOADS if one.name == name), False).run()
    side.synchronize()
    print(peak_resident_bytes())


if __name__ == "__main__":
    main()
