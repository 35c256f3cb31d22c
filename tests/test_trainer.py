"""Trainer: learns, keeps its books, resumes bit for bit, stops on NaN, interruption and refusal."""

from __future__ import annotations

import gc
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import brim
from brim import data, nn, optim
from brim.errors import BudgetExceeded, CheckpointError, SwapDetected
from brim.io import list_checkpoints, read_json, read_jsonl
from brim.memory.host import SwapWatch
from brim.train import Callback, EarlyStopping, Trainer, accuracy
from brim.train.metrics import Averages


def _data(count: int = 96) -> data.ArrayDataset:
    rng = np.random.default_rng(0)
    labels = np.arange(count) % 3
    return data.ArrayDataset(
        (rng.normal(size=(count, 6)) + 2 * labels[:, None]).astype(np.float32), labels.astype(np.int64)
    )


def _trainer(**settings: Any) -> Trainer:
    brim.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 3))
    optimizer = settings.pop("optimizer", None) or optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    schedule = optim.CosineAnnealingLR(optimizer, 4) if settings.pop("cosine", False) else None
    return Trainer(model, optimizer, schedule=schedule, progress=False, **settings)


def _weights(trainer: Trainer) -> dict[str, np.ndarray]:
    return {name: v.detach().numpy().copy() for name, v in trainer.model.state_dict().items()}


def _same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


class _Raise(Callback):
    """Ends the process's training as a crash would, after so many steps."""

    def __init__(self, at_step: int) -> None:
        self.at_step = at_step

    def on_step_end(self, trainer: Trainer, loss: float) -> None:
        if trainer.step == self.at_step:
            raise RuntimeError("crash")


class _Interrupt(Callback):
    def on_step_end(self, trainer: Trainer, loss: float) -> None:
        if trainer.step == 5:
            signal.raise_signal(signal.SIGINT)


def test_learns_and_writes_the_run_folder(tmp_path: Path) -> None:
    trainer = _trainer()
    history = trainer.fit(_data(), 4, validation=_data(30), batch_size=16, out=tmp_path, config={"note": "x"})
    assert [record["epoch"] for record in history] == [1, 2, 3, 4]
    assert history[-1]["loss"] < history[0]["loss"]
    assert history[-1]["val_accuracy"] > 0.8
    config, summary = read_json(tmp_path / "config.json"), read_json(tmp_path / "summary.json")
    assert config["batch_size"] == 16
    assert config["note"] == "x"
    assert config["optimizer"]["groups"][0]["momentum"] == 0.9
    assert summary["peak_bytes"] > 0
    assert summary["steps"] == 24
    assert summary["final"]["val_loss"] == history[-1]["val_loss"]
    lines = read_jsonl(tmp_path / "metrics.jsonl")
    assert [line["loss"] for line in lines] == [record["loss"] for record in history]
    evaluated = trainer.evaluate(_data(30), batch_size=7)
    assert evaluated["accuracy"] == pytest.approx(history[-1]["val_accuracy"])
    outputs = trainer.predict(_data(30).field(0), batch_size=7)
    assert outputs.shape == (30, 3)
    assert (outputs.argmax(1) == _data(30).field(1)).mean() == pytest.approx(evaluated["accuracy"])


@pytest.mark.parametrize("crash_at", [3, 6, 9, 17])
@pytest.mark.parametrize("settings", [{"cosine": True}, {"accumulate": 2, "clip_norm": 0.5}])
def test_resume_is_bit_for_bit(tmp_path: Path, crash_at: int, settings: dict[str, Any]) -> None:
    fit = {"epochs": 4, "validation": _data(30), "batch_size": 16, "checkpoint_every": 2, "resume": True}
    whole = _trainer(callbacks=[Callback()], **settings)
    whole.fit(_data(), out=tmp_path / "whole", **fit)
    if crash_at > whole.step:
        crash_at = whole.step - 1
    with pytest.raises(RuntimeError, match="crash"):
        _trainer(callbacks=[_Raise(crash_at)], **settings).fit(_data(), out=tmp_path / "cut", **fit)
    brim.manual_seed(99)
    resumed = _trainer(callbacks=[Callback()], **settings)
    resumed.fit(_data(), out=tmp_path / "cut", **fit)
    assert _same(_weights(whole), _weights(resumed))
    assert whole.history == resumed.history
    assert whole.step == resumed.step
    lines = [read_jsonl(tmp_path / run / "metrics.jsonl") for run in ("whole", "cut")]
    for one, other in zip(*lines, strict=True):
        assert {**one, "elapsed_s": 0} == {**other, "elapsed_s": 0}


def test_another_seed_gives_other_weights() -> None:
    first, second = _trainer(seed=0), _trainer(seed=1)
    first.fit(_data(), 1, batch_size=16)
    second.fit(_data(), 1, batch_size=16)
    assert not _same(_weights(first), _weights(second))


def test_interrupt_saves_and_resumes(tmp_path: Path) -> None:
    whole = _trainer(callbacks=[Callback()])
    whole.fit(_data(), 3, batch_size=16)
    cut = _trainer(callbacks=[_Interrupt()])
    cut.fit(_data(), 3, batch_size=16, out=tmp_path)
    assert cut.interrupted
    assert cut.step == 5
    resumed = _trainer(callbacks=[Callback()])
    resumed.fit(_data(), 3, batch_size=16, out=tmp_path, resume=True)
    assert _same(_weights(whole), _weights(resumed))
    assert not resumed.interrupted


def test_nan_names_the_layer(tmp_path: Path) -> None:
    trainer = _trainer()
    trainer.model[3].p = 0.0
    trainer.model[0].forward = lambda x: x @ brim.asarray(np.full((6, 16), np.nan, np.float32))
    with pytest.raises(FloatingPointError, match="layer 0"):
        trainer.fit(_data(), 1, batch_size=16, out=tmp_path)
    assert not list_checkpoints(tmp_path)
    trainer = _trainer()
    trainer.model[4].bias.write(float("inf"))
    with pytest.raises(FloatingPointError, match=r"4\.bias"):
        trainer.fit(_data(), 1, batch_size=16)


def test_early_stopping_and_best(tmp_path: Path) -> None:
    trainer = _trainer(callbacks=[EarlyStopping("loss", patience=1, min_delta=10.0)])
    trainer.fit(_data(), 10, batch_size=16, out=tmp_path)
    assert trainer.epoch == 3
    assert "loss" in trainer.stopped
    assert len(list_checkpoints(tmp_path, "best")) == 1
    assert len(list_checkpoints(tmp_path, "last")) == 2
    with pytest.raises(ValueError, match="watches"):
        _trainer(callbacks=[EarlyStopping("nothing")]).fit(_data(), 1)


def test_accumulation_equals_large_batches() -> None:
    def run(batch_size: int, accumulate: int) -> dict[str, np.ndarray]:
        brim.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 3))
        trainer = Trainer(model, optim.SGD(model.parameters(), lr=0.1), accumulate=accumulate, progress=False)
        trainer.fit(_data(), 2, batch_size=batch_size)
        return _weights(trainer)

    for name, value in run(32, 1).items():
        np.testing.assert_allclose(value, run(8, 4)[name], rtol=1e-4, atol=1e-6)


def test_budget_refuses_and_leaves_nothing(tmp_path: Path) -> None:
    gc.collect()  # what other tests left: their arena could be used again, the rest counts against the budget
    memory = brim.device("cpu").memory
    memory.arena.release()
    brim.empty_cache("cpu")
    trainer = _trainer()
    trainer.budget = memory.held_bytes + 256 * 1024
    rng = np.random.default_rng(0)
    big = data.ArrayDataset(rng.normal(size=(9999, 6)).astype(np.float32), np.arange(9999) % 3)
    with pytest.raises(BudgetExceeded):
        trainer.fit(big, 1, batch_size=9999, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    trainer.fit(_data(), 1, batch_size=16)
    assert trainer.epoch == 1


def test_save_and_load(tmp_path: Path) -> None:
    trainer = _trainer()
    trainer.fit(_data(), 1, batch_size=16)
    trainer.save(tmp_path)
    other = _trainer()
    assert not _same(_weights(other), _weights(trainer))
    other.load(tmp_path)
    assert _same(_weights(other), _weights(trainer))
    assert other.history == trainer.history
    model = nn.Sequential(nn.Linear(6, 3))
    before = model[0].weight.numpy().copy()
    with pytest.raises(CheckpointError):
        Trainer(model, optim.SGD(model.parameters(), lr=0.1)).load(tmp_path)
    assert np.array_equal(before, model[0].weight.numpy())
    with pytest.raises(CheckpointError):
        other.load(tmp_path / "nothing")


def test_plain_progress(capsys: pytest.CaptureFixture[str]) -> None:
    trainer = _trainer()
    trainer.progress = True
    trainer.fit(_data(), 2, batch_size=16)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    for word in ("planned: peak", " of ", "would be the largest"):
        assert word in lines[0]
    for word in ("epoch 2/2", "loss", "accuracy", "samples/s", "ETA", "memory"):
        assert word in lines[2]


def test_bad_arguments() -> None:
    with pytest.raises(ValueError):
        _trainer(metrics=("f7",))
    with pytest.raises(ValueError):
        _trainer(accumulate=0)
    with pytest.raises(ValueError):
        _trainer().fit(_data(), 0)


class _SwapsAtStepThree(Callback):
    """A fake /proc in which this process starts to swap."""

    def __init__(self, root: Path) -> None:
        self.status = root / "proc/self/status"
        self.status.parent.mkdir(parents=True)
        self.status.write_text("Name: x\nVmSwap:\t       0 kB\n")

    def on_step_end(self, trainer: Trainer, loss: float) -> None:
        if trainer.step == 3:
            self.status.write_text("Name: x\nVmSwap:\t   20480 kB\n")


def test_swapping_stops_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("brim.train.trainer._SWAP_EVERY_S", 0.0)
    fake = _SwapsAtStepThree(tmp_path)
    trainer = _trainer(callbacks=[fake])
    trainer.swap_watch = SwapWatch("error", root=tmp_path)
    with pytest.raises(SwapDetected, match=r"20\.0 MiB .* at step 4"):
        trainer.fit(_data(), epochs=1, batch_size=16)
    assert trainer.step == 4
    monkeypatch.setattr("brim.train.trainer._SWAP_EVERY_S", 3600.0)  # an epoch's end is looked at in any case
    fake.status.write_text("Name: x\nVmSwap:\t       0 kB\n")
    trainer = _trainer(callbacks=[fake])
    trainer.swap_watch = SwapWatch("error", root=tmp_path)
    with pytest.raises(SwapDetected, match=r"20\.0 MiB .* at step 6"):
        trainer.fit(_data(), epochs=1, batch_size=16)
    assert _trainer(on_swap="off").fit(_data(), epochs=1, batch_size=16)


def test_the_ledger_knows_what_training_holds() -> None:
    before = dict(brim.memory_stats()["by_kind"])
    trainer = _trainer()
    trainer.fit(_data(), epochs=1, batch_size=16)
    stats = brim.memory_stats()
    params = sum(p.nbytes for p in trainer.model.parameters())
    assert stats["by_kind"]["params"] - before["params"] == params
    assert stats["by_kind"]["optimizer"] - before["optimizer"] == params  # momentum
    assert stats["by_kind"]["buffers"] - before["buffers"] == sum(b.nbytes for b in trainer.model.buffers())
    assert stats["by_kind"]["activations"] == before["activations"]
    assert sum(stats["by_kind"].values()) == stats["held_bytes"]


class _Counted(Callback):
    """Counts the calls of functions of the data loader and the Trainer from one step to the next."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def _profile(self, frame: Any, event: str, _: Any) -> None:
        if event == "call" and frame.f_globals.get("__name__", "").startswith(("brim.data", "brim.train")):
            self.calls[-1] += 1

    def on_step_end(self, trainer: Trainer, loss: float) -> None:
        sys.setprofile(None)
        self.calls.append(0)
        sys.setprofile(self._profile)

    def on_epoch_end(self, trainer: Trainer, record: dict[str, Any]) -> None:
        sys.setprofile(None)


@pytest.mark.parametrize(("metrics", "most"), [((), 22), (("accuracy",), 26)], ids=["no metrics", "accuracy"])
def test_a_step_takes_a_few_calls_beside_the_planned_one(metrics: tuple[str, ...], most: int) -> None:
    counted = _Counted()
    trainer = _trainer(callbacks=[counted], metrics=metrics)
    before = sys.getprofile()
    try:
        trainer.fit(_data(), 3, batch_size=8)
    finally:
        sys.setprofile(before)
    steps = sorted(counted.calls)
    assert len(steps) == 3 * 12
    assert 10 < steps[len(steps) // 2] <= most, "the Trainer works more in each step than it did"


def test_averages_are_worked_out_only_to_be_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[int] = []
    means = Averages.means

    def noted(self: Averages) -> dict[str, float]:
        shown.append(self.samples)
        return means(self)

    monkeypatch.setattr(Averages, "means", noted)
    _trainer().fit(_data(), 1, batch_size=2)
    assert shown == [len(_data())]
    shown.clear()
    monkeypatch.setattr("brim.train.progress._PLAIN_EVERY_S", 0.0)
    trainer = _trainer()
    trainer.progress = True
    trainer.fit(_data(), 1, batch_size=16)
    assert len(shown) > len(_data()) // 16


def test_accuracy_is_the_mean_of_hits() -> None:
    rng = np.random.default_rng(0)
    for count in (1, 3, 7, 100):
        outputs, targets = rng.normal(size=(count, 4)).astype(np.float32), rng.integers(0, 4, count)
        assert accuracy(outputs, targets) == float(np.mean(outputs.argmax(axis=1) == targets))
    assert np.isnan(accuracy(np.zeros((0, 4)), np.zeros(0, np.int64)))
