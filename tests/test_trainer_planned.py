"""The Trainer's planned steps: the same numbers as eager ones to the last bit, planned to the byte, refused in time."""

from __future__ import annotations

import gc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import brim
from brim import data, nn, optim
from brim.errors import BudgetExceeded, DeviceError, TraceError
from brim.io import read_json
from brim.program import fit
from brim.program.admit import needed_bytes
from brim.train import Callback, Trainer


@pytest.fixture(autouse=True)
def _no_garbage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit, "SEARCH_TIME_S", 0.3)
    gc.collect()  # or memory of earlier tests would be freed in the middle of one that counts bytes
    brim.empty_cache("cpu")


def _data(count: int = 90, features: int = 6) -> data.ArrayDataset:
    rng = np.random.default_rng(0)
    labels = np.arange(count) % 3
    inputs = (rng.normal(size=(count, features)) + 2 * labels[:, None]).astype(np.float32)
    return data.ArrayDataset(inputs, labels.astype(np.int64))


def _images(count: int = 40) -> data.ArrayDataset:
    rng = np.random.default_rng(0)
    return data.ArrayDataset(rng.normal(size=(count, 1, 8, 8)).astype(np.float32), np.arange(count) % 3)


def _mlp(dropout: float = 0.3) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, 3))


def _cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(64, 3),
    )  # fmt: skip


def _trainer(model: Any = _mlp, optimizer: Any = None, **settings: Any) -> Trainer:
    brim.manual_seed(1)
    built = model()
    made = (optimizer or (lambda params: optim.SGD(params, lr=0.1, momentum=0.9)))(built.parameters())
    schedule = settings.pop("schedule", None)
    return Trainer(built, made, schedule=schedule and schedule(made), progress=False, **settings)


class _Losses(Callback):
    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_step_end(self, trainer: Trainer, loss: float) -> None:
        self.seen.append(loss)


def _needed(trainer: Trainer, plan: Any) -> int:
    """Bytes that the device holds while a plan runs, with all that is live besides."""
    return needed_bytes(plan, trainer.device)


def _everything(trainer: Trainer, dataset: Any, validation: Any = None, epochs: int = 2, batch_size: int = 16) -> Any:
    losses = _Losses()
    trainer.callbacks.append(losses)
    history = trainer.fit(dataset, epochs, validation=validation, batch_size=batch_size)
    weights = {name: v.detach().numpy().copy() for name, v in trainer.model.state_dict().items()}
    return losses.seen, history, weights, trainer.optimizer.state_arrays(), trainer.optimizer.state_settings()


def _assert_same(a: Any, b: Any) -> None:
    assert a[0] == b[0]
    for one, other in zip(a[1], b[1], strict=True):
        assert one.keys() == other.keys()
        for name in one:  # in evaluation, batch norm is folded into the layer before: the same but for rounding
            assert one[name] == (pytest.approx(other[name], rel=1e-6) if name.startswith("val_") else other[name])
    for one, other in zip(a[2:4], b[2:4], strict=True):
        assert one.keys() == other.keys()
        assert all(np.array_equal(one[name], other[name]) for name in one)
    assert a[4] == b[4]


CASES: list[tuple[str, dict[str, Any]]] = [
    ("plain", {}),
    ("clip", {"clip_norm": 0.5}),
    ("accumulate", {"accumulate": 4, "clip_norm": 0.5}),
    ("accumulate_last_alone", {"accumulate": 5}),
    ("cosine", {"schedule": lambda o: optim.CosineAnnealingLR(o, 2)}),
    ("hypergradient", {"optimizer": lambda p: optim.SGD(p, lr=0.05, momentum=0.9, hypergradient=1e-4)}),
    ("adam", {"optimizer": lambda p: optim.Adam(p, lr=0.01)}),
    ("adamw_accumulate", {"optimizer": lambda p: optim.AdamW(p, lr=0.01), "accumulate": 2}),
    ("no_metrics", {"metrics": ()}),
]


@pytest.mark.parametrize("settings", [pytest.param(s, id=name) for name, s in CASES])
def test_planned_is_eager_to_the_last_bit(settings: dict[str, Any]) -> None:
    found = [_everything(_trainer(compile=c, **settings), _data(), _data(35)) for c in (False, True)]
    assert len(found[0][0]) >= 4
    _assert_same(*found)


def test_images_planned_are_eager_to_the_last_bit() -> None:
    """The CPU prefers no channels-last layout, so sums over images are taken in the same order."""
    _assert_same(*[_everything(_trainer(_cnn, compile=c), _images(), _images(10), epochs=3) for c in (False, True)])


def test_evaluation_and_prediction_are_eager_but_for_rounding() -> None:
    dataset = _data(50)
    trainers = []
    for compile in (False, True):
        trainers.append(_trainer(compile=compile))
        trainers[-1].fit(_data(), 1, batch_size=16)
    found = [trainer.evaluate(dataset, batch_size=16) for trainer in trainers]
    assert found[0] == pytest.approx(found[1], rel=1e-6)
    for inputs in (dataset.field(0), dataset, brim.asarray(dataset.field(0))):
        outputs = [trainer.predict(inputs, batch_size=16) for trainer in trainers]
        assert outputs[0].shape == (50, 3)
        np.testing.assert_allclose(*outputs, rtol=1e-5, atol=1e-6)
    assert trainers[1].model.training


def test_what_is_planned_is_what_is_held() -> None:
    brim.device("cpu").memory.arena.release()
    brim.reset_peak_memory("cpu")
    before, grads = brim.memory_stats()["live_bytes"], brim.memory_stats()["by_kind"]["grads"]
    trainer = _trainer(accumulate=2)
    trainer.fit(_data(), 1, validation=_data(35), batch_size=16)
    assert trainer.planned is not None
    assert [p.name for p in trainer.planned.programs] == [
        "training step", "first gradients", "last batch", "evaluation", "last evaluation batch",
    ]  # fmt: skip
    stats = brim.memory_stats()
    assert stats["peak_bytes"] - before == trainer.planned.peak_bytes
    assert stats["by_kind"]["arena"] == trainer.planned.arena_bytes
    params = sum(p.nbytes for p in trainer.model.parameters())
    assert stats["by_kind"]["grads"] - grads == params <= trainer.planned.by_kind()["grads"]


def test_budget_is_exact(tmp_path: Path) -> None:
    memory = brim.device("cpu").memory

    def run(extra_bytes: int) -> Trainer:
        memory.arena.release()
        gc.collect()
        trainer = _trainer()
        trainer.budget = _needed(trainer, trainer.plan(64, evaluation=False)) + extra_bytes
        trainer.fit(_data(), 1, batch_size=64, out=tmp_path / f"run{extra_bytes}")
        return trainer

    assert run(0).step == 2
    before = brim.memory_stats()["live_bytes"]
    with pytest.raises(BudgetExceeded, match="training step"):
        run(-1)
    memory.arena.release()
    assert brim.memory_stats()["live_bytes"] <= before
    assert not (tmp_path / "run-1").exists()


def test_refusal_changes_nothing() -> None:
    trainer = _trainer(optimizer=lambda p: optim.Adam(p))
    weights = {name: v.numpy().copy() for name, v in trainer.model.state_dict().items()}
    memory = brim.device("cpu").memory
    memory.arena.release()
    live = brim.memory_stats()["live_bytes"]
    trainer.budget = live + 2000
    with pytest.raises(BudgetExceeded):
        trainer.fit(_data(), 1, batch_size=64)
    assert brim.memory_stats()["live_bytes"] <= live  # garbage of an earlier test may go meanwhile
    assert trainer.optimizer.state_arrays() == {}
    assert all(np.array_equal(weights[name], v.numpy()) for name, v in trainer.model.state_dict().items())
    trainer.budget = None
    trainer.fit(_data(), 1, batch_size=64)
    assert trainer.step == 2


def test_plan_before_fit() -> None:
    trainer = _trainer()
    live = brim.memory_stats()["live_bytes"]
    plan = trainer.plan(batch_size=512)
    assert brim.memory_stats()["live_bytes"] <= live  # garbage of an earlier test may go meanwhile
    assert trainer.optimizer.state_arrays() == {}
    assert [p.name for p in plan.programs] == ["training step", "evaluation"]
    assert plan.input_shapes == [(512, 6), (512,)]
    assert plan.peak_bytes == trainer.plan(inputs=brim.Spec((512, 6), brim.float32)).peak_bytes
    largest = plan.largest_batch("1MiB")
    assert trainer.plan(largest).peak_bytes <= 2**20 < trainer.plan(largest + 1).peak_bytes
    with_data = trainer.plan(data=_data(), batch_size=64)
    assert [p.name for p in with_data.programs] == [
        "training step",
        "last batch",
        "evaluation",
        "last evaluation batch",
    ]
    assert with_data.peak_bytes == trainer.plan(64).peak_bytes
    loader = data.DataLoader(_data(), 64, drop_last=True)
    assert len(trainer.plan(data=loader, evaluation=False).programs) == 1
    trainer.fit(_data(), 1, batch_size=64, validation=_data())
    assert trainer.planned.peak_bytes == with_data.peak_bytes
    with pytest.raises(ValueError, match="compile=False"):
        _trainer(compile=False).plan(64)


def test_plan_of_a_model_without_memory() -> None:
    live = brim.memory_stats()["live_bytes"]
    with brim.meta():
        model = nn.Sequential(nn.Linear(100_000, 100_000), nn.ReLU(), nn.Linear(100_000, 10))
        trainer = Trainer(model, optim.Adam(model.parameters()), progress=False)
        inside = trainer.plan(8)
    plan = trainer.plan(8)
    assert plan.device == inside.device == "cpu"
    assert plan.peak_bytes == inside.peak_bytes > 3 * 4 * 100_000**2
    assert plan.by_kind()["optimizer"] == 2 * plan.by_kind()["params"]
    assert brim.memory_stats()["live_bytes"] <= live  # garbage of an earlier test may go meanwhile
    assert trainer.optimizer.state_arrays() == {}


def test_what_cannot_be_inferred_is_said() -> None:
    trainer = _trainer(_cnn)
    with pytest.raises(ValueError, match=r"Conv2d.*data="):
        trainer.plan(8)
    with pytest.raises(ValueError, match="batch_size"):
        trainer.plan()
    plan = trainer.plan(8, inputs=brim.Spec((1, 1, 8, 8), brim.float32))
    assert plan.input_shapes == [(8, 1, 8, 8), (8,)]
    custom = _trainer(loss=lambda out, y: ((out - y) ** 2).mean())
    with pytest.raises(ValueError, match="targets="):
        custom.plan(8)
    assert custom.plan(8, targets=brim.Spec((8, 3), brim.float32)).peak_bytes > 0
    mean_squares = _trainer(loss=nn.MSELoss(), metrics=())
    assert mean_squares.plan(8).input_shapes == [(8, 6), (8, 3)]


def test_what_cannot_be_traced_runs_eagerly() -> None:
    def loss(outputs: Any, targets: Any) -> Any:
        found = nn.functional.cross_entropy(outputs, targets)
        return found * 2.0 if float(found) > 100.0 else found

    with pytest.raises(TraceError, match=r"Trainer\(compile=False\)"):
        _trainer(loss=loss).fit(_data(), 1)
    trainer = _trainer(loss=loss, compile=False)
    trainer.fit(_data(), 1)
    assert trainer.planned is None


class _Ragged:
    """Batches whose second axis differs from batch to batch."""

    def __len__(self) -> int:
        return 30

    def __getitem__(self, index: int) -> Any:
        return np.full((index // 5 + 2, 3), index, np.float32), index % 3


class _Pooled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Any) -> Any:
        return self.linear(x.mean(axis=1) / 30.0)


def test_batches_of_changing_shapes() -> None:
    found = []
    for compile in (False, True):
        trainer = _trainer(_Pooled, compile=compile)
        trainer.fit(data.DataLoader(_Ragged(), 5), 2)
        found.append(trainer.model.linear.weight.numpy().copy())
    assert np.array_equal(*found)
    assert len([line for line in trainer._run.explain().splitlines() if line.startswith("train: traced")]) == 6


def test_micro_batches_are_the_whole_batch() -> None:
    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(6, 512), nn.ReLU(), nn.Linear(512, 3))

    dataset = _data(200)
    whole = _trainer(model)
    whole.fit(dataset, 2, batch_size=64)
    peak = whole.planned.peak_bytes
    brim.device("cpu").memory.arena.release()
    trainer = _trainer(model, fit="microbatch")
    trainer.budget = _needed(trainer, trainer.plan(64)) - int(0.25 * peak)
    with pytest.raises(BudgetExceeded, match="2 micro-batches of 32 ->"):
        _trainer(model, budget=trainer.budget).fit(dataset, 1, batch_size=64)
    trainer.fit(dataset, 2, batch_size=64)
    assert trainer._run.parts == 2
    assert trainer.planned.peak_bytes <= 0.75 * peak
    for name, value in whole.model.state_dict().items():
        np.testing.assert_allclose(value.numpy(), trainer.model.state_dict()[name].numpy(), rtol=2e-4, atol=2e-6)
    assert [r["loss"] for r in trainer.history] == pytest.approx([r["loss"] for r in whole.history], rel=1e-4)
    assert trainer.history[-1]["accuracy"] == whole.history[-1]["accuracy"]
    brim.device("cpu").memory.arena.release()
    trainer.budget = _needed(trainer, trainer.plan(1)) - 4096
    with pytest.raises(BudgetExceeded):
        trainer.fit(dataset, 1, batch_size=64)


def test_micro_batches_of_a_sum() -> None:
    grads = []
    for parts in (1, 3):
        trainer = _trainer(lambda: nn.Linear(6, 3), loss=nn.CrossEntropyLoss(reduction="sum"), metrics=())
        trainer._run.parts = parts
        trainer.fit(_data(20), 1, batch_size=20)
        grads.append((trainer.model.weight.numpy().copy(), trainer.history[-1]["loss"]))
    np.testing.assert_allclose(grads[0][0], grads[1][0], rtol=1e-5, atol=1e-5)
    assert grads[0][1] == pytest.approx(grads[1][1], rel=1e-5)


def test_micro_batches_of_accumulated_batches() -> None:
    found = []
    for parts in (1, 2):
        trainer = _trainer(lambda: nn.Linear(6, 3), accumulate=3, clip_norm=0.5)
        trainer._run.parts = parts
        trainer.fit(_data(), 2, batch_size=16)
        found.append(trainer.model.weight.numpy().copy())
    np.testing.assert_allclose(*found, rtol=1e-5, atol=1e-6)


class _CountsAllocations(Callback):
    def __init__(self) -> None:
        self.seen: list[int] = []

    def on_step_end(self, trainer: Trainer, loss: float) -> None:
        self.seen.append(brim.memory_stats()["allocations"])


def test_a_step_allocates_nothing() -> None:
    counts = _CountsAllocations()
    _trainer(callbacks=[counts], clip_norm=1.0).fit(_data(80), 3, validation=_data(32), batch_size=16)
    assert len(counts.seen) == 15
    assert len(set(counts.seen[:5])) == 1  # batches go from the host straight into the arena
    assert len(set(counts.seen[5:])) == 1


def test_two_threads_train_on_one_device() -> None:
    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 3))

    def train(trainer: Trainer) -> None:
        trainer.fit(_data(), 5, validation=_data(35), batch_size=16)

    alone = _trainer(model)
    train(alone)
    together = [_trainer(model) for _ in range(3)]
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(train, together))
    for trainer in together:
        assert trainer.history == alone.history


def test_loss_that_is_not_finite_changes_no_weight() -> None:
    dataset = _data()
    dataset.field(0)[17] = np.inf
    trainer = _trainer(lambda: nn.Sequential(nn.Linear(6, 3)))
    before = trainer.model[0].weight.numpy().copy()
    with pytest.raises(FloatingPointError, match="inputs of the batch"):
        trainer.fit(dataset, 1, batch_size=90)
    assert np.array_equal(before, trainer.model[0].weight.numpy())


def test_the_record_names_the_plan(tmp_path: Path) -> None:
    trainer = _trainer()
    trainer.fit(_data(), 1, batch_size=16, out=tmp_path)
    summary = read_json(tmp_path / "summary.json")
    assert summary["planned_peak_bytes"] == trainer.planned.peak_bytes == sum(summary["planned_by_kind"].values())
    assert summary["plan_hash"] == trainer.planned.hash
    assert "planned: peak" in (tmp_path / "log.txt").read_text()
    assert read_json(tmp_path / "config.json")["compile"] is True
    config = read_json(tmp_path / "config.json")
    assert (config["fit"], config["recompute"], config["activations"]) == (None, [], None)
    again = _trainer()
    again.fit(_data(), 1, batch_size=16)
    assert again.planned.peak_bytes == trainer.planned.peak_bytes


def _deep() -> nn.Module:
    layers: list[nn.Module] = [nn.Linear(6, 128)]
    for _ in range(4):
        layers += [nn.Linear(128, 128), nn.GELU(), nn.Dropout(0.1)]
    return nn.Sequential(*layers, nn.Linear(128, 3))


def test_fit_by_recomputing(capsys: pytest.CaptureFixture[str]) -> None:
    dataset = _data(600)
    plain = _everything(_trainer(_deep), dataset, batch_size=256)
    brim.device("cpu").memory.arena.release()
    gc.collect()
    trainer = _trainer(_deep, fit="recompute")
    plan = trainer.plan(256)
    budget = _needed(trainer, plan) - plan.peak_bytes // 8
    trainer.budget, trainer.progress = budget, True
    found = _everything(trainer, dataset, batch_size=256)
    _assert_same(plain, found)
    assert trainer.planned.options.recompute
    assert trainer.planned.peak_bytes <= 0.88 * plan.peak_bytes
    assert "recompute=(" in capsys.readouterr().out
    named = _trainer(_deep, recompute=["1..3", "4..6"])
    assert named.plan(256).peak_bytes < plan.peak_bytes
    _assert_same(plain, _everything(named, dataset, batch_size=256))


def test_half_activations() -> None:
    trainer = _trainer(_deep, activations="bfloat16")
    assert trainer.plan(256).peak_bytes < 0.9 * _trainer(_deep).plan(256).peak_bytes
    trainer.fit(_data(600), 3, batch_size=100)
    assert trainer.history[-1]["loss"] < trainer.history[0]["loss"]


def test_memory_comes_back_without_the_garbage_collector() -> None:
    memory = brim.device("cpu").memory
    memory.arena.release()
    live = brim.memory_stats()["live_bytes"]
    gc.disable()
    try:
        trainer = _trainer()
        trainer.fit(_data(), 1, validation=_data(), batch_size=16)
        trainer.predict(_data())
        assert brim.memory_stats()["live_bytes"] > live
        del trainer
        memory.arena.release()
        assert brim.memory_stats()["live_bytes"] <= live
    finally:
        gc.enable()


def test_a_model_without_memory_is_not_run() -> None:
    with brim.meta():
        trainer = Trainer(model := _mlp(), optim.SGD(model.parameters(), lr=0.1), progress=False)
    for call in (lambda: trainer.fit(_data(), 1), lambda: trainer.evaluate(_data()), lambda: trainer.predict(_data())):
        with pytest.raises(DeviceError, match="planned, not run"):
            call()


def test_bad_settings() -> None:
    with pytest.raises(ValueError, match="fit:"):
        _trainer(fit="smaller")
    with pytest.raises(ValueError, match="compile=False"):
        _trainer(fit="microbatch", compile=False)
