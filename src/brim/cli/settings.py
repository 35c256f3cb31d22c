"""Settings of ``brim train`` and ``brim plan``: flags over environment over TOML over the resumed run over defaults.

They are checked here.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

__all__ = ["TrainSettings", "resolve"]


@dataclass(frozen=True)
class TrainSettings:
    """Every hyper-parameter of a run with its default."""

    dataset: str = ""
    model: str = "mlp"
    hidden: str = "256,256"
    dropout: float = 0.2
    batch_size: int = 128
    epochs: int = 5
    lr: float = 0.1
    optimizer: str = "sgd"
    momentum: float = 0.9
    weight_decay: float = 0.0
    hypergradient: float | None = None
    schedule: str = "cosine"  # "none" where the rate is learned
    clip_norm: float | None = None
    fit: str = "none"
    recompute: str = ""
    activations: str = "none"
    precision: str = "fp32"
    seed: int = 0
    device: str = "cpu"
    budget: str = "auto"
    data: str | None = None
    out: str | None = None
    resume: bool = False
    checkpoint_every: int | None = None

    @property
    def hidden_sizes(self) -> list[int]:
        """The widths of ``hidden`` as integers."""
        return [int(width) for width in self.hidden.split(",") if width.strip()]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for config.json."""
        return asdict(self)


_CHOICES = {
    "model": ("mlp", "cnn"),
    "optimizer": ("sgd", "adam", "adamw", "rmsprop"),
    "schedule": ("none", "cosine"),
    "fit": ("none", "recompute", "microbatch"),
    "activations": ("none", "bfloat16"),
    "precision": ("fp32", "bf16", "fp16", "tf32"),
}
_AT_LEAST = {"batch_size": 1, "epochs": 1, "lr": 0, "momentum": 0, "weight_decay": 0, "hypergradient": 0, "seed": 0}
_ABOVE_ZERO = ("clip_norm", "checkpoint_every")
_NOT_KEPT = ("resume", "out", "data", "device", "budget", "checkpoint_every", "fit")  # a resumed run may have others
_FIELDS = {field.name: field for field in fields(TrainSettings)}


def resolve(
    flags: Mapping[str, Any],
    config: str | None = None,
    recorded: Mapping[str, Any] | None = None,
    environ: Mapping[str, str] = os.environ,
) -> TrainSettings:
    """The settings in force. Raises ValueError with one line for a bad one."""
    values: dict[str, Any] = {}
    for name, value in (recorded or {}).items():
        if name in _FIELDS and name not in _NOT_KEPT:
            values[name] = value
    path = config or environ.get("BRIM_CONFIG")
    for name, value in (_read_toml(path) if path else {}).items():
        values[name] = _typed(name, value, f"{name} in {path}")
    for name in _FIELDS:
        if (text := environ.get(f"BRIM_{name.upper()}")) is not None and text != "":
            values[name] = _typed(name, text, f"BRIM_{name.upper()}")
    for name, value in flags.items():
        values[name] = _typed(name, value, "DATASET" if name == "dataset" else f"--{name.replace('_', '-')}")
    if values.get("hypergradient") is not None:
        values.setdefault("schedule", "none")
    settings = TrainSettings(**values)
    if not settings.dataset:
        raise ValueError("which data set? As in: brim train digits (or fashion-mnist, mnist, a .csv or .npz file)")
    if settings.resume and not settings.out:
        raise ValueError("--resume needs --out, the folder of the run to continue")
    if settings.hypergradient is not None and (settings.optimizer != "sgd" or settings.schedule != "none"):
        raise ValueError("--hypergradient learns the rate of --optimizer sgd, without a --schedule")
    return settings


def _read_toml(path: str) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            table = tomllib.load(file)
    except OSError as error:
        raise ValueError(f"--config {path}: {error.strerror or error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"--config {path}: {error}") from error
    table = {**{k: v for k, v in table.items() if k != "train"}, **table.get("train", {})}
    table = {name.replace("-", "_"): value for name, value in table.items()}
    if unknown := sorted(set(table) - set(_FIELDS)):
        raise ValueError(f"{path}: unknown settings {', '.join(unknown)}; known are {', '.join(_FIELDS)}")
    for name in ("data", "out"):  # relative to the file that names them
        if isinstance(table.get(name), str):
            table[name] = str(Path(path).parent / table[name])
    return table


def _typed(name: str, value: Any, source: str) -> Any:
    """A value of the field's type and range, or ValueError naming its source."""
    kind = str(_FIELDS[name].type).removesuffix(" | None")
    if name in ("hidden", "recompute") and isinstance(value, list):
        value = ",".join(map(str, value))
    try:
        if kind == "bool":
            typed: Any = _truth(value)
        elif kind == "int":
            typed = int(value) if isinstance(value, str) else value
            if isinstance(typed, bool) or typed != int(typed):
                raise ValueError
        elif kind == "float":
            typed = float(value)
        else:
            typed = str(value)
    except (TypeError, ValueError):
        noun = {"bool": "true or false", "int": "a whole number", "float": "a number"}[kind]
        raise ValueError(f"{source}: expected {noun}, got {value!r}") from None
    if name in _CHOICES and typed not in _CHOICES[name]:
        raise ValueError(f"{source}: expected {' or '.join(_CHOICES[name])}, got {typed!r}")
    if name == "dropout" and not 0 <= typed < 1:
        raise ValueError(f"{source}: expected a share of at least 0 and below 1, got {typed!r}")
    if name in _AT_LEAST and not _AT_LEAST[name] <= typed < float("inf"):
        raise ValueError(f"{source}: expected a finite number of at least {_AT_LEAST[name]}, got {typed!r}")
    if name in _ABOVE_ZERO and not typed > 0:
        raise ValueError(f"{source}: expected a number above 0, got {typed!r}")
    if name == "hidden" and not all(w.strip().isdecimal() and int(w) > 0 for w in typed.split(",") if typed):
        raise ValueError(f"{source}: expected widths such as 256,128, got {typed!r}")
    return typed


def _truth(value: Any) -> bool:
    words = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
    if isinstance(value, bool):
        return value
    if str(value).lower() not in words:
        raise ValueError
    return words[str(value).lower()]
