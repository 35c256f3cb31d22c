"""A matrix product or convolution with the elementwise formula that follows it, by NumPy.

The product is finished in the memory of an output, then the formula runs over it in place; overlay/matmul_epilogue.py
has the native kernel.

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
from brim.op import REGISTRY, Op
from brim.spec import Scalar, Spec
from brim_cpu.blocks import carve, carve_bytes

__all__ = ["EPILOGUES", "bind_epilogue"]

Array = np.ndarray[Any, Any]

EPILOGUES = {"matmul_epilogue": "matmul", "conv2d_epilogue": "conv2d"}


Bind = Callable[[Op, Sequence[Spec | Scalar], Sequence[Spec], dict[str, Any]], BoundKernel]


def bind_epilogue(
    bind: Bind, name: str, ins: Sequence[Spec | Scalar], outs: Sequence[Spec], params: dict[str, Any]
) -> BoundKernel:
    """The kernel of ``(a, b, *others, formula, shape, **params)``: see ``brim.program.passes.epilogue``.

    Arguments:
        bind: chooses kernels, the same for the product and the formula as for each by itself.
    """
    return _Epilogue(bind, name, ins, outs, **params).bound()


class _Epilogue:
    def __init__(
        self,
        bind: Bind,
        name: str,
        ins: Sequence[Spec | Scalar],
        outs: Sequence[Spec],
        *,
        formula: Any,
        shape: tuple[int, ...],
        **params: Any,
    ) -> None:
        self.params = params
        a, b = ins[:2]
        assert isinstance(a, Spec)
        assert isinstance(b, Spec)
        self.shape = _product_shape(EPILOGUES[name], a, b, outs[0])
        dtype = a.dtype
        # The output in whose memory the product is made; None where all are of other dtypes or layouts.
        same = [n for n, out in enumerate(outs) if out.dtype == dtype and (out.contiguous or self.shape == shape)]
        self.host = same[0] if same else None
        made = outs[self.host] if self.host is not None else Spec(shape, dtype)
        self.formula = {"formula": formula}
        self.group = bind(REGISTRY["fused"], [made, *ins[2:]], outs, self.formula)
        target = made if made.shape == self.shape else Spec(self.shape, dtype)
        self.product = bind(REGISTRY[EPILOGUES[name]], ins[:2], [target], params)
        self.own = [] if self.host is not None else [(self.shape, dtype)]
        self.work_bytes = max(self.product.scratch_bytes, self.group.scratch_bytes)

    def bound(self) -> BoundKernel:
        scratch = carve_bytes(*self.own, ((self.work_bytes,), "u1"))
        wanted = scratch if self.own or self.work_bytes else 0
        exact = self.product.exact_outputs
        return BoundKernel(
            self.run, wanted, contiguous=self.product.contiguous, prepare=self.prepare, exact_outputs=exact
        )

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
        self.product.run(product, a, b, scratch=_part(work, self.product), **self.params)
        self.group.run(out, host, *others, scratch=_part(work, self.group), **self.formula)

    def prepare(
        self, out: Any, a: Array, b: Array, *others: Any, scratch: Array | None = None, **params: Any
    ) -> list[Callable[[], None]]:
        product, host, work = self._places(out, scratch)
        first = _prepared(self.product, product, a, b, scratch=_part(work, self.product), **self.params)
        then = _prepared(self.group, out, host, *others, scratch=_part(work, self.group), **self.formula)
        return [*first, *then]


def _prepared(kernel: BoundKernel, *operands: Any, **params: Any) -> list[Callable[[], None]]:
    calls = None if kernel.prepare is None else kernel.prepare(*operands, **params)
    return [partial(kernel.run, *operands, **params)] if calls is None else calls


def _part(work: Array | None, kernel: BoundKernel) -> Array | None:
    return work[: kernel.scratch_bytes] if work is not None and kernel.scratch_bytes else None


def _product_shape(name: str, a: Spec, b: Spec, out: Spec) -> tuple[int, ...]:
    if name == "conv2d":
        return out.shape
    lead = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    assert math.prod((*lead, a.shape[-2], b.shape[-1])) == out.size
    return (*lead, a.shape[-2], b.shape[-1])
