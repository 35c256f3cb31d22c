"""Two-dimensional convolution (cross-correlation, as in every deep-learning library) and its two gradients.

Each of the three is linear in each of its inputs, and the gradients of each are the other two.
"""

from __future__ import annotations

from typing import Any

from brim.autocast import as_one
from brim.errors import DTypeError, ShapeError
from brim.op import Op, float_only, primitive
from brim.ops.arithmetic import astype
from brim.ops.movement import reshape
from brim.precision import conv_params
from brim.spec import Spec, promote

__all__ = ["conv2d", "output_size", "pair"]

Pair = tuple[int, int]


def pair(value: Any, name: str, least: int) -> Pair:
    """Two ints (height, width) from one or two. Raises ValueError below ``least``."""
    two = (value, value) if isinstance(value, int) else tuple(value)
    if len(two) != 2 or not all(isinstance(v, int) and v >= least for v in two):
        raise ValueError(f"{name} must be an int or two ints (height, width), each at least {least}, got {value!r}")
    return two


def output_size(size: Pair, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair) -> Pair:
    """floor((size + 2 padding - dilation (kernel - 1) - 1) / stride) + 1. Raises ShapeError when nothing is left."""
    out = tuple(
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(size, kernel, stride, padding, dilation, strict=True)
    )
    if min(out) < 1:
        raise ShapeError(
            f"an image of {size[0]}x{size[1]} with padding {padding} is smaller than the window "
            f"{kernel[0]}x{kernel[1]} (dilation {dilation}); use a smaller kernel or more padding"
        )
    return out  # type: ignore[return-value]


def _conv_spec(
    x: Spec,
    w: Spec,
    *,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    tf32: bool = False,
    fast: bool = False,
) -> Spec:
    if x.ndim != 4 or w.ndim != 4:
        raise ShapeError(f"conv2d needs input (N, C, H, W) and weight (O, C/groups, kH, kW), got {x.shape}, {w.shape}")
    if x.shape[1] != w.shape[1] * groups or w.shape[0] % groups:
        raise ShapeError(
            f"conv2d with groups={groups}: input {x.shape} has {x.shape[1]} channels, weight {w.shape} needs "
            f"{w.shape[1] * groups} and a number of outputs divisible by the groups"
        )
    if x.dtype != w.dtype:
        raise DTypeError(f"conv2d needs one dtype, got {x.dtype} and {w.dtype}")
    size = output_size(x.shape[2:], w.shape[2:], stride, padding, dilation)  # type: ignore[arg-type]
    return Spec((x.shape[0], w.shape[0], *size), float_only("conv2d", x.dtype))


def _grad_input_spec(g: Spec, w: Spec, *, size: Pair, groups: int, **_: Any) -> Spec:
    return Spec((g.shape[0], w.shape[1] * groups, *size), g.dtype)


def _grad_weight_spec(g: Spec, x: Spec, *, kernel: Pair, groups: int, **_: Any) -> Spec:
    return Spec((g.shape[1], x.shape[1] // groups, *kernel), g.dtype)


_conv2d: Op = primitive(
    "conv2d",
    _conv_spec,
    vjp=lambda g, x, w, _out, **how: (
        lambda: _grad_input(g, w, size=x.shape[2:], **how),
        lambda: _grad_weight(g, x, kernel=w.shape[2:], **how),
    ),
    arity=2,
    doc="sum over channels and window of x times weight",
)
_grad_input: Op = primitive(
    "conv2d_grad_input",
    _grad_input_spec,
    vjp=lambda h, g, w, _out, *, size, **how: (
        lambda: _conv2d(h, w, **how),
        lambda: _grad_weight(g, h, kernel=w.shape[2:], **how),
    ),
    arity=2,
    doc="gradient of conv2d with respect to its input",
)
_grad_weight: Op = primitive(
    "conv2d_grad_weight",
    _grad_weight_spec,
    vjp=lambda h, g, x, _out, *, kernel, **how: (
        lambda: _conv2d(x, h, **how),
        lambda: _grad_input(g, h, size=x.shape[2:], **how),
    ),
    arity=2,
    doc="gradient of conv2d with respect to its weight",
)


@as_one("conv2d")
def conv2d(
    x: Any, weight: Any, bias: Any = None, *, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
) -> Any:
    """``out[n, o, i, j] = bias[o] + sum_{c, a, b} x[n, c, i s + a d - p, j s + b d - p] weight[o, c, a, b]``.

    Arguments:
        x: (N, C, H, W); zero outside.
        weight: (O, C/groups, kH, kW).
        bias: (O,) or None.
        stride, padding, dilation: ints, or (height, width).
        groups: channels are cut into this many groups that do not see each other.

    Raises:
        ShapeError: shapes do not fit.
    """
    if not isinstance(groups, int) or groups < 1:
        raise ValueError(f"groups must be a positive int, got {groups!r}")
    kind = promote(x.dtype, weight.dtype)
    out = _conv2d(
        astype(x, kind),
        astype(weight, kind),
        stride=pair(stride, "stride", 1),
        padding=pair(padding, "padding", 0),
        dilation=pair(dilation, "dilation", 1),
        groups=groups,
        **conv_params(kind, x.device.backend),
    )
    if bias is None:
        return out
    if bias.shape != weight.shape[:1]:
        raise ShapeError(f"conv2d with weight {weight.shape} needs bias {weight.shape[:1]}, got {bias.shape}")
    return out + reshape(bias, (1, -1, 1, 1))
