"""``brim bench gpu`` without a GPU: sides whose device is a clock that is told what a run takes, budgets, memory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import brim
import emulated
from bench_documents import LIMITS
from brim.cli import main
from brim.errors import DeviceError
from brim_bench import command, gpu, html_report, limits, measured_gpus, results, text_report
from brim_bench.child import _Server
from brim_bench.contest import Options, run_workload
from brim_bench.players import Player
from brim_bench.schedule import SHARE, Budget, by_importance, room
from brim_bench.sides.brim_side import Brim
from brim_bench.workload import Workload
from brim_bench.workloads import GPU_WORKLOADS
from clocked_sides import CARD, COMPILER, GPU_LIMITS, PEER, Clocked, InProcess, Slower
from second_device import KIND, SecondBackend, add_second_device


@pytest.fixture(autouse=True)
def _fakes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    threads, place = brim.get_threads(), brim.default_device()
    monkeypatch.setattr(InProcess, "asked", [])
    monkeypatch.setattr(command, "Player", InProcess)
    monkeypatch.setattr(command, "measure_in_process", lambda *args, **kwargs: GPU_LIMITS)
    backend = SimpleNamespace(describe=lambda index: "Some Card, 80.0 GiB, sm_90")
    monkeypatch.setattr(gpu, "find_device", lambda name: SimpleNamespace(backend=backend, index=0))
    yield
    brim.set_threads(threads)
    brim.set_float32_precision("full")
    brim.set_default_device(place)


def a_run(folder: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    """Exit code and document of a rehearsal with fake sides."""
    path = folder / "run.json"
    code = gpu.main([*arguments, "--tiny", "--threads", "1", "--json", str(path), "--html", str(folder / "run.html")])
    return code, results.read_document(path)


# ---- a whole run


def test_a_run_is_measured_by_the_device_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["gpu_mlp_b32", "gpu_ln_float32", "gpu_gemm_4096x4096x4096_bf16"]
    code, found = a_run(tmp_path, *names, "--vs", f"{PEER},{COMPILER},no_such_library:Peer")
    printed = capsys.readouterr().out
    assert code == 0, printed
    assert sorted(row["workload"] for row in found["rows"]) == sorted(names)
    assert found["card"] == CARD
    assert found["options"]["absent"] == {"no_such_library:Peer": "no_such_library is not installed"}
    for row in found["rows"]:
        assert row["status"] == "ok", row["why"]
        assert row["sides"]["brim"]["median"] == pytest.approx(1e-3)  # the device's time, not the host's
        assert row["ratios"][PEER]["median"] == pytest.approx(0.5)
        assert row["best_peer"] == PEER
        assert row["device_state"]["sm_clock_hz"] == [1.98e9, 1.98e9]
        assert row["sides"][PEER]["first_s"] > 0
        assert row["sides"][COMPILER]["status"] == "not supported"  # reported, not fatal
    gemm = next(row for row in found["rows"] if row["workload"].startswith("gpu_gemm"))
    assert gemm["limit"]["seconds"] == pytest.approx(max(gemm["flops"] / 8e14, gemm["bytes"] / 3e12))
    assert gemm["precision"] == "bf16"
    text, page = text_report.run_text(found), (tmp_path / "run.html").read_text(encoding="utf-8")
    for shown in (text, page):
        assert "a rehearsal with small sizes" in shown
        assert "clock 1,980 MHz" in shown
        assert "power 400 W" in shown
        assert "the compiler gave up" in shown
    assert "brim 3.0 MiB, planned" in text
    assert f"{PEER} 5.0 MiB (8.0 MiB)" in text
    assert "5.0 MiB (8.0 MiB)" in page
    assert "GPU-0f0e" in page
    assert "products, bfloat16" in page


def test_what_is_not_random_is_built_once(tmp_path: Path) -> None:
    a_run(tmp_path, "gpu_ln_float32", "--vs", PEER)
    asked = [what for side, what in InProcess.asked if side == PEER]
    assert [what for what in asked if what != "state"] == ["hello", "hello", "check", "build", *["round"] * 3,
                                                           "memory", "drop"]  # fmt: skip
    server = _Server(Clocked(), tiny=True)
    built: list[str] = []
    build = server.side.build
    server.side.build = lambda one, checking: built.append(one.name) or build(one, checking)  # type: ignore[method-assign, func-returns-value]
    for name in ("gpu_ln_float32", "gpu_mlp_b32"):
        server.answer({"do": "check", "workload": name})
        server.answer({"do": "build", "workload": name, "warm_seconds": 0.001})
    assert built == ["gpu_ln_float32", "gpu_mlp_b32", "gpu_mlp_b32"]  # dropout is taken out to compare
    server.answer({"do": "build", "workload": "gpu_ln_float32", "warm_seconds": 0.001})
    assert built[-1] == "gpu_ln_float32"


def test_a_wrong_peer_is_found_on_a_device_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Slower, "scale", 1.1)
    code, found = a_run(tmp_path, "gpu_ln_float32", "--vs", PEER)
    assert code == 1
    assert found["rows"][0]["status"] == "wrong result"
    assert "median" not in found["rows"][0]["ratios"][PEER]


def test_a_jittery_device_gives_no_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = iter(range(1000))

    def do_round(self: _Server, seconds: float) -> dict[str, Any]:
        return {"times": [(1e-3, 3e-3, 5e-3)[next(rounds) // 2 % 3] * (1 + (self.side.name == "brim"))], "runs": 1}

    monkeypatch.setattr(_Server, "do_round", do_round)
    jitter = Options("cuda", 1, 3, 0.01, 0.25, 1.0, tiny=True)
    alone = run_workload(workload("gpu_ln_float32"), [InProcess("brim")], jitter)  # type: ignore[list-item]
    assert alone["status"] == "too noisy"
    assert len(alone["sides"]["brim"]["samples"]) == 6  # twice the rounds before it was given up


def workload(name: str) -> Workload:
    found = next(one for one in GPU_WORKLOADS if one.name == name).tiny
    assert found is not None
    return found


# ---- memory


def test_sides_that_do_not_fit_together_take_turns() -> None:
    players: Any = [InProcess("brim"), InProcess(PEER)]
    quick = Options("cuda", 1, 5, 0.002, 1e9, 1.0, tiny=True)
    row = run_workload(workload("gpu_ln_float32"), players, quick, together=False)
    assert row["status"] == "ok", row["why"]
    assert row["in_turns"]
    assert row["ratios"][PEER]["median"] == pytest.approx(0.5)
    assert row["ratios"][PEER]["rounds"] == 6
    order = [side for side, what in InProcess.asked if what == "drop"]
    assert order == ["brim", PEER, PEER, "brim"]
    holder = ""  # at any moment one side at most has arrays
    for side, what in InProcess.asked:
        if what in ("check", "build"):
            assert holder in ("", side)
            holder = side
        elif what == "drop":
            holder = ""
    document = results.make_document({}, {"device": "cuda"}, {}, None, [row])
    assert "had it in turns" in text_report.run_text(document)


def test_a_side_that_fails_in_turns_is_one_failure() -> None:
    players: Any = [InProcess("brim"), InProcess(COMPILER), InProcess(PEER)]
    quick = Options("cuda", 1, 4, 0.002, 1e9, 1.0, tiny=True)
    row = run_workload(workload("gpu_mlp_b32"), players, quick, together=False)
    assert row["status"] == "ok"
    assert row["ratios"][COMPILER]["status"] == "not supported"
    assert row["ratios"][PEER]["status"] == "ok"


def test_room_on_a_card() -> None:
    one = Workload("w", "", "w", needs_bytes=10e9)
    assert room(one, 4, {}) == (True, "")
    assert room(one, 2, {"free_bytes": 20e9 / SHARE + 1}) == (True, "")
    assert room(one, 3, {"free_bytes": 20e9 / SHARE + 1}) == (False, "")
    together, why = room(one, 1, {"free_bytes": 8e9})
    assert not together
    assert "a side needs about 9.3 GiB, the device has 7.5 GiB free" in why


def test_what_is_too_large_for_the_card_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CARD, "free_bytes", 2 << 20)
    code, found = a_run(tmp_path, "gpu_gemm_128*", "gpu_ln_float32", "--vs", "")
    assert code == 0
    assert found["rows"] == []
    assert {one["workload"] for one in found["left_out"]} == {"gpu_gemm_128x784x256_fp32", "gpu_ln_float32"}
    assert "the device has 2.0 MiB free" in text_report.run_text(found)
    assert "left out" in html_report.run_page(found)


# ---- time


class Clock:
    """Stands still unless told."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_a_budget_plans_and_learns() -> None:
    clock = Clock()
    budget = Budget(100.0, clock)
    small = Workload("a", "", "a")
    planned_s = budget.plan_s(small, [False, False], rounds=5, round_s=0.15)
    assert planned_s == pytest.approx(2 * (2 + 5 * 0.2))
    assert budget.plan_s(small, [False, True], 5, 0.15) > planned_s + 9  # compilers take their time
    assert budget.plan_s(replace(small, fuses=False), [False, True], 5, 0.15) == pytest.approx(planned_s / 2)
    assert budget.plan_s(replace(small, seconds=2.0), [False, False], 5, 0.15) > planned_s + 15
    assert budget.refusal(planned_s) == ""
    clock.now_s = 12.0
    budget.learn(planned_s, 12.0)
    assert budget.left_s() == 88.0
    assert budget.plan_s(small, [False, False], 5, 0.15) == pytest.approx(12.0)
    budget.learn(12.0, 1000.0)
    assert budget.plan_s(small, [False, False], 5, 0.15) == pytest.approx(4 * planned_s)  # but not more
    clock.now_s = 95.0
    assert budget.refusal(24.0) == "about 24 s, of which 5 s were left"
    clock.now_s = 200.0
    assert budget.refusal(1.0) == "about 1 s, of which 0 s were left"
    with pytest.raises(ValueError, match="more than 0 minutes"):
        Budget(0.0)


def test_the_most_important_comes_first_and_the_rest_is_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(gpu, "Budget", lambda seconds: Budget(seconds, clock))
    ran: list[str] = []

    def took_20_s(one: Workload, players: Any, options: Any, say: Any, **more: Any) -> dict[str, Any]:
        ran.append(one.name)
        clock.now_s += 20.0
        return run_workload(one, players, options, say, **more)

    monkeypatch.setattr(command, "run_workload", took_20_s)
    monkeypatch.setattr(command, "time", SimpleNamespace(monotonic=clock))
    names = ["gpu_softmax_fp32", "gpu_gemm_128x784x256_fp32", "gpu_launch_overhead", "gpu_mlp_b32", "gpu_sgd_10M"]
    code, found = a_run(tmp_path, *names, "--vs", "", "--minutes", "1")
    assert code == 0
    assert ran == ["gpu_mlp_b32", "gpu_launch_overhead", "gpu_sgd_10M"]
    assert [row["workload"] for row in found["rows"]] == ["gpu_mlp_b32", "gpu_launch_overhead", "gpu_sgd_10M"]
    assert {one["workload"] for one in found["left_out"]} == {"gpu_softmax_fp32", "gpu_gemm_128x784x256_fp32"}
    assert all("were left" in one["why"] for one in found["left_out"])
    assert found["options"]["seconds_in_all"] == 60.0
    assert [one.importance for one in by_importance(GPU_WORKLOADS)] == sorted(one.importance for one in GPU_WORKLOADS)


def test_ten_minutes_are_planned_to_suffice_for_what_matters() -> None:
    budget = Budget(600.0, Clock())
    planned_s = {
        one.name: budget.plan_s(one, [False, False, True, True], gpu.ROUNDS, gpu.SECONDS) for one in GPU_WORKLOADS
    }
    important = [one.name for one in GPU_WORKLOADS if one.importance <= 2]
    assert sum(planned_s[name] for name in important) < 560
    assert {"gpu_mlp_b32", "gpu_resnet50_b64_bf16", "gpu_gpt2_b8_bf16", "gpu_adamw_1G"} <= set(important)


# ---- files, refusals, the command


def test_files_of_results_are_never_overwritten(tmp_path: Path) -> None:
    today = date(2030, 1, 2)
    first = results_path = gpu.results_path(tmp_path, "NVIDIA H100 80GB HBM3", today)
    assert first.name == "2030-01-02-bench-nvidia-h100-80gb-hbm3.json"
    results_path.write_text("{}")
    assert gpu.results_path(tmp_path, "NVIDIA H100 80GB HBM3", today).name == f"{first.stem}-2.json"
    assert gpu.results_path(tmp_path, "***", today).name == "2030-01-02-bench-gpu.json"


def test_without_a_gpu_nothing_is_measured(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def none(name: str) -> Any:
        raise DeviceError("no NVIDIA driver was found")

    monkeypatch.setattr(gpu, "find_device", none)
    assert gpu.main([]) == 2
    assert "nothing was measured: no NVIDIA driver was found" in capsys.readouterr().err
    assert main(["bench", "gpu"]) == 2
    assert "nothing was measured" in capsys.readouterr().err
    assert InProcess.asked == []


def test_the_command_takes_the_flags_of_the_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.json"
    flags = ["--vs", PEER, "--minutes", "5", "--threads", "1", "--json", str(path), "--tiny"]
    assert main(["bench", "gpu", "gpu_eltwise_*", *flags]) == 0
    assert [row["workload"] for row in results.read_document(path)["rows"]] == [
        "gpu_eltwise_float32", "gpu_eltwise_bfloat16",
    ]  # fmt: skip
    assert main(["bench", "gpu", "nonsense", "--tiny"]) == 2
    assert "no workload is called 'nonsense'" in capsys.readouterr().err


def test_the_list_of_a_device(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "list", "--device", "cuda"]) == 0
    printed = capsys.readouterr().out
    assert all(one.name in printed for one in GPU_WORKLOADS)
    assert "\ngemm_1024 " not in printed


def test_a_document_must_not_contradict_itself(tmp_path: Path) -> None:
    _, found = a_run(tmp_path, "gpu_ln_float32", "--vs", "")
    found["left_out"] = [{"workload": "gpu_ln_float32", "why": "it did"}]
    with pytest.raises(brim.errors.DataError, match="it ran"):
        results.validate(found)


# ---- limits, machinery


class Events:
    """What the CUDA backend gives for measurements, on a device of 3 TB/s that copies at once."""

    def __init__(self) -> None:
        self.now_s, self.copies = 0.0, list[int]()

    def mark(self) -> float:
        self.now_s += 0.0 if self.copies else 1.0  # what is no copy takes a second
        return self.now_s

    def seconds(self, before: float, after: float) -> float:
        return after - before

    def copy(self, target: Any, source: Any) -> None:
        assert target is not source
        self.now_s += 2 * source.nbytes / 3e12
        self.copies.append(id(source))

    def card(self) -> dict[str, Any]:
        return {"free_bytes": 2**27, "l2_bytes": 2**20}


def test_limits_come_from_the_drivers_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    events = Events()
    add_second_device(monkeypatch)
    monkeypatch.setattr(SecondBackend, "measuring", lambda self, index: events, raising=False)
    monkeypatch.setattr(limits, "_LONGEST_S", 0.0)  # the smallest sizes are enough
    found = limits.measure(KIND, 1, 0.05)
    assert found["memory"][0]["bytes_per_s"] == pytest.approx(3e12)
    assert f"copies of {2**27 // 16:,} B by the driver" in found["memory_how"]
    assert len(set(events.copies)) == 2  # arrays take turns
    assert set(found["product_rates"]) == {"float32", "tf32", "bfloat16"}
    json.dumps(found)


def test_the_least_time_knows_the_precision() -> None:
    def least(precision: str) -> float:
        one = Workload("x", "", "x", flops=8e14, nbytes=1.0, precision=precision)
        return limits.least_seconds(one, GPU_LIMITS)[0]

    assert (least("fp32"), least("tf32"), least("bf16")) == (16.0, 2.0, 1.0)
    assert limits.least_seconds(Workload("x", "", "x", flops=1e11, precision="bf16"), LIMITS)[0] == 1.0


def measured_document(
    folder: Path, name: str = "run.json", time: str = "2030-01-02T00:00:00", rate: float = 8e14
) -> Path:
    _, found = a_run(folder, "gpu_gpt2_b8_bf16", "--vs", "")
    found["options"]["tiny"] = False
    found["environment"]["time"] = time
    found["limits"]["product_rates"]["bfloat16"] = rate
    (folder / name).write_text(json.dumps(found))
    return folder / name


def test_machinery_uses_what_was_measured_on_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = measured_document(tmp_path)
    rates = {(one.name, one.dtype): one for one in measured_gpus.measured_gpus(path)}
    assert rates[("Some Card", "bfloat16")].flops_per_s == 8e14
    training = rates[("Some Card, training", "bfloat16")]
    assert training.flops_per_s == pytest.approx(workload("gpu_gpt2_b8_bf16").flops / 1e-3)
    assert "2030-01-02, run.json" in training.source
    assert training.memory_bytes == 80 << 30
    monkeypatch.setattr(command, "usable_devices", list)
    monkeypatch.setattr(measured_gpus, "RESULTS", tmp_path)
    for flags in ([], ["--results", str(path)], ["--results", str(tmp_path)]):
        assert main(["bench", "machinery", *flags]) == 0
        assert "Some Card, training" in capsys.readouterr().out


def test_of_each_card_the_latest_run_counts(tmp_path: Path) -> None:
    measured_document(tmp_path, "b.json", "2030-01-02", 1e14)
    measured_document(tmp_path, "a.json", "2030-01-03", 2e14)
    (tmp_path / "run.json").write_text("{}")  # something else
    found = {one.dtype: one for one in measured_gpus.measured_gpus(tmp_path) if "training" not in one.name}
    assert found["bfloat16"].flops_per_s == 2e14
    assert "a.json" in found["bfloat16"].source


def test_rehearsals_are_no_measurements(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a_run(tmp_path, "gpu_gpt2_b8_bf16", "--vs", "")
    assert measured_gpus.measured_gpus(tmp_path) == []
    with pytest.raises(ValueError, match="no rehearsal"):
        measured_gpus.measured_gpus(tmp_path / "run.json")
    assert main(["bench", "machinery", "--results", str(tmp_path / "none.json")]) == 2


def test_a_child_rehearses_when_told() -> None:
    with Player("brim", tiny=True) as player:
        assert player.command[-1] == "--tiny"
        player.start()
        assert player.ask("card") == {"card": {}}
        assert player.ask("state") == {"state": {}}
        assert set(player.ask("check", workload="gpu_sgd_1G")["results"]) == {"update"}


# ---- the emulated device


@pytest.mark.emulated
@pytest.mark.skipif(bool(emulated.WHY_NOT), reason=emulated.WHY_NOT or "-")
def test_memory_on_a_cuda_device_is_told_without_its_overhead() -> None:
    settled = emulated.device()
    emulated.settle()
    side = Brim("emulated", 1)
    assert side.events() is None  # an emulation has no times
    assert side.card() == {}
    side.start_memory()
    job = side.build(workload("gpu_sgd_10M"), False)
    for _ in range(4):
        job.run()
    figures = side.memory_figures(job)
    count = 30 * 20 + 20 + 7 * 5
    assert 3 * 4 * count <= figures["planned_peak_bytes"] < settled.memory.overhead_bytes
    assert 3 * 4 * count <= figures["held_peak_bytes"] < settled.memory.overhead_bytes
