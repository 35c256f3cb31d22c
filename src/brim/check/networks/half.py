"""Networks that compute in half width as users have them do so: autocast, and a scaled loss for float16."""

from __future__ import annotations

from typing import Any

import brim
from brim import nn, ops, optim
from brim.check.networks.net import Net, calls_of, classes, floats

__all__ = ["autocast_attention", "scaled_cnn"]

F = nn.functional


class _Attention(nn.Module):
    """One block of a causal language model, attention as one op."""

    def __init__(self, words: int, length: int, heads: int, head_size: int) -> None:
        super().__init__()
        width = heads * head_size
        self.heads = heads
        self.tokens, self.places = nn.Embedding(words, width), nn.Embedding(length, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width), nn.Dropout(0.1))
        self.head = nn.Linear(width, words, bias=False)

    def forward(self, tokens: Any) -> Any:
        x = self.tokens(tokens) + self.places(brim.arange(tokens.shape[1]))
        n, t, width = x.shape
        q, k, v = (
            part.reshape(n, t, self.heads, width // self.heads).permute_dims((0, 2, 1, 3))
            for part in ops.split(self.qkv(self.norm1(x)), 3, axis=2)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.project(mixed.permute_dims((0, 2, 1, 3)).reshape(n, t, width))
        return self.head(x + self.mlp(self.norm2(x)))


def autocast_attention(times: int = 1) -> Net:
    """A causal language model in bfloat16, weights in float32; clipped gradients, AdamW."""
    model = _Attention(words=11, length=9, heads=2, head_size=16)
    optimizer = optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)

    def step(tokens: Any, targets: Any) -> Any:
        with brim.autocast("bfloat16"):
            loss = F.cross_entropy(model(tokens).reshape(-1, 11), targets.reshape(-1))
        loss.backward()
        optim.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    given = calls_of(classes(11, 3 * times, 9), classes(11, 3 * times, 9))
    return Net([model], [optimizer], (step,), given, rounding=2.0**-8)


def scaled_cnn(times: int = 1) -> Net:
    """A residual convolution in float16 with a scaled loss; SGD with momentum."""
    stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    inner = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
    head = nn.Sequential(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8 * 9, 4))
    modules: list[nn.Module] = [stem, inner, head]
    optimizer = optim.SGD([p for m in modules for p in m.parameters()], lr=0.004, momentum=0.9)
    scaler = optim.GradScaler(init_scale=2.0**8)

    def step(x: Any, y: Any) -> Any:
        with brim.autocast("float16"):
            x = stem(x)
            loss = F.cross_entropy(head(ops.relu(x + inner(x))), y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        return loss

    given = calls_of(floats(12 * times, 3, 6, 6), classes(4, 12 * times))
    return Net(modules, [optimizer], (step,), given, rounding=2.0**-11)
