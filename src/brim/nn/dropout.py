"""Dropout."""

from __future__ import annotations

from typing import Any

from brim.context import baked
from brim.nn import functional as F
from brim.nn.module import Module

__all__ = ["Dropout"]


class Dropout(Module):
    """In training, each element is zero with probability ``p``, else divided by ``1 - p``; in evaluation the input.

    Source: N. Srivastava et al., "Dropout", JMLR 15 (2014). The mask is never stored.
    """

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        if not 0.0 <= p <= 1.0:
            raise ValueError(f"dropout probability must be in [0, 1], got {p}")
        self.p = p

    def forward(self, x: Any) -> Any:
        return F.dropout(x, baked(lambda: self.p), self.training)

    def extra_repr(self) -> str:
        return f"p={self.p}"
