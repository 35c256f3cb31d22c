"""Convolution and its gradients: products over columns (``gemm_conv``), or kernels of small groups (``grouped``)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from brim.expr import FusedFormula
from brim.spec import Spec, is_float
from brim_cuda.dnn_conv import match_conv_epilogue
from brim_cuda.elementwise import copy_calls, fused_calls
from brim_cuda.gemm_conv import ConvCall, ConvPlan, lies, plan_conv
from brim_cuda.gemm_epilogue import Finish
from brim_cuda.kernels.columns import Mover, moved
from brim_cuda.kernels.grouped import by_groups, is_small
from brim_cuda.kernels.matmul import workspace_bytes
from brim_cuda.kernels.pool import Pair
from brim_cuda.launch import Call, In, Out, Place, Product, Scratch
from brim_cuda.registry import Work, kernel

__all__ = ["COLUMNS_BYTES", "convolution", "joins_conv_epilogue"]

_MIB = 1 << 20
COLUMNS_BYTES = 64 * _MIB
"""What the columns of a chunk of images may take; one image is always taken."""
_ALIGNMENT_BYTES = 256
_SPLITS, _SPLITS_BYTES = 128, 4 * _MIB
_OPERANDS: dict[str, tuple[In | Out, ...]] = {  # images of C channels, weight, images of O channels
    "conv2d": (In(0), In(1), Out(0)),
    "conv2d_grad_input": (Out(0), In(1), In(0)),
    "conv2d_grad_weight": (In(1), Out(0), In(0)),
}


@kernel(*_OPERANDS)
def convolution(
    ins: Sequence[Any],
    outs: Sequence[Spec],
    *,
    name: str,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    tf32: bool = False,
    **shape: Any,
) -> Work:
    """A convolution or one of its gradients; sums of float16 and bfloat16 are in float32."""
    if not is_float(outs[0].dtype):
        raise KeyError(f"the CUDA backend has no kernel for {name} in {outs[0].dtype}")
    weight = outs[0] if name == "conv2d_grad_weight" else ins[1]
    if is_small(weight, groups) and (weight.contiguous or name != "conv2d_grad_weight"):
        return by_groups(name, ins, outs[0], stride, padding, dilation, groups)
    return by_products(name, ins, outs[0], stride, padding, dilation, groups, tf32)


@kernel("conv2d_epilogue")
def convolution_epilogue(
    ins: Sequence[Any],
    outs: Sequence[Spec],
    *,
    formula: FusedFormula,
    shape: Sequence[int],
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    tf32: bool = False,
) -> Work:
    """A convolution, a bias and an activation: by the products of channels-last images, else one after the other."""
    x, w, *others = ins
    (out,) = outs
    found = _finish(ins, outs, {"formula": formula, "shape": shape, "groups": groups})
    if found is None:
        raise KeyError("the CUDA backend has no kernel for such a convolution with what follows it")
    how: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups, "tf32": tf32}
    copied = (False,) * len(others)
    if lies(out, True) and out.size and math.prod(w.shape[1:]):
        try:
            work = by_products("conv2d", (x, w), out, finish=found, **how)
            return Work(work.calls, work.scratch_bytes, (*work.contiguous, *copied))
        except ValueError:  # a size that the epilogue does not go with
            pass
    work = convolution((x, w), outs, name="conv2d", **how)
    after = fused_calls(formula, [out, *others], outs, roles=[Out(0), *(In(2 + n) for n in range(len(others)))])
    return Work([*work.calls, *after], work.scratch_bytes, (*work.contiguous, *copied))


def _finish(ins: Sequence[Any], outs: Sequence[Spec], params: Mapping[str, Any]) -> Finish | None:
    """What follows the convolution, if products can compute it; None where they cannot."""
    found = match_conv_epilogue(ins, outs, dict(params))
    fits = found is not None and found.added is None and params["groups"] == 1
    return found if fits else None


def joins_conv_epilogue(ins: Sequence[Any], outs: Sequence[Spec], params: Mapping[str, Any]) -> bool:
    """Whether a convolution and the group after it are the same products where the images lie channels last."""
    return _finish(ins, outs, params) is not None


def offered_bytes(name: str, out: Spec) -> int:
    """Scratch offered for a product of a convolution.

    As for other products, but more for the small gradient of a weight: it is a sum over all positions of all images,
    which fills the device only where it is cut into many parts.
    """
    usual = workspace_bytes(out)
    if name != "conv2d_grad_weight":
        return usual
    parts_bytes = -(-_SPLITS * out.size * max(4, out.dtype.itemsize) // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
    return max(usual, min(parts_bytes, _SPLITS_BYTES))


def by_products(
    name: str,
    ins: Sequence[Any],
    out: Spec,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    tf32: bool,
    finish: Finish | None = None,
) -> Work:
    """A convolution or one of its gradients by matrix products, which may finish with a bias and an activation."""
    # Products write images in either order and row-major weights; folding writes images of any strides.
    direct = out.contiguous or name == "conv2d_grad_input" or (name == "conv2d" and lies(out, True))
    made = out if direct else Spec(out.shape, out.dtype)
    limits: dict[str, Any] = {"columns_bytes": COLUMNS_BYTES, "workspace_bytes": offered_bytes(name, out)}
    bias: Place | None = None
    if finish is not None:
        limits["epilogue"], bias = finish.epilogue, None if finish.bias is None else In(finish.bias)
    plan = plan_conv(name, *ins, made, stride=stride, padding=padding, groups=groups, tf32=tf32, **limits)
    read = [Spec(x.shape, x.dtype) if copied else x for x, copied in zip(ins, plan.copied, strict=True)]
    aside = -(-plan.scratch_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
    places: dict[str, Place] = {
        array: Scratch(aside) if not direct and isinstance(place, Out) else place
        for array, place in zip("xwy", _OPERANDS[name], strict=True)
    }
    specs = {
        array: read[place.index] if isinstance(place, In) else made
        for array, place in zip("xwy", _OPERANDS[name], strict=True)
    }
    mover = Mover(plan, specs, places, stride=stride, padding=padding, dilation=dilation)
    calls: list[Call | Product] = list(mover.filters())
    for chunk in plan.chunks:
        calls += [*mover.before(chunk), _product(chunk.call, plan, specs, places, bias), *mover.after(chunk)]
    if name == "conv2d_grad_weight":
        calls += mover.finish(places["w"])
    if not direct:
        calls += copy_calls(made, out, Scratch(aside), Out(0))
    return Work(calls, plan.scratch_bytes if direct else aside + made.nbytes, contiguous=plan.copied)


def _product(
    call: ConvCall, plan: ConvPlan, specs: Mapping[str, Spec], places: Mapping[str, Place], bias: Place | None
) -> Product:
    def at(operand: tuple[str, int]) -> Place:
        name, offset_bytes = operand
        if name in plan.parts:
            return Scratch(plan.parts[name] + offset_bytes)
        itemsize = specs[name].dtype.itemsize
        return moved(places[name], offset_bytes // itemsize, itemsize)

    out = at(call.out)
    workspace = Scratch(plan.parts["workspace"]) if call.plan.workspace_bytes else None
    added = out if call.plan.added is not None else None
    return Product(call.plan, at(call.a), at(call.b), out, added=added, bias=bias, workspace=workspace)
