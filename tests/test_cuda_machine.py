"""The machine of a GPU with a stand-in for the driver: start, memory, arrays, copies, a training, a lost device."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

import brim
from brim import nn, optim
from brim.errors import BudgetExceeded, DeviceError
from brim.spec import DTYPES, Spec
from brim_cuda import backend
from brim_cuda.dnn import DnnPlan, Request
from brim_cuda.dnn_host import HostCudnn
from brim_cuda.emulation import find_compiler
from brim_cuda.graph_driver import Driver
from brim_cuda.lowlevel import LowLevelError
from brim_cuda.machine import _DNN_LATER_BYTES, _LATER_BYTES, GpuMachine

pytest.importorskip("cupy", reason="needs CuPy, for its arrays (no GPU)")
pytestmark = pytest.mark.skipif(find_compiler() is None, reason="needs g++, which was not found")

from cupy_stand_in import CONTEXT_BYTES, MIB, NAME, StandIn, registered  # noqa: E402  # imports CuPy

devices = sys.modules["brim.device"]


@pytest.fixture
def cupy() -> Iterator[StandIn]:
    """A machine with one card, registered as a device of its own for one test."""
    with registered() as made:
        yield made


def machine() -> GpuMachine:
    return devices._backends[NAME].machine


def test_nothing_is_started_before_memory_is_asked_for(cupy: StandIn) -> None:
    found = machine()
    assert found.count() == 1
    assert found.describe(0) == "Stand-in, 2.0 GiB, sm_90"
    assert not cupy.cuda.runtime.context
    info = found.memory(0)
    assert cupy.cuda.runtime.context
    assert info.overhead_bytes >= CONTEXT_BYTES
    assert info.available_bytes <= info.total_bytes - CONTEXT_BYTES
    assert cupy.pool.limit == 1, "what asks CuPy's own pool must fail"
    assert not cupy.cuda.runtime.live, "what the start needed is given back"
    assert not cupy.streams


def test_values_come_back_whatever_their_layout(cupy: StandIn) -> None:
    rng = np.random.default_rng(0)
    for name in ("float32", "bfloat16", "float16", "int64", "bool", "complex64"):
        host = rng.integers(0, 2, (3, 4, 5)).astype(DTYPES[name])
        x = brim.asarray(host, device=NAME)
        assert type(x.array).__module__.startswith("cupy")
        np.testing.assert_array_equal(x.numpy(), host)
        np.testing.assert_array_equal(x[:, ::2, 1].numpy(), host[:, ::2, 1])
        np.testing.assert_array_equal(x.permute_dims((2, 0, 1)).numpy(), host.transpose(2, 0, 1))
        assert brim.asarray(host[:0], device=NAME).numpy().shape == (0, 4, 5)
    assert brim.asarray(3.5, device=NAME).item() == 3.5
    assert "3.5" in repr(brim.asarray([3.5], device=NAME))


def test_large_copies_go_through_a_small_buffer(cupy: StandIn) -> None:
    found = machine()
    brim.device(NAME)
    gpu = found._gpus[0]
    gpu.staging.cap_bytes = 4096
    for slot in gpu.feed.ring._slots:
        slot.staging.cap_bytes = 4096
    host = np.arange(5000, dtype=np.float32)
    cupy.cuda.runtime.copies.clear()
    np.testing.assert_array_equal(brim.asarray(host, device=NAME).numpy(), host)
    pieces = [4096] * 4 + [20_000 - 4 * 4096]
    assert [nbytes for _, nbytes in cupy.cuda.runtime.copies] == pieces * 2
    assert gpu.staging.nbytes == 4096
    assert gpu.feed.ring.nbytes == 2 * 4096


def test_a_planned_step_gives_the_numbers_of_the_cpu(cupy: StandIn) -> None:
    losses = {}
    for place in ("cpu", NAME):
        brim.manual_seed(3)
        model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).to(place)
        opt = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

        def step(x: brim.Tensor, y: brim.Tensor, model: nn.Module = model, opt: optim.SGD = opt) -> brim.Tensor:
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            opt.step()
            opt.zero_grad()
            return loss

        rng = np.random.default_rng(1)
        run = brim.compile(step, device=place)
        x, y = rng.standard_normal((5, 6)).astype(np.float32), rng.integers(0, 3, 5)
        losses[place] = [run(x, y).item() for _ in range(4)]
        if place == NAME:
            again = run(brim.asarray(x, device=NAME), brim.asarray(y, device=NAME))
            assert again.item() < losses[NAME][-1]
    np.testing.assert_allclose(losses[NAME], losses["cpu"], rtol=1e-5)
    assert losses[NAME][-1] < losses[NAME][0]
    assert "replayed as one graph" in run.explain()


def test_a_machine_whose_driver_cannot_be_loaded_launches_one_by_one(cupy: StandIn) -> None:
    def missing() -> Driver:
        raise OSError("libcuda.so.1: cannot open shared object file")

    machine()._driver = missing
    run = brim.compile(lambda x: ((x * 2.0).sum() + x.mean()).sqrt(), device=NAME)
    for n in range(1, 6):
        assert run(np.full(4, n, np.float32)).item() == pytest.approx((9 * n) ** 0.5)
    assert "one by one: libcuda.so.1: cannot open" in run.explain()


def test_a_full_card_is_refused_and_memory_goes_back(cupy: StandIn) -> None:
    place = brim.device(NAME)
    before = dict(cupy.cuda.runtime.live)
    with pytest.raises(BudgetExceeded, match=NAME):
        brim.empty((1024, MIB), device=NAME)
    assert cupy.cuda.runtime.live == before
    x = brim.empty((MIB,), device=NAME)
    assert len(cupy.cuda.runtime.live) == len(before) + 1
    del x
    place.memory.pool.release_cached()
    assert cupy.cuda.runtime.live == before


def test_a_lost_device_is_named_and_the_host_keeps_its_data(cupy: StandIn) -> None:
    host = brim.asarray([1.0, 2.0])
    x = host.to(NAME)
    cupy.cuda.runtime.fail = 719
    with pytest.raises(DeviceError, match=r"copy from cuda:0 failed on the CUDA device: .*719.*last checkpoint"):
        x.numpy()
    with pytest.raises(DeviceError, match="work on cuda:0"):
        brim.device(NAME).backend.synchronize(0)
    assert host.tolist() == [1.0, 2.0]
    cupy.cuda.runtime.fail = 0
    assert x.tolist() == [1.0, 2.0]


def test_a_device_that_is_lost_at_the_switch_to_it_is_named(cupy: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    x = brim.asarray([1.0, 2.0], device=NAME)
    runtime = cupy.cuda.runtime

    def lost(index: int) -> None:
        raise runtime.CUDARuntimeError(700)

    with monkeypatch.context() as patched:
        patched.setattr(runtime, "setDevice", lost)
        with pytest.raises(DeviceError, match=r"the switch to cuda:0 failed .*700.*last checkpoint"):
            x + x
    assert (x + x).tolist() == [2.0, 4.0]


def test_a_start_that_fails_is_named(cupy: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = cupy.cuda.runtime

    def unknown(index: int) -> None:
        raise runtime.CUDARuntimeError(101)

    monkeypatch.setattr(runtime, "getDeviceProperties", unknown)
    with pytest.raises(DeviceError, match=r"the start of cuda:0 failed .*101"):
        machine().memory(0)
    with pytest.raises(DeviceError, match=r"a look at cuda:0 failed .*101"):
        machine().describe(0)


def test_host_memory_that_cannot_be_pinned_is_not_the_devices_fault(
    cupy: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    brim.device(NAME)

    def refused(nbytes: int) -> None:
        raise cupy.cuda.runtime.CUDARuntimeError(2)

    with monkeypatch.context() as patched:
        patched.setattr(cupy.cuda.pinned_memory, "PinnedMemory", refused)
        with pytest.raises(DeviceError, match=r"copies to and from cuda:0 need 4\.0 KiB of host memory .*container"):
            brim.asarray([1.0], device=NAME)
    assert brim.asarray([1.0], device=NAME).tolist() == [1.0]


def test_facts_name_versions_and_sizes(cupy: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    found = machine().facts(0)
    assert found["driver"] == "runs CUDA up to 13.0"
    assert found["cublasLt"] == "unknown", "the NumPy twin has no version"
    assert found["memory"].startswith("discrete; overhead 450.0 MiB estimated (")
    library = machine().loader.gemm().library
    monkeypatch.setattr(library, "version", lambda: 120903, raising=False)
    assert machine().facts(0)["cublasLt"] == "12.9.3"


class Refusing(HostCudnn):
    """A library that plans, and runs nothing."""

    def execute(self, *given: object) -> None:
        raise LowLevelError("CUDNN_STATUS_EXECUTION_FAILED")


def test_cudnn_is_tried_when_the_device_starts(cupy: StandIn) -> None:
    found = machine()
    found.loader.dnn_library = twin = HostCudnn()
    without = _LATER_BYTES + CONTEXT_BYTES
    assert found.memory(0).overhead_bytes >= without + _DNN_LATER_BYTES
    assert [plan.request.kind for plan in twin.executed] == ["fprop"]
    assert found.facts(0)["cudnn"] == "NumPy in place of cuDNN"
    assert not cupy.cuda.runtime.live


class Greedy(HostCudnn):
    """A library whose plans want much scratch."""

    def plan(self, request: Request) -> DnnPlan:
        return replace(super().plan(request), workspace_bytes=5 * MIB)


def test_the_first_try_has_all_the_scratch_that_a_plan_wants(
    cupy: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    runtime, given = cupy.cuda.runtime, [0]
    malloc = runtime.malloc
    monkeypatch.setattr(runtime, "malloc", lambda nbytes: given.append(nbytes) or malloc(nbytes))
    found = machine()
    found.loader.dnn_library = twin = Greedy()
    assert found.facts(0)["cudnn"] == "NumPy in place of cuDNN"
    assert [plan.workspace_bytes for plan in twin.executed] == [5 * MIB]
    assert 5 * MIB < max(given) < 6 * MIB
    assert not runtime.live


def test_cudnn_that_does_not_run_is_not_used(cupy: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    found = machine()
    found.loader.dnn_library = Refusing()
    assert "not used: conv2d(" in found.facts(0)["cudnn"]
    assert "CUDNN_STATUS_EXECUTION_FAILED" in found.facts(0)["cudnn"]
    assert found.loader.dnn() is None
    x = brim.asarray(np.ones((1, 2, 4, 4), np.float32), device=NAME)
    w = brim.asarray(np.ones((3, 2, 3, 3), np.float32), device=NAME)
    assert brim.nn.functional.conv2d(x, w).numpy().max() == 18.0


def test_cudnn_that_is_insisted_on_must_run(cupy: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BRIM_CUDNN", "1")
    machine().loader.dnn_library = Refusing()
    with pytest.raises(DeviceError, match="CUDNN_STATUS_EXECUTION_FAILED"):
        brim.asarray([1.0], device=NAME)


def test_the_entry_point_needs_no_gpu_to_choose_kernels() -> None:
    made = backend()
    kernel = made.bind(brim.op.REGISTRY["matmul"], [Spec((64, 64))] * 2, [Spec((64, 64))], {})
    assert kernel.scratch_bytes > 0
