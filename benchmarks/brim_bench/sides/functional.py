"""Libraries whose networks are functions of arrays: the workloads written once for them, from a few operations each.

A subclass gives arrays, the operations below, and how the library runs a computation, gradients and a training step.
Networks are the same as those of ``workloads/``, with parameters in the same order and, at first, of the same values.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np

from brim_bench.sides.base import Side, weights
from brim_bench.workload import Job
from brim_bench.workloads.layers import dropout_results
from brim_bench.workloads.optimizers import SHAPES

__all__ = ["Functional"]

Shape = tuple[int, ...]
_MLP = (784, 256, 256, 10)
_SAMPLES = 60_000
_MOMENTUM_OF_STATISTICS = 0.1
_EPS = 1e-5
_RESNETS = {
    "resnet8": ((16, 1, 1), (32, 1, 2), (64, 1, 2)),
    "resnet18": ((64, 2, 1), (128, 2, 2), (256, 2, 2), (512, 2, 2)),
}


def _normal(*shape: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).standard_normal(shape, np.float32)


class Functional(Side, ABC):
    """What such libraries share."""

    channels: ClassVar[int] = 1  # the axis of an image's channels; -1: the last

    # ---- what a library gives

    @abstractmethod
    def relu(self, x: Any) -> Any: ...

    @abstractmethod
    def rsqrt(self, x: Any) -> Any: ...

    def mean(self, x: Any, axes: Shape) -> Any:
        """With the axes kept."""
        return x.mean(axes, keepdims=True)

    @abstractmethod
    def softmax(self, x: Any) -> Any: ...

    @abstractmethod
    def gelu(self, x: Any) -> Any:
        """By tanh."""

    @abstractmethod
    def cross_entropy(self, scores: Any, classes: Any) -> Any:
        """The mean over all rows of (n, c) scores."""

    def layer_norm(self, x: Any, weight: Any, bias: Any) -> Any:
        centred = x - self.mean(x, (-1,))
        return centred * self.rsqrt(self.mean(centred * centred, (-1,)) + _EPS) * weight + bias

    @abstractmethod
    def drop(self, x: Any, p: float, key: Any, number: int) -> Any:
        """``number`` tells the dropouts of a network apart, for libraries whose random numbers come from a key."""

    @abstractmethod
    def convolution(self, x: Any, kernel: Any, stride: int, padding: int) -> Any: ...

    @abstractmethod
    def max_pool(self, x: Any) -> Any:
        """2 x 2."""

    def causal_mask(self, tokens: int) -> Any:
        """(tokens, tokens): 0 where a token is seen, very small where not."""
        return self.asarray(np.triu(np.full((tokens, tokens), -1e30, np.float32), 1))

    @abstractmethod
    def computed(self, fn: Callable[..., Any], *arrays: Any) -> Callable[[], Any]:
        """Runs ``fn(*arrays)`` as the library does it best, to its end."""

    @abstractmethod
    def differentiated(self, fn: Callable[..., Any], gradient: Any, *arrays: Any) -> Callable[[], Sequence[Any]]:
        """Runs y = fn(*arrays) and the backward pass from ``gradient`` (None: of one number): y and all gradients."""

    @abstractmethod
    def updater(
        self, which: str, parameters: list[Any], gradients: list[Any]
    ) -> tuple[Callable[[], Any], Callable[[], list[Any]]]:
        """(runs one update in place of the old parameters, the parameters now)."""

    @abstractmethod
    def trainer(
        self, which: str, loss: Callable[..., Any], parameters: list[Any], statistics: list[Any]
    ) -> tuple[Callable[[Any, Any], Any], Callable[[], list[Any]]]:
        """A training step (x, y) -> loss, and the parameters now.

        Arguments:
            which: "sgd" or "adamw".
            loss: ``loss(parameters, statistics, key, x, y)`` gives (loss, statistics of batch norms).
        """

    # ---- images and weights, to the library and back

    def images(self, host: np.ndarray[Any, Any]) -> Any:
        return self.asarray(host if self.channels == 1 else np.ascontiguousarray(np.moveaxis(host, 1, -1)))

    def host(self, value: Any) -> np.ndarray[Any, Any]:
        """A host array; of images or kernels with the channels in front, as all sides compare them."""
        found = self.numpy(value)
        return found if found.ndim != 4 or self.channels == 1 else np.moveaxis(found, -1, 1)

    def _parameters(self, shapes: Sequence[tuple[str, Shape]]) -> list[Any]:
        """Arrays of the common first values; PyTorch's order and shapes."""
        found = weights(dict(shapes), seed=1)
        hosts = [found.get(name, np.ones(shape, np.float32)) for name, shape in shapes]
        return [self.images(one) if one.ndim == 4 else self.asarray(one) for one in hosts]

    # ---- layers

    def linear(self, x: Any, weight: Any, bias: Any) -> Any:
        return x @ weight.T + bias

    def batch_norm(self, x: Any, weight: Any, bias: Any) -> tuple[Any, list[Any]]:
        """(the result, mean and variance)."""
        axis = x.ndim - 1 if self.channels == -1 or x.ndim == 2 else 1
        axes = tuple(n for n in range(x.ndim) if n != axis)
        shape = tuple(-1 if n == axis else 1 for n in range(x.ndim))
        mean = self.mean(x, axes)
        centred = x - mean
        variance = self.mean(centred * centred, axes)
        y = centred * (self.rsqrt(variance + _EPS) * weight.reshape(shape)) + bias.reshape(shape)
        return y, [mean.reshape((-1,)), variance.reshape((-1,))]

    def _norm_in_training(self, x: Any, p: Iterator[Any], old: Iterator[Any], new: list[Any]) -> Any:
        y, found = self.batch_norm(x, next(p), next(p))
        share = _MOMENTUM_OF_STATISTICS
        new += [(1 - share) * next(old) + share * one for one in found]
        return y

    # ---- single operations

    def gemm(self, m: int, k: int, n: int) -> Job:
        go = self.computed(lambda a, b: a @ b, self.asarray(_normal(m, k)), self.asarray(_normal(k, n)))
        return Job(go, lambda: {"product": self.numpy(go())})

    def eltwise(self, shape: Shape) -> Job:
        go = self.computed(lambda x: self.relu(x * 1.5 + 0.25), self.asarray(_normal(*shape)))
        return Job(go, lambda: {"result": self.numpy(go())})

    def xent(self, n: int, c: int) -> Job:
        y = self.asarray(np.random.default_rng(1).integers(0, c, n))
        go = self.differentiated(lambda x: self.cross_entropy(x, y), None, self.asarray(_normal(n, c)))
        return Job(go, lambda: dict(zip(("loss", "gradient"), map(self.numpy, go()), strict=True)))

    def _layer(self, fn: Callable[..., Any], shape: Shape, shapes: Sequence[tuple[str, Shape]], out: Shape) -> Job:
        rng = np.random.default_rng(0)
        x, gradient = (self.images if len(one) == 4 else self.asarray for one in (shape, out))
        given = x(rng.standard_normal(shape, np.float32)), gradient(rng.standard_normal(out, np.float32))
        go = self.differentiated(fn, given[1], given[0], *self._parameters(shapes))

        def results() -> dict[str, Any]:
            y, dx, *rest = map(self.host, go())
            return {"result": y, "gradient": dx} | {f"gradient of parameter {n}": one for n, one in enumerate(rest)}

        return Job(go, results)

    def bn2d(self, shape: Shape) -> Job:
        c = (shape[1],)
        return self._layer(lambda *given: self.batch_norm(*given)[0], shape, [("weight", c), ("bias", c)], shape)

    def ln(self, n: int, d: int) -> Job:
        return self._layer(self.layer_norm, (n, d), [("weight", (d,)), ("bias", (d,))], (n, d))

    def dropout(self, n: int, d: int) -> Job:
        rng = np.random.default_rng(0)
        x, gradient = (rng.standard_normal((n, d), np.float32) for _ in range(2))
        go = self.differentiated(
            lambda x: self.drop(x, 0.5, self.first_key(), 0), self.asarray(gradient), self.asarray(x)
        )
        return Job(go, lambda: dropout_results(x, gradient, *map(self.numpy, go())))

    def first_key(self) -> Any:
        """Of random numbers, where the library has keys."""
        return None

    def conv(self, n: int, c: int, h: int, o: int) -> Job:
        def fn(x: Any, kernel: Any, bias: Any) -> Any:
            return self.convolution(x, kernel, 1, 1) + bias.reshape((1, -1, 1, 1) if self.channels == 1 else (-1,))

        return self._layer(fn, (n, c, h, h), [("weight", (o, c, 3, 3)), ("bias", (o,))], (n, o, h, h))

    def maxpool(self, shape: Shape) -> Job:
        n, c, h, w = shape
        return self._layer(self.max_pool, shape, (), (n, c, h // 2, w // 2))

    def optim(self, which: str, size: str) -> Job:
        rng = np.random.default_rng(0)
        hosts = [0.01 * rng.standard_normal(shape, np.float32) for shape in SHAPES[size]]
        gradients = [self.asarray(0.01 * rng.standard_normal(shape, np.float32)) for shape in SHAPES[size]]
        step, now = self.updater(which, [self.asarray(one) for one in hosts], gradients)

        def results() -> dict[str, Any]:
            for _ in range(3):
                step()
            return {"update": np.concatenate([(self.numpy(b) - a).reshape(-1) for a, b in zip(hosts, now())])}

        return Job(step, results)

    # ---- networks

    def _training(
        self, which: str, forward: Callable[..., Any], shapes: Sequence[tuple[str, Shape]], norms: Sequence[int],
        x: Any, y: Any, run: Callable[..., Any] | None = None,
    ) -> Job:  # fmt: skip
        """``forward(parameters, statistics, key, x)`` gives (scores, statistics)."""
        parameters = self._parameters(shapes)
        before = [self.host(one).copy() for one in parameters]
        statistics = [self.asarray(np.full(n, one, np.float32)) for n in norms for one in (0, 1)]

        def loss(p: list[Any], s: list[Any], key: Any, x: Any, y: Any) -> tuple[Any, list[Any]]:
            scores, new = forward(p, s, key, x)
            return self.cross_entropy(scores.reshape((-1, scores.shape[-1])), y.reshape((-1,))), new

        step, now = self.trainer(which, loss, parameters, statistics)

        def results() -> dict[str, Any]:
            losses = [float(self.numpy(step(x, y))) for _ in range(3)]
            moved = [(self.host(b) - a).reshape(-1) for a, b in zip(before, now(), strict=True)]
            return {"losses": np.asarray(losses), "update": np.concatenate(moved)}

        return Job((lambda: step(x, y)) if run is None else run(step), results)

    def _mlp_shapes(self) -> list[tuple[str, Shape]]:
        found: list[tuple[str, Shape]] = []
        for n, (a, b) in enumerate(pairwise(_MLP)):
            found += [(f"{4 * n}.weight", (b, a)), (f"{4 * n}.bias", (b,))]
            if n < len(_MLP) - 2:
                found += [(f"{4 * n + 1}.weight", (b,)), (f"{4 * n + 1}.bias", (b,))]
        return found

    def _mlp(self, parameters: list[Any], statistics: list[Any], key: Any, x: Any) -> tuple[Any, list[Any]]:
        p, old, new = iter(parameters), iter(statistics), list[Any]()
        for n in range(len(_MLP) - 2):
            x = self.relu(self._norm_in_training(self.linear(x, next(p), next(p)), p, old, new))
            if not self.checking:
                x = self.drop(x, 0.2, key, n)
        return self.linear(x, next(p), next(p)), new

    def _mlp_job(self, batch: int, run: Callable[..., Any] | None = None) -> Job:
        rng = np.random.default_rng(0)
        x, y = rng.random((batch, _MLP[0]), np.float32), rng.integers(0, _MLP[-1], batch)
        return self._training("sgd", self._mlp, self._mlp_shapes(), _MLP[1:-1], self.asarray(x), self.asarray(y), run)

    def mlp_step(self, batch: int) -> Job:
        return self._mlp_job(batch)

    def mlp_epoch(self, batch: int) -> Job:
        """No loader comes with these libraries: batches are picked by NumPy."""
        samples = batch if self.checking else _SAMPLES
        rng = np.random.default_rng(0)
        x, y = rng.random((samples, _MLP[0]), np.float32), rng.integers(0, _MLP[-1], samples)

        def epoch(step: Callable[[Any, Any], Any]) -> Callable[[], float]:
            def run() -> float:
                order = rng.permutation(samples)
                for start in range(0, samples, batch):
                    which = order[start : start + batch]
                    loss = step(self.asarray(x[which]), self.asarray(y[which]))
                return float(self.numpy(loss))

            return run

        return self._mlp_job(batch, epoch)

    def mlp_infer(self, batch: int) -> Job:
        x = np.random.default_rng(0).random((batch, _MLP[0]), np.float32)
        scale = 1 / math.sqrt(1 + _EPS)  # statistics of a new batch norm: mean 0, variance 1

        def forward(x: Any, *parameters: Any) -> Any:
            p = iter(parameters)
            for _ in range(len(_MLP) - 2):
                x = self.linear(x, next(p), next(p))
                x = self.relu(x * (next(p) * scale) + next(p))
            return self.linear(x, next(p), next(p))

        go = self.computed(forward, self.asarray(x), *self._parameters(self._mlp_shapes()))
        return Job(go, lambda: {"scores": self.numpy(go())})

    def _flat(self, x: Any) -> Any:
        if self.channels == -1:
            x = self.permute(x, (0, 3, 1, 2))
        return x.reshape((x.shape[0], -1))

    def _with_bias(self, x: Any, p: Iterator[Any], padding: int) -> Any:
        x = self.convolution(x, next(p), 1, padding)
        return x + next(p).reshape((1, -1, 1, 1) if self.channels == 1 else (-1,))

    def _lenet(self, parameters: list[Any], statistics: list[Any], key: Any, x: Any) -> tuple[Any, list[Any]]:
        p = iter(parameters)
        x = self.max_pool(self.relu(self._with_bias(x, p, 2)))
        x = self._flat(self.max_pool(self.relu(self._with_bias(x, p, 0))))
        x = self.relu(self.linear(x, next(p), next(p)))
        x = self.relu(self.linear(x, next(p), next(p)))
        return self.linear(x, next(p), next(p)), statistics

    def cnn_step(self, model: str, batch: int) -> Job:
        rng = np.random.default_rng(0)
        size = (batch, 1, 28, 28) if model == "lenet" else (batch, 3, 32, 32)
        x, y = self.images(rng.random(size, np.float32)), self.asarray(rng.integers(0, 10, batch))
        if model == "lenet":
            layers: list[Shape] = [(6, 1, 5, 5), (16, 6, 5, 5), (120, 400), (84, 120), (10, 84)]
            shapes = [(f"{n}.{end}", shape) for n, one in enumerate(layers)
                      for end, shape in (("weight", one), ("bias", one[:1]))]  # fmt: skip
            return self._training("sgd", self._lenet, shapes, (), x, y)
        stages = _RESNETS[model]
        convs = [(3, stages[0][0], 3, 1)]  # inputs, outputs, kernel, stride
        blocks: list[tuple[int, bool]] = []  # (stride, with a projection)
        width = stages[0][0]
        for channels, count, stride in stages:
            for n in range(count):
                step = 1 if n else stride
                blocks.append((step, step != 1 or width != channels))
                convs += [(width, channels, 3, step), (channels, channels, 3, 1)]
                convs += [(width, channels, 1, step)] if blocks[-1][1] else []
                width = channels
        shapes = []
        for n, (a, b, k, _) in enumerate(convs):
            shapes += [(f"{n}.weight", (b, a, k, k)), (f"{n}.norm", (b,)), (f"{n}.norm.bias", (b,))]
        shapes += [("head.weight", (10, width)), ("head.bias", (10,))]

        def forward(parameters: list[Any], statistics: list[Any], key: Any, x: Any) -> tuple[Any, list[Any]]:
            p, old, new = iter(parameters), iter(statistics), list[Any]()

            def normed(x: Any, stride: int, padding: int) -> Any:
                return self._norm_in_training(self.convolution(x, next(p), stride, padding), p, old, new)

            x = self.relu(normed(x, 1, 1))
            for stride, projected in blocks:
                y = normed(self.relu(normed(x, stride, 1)), 1, 1)
                x = self.relu(y + (normed(x, stride, 0) if projected else x))
            pixels = (2, 3) if self.channels == 1 else (1, 2)
            return self.linear(self.mean(x, pixels).reshape((x.shape[0], -1)), next(p), next(p)), new

        return self._training("sgd", forward, shapes, [b for _, b, _, _ in convs], x, y)

    def lm_step(self, batch: int) -> Job:
        tokens, width, heads, count, words, rate = 64, 128, 4, 2, 65, 0.0 if self.checking else 0.1
        layers = [("norm1", (width,)), ("qkv", (3 * width, width)), ("out", (width, width)), ("norm2", (width,)),
                  ("up", (4 * width, width)), ("down", (width, 4 * width))]  # fmt: skip
        shapes: list[tuple[str, Shape]] = [("words.weight", (words, width)), ("places.weight", (tokens, width))]
        for n in range(count):
            for name, shape in layers:
                shapes += [(f"blocks.{n}.{name}.weight", shape), (f"blocks.{n}.{name}.bias", shape[:1])]
        shapes += [("norm.weight", (width,)), ("norm.bias", (width,))]
        shapes += [("head.weight", (words, width)), ("head.bias", (words,))]
        mask = self.causal_mask(tokens)

        def forward(parameters: list[Any], statistics: list[Any], key: Any, x: Any) -> tuple[Any, list[Any]]:
            p, number = iter(parameters), 0

            def drop(x: Any) -> Any:
                nonlocal number
                number += 1
                return self.drop(x, rate, key, number) if rate else x

            x = drop(self.rows(next(p), x) + next(p))
            for _ in range(count):
                qkv = self.linear(self.layer_norm(x, next(p), next(p)), next(p), next(p))
                parts = (qkv[..., n * width : (n + 1) * width] for n in range(3))
                shape = (batch, tokens, heads, width // heads)
                q, k, v = (self.permute(one.reshape(shape), (0, 2, 1, 3)) for one in parts)
                scores = q @ self.permute(k, (0, 1, 3, 2)) * (1 / math.sqrt(width // heads)) + mask
                seen = self.permute(drop(self.softmax(scores)) @ v, (0, 2, 1, 3)).reshape((batch, tokens, width))
                x = x + drop(self.linear(seen, next(p), next(p)))
                y = self.gelu(self.linear(self.layer_norm(x, next(p), next(p)), next(p), next(p)))
                x = x + drop(self.linear(y, next(p), next(p)))
            return self.linear(self.layer_norm(x, next(p), next(p)), next(p), next(p)), statistics

        x, y = np.random.default_rng(0).integers(0, words, (2, batch, tokens))
        return self._training("adamw", forward, shapes, (), self.asarray(x), self.asarray(y))

    def rows(self, table: Any, which: Any) -> Any:
        """Rows of a table by their numbers."""
        return table[which]
