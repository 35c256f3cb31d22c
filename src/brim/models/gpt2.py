"""GPT-2: a causal transformer over tokens, with learned positions, norms before each half block and a tied head.

Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"; sizes as in its table 2.
"""

from __future__ import annotations

import math
from typing import Any

from brim import nn, ops, random
from brim.creation import arange
from brim.errors import ShapeError
from brim.nn import functional as F
from brim.nn import init
from brim.spec import Spec, as_dtype

__all__ = ["GPT2", "GPT2_SIZES", "next_token_loss"]

GPT2_SIZES: dict[str, dict[str, int]] = {
    "gpt2": {"layers": 12, "width": 768, "heads": 12},
    "gpt2-medium": {"layers": 24, "width": 1024, "heads": 16},
    "gpt2-large": {"layers": 36, "width": 1280, "heads": 20},
    "gpt2-xl": {"layers": 48, "width": 1600, "heads": 25},
}
"""Arguments of ``GPT2`` for the four published sizes: 124, 355, 774 and 1558 million parameters."""


class Attention(nn.Module):
    """Causal self-attention with several heads: softmax(q k^T / sqrt(D)) v, each token seeing itself and those before.

    Arguments:
        width: numbers per token, divisible by ``heads``.
        dropout: share of attention weights and of outputs that is dropped in training.
    """

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not divisible by {heads} heads")
        self.heads, self.dropout = heads, dropout
        self.c_attn = nn.Linear(width, 3 * width)
        self.c_proj = nn.Linear(width, width)

    def forward(self, x: Any, visible: Any) -> Any:
        B, T, width = x.shape
        D = width // self.heads
        heads = ops.permute_dims(self.c_attn(x).reshape((B, T, 3, self.heads, D)), (2, 0, 3, 1, 4))
        q, k, v = heads[0], heads[1], heads[2]  # (B, heads, T, D)
        how: dict[str, Any] = {}
        if self.training and self.dropout:
            how["seed"], how["counter"] = random.next_counter()
            how["dropout_p"] = self.dropout
        found = ops.attention(q, k, v, causal=True, visible=visible, **how)
        joined = ops.permute_dims(found, (0, 2, 1, 3)).reshape((B, T, width))
        return F.dropout(self.c_proj(joined), self.dropout, self.training)


class MLP(nn.Module):
    """Two linear layers with GELU (the formula with tanh) and four times the width between them."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.c_fc = nn.Linear(width, 4 * width)
        self.c_proj = nn.Linear(4 * width, width)

    def forward(self, x: Any) -> Any:
        return F.dropout(self.c_proj(F.gelu(self.c_fc(x), approximate="tanh")), self.dropout, self.training)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads, dropout)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = MLP(width, dropout)

    def forward(self, x: Any, visible: Any) -> Any:
        x = x + self.attn(self.ln_1(x), visible)
        return x + self.mlp(self.ln_2(x))


class GPT2(nn.Module):
    """Scores of the next token at each position: index (B, T) of int64 -> (B, T, vocabulary).

    Arguments:
        layers, width, heads: number of blocks, numbers per token, attention heads.
        vocabulary: number of different tokens.
        context: most tokens in a sequence.
        dropout: share that is dropped in training.

    Raises:
        ShapeError: called with a sequence longer than ``context``.
    """

    def __init__(
        self,
        layers: int = 12,
        width: int = 768,
        heads: int = 12,
        vocabulary: int = 50257,
        context: int = 1024,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.vocabulary, self.context, self.dropout = vocabulary, context, dropout
        self.wte = nn.Embedding(vocabulary, width)  # the head, too
        self.wpe = nn.Embedding(context, width)
        self.h = nn.ModuleList([Block(width, heads, dropout) for _ in range(layers)])
        self.ln_f = nn.LayerNorm(width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal with deviation 0.02; what is added to the residual stream is scaled by 1/sqrt(2 layers). Biases 0."""
        for name, param in self.named_parameters():
            if param.ndim == 2:
                scaled = name.endswith("c_proj.weight")
                init.normal_(param, 0.0, 0.02 / math.sqrt(2 * len(self.h)) if scaled else 0.02)
            elif name.endswith("bias"):
                init.zeros_(param)

    def example_batch(self, batch_size: int) -> tuple[Spec, Spec]:
        """Specs of a batch of whole sequences and of their next tokens."""
        tokens = Spec((batch_size, self.context), as_dtype("int64"))
        return tokens, tokens

    def forward(self, index: Any) -> Any:
        length = index.shape[1]
        if length > self.context:
            raise ShapeError(f"the sequence has {length} tokens, this model takes at most {self.context}")
        position = arange(length, device=index.device)
        visible = ops.expand_dims(position, 1) >= position  # (T, T): row t sees columns up to t
        x = F.dropout(self.wte(index) + self.wpe(position), self.dropout, self.training)
        for block in self.h:
            x = block(x, visible)
        return F.linear(self.ln_f(x), self.wte.weight)


def next_token_loss(scores: Any, targets: Any) -> Any:
    """Mean cross-entropy of scores (B, T, vocabulary) against the next tokens (B, T)."""
    return F.cross_entropy(scores.reshape((-1, scores.shape[-1])), targets.reshape((-1,)))
