"""A training step of a small causal transformer: 2 blocks of width 128 with 4 heads, 64 tokens of 65, dropout 0.1.

Blocks with the norm before (Radford et al. 2019), GELU by tanh, attention by the library's own function.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from brim_bench.workload import Job, Workload
from brim_bench.workloads.training import training_job

__all__ = ["WORKLOADS", "network"]

_BATCH, _TOKENS, _WIDTH, _HEADS, _BLOCKS, _WORDS = 32, 64, 128, 4, 2, 65


def network(
    side: Any, tokens: int, width: int, heads: int, blocks: int, words: int, p: float, shared: bool = False
) -> Any:
    """The transformer; ``shared``: the head has the weights of the embedding and no bias."""
    nn, F = side.nn, side.F

    class Block(nn.Module):  # type: ignore[name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.norm2, self.up, self.down = (
                nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width),
            )  # fmt: skip
            self.drop = nn.Dropout(p)

        def forward(self, x: Any) -> Any:
            n, t, _ = x.shape
            shape = (n, t, heads, width // heads)
            q, k, v = (side.permute(part.reshape(shape), (0, 2, 1, 3)) for part in side.thirds(self.qkv(self.norm1(x))))
            seen = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=p if self.training else 0.0)
            x = x + self.drop(self.out(side.permute(seen, (0, 2, 1, 3)).reshape((n, t, width))))
            return x + self.drop(self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh")))

    class Model(nn.Module):  # type: ignore[name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.words, self.places, self.drop = nn.Embedding(words, width), nn.Embedding(tokens, width), nn.Dropout(p)
            self.blocks = nn.Sequential(*[Block() for _ in range(blocks)])
            self.norm = nn.LayerNorm(width)
            if not shared:
                self.head = nn.Linear(width, words)
            self.register_buffer("positions", side.asarray(np.arange(tokens)))

        def forward(self, x: Any) -> Any:
            x = self.drop(self.words(x) + self.places(self.positions))
            x = self.norm(self.blocks(x))
            return F.linear(x, self.words.weight) if shared else self.head(x)

    return Model()


def lm_step(side: Any, checking: bool, batch: int) -> Job:
    """Forward, cross entropy over all tokens, backward, AdamW."""
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, _WORDS, (2, batch, _TOKENS))
    model = network(side, _TOKENS, _WIDTH, _HEADS, _BLOCKS, _WORDS, 0.0 if checking else 0.1)
    return training_job(side, model, "adamw", side.asarray(x), side.asarray(y))


_ROWS = _BATCH * _TOKENS
_WEIGHTS = _BLOCKS * 12 * _WIDTH**2 + _WIDTH * _WORDS
_PRODUCTS = 2.0 * _ROWS * _WEIGHTS + _BLOCKS * 2 * 2.0 * _ROWS * _TOKENS * _WIDTH  # layers; scores and their sums

WORKLOADS = (
    Workload(
        f"lm_step_b{_BATCH}",
        f"training step of a transformer ({_BLOCKS} blocks of {_WIDTH}, {_TOKENS} tokens, AdamW), batch {_BATCH}",
        "lm_step", {"batch": _BATCH}, flops=3 * _PRODUCTS,
        # Parameters as in an MLP with one state more; per token and block 16 widths are kept (queries, keys, values,
        # attention, norms, the four widths of the MLP before and after GELU), each written and read, as its gradient.
        nbytes=4 * (8 * _WEIGHTS + 4 * _ROWS * (_BLOCKS * 16 * _WIDTH + 2 * _WORDS)),
        build=lm_step,
        # Adam divides by the gradient's size: where it is zero but for rounding (the bias of keys), steps are noise.
        tolerances={"losses": 5e-3, "update": 0.1},
    ),
)  # fmt: skip
