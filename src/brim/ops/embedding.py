"""Embedding: rows of a table by integer index."""

from __future__ import annotations

from typing import Any

from brim.errors import DTypeError, ShapeError
from brim.ops.arithmetic import where
from brim.ops.indexing import take
from brim.ops.movement import reshape
from brim.spec import is_integer

__all__ = ["embedding"]


def embedding(index: Any, weight: Any, *, padding_idx: int | None = None) -> Any:
    """``weight[index]``; the row ``padding_idx`` is read as any other and gets no gradient.

    Arguments:
        index: ints of any shape, in [0, K).
        weight: (K, D).

    Returns:
        (*index.shape, D).
    """
    if weight.ndim != 2:
        raise ShapeError(f"embedding needs a table (K, D), got shape {weight.shape}")
    if not is_integer(index.dtype):
        raise DTypeError(f"embedding needs integer indices, got {index.dtype}; convert with astype('int64')")
    flat = reshape(index, (-1,))
    rows = take(weight, flat, axis=0)
    if padding_idx is not None:
        at = padding_idx + weight.shape[0] if padding_idx < 0 else padding_idx
        rows = where(reshape(flat == at, (-1, 1)), rows.detach(), rows)
    return reshape(rows, (*index.shape, weight.shape[1]))
