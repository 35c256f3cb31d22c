"""The native kernels compile without warnings for other processors, and by another compiler than the usual one."""

from __future__ import annotations

import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from brim_cpu import native_build

# Compilers, and flags of processors. Checked as far as warnings go: templates are made, no code is.
WHERE = {
    "gcc-aarch64": ["aarch64-linux-gnu-g++"],
    "clang-aarch64": ["clang++", "--target=aarch64-linux-gnu"],
    "clang-x86-64-v4": ["clang++", "--target=x86_64-linux-gnu", "-march=x86-64-v4"],
}


def check(command: list[str], source: Path) -> str:
    """What the compiler says."""
    done = subprocess.run(
        [*command, *native_build.FLAGS, "-Werror", "-fsyntax-only", str(source)],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    return done.stdout + done.stderr


def reason_to_skip(command: list[str], tmp_path: Path) -> str:
    """Why this compiler cannot be used here, or an empty string: a file that includes a header is compiled."""
    if shutil.which(command[0]) is None:
        return f"no {command[0]}"
    source = tmp_path / "small.cpp"
    source.write_text("#include <atomic>\nstd::atomic<int> x;\n")
    said = check(command, source)
    return f"{' '.join(command)} compiles nothing here: {said.strip().splitlines()[0]}" if said else ""


@pytest.mark.parametrize("where", WHERE)
def test_no_warnings(where: str, tmp_path: Path) -> None:
    command = WHERE[where]
    if reason := reason_to_skip(command, tmp_path):
        pytest.skip(reason)
    sources = sorted(native_build.SOURCES.glob("*.cpp"))
    assert sources
    with ThreadPoolExecutor(2) as pool:
        said = list(pool.map(lambda source: check(command, source), sources))
    assert not any(said), "\n".join(said)[:5000]


def test_a_warning_is_seen(tmp_path: Path) -> None:
    command = native_build.compiler()
    if command is None:
        pytest.skip("no C++ compiler")
    source = tmp_path / "wrong.cpp"
    source.write_text("int f() { int unused = 1; return 2; }\n")
    assert "unused" in check(command, source)
