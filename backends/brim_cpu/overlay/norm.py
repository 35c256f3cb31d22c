"""Batch norm and layer norm of float32 and float64, and all three gradients of each together; batch norm of half width,
which is read as float32.

Images are taken row-major or channels-last, as they lie; anything else is copied first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from brim.spec import DTYPES, Spec
from brim_cpu.blocks import carve, carve_bytes
from brim_cpu.native import Function
from brim_cpu.overlay import NativeKernel, overlay, overlay_half
from brim_cpu.overlay.half import converted

__all__ = ["channels_last", "scratch_bytes", "value_of"]

_TYPES: dict[np.dtype[Any], str] = {np.dtype("float32"): "f32", np.dtype("float64"): "f64"}
_HALVES: dict[np.dtype[Any], str] = {DTYPES["float16"]: "f16", DTYPES["bfloat16"]: "bf16"}
_WIDE = np.dtype("float32")


def _functions(name: str, signature: str) -> dict[np.dtype[Any], Function]:
    types = _TYPES if name.startswith("layer") else _TYPES | _HALVES
    return {dtype: Function(f"brim_{name}_{short}", signature) for dtype, short in types.items()}


_IMAGES = _functions("batch_norm", "pppppp" + "d" + "p" + "d" + "iiid")
_IMAGES_GRAD = _functions("batch_norm_grad", "ppppppp" + "d" + "pp" + "iiid")
_COLUMNS = _functions("column_norm", "pppppp" + "d" + "p" + "d" + "iid")
_COLUMNS_GRAD = _functions("column_norm_grad", "ppppppp" + "d" + "pp" + "iid")
_ROWS = _functions("layer_norm", "pppppp" + "d" + "p" + "d" + "iid")
_ROWS_GRAD = _functions("layer_norm_grad", "ppppppp" + "d" + "pp" + "iid")
_SCRATCH = {
    "batch": Function("brim_batch_norm_scratch", "piii"),
    "column": Function("brim_column_norm_scratch", "pii"),
    "layer": Function("brim_layer_norm_scratch", "pii"),
}


def scratch_bytes(name: str, *sizes: int) -> int:
    """Working memory of a kernel, as it says itself."""
    found = np.zeros(1, np.int64)
    _SCRATCH[name].bind(found, *sizes)()
    return int(found[0])


def _alike(operands: Sequence[Any]) -> bool:
    """Whether all arrays among the operands are of one dtype that there are kernels for."""
    dtypes = {x.dtype for x in operands if isinstance(x, Spec)}
    return len(dtypes) == 1 and dtypes <= set(_TYPES)


def _of_size(vectors: Sequence[Any], size: int) -> bool:
    return all(not isinstance(v, Spec) or v.size == size for v in vectors)


def value_of(vector: Any) -> tuple[Any, Any]:
    """An array or a number as the two arguments that kernels take for it."""
    return (vector, 0.0) if isinstance(vector, np.ndarray) else (None, vector)


# ------------------------------------------------------------------------------------------------------- batch norm


def channels_last(spec: Spec) -> bool:
    """Whether the channels of (N, C, ...) lie side by side, and nothing between the pixels."""
    n, c, *pixels = spec.shape
    order = (n, *pixels, c)
    if c == 1 or math.prod(pixels) == 1:
        return False
    steps = [math.prod(order[axis + 1 :]) for axis in range(len(order))]
    expected = (steps[0], steps[-1], *steps[1:-1])
    return all(dim == 1 or step == want for dim, step, want in zip(spec.shape, spec.strides, expected, strict=True))


def _image_kernel(
    arrays: Sequence[Spec], vectors: int, plain: dict[Any, Function], columns: dict[Any, Function], eps: float
) -> tuple[Callable[..., list[Any]], int, tuple[bool, ...]]:
    """How to bind the kernel for images, its scratch bytes, and which inputs must be row-major.

    Arguments:
        arrays: the images that are read, then the one that is written.
        vectors: how many other inputs there are.
    """
    shape, dtype = arrays[0].shape, arrays[0].dtype
    N, C, S = shape[0], shape[1], math.prod(shape[2:])
    last = all(map(channels_last, arrays))
    contiguous = (not last,) * (len(arrays) - 1) + (True,) * vectors
    side_by_side = last or S == 1
    function = (columns if side_by_side else plain)[dtype]
    sizes: tuple[int, ...] = (N * S, C) if side_by_side else (N, C, S)
    nbytes = scratch_bytes("column" if side_by_side else "batch", *sizes)
    return (lambda *arguments: [function.bind(*arguments, *sizes, eps)]), nbytes, contiguous


@overlay("batch_norm")
def batch_norm(ins: Sequence[Any], outs: Sequence[Spec], *, eps: float) -> NativeKernel | None:
    """Result, mean and biased variance of each channel."""
    x, weight, bias = ins
    out = outs[0]
    if not _alike((*ins, *outs)) or not x.size or not _of_size((weight, bias), x.shape[1]):
        return None
    if not (out.contiguous or (channels_last(x) and channels_last(out))):
        return None
    bind, nbytes, contiguous = _image_kernel([x, out], 2, _IMAGES, _COLUMNS, eps)

    def calls(out: Any, x: Any, weight: Any, bias: Any, scratch: Any = None) -> list[Any]:
        return bind(*out, scratch, x, *value_of(weight), *value_of(bias))

    return NativeKernel(calls, nbytes, contiguous)


@overlay("batch_norm_grad")
def batch_norm_grad(ins: Sequence[Any], outs: Sequence[Spec], *, eps: float) -> NativeKernel | None:
    """The gradients of input, weight and bias."""
    g, x, weight, mean, var = ins
    out, C = outs[0], x.shape[1]
    if not _alike((*ins, *outs)) or not x.size or not _of_size((weight, mean, var, *outs[1:]), C) or g.shape != x.shape:
        return None
    if not (out.contiguous or all(map(channels_last, (g, x, out)))):
        return None
    bind, nbytes, contiguous = _image_kernel([g, x, out], 3, _IMAGES_GRAD, _COLUMNS_GRAD, eps)

    def calls(out: Any, g: Any, x: Any, weight: Any, mean: Any, var: Any, scratch: Any = None) -> list[Any]:
        return bind(*out, scratch, g, x, *value_of(weight), mean, var)

    return NativeKernel(calls, nbytes, contiguous, aliasing=True)


def _half_images(images: Sequence[Spec], vectors: Sequence[Any]) -> bool:
    """Whether these are images of one half-width dtype, with one float or number for each channel in each vector."""
    kinds = {x.dtype for x in images}
    fit = all(v.dtype in (*kinds, _WIDE) for v in vectors if isinstance(v, Spec))
    return len(kinds) == 1 and kinds <= set(_HALVES) and fit and _of_size(vectors, images[0].shape[1])


class _Widened:
    """Vectors of half width as float32 in scratch: those that are read, then those that are written."""

    def __init__(self, vectors: Sequence[Any]) -> None:
        self.halves = [isinstance(v, Spec) and v.dtype != _WIDE for v in vectors]
        self.parts = [((v.size,), _WIDE) for v, half in zip(vectors, self.halves, strict=True) if half]

    def arrays(self, scratch: Any, start: int, vectors: Sequence[Any]) -> list[Any]:
        """What the kernel takes for these vectors; scratch from byte ``start`` on is theirs."""
        room = iter(carve(scratch[start:], *self.parts) if self.parts else ())
        return [next(room) if half else v for v, half in zip(vectors, self.halves, strict=True)]


@overlay_half("batch_norm")
def half_batch_norm(ins: Sequence[Any], outs: Sequence[Spec], *, eps: float) -> NativeKernel | None:
    """Of float16 and bfloat16; mean and variance are float32."""
    x, weight, bias = ins
    out = outs[0]
    if not x.size or not _half_images([x, out], (weight, bias)) or any(v.dtype != _WIDE for v in outs[1:]):
        return None
    if not (out.contiguous or (channels_last(x) and channels_last(out))):
        return None
    bind, nbytes, contiguous = _image_kernel([x, out], 2, _IMAGES, _COLUMNS, eps)
    widened = _Widened((weight, bias))

    def calls(out: Any, x: Any, *vectors: Any, scratch: Any = None) -> list[Any]:
        wide = widened.arrays(scratch, nbytes, vectors)
        made = [converted(to, v) for to, v in zip(wide, vectors, strict=True) if to is not v]
        return [*made, *bind(*out, scratch, x, *value_of(wide[0]), *value_of(wide[1]))]

    return NativeKernel(calls, nbytes + carve_bytes(*widened.parts), contiguous)


@overlay_half("batch_norm_grad")
def half_batch_norm_grad(ins: Sequence[Any], outs: Sequence[Spec], *, eps: float) -> NativeKernel | None:
    """Of float16 and bfloat16."""
    g, x, weight, mean, var = ins
    out = outs[0]
    if not x.size or g.shape != x.shape or not _half_images([g, x, out], (weight, mean, var, *outs[1:])):
        return None
    if not (out.contiguous or all(map(channels_last, (g, x, out)))):
        return None
    bind, nbytes, contiguous = _image_kernel([g, x, out], 3, _IMAGES_GRAD, _COLUMNS_GRAD, eps)
    widened = _Widened((weight, mean, var, *outs[1:]))

    def calls(out: Any, g: Any, x: Any, *vectors: Any, scratch: Any = None) -> list[Any]:
        everything = (*vectors, *out[1:])
        wide = widened.arrays(scratch, nbytes, everything)
        before = [converted(to, v) for to, v in zip(wide[:3], vectors, strict=True) if to is not v]
        after = [converted(v, to) for to, v in zip(wide[3:], out[1:], strict=True) if to is not v]
        return [*before, *bind(out[0], *wide[3:], scratch, g, x, *value_of(wide[0]), *wide[1:3]), *after]

    return NativeKernel(calls, nbytes + carve_bytes(*widened.parts), contiguous)


# ------------------------------------------------------------------------------------------------------- layer norm


@overlay("layer_norm")
def layer_norm(ins: Sequence[Any], outs: Sequence[Spec], *, ndim: int, eps: float) -> NativeKernel | None:
    """Result, mean and biased variance of each row."""
    x, weight, bias = ins
    n = math.prod(x.shape[x.ndim - ndim :])
    if not _alike((*ins, *outs)) or not x.size or not _of_size((weight, bias), n):
        return None
    function = _ROWS[x.dtype]
    numbers = sum(not isinstance(v, Spec) for v in (weight, bias))

    def calls(out: Any, x: Any, weight: Any, bias: Any, scratch: Any = None) -> list[Any]:
        return [function.bind(*out, scratch, x, *value_of(weight), *value_of(bias), x.size // n, n, eps)]

    return NativeKernel(calls, numbers * n * x.dtype.itemsize, contiguous=True)


@overlay("layer_norm_grad")
def layer_norm_grad(ins: Sequence[Any], outs: Sequence[Spec], *, ndim: int, eps: float) -> NativeKernel | None:
    """The gradients of input, weight and bias."""
    g, x, weight, mean, var = ins
    n = math.prod(x.shape[x.ndim - ndim :])
    if not _alike((*ins, *outs)) or not x.size or g.shape != x.shape or not _of_size((weight, *outs[1:]), n):
        return None
    if not _of_size((mean, var), x.size // n):
        return None
    function = _ROWS_GRAD[x.dtype]
    numbers = scratch_bytes("layer", x.size // n, n) + (0 if isinstance(weight, Spec) else n)

    def calls(out: Any, g: Any, x: Any, weight: Any, mean: Any, var: Any, scratch: Any = None) -> list[Any]:
        return [function.bind(*out, scratch, g, x, *value_of(weight), mean, var, x.size // n, n, eps)]

    return NativeKernel(calls, numbers * x.dtype.itemsize, contiguous=True, aliasing=True)
