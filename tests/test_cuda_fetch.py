"""The loss of a step on its way to the host: launched before, waited for after, and never too late for the weights."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import brim
from brim import nn, optim
from brim.data import ArrayDataset
from brim.errors import DeviceError
from brim.train import Trainer
from brim_cuda.device import CudaBackend
from brim_cuda.emulation import find_compiler
from brim_cuda.graph_driver import Driver
from brim_cuda.machine import GpuMachine
from cuda_streams import Event
from fake_cuda_driver import FakeDriverLibrary

pytest.importorskip("cupy", reason="needs CuPy, for its arrays (no GPU)")
pytestmark = pytest.mark.skipif(find_compiler() is None, reason="needs g++, which was not found")

from cupy_stand_in import FACTS, Loader, StandIn  # noqa: E402  # imports CuPy

NAME = "standin"
N, STEPS = 64, 6
devices = sys.modules["brim.device"]


class Card:
    """A machine with one card, and what its driver was asked."""

    def __init__(self) -> None:
        self.cupy = StandIn()
        loader = Loader(self.cupy)
        self.library = FakeDriverLibrary(loader)
        driver = Driver(self.library)
        self.backend = CudaBackend(GpuMachine(self.cupy, lambda: FACTS, loader, lambda: driver), NAME)

    @property
    def launched(self) -> int:
        return self.library.calls.count("cuGraphLaunch")


@pytest.fixture
def card() -> Iterator[Card]:
    """Registered as a device of its own for one test."""
    made = Card()
    devices._backends[NAME] = made.backend
    yield made
    del devices._backends[NAME]
    devices._devices.pop((NAME, 0), None)


def _trainer(
    x: Any = None, place: str = NAME, metrics: tuple[str, ...] = (), **options: Any
) -> tuple[Trainer, ArrayDataset]:
    brim.manual_seed(1)
    layers = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)).to(place)
    optimizer = optim.SGD(layers.parameters(), lr=0.1, momentum=0.9)
    rng = np.random.default_rng(2)
    given = rng.standard_normal((N * STEPS, 5)).astype(np.float32)
    dataset = ArrayDataset(given if x is None else x(given), rng.integers(0, 3, N * STEPS))
    return Trainer(layers, optimizer, metrics=metrics, progress=False, **options), dataset


def test_losses_are_those_of_reading_at_once(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, dataset = _trainer()
    losses = [row["loss"] for row in trainer.fit(dataset, 2, batch_size=N)]
    monkeypatch.setattr(card.backend, "fetcher", None)
    other, _ = _trainer()
    assert losses == [row["loss"] for row in other.fit(dataset, 2, batch_size=N)]
    for one, two in zip(trainer.model.parameters(), other.model.parameters(), strict=True):
        np.testing.assert_array_equal(one.numpy(), two.numpy())


def test_the_backward_pass_is_launched_before_the_loss_is_waited_for(
    card: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("brim_cuda.device.SHORTEST", 1)  # so that every part of a step is a graph, which is counted
    trainer, dataset = _trainer()
    seen: list[tuple[int, int]] = []
    usual = Event.synchronize

    def synchronize(self: Any) -> None:
        known = card.cupy.cuda.runtime.books.host
        seen.append((card.launched, known.get(devices._backends[NAME].machine._gpus[0].stream.ptr, 0)))
        usual(self)

    trainer.fit(dataset, 1, batch_size=N)
    monkeypatch.setattr(Event, "synchronize", synchronize)
    before = card.launched
    trainer.fit(dataset, 1, batch_size=N)
    a_step = (card.launched - before) // STEPS
    assert a_step == 3, "forward, backward, update"
    ahead = [(launched - before) % a_step for launched, _ in seen]
    assert ahead.count(2) == STEPS, "forward and backward are launched when the host waits for the loss"


def test_outputs_for_metrics_come_with_the_loss(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, dataset = _trainer(metrics=("accuracy",))
    gpu = brim.device(NAME) and devices._backends[NAME].machine._gpus[0]
    downloads: list[int] = []
    usual = gpu.download
    monkeypatch.setattr(gpu, "download", lambda address, data: (downloads.append(data.size), usual(address, data)))
    history = trainer.fit(dataset, 2, validation=dataset, batch_size=N)
    assert N * 3 * 4 not in downloads, "outputs of a step that were downloaded wait for all of it"
    monkeypatch.setattr("brim.program.compile._FETCHED_BYTES", 0)
    other, _ = _trainer(metrics=("accuracy",))
    assert other.fit(dataset, 2, validation=dataset, batch_size=N) == history
    assert N * 3 * 4 in downloads
    assert 0 < history[-1]["accuracy"] < 1


def test_an_infinite_loss_changes_no_weight(card: Card) -> None:
    def spoilt(x: Any) -> Any:
        x[4 * N] = np.inf
        return x

    trainer, dataset = _trainer(spoilt)
    seen: list[list[Any]] = []

    class Keep(brim.train.Callback):
        def on_step_end(self, trainer: Trainer, loss: float) -> None:
            seen.append([p.numpy() for p in trainer.model.parameters()])

    trainer.callbacks = [Keep()]
    loader = brim.data.DataLoader(dataset, N, device=NAME)
    with pytest.raises(FloatingPointError, match="at step 5: the inputs of the batch are not finite"):
        trainer.fit(loader, 1)
    assert len(seen) == 4
    for kept, param in zip(seen[-1], trainer.model.parameters(), strict=True):
        np.testing.assert_array_equal(kept, param.numpy())


def test_a_lost_device_ends_the_training_in_that_step(card: Card) -> None:
    trainer, dataset = _trainer()

    class Lose(brim.train.Callback):
        def on_step_end(self, trainer: Trainer, loss: float) -> None:
            if trainer.step == 3:
                card.cupy.cuda.runtime.fail = 719

    trainer.callbacks = [Lose()]
    with pytest.raises(DeviceError, match=r"719.*last checkpoint"):
        trainer.fit(dataset, 1, batch_size=N)
    assert trainer.step == 3
    card.cupy.cuda.runtime.fail = 0


def test_a_missing_wait_is_seen(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, dataset = _trainer()
    usual = Event.synchronize
    machine = devices._backends[NAME].machine
    brim.device(NAME)
    slots = [slot.event for slot in machine._gpus[0].feed.ring._slots]
    monkeypatch.setattr(Event, "synchronize", lambda self: usual(self) if self in slots else None)
    (row,) = trainer.fit(dataset, 1, batch_size=N)
    other, _ = _trainer(place="cpu")
    assert abs(other.fit(dataset, 1, batch_size=N)[0]["loss"] - row["loss"]) > 0.1
