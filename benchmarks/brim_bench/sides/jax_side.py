"""JAX as its documentation shows it: functions through ``jax.jit``, with the old parameters' memory given away."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before it is imported: else it looks for accelerators

import jax
from jax import numpy as jnp

from brim_bench.sides.base import Unsupported
from brim_bench.sides.functional import Functional

__all__ = ["Jax"]


def _sgd(p: Any, g: Any, s: Any) -> tuple[Any, Any]:
    s = [0.9 * m + one for m, one in zip(s, g)]
    return [one - 0.01 * m for one, m in zip(p, s)], s


def _adamw(p: Any, g: Any, s: Any) -> tuple[Any, Any]:
    m, v, count = s
    count = count + 1
    m = [0.9 * a + 0.1 * b for a, b in zip(m, g)]
    v = [0.999 * a + 0.001 * b * b for a, b in zip(v, g)]
    a, b = 1e-3 / (1 - 0.9**count), 1 / (1 - 0.999**count)
    new = [(1 - 1e-5) * one - a * x / (jnp.sqrt(b * y) + 1e-8) for one, x, y in zip(p, m, v)]
    return new, (m, v, count)


def _optimizer(which: str, parameters: list[Any]) -> tuple[Any, Callable[..., Any]]:
    """(first state, (parameters, gradients, state) -> (parameters, state))."""
    if which == "sgd":
        return [jnp.zeros_like(one) for one in parameters], _sgd
    zeros = [[jnp.zeros_like(one) for one in parameters] for _ in range(2)]
    return (*zeros, jnp.zeros((), jnp.float32)), _adamw


class Jax(Functional):
    """JAX on the CPU."""

    name: ClassVar[str] = "jax"
    import_code: ClassVar[str] = "import jax, jax.numpy"

    def __init__(self, device: str = "cpu", threads: int = 1, eager: bool = False) -> None:
        super().__init__(device, threads, eager)
        if device != "cpu":
            raise Unsupported(f"JAX is run on the CPU here, not on {device!r}")

    def version(self) -> str:
        return str(jax.__version__)

    def facts(self) -> dict[str, str]:
        processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        if processors != self.threads:  # it has no setting of its own; it takes as many as it may run on
            return {"threads": f"XLA's own choice among {processors} processors"}
        return {}

    def asarray(self, host: np.ndarray[Any, Any]) -> Any:
        return jnp.asarray(host.astype(np.int32) if host.dtype == np.int64 else host)

    def permute(self, x: Any, axes: Sequence[int]) -> Any:
        return x.transpose(axes)

    def relu(self, x: Any) -> Any:
        return jnp.maximum(x, 0)

    def rsqrt(self, x: Any) -> Any:
        return jax.lax.rsqrt(x)

    def softmax(self, x: Any) -> Any:
        return jax.nn.softmax(x)

    def gelu(self, x: Any) -> Any:
        return jax.nn.gelu(x, approximate=True)

    def cross_entropy(self, scores: Any, classes: Any) -> Any:
        return -jnp.take_along_axis(jax.nn.log_softmax(scores), classes[:, None], -1).mean()

    def first_key(self) -> Any:
        return jax.random.key(0)

    def drop(self, x: Any, p: float, key: Any, number: int) -> Any:
        kept = jax.random.bernoulli(jax.random.fold_in(key, number), 1 - p, x.shape)
        return jnp.where(kept, x / (1 - p), 0)

    def convolution(self, x: Any, kernel: Any, stride: int, padding: int) -> Any:
        order = ("NCHW", "OIHW", "NCHW")
        return jax.lax.conv_general_dilated(x, kernel, (stride,) * 2, [(padding,) * 2] * 2, dimension_numbers=order)

    def max_pool(self, x: Any) -> Any:
        return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "VALID")

    def computed(self, fn: Callable[..., Any], *arrays: Any) -> Callable[[], Any]:
        compiled = jax.jit(fn)
        return lambda: jax.block_until_ready(compiled(*arrays))

    def differentiated(self, fn: Callable[..., Any], gradient: Any, *arrays: Any) -> Callable[[], Sequence[Any]]:
        def both(gradient: Any, *arrays: Any) -> tuple[Any, ...]:
            y, backward = jax.vjp(fn, *arrays)
            return (y, *backward(jnp.ones_like(y) if gradient is None else gradient))

        return self.computed(both, gradient, *arrays)

    def updater(
        self, which: str, parameters: list[Any], gradients: list[Any]
    ) -> tuple[Callable[[], Any], Callable[[], list[Any]]]:
        state, update = _optimizer(which, parameters)
        compiled, now = jax.jit(update, donate_argnums=(0, 2)), (parameters, state)

        def step() -> None:
            nonlocal now
            now = jax.block_until_ready(compiled(now[0], gradients, now[1]))

        return step, lambda: now[0]

    def trainer(
        self, which: str, loss: Callable[..., Any], parameters: list[Any], statistics: list[Any]
    ) -> tuple[Callable[[Any, Any], Any], Callable[[], list[Any]]]:
        state, update = _optimizer(which, parameters)

        def whole(p: Any, s: Any, state: Any, key: Any, x: Any, y: Any) -> tuple[Any, ...]:
            key, own = jax.random.split(key)
            (value, s), g = jax.value_and_grad(loss, has_aux=True)(p, s, own, x, y)
            p, state = update(p, g, state)
            return p, s, state, key, value

        compiled = jax.jit(whole, donate_argnums=(0, 1, 2, 3))
        now = (parameters, statistics, state, self.first_key())

        def step(x: Any, y: Any) -> Any:
            nonlocal now
            *rest, value = jax.block_until_ready(compiled(*now, x, y))
            now = tuple(rest)
            return value

        return step, lambda: now[0]
