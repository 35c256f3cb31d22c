"""tinygrad on the CPU: functions through ``TinyJit``, which Clang compiles; its own layer norm, dropout and losses."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

os.environ.setdefault("DEV", "CPU")  # before it is imported: else it looks for accelerators

import numpy as np
from tinygrad import Context, Device, Tensor, TinyJit
from tinygrad.helpers import NUM_CPU_THREADS

from brim_bench.sides.base import Unsupported
from brim_bench.sides.functional import Functional

__all__ = ["Tinygrad"]


def _sgd(p: list[Any], g: list[Any], s: list[Any]) -> list[Any]:
    """What the parameters and the state become, in their order."""
    s = [0.9 * m + one for m, one in zip(s, g)]
    return [one - 0.01 * m for one, m in zip(p, s)] + s


def _adamw(p: list[Any], g: list[Any], s: list[Any]) -> list[Any]:
    count = len(p)
    steps = s[-1] + 1
    m = [0.9 * a + 0.1 * b for a, b in zip(s[:count], g)]
    v = [0.999 * a + 0.001 * b * b for a, b in zip(s[count:-1], g)]
    a, b = 1e-3 / (1 - 0.9**steps), 1 / (1 - 0.999**steps)
    new = [(1 - 1e-5) * one - a * x / ((b * y).sqrt() + 1e-8) for one, x, y in zip(p, m, v)]
    return [*new, *m, *v, steps]


def _optimizer(which: str, parameters: list[Any]) -> tuple[list[Any], Callable[..., list[Any]]]:
    """(first state, the update)."""
    zeros = [_own(Tensor.zeros(*one.shape)) for one in parameters]
    if which == "sgd":
        return zeros, _sgd
    return [*zeros, *[_own(Tensor.zeros(*one.shape)) for one in parameters], _own(Tensor.zeros(1))], _adamw


def _own(x: Any) -> Any:
    """In memory of its own, so that it can be assigned."""
    return x.contiguous().realize()


class Tinygrad(Functional):
    """tinygrad on the CPU."""

    name: ClassVar[str] = "tinygrad"
    import_code: ClassVar[str] = "import tinygrad"

    def __init__(self, device: str = "cpu", threads: int = 1, eager: bool = False) -> None:
        super().__init__(device, threads, eager)
        if device != "cpu":
            raise Unsupported(f"tinygrad is run on the CPU here, not on {device!r}")
        if shutil.which("clang") is None:
            raise Unsupported("tinygrad compiles its kernels with clang, which is not on the PATH")
        NUM_CPU_THREADS.value = threads
        Tensor.manual_seed(0)

    def version(self) -> str:
        return importlib.metadata.version("tinygrad")

    def asarray(self, host: np.ndarray[Any, Any]) -> Any:
        return Tensor(host.astype(np.int32) if host.dtype == np.int64 else host).realize()

    def numpy(self, value: Any) -> np.ndarray[Any, Any]:
        return value.numpy()

    def permute(self, x: Any, axes: Sequence[int]) -> Any:
        return x.permute(*axes)

    def mean(self, x: Any, axes: tuple[int, ...]) -> Any:
        return x.mean(axis=axes, keepdim=True)

    def relu(self, x: Any) -> Any:
        return x.relu()

    def rsqrt(self, x: Any) -> Any:
        return x.rsqrt()

    def softmax(self, x: Any) -> Any:
        return x.softmax(-1)

    def gelu(self, x: Any) -> Any:
        return x.gelu()

    def cross_entropy(self, scores: Any, classes: Any) -> Any:
        return scores.sparse_categorical_crossentropy(classes)

    def layer_norm(self, x: Any, weight: Any, bias: Any) -> Any:
        return x.layernorm(eps=1e-5) * weight + bias

    def drop(self, x: Any, p: float, key: Any, number: int) -> Any:
        with Context(TRAINING=1):
            return x.dropout(p)

    def convolution(self, x: Any, kernel: Any, stride: int, padding: int) -> Any:
        return x.conv2d(kernel, stride=stride, padding=padding)

    def max_pool(self, x: Any) -> Any:
        return x.max_pool2d((2, 2))

    def computed(self, fn: Callable[..., Any], *arrays: Any) -> Callable[[], Any]:
        compiled = TinyJit(lambda *given: fn(*given).realize())
        return lambda: self._finished(compiled(*arrays))

    def differentiated(self, fn: Callable[..., Any], gradient: Any, *arrays: Any) -> Callable[[], Sequence[Any]]:
        def both(*given: Any) -> list[Any]:
            y = fn(*given)
            found = [y, *y.gradient(*given, gradient=gradient)]
            Tensor.realize(*found)
            return found

        compiled = TinyJit(both)
        return lambda: self._finished(compiled(*arrays))

    def updater(
        self, which: str, parameters: list[Any], gradients: list[Any]
    ) -> tuple[Callable[[], Any], Callable[[], list[Any]]]:
        state, update = _optimizer(which, parameters)
        parameters = [_own(one) for one in parameters]
        step = TinyJit(lambda: self._assigned([*parameters, *state], update(parameters, gradients, state)))
        return lambda: self._finished(step()), lambda: parameters

    def trainer(
        self, which: str, loss: Callable[..., Any], parameters: list[Any], statistics: list[Any]
    ) -> tuple[Callable[[Any, Any], Any], Callable[[], list[Any]]]:
        state, update = _optimizer(which, parameters)
        parameters, statistics = ([_own(one) for one in some] for some in (parameters, statistics))

        def whole(x: Any, y: Any) -> Any:
            value, found = loss(parameters, statistics, None, x, y)
            new = update(parameters, value.gradient(*parameters), state)
            self._assigned([*parameters, *state, *statistics], [*new, *found], value)
            return value

        compiled = TinyJit(whole)
        return lambda x, y: self._finished(compiled(x, y)), lambda: parameters

    @staticmethod
    def _assigned(places: list[Any], values: list[Any], *others: Any) -> list[Any]:
        """The places, which have their new values."""
        for place, value in zip(places, values, strict=True):
            place.assign(value)
        Tensor.realize(*places, *others)
        return places

    @staticmethod
    def _finished(made: Any) -> Any:
        """What was made, when it has been: kernels run behind the caller's back."""
        Device["CPU"].synchronize()
        return made
