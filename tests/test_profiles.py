"""Device profiles: a plan for a card that is not there, marked as estimated."""

from __future__ import annotations

import json

import pytest

import brim
from brim import nn, optim
from brim.models import resnet18
from brim.program.compile import plan, spec
from brim.program.profiles import PROFILES, ProfileDevice, find_profile
from brim.train import Trainer


def test_the_table_is_plausible() -> None:
    assert {"rtx4070-12gb", "rtx4090-24gb", "a100-80gb", "h100-80gb", "h200-141gb", "t4-16gb"} <= set(PROFILES)
    for name, profile in PROFILES.items():
        nominal_gb = int(name.rpartition("-")[2].removesuffix("gb"))
        assert 0.87 * nominal_gb * 2**30 < profile.memory_bytes <= 1.01 * nominal_gb * 2**30  # the driver keeps a part
        assert profile.memory_bytes % 2**20 == 0
        assert 200 * 2**20 <= profile.overhead_bytes <= 2**30
        assert profile.alignment_bytes == 512
        assert str(nominal_gb) in profile.title
    assert find_profile("H100_80GB") is PROFILES["h100-80gb"]
    with pytest.raises(ValueError, match=r"known are .*h100-80gb"):
        find_profile("h100")


def test_a_plan_for_a_card() -> None:
    layer = nn.Linear(7, 5)
    here = plan(lambda x: layer(x), spec((3, 7)))
    there = plan(lambda x: layer(x), spec((3, 7)), device_profile="t4-16gb")
    assert not here.estimated
    assert there.estimated
    assert (there.profile, there.device) == ("t4-16gb", "t4-16gb")
    assert set(there.exactness.values()) == {"estimated"}
    kinds = there.by_kind()
    assert kinds["overhead"] == PROFILES["t4-16gb"].overhead_bytes
    assert sum(kinds.values()) == there.peak_bytes
    assert kinds["params"] == here.by_kind()["params"]
    for program in there.programs:
        memory = program.prepared.memory
        assert program.prepared.alignment_bytes == 512
        assert all(memory.offset_bytes(value) % 512 == 0 for value in program.prepared.program.inputs)
    assert all(resident.reserved_bytes % 512 == 0 for resident in there.residents)
    assert (there.peak_bytes - kinds["overhead"]) % 512 == 0


def test_a_compiled_step_keeps_its_options() -> None:
    model = nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 2))

    optimizer = optim.SGD(model.parameters(), lr=0.1)

    def step(x: brim.Tensor) -> None:
        (model(x) ** 2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    peaks = [
        plan(brim.compile(step, recompute=layers), spec((512, 8)), device_profile="l4-24gb").peak_bytes
        for layers in ((), ("0..3",))
    ]
    assert peaks[1] < peaks[0]


def test_budgets_are_the_cards() -> None:
    layer = nn.Linear(7, 5)
    there = plan(lambda x: layer(x), spec((3, 7)), device_profile="h200-141gb")
    total = PROFILES["h200-141gb"].memory_bytes
    assert there.limit_bytes("auto") == total
    assert there.limit_bytes("50%") == total // 2
    assert there.limit_bytes("64GiB") == 64 * 2**30
    assert there.fits(there.peak_bytes)
    assert there.peak_bytes == there.least_bytes + there.staged_bytes > there.least_bytes
    assert there.fits(there.least_bytes), "a second set of input buffers can be done without"
    assert not there.fits(there.least_bytes - 1)


def test_the_trainer_plans_for_a_card() -> None:
    with brim.meta():
        model = resnet18(classes=10, image_size=64)
        trainer = Trainer(model, optim.AdamW(model.parameters()), progress=False)
    here, there = trainer.plan(16), trainer.plan(16, device_profile="a100-40gb")
    assert there.peak_bytes > here.peak_bytes + PROFILES["a100-40gb"].overhead_bytes
    assert there.input_shapes == [(16, 3, 64, 64), (16,)]
    budget = there.peak_bytes + 2**26
    largest = there.largest_batch(budget)
    assert largest >= 16
    assert trainer.plan(largest, device_profile="a100-40gb").within(budget).peak_bytes <= budget
    assert trainer.plan(largest + 1, device_profile="a100-40gb").within(budget).peak_bytes > budget
    document = json.loads(there.to_json())
    assert document["device"] == {"name": "a100-40gb", "profile": "a100-40gb", "estimated": True}


def test_nothing_runs_on_a_profile() -> None:
    device = ProfileDevice("l4-24gb", brim.device("cpu"))
    assert device.memory is None
    assert device.backend.alignment_bytes == 512
    with pytest.raises(ValueError, match="no device profile"):
        Trainer(nn.Linear(2, 2), optim.SGD(nn.Linear(2, 2).parameters())).plan(4, device_profile="nothing")
