"""brim bench: rounds against fake peers, verdicts, the same work on all sides, limits, the command."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

import brim
from bench_documents import LIMITS, row
from brim.cli import main
from brim_bench import command, limits, results, stats, text_report
from brim_bench.caches import read_caches
from brim_bench.contest import Options, run_workload
from brim_bench.digest import difference, digest, disagreements
from brim_bench.environment import cpu_name
from brim_bench.load import OtherLoad
from brim_bench.players import Player, PlayerFailed
from brim_bench.sides import SIDES, find_side, missing
from brim_bench.sides.brim_side import Brim
from brim_bench.timing import time_round
from brim_bench.workload import Job, Workload, select
from brim_bench.workloads import WORKLOADS
from second_device import KIND, add_second_device

GEMM = next(one for one in WORKLOADS if one.name == "gemm_128x784x256")
QUICK = Options(rounds=3, seconds=0.01, max_spread=1e9, max_others=1.0)


@pytest.fixture(autouse=True)
def _children_find_the_fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))


@pytest.fixture
def _own_threads() -> Iterator[None]:
    """Sides in this process set its threads; tests after this one get them back."""
    before = brim.get_threads()
    yield
    brim.set_threads(before)


def row_of(peer: str, options: Options = QUICK, workload: Workload = GEMM) -> dict[str, Any]:
    """The row of a workload on brim and one fake peer."""
    with Player("brim") as ours, Player(f"fake_peers:{peer}") as theirs:
        return run_workload(workload, [ours, theirs], options)


# ---- a comparison ----


def test_a_right_peer_gets_a_ratio_from_pairs_of_rounds() -> None:
    row = row_of("Quick")
    assert (row["status"], row["why"]) == ("ok", "")
    ours, theirs, ratio = row["sides"]["brim"], row["sides"]["fake_peers:Quick"], row["ratios"]["fake_peers:Quick"]
    pairs = [a / b for a, b in zip(ours["samples"], theirs["samples"], strict=True)]
    assert len(pairs) == 3
    assert ratio["median"] == pytest.approx(sorted(pairs)[1])
    assert ratio["q25"] <= ratio["median"] <= ratio["q75"]
    assert 0 < theirs["differences"]["product"] < 1e-4  # two libraries, not the same numbers twice
    assert ours["memory"]["planned_peak_bytes"] > GEMM.nbytes / 3
    assert ours["memory"]["allocations_per_run"] == 0
    assert ours["first_s"] > 0
    assert row["best_peer"] == "fake_peers:Quick"


def test_a_wrong_result_is_no_result() -> None:
    row = row_of("Wrong")
    assert row["status"] == "wrong result"
    assert "product differ by 2" in row["why"]
    assert "median" not in row["ratios"]["fake_peers:Wrong"]
    assert row["sides"]["fake_peers:Wrong"]["samples"] == []  # it is not even timed
    assert row["sides"]["brim"]["status"] == "ok"


def test_a_noisy_row_has_no_ratio_after_twice_the_rounds() -> None:
    row = row_of("Noisy", Options(rounds=4, seconds=0.03, max_spread=0.5, max_others=1.0))
    assert row["status"] == "too noisy"
    ratio = row["ratios"]["fake_peers:Noisy"]
    assert "median" not in ratio
    assert row["best_peer"] is None
    assert ratio["rounds"] == 8
    assert "the middle half of 8 ratios spans" in row["why"]
    assert "too noisy" in text_report.row_line(row)


def test_a_busy_machine_is_no_place_to_measure() -> None:
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        row = row_of("Quick", Options(rounds=3, seconds=0.05, max_spread=1e9, max_others=0.01))
        ratio = row["ratios"]["fake_peers:Quick"]
    finally:
        busy.kill()
        busy.wait()
    assert row["others_share"] > 0.1 / (psutil.cpu_count() or 1)
    assert (row["status"], ratio["status"]) == ("too noisy", "too noisy")
    assert "other processes used" in row["why"]
    assert "median" not in ratio


def test_own_work_is_not_that_of_others() -> None:
    load, start = OtherLoad([]), time.process_time()
    while time.process_time() - start < 0.2:
        pass
    subprocess.run([sys.executable, "-c", "sum(range(3_000_000))"], check=True)  # a child that has ended is ours
    ours = load._our_seconds() - load._ours_s
    assert ours > 0.19
    assert 0 <= load.share() <= 1


def test_a_side_that_dies_is_a_failure_with_its_last_words() -> None:
    row = row_of("Dying", Options(rounds=3, seconds=0.03))
    assert row["status"] == "failed"
    assert "cannot go on (exit code 7)" in row["why"]


def test_a_side_that_never_answers_is_given_up() -> None:
    with Player("fake_peers:Silent", timeout_s=1.0) as silent, pytest.raises(PlayerFailed, match="did not answer"):
        silent.start()


def test_a_workload_that_a_peer_does_not_have_is_no_failure() -> None:
    row = row_of("Quick", workload=next(one for one in WORKLOADS if one.name == "eltwise_l2"))
    assert row["status"] == "ok"
    assert row["ratios"]["fake_peers:Quick"]["status"] == "not supported"


def test_processes_are_timed_whole() -> None:
    with Player("brim") as ours, Player("fake_peers:Quick") as theirs:
        row = run_workload(next(w for w in WORKLOADS if w.name == "proc_import"), [ours, theirs], QUICK)
    assert row["status"] == "ok"
    assert row["ratios"]["fake_peers:Quick"]["median"] > 1  # brim imports NumPy, too


def test_a_child_of_a_peer_loads_nothing_of_brim() -> None:
    code = "import sys, brim_bench.child; print([m for m in ('brim', 'torch', 'brim_cpu') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_short_runs_are_timed_together() -> None:
    runs = 0

    def run() -> None:
        nonlocal runs
        runs += 1

    times, counted = time_round(Job(run, dict), lambda: None, seconds=0.01, shortest_s=1e-3)
    assert counted == runs - 1  # the first is not timed
    assert counted >= 10 * len(times)
    assert all(0 < one < 1e-3 for one in times)
    times, counted = time_round(Job(lambda: time.sleep(0.02), dict), lambda: None, seconds=0.01, shortest_s=1e-3)
    assert (len(times), counted) == (1, 1)  # a run that takes longer than a round is the round
    assert times[0] >= 0.02


# ---- figures ----


def test_medians_and_quartiles() -> None:
    found = stats.summarise([1.0, 2.0, 3.0, 4.0, 100.0])
    assert (found.median, found.q25, found.q75, found.spread) == (3.0, 2.0, 4.0, pytest.approx(2 / 3))
    assert found.noisy(0.6)
    assert not found.noisy(0.7)
    assert stats.summarise([1.0, 1.0]).noisy(10)  # two rounds are too few
    assert stats.paired_ratio([2.0, 20.0, 2.0], [1.0, 10.0, 1.0]).spread == 0  # what slows both sides cancels
    with pytest.raises(ValueError, match="in pairs"):
        stats.paired_ratio([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="no rounds"):
        stats.summarise([])


def test_digests_find_what_differs() -> None:
    x = np.random.default_rng(0).standard_normal((300, 100))
    same, off = digest(x), digest(x * (1 + 1e-3))
    assert difference(same, digest(x.copy())) == 0
    assert difference(same, off) == pytest.approx(1e-3, rel=0.01)
    hole = x.copy()
    hole[:150] = 0  # wherever the sample lies, the norm tells
    assert difference(same, digest(hole)) > 0.2
    assert difference(same, digest(x.T)) == math.inf
    assert disagreements({"a": same}, {"a": off}, {"a": 1e-2}) == ({"a": pytest.approx(1e-3, rel=0.01)}, [])
    assert "differ by 1.0e-03" in disagreements({"a": same}, {"a": off}, {"a": 1e-4})[1][0]
    assert disagreements({"a": same}, {}, {"a": 1.0})[1] == ["only one side has the result 'a'"]
    assert disagreements({}, {}, {})[1] == ["there is no result to compare"]


def test_selecting_workloads() -> None:
    assert [one.name for one in select(WORKLOADS, ["mlp_step_*", "gemm_1024"])] == [
        "gemm_1024", "mlp_step_b32", "mlp_step_b128", "mlp_step_b1024",
    ]  # fmt: skip
    assert select(WORKLOADS, []) == list(WORKLOADS)
    with pytest.raises(ValueError, match="no workload is called 'nonsense'"):
        select(WORKLOADS, ["nonsense"])
    assert len({one.name for one in WORKLOADS}) == len(WORKLOADS) >= 30
    for one in WORKLOADS:
        assert one.process or (one.build and one.tolerances and (one.flops or one.nbytes)), one.name


def test_sides_by_name() -> None:
    assert find_side("brim") is Brim
    assert missing("fake_peers:Quick") == ""
    assert missing("no_such_library:Peer") == "no_such_library is not installed"
    for call in (missing, find_side):
        with pytest.raises(ValueError, match="no peer is called 'other'; there are brim, jax"):
            call("other")
    with pytest.raises(ValueError, match="expected a subclass"):
        find_side("fake_peers:Job")


# ---- workloads are the same on both sides ----

SMALL = ["eltwise_l2", "xent_256x1000", "conv_64x1x28_32", "adamw_235k", "mlp_step_b32", "lm_step_b32", "mlp_infer_b1"]


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="PyTorch not installed")
@pytest.mark.parametrize("name", SMALL)
@pytest.mark.usefixtures("_own_threads")
def test_brim_and_torch_compute_the_same(name: str) -> None:
    import torch

    threads = torch.get_num_threads()
    try:
        workload = next(one for one in WORKLOADS if one.name == name)
        ours, theirs = (
            {key: digest(value) for key, value in find_side(side)("cpu", 1).build(workload, True).results().items()}
            for side in ("brim", "torch_fused")
        )
    finally:
        torch.set_num_threads(threads)
    found, wrong = disagreements(ours, theirs, workload.tolerances)
    assert wrong == []
    assert set(found) == set(workload.tolerances)


# Peers whose networks are functions: what they share is written once, so few workloads tell.
FUNCTIONAL = ["conv_64x1x28_32", "adamw_235k", "mlp_step_b32", "mlp_infer_b1"]


@pytest.mark.parametrize("name", FUNCTIONAL)
@pytest.mark.parametrize("peer", ["jax", "mlx", "tinygrad"])
@pytest.mark.usefixtures("_own_threads")
def test_brim_and_functional_peers_compute_the_same(peer: str, name: str) -> None:
    if why := missing(peer):
        pytest.skip(why)
    workload = next(one for one in WORKLOADS if one.name == name)
    ours, theirs = (
        {key: digest(value) for key, value in find_side(side)("cpu", 1).build(workload, True).results().items()}
        for side in ("brim", peer)
    )
    found, wrong = disagreements(ours, theirs, workload.tolerances)
    assert wrong == []
    assert set(found) == set(workload.tolerances)


@pytest.mark.parametrize("peer", ["jax", "mlx", "tinygrad"])
def test_peers_that_are_not_installed_are_named_without_importing_them(peer: str) -> None:
    package = peer
    assert missing(peer) in ("", f"{package} is not installed")
    if missing(peer):
        with pytest.raises(ImportError):
            find_side(peer)


@pytest.mark.usefixtures("_own_threads")
def test_eager_and_compiled_steps_agree() -> None:
    workload = next(one for one in WORKLOADS if one.name == "mlp_step_b32")
    jobs = [Brim("cpu", 1, eager).build(workload, True) for eager in (False, True)]
    assert [len(job.compiled) for job in jobs] == [1, 0]
    first, second = (job.results() for job in jobs)
    np.testing.assert_allclose(first["losses"], second["losses"], rtol=1e-6)
    assert first["losses"][0] > first["losses"][-1] > 0  # it learns


# ---- limits ----


def test_limits_of_the_cpu_are_plausible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "_SIZES", (256,))
    found = limits.measure("cpu", 1, 0.01)
    assert found["flops_per_s"] > 1e8
    assert [one["level"] for one in found["memory"]][-1] == "memory"
    assert all(one["bytes_per_s"] > 1e7 for one in found["memory"])
    assert found["memory"][-1]["holds_bytes"] is None
    assert 0 < found["fault_bytes_per_s"] < 1e12
    json.dumps(found)
    text = text_report.limits_text(found)
    assert "FLOP/s" in text
    assert "page faults" in text


def test_limits_of_another_device_are_measured_by_brim(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "_LONGEST_S", 0.0)  # the smallest sizes are enough
    add_second_device(monkeypatch)
    found = limits.measure(KIND, 1, 0.001)
    assert set(found["product_rates"]) == {"float32", "tf32", "bfloat16"}
    assert found["flops_per_s"] == found["product_rates"]["float32"] > 0
    assert found["memory"][0]["bytes_per_s"] > 0


def test_the_steady_rate_is_that_of_the_faster_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "STEADY_S", 0.01)
    monkeypatch.setattr(limits, "_LONGEST_S", 1e-6)  # the smallest size will do
    steady = limits._steady_rate

    def rates(numpys: float) -> dict[str, Any]:
        monkeypatch.setattr(limits, "_steady_rate", lambda m: numpys if m is limits._by_numpy else steady(m))
        (found,) = limits.steady_rates("cpu")
        return found

    slow, fast = rates(1.0), rates(1e15)
    assert slow["how"].startswith("brim's matrix products on this machine, median over a second; NumPy's 0 GFLOP/s")
    assert 1.0 < slow["flops_per_s"] < 1e15
    assert fast["how"].startswith("NumPy's matrix products on this machine, median over a second; brim's ")
    assert fast["flops_per_s"] == 1e15


def test_the_least_time_of_a_workload() -> None:
    def least(flops: float, nbytes: float) -> tuple[float, str]:
        return limits.least_seconds(Workload("x", "", "x", flops=flops, nbytes=nbytes), LIMITS)

    assert least(1e11, 1e6) == (1.0, "arithmetic")
    assert least(1e5, 1e6) == (pytest.approx(1e-5), "L2 bandwidth")
    assert least(1e6, 1e10) == (pytest.approx(1.0), "memory bandwidth")
    assert least(0, 0) == (0.0, "")


def test_the_better_of_two_measurements() -> None:
    slower = json.loads(json.dumps(LIMITS))
    slower["flops_per_s"] /= 2
    slower["memory"][1]["bytes_per_s"] *= 3
    faster = {"flops_by_threads": {"1": 5e10, "2": 1e11}, "blas_flops_per_s": 8e10}
    slower |= {"flops_by_threads": {"1": 6e10, "2": 9e10}, "blas_flops_per_s": 7e10}
    best = limits.best_of(LIMITS | faster, slower)
    assert best["flops_per_s"] == LIMITS["flops_per_s"]
    assert best["flops_by_threads"] == {"1": 6e10, "2": 1e11}
    assert best["blas_flops_per_s"] == 8e10
    assert [one["bytes_per_s"] for one in best["memory"]] == [1e11, 3e10]
    assert limits.best_of(slower, LIMITS | faster) == best


def test_cache_sizes(tmp_path: Path) -> None:
    for n, (level, kind, size) in enumerate([(1, "Data", "48K"), (1, "Instruction", "32K"), (2, "Unified", "2M")]):
        folder = tmp_path / f"index{n}"
        folder.mkdir()
        for name, text in (("level", str(level)), ("type", kind), ("size", size)):
            (folder / name).write_text(text + "\n")
    assert read_caches(tmp_path) == ({1: 48 * 2**10, 2: 2 * 2**20}, True)
    assert read_caches(tmp_path / "nowhere")[1] is False


# ---- the command ----


def test_an_interrupted_run_reports_what_is_finished(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def made(workload: Workload, *_: Any) -> dict[str, Any]:
        if workload.name == "gemm_2048":
            raise KeyboardInterrupt
        return row(workload.name, [0.02] * 3, [0.03] * 3)

    monkeypatch.setattr(command, "measure_in_process", lambda *args, **kwargs: LIMITS)
    monkeypatch.setattr(command, "Player", StillPlayer)
    monkeypatch.setattr(command, "run_workload", made)
    path = tmp_path / "run.json"
    assert main(["bench", "run", "gemm_*", "--vs", "fake_peers:Quick", "--json", str(path)]) == 130
    assert [one["workload"] for one in results.read_document(path)["rows"]] == ["gemm_1024"]
    assert "what is finished is reported" in capsys.readouterr().out


def test_the_command_runs_compares_and_writes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "measure_in_process", lambda *args, **kwargs: LIMITS)
    json_path, html_path = tmp_path / "run.json", tmp_path / "run.html"
    code = main(
        ["bench", "run", "gemm_128*", "--vs", "fake_peers:Quick,no_such_library:Peer", "--threads", "1", "--rounds",
         "3", "--seconds", "0.01", "--max-spread", "1e9", "--max-others", "1", "--json", str(json_path),
         "--html", str(html_path)]
    )  # fmt: skip
    printed = capsys.readouterr().out
    assert code == 0, printed
    assert "no_such_library is not installed; left out" in printed
    found = results.read_document(json_path)
    assert [one["workload"] for one in found["rows"]] == ["gemm_128x784x256"]
    assert found["sides"]["brim"]["version"] == brim.__version__
    assert found["options"]["absent"] == {"no_such_library:Peer": "no_such_library is not installed"}
    assert html_path.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert main(["bench", "compare", str(json_path), str(json_path)]) == 0


class StillPlayer:
    """A side without a process."""

    def __init__(self, side: str, *_: Any, **__: Any) -> None:
        self.side = side

    def start(self) -> dict[str, Any]:
        return {"version": "1.0", "threads": 1, "facts": {}}

    def stop(self) -> None:
        pass

    def ask(self, what: str, **details: Any) -> dict[str, Any]:
        return {"times": [0.1, 0.1, 5.0]} if what == "round" else {}

    def __enter__(self) -> StillPlayer:
        return self

    def __exit__(self, *_: Any) -> None:
        pass


@pytest.mark.parametrize(
    ("statuses", "code"),
    [
        (["ok", "ok"], 0), (["ok", "too noisy"], 4), (["wrong result", "too noisy"], 1), (["failed", "ok"], 1),
        (["not supported", "ok"], 0), (["not supported", "not supported"], 1),
    ],
)  # fmt: skip
def test_exit_codes(statuses: list[str], code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    left = list(statuses)

    def made(workload: Workload, *_: Any) -> dict[str, Any]:
        found = row(workload.name, [0.02] * 3, [0.03] * 3, status=left.pop(0))
        if found["status"] != "ok":
            found["ratios"]["torch"] = {"status": found["status"], "why": "it was"}
        return found

    monkeypatch.setattr(command, "measure_in_process", lambda *args, **kwargs: LIMITS)
    monkeypatch.setattr(command, "Player", StillPlayer)
    monkeypatch.setattr(command, "run_workload", made)
    assert main(["bench", "run", "gemm_1024", "gemm_2048", "--vs", "fake_peers:Quick", "--threads", "1"]) == code
    assert left == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "nonsense"], "no workload is called 'nonsense'"),
        (["run", "--vs", "other"], "no peer is called 'other'"),
        (["run", "--vs", "brim"], "name its peers"),
        (["run", "--rounds", "2"], "--rounds"),
        (["run", "--threads", "0"], "--threads"),
        (["run", "--seconds", "0"], "--seconds"),
        (["run", "--max-others", "2"], "--max-others"),
        (["run", "--json", "no/such/folder.json"], "there is no folder"),
        (["machinery", "--params", "1e9"], "--tokens go together"),
        (["machinery", "--mfu", "2"], "--mfu"),
    ],
)
def test_bad_flags_are_refused_before_anything_runs(
    arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def never(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("something was measured")

    monkeypatch.setattr(command, "measure_in_process", never)
    assert main(["bench", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_list_machinery_and_limits(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def measured(device: str, threads: int, seconds: float, rates: bool = False) -> Any:
        return [{"dtype": "float32", "flops_per_s": 1e11, "how": "brim's"}] if rates else LIMITS

    monkeypatch.setattr(command, "measure_in_process", measured)
    monkeypatch.setattr(command, "usable_devices", lambda: ["cpu"])
    monkeypatch.setattr(command, "Player", StillPlayer)
    assert main(["bench", "list"]) == 0
    printed = capsys.readouterr().out
    assert all(one.name in printed for one in WORKLOADS)
    assert all(f"peer {name}" in printed for name in SIDES if name != "brim")
    assert main(["bench", "limits"]) == 0
    assert "100 GFLOP/s" in capsys.readouterr().out
    paths = [tmp_path / "m.json", tmp_path / "m.html"]
    assert main(["bench", "machinery", "--json", str(paths[0]), "--html", str(paths[1])]) == 0
    assert "12 million years" in capsys.readouterr().out
    made = json.loads(paths[0].read_text(encoding="utf-8"))
    assert made["schema"] == "brim-bench-machinery/1"
    products, training = (one["flops_per_s"] for one in made["rows"][:2])
    lm_step = next(one for one in WORKLOADS if one.name == "lm_step_b32")
    assert (products, training) == (1e11, pytest.approx(lm_step.flops / 0.1))
    assert "How long would Llama 3 405B take?" in paths[1].read_text(encoding="utf-8")


def test_the_processor_has_a_name(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: Some CPU\n")
    assert cpu_name(tmp_path / "cpuinfo") == "Some CPU"
    assert cpu_name(tmp_path / "none")
