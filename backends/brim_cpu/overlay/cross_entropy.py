"""Cross-entropy of rows of float32 scores against classes, and its gradient: no log-probabilities in memory.

The powers e^(x - top) are computed by both; or stored by the first and read by the second, in planned steps where they
lie in the place of the scores (brim/program/passes/keep_powers.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from brim.spec import Spec
from brim_cpu.kernels.loss import check_classes
from brim_cpu.native import Function
from brim_cpu.overlay import NativeKernel, overlay
from brim_cpu.overlay.softmax import all_float32

_FORWARD = Function("brim_cross_entropy_f32", "pppppppiiiif")
_GRADIENT = Function("brim_cross_entropy_grad_f32", "ppppppiiiifi")


def _is_bound(index: Spec) -> bool:
    return index.dtype in (np.int32, np.int64)


@overlay("cross_entropy", "cross_entropy_powers")
def cross_entropy(
    ins: Sequence[Any], outs: Sequence[Spec], *, ignore_index: int, smoothing: float
) -> NativeKernel | None:
    """Losses, largest scores and logarithms of sums; a class that does not exist is an IndexError.

    Of ``cross_entropy_powers`` losses, logarithms of sums and powers, which may lie where the scores do.
    """
    x, index = ins
    if not all_float32((x, *outs)) or not _is_bound(index) or not x.size:
        return None
    keeps_powers = outs[-1].ndim == 2

    def calls(out: Any, x: Any, index: Any, scratch: Any) -> list[Any]:
        losses, top, total, powers = (out[0], None, *out[1:]) if keeps_powers else (*out, None)
        seen = scratch.view(np.int64)
        arguments = (index.itemsize, *x.shape, ignore_index, smoothing)
        call = _FORWARD.bind(losses, top, total, powers, seen, x, index, *arguments)
        call.checks.append(partial(_check, seen, x.shape[1], ignore_index))
        return [call]

    return NativeKernel(calls, scratch_bytes=16, contiguous=True, aliasing=keeps_powers)


def _check(found: Any, classes: int, ignore_index: int) -> None:
    check_classes(int(found[0]), int(found[1]), classes, ignore_index)


@overlay("cross_entropy_grad")
def cross_entropy_grad(
    ins: Sequence[Any], outs: Sequence[Spec], *, ignore_index: int, smoothing: float
) -> NativeKernel | None:
    """Softmax less the smoothed class, times the gradient of each row's loss."""
    g, x, index, top, total = ins
    if not all_float32((g, x, top, total, *outs)) or not _is_bound(index) or not x.size:
        return None
    if not g.size == top.size == total.size == x.shape[0]:
        return None

    def calls(out: Any, g: Any, x: Any, index: Any, top: Any, total: Any, scratch: Any = None) -> list[Any]:
        return [_gradient(out, g, x, index, top, total, (ignore_index, smoothing))]

    return NativeKernel(calls, contiguous=(False, True, True, True, True), aliasing=True)


@overlay("cross_entropy_powers_grad")
def cross_entropy_powers_grad(
    ins: Sequence[Any], outs: Sequence[Spec], *, ignore_index: int, smoothing: float
) -> NativeKernel | None:
    """The same from the powers that the losses kept."""
    powers, g, index, total = ins
    if not all_float32((powers, g, total, *outs)) or not _is_bound(index) or not powers.size:
        return None
    if not g.size == total.size == powers.shape[0]:
        return None

    def calls(out: Any, powers: Any, g: Any, index: Any, total: Any, scratch: Any = None) -> list[Any]:
        return [_gradient(out, g, powers, index, None, total, (ignore_index, smoothing))]

    return NativeKernel(calls, contiguous=(True, False, True, True), aliasing=True)


def _gradient(out: Any, g: Any, x: Any, index: Any, top: Any, total: Any, how: tuple[int, float]) -> Any:
    """The call: of scores, or of their powers where there is no ``top``."""
    arguments = (index.itemsize, *x.shape, *how, g.strides[0] // g.itemsize)
    return _GRADIENT.bind(out, g, x, index, top, total, *arguments)
