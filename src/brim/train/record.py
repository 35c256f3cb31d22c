"""What a run records of a Trainer: its settings in config.json, what came of it in summary.json. Plain values only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from brim.train.trainer import Trainer

__all__ = ["describe_results", "describe_settings"]


def describe_settings(trainer: Trainer, epochs: int, batch_size: int | None) -> dict[str, Any]:
    """Every hyper-parameter of a Trainer."""
    groups = [{k: v for k, v in g.items() if k != "params"} for g in trainer.optimizer.param_groups]
    return {
        "epochs": epochs,
        "batch_size": batch_size,
        "seed": trainer.seed,
        "device": str(trainer.device),
        "budget": str(trainer.device.memory.budget if trainer.budget is None else trainer.budget),
        "clip_norm": trainer.clip_norm,
        "accumulate": trainer.accumulate,
        "metrics": list(trainer.metrics),
        **trainer.options,
        "optimizer": {"name": type(trainer.optimizer).__name__, "groups": groups},
        "schedule": None if trainer.schedule is None else type(trainer.schedule).__name__,
        "loss": repr(trainer.loss),
        "architecture": repr(trainer.model),
    }


def describe_results(trainer: Trainer, best: float | None) -> dict[str, Any]:
    """What a training came to, and the memory that it was planned to need and has held."""
    stats, plan = trainer.device.memory.stats(), trainer.planned
    return {
        "epochs": trainer.epoch,
        "steps": trainer.step,
        "final": trainer.history[-1] if trainer.history else {},
        "best": best,
        "stopped": trainer.stopped,
        "peak_bytes": stats["peak_bytes"],
        "peak_by_kind": stats["peak_by_kind"],
        "limit_bytes": stats["limit_bytes"],
        "planned_peak_bytes": None if plan is None else plan.peak_bytes,
        "planned_by_kind": None if plan is None else plan.by_kind(),
        "plan_hash": None if plan is None else plan.hash,
        "training_s": trainer.elapsed_s,
    }
