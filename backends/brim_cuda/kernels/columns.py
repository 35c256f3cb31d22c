"""Launches around the products of a convolution: images unrolled, folded and turned, filters packed (``gemm_conv``)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from brim.spec import DTYPES, Spec
from brim_cuda.gemm_conv import PIECE_BYTES, ConvChunk, ConvPlan
from brim_cuda.kernels.pool import WINDOWS, Pair
from brim_cuda.launch import (
    BLOCK,
    C_TYPES,
    Call,
    Param,
    Place,
    Scratch,
    blocks_for,
    index_dtype,
    named_kernel,
    pointer,
)

__all__ = ["Mover", "moved"]

_INCLUDES = ("scalar.cuh", "shared.cuh", "windows.cuh", "columns.cuh")
_INT = DTYPES["int32"]
_LANES = (4, 32)
"""Threads that unroll one position, at least and at most."""
_SQUARE = 32
"""Pixels and channels that are turned together."""


def moved(place: Place, elements: int, itemsize: int) -> Place:
    """So many elements further on."""
    if isinstance(place, Scratch):
        return Scratch(place.offset_bytes + elements * itemsize)
    return type(place)(place.index, place.offset + elements)


class Mover:
    """What is launched before and after the products of a plan.

    Arguments:
        plan: of the convolution.
        specs: of its three arrays: "x" (images of C channels), "w", "y" (of O channels).
        places: where they are.
        stride, padding, dilation: of the convolution.
    """

    def __init__(
        self,
        plan: ConvPlan,
        specs: Mapping[str, Spec],
        places: Mapping[str, Place],
        *,
        stride: Pair,
        padding: Pair,
        dilation: Pair,
    ) -> None:
        self.plan, self.specs, self.places = plan, specs, places
        self.kernel_size = specs["w"].shape[2:]
        self.source = "x" if plan.fold else plan.unroll
        self.index = index_dtype([*specs.values(), *self._columns()])
        if plan.unroll == "y":  # a convolution of y with turned windows
            padding = tuple(d * (k - 1) - p for d, k, p in zip(dilation, self.kernel_size, padding))  # type: ignore[assignment]
            sizes = specs["y"].shape[2:], specs["x"].shape[2:]
        else:
            sizes = specs["x"].shape[2:], specs["y"].shape[2:]
        self.windows = np.array((*sizes, self.kernel_size, stride, padding, dilation, False, False), WINDOWS)

    def _columns(self) -> list[Spec]:
        columns = self.plan.columns
        if columns is None:
            return []
        most = max(chunk.count for chunk in self.plan.chunks)
        return [Spec(columns.shape(most), self.specs["x"].dtype)]

    def at(self, part: str) -> Scratch:
        """Where a part of scratch starts."""
        return Scratch(self.plan.parts[part])

    def _packing(self) -> tuple[Param, np.ndarray[Any, Any]]:
        dtype = np.dtype([(name, self.index) for name in ("groups", "channels", "length")])
        columns = self.plan.columns
        numbers = (columns.groups, columns.channels, columns.length) if columns is not None else (1, 0, 0)
        param = Param("packing", dtype, ctype=f"Packing<{C_TYPES[self.index]}>")
        return param, np.array(numbers, dtype)

    def _strides(self, spec: Spec) -> tuple[Param, np.ndarray[Any, Any]]:
        dtype = np.dtype([(axis, self.index, (4,)) for axis in "xyz"])
        strides = np.zeros((), dtype)
        strides["x"] = spec.strides
        return Param("strides", dtype, ctype=f"Strides4<{C_TYPES[self.index]}>"), strides

    def _number(self, name: str, value: int) -> tuple[Param, Any]:
        return Param(name, self.index), self.index.type(value)

    def _call(
        self,
        body: Sequence[tuple[str, Sequence[tuple[Param, Any]]]],
        blocks: int,
        shared_bytes: int = 0,
    ) -> Call:
        """One launch of functions with these operands, one after the other; operands of one name are one."""
        lines = [f"    {function}({', '.join(param.name for param, _ in operands)});" for function, operands in body]
        given = {param: argument for _, operands in body for param, argument in operands}
        name = body[-1][0].partition("<")[0]
        text = f"""extern "C" __global__ void __launch_bounds__({BLOCK}) NAME(PARAMS) {{
{chr(10).join(lines)}
}}
"""
        kernel = named_kernel(name, list(given), text, _INCLUDES)
        return Call(kernel, (blocks,), tuple(given.values()), shared_bytes=shared_bytes)

    def filters(self) -> list[Call]:
        """Packs the weight into scratch, where the plan wants it and no launch that unrolls does it."""
        n, function, operands = self._packed()
        return [self._call([(function, operands)], blocks_for(n))] if n and not self.plan.unroll else []

    def _packed(self) -> tuple[int, str, list[tuple[Param, Any]]]:
        """(elements, function, operands) of packing the weight; no elements where there is nothing to pack."""
        plan, w = self.plan, self.specs["w"]
        if not plan.filters:
            return 0, "", []
        assert plan.columns is not None
        flipped = plan.filters == "flipped"
        rows = (self.specs["x"].shape[1] if flipped else w.shape[0]) // plan.columns.groups
        n = rows * plan.columns.groups * plan.columns.length
        function, template = "pack_filters", [plan.columns.window, plan.columns.by_element, flipped]
        operands = [
            (pointer("w", w.dtype, const=True), self.places["w"]),
            (pointer("filters", w.dtype), self.at("filters")),
            self._number("packed", n),
            self._number("rows", rows),
            self._packing(),
        ]
        return n, f"{function}<{', '.join(map(str, template)).lower()}>", operands

    def finish(self, out: Place) -> list[Call]:
        """Writes the gradient of the weight from where it was added up, where the plan did that elsewhere."""
        sums, w = self.plan.sums, self.specs["w"]
        if sums is None:
            return []
        columns = self.plan.columns
        window, by_element = (1, False) if columns is None else (columns.window, columns.by_element)
        packing, numbers = self._packing()
        if columns is None:  # only a conversion
            numbers["channels"] = numbers["length"] = math.prod(w.shape[1:])
        operands = [
            (pointer("filters", sums.dtype, const=True), self.at("sums")),
            (pointer("w", w.dtype), out),
            self._number("n", w.size),
            self._number("rows", 0),
            (packing, numbers),
        ]
        function = f"unpack_filters<{window}, {str(by_element).lower()}>"
        return [self._call([(function, operands)], blocks_for(w.size))] if w.size else []

    def before(self, chunk: ConvChunk) -> list[Call]:
        """Turns and unrolls the images of a chunk."""
        made = [call for name in self.plan.turned for call in self._turn(name, chunk)]
        return made + (self._roll(chunk) if self.plan.unroll else [])

    def after(self, chunk: ConvChunk) -> list[Call]:
        """Folds the columns of a chunk."""
        return self._roll(chunk) if self.plan.fold else []

    def _roll(self, chunk: ConvChunk) -> list[Call]:
        """Unrolls into the columns of a chunk, or folds them; nothing where there is nothing to write.

        The launch that unrolls the first chunk packs the filters, too.
        """
        columns, spec = self.plan.columns, self.specs[self.source]
        assert columns is not None
        pieces = PIECE_BYTES // spec.dtype.itemsize if columns.by_element else 1
        lanes, folds = 1, self.plan.fold
        kh, kw = self.kernel_size
        if folds:
            n = chunk.count * spec.shape[1] * math.prod(spec.shape[2:]) // pieces
            function, template = "fold", f"<{kh}, {kw}, {'true' if columns.last else 'false'}, {pieces}>"
        elif columns.by_element:
            n = chunk.count * columns.positions * spec.shape[1] // pieces
            function, template = "unroll_pieces", f"<{kh}, {kw}, {pieces}>"
        elif columns.last:
            n = chunk.count * columns.positions
            row = columns.groups * columns.length
            lanes = min(_LANES[1], max(_LANES[0], 1 << max(0, row - 1).bit_length()))
            function, template = "unroll_last", f"<{kh}, {kw}>"
            n = n if row else 0
        else:
            n = chunk.count * spec.shape[1] * columns.positions
            function, template = "unroll_first", f"<{kh}, {kw}>"
        if n == 0 or (not folds and columns.window == 0):
            return []
        images = (pointer("x", spec.dtype, const=not folds), self._image(self.source, chunk))
        unrolled = (pointer("columns", spec.dtype, const=folds), self.at("columns"))
        operands: list[tuple[Param, Any]] = [unrolled, images] if folds else [images, unrolled]
        operands += [self._number("n", n), self._packing(), (Param("windows", WINDOWS, ctype="Windows"), self.windows)]
        operands += [self._strides(spec)]
        if not folds:
            operands.append((Param("lanes", _INT), lanes))
        packed, pack, filters = self._packed() if not folds and chunk.first == 0 else (0, "", [])
        body = [(pack, filters)] if packed else []
        return [self._call([*body, (f"{function}{template}", operands)], blocks_for(n * lanes))]

    def _image(self, name: str, chunk: ConvChunk) -> Place:
        """Where the first image of a chunk starts."""
        spec = self.specs[name]
        return moved(self.places[name], chunk.first * spec.strides[0], spec.dtype.itemsize)

    def _turn(self, name: str, chunk: ConvChunk) -> list[Call]:
        spec = self.specs[name]
        channels, pixels = spec.shape[1], math.prod(spec.shape[2:])
        n = chunk.count * -(-channels // _SQUARE) * -(-pixels // _SQUARE)
        if n == 0:
            return []
        operands = [
            (pointer("x", spec.dtype, const=True), self._image(name, chunk)),
            (pointer("turned", spec.dtype), self.at(f"{name}_turned")),
            *(
                self._number(*one)
                for one in (("n", n), ("channels", channels), ("pixels", pixels), ("width", spec.shape[3]))
            ),
            self._strides(spec),
        ]
        shared_bytes = _SQUARE * (_SQUARE + 1) * spec.dtype.itemsize
        return [self._call([("turn", operands)], blocks_for(n * BLOCK), shared_bytes)]
