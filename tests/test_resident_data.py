"""Data sets in the device's memory: the same batches bit for bit, planned, refused, resumed."""

from __future__ import annotations

import copy
import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import brim
from brim import data, nn, optim
from brim.data import ArrayDataset, DataLoader
from brim.errors import BudgetExceeded
from brim.gathered import Gathered
from brim.memory.pool import round_up
from brim.program.admit import needed_bytes
from brim.train import Trainer
from emulated import device, machine
from emulated import settle as settle_device

N, BATCH = 45, 16


def settle() -> None:
    """Nothing of other tests is left on the device."""
    gc.collect()
    settle_device()


NORMALIZE = data.Normalize(120.0, 60.0)


def _dataset(transform: Any = NORMALIZE) -> ArrayDataset:
    rng = np.random.default_rng(4)
    pixels, labels = rng.integers(0, 256, (60, 6), dtype=np.uint8), rng.integers(0, 3, 60)
    return ArrayDataset(pixels, labels, transform=transform).subset(rng.permutation(60)[:N])


def _loader(place: Any, resident: bool = True, **options: Any) -> DataLoader:
    options = {"shuffle": True, "seed": 7} | options
    return DataLoader(_dataset(), BATCH, device=place, resident=resident, **options)


def _bytes() -> int:
    """Of the set on the device: inputs float32, targets and the order of an epoch int64."""
    return sum(round_up(nbytes, 512) for nbytes in (N * 6 * 4, N * 8, N * 8))


def _batches(loader: DataLoader) -> list[tuple[Any, ...]]:
    return [tuple(field.numpy() for field in batch) for batch in loader]


def _same(one: list[tuple[Any, ...]], other: list[tuple[Any, ...]]) -> None:
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        for x, y in zip(a, b, strict=True):
            assert x.dtype == y.dtype
            np.testing.assert_array_equal(x, y)


@pytest.mark.emulated
@pytest.mark.parametrize(
    "options", [{}, {"shuffle": False}, {"drop_last": True}], ids=["shuffled", "in order", "whole"]
)
def test_batches_are_those_of_the_host_bit_for_bit(options: dict[str, Any]) -> None:
    settle()
    host, there = _loader("cpu", False, **options), _loader(device(), **options)
    for _ in range(3):
        _same(_batches(there), _batches(host))
    assert there.epoch == 3
    assert all(batch[0].device is device() for batch in there)


@pytest.mark.emulated
def test_it_is_uploaded_once_and_goes_back_with_the_loader(monkeypatch: pytest.MonkeyPatch) -> None:
    settle()
    live_bytes = device().memory.live_bytes
    copied: list[int] = []
    backend = device().backend
    upload = backend.upload
    monkeypatch.setattr(backend, "upload", lambda array, host: (copied.append(host.nbytes), upload(array, host)))
    loader = _loader(device())
    assert not copied, "nothing is uploaded before the first batch"
    for _ in range(2):
        assert len(_batches(loader)) == 3
    assert sum(copied) == N * 6 * 4 + N * 8 + 2 * N * 8, "the set once, the order of each epoch once"
    device().memory.settle()
    assert device().memory.live_bytes - live_bytes == _bytes() - round_up(N * 8, 512)
    twin = copy.copy(loader)
    assert twin.state_dict() == loader.state_dict()
    del loader, twin
    device().memory.settle()
    assert device().memory.live_bytes == live_bytes


@pytest.mark.emulated
def test_it_goes_on_in_the_middle_of_an_epoch() -> None:
    settle()
    loader, host = _loader(device()), _loader("cpu", False)
    wanted = _batches(host) + _batches(host)
    iterator = iter(loader)
    first = next(iterator)
    _same([tuple(f.numpy() for f in first)], wanted[:1])
    other = _loader(device())
    other.load_state_dict(loader.state_dict())
    _same(_batches(other) + _batches(other), wanted[1:])
    one, two = iter(_loader(device())), iter(_loader(device(), seed=8))  # two loops at a time
    _same([tuple(f.numpy() for f in next(one))], wanted[:1])
    next(two)
    _same([tuple(f.numpy() for f in next(one))], wanted[1:2])


def test_on_the_cpu_it_is_simply_the_arrays() -> None:
    live_bytes = brim.device("cpu").memory.live_bytes
    loader = _loader("cpu")
    assert not loader.is_resident()
    assert loader.resident_memory() == []
    _same(_batches(loader), _batches(_loader("cpu", False)))
    assert all(type(field) is np.ndarray for batch in loader.for_steps() for field in batch)
    del loader
    brim.device("cpu").memory.settle()
    assert brim.device("cpu").memory.live_bytes == live_bytes


def test_what_cannot_be_kept_is_refused() -> None:
    with pytest.raises(TypeError, match=r"needs an ArrayDataset without transforms, or with brim's own"):
        DataLoader(_dataset(lambda batch: batch * 2), BATCH, resident=True)
    with pytest.raises(TypeError, match="resident=True"):
        DataLoader([(np.zeros(3), 1)], resident=True)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="to_tensor=False"):
        DataLoader(_dataset(), BATCH, resident=True, to_tensor=False)


# ------------------------------------------------------------------------------------------------- training


def _trainer(place: Any, compile: bool = True, **options: Any) -> Trainer:
    brim.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).to(place)
    optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return Trainer(model, optimizer, progress=False, compile=compile, **options)


def _figures(history: list[dict[str, Any]]) -> list[tuple[float, ...]]:
    return [(row["loss"], row["accuracy"], row["val_loss"], row["val_accuracy"]) for row in history]


@pytest.mark.emulated
@pytest.mark.parametrize("compiled", [True, False], ids=["planned", "eager"])
def test_a_training_has_the_same_numbers(compiled: bool) -> None:
    settle()
    plain = _trainer(device(), compiled)
    wanted = _figures(plain.fit(_loader(device(), False), 3, validation=_loader(device(), False, shuffle=False)))
    there = _trainer(device(), compiled)
    before = machine().staged_feeds
    found = _figures(there.fit(_loader(device()), 3, validation=_loader(device(), shuffle=False)))
    assert found == wanted
    assert machine().staged_feeds == before, "no batch comes from the host"
    images = there.predict(_loader(device(), shuffle=False))
    np.testing.assert_array_equal(images, there.predict(_dataset()))


@pytest.mark.emulated
def test_it_is_planned_and_held_to_the_byte() -> None:
    settle()
    trainer, loader = _trainer(device()), _loader(device())
    before = trainer.plan(data=_loader(device(), False), evaluation=False)
    planned = trainer.plan(data=loader, evaluation=False)
    assert planned.staged_bytes == 0 < before.staged_bytes
    assert planned.peak_bytes == before.least_bytes + _bytes()
    assert planned.largest_batch(planned.peak_bytes) >= BATCH
    card = trainer.plan(data=loader, evaluation=False, device_profile="h100-80gb")
    assert card.by_kind()["inputs"] == planned.by_kind()["inputs"]
    memory = device().memory
    memory.settle()
    others = memory.ledger.live_bytes - sum(r.reserved_bytes for r in planned.residents if r.exists)
    trainer.fit(loader, 2)
    assert memory.ledger.peak_bytes + memory.overhead_bytes - others == planned.peak_bytes
    assert trainer.planned.peak_bytes == planned.peak_bytes
    again = trainer.plan(data=loader, evaluation=False)
    assert again.peak_bytes == planned.peak_bytes
    assert sum(r.reserved_bytes for r in again.residents if not r.exists) == round_up(N * 8, 512), "the next order"


@pytest.mark.emulated
def test_a_set_that_does_not_fit_is_refused_before_anything_is_taken() -> None:
    settle()
    trainer, loader = _trainer(device()), _loader(device())
    memory = device().memory
    needed = needed_bytes(trainer.plan(data=loader, evaluation=False), device())
    without = needed_bytes(trainer.plan(data=_loader(device(), False), evaluation=False), device())
    assert needed - without == _bytes()
    with brim.budget(needed - 1, device=device()):
        with pytest.raises(BudgetExceeded, match="training step") as caught:
            trainer.fit(loader, 1)
        assert "dataset" in str(caught.value)
        trainer.fit(_loader(device(), False), 1)
    memory.settle()
    assert not loader._sets


@pytest.mark.emulated
def test_a_killed_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    settle()
    whole = _trainer(device())
    whole.fit(_loader(device()), 2)

    class Stop(brim.train.Callback):
        def on_step_end(self, trainer: Trainer, loss: float) -> None:
            if trainer.step == 4:
                trainer.stop("enough")

    killed = _trainer(device(), callbacks=[Stop()])
    killed.fit(_loader(device()), 2, out=tmp_path)
    assert killed.step == 4
    other = _trainer(device(), callbacks=[brim.train.Callback()])
    other.fit(_loader(device(), seed=1), 2, out=tmp_path, resume=True)
    assert other.history[-1]["loss"] == whole.history[-1]["loss"]
    for one, two in zip(whole.model.parameters(), other.model.parameters(), strict=True):
        np.testing.assert_array_equal(one.numpy(), two.numpy())


@pytest.mark.emulated
def test_a_loss_that_is_not_finite_is_explained() -> None:
    settle()
    x = np.ones((8, 6), np.float32)
    x[3, 2] = np.nan
    dataset = ArrayDataset(x, np.zeros(8, np.int64))
    loader = DataLoader(dataset, 4, device=device(), resident=True)
    with pytest.raises(FloatingPointError, match="the inputs of the batch are not finite"):
        _trainer(device()).fit(loader, 1)


@pytest.mark.emulated
def test_rows_for_a_step_on_another_device_come_from_the_host() -> None:
    settle()
    x, _ = next(iter(_loader(device()).for_steps()))
    assert type(x) is Gathered
    assert len(x) == BATCH
    run = brim.compile(lambda batch: batch * 2.0, device="cpu")
    np.testing.assert_array_equal(run(x).numpy(), x.numpy() * 2)
    np.testing.assert_array_equal(x.tensor().numpy(), x.numpy())
