"""MLX on the CPU: functions through ``mx.compile``, images with their channels last, its own fast layer norm."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import mlx.core as mx
import numpy as np
from mlx import nn

from brim_bench.sides.base import Unsupported
from brim_bench.sides.functional import Functional

__all__ = ["Mlx"]


def _optimizer(which: str, parameters: list[Any]) -> tuple[list[Any], Callable[..., Any]]:
    """(first state, (parameters, gradients, state) -> (parameters, state))."""
    zeros = [mx.zeros_like(one) for one in parameters]
    count = len(parameters)

    def sgd(p: Any, g: Any, s: Any) -> tuple[Any, Any]:
        s = [0.9 * m + one for m, one in zip(s, g)]
        return [one - 0.01 * m for one, m in zip(p, s)], s

    def adamw(p: Any, g: Any, s: Any) -> tuple[Any, Any]:
        m, v, steps = s[:count], s[count:-1], s[-1] + 1
        m = [0.9 * a + 0.1 * b for a, b in zip(m, g)]
        v = [0.999 * a + 0.001 * b * b for a, b in zip(v, g)]
        a, b = 1e-3 / (1 - 0.9**steps), 1 / (1 - 0.999**steps)
        new = [(1 - 1e-5) * one - a * x / (mx.sqrt(b * y) + 1e-8) for one, x, y in zip(p, m, v)]
        return new, [*m, *v, steps]

    if which == "sgd":
        return zeros, sgd
    return [*zeros, *[mx.zeros_like(one) for one in parameters], mx.array(0.0)], adamw


class Mlx(Functional):
    """MLX on the CPU."""

    name: ClassVar[str] = "mlx"
    import_code: ClassVar[str] = "import mlx.core, mlx.nn"
    channels: ClassVar[int] = -1

    def __init__(self, device: str = "cpu", threads: int = 1, eager: bool = False) -> None:
        super().__init__(device, threads, eager)
        if device != "cpu":
            raise Unsupported(f"MLX is run on the CPU here, not on {device!r}")
        mx.set_default_device(mx.cpu)
        mx.random.seed(0)

    def version(self) -> str:
        return importlib.metadata.version("mlx")

    def asarray(self, host: np.ndarray[Any, Any]) -> Any:
        made = mx.array(host.astype(np.int32) if host.dtype == np.int64 else host)
        mx.eval(made)
        return made

    def permute(self, x: Any, axes: Sequence[int]) -> Any:
        return x.transpose(*axes)

    def relu(self, x: Any) -> Any:
        return mx.maximum(x, 0)

    def rsqrt(self, x: Any) -> Any:
        return mx.rsqrt(x)

    def softmax(self, x: Any) -> Any:
        return mx.softmax(x, axis=-1)

    def gelu(self, x: Any) -> Any:
        return nn.gelu_approx(x)

    def cross_entropy(self, scores: Any, classes: Any) -> Any:
        return nn.losses.cross_entropy(scores, classes, reduction="mean")

    def layer_norm(self, x: Any, weight: Any, bias: Any) -> Any:
        return mx.fast.layer_norm(x, weight, bias, 1e-5)

    def drop(self, x: Any, p: float, key: Any, number: int) -> Any:
        return mx.random.bernoulli(1 - p, x.shape) * x * (1 / (1 - p))

    def convolution(self, x: Any, kernel: Any, stride: int, padding: int) -> Any:
        return mx.conv2d(x, kernel, stride=stride, padding=padding)

    def max_pool(self, x: Any) -> Any:
        return nn.MaxPool2d(2, 2)(x)

    def computed(self, fn: Callable[..., Any], *arrays: Any) -> Callable[[], Any]:
        compiled = mx.compile(fn, inputs=mx.random.state, outputs=mx.random.state)

        def run() -> Any:
            found = compiled(*arrays)
            mx.eval(found)
            return found

        return run

    def differentiated(self, fn: Callable[..., Any], gradient: Any, *arrays: Any) -> Callable[[], Sequence[Any]]:
        def both(*arrays: Any) -> list[Any]:
            given = mx.array(1.0) if gradient is None else gradient
            y, found = mx.vjp(fn, list(arrays), [given])
            return [*y, *found]

        return self.computed(both, *arrays)

    def updater(
        self, which: str, parameters: list[Any], gradients: list[Any]
    ) -> tuple[Callable[[], Any], Callable[[], list[Any]]]:
        state, update = _optimizer(which, parameters)
        compiled, now = mx.compile(update), (parameters, state)

        def step() -> None:
            nonlocal now
            now = compiled(now[0], gradients, now[1])
            mx.eval(now)

        return step, lambda: now[0]

    def trainer(
        self, which: str, loss: Callable[..., Any], parameters: list[Any], statistics: list[Any]
    ) -> tuple[Callable[[Any, Any], Any], Callable[[], list[Any]]]:
        state, update = _optimizer(which, parameters)

        def whole(p: Any, s: Any, state: Any, x: Any, y: Any) -> tuple[Any, ...]:
            (value, s), g = mx.value_and_grad(loss)(p, s, None, x, y)
            p, state = update(p, g, state)
            return p, s, state, value

        compiled = mx.compile(whole, inputs=mx.random.state, outputs=mx.random.state)
        now = (parameters, statistics, state)

        def step(x: Any, y: Any) -> Any:
            nonlocal now
            *rest, value = compiled(*now, x, y)
            now = tuple(rest)
            mx.eval(value, now)
            return value

        return step, lambda: now[0]
