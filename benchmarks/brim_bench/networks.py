"""Small networks in training, each written once for two libraries: brim and PyTorch.

A network is a function of a library's names (``of_brim()`` or ``of_torch(torch)``) that gives a step, its arguments as
NumPy arrays, and options for ``brim.compile``. Its docstring says what it is, for tables.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

import brim

__all__ = ["NETWORKS", "Made", "of_brim", "of_torch"]


def of_brim() -> Any:
    """The names that the networks use, for brim."""
    ops = brim.ops
    return SimpleNamespace(
        nn=brim.nn, F=brim.nn.functional, optim=brim.optim, tanh=ops.tanh, sigmoid=ops.sigmoid, sqrt=ops.sqrt,
        where=ops.where, zeros=lambda *shape: brim.zeros(shape), arange=brim.arange,
        concat=lambda xs, axis: ops.concat(xs, axis=axis), split=lambda x, n, axis: ops.split(x, n, axis=axis),
        permute=lambda x, axes: x.permute_dims(axes), lower_triangle=lambda n: brim.tri(n, dtype="bool"),
        twice=lambda x: ops.repeat(ops.repeat(x, 2, axis=2), 2, axis=3), cast=lambda x, kind: x.astype(kind),
        clip=brim.optim.clip_grad_norm_, slope=lambda y, x: brim.grad(y, x, create_graph=True),
        recomputed=lambda block, x: block(x),
    )  # fmt: skip


def of_torch(torch: Any) -> Any:
    """The same for PyTorch."""
    from torch.utils.checkpoint import checkpoint

    return SimpleNamespace(
        nn=torch.nn, F=torch.nn.functional, optim=torch.optim, tanh=torch.tanh, sigmoid=torch.sigmoid, sqrt=torch.sqrt,
        where=torch.where, zeros=torch.zeros, arange=torch.arange,
        concat=lambda xs, axis: torch.cat(xs, dim=axis), split=lambda x, n, axis: torch.chunk(x, n, dim=axis),
        permute=lambda x, axes: x.permute(axes), lower_triangle=lambda n: torch.ones(n, n, dtype=torch.bool).tril(),
        twice=lambda x: torch.nn.functional.interpolate(x, scale_factor=2, mode="nearest"),
        cast=lambda x, kind: x.to(getattr(torch, kind)), clip=torch.nn.utils.clip_grad_norm_,
        slope=lambda y, x: torch.autograd.grad(y, x, create_graph=True)[0],
        recomputed=lambda block, x: checkpoint(block, x, use_reentrant=False),
    )  # fmt: skip


# ---------------------------------------------------------------- the networks: library -> (step, arguments, options)

Made = tuple[Callable[..., Any], list[np.ndarray], dict[str, Any]]


def _floats(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def _classes(count: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, count, shape)


def _step(
    lib: Any, loss_of: Callable[[Any, Any], Any], *optimizers: Any, before: Callable[[], Any] | None = None
) -> Any:
    def step(x: Any, y: Any) -> Any:
        loss = loss_of(x, y)
        loss.backward()
        if before is not None:
            before()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return loss.detach()

    return step


def _classifier(lib: Any, model: Any, optimizer: Any, **options: Any) -> Any:
    return _step(lib, lambda x, y: lib.F.cross_entropy(model(x), y), optimizer, **options)


def mlp(lib: Any) -> Made:
    """784-256-256-10, batch norm, dropout, SGD with momentum, batch 128"""
    nn = lib.nn
    layers: list[Any] = []
    for a in (784, 256):
        layers += [nn.Linear(a, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Dropout(0.2)]
    model = nn.Sequential(*layers, nn.Linear(256, 10))
    optimizer = lib.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    return _classifier(lib, model, optimizer), [_floats(128, 784), _classes(10, 128)], {}


def cnn(lib: Any) -> Made:
    """3 convolutions with batch norm, max pooling, dropout, 32 x 3 x 32 x 32, Adam"""
    nn, layers, width = lib.nn, [], 3
    for out in (16, 32, 64):
        layers += [nn.Conv2d(width, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU(), nn.MaxPool2d(2)]
        width = out
    model = nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.3), nn.Linear(1024, 10))
    optimizer = lib.optim.Adam(model.parameters(), lr=1e-3)
    return _classifier(lib, model, optimizer), [_floats(32, 3, 32, 32), _classes(10, 32)], {}


def _residual(lib: Any, recompute: bool) -> Made:
    nn = lib.nn

    class Block(nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.norm1 = nn.Conv2d(32, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32)
            self.conv2, self.norm2 = nn.Conv2d(32, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32)

        def forward(self, x: Any) -> Any:
            inner = lib.F.relu(self.norm1(self.conv1(x)))
            return lib.F.relu(x + self.norm2(self.conv2(inner)))

    class Net(nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 32, 3, padding=1)
            self.blocks = nn.ModuleList([Block() for _ in range(4)])
            self.head = nn.Linear(32, 10)

        def forward(self, x: Any) -> Any:
            x = self.stem(x)
            for block in self.blocks:
                x = lib.recomputed(block, x) if recompute else block(x)
            return self.head(x.mean(axis=(2, 3)))

    model = Net()
    optimizer = lib.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    options = {"recompute": [f"blocks.{n}" for n in range(4)]} if recompute else {}
    return _classifier(lib, model, optimizer), [_floats(16, 3, 32, 32), _classes(10, 16)], options


def residual(lib: Any) -> Made:
    """4 residual blocks of 32 channels, batch norm, 16 x 3 x 32 x 32, SGD with momentum"""
    return _residual(lib, False)


def recomputed(lib: Any) -> Made:
    """the same with every block recomputed (PyTorch: checkpointed)"""
    return _residual(lib, True)


def unet(lib: Any) -> Made:
    """2 levels with skip connections, 8 x 1 x 64 x 64, Adam"""
    nn, F = lib.nn, lib.F

    class UNet(nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.down1, self.down2 = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1)
            self.middle = nn.Conv2d(32, 32, 3, padding=1)
            self.up2, self.up1 = nn.Conv2d(64, 16, 3, padding=1), nn.Conv2d(32, 16, 3, padding=1)
            self.out = nn.Conv2d(16, 1, 1)

        def forward(self, x: Any) -> Any:
            a = F.relu(self.down1(x))
            b = F.relu(self.down2(F.max_pool2d(a, 2)))
            x = F.relu(self.middle(F.max_pool2d(b, 2)))
            x = F.relu(self.up2(lib.concat([lib.twice(x), b], 1)))
            return self.out(F.relu(self.up1(lib.concat([lib.twice(x), a], 1))))

    model = UNet()
    optimizer = lib.optim.Adam(model.parameters(), lr=1e-3)
    step = _step(lib, lambda x, y: F.mse_loss(model(x), y), optimizer)
    return step, [_floats(8, 1, 64, 64), _floats(8, 1, 64, 64)], {}


def shared_weights(lib: Any) -> Made:
    """one layer used twice, embedding tied to the output, 2,000 words of width 128, 16 x 32 tokens, AdamW"""
    nn = lib.nn

    class Tied(nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.mix = nn.Embedding(2000, 128), nn.Linear(128, 128)

        def forward(self, tokens: Any) -> Any:
            x = lib.tanh(self.mix(lib.tanh(self.mix(self.embed(tokens)))))
            return (x @ self.embed.weight.T).reshape(-1, 2000)

    model = Tied()
    optimizer = lib.optim.AdamW(model.parameters(), lr=1e-3)
    step = _step(lib, lambda x, y: lib.F.cross_entropy(model(x), y.reshape(-1)), optimizer)
    return step, [_classes(2000, 16, 32), _classes(2000, 16, 32)], {}


def transformer(lib: Any) -> Made:
    """2 causal blocks of width 128 with 4 heads (attention by matmul and softmax), 8 x 64 tokens, AdamW, clipping"""
    nn, F = lib.nn, lib.F

    class Block(nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self, width: int, heads: int) -> None:
            super().__init__()
            self.heads = heads
            self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
            self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.mlp = nn.Sequential(
                nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(0.1)
            )

        def forward(self, x: Any) -> Any:
            x = x + self.project(self.attend(self.qkv(self.norm1(x))))
            return x + self.mlp(self.norm2(x))

        def attend(self, qkv: Any) -> Any:
            n, t, width = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
            shape = (n, t, self.heads, width // self.heads)
            q, k, v = (lib.permute(part.reshape(shape), (0, 2, 1, 3)) for part in lib.split(qkv, 3, 2))
            scores = (q @ k.mT) / math.sqrt(width // self.heads)
            weights = F.softmax(lib.where(lib.lower_triangle(t), scores, -1e9), dim=-1)
            return lib.permute(weights @ v, (0, 2, 1, 3)).reshape(n, t, width)

    class Model(nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.places = nn.Embedding(500, 128), nn.Embedding(64, 128)
            self.blocks = nn.Sequential(Block(128, 4), Block(128, 4))
            self.norm, self.head = nn.LayerNorm(128), nn.Linear(128, 500, bias=False)

        def forward(self, tokens: Any) -> Any:
            x = self.tokens(tokens) + self.places(lib.arange(tokens.shape[1]))
            return self.head(self.norm(self.blocks(x))).reshape(-1, 500)

    model = Model()
    optimizer = lib.optim.AdamW(model.parameters(), lr=1e-3)
    step = _step(
        lib, lambda x, y: F.cross_entropy(model(x), y.reshape(-1)), optimizer,
        before=lambda: lib.clip(list(model.parameters()), 1.0),
    )  # fmt: skip
    return step, [_classes(500, 8, 64), _classes(500, 8, 64)], {}


def embedding(lib: Any) -> Made:
    """mean of 40 word vectors out of 5,000 of width 64, batch 64, Adam"""
    nn = lib.nn

    class Bag(nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.out = nn.Embedding(5000, 64), nn.Linear(64, 5)

        def forward(self, words: Any) -> Any:
            return self.out(self.embed(words).mean(axis=1))

    model = Bag()
    optimizer = lib.optim.Adam(model.parameters(), lr=1e-3)
    return _classifier(lib, model, optimizer), [_classes(5000, 64, 40), _classes(5, 64)], {}


def dropout(lib: Any) -> Made:
    """dropout before each of 4 layers of 512, SiLU, batch 256, SGD"""
    nn = lib.nn
    layers: list[Any] = []
    for _ in range(3):
        layers += [nn.Dropout(0.5), nn.Linear(512, 512), nn.SiLU()]
    model = nn.Sequential(*layers, nn.Dropout(0.5), nn.Linear(512, 10))
    optimizer = lib.optim.SGD(model.parameters(), lr=0.1)
    return _classifier(lib, model, optimizer), [_floats(256, 512), _classes(10, 256)], {}


def accumulation(lib: Any) -> Made:
    """4 micro-batches of 64 for each update, 256-512-16, SGD with momentum"""
    nn = lib.nn
    model = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 16))
    optimizer = lib.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def step(x: Any, y: Any) -> Any:
        total = 0.0
        for start in range(0, 256, 64):
            loss = lib.F.mse_loss(model(x[start : start + 64]), y[start : start + 64]) / 4
            loss.backward()
            total = total + loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        return total

    return step, [_floats(256, 256), _floats(256, 16)], {}


def mixed_precision(lib: Any) -> Made:
    """3 layers of 512, activations in bfloat16, weights in float32, batch 256, AdamW"""
    nn = lib.nn
    layers = nn.ModuleList([nn.Linear(512, 512), nn.Linear(512, 512), nn.Linear(512, 10)])
    optimizer = lib.optim.AdamW(layers.parameters(), lr=1e-3)

    def loss_of(x: Any, y: Any) -> Any:
        x = lib.cast(x, "bfloat16")
        for n, layer in enumerate(layers):
            x = lib.F.linear(x, lib.cast(layer.weight, "bfloat16"), lib.cast(layer.bias, "bfloat16"))
            x = lib.F.relu(x) if n < 2 else x
        return lib.F.cross_entropy(lib.cast(x, "float32"), y)

    return _step(lib, loss_of, optimizer), [_floats(256, 512), _classes(10, 256)], {}


def two_optimizers(lib: Any) -> Made:
    """encoder 256-512 with SGD, head 512-20 with AdamW, batch 128"""
    nn = lib.nn
    encoder, head = nn.Sequential(nn.Linear(256, 512), nn.Tanh()), nn.Linear(512, 20)
    slow = lib.optim.SGD(encoder.parameters(), lr=0.05, momentum=0.8)
    fast = lib.optim.AdamW(head.parameters(), lr=0.02)
    step = _step(lib, lambda x, y: lib.F.cross_entropy(head(encoder(x)), y), slow, fast)
    return step, [_floats(128, 256), _classes(20, 128)], {}


def rmsprop(lib: Any) -> Made:
    """regression 64-256-256-1, Huber loss, batch 128, RMSprop, centred, with momentum"""
    nn = lib.nn
    model = nn.Sequential(nn.Linear(64, 256), nn.Sigmoid(), nn.Linear(256, 256), nn.Sigmoid(), nn.Linear(256, 1))
    optimizer = lib.optim.RMSprop(model.parameters(), lr=1e-3, momentum=0.5, centered=True)
    step = _step(lib, lambda x, y: lib.F.huber_loss(model(x), y), optimizer)
    return step, [_floats(128, 64), _floats(128, 1)], {}


def lstm(lib: Any) -> Made:
    """LSTM cell of 128 units written out, 16 steps of time, batch 32, Adam"""
    nn = lib.nn

    class LSTM(nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.of_input, self.of_hidden = nn.Linear(64, 512), nn.Linear(128, 512, bias=False)
            self.out = nn.Linear(128, 5)

        def forward(self, x: Any) -> Any:
            h = c = lib.zeros(x.shape[0], 128)
            for t in range(x.shape[1]):
                i, f, g, o = lib.split(self.of_input(x[:, t]) + self.of_hidden(h), 4, 1)
                c = lib.sigmoid(f) * c + lib.sigmoid(i) * lib.tanh(g)
                h = lib.sigmoid(o) * lib.tanh(c)
            return self.out(h)

    model = LSTM()
    optimizer = lib.optim.Adam(model.parameters(), lr=1e-3)
    return _classifier(lib, model, optimizer), [_floats(32, 16, 64), _classes(5, 32)], {}


def clipped(lib: Any) -> Made:
    """128-256-256-2, gradients scaled by their common norm, batch 64, SGD with momentum"""
    nn = lib.nn
    model = nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 2))
    optimizer = lib.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    step = _step(
        lib, lambda x, y: lib.F.mse_loss(model(x), y), optimizer, before=lambda: lib.clip(list(model.parameters()), 0.7)
    )
    return step, [_floats(64, 128), _floats(64, 2)], {}


def gradient_penalty(lib: Any) -> Made:
    """critic 64-256-256-1 whose slope is pulled to 1 (second derivatives), batch 128, Adam"""
    nn = lib.nn
    model = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 1))
    optimizer = lib.optim.Adam(model.parameters(), lr=1e-3)

    def loss_of(x: Any, y: Any) -> Any:
        x = x.detach().requires_grad_()
        score = model(x)
        slope = lib.slope(score.sum(), x)
        return lib.F.mse_loss(score, y) + 10.0 * ((lib.sqrt((slope * slope).sum(axis=1) + 1e-6) - 1.0) ** 2).mean()

    return _step(lib, loss_of, optimizer), [_floats(128, 64), _floats(128, 1)], {}


NETWORKS: tuple[Callable[[Any], Made], ...] = (
    mlp, cnn, residual, recomputed, unet, shared_weights, transformer, embedding, dropout, accumulation,
    mixed_precision, two_optimizers, rmsprop, lstm, clipped, gradient_penalty,
)  # fmt: skip
