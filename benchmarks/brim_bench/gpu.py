"""All measurements of a GPU in one go, within a given time, kept as JSON.

    python -m brim_bench.gpu [--minutes 10] [--device cuda] [--vs torch,torch_compile,torch_graphs] [--tiny]

The same as ``brim bench gpu``. The most important workloads come first; what there is no time or no memory for is
listed in the document. ``--tiny`` rehearses it with small sizes on any device; its figures mean nothing, and it keeps
no file unless it is told to.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path

from brim.device import device as find_device
from brim.errors import BrimError
from brim_bench import command
from brim_bench.contest import Options
from brim_bench.environment import processors
from brim_bench.schedule import Budget

__all__ = ["PEERS", "ROUNDS", "SECONDS", "main", "results_path", "run_all"]

PEERS = ("torch", "torch_compile", "torch_graphs")
ROUNDS, SECONDS = 5, 0.15
"""Of each side; a device's clock needs shorter rounds than the host's."""

_LIMITS_S = 40.0  # what the limits take, before and after


def results_path(folder: Path, title: str, today: date) -> Path:
    """Where a run is kept: ``YYYY-MM-DD-bench-NAME-OF-THE-CARD.json``; another of the same day gets a number."""
    name = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") or "gpu"
    for number in range(1, 1000):
        path = folder / f"{today.isoformat()}-bench-{name}{f'-{number}' if number > 1 else ''}.json"
        if not path.exists():
            return path
    raise ValueError(f"{folder}: there are 999 runs of today")


def run_all(
    minutes: float,
    place: str = "cuda",
    vs: Sequence[str] = PEERS,
    names: Sequence[str] = (),
    json_path: Path | None = None,
    html_path: Path | None = None,
    tiny: bool = False,
    threads: int | None = None,
) -> int:
    """Measure and write; returns the exit code of ``brim bench run``.

    Arguments:
        minutes: for everything.
        place: the device.
        vs: peers; those that are not installed, or without CUDA, are named and left out.
        names: workloads or patterns; without, all that are meant for a GPU.
        json_path: of the document; the folder ``benchmarks/results`` of a checkout, if this is one, or here.
        html_path: of a page.
        tiny: the sizes of a rehearsal.
        threads: of each side on the host; all processors.

    Raises:
        ValueError: no such device here, or figures out of range.
    """
    try:
        found = find_device(place)
        title = found.backend.describe(found.index).partition(",")[0]
    except BrimError as error:
        raise ValueError(f"nothing was measured: {error}") from error
    budget = Budget(minutes * 60 - (0.0 if tiny else _LIMITS_S))
    if json_path is None and not tiny:
        folder = Path(__file__).resolve().parents[1] / "results"
        json_path = results_path(folder if folder.is_dir() else Path.cwd(), title, date.today())
    count = processors() if threads is None else threads
    seconds, rounds = (0.002, 3) if tiny else (SECONDS, ROUNDS)
    options = Options(place, count, rounds, seconds, tiny=tiny)
    if tiny:  # on whatever machine: that everything runs is what matters
        options = replace(options, max_spread=1e9, max_others=1.0)
    return command.run(names or ("gpu_*",), vs, options, json_path, html_path, budget)


def main(arguments: Sequence[str] | None = None) -> int:
    """The script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="workloads, or patterns such as 'gpu_gemm_*'; all without")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--vs", default=",".join(PEERS))
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--html", type=Path)
    parser.add_argument("--tiny", action="store_true", help="rehearse with small sizes")
    given = parser.parse_args(arguments)
    vs = [one.strip() for one in given.vs.split(",") if one.strip()]
    try:
        return run_all(
            given.minutes, given.device, vs, given.names, given.json, given.html, given.tiny, given.threads
        )  # fmt: skip
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
