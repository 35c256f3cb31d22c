"""Runs the tests of the native kernels on a library that watches itself: memory and undefined behaviour, or threads.

    python tools/sanitize.py address thread

`address` (AddressSanitizer with UndefinedBehaviorSanitizer) fails when a kernel reads or writes one byte outside of its
arrays, `thread` (ThreadSanitizer) when two threads touch the same memory and nothing orders them. Of each test so many
cases run that every value of every parameter takes part (each dtype, each shape); every function of the library must
have been called by them. Before that, functions that do wrong on purpose, compiled in the same way, must be found out.
Where the compiler has no sanitizers nothing runs, the reason is printed, and the exit status is 0.
"""

from __future__ import annotations

import gc
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
for _folder in ("src", "backends"):
    sys.path.insert(0, str(ROOT / _folder))

from brim_cpu import native, native_build  # noqa: E402  # a checkout that need not be installed

# Loaded before everything else, for it stands in for malloc and the functions of threads.
RUNTIMES = {"address": ("libasan.so", "libstdc++.so"), "thread": ("libtsan.so",)}
OPTIONS = {
    # Python itself keeps memory to its end. An array too large to be had is NumPy's to report.
    "address": {"ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1", "UBSAN_OPTIONS": "print_stacktrace=1"},
    # What Python, NumPy and the dynamic loader do among themselves is not seen whole, so it is left out.
    "thread": {"TSAN_OPTIONS": "ignore_noninstrumented_modules=1:halt_on_error=0:second_deadlock_stack=1"},
}
# Neither is of use to a sanitizer: it signals a process that is slow here, or forks one that has threads, which
# ThreadSanitizer does not support; large arrays take their time under ThreadSanitizer and have the same pieces.
LEFT_OUT = {
    "address": ("test_ctrl_c", "test_threads_sleep"),
    "thread": ("test_ctrl_c", "test_threads_sleep", "test_a_forked_child", "test_large_", "test_sum_is_as_accurate",
               "200000", "of_large_and_strided"),
}  # fmt: skip

# Does wrong where `wrong` is 1: reads one float behind n of them; shifts too far; adds on two threads without order.
PROBE = r"""
#include <pthread.h>
static float* shared;
static void* add(void*) { for (int i = 0; i < 1000; i++) shared[0] = shared[0] + 1; return nullptr; }
extern "C" {
__attribute__((visibility("default"))) void probe_read(float* x, long n, long wrong) {
    float sum = 0;
    for (long i = 0; i < n + wrong; i++) sum += x[i];
    x[0] = sum;
}
__attribute__((visibility("default"))) void probe_shift(float* x, long n, long wrong) { x[0] = 1 << (n + 31 * wrong); }
__attribute__((visibility("default"))) void probe_race(float* x, long, long wrong) {
    shared = x;
    pthread_t one;
    pthread_create(&one, nullptr, add, nullptr);
    if (!wrong) pthread_join(one, nullptr);
    add(nullptr);
    if (wrong) pthread_join(one, nullptr);
}
}
"""
PROBES = {"address": ("probe_read", "probe_shift"), "thread": ("probe_race",)}
CALL_PROBE = """
import ctypes, sys
import numpy as np
library, name, wrong = sys.argv[1:]
x = np.ones(7, np.float32)
getattr(ctypes.CDLL(library), name)(ctypes.c_void_p(x.ctypes.data), ctypes.c_long(7), ctypes.c_long(int(wrong)))
print("returned")
"""


def environment(kind: str, log: Path | None = None) -> dict[str, str]:
    """Variables under which a Python process loads libraries with this sanitizer.

    Arguments:
        kind: address or thread.
        log: where reports go, a file for each process; None: to standard error.

    Raises:
        native_build.BuildError: the compiler does not have it; says why.
    """
    command = native_build.compiler()
    if sys.platform != "linux" or command is None:
        raise native_build.BuildError("only with GCC on Linux")
    paths = []
    for name in RUNTIMES[kind]:
        told = subprocess.run([*command, f"-print-file-name={name}"], capture_output=True, text=True, check=False)
        paths.append(told.stdout.strip())
        if told.returncode or not os.path.isabs(paths[-1]):
            raise native_build.BuildError(f"{command[0]} has no {name}")
    options = {name: value + (f":log_path={log}" if log else "") for name, value in OPTIONS[kind].items()}
    python_path = os.pathsep.join(str(ROOT / folder) for folder in ("src", "backends", "benchmarks", "tests"))
    return {
        **os.environ, **options, "BRIM_NATIVE_SANITIZE": kind, "LD_PRELOAD": " ".join(paths),
        "PYTHONPATH": python_path, "PYTHONMALLOC": "malloc",
    }  # fmt: skip


def build_probe(kind: str, folder: Path) -> Path:
    """The library of functions that do wrong on purpose. Raises BuildError."""
    command = native_build.compiler()
    assert command is not None, "environment() was asked first"
    source, library = folder / "probe.cpp", folder / f"probe-{kind}.so"
    source.write_text(PROBE)
    flags = [*native_build.FLAGS, *native_build.SANITIZERS[kind]]
    done = subprocess.run(
        [*command, *flags, "-shared", str(source), "-o", str(library)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise native_build.BuildError(f"{command[0]} {native_build.SANITIZERS[kind][0]} failed: {done.stderr[-300:]}")
    return library


def call_probe(kind: str, library: Path, name: str, wrong: bool) -> subprocess.CompletedProcess[str]:
    """A process that calls one of these functions."""
    command = [sys.executable, "-c", CALL_PROBE, str(library), name, str(int(wrong))]
    return subprocess.run(command, capture_output=True, text=True, env=environment(kind), timeout=120, check=False)


def reason_to_skip(kind: str, folder: Path) -> str:
    """Why this sanitizer cannot run here, or an empty string: it finds nothing in a function that does nothing wrong.

    Raises:
        SystemExit: it runs, and misses what a function does wrong.
    """
    try:
        environment(kind)
        library = build_probe(kind, folder)
        for name in PROBES[kind]:
            right = call_probe(kind, library, name, wrong=False)
            if right.returncode:
                return f"a process under it fails: {(right.stderr.strip().splitlines() or ['no message'])[0][:200]}"
            if call_probe(kind, library, name, wrong=True).returncode == 0:
                raise SystemExit(f"sanitize {kind}: {name} does wrong, and nothing was reported")
    except native_build.BuildError as error:
        return str(error)
    return ""


class Sample:
    """A plugin for pytest: cases with every value of every parameter; at the end, the functions that none called."""

    def __init__(self, kind: str) -> None:
        self.kind, self.uncalled = kind, list[str]()

    def pytest_collection_modifyitems(self, config, items) -> None:
        by_test: dict[str, list] = {}
        for item in items:
            if not any(word in item.name for word in LEFT_OUT[self.kind]):
                by_test.setdefault(f"{item.path}::{item.originalname}", []).append(item)
        kept = []
        for cases in by_test.values():
            random.Random(0).shuffle(cases)  # so that the values of one parameter meet various ones of another
            seen: set[tuple[str, str]] = set()
            for case in cases:
                given = case.callspec.params if hasattr(case, "callspec") else {"": ""}
                values = {(name, repr(value)) for name, value in given.items()}
                if not values <= seen:
                    kept.append(case)
                    seen |= values
        config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
        items[:] = kept

    def pytest_sessionfinish(self) -> None:
        functions = [x for x in gc.get_objects() if isinstance(x, native.Function)]
        called = {x.name for x in functions if x.was_bound}
        self.uncalled = sorted({x.name for x in functions} - called)


def run_tests(kind: str) -> int:
    """Within a process under the sanitizer: the tests."""
    import pytest

    print(f"sanitize {kind}: {native.status()}", flush=True)
    if not native.available():
        return 1
    sample = Sample(kind)
    files = sorted(str(path) for path in (ROOT / "tests").glob("test_native_*.py") if path.stem != "test_native_build")
    status = int(pytest.main(["-q", "-p", "no:cacheprovider", "-p", "no:xdist", *files], plugins=[sample]))
    if sample.uncalled:
        print(f"sanitize {kind}: no test called {', '.join(sample.uncalled)}")
    return status or bool(sample.uncalled)


def start(kind: str, folder: Path) -> subprocess.Popen[str]:
    """A process that compiles the library and runs the tests."""
    command = [sys.executable, str(Path(__file__).resolve()), "--tests", kind]
    output = open(folder / f"{kind}.output", "w")  # noqa: SIM115  # the process's
    return subprocess.Popen(
        command, env=environment(kind, folder / f"{kind}.report"), cwd=ROOT, stdout=output, stderr=output, text=True
    )


def main(arguments: list[str]) -> int:
    """Everything, the kinds side by side."""
    if arguments[:1] == ["--tests"]:
        return run_tests(arguments[1])
    kinds = arguments or list(RUNTIMES)
    if unknown := set(kinds) - set(RUNTIMES):
        print(f"sanitize: expected {' or '.join(RUNTIMES)}, got {', '.join(sorted(unknown))}", file=sys.stderr)
        return 2
    folder, start_s, failed = Path(tempfile.mkdtemp(prefix="brim-sanitize-")), time.perf_counter(), False
    try:
        running = {}
        for kind in kinds:
            if reason := reason_to_skip(kind, folder):
                print(f"sanitize {kind}: skipped: {reason}")
            else:
                running[kind] = start(kind, folder)
        for kind, process in running.items():
            status = process.wait()
            reports = [path.read_text(errors="replace") for path in sorted(folder.glob(f"{kind}.report*"))]
            wrong = status != 0 or any(reports)
            output = (folder / f"{kind}.output").read_text(errors="replace")
            print(*([output[-20000:], *(text[:20000] for text in reports)] if wrong else [output[-400:].strip()]))
            print(f"sanitize {kind}: {'FAILED' if wrong else 'passed'}, {time.perf_counter() - start_s:.0f} s")
            failed |= wrong
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
