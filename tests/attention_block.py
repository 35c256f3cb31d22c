"""One block of GPT-2 and its step, for the tests of attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import brim
from brim import nn, ops
from brim.models.gpt2 import Block

__all__ = ["OneBlock", "block_step"]


class OneBlock(nn.Module):
    """A block of GPT-2, 32 wide, with 4 heads."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.block = Block(width=32, heads=4, dropout=dropout)

    def forward(self, x: Any) -> Any:
        position = brim.arange(x.shape[1], device=x.device)
        return self.block(x, ops.expand_dims(position, 1) >= position)


def block_step(place: Any, dropout: float = 0.0) -> Callable[..., Any]:
    """Loss and gradients of one such block."""
    brim.manual_seed(0)
    model = OneBlock(dropout).to(place)

    def step(x: Any) -> Any:
        loss = model(x).square().mean()
        loss.backward()
        gradients = [p.grad for p in model.parameters()]
        for p in model.parameters():
            p.grad = None
        return loss, *gradients

    return step
