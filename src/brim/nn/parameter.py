"""Parameter: a tensor that a module learns. Assigning one to a module's attribute registers it."""

from __future__ import annotations

from typing import Any

from brim.spec import is_float
from brim.tensor import Tensor, asarray

__all__ = ["Parameter"]


class Parameter(Tensor):
    """A leaf tensor that requires gradients, booked as "params" in the memory ledger.

    Arguments:
        data: a tensor (its memory is shared), or anything ``brim.asarray`` takes.
        requires_grad: False for a weight that is not learned.
    """

    __slots__ = ()

    def __init__(self, data: Any, requires_grad: bool = True) -> None:
        source = data if isinstance(data, Tensor) else asarray(data)
        if not source.spec.contiguous:
            source = source.copy()
        super().__init__(source.spec, source.device, source._block, source.offset)
        self.book_as("params")
        if requires_grad and is_float(self.dtype):
            self.requires_grad = True

    def __repr__(self) -> str:
        return f"Parameter containing:\n{super().__repr__()}"
