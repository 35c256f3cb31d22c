"""``brim predict``: a run's model on the samples of a file."""

from __future__ import annotations

import csv
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np

from brim import data
from brim.cli.models import build_model
from brim.data import transform_from_config
from brim.errors import DataError
from brim.io import atomic_write, load_arrays
from brim.nn import CrossEntropyLoss
from brim.optim import SGD
from brim.train import RunFolder, Trainer

__all__ = ["run"]


def run(run_folder: Path, input_file: Path, out: Path | None, batch_size: int) -> int:
    """Print or write class and probability of every sample; returns the exit code."""
    if batch_size < 1:
        raise ValueError(f"--batch-size: expected 1 or more, got {batch_size}")
    if out is not None and out.suffix not in (".csv", ".npz"):
        raise ValueError(f"--out {out}: expected a name that ends in .csv or .npz")
    config = RunFolder.read_config(run_folder)
    inputs = _inputs(input_file, tuple(config["model"]["input_shape"]))
    transform = transform_from_config(config["transform"])
    if transform is not None:
        inputs = transform(inputs)
    model = build_model(config["model"])
    arrays, _ = load_arrays(run_folder / "model.safetensors")
    model.load_state_dict(arrays)
    trainer = Trainer(model, SGD(model.parameters(), lr=0.0), CrossEntropyLoss(), progress=False)
    scores = trainer.predict(inputs.astype(np.float32, copy=False), batch_size).astype(np.float64)
    scores = np.exp(scores - scores.max(axis=1, keepdims=True))
    probabilities = scores / scores.sum(axis=1, keepdims=True)
    _write(out, probabilities, config["class_names"])
    return 0


def _inputs(path: Path, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """The samples of a file in the model's shape; a column or array more is taken as the targets and left out."""
    size = math.prod(shape)
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as file:
            names = [name for name in ("x", "x_test", "inputs", "X", *file.files) if name in file.files]
            if not names:
                raise DataError(f"{path}: holds no array")
            found = file[names[0]]
    else:
        rows = data.read_csv(path, target=None).arrays
        found = rows[0]
    if found.ndim == 2 and found.shape[1] == size + 1 and path.suffix != ".npz":
        found = found[:, :size]
    if found.ndim < 1 or not len(found) or found.size != len(found) * size:
        raise DataError(f"{path}: expected samples of shape {shape} ({size} values each), got an array {found.shape}")
    return found.reshape(len(found), *shape)


def _write(out: Path | None, probabilities: np.ndarray[Any, Any], names: list[str] | None) -> None:
    classes = probabilities.argmax(axis=1)
    if out is not None and out.suffix == ".npz":
        with atomic_write(out) as file:
            np.savez(file, classes=classes, probabilities=probabilities)
        return
    lines = [["sample", "class", "probability"]]
    for i, k in enumerate(classes):
        lines.append([str(i), str(k) if names is None else names[k], f"{probabilities[i, k]:.4f}"])
    if out is None:
        csv.writer(sys.stdout, lineterminator="\n").writerows(lines)
        return
    with atomic_write(out, "w") as file:
        csv.writer(file, lineterminator="\n").writerows(lines)
