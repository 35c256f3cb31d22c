"""The Trainer: the loop around a model, with metrics, callbacks, checkpoints, progress and run folders."""

from brim.train.callbacks import Callback, EarlyStopping
from brim.train.metrics import METRICS, accuracy, mean_absolute_error, top5_accuracy
from brim.train.run_folder import RunFolder
from brim.train.trainer import Trainer

__all__ = [
    "METRICS",
    "Callback",
    "EarlyStopping",
    "RunFolder",
    "Trainer",
    "accuracy",
    "mean_absolute_error",
    "top5_accuracy",
]
