"""``brim train``: data, model, optimizer and Trainer from settings; what is printed, and what a refusal leaves."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import brim
from brim import data, optim
from brim.cli.app import EXIT_INTERRUPTED
from brim.cli.models import build_model, model_config
from brim.cli.settings import TrainSettings, resolve
from brim.data import transform_config
from brim.errors import BudgetExceeded, DataError
from brim.memory.budget import parse_budget
from brim.program.check import over_budget
from brim.train import RunFolder, Trainer
from brim.units import format_bytes, format_duration

__all__ = ["make_trainer", "run"]


def run(flags: Mapping[str, Any], config: str | None) -> int:
    """Train; returns the exit code. Errors pass to the caller."""
    start_s = time.perf_counter()
    settings = resolve(flags, config)
    if settings.resume and settings.out and (Path(settings.out) / "config.json").exists():
        recorded = RunFolder.read_config(settings.out)["settings"]
        settings = resolve(flags, config, recorded)
    out = _folder(settings)
    device = brim.device(settings.device)
    budget = parse_budget(settings.budget, device.name)
    train, test = data.load(settings.dataset, settings.data)
    if train.num_classes is None:
        raise DataError(f"{settings.dataset}: brim train needs classes as targets, got {train.arrays[-1].dtype} values")
    shape = model_config(settings.model, settings.hidden_sizes, settings.dropout, train.input_shape, train.num_classes)
    record = {
        "settings": settings.as_dict(),
        "model": shape,
        "transform": transform_config(train.transforms[0]),
        "class_names": None if train.class_names is None else list(train.class_names),
        "brim": brim.__version__,
    }
    try:
        with device.memory.lowered(budget):
            brim.manual_seed(settings.seed)
            brim.set_default_device(device)
            try:
                model = build_model(shape)
            except BudgetExceeded as error:
                raise _whole_refusal(settings, shape, train, test, error) from None
            print(f"{settings.dataset}: {len(train):,} training and {len(test):,} test samples of {train.input_shape}")
            trainer = make_trainer(settings, model, device)
            trainer.fit(
                train,
                settings.epochs,
                validation=test,
                batch_size=settings.batch_size,
                out=out,
                resume=settings.resume,
                checkpoint_every=settings.checkpoint_every,
                config=record,
            )
            limit_bytes = device.memory.limit_bytes
    except BudgetExceeded as error:
        RunFolder(out).log(str(error))
        raise
    _report(trainer, device.memory.stats()["peak_bytes"], limit_bytes, out, time.perf_counter() - start_s)
    return EXIT_INTERRUPTED if trainer.interrupted else 0


def _whole_refusal(
    settings: TrainSettings, shape: Mapping[str, Any], train: Any, test: Any, error: BudgetExceeded
) -> BudgetExceeded:
    """The refusal of the whole training, planned without memory, in place of that of the model's first large array."""
    with brim.meta():
        trainer = make_trainer(settings, build_model(shape), None)
    plan = trainer.plan(settings.batch_size, data=train, validation=test)
    return over_budget(plan, settings.budget) or error


def _folder(settings: TrainSettings) -> Path:
    if settings.out is None:
        stem = Path(settings.dataset).stem
        return Path("runs") / f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    out = Path(settings.out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out}: is a file, expected a folder")
    if not settings.resume and (out / "config.json").exists():
        raise ValueError(f"--out {out}: holds a run already; continue it with --resume, or name another folder")
    return out


def make_trainer(settings: TrainSettings, model: Any, device: Any, loss: Any = None) -> Trainer:
    """The Trainer of a run, with the optimizer and schedule that the settings name.

    Arguments:
        device: where the model is moved; None leaves it where it is.
        loss: cross-entropy of classes when None; there is no accuracy otherwise.
    """
    lr, decay = settings.lr, settings.weight_decay
    params = model.parameters()
    if settings.optimizer == "sgd":
        optimizer: Any = optim.SGD(
            params, lr, settings.momentum, weight_decay=decay, hypergradient=settings.hypergradient
        )
    elif settings.optimizer == "rmsprop":
        optimizer = optim.RMSprop(params, lr, momentum=settings.momentum, weight_decay=decay)
    else:
        kind = optim.Adam if settings.optimizer == "adam" else optim.AdamW
        optimizer = kind(params, lr, weight_decay=decay)
    schedule = optim.CosineAnnealingLR(optimizer, settings.epochs) if settings.schedule == "cosine" else None
    return Trainer(
        model,
        optimizer,
        loss,
        metrics=("accuracy",) if loss is None else (),
        schedule=schedule,
        clip_norm=settings.clip_norm,
        seed=settings.seed,
        device=device,
        fit=None if settings.fit == "none" else settings.fit,  # type: ignore[arg-type]
        recompute=[name.strip() for name in settings.recompute.split(",") if name.strip()],
        activations=None if settings.activations == "none" else settings.activations,
        precision=settings.precision,  # type: ignore[arg-type]
    )


def _report(trainer: Trainer, peak_bytes: int, limit_bytes: int | None, out: Path, elapsed_s: float) -> None:
    if trainer.history:
        print(f"test accuracy  {trainer.history[-1]['val_accuracy']:.4f}")
    of = f" of {format_bytes(limit_bytes)}" if limit_bytes is not None else " (no budget)"
    print(f"peak memory    {format_bytes(peak_bytes)}{of}")
    print(f"time           {format_duration(elapsed_s)}")
    print(f"run folder     {out}", flush=True)
