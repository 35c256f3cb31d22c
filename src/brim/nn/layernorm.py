"""LayerNorm."""

from __future__ import annotations

from typing import Any

from brim.nn import functional as F
from brim.nn import init
from brim.nn.linear import new_parameter
from brim.nn.module import Module
from brim.spec import as_shape

__all__ = ["LayerNorm"]


class LayerNorm(Module):
    """Zero mean and unit variance over the last axes of every element, then ``* weight + bias``.

    Arguments:
        normalized_shape: sizes of those last axes.
        eps: added to the variance.
        elementwise_affine: learn weight and bias.
        bias: False leaves the bias out.
    """

    def __init__(
        self,
        normalized_shape: Any,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.normalized_shape = as_shape(normalized_shape)
        self.eps, self.elementwise_affine = eps, elementwise_affine
        shape, affine = self.normalized_shape, elementwise_affine
        self.register_parameter("weight", new_parameter(shape, device, dtype) if affine else None)
        self.register_parameter("bias", new_parameter(shape, device, dtype) if affine and bias else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """weight 1, bias 0."""
        if self.weight is not None:
            init.ones_(self.weight)
        if self.bias is not None:
            init.zeros_(self.bias)

    def forward(self, x: Any) -> Any:
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        return f"{self.normalized_shape}, eps={self.eps}, elementwise_affine={self.elementwise_affine}"
