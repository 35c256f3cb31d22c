"""``brim plan``: what a training would need, without data, weights or the device; exit code 3 when it does not fit."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

import brim
from brim import data, nn
from brim.cli.app import EXIT_BUDGET
from brim.cli.models import build_model, model_config
from brim.cli.settings import TrainSettings, resolve
from brim.cli.train import make_trainer
from brim.errors import DataError
from brim.memory.budget import parse_budget
from brim.models import GPT2, GPT2_SIZES, next_token_loss, resnet18, resnet50
from brim.program.batch import BatchSearch
from brim.program.check import over_budget
from brim.program.plan import Plan
from brim.program.profiles import find_profile, library_status
from brim.train import RunFolder, Trainer
from brim.units import format_bytes

__all__ = ["MODELS", "run"]

MODELS = (*GPT2_SIZES, "resnet18", "resnet50")
"""Networks that are planned by name; anything else is a data set, for the models of ``brim train``."""

# Published data sets need not be there to be planned for: shape of a sample, classes, training and test samples.
_KNOWN_DATA = dict.fromkeys(("mnist", "fashion-mnist"), ((1, 28, 28), 10, 60_000, 10_000))

_TOP_LAYERS = 6
_SEARCH_S = 10.0  # for the largest batch, unless told otherwise
_SETTINGS = {field.name for field in fields(TrainSettings)}


class _Shapes:
    """A dataset of (inputs, class) that only has shapes."""

    def __init__(self, count: int, shape: tuple[int, ...]) -> None:
        self.count, self.shape = count, shape

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return np.zeros(self.shape, np.float32), 0


def run(
    what: str | None,
    flags: Mapping[str, Any],
    device_profile: str | None,
    json_path: Path | None,
    html_path: Path | None,
    search_s: float | None,
    traffic: bool = False,
) -> int:
    """Print the plan; returns the exit code. Errors pass to the caller.

    Arguments:
        what: a model's or data set's name, a .toml file of settings, or the folder of a run.
        flags: settings of ``brim train`` by name.
        device_profile: name of a profile to plan for instead of this machine.
        json_path, html_path: also write the plan there.
        search_s: seconds that the search for the largest batch, or for remedies, may take; 0 leaves it out.
        traffic: print what the step moves, by phase, by op, and its largest instructions.
    """
    if unknown := sorted(set(flags) - _SETTINGS):
        names = ", ".join(f"--{name.replace('_', '-')}" for name in unknown)
        raise ValueError(f"unknown flag {names}; brim plan takes the settings of brim train, see brim train --help")
    if search_s is not None and not search_s >= 0:
        raise ValueError(f"--search: expected seconds, 0 or more, got {search_s!r}")
    if device_profile is not None:
        find_profile(device_profile)
    config = what if what is not None and what.endswith(".toml") else None
    given = dict(flags) if config or what is None else {"dataset": what, **flags}
    if what in GPT2_SIZES:  # the sizes' usual optimizer; a flag wins
        given = {"optimizer": "adamw", "lr": 3e-4, "schedule": "none", "batch_size": 1, **given}
    recorded = None
    if what is not None and (Path(what) / "config.json").is_file():  # a run: what it was trained with
        recorded, given = RunFolder.read_config(what)["settings"], dict(flags)
    settings = resolve(given, config, recorded)
    if device_profile is None:
        brim.set_default_device(settings.device)  # where a model without memory will run
    parse_budget(settings.budget, device_profile or settings.device)
    start_s = time.perf_counter()
    with brim.meta():
        trainer, description, options = _trainer(settings, "dropout" in flags)
    plan = trainer.plan(settings.batch_size, device_profile=device_profile, **options)
    plan.budget = settings.budget
    planned_s = time.perf_counter() - start_s
    limit_bytes = plan.limit_bytes(settings.budget)
    plan = plan.within(limit_bytes)
    fits = limit_bytes is None or plan.peak_bytes <= limit_bytes
    print(f"{settings.dataset}: {description}")
    _print(plan, limit_bytes, settings.budget, planned_s)
    if traffic:
        print(f"\n{plan.programs[0].name}:\n{plan.traffic()}\n")
    if fits and limit_bytes is not None and search_s != 0:
        print(f"largest   {_largest(plan, limit_bytes, _SEARCH_S if search_s is None else search_s)}")
    for path, write in ((json_path, plan.to_json), (html_path, plan.to_html)):
        if path is not None:
            write(path)
            print(f"written   {path}")
    if fits or limit_bytes is None:
        return 0
    print(over_budget(plan, settings.budget, _SEARCH_S if search_s is None else search_s))
    return EXIT_BUDGET


def _trainer(settings: TrainSettings, dropout_given: bool) -> tuple[Trainer, str, dict[str, Any]]:
    """The Trainer as ``brim train`` makes it, what it trains, and further arguments of its ``plan``."""
    options: dict[str, Any] = {}
    loss: Any = None
    if settings.dataset in MODELS:
        model: nn.Module
        if settings.dataset in GPT2_SIZES:
            dropout = settings.dropout if dropout_given else 0.1
            model, loss = GPT2(**GPT2_SIZES[settings.dataset], dropout=dropout), next_token_loss
        else:
            model = {"resnet18": resnet18, "resnet50": resnet50}[settings.dataset]()
    else:
        shape, classes, train, test = _data(settings)
        model = build_model(model_config(settings.model, settings.hidden_sizes, settings.dropout, shape, classes))
        options = {"data": _Shapes(train, shape), "validation": _Shapes(test, shape)}
    trainer = make_trainer(settings, model, None, loss)
    count = sum(p.size for p in model.parameters())
    name = type(trainer.optimizer).__name__
    return trainer, f"{count:,} parameters, batch {settings.batch_size:,}, {name}", options


def _data(settings: TrainSettings) -> tuple[tuple[int, ...], int, int, int]:
    """Shape of a sample, classes, training and test samples."""
    if settings.dataset in _KNOWN_DATA:
        return _KNOWN_DATA[settings.dataset]
    if not Path(settings.dataset).suffix and settings.dataset not in data.DATASETS:
        known = ", ".join(dict.fromkeys([*MODELS, *data.DATASETS, *_KNOWN_DATA]))
        raise ValueError(f"{settings.dataset!r} is no model or data set; known are {known}, a .csv, .npz or .toml file")
    train, test = data.load(settings.dataset, settings.data)
    if train.num_classes is None:
        raise DataError(f"{settings.dataset}: the models of brim train need classes as targets")
    return train.input_shape, train.num_classes, len(train), len(test)


def _print(plan: Plan, limit_bytes: int | None, budget: str, planned_s: float) -> None:
    exact = "estimated" if plan.estimated else "exact"
    if plan.estimated:
        profile = find_profile(plan.profile or "")
        print(f"device    {profile.title}, {format_bytes(profile.memory_bytes)}; {profile.note}")
        print("          estimated: its size and overhead")
        if status := library_status(profile.name):
            print(f"          cuDNN: {status}")
    print(f"peak      {format_bytes(plan.peak_bytes)} ({exact}) on {plan.device}")
    print(f"at        {plan.peak_at}")
    print(f"by kind   {' | '.join(f'{kind} {format_bytes(nbytes)}' for kind, nbytes in plan.by_kind().items())}")
    layers = [(name or "no layer", sum(row.values())) for name, row in plan.by_layer()]
    shown = [f"{name} {format_bytes(nbytes)}" for name, nbytes in layers[:_TOP_LAYERS]]
    if rest := sum(nbytes for _, nbytes in layers[_TOP_LAYERS:]):
        shown.append(f"{len(layers) - _TOP_LAYERS} more {format_bytes(rest)}")
    print(f"by layer  {' · '.join(shown)}")
    programs = ", ".join(f"{p.name} {format_bytes(p.arena_bytes)}" for p in plan.programs)
    print(f"arena     {format_bytes(plan.arena_bytes)}: {programs}")
    print(f"traffic   {plan.traffic().summary()}")
    print(f"planned   in {planned_s:.1f} s, nothing was allocated; plan {plan.hash}")
    if limit_bytes is None:
        print("verdict   no budget")
        return
    declared = format_bytes(limit_bytes) + ("" if parse_budget(budget, plan.device).kind == "bytes" else f" ({budget})")
    if plan.peak_bytes <= limit_bytes:
        print(f"verdict   fits {declared}, {format_bytes(limit_bytes - plan.peak_bytes)} to spare")
    else:
        print(f"verdict   does not fit {declared}, {format_bytes(plan.peak_bytes - limit_bytes)} too much")


def _largest(plan: Plan, limit_bytes: int, search_s: float) -> str:
    deadline_s = time.monotonic() + search_s
    search = BatchSearch(plan, limit_bytes, lambda one: one.least_bytes, lambda: time.monotonic() >= deadline_s)
    try:
        found = search.run()
    except ValueError:
        return "batch: not searched, the step takes batches of one size"
    if found is None:
        return f"batch: not found in {search_s:g} s; --search 60 takes longer"
    more = search.known.get(found + 1)
    beyond = f" ({found + 1:,} needs {format_bytes(more)})" if more is not None else ""
    return f"batch {found:,}{beyond}"
