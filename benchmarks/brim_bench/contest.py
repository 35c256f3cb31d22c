"""A comparison: every workload on brim and its peers, in alternating rounds, as rows for the report.

A row says "ok", or why there is no figure: "too noisy", "wrong result", "failed". Ratios come from pairs of rounds.
"""

from __future__ import annotations

import contextlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from brim_bench.digest import disagreements
from brim_bench.load import OtherLoad
from brim_bench.players import Player, PlayerFailed, environment_with_threads
from brim_bench.stats import MAX_SPREAD, MIN_ROUNDS, paired_ratio, summarise
from brim_bench.workload import Workload

__all__ = ["FAILED", "NOISY", "OK", "UNSUPPORTED", "WRONG", "Options", "run_workload"]

OK, NOISY, WRONG, FAILED, UNSUPPORTED = "ok", "too noisy", "wrong result", "failed", "not supported"

_LONGEST_S = 90.0  # of one workload, once there are five rounds of it


@dataclass(frozen=True)
class Options:
    """How to measure.

    Attributes:
        device: where all sides run.
        threads: for each side.
        rounds: of each side; as many again where the spread is too wide.
        seconds: of one round of one side.
        max_spread: of what is reported, as a share of the median.
        max_others: of the processors that other processes may use meanwhile: they need not slow both sides alike.
        eager: brim without ``brim.compile``.
        tiny: workloads have the sizes of a rehearsal, whose figures mean nothing.
    """

    device: str = "cpu"
    threads: int = 1
    rounds: int = 7
    seconds: float = 0.3
    max_spread: float = MAX_SPREAD
    max_others: float = 0.25
    eager: bool = False
    tiny: bool = False


def run_workload(
    workload: Workload,
    players: Sequence[Player],
    options: Options,
    say: Callable[[str], None] = lambda text: None,
    together: bool = True,
) -> dict[str, Any]:
    """The row of a workload.

    Arguments:
        workload: what to run.
        players: brim first, then its peers; started here where they do not run.
        options: how.
        say: is told what happens now.
        together: all sides hold their arrays at once, and rounds alternate. Otherwise each side has the device for
            itself: in an order such as A, B, B, A, for half of its rounds each time, and gives its memory back.
    """
    start_s = time.perf_counter()
    row: dict[str, Any] = {
        "workload": workload.name, "what": workload.what, "unit": workload.unit, "flops": workload.flops,
        "bytes": workload.nbytes, "precision": workload.precision, "status": OK, "why": "", "sides": {}, "ratios": {},
    }  # fmt: skip
    for player in players:
        row["sides"][player.side] = {"status": OK, "why": "", "samples": []}
    samples: dict[str, list[float]] = {player.side: [] for player in players}
    if together:
        _rounds_together(workload, players, options, row, samples, say, start_s)
    else:
        row["in_turns"] = True
        _rounds_in_turns(workload, players, options, row, samples, say)
    _judge(row, samples, players, options)
    row["elapsed_s"] = time.perf_counter() - start_s
    return row


def _rounds_together(
    workload: Workload, players: Sequence[Player], options: Options, row: dict[str, Any],
    samples: dict[str, list[float]], say: Callable[[str], None], start_s: float,
) -> None:  # fmt: skip
    """Fill ``samples`` with alternating rounds of all sides that can."""
    sides, ready = row["sides"], list(players)
    if not workload.process:
        ready = _prepare(workload, players, options, row, say)
    measure = _measure_process if workload.process else _measure_round
    wanted = _process_rounds(workload, options) if workload.process else options.rounds
    done = 0
    others = OtherLoad(player.pid for player in players if player.pid is not None)
    while ready and done < wanted:
        say(f"{workload.name}: round {done + 1} of {wanted}")
        # Who begins changes from round to round: what a side leaves behind (heat, spinning threads) meets each.
        order, found = (ready if done % 2 == 0 else ready[::-1]), {}
        for player in order:
            try:
                found[player.side] = measure(player, workload, options)
                _note_state(players[0], row, options)
            except PlayerFailed as error:
                _fail(sides[player.side], error)
                ready = [] if player is players[0] else [one for one in ready if one is not player]
                break
        if len(found) < len(order):
            continue  # an unfinished round has no pairs
        for name, value in found.items():
            samples[name].append(value)
        done += 1
        long = time.perf_counter() - start_s > _LONGEST_S and done >= 5
        if long:
            break
        if done == wanted == options.rounds and _any_noise([samples[one.side] for one in ready], options):
            wanted *= 2
    row["others_share"] = others.share()
    for player in ready:
        if not workload.process:
            _ask_memory(player, sides[player.side])


def _rounds_in_turns(
    workload: Workload, players: Sequence[Player], options: Options, row: dict[str, Any],
    samples: dict[str, list[float]], say: Callable[[str], None],
) -> None:  # fmt: skip
    """Fill ``samples``, with one side on the device at a time."""
    sides, half = row["sides"], -(-options.rounds // 2)
    others = OtherLoad(player.pid for player in players if player.pid is not None)
    ours: Mapping[str, Any] | None = None
    left = list(players)
    for turn in range(2):
        for player in left if turn == 0 else left[::-1]:
            side = sides[player.side]
            try:
                say(f"{workload.name}: {player.side} alone, turn {turn + 1} of 2")
                player.start()
                results = _build(player, workload, options, ours, side, compare=turn == 0)
                if side["status"] == OK:
                    for _ in range(half):
                        samples[player.side].append(_measure_round(player, workload, options))
                        _note_state(players[0], row, options)
                    side["memory"] = player.ask("memory")["memory"]
                player.ask("drop")
                ours = results if player is players[0] and turn == 0 else ours
            except PlayerFailed as error:
                _fail(side, error)
                samples[player.side] = []
            if side["status"] != OK and player is players[0]:
                row["others_share"] = others.share()
                return
        left = [player for player in left if sides[player.side]["status"] == OK]
    row["others_share"] = others.share()


def _note_state(player: Player, row: dict[str, Any], options: Options) -> None:
    """Keep the lowest and the highest of what brim's side reads of the device, right after a round."""
    if options.device.partition(":")[0] == "cpu":
        return
    with contextlib.suppress(PlayerFailed):  # its own next round tells
        for name, value in player.ask("state").get("state", {}).items():
            low, high = row.setdefault("device_state", {}).get(name, (value, value))
            row["device_state"][name] = [min(low, value), max(high, value)]


# ---- before the rounds ----


def _prepare(
    workload: Workload, players: Sequence[Player], options: Options, row: dict[str, Any], say: Callable[[str], None]
) -> list[Player]:
    """Start, compare results, build and warm up; the players that may be timed (none if brim cannot)."""
    sides, ours = row["sides"], None
    ready: list[Player] = []
    for player in players:
        side = sides[player.side]
        try:
            say(f"{workload.name}: {player.side} is started")
            player.start()
            say(f"{workload.name}: {player.side} is compared and warms up")
            results = _build(player, workload, options, ours, side, compare=True)
            ours = results if ours is None else ours
        except PlayerFailed as error:
            _fail(side, error)
            if player is players[0]:
                return []
        if side["status"] == OK:
            ready.append(player)
        else:  # what it has built must not take memory that the others need
            with contextlib.suppress(PlayerFailed):
                player.ask("drop")
    return ready


def _build(
    player: Player, workload: Workload, options: Options, ours: Mapping[str, Any] | None, side: dict[str, Any],
    compare: bool,
) -> Mapping[str, Any]:  # fmt: skip
    """Have the workload ready on a side; with ``compare`` only if its results, which are returned, agree with ours."""
    results: Mapping[str, Any] = {}
    if compare:
        results = player.ask("check", workload=workload.name)["results"]
        if ours is not None:
            found, wrong = disagreements(ours, results, workload.tolerances)
            side["differences"] = found
            if wrong:
                side["status"], side["why"] = WRONG, "; ".join(wrong)
                return results
    answer = player.ask("build", workload=workload.name, warm_seconds=min(0.3, options.seconds))
    side.setdefault("first_s", answer["first_s"])
    return results


def _fail(side: dict[str, Any], error: PlayerFailed) -> None:
    side["status"], side["why"] = (UNSUPPORTED if error.unsupported else FAILED), str(error)


def _ask_memory(player: Player, side: dict[str, Any]) -> None:
    try:
        side["memory"] = player.ask("memory")["memory"]
        player.ask("drop")
    except PlayerFailed as error:
        _fail(side, error)


# ---- rounds ----


def _measure_round(player: Player, workload: Workload, options: Options) -> float:
    """Seconds of one run: the median within a round."""
    answer = player.ask("round", seconds=max(options.seconds, workload.seconds))
    player.settle()
    return statistics.median(answer["times"])


def _process_rounds(workload: Workload, options: Options) -> int:
    return max(MIN_ROUNDS, min(options.rounds, 5 if workload.process != "rss" else MIN_ROUNDS))


def _measure_process(player: Player, workload: Workload, options: Options) -> float:
    """Seconds, or bytes, of a process that does what the workload says and ends."""
    if workload.process == "import":
        command = [sys.executable, "-c", player.start()["import_code"]]
    else:
        command = [*player.command, "--once", workload.process]
    start = time.perf_counter()
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=player.timeout_s, check=False,
            env=environment_with_threads(options.threads),
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise PlayerFailed(f"{player.side} did not end within {player.timeout_s:.0f} s") from None
    elapsed_s = time.perf_counter() - start
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise PlayerFailed(lines[-1])
    return float(done.stdout.split()[-1]) if workload.unit == "B" else elapsed_s


# ---- verdicts ----


def _any_noise(samples: Sequence[list[float]], options: Options) -> bool:
    """Whether a ratio (or, alone, a time) is not good enough yet; brim's samples come first."""
    ours, *others = samples
    if not others:
        return summarise(ours).noisy(options.max_spread)
    return any(paired_ratio(ours, theirs).noisy(options.max_spread) for theirs in others)


def _judge(
    row: dict[str, Any], samples: Mapping[str, list[float]], players: Sequence[Player], options: Options
) -> None:
    """Fill in medians, spreads and ratios; say what the row is worth."""
    ours, sides = players[0].side, row["sides"]
    for name, side in sides.items():
        side["samples"] = samples.get(name, [])
        if side["samples"] and side["status"] == OK:
            side |= summarise(side["samples"]).as_dict()
    for player in players[1:]:
        side = sides[player.side]
        row["ratios"][player.side] = _ratio(sides[ours], side, row, options)
    able = [name for name, ratio in row["ratios"].items() if ratio["status"] != UNSUPPORTED]
    sure = able and all(row["ratios"][name]["status"] == OK for name in able)  # the noisy one may be the best
    row["best_peer"] = min(able, key=lambda name: sides[name]["median"]) if sure else None
    own = sides[ours]
    verdicts = [ratio["status"] for ratio in row["ratios"].values()]
    if own["status"] != OK:
        row["status"], row["why"] = own["status"], own["why"]
        return
    if not verdicts and (summarise(own["samples"]).noisy(options.max_spread) or _busy(row, options)):
        row["status"], row["why"] = NOISY, _busy(row, options)
    for status in (NOISY, FAILED, WRONG):  # the worst one is left
        if status in verdicts:
            row["status"] = status
            row["why"] = "; ".join(
                f"{name}: {ratio['why']}" for name, ratio in row["ratios"].items() if ratio["status"] == status
            )


def _busy(row: Mapping[str, Any], options: Options) -> str:
    """What other processes did to a time, or an empty string; sizes do not mind."""
    if row["unit"] != "s" or row["others_share"] <= options.max_others:
        return ""
    return f"other processes used {row['others_share']:.0%} of the processors meanwhile"


def _ratio(
    own: Mapping[str, Any], other: Mapping[str, Any], row: Mapping[str, Any], options: Options
) -> dict[str, Any]:
    """Ours over theirs, only where both are right and the spread allows it."""
    for side in (own, other):
        if side["status"] != OK:
            return {"status": side["status"], "why": side["why"]}
    found = paired_ratio(own["samples"], other["samples"])
    if found.noisy(options.max_spread):
        why = f"the middle half of {found.rounds} ratios spans {found.spread:.0%} of their median"
        if found.rounds < MIN_ROUNDS:
            why = f"{found.rounds} rounds are too few, {MIN_ROUNDS} are needed"
        return {"status": NOISY, "why": why, "spread": found.spread, "rounds": found.rounds}
    if why := _busy(row, options):
        return {"status": NOISY, "why": why, "spread": found.spread, "rounds": found.rounds}
    return {"status": OK, "why": "", **found.as_dict()}
