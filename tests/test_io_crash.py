"""A process killed while it saves: at every system call in turn, and by a real SIGKILL at random moments."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from brim import io


def parts_of(step: int, size: int = 4) -> dict[str, dict[str, np.ndarray]]:
    return {part: {"x": np.full(size, step, np.float32)} for part in ("model", "optimizer")}


def save(folder: Path, step: int) -> Path:
    return io.save_checkpoint(folder, "last", parts_of(step), {"step": step}, step=step, keep=1)


def steps_after_check(folder: Path) -> list[int]:
    """The steps of all checkpoints, newest first, each of which must be whole and unmixed."""
    steps = []
    for path in io.list_checkpoints(folder):
        loaded = io.load_checkpoint(path)
        values = {float(value) for arrays in loaded.arrays_by_part.values() for value in arrays["x"]}
        assert values == {loaded.step}
        assert loaded.state["step"] == loaded.step
        steps.append(loaded.step)
    return steps


class Killed(BaseException):
    """Not an Exception, and every system call after it fails too: no clean-up code gets anything done."""


# What changes the disk, or opens something to change it. shutil.rmtree calls these too.
CALLS = ["open", "mkdir", "fsync", "replace", "unlink", "rmdir"]


def test_killed_at_every_system_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "start", 1)
    seen: set[tuple[int, ...]] = set()
    left_behind = 0
    for allowed in range(500):
        run = tmp_path / f"run{allowed}"
        shutil.copytree(tmp_path / "start", run)
        calls = 0

        def counted(real: Callable, allowed: int = allowed) -> Callable:
            def call(*args: object, **kwargs: object) -> object:
                nonlocal calls
                calls += 1
                if calls > allowed:
                    raise Killed
                return real(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            for name in CALLS:
                patch.setattr(os, name, counted(getattr(os, name)))
            try:
                save(run, 2)
                finished = True
            except Killed:
                finished = False
        seen.add(tuple(steps_after_check(run)))
        left_behind += any(name.startswith(".") for name in os.listdir(run / "checkpoints"))
        save(run, 3)
        assert os.listdir(run / "checkpoints") == [io.latest_checkpoint(run).name]
        assert steps_after_check(run) == [3]
        shutil.rmtree(run)
        if finished:
            break
    assert finished
    assert allowed > 20  # so many calls there were to be killed at
    assert left_behind > 10
    assert seen == {(1,), (2, 1), (2,)}  # the old one, both, the new one; never none


WRITER = """
import sys
import numpy as np
from brim import io

folder = sys.argv[1]
newest = io.latest_checkpoint(folder)
step = io.load_checkpoint(newest).step if newest else 0
while True:
    step += 1
    parts = {part: {"x": np.full(60_000, step, np.float32)} for part in ("model", "optimizer")}
    io.save_checkpoint(folder, "last", parts, {"step": step}, step=step)
    io.append_jsonl(folder + "/metrics.jsonl", {"step": step, "text": "x" * 500})
    print(step, flush=True)
"""


def test_real_kills(tmp_path: Path) -> None:
    rng = random.Random(0)
    returned = 0
    for _ in range(10):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        assert writer.stdout is not None
        first = writer.stdout.readline()
        assert first, "the writer died by itself"
        time.sleep(rng.uniform(0, 0.1))
        assert writer.poll() is None
        writer.kill()  # SIGKILL; TerminateProcess on Windows
        printed = [first, *writer.stdout.read().splitlines()]
        writer.stdout.close()
        writer.wait()
        assert int(first) > returned  # it went on from where the last one was killed
        returned = max(int(line) for line in printed if line.strip())
        steps = steps_after_check(tmp_path)
        assert steps[0] in (returned, returned + 1)  # what was reported as saved is there
        assert 1 <= len(steps) <= 3
        records = io.read_jsonl(tmp_path / "metrics.jsonl")
        assert [record["step"] for record in records] == sorted({record["step"] for record in records})
        assert records[-1]["step"] in (steps[0], steps[0] - 1)
    assert returned >= 10
