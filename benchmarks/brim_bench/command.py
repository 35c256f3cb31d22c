"""What the commands of ``brim bench`` do; their flags are in ``brim.cli.bench``."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil

from brim.device import available_backends, device
from brim.errors import BrimError
from brim.io.atomic import atomic_write
from brim.io.json_files import write_json
from brim_bench import environment, html_report, machinery, results, text_report
from brim_bench.contest import FAILED, NOISY, UNSUPPORTED, WRONG, Options, run_workload
from brim_bench.limits import best_of, measure_in_process
from brim_bench.measured_gpus import measured_gpus
from brim_bench.players import Player, PlayerFailed
from brim_bench.schedule import Budget, by_importance, room
from brim_bench.sides import COMPILERS, SIDES, missing
from brim_bench.workload import Workload, select
from brim_bench.workloads import EVERY, WORKLOADS, of_device

__all__ = [
    "EXIT_FAILED",
    "EXIT_INTERRUPTED",
    "EXIT_NOISY",
    "compare",
    "limits",
    "list_workloads",
    "machinery_table",
    "run",
    "usable_devices",
]

EXIT_FAILED, EXIT_NOISY, EXIT_INTERRUPTED = 1, 4, 130


def list_workloads(place: str = "cpu") -> int:
    """Print the workloads of a kind of device, and the peers."""
    body = [
        [one.name, f"{one.flops / 1e9:,.3f}" if one.flops else "-", f"{one.nbytes / 1e6:,.1f}" if one.nbytes else "-",
         one.what]
        for one in of_device(place)
    ]  # fmt: skip
    print(text_report.table(["workload", "GFLOP", "MB", "what"], body, left=(0, 3)))
    print("\nGFLOP, MB: the least arithmetic, and the least that must be read and written")
    for name in SIDES:
        if name != "brim":
            why = missing(name)
            print(f"peer {name}: {why or 'installed'}")
    return 0


def run(
    names: Sequence[str], vs: Sequence[str], options: Options, json_path: Path | None, html_path: Path | None,
    budget: Budget | None = None,
) -> int:  # fmt: skip
    """Measure, print the table, write the reports; returns the exit code.

    Without names it is the workloads whose sizes are meant for the device. With a budget the most important come first,
    and what there is no time for is left out.

    1 where a result was wrong or a side failed, 4 where a row was too noisy to report, 130 after Ctrl-C, else 0.

    Raises:
        ValueError: an unknown workload or peer, or figures out of range.
    """
    workloads = select(EVERY if names else of_device(options.device), names)
    _check_options(options)
    _check_paths(json_path, html_path)
    peers, absent = _peers(vs)
    say = _progress()
    recorded = environment.record(options.threads)
    say("limits of this machine")
    limits = measure_in_process(options.device, options.threads, min(0.3, options.seconds))
    players = [
        Player(name, options.device, options.threads, options.eager and name == "brim", tiny=options.tiny)
        for name in ("brim", *peers)
    ]
    sides: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    left_out: list[dict[str, str]] = []
    card: dict[str, Any] = {}
    try:
        for player in list(players):
            try:
                sides[player.side] = player.start()
            except PlayerFailed as error:
                if player.side == "brim":
                    raise ValueError(f"brim cannot run on {options.device}: {error}") from error
                absent[player.side] = str(error)
                print(f"{player.side}: {error}; left out")
                players.remove(player)
        if options.device.partition(":")[0] != "cpu":
            card = players[0].ask("card").get("card", {})
        for workload in workloads if budget is None else by_importance(workloads):
            sized = (options.tiny and workload.tiny) or workload
            row, why = _one_row(sized, players, options, card, budget, say)
            if row is None:
                left_out.append({"workload": workload.name, "why": why})
                print(f"{workload.name:<20} left out: {why}", flush=True)
                continue
            rows.append(row)
            say("")
            print(text_report.row_line(rows[-1]), flush=True)
    except KeyboardInterrupt:
        if not rows:
            raise
        say("")
        print("interrupted: what is finished is reported")
    finally:
        for player in players:
            player.stop()
    say("limits of this machine, again")
    limits = best_of(limits, measure_in_process(options.device, options.threads, min(0.3, options.seconds)))
    say("")
    order = [one.name for one in workloads]
    rows.sort(key=lambda row: order.index(row["workload"]))
    kept = asdict(options) | {"names": list(names), "vs": list(vs), "absent": absent}
    if budget is not None:
        kept["seconds_in_all"] = budget.seconds
    document = results.make_document(recorded, kept, sides, limits, rows, left_out, card)
    results.validate(document)
    print(f"\n{_heading(recorded, sides)}\n{text_report.limits_text(limits)}\n\n{text_report.run_text(document)}")
    _write(json_path, html_path, document, html_report.run_page)
    if len(rows) + len(left_out) < len(workloads):
        return EXIT_INTERRUPTED
    statuses = {row["status"] for row in rows}
    if statuses & {WRONG, FAILED} or statuses == {UNSUPPORTED}:
        return EXIT_FAILED
    return EXIT_NOISY if NOISY in statuses else 0


def _one_row(
    workload: Workload, players: Sequence[Player], options: Options, card: dict[str, Any], budget: Budget | None,
    say: Callable[[str], None],
) -> tuple[dict[str, Any] | None, str]:  # fmt: skip
    """The row of a workload; or None, and why it is left out."""
    together, why = room(workload, len(players), card)
    if why:
        return None, why
    extra: dict[str, Any] = {} if together else {"together": False}
    if budget is None:
        return run_workload(workload, players, options, say, **extra), ""
    planned_s = budget.plan_s(workload, [_compiles(one) for one in players], options.rounds, options.seconds)
    if why := budget.refusal(planned_s):
        return None, why
    for player in players:  # one that hangs must not eat the time of all others
        player.timeout_s = max(30.0, min(120.0, budget.left_s()))
    start_s = time.monotonic()
    row = run_workload(workload, players, options, say, **extra)
    budget.learn(planned_s, time.monotonic() - start_s)
    return row, ""


def _compiles(player: Player) -> bool:
    return player.side in COMPILERS


def _check_options(options: Options) -> None:
    if options.rounds < 3:
        raise ValueError(f"--rounds: expected 3 or more, got {options.rounds}")
    if not 0 <= options.max_others <= 1:
        raise ValueError(f"--max-others: expected a share of the processors, 0 to 1, got {options.max_others}")
    if not (options.seconds > 0 and options.max_spread > 0):
        raise ValueError(
            f"--seconds and --max-spread: expected more than 0, got {options.seconds}, {options.max_spread}"
        )
    if options.threads < 1:
        raise ValueError(f"--threads: expected 1 or more, got {options.threads}")


def _peers(vs: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """(the installed ones of these, why the others are not there)."""
    peers, absent = [], {}
    for name in dict.fromkeys(vs):
        if name == "brim":
            raise ValueError("--vs: brim is always there; name its peers")
        if why := missing(name):
            absent[name] = why
            print(f"{name}: {why}; left out")
        else:
            peers.append(name)
    return peers, absent


def limits(place: str, threads: int, seconds: float) -> int:
    """Measure and print what the machine can do at most."""
    recorded, found = environment.record(threads), measure_in_process(place, threads, seconds)
    print(_heading(recorded, {}))
    print(text_report.limits_text(found))
    return 0


def compare(before: Path, after: Path) -> int:
    """Print what changed between two runs; 1 where something became slower."""
    old, new = results.read_document(before), results.read_document(after)
    lines = results.compare(old, new)
    if not lines:
        print("no workload is in both files")
        return 0
    body = []
    for line in lines:
        unit = {"time": "s", "bytes": "B"}.get(line["basis"])
        show = [
            "-" if line[key] is None else text_report.figure(line[key], unit) if unit else f"{line[key]:.3f}"
            for key in ("before", "after")
        ]
        change = "-" if line["change"] is None else f"{line['change']:.2f}"
        body.append([line["workload"], line["basis"], *show, change, line["verdict"]])
    print(text_report.table(["workload", "basis", before.name, after.name, "change", "verdict"], body, left=(0, 1)))
    print("\nslower, faster: the middle halves of the rounds do not overlap, and the medians are more than 5 % apart")
    return EXIT_FAILED if any(line["verdict"] == "slower" for line in lines) else 0


def machinery_table(
    flops: float | None, parameters: float | None, tokens: float | None, gpus: int, utilisation: float, threads: int,
    devices: Sequence[str], json_path: Path | None, html_path: Path | None, results_path: Path | None = None,
) -> int:  # fmt: skip
    """Print how long a training would take on this machine, as measured now, and on other hardware.

    GPUs of which there are results of ``brim bench gpu`` are among them, with the rates measured then.

    The CPU is measured twice: by matrix products alone, and by whole training steps of a small transformer.
    """
    training = machinery.Training.of(flops, parameters, tokens)
    machinery.document(training, (), utilisation, gpus)  # refuses bad figures before anything is measured
    once = measured_gpus(results_path)
    _check_paths(json_path, html_path)
    say, recorded = _progress(), environment.record(threads)
    measured = []
    for place in devices:
        say(f"matrix products on {place}")
        try:
            rates = measure_in_process(place, threads, 0.5, rates=True)
        except ValueError as error:
            if place == "cpu":
                raise
            say("")
            print(f"{place}: {error}")
            continue
        if place == "cpu":
            name, memory = f"this CPU, {recorded['cpu']}, {threads} threads", float(psutil.virtual_memory().total)
        else:
            found = device(place)
            name = f"this machine's {found}, {found.backend.describe(found.index)}"
            memory = float(found.memory.sizes()[0])
        measured += [machinery.Measured(name, one["flops_per_s"], one["dtype"], memory, one["how"]) for one in rates]
        if place == "cpu":
            say("training steps on the cpu")
            how = "brim's training steps of a small transformer on this machine"
            measured.append(machinery.Measured(f"{name}, training", _training_rate(threads), "float32", memory, how))
    say("")
    measured += once
    document = machinery.document(training, measured, utilisation, gpus, recorded)
    print(text_report.machinery_text(document))
    _write(json_path, html_path, document, html_report.machinery_page)
    return 0


def _training_rate(threads: int) -> float:
    """FLOP/s of brim's training steps of the transformer among the workloads, counting products alone."""
    (workload,) = select(WORKLOADS, ["lm_step_b32"])
    with Player("brim", threads=threads) as player:
        player.start()
        player.ask("build", workload=workload.name, warm_seconds=0.3)
        times = player.ask("round", seconds=1.0)["times"]
    return workload.flops / statistics.median(times)


def usable_devices() -> list[str]:
    """The CPU, and another kind of device if one is usable here."""
    found = ["cpu"]
    for kind in sorted(available_backends()):
        if kind == "cpu":
            continue
        try:
            device(kind)
        except (BrimError, ImportError):
            continue
        found.append(kind)
    return found


def _heading(recorded: dict[str, Any], sides: dict[str, Any]) -> str:
    load = ", load " + " ".join(map(str, recorded["load_average"])) if recorded["load_average"] else ""
    text = f"{recorded['cpu']}, {recorded['processors']} processors, {recorded['threads']} threads{load}\n"
    text += f"{recorded['system']}, Python {recorded['python']}, NumPy {recorded['numpy']}"
    for name, facts in sides.items():
        text += f"\n{name} {facts['version']}, {facts['threads']} threads"
        text += "".join(f", {facts['facts'][key]}" for key in ("device", "native kernels") if key in facts["facts"])
    return text


def _check_paths(*paths: Path | None) -> None:
    for path in paths:
        if path is not None and not path.absolute().parent.is_dir():
            raise ValueError(f"{path}: there is no folder {path.absolute().parent}")
        if path is not None and path.is_dir():
            raise ValueError(f"{path}: expected the name of a file, this is a folder")


def _write(
    json_path: Path | None, html_path: Path | None, document: dict[str, Any], page: Callable[[dict[str, Any]], str]
) -> None:
    if json_path is not None:
        write_json(json_path, document)
        print(f"written   {json_path}")
    if html_path is not None:
        with atomic_write(html_path, "w") as file:
            file.write(page(document))
        print(f"written   {html_path}")


def _progress() -> Callable[[str], None]:
    """Shows what happens now on a terminal, in one line that is overwritten."""
    if not sys.stderr.isatty():
        return lambda text: None

    def say(text: str) -> None:
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)

    return say
