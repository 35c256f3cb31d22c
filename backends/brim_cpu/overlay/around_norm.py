"""Batch norm with the shortcut and ReLU after it, and its gradient with the mask of ReLU before it, in one native call.

These forms are what most networks have, and each is computed in the norm's own loops (native/around_norm.hpp), in as
many passes over memory as the norm takes by itself. The interpreter between two loops, as around layer norm, took
longer than two kernels one after the other: a batch norm's runs of elements are short.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from brim.expr import FusedFormula, ScalarStep
from brim.spec import Spec
from brim_cpu import native
from brim_cpu.overlay import NativeKernel, overlay
from brim_cpu.overlay.norm import channels_last, scratch_bytes, value_of

__all__ = ["Followed", "Masked", "followed", "masked"]

_FLOAT32 = np.dtype("float32")
_IMAGES = native.Function("brim_batch_norm_fused_f32", "ppppppp" + "d" + "p" + "d" + "iiid")
_COLUMNS = native.Function("brim_column_norm_fused_f32", "ppppppp" + "d" + "p" + "d" + "iid")
_IMAGES_GRAD = native.Function("brim_batch_norm_grad_fused_f32", "pppppppp" + "d" + "pp" + "iiid")
_LARGEST_MADE = 4096
"""kLargestMade of batch_norm.cpp."""
_LARGE_BYTES = 32 << 20
"""Beyond the caches a shortcut's runs, image by image, are read no faster than by a pass of their own."""


@dataclass(frozen=True)
class Followed:
    """``max(y + shortcut, 0)``, or one of the two: which operand the shortcut is, and whether there is a ReLU."""

    shortcut: int | None
    rectified: bool


@dataclass(frozen=True)
class Masked:
    """``where(result > 0, gradient, 0)``: which operands these are."""

    result: int
    gradient: int


def followed(formula: FusedFormula) -> Followed | None:
    """The form of a formula whose operand 0 is the norm's result; None: another one."""
    *sums, last = formula.steps
    if formula.outputs != (len(sums),) or not _of_floats(formula):
        return None
    if last.fn == "add" and not sums:
        found = _inputs(last)
        return Followed(sum(found), False) if found and sorted(found)[0] == 0 < max(found) else None
    if last.fn != "max" or len(sums) > 1 or not _is_zero(last.args[1]):
        return None
    if not sums:
        return Followed(None, True) if last.args[0] == ("in", 0) else None
    found = _inputs(sums[0]) if sums[0].fn == "add" else None
    if not found or min(found) != 0 or max(found) == 0 or last.args[0] != ("step", 0):
        return None
    return Followed(max(found), True)


def masked(formula: FusedFormula) -> Masked | None:
    """The form of a formula that makes a gradient; None: another one."""
    if len(formula.steps) != 2 or formula.outputs != (1,) or not _of_floats(formula):
        return None
    asked, choice = formula.steps
    if asked.fn != "gt" or choice.fn != "where" or choice.args[0] != ("step", 0) or not _is_zero(choice.args[2]):
        return None
    (result_kind, result), (kind, gradient) = asked.args[0], choice.args[1]
    if result_kind != "in" or kind != "in" or not _is_zero(asked.args[1]):
        return None
    return Masked(int(result), int(gradient))


def _of_floats(formula: FusedFormula) -> bool:
    """Whether everything is computed in float32."""
    return all(
        step.compute == _FLOAT32 and step.dtype == (np.dtype(bool) if step.fn == "gt" else _FLOAT32)
        for step in formula.steps
    )


def _inputs(step: ScalarStep) -> tuple[int, ...] | None:
    """The operands that a step reads; None where it reads something else."""
    return tuple(int(which) for _, which in step.args) if all(kind == "in" for kind, _ in step.args) else None


def _is_zero(arg: tuple[str, Any]) -> bool:
    kind, value = arg
    return kind == "const" and value == 0 and math.copysign(1, value) > 0


def _sizes(shape: tuple[int, ...], images: Sequence[Any], vectors: Sequence[Any]) -> tuple[int, ...] | None:
    """What the kernels take: (rows, channels) or (images, channels, pixels); None where they do not fit.

    Arguments:
        images: of the shape, all laid out alike.
        vectors: one number for each channel, or one for all.
    """
    if not math.prod(shape) or not all(isinstance(x, Spec) for x in images):
        return None
    if any(x.shape != shape or x.dtype != _FLOAT32 for x in images):
        return None
    if any(isinstance(v, Spec) and (v.dtype != _FLOAT32 or v.size != shape[1]) for v in vectors):
        return None
    last = all(map(channels_last, images))
    if not last and not all(x.contiguous for x in images):
        return None
    N, C, S = shape[0], shape[1], math.prod(shape[2:])
    return (N * S, C) if last or S == 1 else (N, C, S)


def _scratch_bytes(sizes: tuple[int, ...]) -> int:
    return scratch_bytes("column" if len(sizes) == 2 else "batch", *sizes)


def _words(*arrays: Any) -> np.ndarray[Any, Any]:
    return np.array([0 if x is None else native.pointer(x) for x in arrays], np.int64)


@overlay("batch_norm_fused")
def batch_norm_fused(
    ins: Sequence[Any], outs: Sequence[Spec], *, before: Any, after: Any, shape: tuple[int, ...], eps: float
) -> NativeKernel | None:
    """Of float32, with a shortcut, a ReLU or both after it."""
    own, others = ins[:2], ins[2:]
    form = followed(after)
    if form is None or len(before.steps) != 1 or before.outputs != (0,) or not _of_floats(before):
        return None
    read = before.steps[0]
    if read.fn != "cast" or read.args[0][0] != "in":
        return None
    x = int(read.args[0][1])
    shortcut = None if form.shortcut is None else form.shortcut - 1
    images = [others[x], outs[0], *([] if shortcut is None else [others[shortcut]])]
    sizes = _sizes(shape, images, (*own, *outs[1:]))
    if sizes is None or (shortcut is not None and len(sizes) == 3 and outs[0].nbytes >= _LARGE_BYTES):
        return None
    function = _COLUMNS if len(sizes) == 2 else _IMAGES

    def calls(out: Any, weight: Any, bias: Any, *others: Any, scratch: Any = None) -> list[Any]:
        added = None if shortcut is None else others[shortcut]
        words = _words(added, None)
        words[1] = form.rectified
        call = function.bind(words, *out, scratch, others[x], *value_of(weight), *value_of(bias), *sizes, eps)
        call.keeps += (words, added)
        return [call]

    contiguous = (True, True, *(False for _ in others))
    return NativeKernel(calls, _scratch_bytes(sizes), contiguous, aliasing=True)


@overlay("batch_norm_grad_fused")
def batch_norm_grad_fused(
    ins: Sequence[Any], outs: Sequence[Spec], *, before: Any, after: Any, shape: tuple[int, ...], eps: float
) -> NativeKernel | None:
    """Of float32, row-major, with the mask of a ReLU before it.

    A mask that is stored, too, or of a sum, and images that lie channels-last took as long as two kernels.
    """
    own, others = ins[:4], ins[4:]
    form = masked(before)
    if form is None or len(after.steps) != 1 or after.outputs != (0,) or not _of_floats(after):
        return None
    if after.steps[0].fn != "cast" or after.steps[0].args[0] != ("in", 0):
        return None
    images = [own[0], others[form.result], others[form.gradient], outs[0]]
    sizes = _sizes(shape, images, (*own[1:], *outs[1:]))
    if sizes is None or len(sizes) == 2 or sizes[2] > _LARGEST_MADE:
        return None

    def calls(out: Any, x: Any, weight: Any, mean: Any, var: Any, *others: Any, scratch: Any = None) -> list[Any]:
        g, result = others[form.gradient], others[form.result]
        return [_IMAGES_GRAD.bind(*out, scratch, g, result, x, *value_of(weight), mean, var, *sizes, eps)]

    contiguous = (False, True, True, True, *(False for _ in others))
    return NativeKernel(calls, _scratch_bytes(sizes), contiguous, aliasing=True)
