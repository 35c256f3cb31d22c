"""The precisions of a Trainer by name: how its steps compute, what scales its loss, and which models it is for."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from brim.autocast import autocast
from brim.nn import Module
from brim.optim import GradScaler, Optimizer
from brim.precision import float32_products
from brim.spec import default_float, is_float

__all__ = ["HALF_WIDTH", "PRECISIONS", "Precision"]

PRECISIONS = ("fp32", "bf16", "fp16", "tf32")

HALF_WIDTH = {"bf16": "bfloat16", "fp16": "float16"}
"""The precisions that compute in half width, and its dtype."""


class Precision:
    """How a Trainer's steps compute.

    Arguments:
        name: "fp32": as ``set_float32_precision`` says, which is in full by default; "tf32": float32 products of a GPU
            on tensor cores (no effect on the CPU); "bf16", "fp16": ``brim.autocast`` around model and loss, the latter
            with a ``GradScaler``.
        model, optimizer: what is trained, on the device where the scale is to be, too.

    Attributes:
        scaler: of "fp16"; None for the others.

    Raises:
        ValueError: another name, or one that the model or the optimizer cannot be trained with.
    """

    def __init__(self, name: str, model: Module, optimizer: Optimizer) -> None:
        if name not in PRECISIONS:
            raise ValueError(f"precision: expected {', '.join(map(repr, PRECISIONS))}, got {name!r}")
        self.name = name
        self.scaler: GradScaler | None = None
        if name not in HALF_WIDTH:
            return
        for path, param in model.named_parameters():
            if is_float(param.dtype) and param.dtype != default_float:
                raise ValueError(
                    f"precision={name!r} casts float32 parameters as it needs them, but {path} is {param.dtype}; make "
                    "the model with dtype='float32', or leave precision out"
                )
        if name == "fp16":
            if not optimizer.can_skip:
                raise ValueError(
                    f"precision='fp16' skips steps whose gradients overflow, which {type(optimizer).__name__} cannot "
                    "(Optimizer.can_skip); use precision='bf16'"
                )
            device = next((p.device for p in model.parameters()), None)
            self.scaler = GradScaler(device=device)

    def forward(self) -> AbstractContextManager[None]:
        """Around model and loss."""
        return autocast(HALF_WIDTH[self.name]) if self.name in HALF_WIDTH else nullcontext()

    def whole(self) -> AbstractContextManager[None]:
        """Around a whole step."""
        return float32_products("tf32") if self.name == "tf32" else nullcontext()

    def readable(self, outputs: Any) -> Any:
        """A model's outputs for the host: float32 where autocast made them half as wide."""
        low = self.name in HALF_WIDTH and is_float(outputs.dtype) and outputs.dtype.itemsize == 2
        return outputs.astype(default_float) if low else outputs
