"""The models that ``brim train`` builds, from plain numbers that a run's config.json records."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from brim import nn

__all__ = ["build_model", "model_config"]

_CHANNELS = (32, 64)


def model_config(
    name: str, hidden: list[int], dropout: float, input_shape: tuple[int, ...], num_classes: int
) -> dict[str, Any]:
    """What ``build_model`` needs. Raises ValueError for a model that the inputs do not fit."""
    if name == "cnn" and (len(input_shape) != 3 or min(input_shape[1:]) < 4):
        raise ValueError(f"--model cnn needs images (C, H, W) of at least 4x4 pixels, the inputs are {input_shape}")
    return {
        "name": name,
        "hidden": hidden,
        "dropout": dropout,
        "input_shape": list(input_shape),
        "num_classes": num_classes,
    }


def build_model(config: Mapping[str, Any]) -> nn.Module:
    """An MLP, or two blocks of convolution before it; batch norm, ReLU and dropout after every hidden layer."""
    layers: list[nn.Module] = []
    shape = config["input_shape"]
    if config["name"] == "cnn":
        channels, height, width = shape
        for out_channels in _CHANNELS:
            layers += [nn.Conv2d(channels, out_channels, 3, padding=1, bias=False), nn.BatchNorm2d(out_channels)]
            layers += [nn.ReLU(), nn.MaxPool2d(2)]
            channels, height, width = out_channels, height // 2, width // 2
        shape = (channels, height, width)
    features = math.prod(shape)
    layers.append(nn.Flatten())
    for size in config["hidden"]:
        layers += [nn.Linear(features, size), nn.BatchNorm1d(size), nn.ReLU()]
        if config["dropout"]:
            layers.append(nn.Dropout(config["dropout"]))
        features = size
    layers.append(nn.Linear(features, config["num_classes"]))
    return nn.Sequential(*layers)
