"""Compiles ``native/*.cpp`` into shared libraries: for a wheel while it is built, for a checkout when first wanted.

One path serves every kind of installation: a library is a file whose name carries the digest of the sources and flags.
A wheel brings one for each kind of processor beside the sources (``native/lib``, made by setup.py); where there is none
that fits (an editable install, changed sources, another machine), it is compiled once into the user's cache. Nothing
here fails an installation: without a compiler brim runs its NumPy kernels. Only the standard library is imported, so
that setup.py can load this file by its path.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

if sys.platform != "win32":
    import fcntl

__all__ = ["BuildError", "build_all", "cache_folder", "cached", "compiler", "digest", "prebuilt", "sanitizer"]
__all__ += ["variants"]

SOURCES = Path(__file__).resolve().parent / "native"
PREBUILT = SOURCES / "lib"

# No contraction: a * b + c is rounded twice, as NumPy does it; kernels that want a fused one say so. NaN, infinities
# and signed zeros are kept; only floating-point exception flags, which nobody reads, are given up.
# Integers wrap around; memory of one type may be read as another.
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fno-exceptions", "-fno-rtti", "-fvisibility=hidden", "-pthread"]
FLAGS += ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fwrapv", "-fno-strict-aliasing"]
FLAGS += ["-Wall", "-Wextra"]
LINK_FLAGS = ["-shared", "-pthread"]
if sys.platform == "linux":
    LINK_FLAGS += ["-static-libgcc", "-static-libstdc++"]  # so that a wheel runs on other distributions

# BRIM_NATIVE_SANITIZE=address or thread: a library that watches its own memory and threads (tools/sanitize.py).
# Optimised little and checked out of line, so that it compiles in seconds. What is left out of `undefined` finds
# nothing that `address` does not find, and takes as long to compile as all the rest.
_WATCHED = ["-O1", "-g1", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all"]
SANITIZERS = {
    "address": [
        *("-fsanitize=address,undefined", "-fno-sanitize=null,pointer-overflow,object-size", *_WATCHED),
        *("--param", "asan-instrumentation-with-call-threshold=0"),
    ],
    "thread": ["-fsanitize=thread", *_WATCHED],
}

# Best first; each with the flags of Linux's /proc/cpuinfo that it needs.
_X86 = {
    "x86-64-v4": ("-march=x86-64-v4", "-mprefer-vector-width=512"),
    "x86-64-v3": ("-march=x86-64-v3",),
    "x86-64": (),
}
_V3 = frozenset(("avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe"))
_V4 = _V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
_NEEDS = {"x86-64-v4": _V4, "x86-64-v3": _V3}

COMPILE_SECONDS = 300
KEPT_DAYS = 30


class BuildError(Exception):
    """Why there is no native library; one line."""


def variants() -> dict[str, tuple[str, ...]]:
    """The variants for this kind of processor, best first, with the compiler flags of each."""
    machine = platform.machine().lower()
    return _X86 if machine in ("x86_64", "amd64") else {machine or "generic": ()}


def runnable(cpuinfo: str | None = None) -> list[str]:
    """The variants that this processor can run, best first.

    Arguments:
        cpuinfo: text of ``/proc/cpuinfo``, where the kernel lists what processor and system both support; elsewhere
            only the plainest variant is sure to run.
    """
    if cpuinfo is None:
        try:
            cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        except OSError:
            cpuinfo = ""
    line = next((line for line in cpuinfo.splitlines() if line.startswith("flags")), "")
    flags = set(line.partition(":")[2].split())
    return [name for name in variants() if _NEEDS.get(name, frozenset()) <= flags]


def digest(variant: str) -> str:
    """What a library was made from: the sources and the flags."""
    total = hashlib.sha256(" ".join([*_flags(variant), *_link_flags()]).encode())
    for path in _sources((".cpp", ".hpp")):
        total.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return total.hexdigest()[:16]


def prebuilt(variant: str) -> Path | None:
    """The library that was installed with these sources."""
    path = PREBUILT / _name(variant)
    return path if path.is_file() else None


def compiler(environ: Mapping[str, str] = os.environ) -> list[str] | None:
    """The C++ compiler: ``CXX`` (empty: none), else the first of c++, g++, clang++ on the path."""
    chosen = environ.get("CXX")
    if chosen is not None:
        command = chosen.split()
        return command if command and shutil.which(command[0]) else None
    found = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    return [found] if found else None


def cache_folder(environ: Mapping[str, str] = os.environ) -> Path | None:
    """Where libraries are kept that were compiled here, None where they are not.

    ``BRIM_CACHE_DIR`` names brim's folder (empty: keep nothing), else it is in the user's cache: ``XDG_CACHE_HOME``
    where set, else ``~/.cache``.
    """
    chosen = environ.get("BRIM_CACHE_DIR")
    if chosen is not None:
        return Path(chosen).expanduser().absolute() / "native" if chosen else None
    xdg = environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(xdg):  # the XDG specification says to ignore relative paths
        return Path(xdg) / "brim" / "native"
    try:
        return Path.home() / ".cache" / "brim" / "native"
    except RuntimeError:  # a user without a home
        return None


def cached(variant: str) -> Path:
    """The library compiled by this machine's compiler, from the cache or now. Raises BuildError."""
    if sys.platform == "win32":
        raise BuildError("native kernels are not compiled on Windows")
    command = compiler()
    if command is None:
        raise BuildError("no C++ compiler found (c++, g++ or clang++ on the PATH, or CXX)")
    folder = cache_folder()
    if folder is None:
        raise BuildError("no folder to keep compiled code in (BRIM_CACHE_DIR is empty, or there is no home)")
    folder = folder / _identity(command)
    path = folder / _name(variant)
    if path.is_file():
        return path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / "lock"):
            if not path.is_file():
                if sys.stderr.isatty():
                    print("brim: compiling its native kernels, once (BRIM_NATIVE=0: do without)", file=sys.stderr)
                _compile(command, variant, path)
                _remove_old(folder)
    except OSError as error:
        raise BuildError(f"cannot compile into {folder}: {error}") from None
    return path


def build_all(folder: Path) -> list[Path]:
    """Libraries for every variant of this kind of processor, written to a folder. Raises BuildError."""
    command = compiler()
    if command is None or sys.platform == "win32":
        raise BuildError("no C++ compiler found (c++, g++ or clang++ on the PATH, or CXX)")
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for variant in variants():
        with tempfile.TemporaryDirectory() as work:  # objects do not belong into the wheel
            library = Path(work) / _name(variant)
            _compile(command, variant, library)
            made.append(Path(shutil.copy(library, folder)))
    return made


def sanitizer(environ: Mapping[str, str] = os.environ) -> str:
    """What the library is to watch over (``BRIM_NATIVE_SANITIZE``): address, thread, or empty. Raises BuildError."""
    wish = environ.get("BRIM_NATIVE_SANITIZE", "")
    if wish and wish not in SANITIZERS:
        raise BuildError(f"BRIM_NATIVE_SANITIZE is {' or '.join(SANITIZERS)}, not {wish!r}")
    return wish


def _flags(variant: str) -> list[str]:
    watched = sanitizer()
    return [*FLAGS, *variants()[variant], *(SANITIZERS[watched] if watched else ())]


def _link_flags() -> list[str]:
    return ["-shared", "-pthread"] if sanitizer() else LINK_FLAGS


def _name(variant: str) -> str:
    return "-".join(filter(None, ("libbrim", variant, sanitizer(), digest(variant)))) + ".so"


def _sources(suffixes: Sequence[str]) -> list[Path]:
    return sorted(path for path in SOURCES.iterdir() if path.suffix in suffixes)


def _identity(command: Sequence[str]) -> str:
    """Digest of a compiler's command, size and date: another compiler, another library."""
    path = Path(shutil.which(command[0]) or command[0]).resolve()
    state = path.stat()
    return hashlib.sha256(f"{command} {path} {state.st_size} {state.st_mtime_ns}".encode()).hexdigest()[:8]


def _compile(command: Sequence[str], variant: str, path: Path) -> None:
    """Compile every source by itself, as many at once as there are processors, then link; the file appears whole.

    Objects are kept beside the library, so that a change of one source compiles that one only.
    """
    flags = _flags(variant)
    shared = hashlib.sha256(" ".join(flags).encode())
    for header in _sources((".hpp",)):
        shared.update(header.read_bytes())
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="building-") as work:
        objects, commands = [], []
        for source in sorted(_sources((".cpp",)), key=lambda source: -source.stat().st_size):  # the longest first
            own = shared.copy()
            own.update(source.read_bytes())
            kept = path.parent / f"{variant}-{source.stem}-{own.hexdigest()[:16]}.o"
            objects.append((kept, Path(work) / f"{source.stem}.o"))
            if not kept.is_file():
                commands.append([*command, *flags, "-c", str(source), "-o", str(objects[-1][1])])
        _run_all(commands)
        for kept, made in objects:
            if made.is_file():
                os.replace(made, kept)
        library = Path(work) / path.name
        _run_all([[*command, *flags, *_link_flags(), *(str(kept) for kept, _ in objects), "-o", str(library)]])
        os.replace(library, path)


def _remove_old(folder: Path) -> None:
    """Objects and libraries of sources that were compiled long ago."""
    oldest = time.time() - KEPT_DAYS * 24 * 3600
    for path in folder.iterdir():
        if path.suffix in (".o", ".so") and path.stat().st_mtime < oldest:
            path.unlink(missing_ok=True)


def _run_all(commands: Sequence[Sequence[str]]) -> None:
    most = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    waiting, running = list(reversed(commands)), list[tuple[Sequence[str], subprocess.Popen[str]]]()
    try:
        while waiting or running:
            while waiting and len(running) < most:
                command = waiting.pop()
                process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
                running.append((command, process))
            command, process = running.pop(0)
            output, _ = process.communicate(timeout=COMPILE_SECONDS)
            if process.returncode != 0:
                lines = output.strip().splitlines() or [f"exit code {process.returncode}"]
                told = next((line for line in lines if "error" in line), lines[-1])
                raise BuildError(f"{command[0]} failed: {told}")
    except subprocess.TimeoutExpired:
        raise BuildError(f"{commands[0][0]} took more than {COMPILE_SECONDS} s") from None
    finally:
        for _, process in running:
            process.kill()
            process.communicate()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time; the others wait."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


if __name__ == "__main__":  # `python -m brim_cpu.native_build`: compile now rather than at the first use
    try:
        chosen = runnable()[0]
        print(f"native kernels: {prebuilt(chosen) or cached(chosen)}")
    except BuildError as error:
        print(f"native kernels: none, NumPy's are used ({error})")
