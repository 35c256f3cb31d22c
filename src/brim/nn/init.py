"""Initial values of parameters, written in place. Drawn on the host, so that a seed gives the same on every device.

Sources: X. Glorot and Y. Bengio, AISTATS 2010 (xavier); K. He et al., ICCV 2015 (kaiming); A. Saxe et al., ICLR 2014
(orthogonal).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist

import numpy as np

from brim.errors import ShapeError
from brim.random import host_generator
from brim.tensor import Tensor, from_host

__all__ = [
    "calculate_gain",
    "constant_",
    "fans",
    "kaiming_normal_",
    "kaiming_uniform_",
    "normal_",
    "ones_",
    "orthogonal_",
    "trunc_normal_",
    "uniform_",
    "xavier_normal_",
    "xavier_uniform_",
    "zeros_",
]


_CHUNK = 64 * 1024  # elements drawn at a time


def fans(tensor: Tensor) -> tuple[int, int]:
    """(fan_in, fan_out) of a weight (out, in, ...): inputs and outputs that one output or input is connected to."""
    if tensor.ndim < 2:
        raise ShapeError(f"fan in and fan out need a weight of at least 2 axes, got shape {tensor.shape}")
    field = math.prod(tensor.shape[2:])
    return tensor.shape[1] * field, tensor.shape[0] * field


def calculate_gain(nonlinearity: str, param: float | None = None) -> float:
    """Factor that keeps the variance through a nonlinearity: linear, conv2d, sigmoid, tanh, relu, leaky_relu, selu."""
    gains = {"linear": 1.0, "conv2d": 1.0, "sigmoid": 1.0, "tanh": 5.0 / 3.0, "relu": math.sqrt(2.0), "selu": 0.75}
    if nonlinearity == "leaky_relu":
        slope = 0.01 if param is None else param
        return math.sqrt(2.0 / (1.0 + slope * slope))
    if nonlinearity not in gains:
        raise ValueError(f"no gain for {nonlinearity!r}; known: {', '.join(gains)}, leaky_relu")
    return gains[nonlinearity]


def _draw(tensor: Tensor, values: Callable[[np.random.Generator, int], np.ndarray]) -> Tensor:
    """Overwrite with ``values(generator, n)``: float64 numbers, drawn chunk by chunk to need little memory."""
    if tensor.device.is_meta:
        return tensor
    generator, flat = host_generator(), tensor.detach().reshape(-1)
    for start in range(0, tensor.size, _CHUNK):
        part = flat[start : start + _CHUNK]
        # by way of float32, so that half-width weights are the rounded float32 ones
        host = values(generator, part.size).astype(np.float64 if tensor.dtype.itemsize == 8 else np.float32)
        part.write(from_host(host.astype(tensor.dtype, copy=False), tensor.device, "temps"))
    return tensor


def uniform_(tensor: Tensor, a: float = 0.0, b: float = 1.0) -> Tensor:
    """Values uniform in [a, b)."""
    return _draw(tensor, lambda generator, n: generator.random(n) * (b - a) + a)


def normal_(tensor: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """Values of the normal distribution."""
    return _draw(tensor, lambda generator, n: generator.standard_normal(n) * std + mean)


def trunc_normal_(tensor: Tensor, mean: float = 0.0, std: float = 1.0, a: float = -2.0, b: float = 2.0) -> Tensor:
    """Values of the normal distribution limited to [a, b], by inverting its distribution function."""
    if not (a < b and std > 0.0):
        raise ValueError(f"trunc_normal_ needs a < b and std > 0, got a={a}, b={b}, std={std}")
    normal = NormalDist(mean, std)
    low, high = normal.cdf(a), normal.cdf(b)
    if not low < high:
        raise ValueError(f"[{a}, {b}] lies too far from mean {mean} with std {std}: its probability is 0")

    def values(generator: np.random.Generator, n: int) -> np.ndarray:
        quantiles = np.clip(low + generator.random(n) * (high - low), 1e-16, 1.0 - 1e-16)
        return np.clip(np.fromiter(map(normal.inv_cdf, quantiles.tolist()), np.float64, n), a, b)

    return _draw(tensor, values)


def constant_(tensor: Tensor, value: float) -> Tensor:
    """One value everywhere."""
    return tensor if tensor.device.is_meta else tensor.write(value)


def zeros_(tensor: Tensor) -> Tensor:
    """Zeros."""
    return constant_(tensor, 0.0)


def ones_(tensor: Tensor) -> Tensor:
    """Ones."""
    return constant_(tensor, 1.0)


def xavier_uniform_(tensor: Tensor, gain: float = 1.0) -> Tensor:
    """Uniform in +-gain sqrt(6 / (fan_in + fan_out))."""
    bound = gain * math.sqrt(6.0 / sum(fans(tensor)))
    return uniform_(tensor, -bound, bound)


def xavier_normal_(tensor: Tensor, gain: float = 1.0) -> Tensor:
    """Normal with standard deviation gain sqrt(2 / (fan_in + fan_out))."""
    return normal_(tensor, 0.0, gain * math.sqrt(2.0 / sum(fans(tensor))))


def _kaiming_std(tensor: Tensor, a: float, mode: str, nonlinearity: str) -> float:
    if mode not in ("fan_in", "fan_out"):
        raise ValueError(f"mode must be 'fan_in' or 'fan_out', got {mode!r}")
    fan = fans(tensor)[mode == "fan_out"]
    return calculate_gain(nonlinearity, a) / math.sqrt(fan) if fan else 0.0


def kaiming_uniform_(tensor: Tensor, a: float = 0.0, mode: str = "fan_in", nonlinearity: str = "leaky_relu") -> Tensor:
    """Uniform in +-gain sqrt(3 / fan)."""
    bound = math.sqrt(3.0) * _kaiming_std(tensor, a, mode, nonlinearity)
    return uniform_(tensor, -bound, bound)


def kaiming_normal_(tensor: Tensor, a: float = 0.0, mode: str = "fan_in", nonlinearity: str = "leaky_relu") -> Tensor:
    """Normal with standard deviation gain / sqrt(fan)."""
    return normal_(tensor, 0.0, _kaiming_std(tensor, a, mode, nonlinearity))


def orthogonal_(tensor: Tensor, gain: float = 1.0) -> Tensor:
    """Orthonormal rows (or columns, where there are more rows than columns) times gain; later axes are flattened."""
    if tensor.ndim < 2:
        raise ShapeError(f"orthogonal_ needs at least 2 axes, got shape {tensor.shape}")
    if tensor.device.is_meta:
        return tensor
    rows, columns = tensor.shape[0], math.prod(tensor.shape[1:])
    q, r = np.linalg.qr(host_generator().standard_normal((max(rows, columns), min(rows, columns))))
    q *= np.sign(np.diag(r))  # makes the distribution uniform
    host = (gain * (q if rows >= columns else q.T)).reshape(tensor.shape).astype(np.float32)
    return tensor.write(from_host(host.astype(tensor.dtype, copy=False), tensor.device, "temps"))
