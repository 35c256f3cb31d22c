"""Known networks: their size, that they learn, and that planned and eager training agree."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import brim
from brim import data, nn, optim
from brim.errors import ShapeError
from brim.models import GPT2, GPT2_SIZES, BasicBlock, Bottleneck, ResNet, next_token_loss, resnet18, resnet50
from brim.train import Trainer

PARAMETERS = {  # of the published weights; GPT-2's head is tied to its embedding
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
}


@pytest.mark.parametrize("name", list(PARAMETERS))
def test_gpt2_has_the_published_size(name: str) -> None:
    with brim.meta():
        model = GPT2(**GPT2_SIZES[name])
    assert sum(p.size for p in model.parameters()) == PARAMETERS[name]


def test_resnets_have_the_published_size() -> None:
    with brim.meta():
        assert sum(p.size for p in resnet18().parameters()) == 11_689_512
        model = resnet50()
    assert sum(p.size for p in model.parameters()) == 25_557_032
    assert "layer1.0.downsample.0.weight" in model.state_dict()
    assert "layer4.2.conv3.weight" in model.state_dict()


def _tiny(dropout: float = 0.1) -> GPT2:
    return GPT2(layers=2, width=16, heads=4, vocabulary=11, context=12, dropout=dropout)


def _sequences(count: int = 32) -> data.ArrayDataset:
    rng = np.random.default_rng(0)
    tokens = (rng.integers(0, 11, (count, 1)) + np.arange(13)) % 11  # each token follows from the one before
    return data.ArrayDataset(tokens[:, :-1].astype(np.int64), tokens[:, 1:].astype(np.int64))


def _fit(model: Any, dataset: Any, loss: Any, compile: bool, epochs: int = 2, lr: float = 1e-2) -> Trainer:
    trainer = Trainer(
        model, optim.AdamW(model.parameters(), lr=lr), loss, metrics=(), progress=False, compile=compile, clip_norm=1.0
    )
    trainer.fit(dataset, epochs, batch_size=8)
    return trainer


def test_gpt2_sees_no_future_token() -> None:
    model = _tiny().eval()
    index = np.arange(12).reshape(1, 12) % 11
    changed = index.copy()
    changed[0, 7] = (changed[0, 7] + 1) % 11
    with brim.no_grad():
        one, other = (model(brim.asarray(x)).numpy() for x in (index, changed))
    assert one.shape == (1, 12, 11)
    assert np.array_equal(one[:, :7], other[:, :7])
    assert np.abs(one[:, 7:] - other[:, 7:]).min(axis=(0, 2)).max() > 0
    with pytest.raises(ShapeError, match="at most 12"):
        model(brim.asarray(np.zeros((1, 13), np.int64)))
    with pytest.raises(ValueError, match="heads"):
        GPT2(layers=1, width=10, heads=3)


def test_gpt2_learns_and_planned_is_eager() -> None:
    found = []
    for compile in (False, True):
        brim.manual_seed(0)
        trainer = _fit(_tiny(), _sequences(), next_token_loss, compile, epochs=6)
        found.append(trainer)
    assert [r["loss"] for r in found[0].history] == [r["loss"] for r in found[1].history]
    assert found[1].history[-1]["loss"] < 0.6 * found[1].history[0]["loss"]
    ours, theirs = (t.model.state_dict() for t in found)
    assert all(np.array_equal(ours[name].numpy(), theirs[name].numpy()) for name in ours)


@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
def test_resnet_planned_is_eager_but_for_rounding(block: Any) -> None:
    rng = np.random.default_rng(0)
    images = data.ArrayDataset(rng.normal(size=(16, 3, 32, 32)).astype(np.float32), np.arange(16) % 4)
    found = []
    for compile in (False, True):
        brim.manual_seed(0)
        model = ResNet(block, (1, 1, 1, 2), classes=4, image_size=32, width=4)
        found.append(_fit(model, images, nn.CrossEntropyLoss(), compile, 2, 1e-3))
    losses = [[record["loss"] for record in trainer.history] for trainer in found]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)  # in another layout, sums are taken in another order
