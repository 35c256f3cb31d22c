"""What is planned for a card is what is planned on the device, and the Trainer from end to end on the emulated one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import brim
from brim import data, optim
from brim.io import list_checkpoints
from brim.models import GPT2
from brim.models.gpt2 import next_token_loss
from brim.program.compile import plan, spec
from brim.program.plan import Plan
from brim.spec import Spec
from brim.train import Callback, Trainer
from digits_training import BATCH, MODELS, Training
from emulated import device

pytestmark = pytest.mark.emulated

PROFILE = "h100-80gb"


@pytest.fixture(autouse=True)
def without_cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which the emulated device has not, and a machine with a driver may have for the profile."""
    monkeypatch.setenv("BRIM_CUDNN", "0")


# ------------------------------------------------------------------------------------------------- plans of a profile


def _digits(name: str, place: Any) -> tuple[Callable[..., Any], list[Spec]]:
    return Training(name, place).step, [spec((BATCH, 1, 8, 8)), spec((BATCH,), "int64")]


def _language_model(place: Any) -> tuple[Callable[..., Any], list[Spec]]:
    brim.manual_seed(2)
    model = GPT2(layers=2, width=24, heads=3, vocabulary=37, context=16).to(place)
    optimizer = optim.AdamW(model.parameters())

    def step(tokens: Any, targets: Any) -> Any:
        loss = next_token_loss(model(tokens), targets)
        loss.backward()
        optim.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step, [spec((4, 16), "int64"), spec((4, 16), "int64")]


STEPS: dict[str, Callable[[Any], tuple[Callable[..., Any], list[Spec]]]] = {
    "mlp": lambda place: _digits("mlp", place),
    "cnn": lambda place: _digits("cnn", place),
    "gpt2": _language_model,
}


def _own_kinds(planned: Plan) -> dict[str, int]:
    return {kind: nbytes for kind, nbytes in planned.by_kind().items() if kind != "overhead"}


@pytest.mark.parametrize("at", ["cpu", "meta", "emulated"])
@pytest.mark.parametrize("name", STEPS)
def test_a_plan_for_a_card_is_the_plan_on_the_device(name: str, at: str) -> None:
    step, specs = STEPS[name](device())
    here = plan(step, *specs, device=device())
    step, specs = STEPS[name](at)
    there = plan(step, *specs, device=None if at == "meta" else at, device_profile=PROFILE)
    assert there.estimated
    assert not here.estimated
    for one, other in zip(there.programs, here.programs, strict=True):
        assert str(one.prepared.program) == str(other.prepared.program)
        assert one.hash == other.hash, "the places in the arena differ"
        assert [k.scratch_bytes for k in one.prepared.kernels] == [k.scratch_bytes for k in other.prepared.kernels]
    assert there.arena_bytes == here.arena_bytes
    assert _own_kinds(there) == _own_kinds(here)
    overhead_bytes = there.by_kind()["overhead"] - here.by_kind()["overhead"]
    assert there.peak_bytes - here.peak_bytes == overhead_bytes


def test_a_plan_for_the_cpu_is_another() -> None:
    """Or the comparison above would say nothing."""
    step, specs = STEPS["gpt2"]("cpu")
    here, there = plan(step, *specs), plan(step, *specs, device_profile=PROFILE)
    assert here.programs[0].hash != there.programs[0].hash


# ------------------------------------------------------------------------------------------------------- the Trainer


class _Crash(Callback):
    """Ends the process's training as a crash would, after so many steps."""

    def __init__(self, at_step: int) -> None:
        self.at_step = at_step

    def on_step_end(self, trainer: Trainer, loss: float) -> None:
        if trainer.step == self.at_step:
            raise RuntimeError("crash")


def _subset(count: int, train: bool = True) -> data.ArrayDataset:
    images, labels = (np.asarray(array)[:count] for array in data.load_digits()[0 if train else 1].arrays)
    return data.ArrayDataset(images.astype(np.float32), labels)


def _trainer(name: str, place: Any, *callbacks: Callback) -> Trainer:
    brim.manual_seed(4)
    model = MODELS[name]()
    optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return Trainer(model, optimizer, device=place, progress=False, callbacks=callbacks)


def _weights(trainer: Trainer) -> dict[str, np.ndarray]:
    return {name: value.numpy().copy() for name, value in trainer.model.state_dict().items()}


@pytest.mark.parametrize("name", MODELS)
def test_the_trainer_learns_as_on_the_cpu(name: str, tmp_path: Path) -> None:
    outcomes = []
    for place in ("cpu", device()):
        trainer = _trainer(name, place)
        trainer.fit(_subset(200), 1, validation=_subset(50, train=False), batch_size=32, out=tmp_path / str(place))
        assert trainer.planned is not None
        assert trainer.planned.device == str(place)
        assert trainer.device is brim.device(place)
        predicted = trainer.predict(_subset(50, train=False).field(0), batch_size=20)
        outcomes.append((trainer.history[-1], predicted, _weights(trainer)))
    (right, wanted, weights), (record, predicted, found) = outcomes
    for key in ("loss", "val_loss", "accuracy", "val_accuracy"):
        assert record[key] == pytest.approx(right[key], rel=1e-3), key
    assert record["val_accuracy"] > 0.2, "seven steps beat guessing one of ten"
    np.testing.assert_allclose(predicted, wanted, rtol=2e-3, atol=2e-3)
    for key, value in weights.items():
        np.testing.assert_allclose(found[key], value, rtol=2e-3, atol=2e-4, err_msg=key)


def test_a_checkpoint_of_the_device_resumes_there_and_opens_on_the_cpu(tmp_path: Path) -> None:
    fit: dict[str, Any] = {"epochs": 2, "validation": _subset(40, train=False), "batch_size": 32, "checkpoint_every": 3}
    whole = _trainer("mlp", device())
    whole.fit(_subset(200), **fit)
    with pytest.raises(RuntimeError, match="crash"):
        _trainer("mlp", device(), _Crash(5)).fit(_subset(200), out=tmp_path, **fit)
    assert list_checkpoints(tmp_path)
    brim.manual_seed(99)
    resumed = _trainer("mlp", device(), Callback())
    resumed.fit(_subset(200), out=tmp_path, resume=True, **fit)
    assert resumed.step == whole.step == 14
    assert {k: v.tobytes() for k, v in _weights(resumed).items()} == {
        k: v.tobytes() for k, v in _weights(whole).items()
    }
    assert resumed.history == whole.history
    elsewhere = _trainer("mlp", "cpu", Callback())
    elsewhere.load(tmp_path)
    assert elsewhere.step == 14
    images = _subset(40, train=False).field(0)
    np.testing.assert_allclose(elsewhere.predict(images), resumed.predict(images), rtol=1e-4, atol=1e-4)


def test_a_budget_of_the_trainer_is_held_on_the_device() -> None:
    trainer = _trainer("mlp", device())
    planned = trainer.plan(32, inputs=spec((32, 1, 8, 8)), targets=spec((32,), "int64"))
    tight = Trainer(trainer.model, trainer.optimizer, budget=planned.peak_bytes // 2, progress=False)
    with pytest.raises(brim.BudgetExceeded):
        tight.fit(_subset(64), 1, batch_size=32)
    assert tight.step == 0
    Trainer(trainer.model, trainer.optimizer, budget=2 * planned.peak_bytes, progress=False).fit(
        _subset(64), 1, batch_size=32
    )
