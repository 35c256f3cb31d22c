"""The processes of the sides, seen from the benchmark: started with the same number of threads, asked over a pipe."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from typing import Any

import psutil

__all__ = ["Player", "PlayerFailed", "environment_with_threads"]

_THREAD_VARIABLES = (
    "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS", "VECLIB_MAXIMUM_THREADS",
    "BRIM_THREADS",
)  # fmt: skip


class PlayerFailed(Exception):
    """A side could not do what it was asked to; the text is its own.

    Attributes:
        unsupported: it does not have the workload, which is no failure.
    """

    def __init__(self, message: str, unsupported: bool = False) -> None:
        super().__init__(message)
        self.unsupported = unsupported


def environment_with_threads(threads: int) -> dict[str, str]:
    """This process's environment, with all libraries told to use so many threads and compiled Python code kept.

    An installed library has its code compiled; one that runs from a checkout would be compiled at every start.
    """
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return {**kept, **dict.fromkeys(_THREAD_VARIABLES, str(threads))}


class Player:
    """A side in a process of its own, which keeps running between rounds.

    Arguments:
        side: its name.
        device, threads, eager: as of ``Side``.
        command: another command to run than ``python -m brim_bench.child``.
        timeout_s: how long one answer may take.
        tiny: workloads have the sizes of a rehearsal.
    """

    def __init__(
        self,
        side: str,
        device: str = "cpu",
        threads: int = 1,
        eager: bool = False,
        command: Sequence[str] = (),
        timeout_s: float = 600.0,
        tiny: bool = False,
    ) -> None:
        self.side, self.device, self.threads, self.eager, self.timeout_s = side, device, threads, eager, timeout_s
        self.command = list(command) or [
            sys.executable, "-m", "brim_bench.child", side, "--device", device, "--threads", str(threads),
            *(["--eager"] if eager else []), *(["--tiny"] if tiny else []),
        ]  # fmt: skip
        self.facts: dict[str, Any] = {}
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Player:
        return self

    def __exit__(self, *_: Any) -> None:
        self.stop()

    @property
    def pid(self) -> int | None:
        """Of the process, while it runs."""
        return None if self._process is None or self._process.poll() is not None else self._process.pid

    def start(self) -> dict[str, Any]:
        """Start the process if it does not run, and ask it who it is."""
        if self._process is not None and self._process.poll() is None:
            return self.facts
        self.stop()
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115  # see stop()
        self._process = subprocess.Popen(
            self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True,
            encoding="utf-8", env=environment_with_threads(self.threads),
        )  # fmt: skip
        self._answers: queue.Queue[str] = queue.Queue()
        threading.Thread(target=_pump, args=(self._process.stdout, self._answers), daemon=True).start()
        self.facts = self.ask("hello")
        return self.facts

    def ask(self, what: str, **details: Any) -> dict[str, Any]:
        """The answer to one request.

        Raises:
            PlayerFailed: the side answered with an error, took too long, or died.
        """
        process = self._process
        if process is None or process.stdin is None:
            raise PlayerFailed(f"{self.side} is not running")
        try:
            process.stdin.write(json.dumps({"do": what, **details}) + "\n")
            process.stdin.flush()
            line = self._answers.get(timeout=self.timeout_s)
            answer = json.loads(line) if line else None
        except (OSError, ValueError):
            answer = None
        except queue.Empty:
            process.kill()
            self.stop()
            raise PlayerFailed(f"{self.side} did not answer {what!r} within {self.timeout_s:.0f} s") from None
        if answer is None:
            raise PlayerFailed(f"{self.side} ended: {self._last_words()}")
        if "error" in answer:
            raise PlayerFailed(answer["error"], bool(answer.get("unsupported")))
        return answer

    def settle(self, at_most_s: float = 0.5) -> None:
        """Wait until the process is idle: threads that spin after their work would take the other side's processor."""
        if self._process is None or self._process.poll() is not None:
            return
        seen = psutil.Process(self._process.pid)
        end_s = time.perf_counter() + at_most_s
        while time.perf_counter() < end_s:
            before, start = seen.cpu_times(), time.perf_counter()
            time.sleep(0.02)
            after, took_s = seen.cpu_times(), time.perf_counter() - start
            if after.user + after.system - before.user - before.system <= 0.1 * took_s:
                return

    def stop(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is None:
            return
        if process.stdin is not None:
            with contextlib.suppress(OSError):  # it has died with a request unread
                process.stdin.close()
        try:
            process.wait(timeout=2)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()
        self._errors.close()

    def _last_words(self) -> str:
        process = self._process
        if process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=5)
        self._errors.seek(0)
        lines = [line for line in self._errors.read().splitlines() if line.strip()]
        code = None if process is None else process.returncode
        self.stop()
        return f"{lines[-1].strip()} (exit code {code})" if lines else f"exit code {code}"


def _pump(stream: Any, answers: queue.Queue[str]) -> None:
    """Hand over lines as they come; an empty one at the end."""
    try:
        for line in stream:
            answers.put(line)
    except (OSError, ValueError):
        pass  # closed while it was read
    answers.put("")
