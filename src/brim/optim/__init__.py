"""Optimizers, learning-rate schedules and gradient clipping, with PyTorch's names and defaults."""

from brim.optim.adam import Adam, AdamW
from brim.optim.clip import clip_grad_norm_, clip_grad_value_
from brim.optim.grad_scaler import GradScaler
from brim.optim.optimizer import Optimizer
from brim.optim.rmsprop import RMSprop
from brim.optim.schedules import (
    CosineAnnealingLR,
    ExponentialLR,
    LinearWarmup,
    MultiStepLR,
    OneCycleLR,
    ReduceLROnPlateau,
    Schedule,
    StepLR,
)
from brim.optim.sgd import SGD

__all__ = [
    "SGD",
    "Adam",
    "AdamW",
    "CosineAnnealingLR",
    "ExponentialLR",
    "GradScaler",
    "LinearWarmup",
    "MultiStepLR",
    "OneCycleLR",
    "Optimizer",
    "RMSprop",
    "ReduceLROnPlateau",
    "Schedule",
    "StepLR",
    "clip_grad_norm_",
    "clip_grad_value_",
]
