"""The command brim: exit codes, precedence, run folders, prediction, resume after SIGKILL."""

from __future__ import annotations

import csv
import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from brim import data
from brim.cli import main
from brim.cli.settings import TrainSettings, resolve
from brim.io import list_checkpoints, load_arrays, read_json

SMALL = ["--hidden", "32", "--epochs", "2", "--batch-size", "64"]


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in list(os.environ):
        if name.startswith("BRIM_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def test_train_and_predict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "digits", *SMALL, "--budget", "256MiB", "--out", "run"]) == 0
    printed = capsys.readouterr().out
    for words in ("test accuracy", "peak memory", "of 256.0 MiB", "run folder"):
        assert words in printed
    config, summary = read_json(tmp_path / "run/config.json"), read_json(tmp_path / "run/summary.json")
    assert config["settings"]["hidden"] == "32"
    assert set(config["settings"]) == set(TrainSettings().as_dict())
    assert 0 < summary["peak_bytes"] <= 256 * 2**20
    _, test = data.load_digits()
    np.savez(tmp_path / "in.npz", x=test.field(0))
    np.savetxt(tmp_path / "in.csv", test.field(0).reshape(-1, 64), delimiter=",", fmt="%d")
    capsys.readouterr()
    assert main(["predict", "run", "in.npz"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    right = np.mean([int(row["class"]) == label for row, label in zip(rows, test.field(1), strict=True)])
    assert right == pytest.approx(summary["final"]["val_accuracy"])
    assert main(["predict", "run", "in.csv", "--out", "out.csv"]) == 0
    assert list(csv.DictReader(io.StringIO((tmp_path / "out.csv").read_text()))) == rows
    assert main(["predict", "run", "in.npz", "--out", "out.npz"]) == 0
    assert np.load(tmp_path / "out.npz")["probabilities"].shape == (360, 10)
    assert main(["train", "digits", *SMALL, "--out", "run"]) == 2  # would overwrite
    assert "--resume" in capsys.readouterr().err


def test_default_folder(tmp_path: Path) -> None:
    assert main(["train", "digits", "--hidden", "8", "--epochs", "1"]) == 0
    (run,) = (tmp_path / "runs").iterdir()
    assert run.name.startswith("digits-")


def test_budget_exceeded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "digits", "--budget", "300KiB", "--out", "run"]) == 3
    assert "budget" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["log.txt"]
    # The model fits, its first step does not.
    assert main(["train", "digits", "--hidden", "64", "--batch-size", "1024", "--budget", "600KiB", "--out", "b"]) == 3
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["log.txt"]
    # 1.4 TiB is refused, not attempted.
    assert main(["train", "digits", "--hidden", "600000,600000", "--out", "run"]) == 3
    assert main(["train", "digits", *SMALL, "--budget", "64MiB", "--out", "run"]) == 0


@pytest.mark.parametrize(
    "words",
    [
        ["digits", "--lr", "x"],
        ["digits", "--lr", "-1"],
        ["digits", "--epochs", "0"],
        ["digits", "--dropout", "1"],
        ["digits", "--hidden", "12,a"],
        ["digits", "--model", "transformer"],
        ["digits", "--optimizer", "sdg"],
        ["digits", "--budget", "lots"],
        ["digits", "--device", "abacus"],
        ["digits", "--config", "missing.toml"],
        ["digits", "--hypergradient", "0.1", "--schedule", "cosine"],
        ["digits", "--nonsense", "1"],
        ["digits", "--resume"],
        ["no-such-data"],
        [],
    ],
)
def test_bad_values(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *words]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("brim: ")
    assert len(said.err.splitlines()) == 1
    assert not said.out
    assert not list(tmp_path.iterdir())


def test_precedence(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("lr = 0.3\nepochs = 9\nseed = 4\nhidden = [7, 8]\n")
    environ = {"BRIM_LR": "0.2", "BRIM_EPOCHS": "8", "BRIM_BATCH_SIZE": "16"}
    settings = resolve({"dataset": "digits", "lr": 0.1}, "run.toml", {"seed": 3, "dropout": 0.7}, environ)
    found = (settings.lr, settings.epochs, settings.seed, settings.dropout, settings.batch_size, settings.momentum)
    assert found == (0.1, 8, 4, 0.7, 16, TrainSettings().momentum)
    assert settings.hidden_sizes == [7, 8]
    (tmp_path / "bad.toml").write_text("rate = 1\n")
    with pytest.raises(ValueError, match="rate"):
        resolve({"dataset": "digits"}, "bad.toml", None, {})
    with pytest.raises(ValueError, match="BRIM_LR"):
        resolve({"dataset": "digits"}, None, None, {"BRIM_LR": "fast"})


def test_info_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    for word in ("numpy", "threads", "memory", "cpu", "h100-80gb"):
        assert word in printed
    for words in (["--help"], ["train", "--help"], ["predict", "--help"]):
        assert main(words) == 0
        assert 5 < len(capsys.readouterr().out.splitlines()) <= 40


def test_module_exit_code() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "brim", "train", "digits", "--lr", "x"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "--lr" in done.stderr


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
def test_resume_after_sigkill(tmp_path: Path) -> None:
    flags = ["digits", "--hidden", "32", "--epochs", "4", "--batch-size", "32", "--schedule", "cosine"]
    flags += ["--checkpoint-every", "7"]
    assert main(["train", *flags, "--out", "whole"]) == 0
    for saved in (1, 4, 9):
        child = subprocess.Popen(
            [sys.executable, "-m", "brim", "train", *flags, "--out", f"cut{saved}"], stdout=subprocess.DEVNULL
        )
        deadline_s = time.monotonic() + 60
        while child.poll() is None and time.monotonic() < deadline_s:
            newest = list_checkpoints(tmp_path / f"cut{saved}")[:1]
            if newest and int(newest[0].name[:6]) >= saved:
                break
            time.sleep(0.002)
        child.kill()
        child.wait()
        assert main(["train", "digits", "--out", f"cut{saved}", "--resume"]) == 0
        whole, _ = load_arrays(tmp_path / "whole/model.safetensors")
        cut, _ = load_arrays(tmp_path / f"cut{saved}/model.safetensors")
        assert all(np.array_equal(whole[name], cut[name]) for name in whole)
        runs = [read_json(tmp_path / run / "summary.json")["final"] for run in ("whole", f"cut{saved}")]
        assert runs[0] == runs[1]
