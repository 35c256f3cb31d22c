"""Convolution and its gradients: products over columns (``gemm_conv``), or kernels of small groups (``grouped``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from brim.spec import Spec, is_float
from brim_cuda.elementwise import copy_calls
from brim_cuda.gemm_conv import ConvCall, ConvPlan, lies, plan_conv
from brim_cuda.kernels.columns import Mover, moved
from brim_cuda.kernels.grouped import by_groups, is_small
from brim_cuda.kernels.matmul import workspace_bytes
from brim_cuda.kernels.pool import Pair
from brim_cuda.launch import Call, In, Out, Place, Product, Scratch
from brim_cuda.registry import Work, kernel

__all__ = ["COLUMNS_BYTES", "convolution"]

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
    name: str, ins: Sequence[Any], out: Spec, stride: Pair, padding: Pair, dilation: Pair, groups: int, tf32: bool
) -> Work:
    """A convolution or one of its gradients by matrix products."""
    # Products write images in either order and row-major weights; folding writes images of any strides.
    direct = out.contiguous or name == "conv2d_grad_input" or (name == "conv2d" and lies(out, True))
    made = out if direct else Spec(out.shape, out.dtype)
    limits = {"columns_bytes": COLUMNS_BYTES, "workspace_bytes": offered_bytes(name, out)}
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
        calls += [*mover.before(chunk), _product(chunk.call, plan, specs, places), *mover.after(chunk)]
    if name == "conv2d_grad_weight":
        calls += mover.finish(places["w"])
    if not direct:
        calls += copy_calls(made, out, Scratch(aside), Out(0))
    return Work(calls, plan.scratch_bytes if direct else aside + made.nbytes, contiguous=plan.copied)


def _product(call: ConvCall, plan: ConvPlan, specs: Mapping[str, Spec], places: Mapping[str, Place]) -> Product:
    def at(operand: tuple[str, int]) -> Place:
        name, offset_bytes = operand
        if name in plan.parts:
            return Scratch(plan.parts[name] + offset_bytes)
        itemsize = specs[name].dtype.itemsize
        return moved(places[name], offset_bytes // itemsize, itemsize)

    out = at(call.out)
    workspace = Scratch(plan.parts["workspace"]) if call.plan.workspace_bytes else None
    return Product(
        call.plan, at(call.a), at(call.b), out, added=out if call.plan.added is not None else None, workspace=workspace
    )
