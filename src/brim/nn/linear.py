"""Linear, Flatten, Identity."""

from __future__ import annotations

import math
from typing import Any

from brim.nn import functional as F
from brim.nn import init
from brim.nn.module import Module
from brim.nn.parameter import Parameter
from brim.spec import default_float
from brim.tensor import empty

__all__ = ["Flatten", "Identity", "Linear", "new_parameter"]


def new_parameter(shape: tuple[int, ...], device: Any, dtype: Any) -> Parameter:
    """A parameter whose values are to be drawn."""
    return Parameter(empty(shape, dtype=default_float if dtype is None else dtype, device=device, op="parameter"))


class Linear(Module):
    """``x @ weight.T + bias``.

    Arguments:
        in_features, out_features: sizes of the last axis before and after.
        bias: False leaves the bias out.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = new_parameter((out_features, in_features), device, dtype)
        self.register_parameter("bias", new_parameter((out_features,), device, dtype) if bias else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weight and bias uniform in +-1/sqrt(in_features)."""
        bound = 1.0 / math.sqrt(self.in_features) if self.in_features else 0.0
        init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Any) -> Any:
        return F.linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class Flatten(Module):
    """The axes from ``start_dim`` to ``end_dim`` made one."""

    def __init__(self, start_dim: int = 1, end_dim: int = -1) -> None:
        super().__init__()
        self.start_dim, self.end_dim = start_dim, end_dim

    def forward(self, x: Any) -> Any:
        return F.flatten(x, self.start_dim, self.end_dim)

    def extra_repr(self) -> str:
        return f"start_dim={self.start_dim}, end_dim={self.end_dim}"


class Identity(Module):
    """The input itself; takes and ignores any arguments."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def forward(self, x: Any) -> Any:
        return x
