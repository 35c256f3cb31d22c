"""Accuracies over seeds: a network learns the digits in each way, a seed repeats itself, the table adds up."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import brim
from brim_bench import accuracy


@pytest.fixture(autouse=True)
def _precision_as_before() -> Iterator[None]:
    yield
    brim.set_conv_precision("exact")


def test_the_same_seed_trains_the_same_network_and_it_learns() -> None:
    arrays = accuracy._load(None)
    one, again = (accuracy.train("mlp", 0, 2, arrays, "exact") for _ in range(2))
    assert one["accuracy"] == again["accuracy"] > 0.8
    assert one["loss"] == again["loss"]
    assert accuracy.train("mlp", 1, 2, arrays, "exact")["loss"] != one["loss"]


def test_convolutions_take_the_precision_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    arrays, asked = [one[:256] for one in accuracy._load(None)], list[str]()
    monkeypatch.setattr(brim, "set_conv_precision", asked.append)
    assert accuracy.train("cnn", 0, 1, arrays, "fast")["loss"] > 0
    assert asked == ["fast"]


def test_the_table_has_means_ranges_and_differences() -> None:
    runs = [
        {"model": "mlp", "way": way, "seed": seed, "accuracy": value + seed / 100}
        for way, value in zip(accuracy.WAYS, (0.9, 0.8, 0.85), strict=True)
        for seed in (0, 1)
    ]
    rows = accuracy.summary(runs)
    assert [row["way"] for row in rows] == list(accuracy.WAYS)
    assert [round(row["mean"], 6) for row in rows] == [0.905, 0.805, 0.855]
    assert [round(row["difference"], 6) for row in rows] == [0.05, -0.05, 0.0]
    assert "-5.00" in accuracy._text(rows)


def test_every_way_is_a_process_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "found.json"
    flags = ["--seeds", "1", "--epochs", "mlp=1", "--samples", "mlp=256", "--threads", "1", "--json", str(path)]
    monkeypatch.setattr(sys, "argv", ["accuracy", *flags])
    accuracy.main()
    found = json.loads(path.read_text())
    assert [run["way"] for run in found["runs"]] == list(accuracy.WAYS)
    assert "points from NumPy" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", ["mlp=x", "rnn=1", "mlp=0", "mlp"])
def test_bad_numbers_are_refused(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["accuracy", "--epochs", wrong])
    with pytest.raises(SystemExit):
        accuracy.main()
