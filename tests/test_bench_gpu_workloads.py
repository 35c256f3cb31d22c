"""The benchmark's workloads for GPUs: the same work on all sides at tiny sizes, turns, timing."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import brim
from brim_bench.digest import digest, disagreements
from brim_bench.sides import find_side
from brim_bench.sides.base import Side, Unsupported
from brim_bench.sides.brim_side import Brim
from brim_bench.timing import time_events
from brim_bench.workload import Job, Workload, with_tiny
from brim_bench.workloads import EVERY, GPU_WORKLOADS, WORKLOADS, of_device
from brim_bench.workloads.rotating import MOST_SETS, count_sets, in_turn

NO_TORCH = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="PyTorch not installed")


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    """Sides in this process set its threads and its precision; tests after this one get them back."""
    threads, place = brim.get_threads(), brim.default_device()
    yield
    brim.set_threads(threads)
    brim.set_float32_precision("full")
    brim.set_default_device(place)


# ---- the same work


def results(side: str, workload: Workload) -> dict[str, Any]:
    job = find_side(side)("cpu", 1).build(workload, True)
    found = {name: digest(value) for name, value in job.results().items()}
    for _ in range(2 * job.sets):
        job.run()
    return found


@NO_TORCH
@pytest.mark.parametrize("name", [one.name for one in GPU_WORKLOADS])
def test_brim_and_torch_compute_the_same(name: str) -> None:
    import torch

    threads = torch.get_num_threads()
    workload = next(one for one in GPU_WORKLOADS if one.name == name).tiny
    assert workload is not None
    try:
        found, wrong = disagreements(results("brim", workload), results("torch", workload), workload.tolerances)
    finally:
        torch.set_num_threads(threads)
    assert wrong == []
    assert set(found) == set(workload.tolerances)


@NO_TORCH
@pytest.mark.parametrize("name", ["gpu_mlp_b32", "gpu_gpt2_b8_bf16", "gpu_attention_1024_bf16"])
def test_another_set_of_inputs_is_another_result(name: str) -> None:
    workload = next(one for one in GPU_WORKLOADS if one.name == name).tiny
    assert workload is not None
    side = Brim("cpu", 1)
    side.rotation_bytes = 1e9  # as if a cache were to be filled
    job = side.build(workload, True)
    assert job.sets == MOST_SETS
    found = []
    for _ in range(2):
        one = job.run()
        found.append(side.sample(one[0] if isinstance(one, tuple) else one))
    assert not np.array_equal(*found)


def test_every_workload_is_stated() -> None:
    assert len({one.name for one in EVERY}) == len(EVERY)
    assert of_device("cpu") is WORKLOADS
    assert of_device("cuda:1") is GPU_WORKLOADS
    for one in GPU_WORKLOADS:
        assert one.name.startswith("gpu_"), one.name
        assert one.tiny is not None, one.name
        assert one.tiny.name == one.name
        assert one.needs_bytes >= one.tiny.needs_bytes > 0
        assert one.build is not None
        assert one.tolerances, one.name
        assert one.precision in ("fp32", "tf32", "bf16"), one.name
        if one.name not in ("gpu_launch_overhead", "gpu_upload"):
            assert one.flops or one.nbytes, one.name
    kinds = ("mlp", "resnet18", "resnet50", "lm", "gpt2", "launch_overhead", "gemm", "attention", "eltwise", "ln", "bn",
             "softmax", "dropout", "xent", "sgd", "adamw", "feed", "upload")  # fmt: skip
    for kind in kinds:
        assert any(one.name.startswith(f"gpu_{kind}_") or one.name == f"gpu_{kind}" for one in GPU_WORKLOADS), kind


def test_what_is_bound_by_memory_is_larger_than_twice_the_largest_cache() -> None:
    for one in GPU_WORKLOADS:
        if one.kind in ("gpu_eltwise", "gpu_ln", "gpu_bn", "gpu_softmax", "gpu_dropout", "gpu_xent"):
            assert one.nbytes > 2 * 126e6, one.name  # B200: 126 MB


def test_published_sizes_of_the_networks() -> None:
    """Operations of one image and parameters, as their papers and reports count them (a multiply-add is two)."""
    by_name = {one.name: one for one in GPU_WORKLOADS}
    for name, giga_macs in (("resnet18_b128_bf16", 1.81), ("resnet50_b64_bf16", 4.09)):
        one = by_name[f"gpu_{name}"]
        forward = one.flops / 3 / one.params["batch"]  # the first layer's input gets no gradient
        assert forward == pytest.approx(2e9 * giga_macs, rel=0.04), name
    gpt2 = by_name["gpu_gpt2_b8_bf16"]
    assert gpt2.flops == pytest.approx(6 * 124e6 * 8 * 1024, rel=0.1)  # 6 x parameters x tokens, and attention


def test_a_tiny_workload_keeps_the_name() -> None:
    def make(size: int, other: int = 1) -> Workload:
        return Workload(f"w{size}", "", "w", {"size": size, "other": other})

    one = with_tiny(make, {"size": 2}, size=100, other=7)
    assert (one.name, one.params["size"]) == ("w100", 100)
    assert one.tiny is not None
    assert (one.tiny.name, one.tiny.params) == ("w100", {"size": 2, "other": 7})
    assert one.tiny.tiny is None


# ---- sets of arrays in turn


class _Cached(Side):
    rotation_bytes = 100e6


def test_sets_fill_twice_the_cache() -> None:
    side = _Cached()
    assert count_sets(side, 1e9) == 1
    assert count_sets(side, 30e6) == 4
    assert count_sets(side, 10.0) == MOST_SETS
    assert count_sets(side, 0.0) == 1
    assert count_sets(Side(), 10.0) == 1  # the CPU


def test_runs_take_their_turns() -> None:
    said: list[str] = []
    run = in_turn([lambda: said.append("a"), lambda: said.append("b"), lambda: said.append("c")])
    for _ in range(7):
        run()
    assert "".join(said) == "abcabca"


def test_a_compiler_has_nothing_to_do_in_one_operation() -> None:
    class Compiler(Side):
        compiles = True

    one = Workload("x", "", "x", build=lambda side, checking: Job(int, dict), fuses=False)
    with pytest.raises(Unsupported, match="nothing to compile"):
        Compiler().build(one, False)
    assert Side().build(one, False).sets == 1


def test_a_side_without_the_precision_says_so() -> None:
    one = Workload("x", "", "x", build=lambda side, checking: Job(int, dict), precision="tf32")
    with pytest.raises(Unsupported, match="no precision 'tf32'"):
        Side().build(one, False)


@NO_TORCH
def test_errors_of_a_compiler_are_no_failures() -> None:
    compiler = find_side("torch_graphs")("cpu", 1)
    from torch._dynamo.exc import Unsupported as CannotCompile

    assert compiler.refuses(CannotCompile("no"))
    assert compiler.refuses(Unsupported("no"))
    assert not compiler.refuses(RuntimeError("out of memory"))
    assert not find_side("torch")("cpu", 1).refuses(CannotCompile("no"))


@NO_TORCH
def test_torch_is_timed_by_its_own_events(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append("recorded")

        def synchronize(self) -> None:
            log.append("waited")

        def elapsed_time(self, later: Event) -> float:
            return 5.0

    side = find_side("torch")("cpu", 1)
    assert side.events() is None
    side.place = torch.device("cuda")  # type: ignore[attr-defined]
    events = side.events()
    assert events is not None
    monkeypatch.setattr(torch.cuda, "Event", Event)
    before, after = events.mark(), events.mark()
    assert log == ["recorded"] * 2
    assert events.seconds(before, after) == pytest.approx(5e-3)
    assert log[2:] == ["waited"]


@NO_TORCH
def test_a_torch_without_cuda_has_no_side_there() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this PyTorch has CUDA")
    with pytest.raises(Unsupported, match="no CUDA"):
        find_side("torch")("cuda", 1)


# ---- timing by events


class FakeDevice:
    """A stream whose runs take as long as told, and a host that launches in no time; knows who waited, and when."""

    def __init__(self, run_s: float, first_s: float = 0.0) -> None:
        self.run_s, self.now_s, self.runs, self.extra_s = run_s, 0.0, 0, first_s
        self.log: list[str] = []

    def run(self) -> None:
        self.now_s += self.run_s + self.extra_s
        self.extra_s = 0.0
        self.runs += 1
        self.log.append("r")

    def mark(self) -> float:
        self.log.append("m")
        return self.now_s

    def seconds(self, before: float, after: float) -> float:
        assert after > before
        self.log.append("w")
        return after - before


@pytest.mark.parametrize(("run_s", "sets"), [(1e-5, 1), (1e-5, 7), (1e-3, 1), (3e-3, 2), (0.06, 1)])
def test_batches_are_timed_by_the_device_alone(run_s: float, sets: int) -> None:
    device = FakeDevice(run_s, first_s=0.02)
    times, runs = time_events(Job(device.run, dict, (), sets), device, 0.3)
    assert times == pytest.approx([run_s] * len(times))
    assert len(times) >= 2
    assert runs * run_s <= 0.35
    assert runs % sets == 0
    log = "".join(device.log)
    measured = log[: log.rindex("r") + 1].rsplit("w", 1)[-1]  # from the last wait before the last run
    assert measured.count("m") == len(times)
    assert measured.count("r") >= runs  # nothing is waited for between batches
    assert runs / len(times) * run_s >= 1e-3  # a batch is long beside an event


def test_a_run_longer_than_its_round_is_timed_once() -> None:
    device = FakeDevice(2.0)
    times, runs = time_events(Job(device.run, dict), device, 0.3)
    assert (times, runs) == ([pytest.approx(2.0)], 1)
    assert device.runs == 2  # the first tells how long it takes


def test_a_round_of_very_short_runs_ends() -> None:
    device = FakeDevice(1e-7)
    times, _ = time_events(Job(device.run, dict), device, 0.01)
    assert device.runs < 2e5
    assert times[0] == pytest.approx(1e-7, rel=1e-3)


def test_noise_is_the_same_again_whatever_was_done_to_it() -> None:
    side = Brim("cpu", 1)
    first = side.noise((40, 3), seed=5)
    before = side.numpy(first).copy()
    first += 1.0
    np.testing.assert_array_equal(side.numpy(side.noise((40, 3), seed=5)), before)
    assert not np.array_equal(side.numpy(side.noise((40, 3), seed=6)), before)
    np.testing.assert_allclose(side.numpy(side.noise((40, 3), 5, "bfloat16")).astype(np.float32), before, rtol=1e-2)
