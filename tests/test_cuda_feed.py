"""Inputs of steps that the host does not wait for: the order of copies, the pinned ring, a training to the bit."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import brim
from brim import nn, optim
from brim.errors import BudgetExceeded, DeviceError
from brim_cuda.device import CudaBackend
from brim_cuda.emulation import find_compiler
from brim_cuda.feed import ALIGNMENT_BYTES, staged_bytes
from cuda_streams import Books, Event, Stream

pytest.importorskip("cupy", reason="needs CuPy, for its arrays (no GPU)")
pytestmark = pytest.mark.skipif(find_compiler() is None, reason="needs g++, which was not found")

from cupy_stand_in import NAME, StandIn, registered  # noqa: E402  # imports CuPy

PAGE = 4096
devices = sys.modules["brim.device"]


@pytest.fixture
def cupy() -> Iterator[StandIn]:
    """A machine with one card, registered as a device of its own for one test."""
    with registered() as made:
        yield made


def gpu() -> Any:
    brim.device(NAME)
    return devices._backends[NAME].machine._gpus[0]


def books(cupy: StandIn) -> Books:
    return cupy.cuda.runtime.books


def small_buffers(nbytes: int = PAGE) -> None:
    for slot in gpu().feed.ring._slots:
        slot.staging.cap_bytes = nbytes


def training(device: str, steps: int = 6, read: bool = True, each: Callable[[], None] = lambda: None) -> list[Any]:
    """Losses of a small network on another batch each step."""
    brim.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).to(device)
    opt = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def step(x: brim.Tensor, y: brim.Tensor) -> brim.Tensor:
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        opt.step()
        opt.zero_grad()
        return loss

    run = brim.compile(step, device=device)
    rng = np.random.default_rng(1)
    x, y = np.empty((5, 6), np.float32), np.empty(5, np.int64)
    found = []
    for _ in range(steps):
        x[:], y[:] = rng.standard_normal((5, 6)), rng.integers(0, 3, 5)  # the same memory for every batch
        found.append(run(x, y))
        each()
    return [loss.item() for loss in found] if read else [run]


def kinds(cupy: StandIn) -> list[int]:
    return [kind for kind, _ in cupy.cuda.runtime.copies]


def test_losses_are_those_of_plain_uploads_to_the_bit(cupy: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    staged = training(NAME)
    assert kinds(cupy).count(3) == 2 * 6, "inputs are moved from the stage"
    assert staged_bytes([5 * 6 * 4, 5 * 8]) == 2 * ALIGNMENT_BYTES == brim.device(NAME).memory.stage.nbytes
    monkeypatch.setattr(CudaBackend, "stages_inputs", False)
    cupy.cuda.runtime.copies.clear()
    single = training(NAME)
    assert 3 not in kinds(cupy)
    monkeypatch.setattr(CudaBackend, "feed", None)
    plain = training(NAME)
    assert staged == single == plain
    assert len(set(staged)) == 6


def test_the_host_runs_ahead_of_the_device(cupy: StandIn) -> None:
    launches = gpu().stream
    known, ordered = [], []

    def look() -> None:
        known.append(books(cupy).host.get(launches.ptr, 0))
        ordered.append(launches.clock.get(launches.ptr, 0))

    training(NAME, steps=8, read=False, each=look)
    for n in range(3, 8):
        assert known[n] <= ordered[n - 3], "the host waited for a step that was launched just before"


def test_one_copy_for_all_inputs_overlaps_the_step_before(cupy: StandIn) -> None:
    run = training(NAME, steps=3, read=False)[0]
    assert "two sets of buffers (1.0 KiB more), copied while a step computes" in run.explain()
    ordered = cupy.cuda.runtime.copies[-3:]
    assert ordered == [(1, 2 * ALIGNMENT_BYTES), (3, 120), (3, 40)]
    copies = gpu().feed._copies
    assert copies.ptr != gpu().stream.ptr
    assert copies.clock[copies.ptr] == 3


def test_a_missing_wait_of_the_launches_is_seen(cupy: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Stream, "wait_event", lambda self, event: None)
    with pytest.raises(AssertionError, match="reads what a copy on stream"):
        training(NAME)


def test_a_missing_wait_of_the_copies_is_seen(cupy: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    usual, copies = Stream.wait_event, gpu().feed._copies
    monkeypatch.setattr(Stream, "wait_event", lambda self, e: None if self is copies else usual(self, e))
    with pytest.raises(AssertionError, match=r"writes what a copy on stream .* reads"):
        training(NAME)


def test_a_pinned_buffer_that_is_written_too_early_is_seen(cupy: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Event, "synchronize", lambda self: None)
    with pytest.raises(AssertionError, match="pinned buffer was written before"):
        training(NAME, read=False)


@pytest.mark.parametrize("staging", [True, False])
def test_batches_larger_than_the_ring_go_in_pieces(
    cupy: StandIn, monkeypatch: pytest.MonkeyPatch, staging: bool
) -> None:
    monkeypatch.setattr(CudaBackend, "stages_inputs", staging)
    small_buffers()
    run = brim.compile(lambda x, y: (x * 2.0, y + 1), device=NAME)
    for n in range(4):
        x, y = np.arange(3001, dtype=np.float32) + n, np.arange(1001) * n
        first, second = run(x, y)
        np.testing.assert_array_equal(first.numpy(), x * 2)
        np.testing.assert_array_equal(second.numpy(), y + 1)
    assert gpu().feed.ring.nbytes == 2 * PAGE


def test_a_stage_in_memory_that_was_something_else_waits_for_it(cupy: StandIn) -> None:
    training(NAME, steps=1, read=False)
    memory = brim.device(NAME).memory
    before = memory.stage.generation
    memory.stage.release()
    assert memory.stage.generation > before

    other, place = brim.zeros((256,), device=NAME), brim.zeros((128,), device=NAME)
    address, pair = other.array.data.ptr, (place.array.data.ptr, np.full(512, 7, np.uint8))

    def use_for_something_else() -> None:
        gpu().upload([(address, np.ones(1024, np.uint8))])

    use_for_something_else()
    gpu().upload([pair], address, 10**6)  # another stage than before
    use_for_something_else()
    gpu().upload([pair], address, 10**6 + 1)  # at the same address, but another one
    use_for_something_else()
    with pytest.raises(AssertionError, match="has not waited"):
        gpu().upload([pair], address, 10**6 + 1)  # the memory was used since, and nobody said so


def test_an_eager_upload_does_not_wait_either(cupy: StandIn) -> None:
    gpu()
    before = books(cupy).waits
    for n in range(2):
        brim.asarray(np.full(8, n, np.float32), device=NAME)
    assert books(cupy).waits == before
    assert brim.asarray([2.0], device=NAME).item() == 2.0
    assert books(cupy).waits > before


def test_without_room_for_a_second_pinned_buffer_there_is_one(cupy: StandIn) -> None:
    ring, taken = gpu().feed.ring, []

    def charge(nbytes: int) -> Callable[[], None]:
        if taken:
            raise BudgetExceeded("the host is full")
        taken.append(nbytes)
        return taken.clear

    for slot in ring._slots:
        slot.staging.release()
        slot.staging._charge = charge
    losses = training(NAME)
    assert ring.nbytes == PAGE
    assert len(set(losses)) == 6
    with pytest.raises(BudgetExceeded, match="host is full"):
        brim.asarray(np.zeros(2 * PAGE, np.uint8), device=NAME)


def test_a_lost_device_ends_the_training(cupy: StandIn) -> None:
    def lose() -> None:
        cupy.cuda.runtime.fail = 719

    with pytest.raises(DeviceError, match=r"cuda:0 failed.*719.*last checkpoint"):
        training(NAME, steps=3, read=False, each=lose)
    cupy.cuda.runtime.fail = 0
