"""How many kernels steps take on a GPU, by plan: norms, dropout, losses and updates are not kernels of their own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import brim
from brim import nn, optim
from brim.models import GPT2, next_token_loss, resnet18
from brim.nn import functional as F
from brim.program.ir import Program

PROFILE = "h100-80gb"


def planned(step: Callable[..., Any], *specs: Any) -> tuple[Program, Any]:
    """The program that would run, and what it moves."""
    plan = brim.plan(step, *specs, device_profile=PROFILE)
    return plan.programs[0].prepared.program, plan.traffic()


def counts(program: Program) -> Counter[str]:
    return Counter(i.op.name for i in program.instructions)


def training(model: Any, loss: Callable[[Any, Any], Any], optimizer: Any, clip: float | None = None) -> Any:
    def step(x: Any, y: Any) -> Any:
        found = loss(model(x), y)
        found.backward()
        if clip is not None:
            optim.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        return found

    return step


def test_bias_activation_dropout_and_residual_are_one_group() -> None:
    up, down, drop = nn.Linear(64, 96), nn.Linear(96, 64), nn.Dropout(0.2)

    def step(x: Any) -> Any:
        return x + drop(down(drop(F.gelu(up(x)))))

    found = counts(planned(step, brim.spec((32, 64)))[0])
    assert found["dropout"] == 0
    assert found["fused"] + found["add"] == 2
    assert found["matmul"] + found["matmul_epilogue"] == 2


def gpt2(clip: float | None = None) -> tuple[Program, Any, int]:
    with brim.meta():
        model = GPT2(layers=3, width=768, heads=12, dropout=0.1)
        step = training(model, next_token_loss, optim.AdamW(model.parameters(), lr=3e-4), clip)
    tokens = brim.spec((4, 1024), "int64")
    return *planned(step, tokens, tokens), len(list(model.parameters()))


def test_a_transformer_has_no_group_beside_a_norm() -> None:
    program, _, _ = gpt2()
    found = counts(program)
    assert found["layer_norm"] == found["layer_norm_grad"] == found["cross_entropy"] == found["cross_entropy_grad"] == 0
    assert (found["layer_norm_fused"], found["layer_norm_grad_fused"], found["cross_entropy_with_grad"]) == (7, 7, 1)


def test_updates_of_a_transformer_are_few_launches() -> None:
    for clip, most in ((None, 3), (1.0, 6)):  # with it: two for the norm, one for the factor, which updates multiply by
        program, traffic, parameters = gpt2(clip)
        assert parameters == 40
        assert traffic.by_phase()["update"].launches <= most, traffic
        updates = [i for i in program.instructions if i.phase == "update" and i.op.name in ("fused", "fused_many")]
        assert len(updates) <= 3


def test_loss_scaling_adds_few_launches() -> None:
    with brim.meta():
        model = GPT2(layers=3, width=768, heads=12, dropout=0.1)
        optimizer, scaler = optim.AdamW(model.parameters(), lr=3e-4), optim.GradScaler()

    def step(x: Any, y: Any) -> Any:
        with brim.autocast("float16"):
            loss = next_token_loss(model(x), y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        return loss

    tokens = brim.spec((4, 1024), "int64")
    program, traffic = planned(step, tokens, tokens)
    found = counts(program)
    assert found["all_finite"] == 1
    assert found["all"] == found["isfinite"] == 0
    assert traffic.by_phase()["update"].launches <= 14, traffic  # each of 40 parameters counts its own steps


def test_a_residual_network_stores_no_activation_twice() -> None:
    with brim.meta():
        model = resnet18(classes=10)
        step = training(model, F.cross_entropy, optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    program, traffic = planned(step, brim.spec((16, 3, 224, 224)), brim.spec((16,), "int64"))
    found = counts(program)
    norms = found["batch_norm"] + found["batch_norm_fused"]
    assert norms == found["batch_norm_grad"] + found["batch_norm_grad_fused"] == 20
    assert found["batch_norm_fused"] == found["batch_norm_grad_fused"] == 17, "all but one of each pair that is added"
    assert found["relu"] == 0
    assert traffic.by_phase()["update"].launches <= 7


def test_weights_are_cast_together() -> None:
    with brim.meta():
        model = resnet18(classes=10)
        optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def step(x: Any, y: Any) -> Any:
        with brim.autocast("bfloat16"):
            loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    program, _ = planned(step, brim.spec((64, 3, 224, 224)), brim.spec((64,), "int64"))
    assert counts(program)["conv2d"] == 20
    assert counts(program)["astype"] <= 3, "each of 21 weights had one"
    halves = [out for i in program.instructions if i.op.name == "fused_many" for out in i.outs]
    assert sum(out.spec.dtype.name == "bfloat16" for out in halves) >= 19
