"""Plans by the real cuDNN for an H100, made without a GPU: the convolutions of a ResNet-50, attention, a whole step."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from cudnn_deviceless import ATTENTIONS, BATCH, PRECISIONS, RESNET50, asked, why_not

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not() or "-")

MIB = 1 << 20


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    found = asked("convolutions", tmp_path_factory.mktemp("convolutions"), loading=False)
    assert found["version"].startswith("9.")
    return found["rows"]


def nbytes(precision: str, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * (2 if precision in ("bf16", "fp16") else 4)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_convolution_of_a_resnet_has_a_plan(rows: list[Any], precision: str) -> None:
    mine = [row for row in rows if row[0] == precision]
    assert len(mine) == len(RESNET50) * 3 * 2
    refused = [row for row in mine if "refused" in row[-1]]
    assert not refused
    assert all(row[-1]["engine"].startswith("eng") for row in mine)


@pytest.mark.parametrize("precision", ["bf16", "fp16", "tf32"])
def test_images_that_lie_channels_last_need_no_scratch_of_their_size(rows: list[Any], precision: str) -> None:
    """Tensor cores read them as they are: scratch holds the turned weight and partial sums. Others are turned, too."""
    for given, last, op, (c, o, size, window, step, around), plan in rows:
        if given != precision or c < 64:
            continue
        made = (size + 2 * around - window) // step + 1
        images = min(nbytes(precision, (BATCH, c, size, size)), nbytes(precision, (BATCH, o, made, made)))
        weight = nbytes("fp32", (o, c, window, window))
        if last:
            assert plan["workspace_bytes"] <= 2 * weight + MIB, (op, c, o, size, window)
        elif precision != "tf32":
            assert plan["workspace_bytes"] >= images, (op, c, o, size, window)


def test_full_float32_takes_other_engines_than_tf32(rows: list[Any]) -> None:
    found = {}
    for precision, last, op, sizes, plan in rows:
        found[precision, last, op, tuple(sizes)] = plan["engine"]
    same = [key for key, engine in found.items() if key[0] == "fp32" and engine == found["tf32", *key[1:]]]
    assert len(same) < len(RESNET50), "TF32 is forbidden to the one, and wanted of the other"


def test_no_plan_carries_a_note_that_is_forbidden(tmp_path: Path) -> None:
    found = asked("notes", tmp_path, loading=False)
    assert found["plans"] == 3 * 3 * 2
    assert found["excluded"] > 0, "the library offers plans with such notes"
    assert not found["carry"]


def test_attention_is_planned_up_to_loading(tmp_path: Path) -> None:
    rows = asked("attention", tmp_path, loading=False)
    assert [op for _, op, *_ in rows] == ["attention", "attention_grad"]
    for *_, plan in rows:
        assert "cuLibraryLoadData returned error (100)" in plan["refused"]


def test_what_the_library_compiles_has_plans_where_the_driver_loads_it(tmp_path: Path) -> None:
    found = asked("compiled", tmp_path, loading=True)
    assert len(found["attention"]) == 2 * (len(ATTENTIONS) + 1)
    for _, op, shape, plan in found["attention"]:
        assert "refused" not in plan
        needed, rows_bytes = plan["workspace_bytes"], 4 * math.prod(shape[:-1])
        if op == "attention":
            assert needed <= MIB
        else:  # sums of each query's row at least, and no matrix of scores to add up in an order that stays
            assert rows_bytes <= needed < rows_bytes * shape[-2] * 4
    assert {precision for precision, *_ in found["epilogues"]} == set(PRECISIONS)
    for precision, residual, plan in found["epilogues"]:
        if precision == "fp32" and residual:
            assert "no plan of the library gives the same bits each time, in this precision" in plan["refused"]
        else:
            assert plan["workspace_bytes"] <= MIB


def test_a_step_for_the_profile_of_a_card(tmp_path: Path) -> None:
    found = asked("step", tmp_path, loading=True)
    assert "asked for plans without the card" in found["status"]
    assert len(found["by_dnn"]) == 2 + 1 + 2, "two forward, one with respect to images, two to weights"
    assert all([scratch_bytes] == workspaces for scratch_bytes, workspaces in found["by_dnn"])
