"""How exactly products of float32 are computed: in full, or on tensor cores with operands rounded to TF32; and
convolutions on the CPU term by term, or with fewer multiplications."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from brim.context import baked, context, modes

__all__ = [
    "conv_params",
    "conv_precision",
    "float32_precision",
    "float32_products",
    "product_params",
    "set_conv_precision",
    "set_float32_precision",
]

_NAMES = ("full", "tf32")
_CONV_NAMES = ("exact", "fast")
_CONV_DTYPES = ("float32", "float16", "bfloat16")  # half width is computed in float32
_tf32 = False
_fast = True


def set_float32_precision(name: str) -> None:
    """Choose how float32 matrix products and convolutions are computed from now on, in this process.

    Arguments:
        name: "full" (the default), or "tf32": a GPU with tensor cores rounds the operands to 10 bits after the point
            and adds up in float32, which is several times as fast. The CPU, and other dtypes, always compute in full.
            Compiled steps are traced anew at their next call.

    Raises:
        ValueError: another name.
    """
    global _tf32
    _check_products(name)
    if _tf32 != (name == "tf32"):
        _tf32 = name == "tf32"
        modes.changes += 1


def _check_products(name: str) -> None:
    if name not in _NAMES:
        raise ValueError(f"the precision of float32 products is 'full' or 'tf32', got {name!r}")


def float32_precision() -> str:
    """What ``set_float32_precision`` chose, or ``float32_products`` for this thread."""
    return context.products or _NAMES[_tf32]


@contextmanager
def float32_products(name: str) -> Iterator[None]:
    """Inside the block and in this thread, what ``set_float32_precision(name)`` would choose for the process."""
    _check_products(name)
    before = context.products
    context.products = name
    try:
        yield
    finally:
        context.products = before


def product_params(dtype: Any) -> dict[str, Any]:
    """Params of a product of this dtype: ``{"tf32": True}`` where that was chosen, else none."""
    # What the thread chose is no setting that changes between runs: the step itself chose it, or it was traced so.
    chosen = context.products or baked(float32_precision)
    return {"tf32": True} if chosen == "tf32" and dtype.name == "float32" else {}


def set_conv_precision(name: str) -> None:
    """Choose how convolutions of 3x3 windows are computed on the CPU from now on, in this process.

    Arguments:
        name: "fast" (the default): convolutions of stride 1 without dilation or groups, and their gradients, may be
            computed by Winograd's minimal filtering over tiles of 4x4 or 2x2 results, with 4 or 2.25 times fewer
            multiplications: where sizes say that it takes less time, with 16 channels or more on both sides, in
            float32 (half width is converted, and results are rounded once). "exact": every term is multiplied and
            added up. Other sizes, dtypes and devices, and the CPU without compiled
            kernels, compute exactly either way. Results of either do not depend on the number of threads. Compiled
            steps are traced anew at their next call.

    Errors against float64, standard normal operands: the largest, in brackets the root mean square, both relative to
    the largest result. Of the result, the gradients of input and weight, the worst. docs/convolution.md has the whole
    table, and why "fast" is the default.

    ==============================  ===================  ===================
    images, channels                exact                fast
    ==============================  ===================  ===================
    64 of 32x32, 16 to 16           4e-7 (6e-8)          7e-6 (7e-7)
    32 of 32x32, 64 to 64           3e-7 (6e-8)          7e-6 (5e-7)
    64 of 8x8, 256 to 256           3e-7 (5e-8)          2e-5 (7e-7)
    64 of 4x4, 512 to 512           3e-7 (4e-8)          8e-7 (1e-7), 2x2 tiles
    ==============================  ===================  ===================

    Raises:
        ValueError: another name.
    """
    global _fast
    if name not in _CONV_NAMES:
        raise ValueError(f"the precision of convolutions is 'exact' or 'fast', got {name!r}")
    if _fast != (name == "fast"):
        _fast = name == "fast"
        modes.changes += 1


def conv_precision() -> str:
    """What ``set_conv_precision`` chose."""
    return _CONV_NAMES[_fast]


def conv_params(dtype: Any, backend: Any) -> dict[str, Any]:
    """Params of a convolution: those of a product, and ``{"fast": True}`` where that is chosen and the backend
    knows it. Tensors without memory (backend: None) are for any device: plans for one that does not know it drop it."""
    heeded = (backend is None or getattr(backend, "knows_fast_convolutions", False)) and dtype.name in _CONV_DTYPES
    fast = baked(conv_precision) == "fast" and heeded
    return {**product_params(dtype), **({"fast": True} if fast else {})}
