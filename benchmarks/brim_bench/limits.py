"""What the machine can do at most, as far as NumPy and its BLAS show it: arithmetic, memory by level, page faults.

    python -m brim_bench.limits [--device cpu] [--threads 2] [--seconds 0.3]

CPU. *Arithmetic*: float32 multiplications and additions in registers alone (``arithmetic.py``), and beside them the
best rate of matrix products through NumPy's BLAS over several sizes, which is the limit where brim has no native
library; the processor's own peak is then higher. *Memory*: ``c = a + b`` by one process a thread, each on
arrays of its own that lie in one level of the caches; three arrays' bytes are counted, as STREAM does (McCalpin 1995).
*Page faults*: the first touch of fresh memory, page by page.

Of brim nothing but that loop in registers runs while the CPU is measured.

Another device: the best rate of brim's matrix products in float32, TF32 and bfloat16, and of the driver's copies
between arrays much larger than its caches; ``x + 1`` by brim where there are none.
"""

from __future__ import annotations

import argparse
import itertools
import json
import mmap
import multiprocessing
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import psutil

from brim_bench.arithmetic import register_rates
from brim_bench.caches import read_caches
from brim_bench.players import environment_with_threads
from brim_bench.timing import time_events
from brim_bench.workload import Job, Workload

__all__ = ["best_of", "least_seconds", "measure", "measure_in_process", "product_rates", "steady_rates"]

_SIZES = (512, 768, 1024, 1536, 2048)
_LONGEST_S = 0.05  # a product that takes longer is large enough
STEADY_S = 1.0


def measure_in_process(device: str, threads: int, seconds: float, rates: bool = False) -> Any:
    """``measure`` (or ``steady_rates``) in a process of its own, so that the libraries take the number of threads.

    Raises:
        ValueError: it failed; the text is its last line.
    """
    command = [sys.executable, "-m", "brim_bench.limits", "--device", device, "--threads", str(threads)]
    command += ["--seconds", str(seconds), *(["--rates"] if rates else [])]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=600, env=environment_with_threads(threads)
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise ValueError(f"the limits of {device} could not be measured: {lines[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(device: str, threads: int, seconds: float) -> dict[str, Any]:
    """The limits of a device.

    Returns:
        "device", "threads"; "flops_per_s" with "flops_how"; "memory", a list of levels from the fastest, each with
        "level", "holds_bytes" (None: everything) and "bytes_per_s"; on the CPU "page_bytes" and
        "fault_bytes_per_s", the BLAS's "blas_flops_per_s", and "flops_by_threads" as far as known.
    """
    if device.partition(":")[0] != "cpu":
        return _measure_device(device, seconds)
    rates, blas = register_rates(threads, seconds), _blas_rate(seconds)
    how = "float32 multiplications and additions in registers"
    if not rates:
        how = "float32 matrix products through NumPy's BLAS (no native library; the processor's peak is higher)"
    return {
        "device": device,
        "threads": threads,
        "flops_per_s": rates.get(threads, blas),
        "flops_how": how,
        "flops_by_threads": {str(count): rate for count, rate in rates.items()},
        "blas_flops_per_s": blas,
        "memory": _memory_levels(threads, seconds),
        "memory_how": "c = a + b, one process a thread, three arrays' bytes counted",
        "page_bytes": mmap.PAGESIZE,
        "fault_bytes_per_s": _fault_rate(seconds),
        "caches_known": read_caches()[1],
    }


def best_of(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    """Of two measurements of one device the better figures: what a machine could do once is no more than it can."""
    found = dict(a)
    for key in ("flops_per_s", "blas_flops_per_s", "fault_bytes_per_s"):
        if key in a:
            found[key] = max(a[key], b[key])
    for key in ("product_rates", "flops_by_threads"):
        if key in a:
            found[key] = {name: max(rate, b[key][name]) for name, rate in a[key].items()}
    found["memory"] = [
        {**one, "bytes_per_s": max(one["bytes_per_s"], two["bytes_per_s"])}
        for one, two in zip(a["memory"], b["memory"], strict=True)
    ]
    return found


def least_seconds(workload: Workload | Mapping[str, Any], limits: Mapping[str, Any]) -> tuple[float, str]:
    """(the time that a workload needs at these limits, what it is bound by); (0, "") where nothing bounds it.

    The larger of arithmetic at the full rate of its precision, and of its least bytes at the rate of the level that
    they fit in.
    """
    if isinstance(workload, Workload):
        flops, nbytes, precision = workload.flops, workload.nbytes, workload.precision
    else:
        flops, nbytes, precision = workload["flops"], workload["bytes"], workload.get("precision", "fp32")
    if not flops and not nbytes:
        return 0.0, ""
    level = next((one for one in limits["memory"] if one["holds_bytes"] is None or nbytes <= one["holds_bytes"]), None)
    moving_s = nbytes / level["bytes_per_s"] if level else 0.0
    kind = {"fp32": "float32", "tf32": "tf32", "bf16": "bfloat16"}[precision]
    computing_s = flops / limits.get("product_rates", {}).get(kind, limits["flops_per_s"])
    if computing_s >= moving_s or level is None:
        return computing_s, "arithmetic"
    return moving_s, f"{level['level']} bandwidth"


# ---- the CPU ----


def _best_time(run: Callable[[], Any], seconds: float) -> float:
    """The shortest of at least three runs within about so many seconds: a limit is what the machine can do."""
    found: list[float] = []
    start = time.perf_counter()
    run()
    while len(found) < 3 or time.perf_counter() - start < seconds:
        before = time.perf_counter()
        run()
        found.append(time.perf_counter() - before)
    return min(found)


def _blas_rate(seconds: float) -> float:
    best = 0.0
    for n in _SIZES:
        a, b = np.random.default_rng(0).standard_normal((2, n, n), np.float32)
        c = np.empty_like(a)
        took_s = _best_time(lambda a=a, b=b, c=c: np.matmul(a, b, out=c), seconds)  # type: ignore[misc]
        best = max(best, 2.0 * n**3 / took_s)
        if took_s > 20 * _LONGEST_S:
            break
    return best


def _levels(threads: int) -> list[tuple[str, int, int | None]]:
    """(name, bytes that each thread works on, bytes that all threads together can hold there)."""
    caches, _ = read_caches()
    found: list[tuple[str, int, int | None]] = []
    last = max(caches)
    for level in sorted(caches):
        if level == 1:
            continue  # calls of NumPy take longer than the work
        shared = level == last and level > 2
        holds = caches[level] if shared else caches[level] * threads
        found.append((f"L{level}", holds // 2 // threads, holds))
    beyond = max(4 * caches[last], 128 * 2**20)
    beyond = min(beyond, 2**30, psutil.virtual_memory().available // 4)
    return [*found, ("memory", beyond // threads, None)]


def _stream(sizes: Sequence[int], seconds: float, barrier: Any, results: Any) -> None:
    """One process: for each size add arrays of together so many bytes until the time is over; put bytes a second."""
    found = []
    for nbytes in sizes:
        count = max(1024, nbytes // 12)
        a, b, c = (np.ones(count, np.float32) for _ in range(3))
        np.add(a, b, out=c)
        barrier.wait()  # all processes work on one level at a time
        runs, start = 0, time.perf_counter()
        while (took_s := time.perf_counter() - start) < seconds or runs < 3:
            for _ in range(8 if count < 2**20 else 1):
                np.add(a, b, out=c)
                runs += 1
        found.append(runs * 12 * count / took_s)
    results.put(found)


def _memory_levels(threads: int, seconds: float) -> list[dict[str, Any]]:
    context, levels = multiprocessing.get_context("spawn"), _levels(threads)
    barrier, results = context.Barrier(threads), context.Queue()
    sizes = [nbytes for _, nbytes, _ in levels]
    workers = [context.Process(target=_stream, args=(sizes, seconds, barrier, results)) for _ in range(threads)]
    for worker in workers:
        worker.start()
    rates = [results.get(timeout=120) for _ in workers]
    for worker in workers:
        worker.join()
    return [
        {"level": level, "holds_bytes": holds, "bytes_per_s": sum(rate[n] for rate in rates)}
        for n, (level, _, holds) in enumerate(levels)
    ]


def _fault_rate(seconds: float) -> float:
    """Bytes a second of fresh memory by its first touch, in the system's ordinary pages."""
    nbytes = 64 * 2**20

    def touch() -> float:
        if hasattr(mmap, "MAP_ANONYMOUS"):
            memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        else:
            memory = mmap.mmap(-1, nbytes)
        if hasattr(mmap, "MADV_NOHUGEPAGE"):
            memory.madvise(mmap.MADV_NOHUGEPAGE)
        pages = np.frombuffer(memory, np.uint8)[:: mmap.PAGESIZE]
        start = time.perf_counter()
        pages[:] = 1
        return time.perf_counter() - start

    found: list[float] = []
    start = time.perf_counter()
    while len(found) < 3 or time.perf_counter() - start < seconds:
        found.append(touch())
    return nbytes / min(found)


# ---- any device, by brim ----


_ARITHMETIC = {"float32": ("float32", "full"), "tf32": ("float32", "tf32"), "bfloat16": ("bfloat16", "full")}
"""Kinds of products on a device: dtype of the factors, precision of float32 products."""


def _best_on(place: Any, run: Callable[[], Any], seconds: float) -> float:
    """The shortest time of a run on a device: by its own clock where it has one."""
    measuring = getattr(place.backend, "measuring", None)
    events = None if measuring is None else measuring(place.index)
    if events is None:

        def finished() -> None:
            run()
            place.backend.synchronize(place.index)

        return _best_time(finished, seconds)
    run()
    return min(time_events(Job(run, dict), events, seconds)[0])


def _product(place: Any, n: int, dtype: str) -> Callable[[], Any]:
    """brim's product of two matrices n x n."""
    import brim

    block = np.random.default_rng(0).standard_normal((1, min(n * n, 2**20)), np.float32)
    a, b = (
        brim.broadcast_to(brim.asarray(one, device=place).astype(dtype), (n * n // block.size, block.size)).reshape(
            n, n
        )
        for one in (block, block[:, ::-1].copy())
    )
    return brim.compile(lambda: a @ b, copy=False, device=place)


def product_rates(device: str, seconds: float) -> dict[str, float]:
    """FLOP/s of brim's matrix products on a device by kind: the best over sizes that double until one is long."""
    import brim

    place = brim.device(device)
    found: dict[str, float] = {}
    for kind in ("float32",) if device.partition(":")[0] == "cpu" else _ARITHMETIC:
        dtype, precision = _ARITHMETIC[kind]
        n, best = 256, 0.0
        try:
            while n <= 8192:
                brim.set_float32_precision(precision)
                took_s = _best_on(place, _product(place, n, dtype), seconds)
                best = max(best, 2.0 * n**3 / took_s)
                if took_s > _LONGEST_S:
                    break
                n *= 2
        finally:
            brim.set_float32_precision("full")
        found[kind] = best
    return found


def steady_rates(device: str) -> list[dict[str, Any]]:
    """What a device computes for a while, not at best: the median rate over at least a second of matrix products.

    On the CPU brim's products and NumPy's; both at the size that is the fastest for them.

    Returns:
        "dtype", "flops_per_s" and "how" of the faster one, for each dtype.
    """
    import brim

    place = brim.device(device)
    on_cpu = device.partition(":")[0] == "cpu"
    found = []
    for kind in ("float32",) if on_cpu else _ARITHMETIC:
        dtype, precision = _ARITHMETIC[kind]
        brim.set_float32_precision(precision)

        def by_brim(n: int, dtype: str = dtype) -> Callable[[], Any]:
            product = _product(place, n, dtype)

            def run() -> None:
                product()
                place.backend.synchronize(place.index)

            return run

        rates = {"brim's": _steady_rate(by_brim)}
        if on_cpu:
            rates["NumPy's"] = _steady_rate(_by_numpy)
        whose = max(rates, key=lambda one: rates[one])
        others = "".join(f"; {one} {rate / 1e9:,.0f} GFLOP/s" for one, rate in rates.items() if one != whose)
        how = f"{whose} matrix products on this machine, median over a second{others}"
        found.append({"dtype": kind, "flops_per_s": rates[whose], "how": how})
    brim.set_float32_precision("full")
    return found


def _by_numpy(n: int) -> Callable[[], Any]:
    a, b = np.random.default_rng(0).standard_normal((2, n, n), np.float32)
    c = np.empty_like(a)
    return lambda: np.matmul(a, b, out=c)


def _steady_rate(make: Callable[[int], Callable[[], Any]]) -> float:
    """FLOP/s of products n x n, n the fastest of sizes that double until one product is long."""
    n, best, best_n = 256, 0.0, 256
    while n <= 8192:
        took_s = _best_time(make(n), 0.1)
        if 2.0 * n**3 / took_s > best:
            best, best_n = 2.0 * n**3 / took_s, n
        if took_s > _LONGEST_S:
            break
        n *= 2
    run, times = make(best_n), list[float]()
    run()
    while sum(times) < STEADY_S or len(times) < 3:
        before = time.perf_counter()
        run()
        times.append(time.perf_counter() - before)
    return 2.0 * best_n**3 / statistics.median(times)


_COPY_BYTES = 2**30


def _copy_rate(place: Any, seconds: float) -> tuple[float, int]:
    """(bytes read and written a second by the driver's own copies, bytes of one), between arrays used in turn.

    Each array has a gibibyte, or a sixteenth of what is free: far more than any cache. 0 where the device has no such
    copies.
    """
    import brim

    measuring = getattr(place.backend, "measuring", None)
    measures = None if measuring is None else measuring(place.index)
    if measures is None:
        return 0.0, 0
    nbytes = min(_COPY_BYTES, measures.card()["free_bytes"] // 16)
    arrays = [brim.zeros((nbytes // 4,), device=place).array for _ in range(4)]
    pairs = itertools.cycle([(arrays[0], arrays[1]), (arrays[2], arrays[3])])
    times, _ = time_events(Job(lambda: measures.copy(*next(pairs)), dict, (), 2), measures, seconds)
    return 2.0 * nbytes / min(times), nbytes


def _measure_device(device: str, seconds: float) -> dict[str, Any]:
    import brim

    place = brim.device(device)
    rates, own, count = product_rates(device, seconds), 0.0, 2**20
    while count <= 2**27:
        x = brim.zeros((count,), device=place)
        took_s = _best_on(place, brim.compile(lambda x=x: x + 1.0, copy=False, device=place), seconds)
        own = max(own, 8 * count / took_s)
        if took_s > _LONGEST_S:
            break
        count *= 4
    copied, nbytes = _copy_rate(place, seconds)
    # A cache makes the smaller arrays of `x + 1` quicker than the memory is: the driver's copies decide where they are.
    how = f"copies of {nbytes:,} B by the driver, read and written; x + 1 by brim {own / 1e9:,.0f} GB/s"
    return {
        "device": f"{place}, {place.backend.describe(place.index)}",
        "threads": None,
        "flops_per_s": rates["float32"],
        "flops_how": "float32 matrix products by brim",
        "product_rates": rates,
        "memory": [{"level": "memory", "holds_bytes": None, "bytes_per_s": copied or own}],
        "memory_how": how if copied else "x + 1 by brim, read and written",
    }


def main() -> None:
    """Measure and print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=0.3)
    parser.add_argument("--rates", action="store_true", help="only matrix products, for a while")
    options = parser.parse_args()
    if options.rates:
        print(json.dumps(steady_rates(options.device)))
    else:
        print(json.dumps(measure(options.device, options.threads, options.seconds)))


if __name__ == "__main__":
    main()
