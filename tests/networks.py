"""Small real networks with their training steps, as a user would write them: what planned steps are tested on.

Each entry of ``NETWORKS`` is a function that builds one: modules, optimizers, the step and what it is called with.
Sizes are small, and the axes of every array differ where they can, so that a mixed-up axis is noticed; ``times``
multiplies the batch where a test wants arrays large enough to be seen.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import brim
from brim import nn, ops, optim
from brim.program.compile import CompiledStep
from brim.program.compile import compile as compile_step

F = nn.functional

__all__ = ["NETWORKS", "STEPS", "Net", "compiled", "make"]

STEPS = 5


@dataclass
class Net:
    """One network in training.

    Attributes:
        modules: what is trained.
        optimizers: what trains it.
        steps: the functions that a user would compile; most networks have one.
        calls: (which of the steps, its arguments as NumPy arrays), in the order of a run.
        options: further options for ``brim.compile``.
    """

    modules: list[nn.Module]
    optimizers: list[optim.Optimizer]
    steps: tuple[Callable[..., Any], ...]
    calls: list[tuple[int, tuple[np.ndarray, ...]]]
    options: dict[str, Any] = field(default_factory=dict)

    def state(self) -> dict[str, np.ndarray | float]:
        """Copies of all parameters, gradients, buffers and optimizer state, and the optimizers' numbers."""
        found: dict[str, Any] = {}
        for m, module in enumerate(self.modules):
            for name, p in module.named_parameters():
                found[f"{m}.{name}"] = np.array(p.detach().numpy())
                found[f"{m}.{name}.grad"] = None if p.grad is None else np.array(p.grad.numpy())
            for name, b in module.named_buffers():
                found[f"{m}.{name}"] = np.array(b.numpy())
        for o, optimizer in enumerate(self.optimizers):
            for name, array in optimizer.state_arrays().items():
                found[f"optimizer {o}.{name}"] = np.array(array)
            settings = optimizer.state_settings()
            settings["state"] = {index: values for index, values in settings["state"].items() if values}
            found[f"optimizer {o}"] = settings
        found["random"] = brim.random.get_state()
        return found


def _batches(*makes: Callable[[np.random.Generator], np.ndarray], count: int = STEPS) -> list[tuple[np.ndarray, ...]]:
    rng = np.random.default_rng(7)
    return [tuple(make(rng) for make in makes) for _ in range(count)]


def _calls(*makes: Callable[[np.random.Generator], np.ndarray]) -> list[tuple[int, tuple[np.ndarray, ...]]]:
    return [(0, batch) for batch in _batches(*makes)]


def _floats(*shape: int) -> Callable[[np.random.Generator], np.ndarray]:
    return lambda rng: rng.standard_normal(shape).astype(np.float32)


def _classes(count: int, *shape: int) -> Callable[[np.random.Generator], np.ndarray]:
    return lambda rng: rng.integers(0, count, shape)


def _classifier(model: nn.Module, optimizer: optim.Optimizer) -> Callable[..., Any]:
    def step(x: Any, y: Any) -> Any:
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step


# ---------------------------------------------------------------- the networks


def mlp(times: int = 1) -> Net:
    """Two layers, Adam."""
    model = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 5))
    optimizer = optim.Adam(model.parameters(), lr=0.01)
    return Net(
        [model], [optimizer], (_classifier(model, optimizer),), _calls(_floats(32 * times, 20), _classes(5, 32 * times))
    )


def cnn(times: int = 1) -> Net:
    """Convolutions, batch norm, both poolings, dropout, SGD with Nesterov momentum and weight decay."""
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 8, 3, stride=2, bias=False), nn.BatchNorm2d(8), nn.LeakyReLU(), nn.AvgPool2d(2),
        nn.Flatten(), nn.Dropout(0.3), nn.Linear(8, 4),
    )  # fmt: skip
    optimizer = optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3)
    return Net(
        [model],
        [optimizer],
        (_classifier(model, optimizer),),
        _calls(_floats(6 * times, 2, 12, 12), _classes(4, 6 * times)),
    )


class _Residual(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Any) -> Any:
        return ops.relu(x + self.inner(x))


def _residual_block(width: int) -> nn.Module:
    return _Residual(
        nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width),
        )
    )  # fmt: skip


class _ResidualNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.blocks = nn.ModuleList([_residual_block(6) for _ in range(3)])
        self.head = nn.Linear(6, 4)

    def forward(self, x: Any) -> Any:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(axis=(2, 3)))


def residual(times: int = 1) -> Net:
    """Three residual blocks with batch norm, SGD with momentum."""
    model = _ResidualNet()
    optimizer = optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    return Net(
        [model],
        [optimizer],
        (_classifier(model, optimizer),),
        _calls(_floats(4 * times, 3, 8, 8), _classes(4, 4 * times)),
    )


def recomputed(times: int = 1) -> Net:
    """The residual network with the activations of its blocks computed again in the backward pass."""
    net = residual(times)
    net.options["recompute"] = ["blocks.0", "blocks.1", "blocks.2"]
    return net


class _UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 8, 3, padding=1)
        self.middle = nn.Conv2d(8, 8, 3, padding=1)
        self.up2, self.up1 = nn.Conv2d(16, 4, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)
        self.out = nn.Conv2d(4, 1, 1)

    def forward(self, x: Any) -> Any:
        a = ops.relu(self.down1(x))
        b = ops.relu(self.down2(F.max_pool2d(a, 2)))
        x = ops.relu(self.middle(F.max_pool2d(b, 2)))
        x = ops.relu(self.up2(ops.concat([_twice(x), b], axis=1)))
        x = ops.relu(self.up1(ops.concat([_twice(x), a], axis=1)))
        return self.out(x)


def _twice(x: Any) -> Any:
    """Each pixel becomes 2 x 2 of them."""
    return ops.repeat(ops.repeat(x, 2, axis=2), 2, axis=3)


def unet(times: int = 1) -> Net:
    """Two levels with skip connections, a mask for each pixel as target."""
    model = _UNet()
    optimizer = optim.Adam(model.parameters(), lr=0.01)
    loss_of = nn.BCEWithLogitsLoss()

    def step(x: Any, y: Any) -> Any:
        loss = loss_of(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    def mask(rng: np.random.Generator) -> np.ndarray:
        return (rng.random((3 * times, 1, 12, 12)) < 0.4).astype(np.float32)

    return Net([model], [optimizer], (step,), _calls(_floats(3 * times, 1, 12, 12), mask))


class _TiedLanguageModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, 8)
        self.mix = nn.Linear(8, 8)

    def forward(self, tokens: Any) -> Any:
        x = ops.tanh(self.mix(self.embed(tokens)))
        x = ops.tanh(self.mix(x))  # the same layer once more
        return ops.matmul(x, self.embed.weight.T)  # and the embedding as output layer


def shared_weights(times: int = 1) -> Net:
    """One layer used twice, the embedding tied to the output layer."""
    model = _TiedLanguageModel()
    optimizer = optim.AdamW(model.parameters(), lr=0.01)

    def step(tokens: Any, targets: Any) -> Any:
        loss = F.cross_entropy(model(tokens).reshape(-1, 13), targets.reshape(-1))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return Net([model], [optimizer], (step,), _calls(_classes(13, 4 * times, 6), _classes(13, 4 * times, 6)))


class _Block(nn.Module):
    """A block of a causal transformer, norms first."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(0.1))

    def forward(self, x: Any) -> Any:
        return self._mlp(x + self.project(self._attend(self.qkv(self.norm1(x)))))

    def _mlp(self, x: Any) -> Any:
        return x + self.mlp(self.norm2(x))

    def _attend(self, qkv: Any) -> Any:
        n, t, width = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
        q, k, v = (
            part.reshape(n, t, self.heads, width // self.heads).permute_dims((0, 2, 1, 3))
            for part in ops.split(qkv, 3, axis=2)
        )
        scores = ops.matmul(q, k.mT) / math.sqrt(width // self.heads)
        causal = brim.tri(t, dtype="bool")
        weights = ops.softmax(ops.where(causal, scores, -1e9), axis=-1)
        return ops.matmul(weights, v).permute_dims((0, 2, 1, 3)).reshape(n, t, width)


class _Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(11, 12), nn.Embedding(7, 12)
        self.blocks = nn.Sequential(_Block(12, 3), _Block(12, 3))
        self.norm, self.head = nn.LayerNorm(12), nn.Linear(12, 11, bias=False)

    def forward(self, tokens: Any) -> Any:
        x = self.tokens(tokens) + self.places(brim.arange(tokens.shape[1]))
        return self.head(self.norm(self.blocks(x)))


def transformer(times: int = 1) -> Net:
    """A causal language model: attention by matmul and softmax, LayerNorm, GELU, dropout, clipped gradients."""
    model = _Transformer()
    optimizer = optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)

    def step(tokens: Any, targets: Any) -> Any:
        loss = F.cross_entropy(model(tokens).reshape(-1, 11), targets.reshape(-1))
        loss.backward()
        optim.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return Net([model], [optimizer], (step,), _calls(_classes(11, 3 * times, 7), _classes(11, 3 * times, 7)))


class _Bag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(30, 10, padding_idx=0), nn.Linear(10, 3)

    def forward(self, words: Any) -> Any:
        return self.out(self.embed(words).mean(axis=1))


def embedding(times: int = 1) -> Net:
    """Mean of word vectors, one linear layer; the rows that are looked up repeat."""
    model = _Bag()
    optimizer = optim.Adam(model.parameters(), lr=0.05)
    return Net(
        [model],
        [optimizer],
        (_classifier(model, optimizer),),
        _calls(_classes(30, 8 * times, 5), _classes(3, 8 * times)),
    )


def dropout_heavy(times: int = 1) -> Net:
    """Dropout before every layer; the loss and the prediction are both returned, in a dict."""
    model = nn.Sequential(
        nn.Dropout(0.1), nn.Linear(16, 24), nn.SiLU(), nn.Dropout(0.5), nn.Linear(24, 24), nn.Tanh(), nn.Dropout(0.5),
        nn.Linear(24, 3),
    )  # fmt: skip
    optimizer = optim.SGD(model.parameters(), lr=0.1)

    def step(x: Any, y: Any) -> Any:
        logits = model(x)
        loss = F.cross_entropy(logits, y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return {"loss": loss, "prediction": logits.detach().argmax(axis=1)}

    return Net([model], [optimizer], (step,), _calls(_floats(12 * times, 16), _classes(3, 12 * times)))


def accumulation_in_a_step(times: int = 1) -> Net:
    """Three micro-batches for each update, all within one step."""
    model = nn.Sequential(nn.Linear(10, 16), nn.GELU(), nn.Linear(16, 2))
    optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def step(x: Any, y: Any) -> Any:
        total, size = 0.0, x.shape[0] // 3
        for part in range(3):
            rows = slice(part * size, (part + 1) * size)
            loss = F.mse_loss(model(x[rows]), y[rows]) / 3
            loss.backward()
            total = total + loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        return total

    return Net([model], [optimizer], (step,), _calls(_floats(12 * times, 10), _floats(12 * times, 2)))


def accumulation_across_calls(times: int = 1) -> Net:
    """Three calls that add to the gradients for each call that updates; the run ends with gradients that wait."""
    model = nn.Sequential(nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 2))
    optimizer = optim.Adam(model.parameters(), lr=0.01)

    def add_up(x: Any, y: Any) -> Any:
        loss = F.mse_loss(model(x), y) / 3
        loss.backward()
        return loss

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad()

    micro = _batches(_floats(4 * times, 10), _floats(4 * times, 2), count=3 * 3 + 2)
    calls: list[tuple[int, tuple[np.ndarray, ...]]] = []
    for n, batch in enumerate(micro):
        calls.append((0, batch))
        if n % 3 == 2:
            calls.append((1, ()))
    return Net([model], [optimizer], (add_up, update), calls)


class _Half(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(18, 24), nn.LayerNorm(24), nn.Linear(24, 4)

    def forward(self, x: Any) -> Any:
        half = brim.bfloat16
        x = F.linear(x.astype(half), self.first.weight.astype(half), self.first.bias.astype(half))
        x = self.norm(ops.gelu(x).astype(brim.float32)).astype(half)
        return F.linear(x, self.last.weight.astype(half), self.last.bias.astype(half)).astype(brim.float32)


def mixed_precision(times: int = 1) -> Net:
    """Activations and products in bfloat16, weights and their updates in float32."""
    model = _Half()
    optimizer = optim.AdamW(model.parameters(), lr=0.01)
    return Net(
        [model], [optimizer], (_classifier(model, optimizer),), _calls(_floats(8 * times, 18), _classes(4, 8 * times))
    )


def two_optimizers(times: int = 1) -> Net:
    """SGD for the encoder, AdamW for the head, with learning rates that follow a schedule."""
    encoder, head = nn.Sequential(nn.Linear(14, 20), nn.Tanh()), nn.Linear(20, 3)
    slow = optim.SGD(encoder.parameters(), lr=0.05, momentum=0.8)
    fast = optim.AdamW(head.parameters(), lr=0.02)

    def step(x: Any, y: Any) -> Any:
        loss = F.cross_entropy(head(encoder(x)), y, label_smoothing=0.1)
        loss.backward()
        for optimizer in (slow, fast):
            optimizer.step()
            optimizer.zero_grad()
        return loss

    return Net([encoder, head], [slow, fast], (step,), _calls(_floats(9 * times, 14), _classes(3, 9 * times)))


def rmsprop(times: int = 1) -> Net:
    """RMSprop with momentum, centred, on a regression with the Huber loss."""
    model = nn.Sequential(nn.Linear(6, 12), nn.Sigmoid(), nn.Linear(12, 1))
    optimizer = optim.RMSprop(model.parameters(), lr=0.01, momentum=0.5, centered=True)
    loss_of = nn.HuberLoss()

    def step(x: Any, y: Any) -> Any:
        loss = loss_of(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return Net([model], [optimizer], (step,), _calls(_floats(10 * times, 6), _floats(10 * times, 1)))


class _LSTM(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.hidden = hidden
        self.of_input, self.of_hidden = nn.Linear(width, 4 * hidden), nn.Linear(hidden, 4 * hidden, bias=False)
        self.out = nn.Linear(hidden, 3)

    def forward(self, x: Any) -> Any:
        h = c = brim.zeros((x.shape[0], self.hidden))
        for t in range(x.shape[1]):
            i, f, g, o = ops.split(self.of_input(x[:, t]) + self.of_hidden(h), 4, axis=1)
            c = ops.sigmoid(f) * c + ops.sigmoid(i) * ops.tanh(g)
            h = ops.sigmoid(o) * ops.tanh(c)
        return self.out(h)


def lstm(times: int = 1) -> Net:
    """An LSTM cell unrolled over six steps of time, gradients clipped by value."""
    model = _LSTM(5, 9)
    optimizer = optim.Adam(model.parameters(), lr=0.02)

    def step(x: Any, y: Any) -> Any:
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optim.clip_grad_value_(model.parameters(), 0.05)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return Net([model], [optimizer], (step,), _calls(_floats(7 * times, 6, 5), _classes(3, 7 * times)))


def hypergradient(times: int = 1) -> Net:
    """A learning rate that learns itself."""
    model = nn.Sequential(nn.Linear(8, 10), nn.ReLU(), nn.Linear(10, 2))
    optimizer = optim.SGD(model.parameters(), lr=0.05, momentum=0.9, hypergradient=1e-4)

    def step(x: Any, y: Any) -> Any:
        loss = F.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return Net([model], [optimizer], (step,), _calls(_floats(10 * times, 8), _floats(10 * times, 2)))


def clipped(times: int = 1) -> Net:
    """All gradients scaled by their common norm, which is returned with the loss; two parameter groups."""
    first, last = nn.Linear(9, 15), nn.Linear(15, 2)
    optimizer = optim.SGD(
        [{"params": list(first.parameters()), "lr": 0.3}, {"params": list(last.parameters())}], lr=0.1, momentum=0.5
    )

    def step(x: Any, y: Any) -> Any:
        loss = F.mse_loss(last(ops.relu(first(x))), y, reduction="sum")
        loss.backward()
        norm = optim.clip_grad_norm_([*first.parameters(), *last.parameters()], 0.7)
        optimizer.step()
        optimizer.zero_grad()
        return loss, norm

    return Net([first, last], [optimizer], (step,), _calls(_floats(6 * times, 9), _floats(6 * times, 2)))


def gradient_penalty(times: int = 1) -> Net:
    """A critic whose gradient with respect to its input is pulled towards norm 1: second derivatives."""
    model = nn.Sequential(nn.Linear(6, 14), nn.Tanh(), nn.Linear(14, 1))
    optimizer = optim.Adam(model.parameters(), lr=0.01)

    def step(x: Any, y: Any) -> Any:
        x = x.detach().requires_grad_()
        score = model(x)
        slope = brim.grad(score.sum(), x, create_graph=True)
        penalty = ((ops.sqrt((slope * slope).sum(axis=1) + 1e-6) - 1.0) ** 2).mean()
        loss = F.mse_loss(score, y) + 10.0 * penalty
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss, penalty

    return Net([model], [optimizer], (step,), _calls(_floats(8 * times, 6), _floats(8 * times, 1)))


NETWORKS: dict[str, Callable[..., Net]] = {
    make.__name__: make
    for make in (
        mlp, cnn, residual, recomputed, unet, shared_weights, transformer, embedding, dropout_heavy,
        accumulation_in_a_step, accumulation_across_calls, mixed_precision, two_optimizers, rmsprop, lstm,
        hypergradient, clipped, gradient_penalty,
    )
}  # fmt: skip


def make(name: str, times: int = 1) -> Net:
    """A network with the same weights at every call."""
    brim.manual_seed(3)
    return NETWORKS[name](times)


def compiled(net: Net, **options: Any) -> list[CompiledStep]:
    """The steps of a network, planned."""
    return [compile_step(step, **{**net.options, **options}) for step in net.steps]
