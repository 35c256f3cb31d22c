"""Embedding."""

from __future__ import annotations

from typing import Any

from brim.autograd import no_grad
from brim.nn import functional as F
from brim.nn import init
from brim.nn.linear import new_parameter
from brim.nn.module import Module

__all__ = ["Embedding"]


class Embedding(Module):
    """A table of ``num_embeddings`` learned rows of ``embedding_dim`` numbers, looked up by integer index.

    Arguments:
        padding_idx: a row that starts at zero and gets no gradient, or None.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if padding_idx is not None and not -num_embeddings <= padding_idx < num_embeddings:
            raise ValueError(f"padding_idx must be a row of the {num_embeddings}, got {padding_idx}")
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.padding_idx = padding_idx if padding_idx is None else padding_idx % num_embeddings
        self.weight = new_parameter((num_embeddings, embedding_dim), device, dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw from the standard normal distribution; the padding row is zero."""
        init.normal_(self.weight)
        if self.padding_idx is not None and not self.weight.device.is_meta:
            with no_grad():
                self.weight.detach()[self.padding_idx].write(0.0)

    def forward(self, index: Any) -> Any:
        return F.embedding(index, self.weight, self.padding_idx)

    def extra_repr(self) -> str:
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{self.num_embeddings}, {self.embedding_dim}{padding}"
