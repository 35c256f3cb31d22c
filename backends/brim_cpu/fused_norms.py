"""A norm with the elementwise groups before and after it, one after the other: formula, norm, formula.

It says what such an instruction means, by the kernels that each part has by itself; a native kernel that does all in
one pass over memory is what makes it pay (see ``brim.program.norm_groups``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from brim.backend import BoundKernel
from brim.op import REGISTRY
from brim.spec import Scalar, Spec
from brim_cpu.blocks import carve, carve_bytes
from brim_cpu.epilogue import Bind

__all__ = ["FUSED_NORMS", "bind_fused_norm"]

Array = np.ndarray[Any, Any]

FUSED_NORMS = {"layer_norm_fused": 2, "batch_norm_fused": 2, "layer_norm_grad_fused": 4, "batch_norm_grad_fused": 4}
"""Op -> how many inputs the norm has besides its first one; they come first, then those of the formulas."""


def bind_fused_norm(
    bind: Bind, name: str, ins: Sequence[Spec | Scalar], outs: Sequence[Spec], params: dict[str, Any]
) -> BoundKernel:
    """The kernel of ``(*own, *others, before, after, shape, **params)``. Raises KeyError where the norm has none.

    Arguments:
        bind: chooses kernels, the same for the norm and the formulas as for each by itself.
    """
    return _FusedNorm(bind, name, ins, outs, **params).bound()


class _FusedNorm:
    def __init__(
        self,
        bind: Bind,
        name: str,
        ins: Sequence[Spec | Scalar],
        outs: Sequence[Spec],
        *,
        before: Any,
        after: Any,
        shape: tuple[int, ...],
        **params: Any,
    ) -> None:
        self.count, self.made, kept = FUSED_NORMS[name], len(after.outputs), len(before.outputs) - 1
        self.rest = self.made + kept
        self.params, self.before, self.after = params, {"formula": before}, {"formula": after}
        norm, own, others = REGISTRY[name.removesuffix("_fused")], ins[: self.count], ins[self.count :]
        first = Spec(shape, before.steps[before.outputs[0]].dtype)
        result = Spec(shape, norm.infer([first, *own], params)[0].dtype)
        fused = REGISTRY["fused"]
        self.parts = [(shape, first.dtype), (shape, result.dtype)]
        self.prologue = bind(fused, others, [first, *outs[self.made : self.rest]], self.before)
        self.norm = bind(norm, [first, *own], [result, *outs[self.rest :]], params)
        self.epilogue = bind(fused, [result, *others], outs[: self.made], self.after)
        self.kernels = (self.prologue, self.norm, self.epilogue)
        self.work_bytes = max(kernel.scratch_bytes for kernel in self.kernels)

    def bound(self) -> BoundKernel:
        scratch_bytes = carve_bytes(*self.parts, ((self.work_bytes,), "u1"))
        contiguous = (*self.norm.contiguous[1:],) if any(self.norm.contiguous) else ()
        library_bytes = max(kernel.library_bytes for kernel in self.kernels)
        return BoundKernel(self.run, scratch_bytes, library_bytes, contiguous=contiguous)

    def run(self, out: Any, *ins: Any, scratch: Array | None = None, **params: Any) -> None:
        outs = out if isinstance(out, tuple) else (out,)
        assert scratch is not None
        first, result, work = carve(scratch, *self.parts, ((self.work_bytes,), "u1"))
        own, others = ins[: self.count], ins[self.count :]
        _run(self.prologue, (first, *outs[self.made : self.rest]), others, work, self.before)
        _run(self.norm, (result, *outs[self.rest :]), (first, *own), work, self.params)
        _run(self.epilogue, outs[: self.made], (result, *others), work, self.after)


def _run(kernel: BoundKernel, outs: tuple[Any, ...], ins: tuple[Any, ...], work: Array, params: dict[str, Any]) -> None:
    scratch = work[: kernel.scratch_bytes] if kernel.scratch_bytes else None
    kernel.run(outs[0] if len(outs) == 1 else outs, *ins, scratch=scratch, **params)
