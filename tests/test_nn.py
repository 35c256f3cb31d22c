"""Modules: registration, state, modes, containers, initialisation, and the errors of layers and losses."""

from __future__ import annotations

import math

import numpy as np
import pytest

import brim
from brim import nn
from brim.context import context
from brim.errors import CheckpointError, DTypeError, ShapeError


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))


def test_keys_are_in_order_and_round_trip() -> None:
    brim.manual_seed(1)
    a, b = model(), model()
    keys = ["0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var", "1.num_batches_tracked"]
    assert list(a.state_dict()) == [*keys, "4.weight", "4.bias"]
    assert b.load_state_dict(a.state_dict()) == ([], [])
    for key, value in a.state_dict().items():
        np.testing.assert_array_equal(value.numpy(), b.state_dict()[key].numpy())


def test_a_wrong_state_is_refused_and_nothing_changes() -> None:
    m = model()
    before = {k: np.array(v.numpy()) for k, v in m.state_dict().items()}
    state = {k: v + 1 for k, v in before.items()}
    del state["4.bias"]
    state["5.bias"] = np.zeros(3)
    with pytest.raises(CheckpointError, match=r"(?s)4\.bias.*5\.bias"):
        m.load_state_dict(state)
    state["0.weight"] = np.zeros((2, 2))
    with pytest.raises(CheckpointError, match=r"0\.weight"):
        m.load_state_dict(state, strict=False)
    for key, value in m.state_dict().items():
        np.testing.assert_array_equal(value.numpy(), before[key])
    del state["0.weight"]
    assert m.load_state_dict(state, strict=False) == (["0.weight", "4.bias"], ["5.bias"])


def test_same_seed_same_weights_other_seed_others() -> None:
    weights = []
    for seed in (3, 3, 4):
        brim.manual_seed(seed)
        weights.append(np.array(nn.Linear(5, 5).weight.detach().numpy()))
    np.testing.assert_array_equal(weights[0], weights[1])
    assert (weights[0] != weights[2]).any()


def test_modes_and_layer_paths() -> None:
    seen = []

    class Probe(nn.Module):
        def forward(self, x):
            seen.append((context.layer, self.training))
            return x

    m = nn.Sequential(nn.ModuleList(), nn.Sequential(Probe()))[1:]
    x = brim.asarray([1.0])
    m(x)
    m.eval()(x)
    assert seen == [("1.0", True), ("1.0", False)]
    assert context.layer == ""


def test_dropout_mask_is_drawn_again_in_the_gradient() -> None:
    brim.manual_seed(0)
    x = brim.asarray(np.ones((300, 100), "float32")).requires_grad_()
    layer = nn.Dropout(0.25)
    out = layer(x)
    out.sum().backward()
    np.testing.assert_array_equal(out.detach().numpy(), x.grad.numpy())
    assert (out.detach().numpy() == 0).mean() == pytest.approx(0.25, abs=0.01)
    assert (layer(x).detach().numpy() != out.detach().numpy()).any()
    assert layer.eval()(x) is x
    assert (nn.Dropout(1.0)(x).detach().numpy() == 0).all()


def test_attributes_before_init_and_wrong_values() -> None:
    class Early(nn.Module):
        def __init__(self) -> None:
            self.layer = nn.Linear(2, 2)

    with pytest.raises(AttributeError, match="super"):
        Early()
    m = nn.Linear(2, 2)
    with pytest.raises(TypeError, match="parameter"):
        m.weight = 3
    with pytest.raises(AttributeError, match="nothing"):
        _ = m.nothing


def test_containers() -> None:
    m = nn.Sequential(nn.ReLU(), nn.Tanh()).append(nn.SiLU())
    assert len(m) == 3
    assert isinstance(m[-1], nn.SiLU)
    assert isinstance(m[1:], nn.Sequential)
    with pytest.raises(IndexError):
        m[3]
    with pytest.raises(TypeError):
        m.append(lambda x: x)
    named = nn.ModuleDict({"a": nn.Linear(1, 1)})
    assert [k for k, _ in named.named_parameters()] == ["a.weight", "a.bias"]
    assert "(0): ReLU()" in repr(m)


def test_to_keeps_the_objects_and_converts() -> None:
    m = model()
    weight = m[0].weight
    assert m.to("float64") is m
    assert m[0].weight is weight
    assert weight.dtype == brim.float64
    assert m[1].num_batches_tracked.dtype == brim.int64
    with pytest.raises(DTypeError):
        m.to(dtype="int32")


def test_meta_draws_nothing() -> None:
    brim.manual_seed(0)
    nn.Linear(2**20, 2**20, device="meta")
    assert brim.random.get_state()["counter"] == 0


def test_shape_errors() -> None:
    x = brim.asarray(np.ones((1, 4), "float32"))
    with pytest.raises(ShapeError, match="more than one value"):
        nn.BatchNorm1d(4)(x)
    nn.BatchNorm1d(4).eval()(x)
    for layer in (nn.Linear(3, 2), nn.BatchNorm1d(3), nn.LayerNorm(3), nn.Conv2d(1, 1, 3), nn.MaxPool2d(2)):
        with pytest.raises(ShapeError):
            layer(x)


def test_classes_are_checked() -> None:
    scores = brim.asarray(np.zeros((2, 3), "float32"))
    loss = nn.CrossEntropyLoss()
    assert loss(scores, brim.asarray([0, 2])).item() == pytest.approx(math.log(3))
    with pytest.raises(IndexError, match="class 3"):
        loss(scores, brim.asarray([0, 3]))
    with pytest.raises(ShapeError):
        loss(scores, brim.asarray([0, 1, 2]))


def test_init() -> None:
    brim.manual_seed(0)
    w = brim.empty((60, 40))
    nn.init.orthogonal_(w)
    np.testing.assert_allclose(w.numpy().T @ w.numpy(), np.eye(40), atol=1e-5)
    nn.init.trunc_normal_(w, std=2.0, a=-1.0, b=1.0)
    assert np.abs(w.numpy()).max() <= 1.0
    for fn, std in ((nn.init.kaiming_normal_, math.sqrt(2 / 40)), (nn.init.xavier_uniform_, math.sqrt(2 / 100))):
        fn(w)
        assert w.numpy().std() == pytest.approx(std, rel=0.1)
