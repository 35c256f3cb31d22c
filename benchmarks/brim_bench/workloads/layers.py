"""Single layers, forward and backward: norms, dropout, convolution, max pooling.

A run computes the layer's result and, from a given gradient of it, those of the input and of the parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import numpy as np

from brim_bench.workload import Job, Workload

__all__ = ["WORKLOADS", "dropout_results"]

F4 = 4  # bytes of a float32


def _layer(side: Any, layer: Any, shape: tuple[int, ...], results: Callable[..., dict[str, Any]] | None = None) -> Job:
    """A Job of a layer's forward and backward pass on an input of ``shape``."""
    rng = np.random.default_rng(0)
    layer = side.load(layer, seed=1)
    x = side.images(rng.standard_normal(shape, np.float32))
    gradient = side.images(rng.standard_normal(side.output_shape(layer, x), np.float32))
    parameters = list(layer.parameters())
    go = side.with_gradients(layer, x, gradient, parameters)

    def all_results() -> dict[str, Any]:
        y, dx, *rest = (side.numpy(value) for value in go())
        if results is not None:
            return results(side.numpy(x), side.numpy(gradient), y, dx)
        found = {"result": y, "gradient": dx}
        return found | {f"gradient of parameter {n}": one for n, one in enumerate(rest)}

    return Job(go, all_results, side.compiled(go))


def bn2d(side: Any, checking: bool, shape: tuple[int, ...]) -> Job:
    """Batch norm over images in training."""
    return _layer(side, side.nn.BatchNorm2d(shape[1]), shape)


def ln(side: Any, checking: bool, n: int, d: int) -> Job:
    """Layer norm over rows."""
    return _layer(side, side.nn.LayerNorm(d), (n, d))


def dropout(side: Any, checking: bool, n: int, d: int) -> Job:
    """Dropout of a half."""
    return _layer(side, side.nn.Dropout(0.5), (n, d), dropout_results)


def dropout_results(x: Any, gradient: Any, y: Any, dx: Any) -> dict[str, Any]:
    """Masks differ from library to library; what they must have in common is compared."""
    kept = y != 0
    right = np.array_equal(y[kept], 2 * x[kept]) and np.array_equal(dx, np.where(kept, 2 * gradient, 0))
    return {"share kept": np.asarray([kept.mean()]), "kept values are doubled": np.asarray([float(right)])}


def conv(side: Any, checking: bool, n: int, c: int, h: int, o: int) -> Job:
    """3 x 3 convolution with bias."""
    return _layer(side, side.channels_last(side.nn.Conv2d(c, o, 3, padding=1)), (n, c, h, h))


def maxpool(side: Any, checking: bool, shape: tuple[int, ...]) -> Job:
    """Max pooling of 2 x 2."""
    return _layer(side, side.nn.MaxPool2d(2), shape)


_CLOSE = {"result": 1e-4, "gradient": 1e-3, "gradient of parameter 0": 1e-3, "gradient of parameter 1": 1e-3}


def _conv(n: int, c: int, h: int, o: int) -> Workload:
    pixels = n * h * h
    return Workload(
        f"conv_{n}x{c}x{h}_{o}",
        f"3 x 3 convolution, {c} to {o} channels, {n} images of {h} x {h}, forward and backward",
        "conv", {"n": n, "c": c, "h": h, "o": o},
        flops=3 * 2.0 * 9 * c * o * pixels, nbytes=F4 * pixels * (3 * c + 2 * o), build=conv, tolerances=_CLOSE,
    )  # fmt: skip


_IMAGES = (64, 64, 56, 56)

WORKLOADS = (
    Workload(
        "bn2d_64x64x56", "batch norm of 64 images of 64 x 56 x 56 in training, forward and backward", "bn2d",
        {"shape": _IMAGES},
        # forward reads x for the statistics and for the result; backward reads x and the gradient twice
        nbytes=F4 * prod(_IMAGES) * 8, build=bn2d, tolerances=_CLOSE,
    ),
    Workload(
        "ln_4096x768", "layer norm of 4,096 rows of 768, forward and backward", "ln", {"n": 4096, "d": 768},
        nbytes=F4 * 4096 * 768 * 5, build=ln, tolerances=_CLOSE,  # a row stays in the cache: x, y, x, dy, dx
    ),
    Workload(
        "dropout_4096x1024", "dropout of a half of 4,096 x 1,024, forward and backward", "dropout",
        {"n": 4096, "d": 1024},
        nbytes=F4 * 4096 * 1024 * 4, build=dropout, tolerances={"share kept": 5e-3, "kept values are doubled": 0.0},
    ),
    _conv(32, 64, 32, 64),
    _conv(64, 1, 28, 32),
    Workload(
        "maxpool_64x64x56", "max pooling 2 x 2 of 64 images of 64 x 56 x 56, forward and backward", "maxpool",
        {"shape": _IMAGES},
        nbytes=F4 * prod(_IMAGES) * 2.5, build=maxpool, tolerances=_CLOSE,  # x, y; dy, dx
    ),
)  # fmt: skip
