"""``brim plan``: the same training as ``brim train`` runs, planned without data, weights or the device."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import brim
from brim.cli import main
from brim.io import read_json
from brim.program import fit
from brim.units import format_bytes


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in list(os.environ):
        if name.startswith("BRIM_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fit, "SEARCH_TIME_S", 0.3)


def test_it_plans_what_train_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["digits", "--hidden", "64,32", "--batch-size", "100", "--optimizer", "adam", "--lr", "0.01"]
    flags += ["--clip-norm", "1", "--budget", "64MiB"]
    live = brim.memory_stats("cpu")["live_bytes"]
    assert main(["plan", *flags, "--json", "plan.json", "--html", "plan.html"]) == 0
    assert brim.memory_stats("cpu")["live_bytes"] <= live
    said = capsys.readouterr().out
    for words in ("digits: ", "parameters, batch 100, Adam", "(exact) on cpu", "by kind", "by layer", "fits 64.0 MiB"):
        assert words in said
    assert re.search(r"traffic   \d+ kernels \(at least 18\), .* times the least", said)
    assert re.search(r"largest   batch [\d,]+ \([\d,]+ needs 64\.0 MiB\)", said)
    document = json.loads((tmp_path / "plan.json").read_text())
    assert document["budget_bytes"] == 64 * 2**20
    names = [program["name"] for program in document["programs"]]
    assert names == ["training step", "last batch", "evaluation", "last evaluation batch"]
    assert (tmp_path / "plan.html").read_text().startswith("<!doctype html>")
    assert main(["train", *flags, "--epochs", "1", "--out", "run"]) == 0
    summary = read_json(tmp_path / "run/summary.json")
    assert summary["planned_peak_bytes"] == document["peak_bytes"] == sum(document["peak_by_kind"].values())
    assert f"peak {format_bytes(document['peak_bytes'])} of 64.0 MiB; batch" in capsys.readouterr().out
    assert main(["plan", "run", "--search", "0", "--json", "again.json"]) == 0
    assert json.loads((tmp_path / "again.json").read_text())["peak_bytes"] == document["peak_bytes"]


def test_traffic_as_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["digits", "--hidden", "64", "--batch-size", "100", "--search", "0"]
    assert main(["plan", *flags]) == 0
    short = capsys.readouterr().out
    assert "training step:\nphase" not in short
    assert main(["plan", *flags, "--traffic", "--json", "plan.json"]) == 0
    said = capsys.readouterr().out
    assert "training step:\nphase" in said
    assert "Gflop" in said
    traffic = json.loads(Path("plan.json").read_text())["programs"][0]["traffic"]
    (line,) = (line for line in short.splitlines() if line.startswith("traffic"))
    assert f"{traffic['launches']} kernels (at least {traffic['least_launches']})" in line
    assert f"the least ({format_bytes(traffic['least_bytes'])})" in line


def test_what_does_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["fashion-mnist", "--hidden", "256", "--batch-size", "4096"]
    assert main(["plan", *flags, "--budget", "20MiB"]) == 3
    said = capsys.readouterr().out
    assert "verdict   does not fit 20.0 MiB" in said
    assert "training step needs" in said
    assert "micro-batches of 2048 ->" in said
    found = re.search(r"batch (\d+) instead of 4096 ->", said)
    assert found is not None
    assert "largest" not in said.split("verdict")[1].split("training step needs")[0]
    smaller = [*flags[:3], "--batch", found[1], "--search", "0", "--budget", "20MiB"]
    assert main(["plan", *smaller]) == 0
    assert main(["plan", *smaller[:4], str(int(found[1]) + 1), *smaller[5:]]) == 3


def test_settings_from_a_file_and_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.toml").write_text(
        'dataset = "fashion-mnist"\nbatch_size = 1024\nbudget = "1GiB"\nhidden = [256, 256, 256]\n'
    )
    assert main(["plan", "run.toml", "--search", "0"]) == 0
    plain = _peak_bytes(capsys.readouterr().out)
    assert main(["plan", "run.toml", "--search", "0", "--activations", "bfloat16"]) == 0
    half = _peak_bytes(capsys.readouterr().out)
    assert main(["plan", "run.toml", "--search", "0", "--recompute", "0..9"]) == 0
    again = _peak_bytes(capsys.readouterr().out)
    assert half < plain
    assert again < plain
    assert main(["plan", "run.toml", "--batch", "1500", "--search", "0"]) == 0
    assert _peak_bytes(capsys.readouterr().out) > plain


def _peak_bytes(said: str) -> float:
    number, unit = re.search(r"peak      ([\d.]+) (\w+)", said).groups()  # type: ignore[union-attr]
    return float(number) * {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}[unit]


def test_networks_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "resnet18", "--batch", "8", "--device-profile", "h100-80gb", "--search", "0"]) == 0
    said = capsys.readouterr().out
    for words in (
        "11,689,512 parameters, batch 8, SGD",
        "H100 80 GB",
        "(estimated) on h100-80gb",
        "overhead 600.0 MiB",
    ):
        assert words in said
    assert main(["plan", "gpt2", "--device-profile", "t4-16gb", "--search", "0", "--budget", "1GiB"]) == 3
    said = capsys.readouterr().out
    assert "124,439,808 parameters, batch 1, AdamW" in said


def test_a_large_network_takes_little_memory() -> None:
    code = (
        "import resource\nfrom brim.cli import main\nimport brim.cli.plan\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "assert main(['plan', 'resnet50', '--batch', '256', '--budget', '80GiB', '--search', '0']) == 0\n"
        "print('grew', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    if sys.platform != "linux":
        pytest.skip("ru_maxrss is in KiB on Linux only")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "verdict   fits 80.0 GiB" in done.stdout
    assert int(done.stdout.split("grew")[1]) < 100 * 1024


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["gpt3"],
        ["digits", "--hidden", "12,a"],
        ["digits", "--nonsense", "1"],
        ["digits", "--budget", "6G"],
        ["digits", "--batch", "0"],
        ["digits", "--device-profile", "h100"],
        ["digits", "--device", "abacus"],
        ["digits", "--search", "-1"],
        ["digits", "--fit", "smaller"],
        ["digits", "--recompute", "nothing"],
        ["missing.toml"],
        ["missing.csv"],
    ],
)
def test_bad_values(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *words]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("brim: ")
    assert len(said.err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--help"]) == 0
    said = capsys.readouterr().out
    assert "--device-profile" in said
    assert len(said.splitlines()) <= 40
