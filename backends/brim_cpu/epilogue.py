"""A matrix product or convolution with the elementwise formula that follows it: the product is finished in the memory
of an output, then the formula runs over it in place.

Computing both panel by panel would keep a panel in the cache, but it adds in another order (OpenBLAS chooses by the
size of the whole), and was no faster but for very flat products; so the product is made whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from brim.backend import BoundKernel
from brim.spec import Scalar, Spec
from brim_cpu.blocks import carve, carve_bytes
from brim_cpu.fused import Evaluator
from brim_cpu.registry import KERNELS

__all__ = ["EPILOGUES", "bind_epilogue"]

Array = np.ndarray[Any, Any]

EPILOGUES = {"matmul_epilogue": "matmul", "conv2d_epilogue": "conv2d"}


def bind_epilogue(name: str, ins: Sequence[Spec | Scalar], outs: Sequence[Spec], params: dict[str, Any]) -> BoundKernel:
    """The kernel of ``(a, b, *others, formula, shape, **params)``: see ``brim.program.passes.epilogue``."""
    return _Epilogue(name, ins, outs, **params).bound()


class _Epilogue:
    def __init__(
        self,
        name: str,
        ins: Sequence[Spec | Scalar],
        outs: Sequence[Spec],
        *,
        formula: Any,
        shape: tuple[int, ...],
        **params: Any,
    ) -> None:
        self.kernel, self.params = KERNELS[EPILOGUES[name]], params
        a, b = ins[:2]
        assert isinstance(a, Spec)
        assert isinstance(b, Spec)
        self.shape = _product_shape(EPILOGUES[name], a, b, outs[0])
        dtype = a.dtype
        # The output in whose memory the product is made; None where all are of other dtypes or layouts.
        same = [n for n, out in enumerate(outs) if out.dtype == dtype and (out.contiguous or self.shape == shape)]
        self.host = same[0] if same else None
        made = outs[self.host] if self.host is not None else Spec(shape, dtype)
        self.evaluator = Evaluator(formula, [made, *ins[2:]], outs)
        product = Spec(self.shape, dtype)
        self.own = [] if self.host is not None else [(self.shape, dtype)]
        work = self.kernel.scratch(ins[:2], [product], **params) if self.kernel.scratch else 0
        self.work_bytes = max(work, self.evaluator.scratch_bytes)

    def bound(self) -> BoundKernel:
        scratch = carve_bytes(*self.own, ((self.work_bytes,), "u1"))
        return BoundKernel(self.run, scratch if self.own or self.work_bytes else 0, prepare=self.prepare)

    def _places(self, out: Any, scratch: Array | None) -> tuple[Array, Array, Array | None]:
        """The product's array, the same in the shape of the outputs, and scratch for the work."""
        outs = out if isinstance(out, tuple) else (out,)
        work = scratch
        if self.own or self.work_bytes:
            assert scratch is not None
            *_, work = parts = carve(scratch, *self.own, ((self.work_bytes,), "u1"))
        host = outs[self.host] if self.host is not None else parts[0].reshape(outs[0].shape)
        return host.reshape(self.shape), host, work

    def run(self, out: Any, a: Array, b: Array, *others: Any, scratch: Array | None = None, **params: Any) -> None:
        product, host, work = self._places(out, scratch)
        self.kernel.run(product, a, b, scratch=work, **self.params)
        self.evaluator.run(out, host, *others, scratch=work)

    def prepare(
        self, out: Any, a: Array, b: Array, *others: Any, scratch: Array | None = None, **params: Any
    ) -> list[Callable[[], None]]:
        product, host, work = self._places(out, scratch)
        first = partial(self.kernel.run, product, a, b, scratch=work, **self.params)
        return [first, *self.evaluator.prepare(out, host, *others, scratch=work)]


def _product_shape(name: str, a: Spec, b: Spec, out: Spec) -> tuple[int, ...]:
    if name == "conv2d":
        return out.shape
    lead = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    assert math.prod((*lead, a.shape[-2], b.shape[-1])) == out.size
    return (*lead, a.shape[-2], b.shape[-1])
