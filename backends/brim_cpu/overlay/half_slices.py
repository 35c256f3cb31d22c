"""Ops of float16 and bfloat16, some images or rows at a time: converted to float32, computed by the float32 kernel and
rounded once. Sums over all images are added up in float32.

What is converted at a time is small, so that half width saves memory here, too, and stays in the caches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from functools import cache
from typing import Any

import numpy as np

from brim.expr import FusedFormula, ScalarStep
from brim.spec import Spec
from brim_cpu.blocks import carve, carve_bytes
from brim_cpu.overlay import OVERLAYS, NativeKernel, conv, norm, overlay_half, pool, softmax
from brim_cpu.overlay.conv import is_channels_last
from brim_cpu.overlay.elementwise import Interpreter
from brim_cpu.overlay.half import converted

__all__ = ["SLICE_BYTES"]

Array = np.ndarray[Any, Any]
Call = Callable[[], None]
Operand = Any
"""Of specs: an array's, or a number that stands for an array of it."""

_WIDE = np.dtype("float32")
_FLOAT32_KERNELS = (conv, norm, pool, softmax)  # imported, so that they are registered

SLICE_BYTES = 4 << 20
"""Of the images that are computed at a time, in float32: enough for the work of several threads."""


@cache
def _sum() -> Interpreter:
    step = ScalarStep("add", _WIDE, (("in", 0), ("in", 1)), _WIDE)
    return Interpreter(FusedFormula((step,), (0,)), [False, False], [_WIDE])


def _added(total: Array, part: Array) -> Call:
    """A call that computes total += part."""
    call = _sum().call([total], [total, part])
    assert call is not None
    return call


def _is_half(operand: Operand) -> bool:
    return isinstance(operand, Spec) and operand.dtype.itemsize == 2 and operand.dtype.kind not in "iu"


def _dense(spec: Spec, shape: tuple[int, ...], ordered: bool) -> Spec:
    """A float32 array of this shape, with channels side by side where the spec's images have them so."""
    if not (ordered and spec.ndim == 4 and is_channels_last(spec)):
        return Spec(shape, _WIDE)
    _, c, h, w = shape
    return Spec(shape, _WIDE, (c * h * w, 1, w * c, c))


def _array(room: Array, spec: Spec) -> Array:
    """Flat float32 memory as an array of this spec."""
    return np.ndarray(spec.shape, _WIDE, room, 0, tuple(4 * step for step in spec.strides))


class _Slices:
    """An op bound slice by slice along the first axis of its arrays.

    Arguments:
        name: of the op; its float32 kernel is used.
        whole: inputs that every slice sees as a whole.
        summed: outputs that are the sum of what the slices give.
        ordered: whether buffers have the images' order in memory, or are row-major.
    """

    def __init__(
        self, name: str, ins: Sequence[Operand], outs: Sequence[Spec], params: dict[str, Any],
        whole: Collection[int], summed: Collection[int], ordered: bool,
    ) -> None:  # fmt: skip
        self.ins, self.outs, self.whole, self.summed, self.ordered = ins, outs, whole, summed, ordered
        self.name, self.params = name, params
        cut = [x for i, x in enumerate(ins) if self._is_cut(i, x)]
        cut += [x for o, x in enumerate(outs) if o not in summed]
        self.count = cut[0].shape[0]
        nbytes = sum(4 * x.size // self.count for x in cut if _is_half(x))
        pieces = -(-self.count // max(1, SLICE_BYTES // max(1, nbytes)))
        self.step = -(-self.count // pieces)
        self.kernels = {many: self._bind(many) for many in {self.step, self._rest()}}

    def _is_cut(self, i: int, operand: Operand) -> bool:
        return isinstance(operand, Spec) and i not in self.whole

    def _rest(self) -> int:
        """Images of the last slice."""
        return (self.count - 1) % self.step + 1

    def _wide(self, spec: Spec, many: int | None) -> Spec:
        """What the float32 kernel sees of an array: so many images of it, or all."""
        shape = spec.shape if many is None else (many, *spec.shape[1:])
        return _dense(spec, shape, self.ordered) if _is_half(spec) else Spec(shape, spec.dtype, spec.strides)

    def _bind(self, many: int) -> NativeKernel | None:
        ins = [
            self._wide(x, many if self._is_cut(i, x) else None) if isinstance(x, Spec) else x
            for i, x in enumerate(self.ins)
        ]
        outs = [Spec(x.shape, _WIDE) if o in self.summed else self._wide(x, many) for o, x in enumerate(self.outs)]
        kernel = OVERLAYS[self.name](ins, outs, **self.params)
        if kernel is None:
            return None
        flags = kernel.contiguous
        wanted = (flags,) * len(ins) if isinstance(flags, bool) else flags
        copied = any(flag and isinstance(x, Spec) and not x.contiguous for flag, x in zip(wanted, ins, strict=True))
        return None if copied else kernel

    def parts(self) -> list[tuple[tuple[int, ...], Any]]:
        """Scratch: of each input that is converted, each output (sums twice), then what the kernels want."""
        found = [x.size // self.count * self.step if self._is_cut(i, x) else x.size for i, x in self._halves()]
        for o, x in enumerate(self.outs):
            found += [x.size if o in self.summed else x.size // self.count * self.step] * self._rooms(o)
        wanted = max(0 if k is None else k.scratch_bytes for k in self.kernels.values())
        return [*(((size,), _WIDE) for size in found), ((wanted,), np.uint8)]

    def _rooms(self, o: int) -> int:
        """How many buffers an output needs."""
        return 2 if o in self.summed else int(_is_half(self.outs[o]))

    def _halves(self) -> list[tuple[int, Spec]]:
        return [(i, x) for i, x in enumerate(self.ins) if _is_half(x)]

    def calls(self, out: Any, *ins: Any, scratch: Any = None) -> list[Call]:
        *rooms, work = carve(scratch, *self.parts())
        targets = out if isinstance(out, tuple) else (out,)
        made: list[Call] = []
        room_of = {i: rooms.pop(0) for i, _ in self._halves()}
        given = list(ins)
        for i, spec in self._halves():
            if not self._is_cut(i, spec):
                given[i] = _array(room_of[i], self._wide(spec, None))
                made.append(converted(given[i], ins[i]))
        out_rooms = [[rooms.pop(0) for _ in range(self._rooms(o))] for o in range(len(self.outs))]
        for first in range(0, self.count, self.step):
            some = slice(first, first + self.step)
            many = min(self.step, self.count - first)
            wide_ins = list(given)
            for i, spec in enumerate(self.ins):
                if not self._is_cut(i, spec):
                    continue
                wide_ins[i] = ins[i][some]
                if _is_half(spec):
                    wide_ins[i] = _array(room_of[i], self._wide(spec, many))
                    made.append(converted(wide_ins[i], ins[i][some]))
            results: list[Array] = []
            after: list[Call] = []
            for o, spec in enumerate(self.outs):
                if o in self.summed:
                    total, part = (room.reshape(spec.shape) for room in out_rooms[o])
                    results.append(part if first > 0 else total)
                    if first > 0:
                        after.append(_added(total, part))
                    if first + many == self.count:
                        after.append(converted(targets[o], total))
                elif _is_half(spec):
                    results.append(_array(out_rooms[o][0], self._wide(spec, many)))
                    after.append(converted(targets[o][some], results[-1]))
                else:
                    results.append(targets[o][some])
            kernel = self.kernels[many]
            assert kernel is not None
            passed = tuple(results) if isinstance(out, tuple) else results[0]
            made.extend(kernel.calls(passed, *wide_ins, scratch=work[: kernel.scratch_bytes]))
            made.extend(after)
        return made


def _by_slices(
    name: str, ins: Sequence[Operand], outs: Sequence[Spec], params: dict[str, Any],
    whole: Collection[int] = (), summed: Collection[int] = (),
) -> NativeKernel | None:  # fmt: skip
    if any(isinstance(x, Spec) and x.size == 0 for x in (*ins, *outs)):
        return None
    for ordered in (True, False):  # a kernel may want all images in one order
        found = _Slices(name, ins, outs, params, whole, summed, ordered)
        if all(found.kernels.values()):
            return NativeKernel(found.calls, carve_bytes(*found.parts()))
    return None


# ------------------------------------------------------------------------------------------------------------ images


@overlay_half("conv2d")
def _conv2d(ins: Any, outs: Any, **params: Any) -> NativeKernel | None:
    return _by_slices("conv2d", ins, outs, params, whole=(1,))


@overlay_half("conv2d_grad_input")
def _grad_input(ins: Any, outs: Any, **params: Any) -> NativeKernel | None:
    return _by_slices("conv2d_grad_input", ins, outs, params, whole=(1,))


@overlay_half("conv2d_grad_weight")
def _grad_weight(ins: Any, outs: Any, **params: Any) -> NativeKernel | None:
    return _by_slices("conv2d_grad_weight", ins, outs, params, summed=(0,))


@overlay_half("max_pool2d")
def _max_pool(ins: Any, outs: Any, **params: Any) -> NativeKernel | None:
    return _by_slices("max_pool2d", ins, outs, params)


@overlay_half("max_pool2d_grad")
def _max_pool_grad(ins: Any, outs: Any, **params: Any) -> NativeKernel | None:
    return _by_slices("max_pool2d_grad", ins, outs, params)


@overlay_half("avg_pool2d")
def _avg_pool(ins: Any, outs: Any, **params: Any) -> NativeKernel | None:
    return _by_slices("avg_pool2d", ins, outs, params)


@overlay_half("avg_pool2d_grad")
def _avg_pool_grad(ins: Any, outs: Any, **params: Any) -> NativeKernel | None:
    return _by_slices("avg_pool2d_grad", ins, outs, params)


# -------------------------------------------------------------------------------------------------------------- rows


def _rows(
    name: str, ins: Sequence[Operand], outs: Sequence[Spec], params: dict[str, Any], shapes: Any,
    whole: Collection[int] = (), summed: Collection[int] = (),
) -> NativeKernel | None:  # fmt: skip
    """As ``_by_slices``, of row-major arrays seen in other shapes: those of the inputs, then of the outputs."""
    specs = [Spec(s, x.dtype) if isinstance(x, Spec) else x for x, s in zip((*ins, *outs), shapes, strict=True)]
    if not all(x.contiguous for x in outs):
        return None
    found = _by_slices(name, specs[: len(ins)], specs[len(ins) :], params, whole, summed)
    if found is None:
        return None
    bound = found

    def calls(out: Any, *arrays: Any, scratch: Any = None) -> Sequence[Call]:
        given = [x.reshape(s) if isinstance(x, np.ndarray) else x for x, s in zip(arrays, shapes)]
        if isinstance(out, tuple):
            seen: Any = tuple(x.reshape(s) for x, s in zip(out, shapes[len(ins) :], strict=True))
        else:
            seen = out.reshape(shapes[-1])
        return bound.calls(seen, *given, scratch=scratch)

    return NativeKernel(calls, bound.scratch_bytes, contiguous=True)


@overlay_half("softmax")
def _softmax(ins: Any, outs: Any, **params: Any) -> NativeKernel | None:
    return _last_axis("softmax", ins, outs, **params)


@overlay_half("log_softmax")
def _log_softmax(ins: Any, outs: Any, **params: Any) -> NativeKernel | None:
    return _last_axis("log_softmax", ins, outs, **params)


@overlay_half("softmax_grad")
def _softmax_grad(ins: Any, outs: Any, **params: Any) -> NativeKernel | None:
    return _last_axis("softmax_grad", ins, outs, **params)


@overlay_half("log_softmax_grad")
def _log_softmax_grad(ins: Any, outs: Any, **params: Any) -> NativeKernel | None:
    return _last_axis("log_softmax_grad", ins, outs, **params)


def _last_axis(name: str, ins: Sequence[Operand], outs: Sequence[Spec], *, axis: int) -> NativeKernel | None:
    (out,) = outs
    if axis != out.ndim - 1 or not out.size or any(x.shape != out.shape for x in ins):
        return None
    shape = (out.size // out.shape[-1], out.shape[-1])
    return _rows(name, ins, outs, {"axis": 1}, [shape] * (len(ins) + 1))


@overlay_half("layer_norm")
def _layer_norm(ins: Any, outs: Any, *, ndim: int, eps: float) -> NativeKernel | None:
    x = ins[0]
    n = math.prod(x.shape[x.ndim - ndim :])
    if not x.size or any(isinstance(v, Spec) and v.size != n for v in ins[1:]):
        return None
    table, each = (x.size // n, n), (x.size // n, 1)
    shapes = [table, (n,), (n,), table, each, each]
    return _rows("layer_norm", ins, outs, {"ndim": 1, "eps": eps}, shapes, whole=(1, 2))


@overlay_half("layer_norm_grad")
def _layer_norm_grad(ins: Any, outs: Any, *, ndim: int, eps: float) -> NativeKernel | None:
    x = ins[1]
    n = math.prod(x.shape[x.ndim - ndim :])
    if not x.size or any(v.size != n for v in (*outs[1:], ins[2]) if isinstance(v, Spec)):
        return None
    if any(v.size != x.size // n for v in ins[3:]):
        return None
    table, each = (x.size // n, n), (x.size // n, 1)
    shapes = [table, table, (n,), each, each, table, (n,), (n,)]
    return _rows("layer_norm_grad", ins, outs, {"ndim": 1, "eps": eps}, shapes, whole=(2,), summed=(1, 2))
