"""Convolutions as matrix products over unrolled windows (im2col): which products, on which parts of which buffers.

With K = C/groups kH kW, L = output positions, and filters (O, K) a group, images lie as matrices in one of two orders:

- channels last, (n L, channels): y = columns W^T and grad_x = columns of y times turned filters, or grad_y W folded;
  grad_W = grad_y^T columns, a sum over all n L rows. One product for all images of a chunk.
- channels first, (n, channels, L): y = W columns, one call of the library for all images of a chunk, as a batch.

The rules, all of which follow from shapes and layouts alone:

- The order is that of the images that a product writes or, for grad_x, reads. The gradient of the weight is always made
  channels last: what lies otherwise is turned, chunk by chunk, since a sum over images is one product only so.
- 1x1 windows that move by one need no columns: the images are the matrices, and all images are one chunk.
- Other images are unrolled a chunk at a time, in chunks of equal size whose columns (and turned images) stay below a
  limit. The gradient of the weight is added up from chunk to chunk, in order, by the products themselves; that of
  a half-width weight in float32.
- Where windows move by one, grad_x is a convolution of grad_y with turned filters: it is added up within the products,
  in their accumulators. Where they move further (or grad_y has more channels and nothing is rounded in between),
  products make columns that a kernel folds, which adds.
- Channels-last columns are in the order (kH, kW, C) where the channels of a pixel are whole pieces of 16 bytes, and
  filters are packed the same way, into scratch; otherwise both have the order of the weight, (C, kH, kW). Rows for
  tensor cores (half-width floats, TF32) are filled up with zeros to multiples of 16 bytes.

Nothing here touches memory. Unrolling, folding, packing and turning are kernels of their own (``kernels/columns.py``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from brim.errors import ShapeError
from brim.spec import DTYPES, Spec
from brim_cuda.cublaslt import Epilogue
from brim_cuda.gemm import GemmPlan, plan_matmul
from brim_cuda.gemm_run import Addresses

__all__ = ["PIECE_BYTES", "Columns", "ConvCall", "ConvChunk", "ConvPlan", "lies", "plan_conv"]

Pair = tuple[int, int]
PIECE_BYTES = 16
"""What a thread reads at once, and what rows of operands of tensor cores should be multiples of."""
_ALIGNMENT_BYTES = 256


@dataclass(frozen=True, slots=True)
class ConvCall:
    """One product of a chunk: the names of its operands' buffers, and bytes from their starts.

    Names are "x" (images of C channels, or their gradient), "y" (of O channels), "w", and the parts of scratch.
    """

    plan: GemmPlan
    a: tuple[str, int]
    b: tuple[str, int]
    out: tuple[str, int]

    def at(self, buffers: Mapping[str, int], workspace: int = 0, bias: int = 0) -> Addresses:
        """Addresses of the operands from the addresses of the buffers."""
        a, b, out = (buffers[name] + offset for name, offset in (self.a, self.b, self.out))
        return Addresses(a, b, out, added=out if self.plan.added is not None else 0, bias=bias, workspace=workspace)


@dataclass(frozen=True, slots=True)
class ConvChunk:
    """Images ``first`` to ``first + count`` and their product."""

    first: int
    count: int
    call: ConvCall


@dataclass(frozen=True, slots=True)
class Columns:
    """How unrolled windows lie: (n L, groups length) channels last, (n, groups length, L) channels first.

    Attributes:
        last: which of them.
        by_element: a group's elements are in the order (kH, kW, channels), read and written in pieces of 16 bytes, else
            (channels, kH, kW).
        groups, channels, window: numbers of groups, channels of each, elements of a window.
        length: channels times window, and the zeros that fill a row up.
        positions: L.
    """

    last: bool
    by_element: bool
    groups: int
    channels: int
    window: int
    length: int
    positions: int

    @property
    def repacked(self) -> bool:
        """Whether filters lie otherwise than in the weight."""
        return (self.by_element and self.window > 1) or self.length != self.channels * self.window

    def shape(self, n: int) -> tuple[int, ...]:
        """Of those of n images."""
        k = self.groups * self.length
        return (n, self.positions, k) if self.last else (n, k, self.positions)


@dataclass(frozen=True, slots=True)
class ConvPlan:
    """One convolution, or one of its gradients.

    Attributes:
        unroll: the images that are unrolled into columns before the product of each chunk: "x", "y" or "" for none.
        fold: whether columns are folded into x after the product of each chunk.
        columns: how they lie; None without any.
        turned: the images of which the chunk is brought into channels-last order before its product: of "x", "y".
        filters: whether the weight is first "packed" in the order of the columns, or "flipped": packed with its
            channels exchanged and its windows turned by half a turn; "" where it is read as it lies.
        sums: the buffer in which the gradient of the weight is added up, (O, length), and which is unpacked (and
            rounded) into the weight's gradient at the end; None where the products write that.
        chunks: in order.
        copied: whether the caller must pass row-major copies of the op's two inputs.
        parts: bytes in scratch where "columns", "x_turned", "y_turned", "filters", "sums", "workspace" start.
        workspace_bytes: of each product.
        scratch_bytes: of all.
    """

    unroll: str
    fold: bool
    columns: Columns | None
    turned: tuple[str, ...]
    filters: str
    sums: Spec | None
    chunks: tuple[ConvChunk, ...]
    copied: tuple[bool, bool]
    parts: Mapping[str, int]
    workspace_bytes: int
    scratch_bytes: int


def lies(spec: Spec, channels_last: bool) -> bool:
    """True when images (N, C, H, W) lie without gaps in this order."""
    if not channels_last:
        return spec.contiguous
    n, c, h, w = spec.shape
    strides = [spec.strides[axis] for axis in (0, 2, 3, 1)]
    return Spec((n, h, w, c), spec.dtype, tuple(strides)).contiguous


Operand = tuple[Spec, tuple[str, int]]
"""Matrices, the name of their buffer, and bytes from its start."""


def _turn(operand: Operand) -> Operand:
    """The last two axes exchanged."""
    spec, at = operand
    order = (*range(spec.ndim - 2), spec.ndim - 1, spec.ndim - 2)
    shape, strides = (tuple(values[axis] for axis in order) for values in (spec.shape, spec.strides))
    return Spec(shape, spec.dtype, strides), at


@lru_cache(maxsize=1024)
def plan_conv(
    op: str,
    first: Spec,
    second: Spec,
    out: Spec,
    *,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    groups: int = 1,
    epilogue: Epilogue = Epilogue.DEFAULT,
    tf32: bool = False,
    columns_bytes: int = 64 << 20,
    workspace_bytes: int = 4 << 20,
) -> ConvPlan:
    """The plan of ``conv2d`` (x, w -> y), ``conv2d_grad_input`` (y, w -> x) or ``conv2d_grad_weight`` (y, x -> w).

    Arguments:
        op: which of them.
        first, second, out: its inputs and its output: images (N, C, H, W) row-major or channels last, and the
            weight (O, C/groups, kH, kW) row-major; inputs of other layouts are marked in ``copied`` where products
            must read them.
        stride, padding, groups: of the convolution (its dilation is the unrolling kernel's affair).
        epilogue: of conv2d on channels-last images with one group: a bias (O,) and an activation.
        columns_bytes: how much columns and turned images of a chunk may take; one image is always taken.
        workspace_bytes: scratch offered to the library.

    Raises:
        DTypeError: a dtype that cuBLASLt has no product for.
        ValueError: an output of another layout; an epilogue that does not go with this convolution.
    """
    copied = [False, False]
    if op != "conv2d_grad_weight":
        copied[1] = not second.contiguous
        second = Spec(second.shape, second.dtype)
    elif not out.contiguous:
        raise ValueError(f"{op}: the gradient of the weight must be row-major, got {out}")
    if op == "conv2d_grad_input" and not (lies(first, False) or lies(first, True)):
        copied[0], first = True, Spec(first.shape, first.dtype)
    x, w, y = {
        "conv2d": (first, second, out),
        "conv2d_grad_input": (out, second, first),
        "conv2d_grad_weight": (second, out, first),
    }[op]
    if x.ndim != 4 or w.ndim != 4 or y.ndim != 4 or w.shape[0] % groups or x.shape[1] != w.shape[1] * groups:
        raise ShapeError(f"{op} with groups={groups}: images {x.shape} and {y.shape} do not go with weight {w.shape}")
    orders = [last for last in (False, True) if lies(y, last)] if op != "conv2d_grad_weight" else [True]
    if not orders:
        raise ValueError(f"{op}: images must be row-major or channels last, got {y}")
    last = next((order for order in orders if lies(x, order)), orders[0])
    if epilogue != Epilogue.DEFAULT and (op != "conv2d" or not last or groups > 1 or not math.prod(w.shape[1:])):
        raise ValueError(f"{op}: an epilogue needs channels-last images and one group")
    builder = _Builder(op, x, w, y, groups, last, stride, padding, epilogue, tf32, workspace_bytes)
    return builder.plan((copied[0], copied[1]), columns_bytes)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES


@dataclass(frozen=True, slots=True)
class _Builder:
    """One convolution: what is done to its images, and the products of its chunks."""

    op: str
    x: Spec
    w: Spec
    y: Spec
    groups: int
    last: bool
    stride: Pair
    padding: Pair
    epilogue: Epilogue
    tf32: bool
    workspace_bytes: int

    @property
    def pointwise(self) -> bool:
        """Whether each output position has one pixel, the one at its own place."""
        return self.w.shape[2:] == self.stride == (1, 1) and self.padding == (0, 0)

    @property
    def flips(self) -> bool:
        """Whether the gradient of x is a convolution of y: see the rules at the top."""
        if self.op != "conv2d_grad_input" or self.stride != (1, 1) or math.prod(self.w.shape[2:]) == 1:
            return False
        return lies(self.x, self.last) and (self.x.dtype.itemsize == 2 or self.y.shape[1] <= self.x.shape[1])

    def plan(self, copied: tuple[bool, bool], columns_bytes: int) -> ConvPlan:
        op, images = self.op, self.x.shape[0]
        gradient_of_weight = op == "conv2d_grad_weight"
        direct = self.pointwise and lies(self.x, self.last)
        turned = () if not gradient_of_weight or not images else tuple(
            name for name, spec, wanted in (("x", self.x, self.pointwise), ("y", self.y, True))
            if wanted and not lies(spec, True)
        )  # fmt: skip
        columns = None if direct or "x" in turned or not images else self._columns()
        folds = columns is not None and op == "conv2d_grad_input" and not self.flips
        filters = ""
        if columns is not None and not gradient_of_weight:
            filters = "flipped" if self.flips else "packed" if columns.repacked else ""

        item = self.x.dtype.itemsize
        row = 0 if columns is None else math.prod(columns.shape(1)) * item
        each = row + sum(math.prod(getattr(self, name).shape[1:]) * item for name in turned)
        count = max(1, images if not each else min(images, columns_bytes // each))
        count = max(1, -(-images // max(1, -(-images // count))))  # as many chunks, of equal size
        sums = self._sums(columns, -(-images // count)) if gradient_of_weight else None
        parts, at = {}, 0
        for name, nbytes in (
            ("columns", row * count),
            *((f"{name}_turned", math.prod(getattr(self, name).shape[1:]) * item * count) for name in turned),
            ("filters", self._rows(columns) * columns.length * item if columns is not None and filters else 0),
            ("sums", sums.nbytes if sums is not None else 0),
        ):
            parts[name], at = at, at + _aligned(nbytes)
        parts["workspace"] = at
        starts = range(0, images, count) if images or not gradient_of_weight else (0,)  # a sum over no images is zero
        chunks = tuple(
            ConvChunk(n, size, self._call(n, size, columns, turned, filters, sums))
            for n in starts
            for size in (min(count, images - n),)
        )
        needed = max((chunk.call.plan.workspace_bytes for chunk in chunks), default=0)
        unroll = "" if columns is None or folds else "y" if self.flips else "x"
        return ConvPlan(
            unroll, folds, columns, turned, filters, sums, chunks, copied, parts,
            needed, at + needed,
        )  # fmt: skip

    def _rows(self, columns: Columns) -> int:
        """Rows of the packed filters, of all groups."""
        return self.x.shape[1] if self.flips else self.w.shape[0]

    def _columns(self) -> Columns:
        source = self.y if self.flips else self.x
        positions = math.prod((self.x if self.flips else self.y).shape[2:])
        channels, window = source.shape[1] // self.groups, math.prod(self.w.shape[2:])
        pieces = PIECE_BYTES // source.dtype.itemsize
        evenly = all(step % pieces == 0 for step in (channels, *source.strides[:1], *source.strides[2:]))
        by_element = self.last and source.strides[1] == 1 and evenly
        length = channels * window
        if self.last and (source.dtype.itemsize == 2 or self.tf32) and window > 1:
            length = -(-length // pieces) * pieces
        return Columns(self.last, by_element, self.groups, channels, window, length, positions)

    def _sums(self, columns: Columns | None, products: int) -> Spec | None:
        """Where the gradient of the weight is added up, if not in its place."""
        half = self.w.dtype.itemsize == 2
        dtype = DTYPES["float32"] if half and products > 1 else self.w.dtype
        length = math.prod(self.w.shape[1:]) if columns is None else columns.length
        packed = columns is not None and columns.repacked
        return Spec((self.w.shape[0], length), dtype) if packed or dtype != self.w.dtype else None

    def _images(self, like: Spec, n: int, channels: int) -> Spec:
        """Of n images, ``channels`` in each group: (groups, n L, channels) last, (n, groups, channels, L) first."""
        positions = math.prod(like.shape[2:])
        if self.last:
            return Spec((self.groups, n * positions, channels), like.dtype, (channels, self.groups * channels, 1))
        return Spec((n, self.groups, channels, positions), like.dtype)

    def _call(
        self, start: int, n: int, columns: Columns | None, turned: tuple[str, ...], filters: str, sums: Spec | None
    ) -> ConvCall:
        """The product of a chunk."""

        def images(name: str) -> Operand:
            spec: Spec = getattr(self, name)
            made = self._images(spec, n, spec.shape[1] // self.groups)
            if name in turned:
                return made, (f"{name}_turned", 0)
            return made, (name, start * math.prod(spec.shape[1:]) * spec.dtype.itemsize)

        def unrolled(source: str) -> Operand:
            if not n:  # a sum over nothing
                return Spec((self.groups, 0, math.prod(self.w.shape[1:])), self.x.dtype), ("x", 0)
            if columns is None:
                return images(source)
            shape = (n, self.groups, columns.length, columns.positions)
            if not self.last:
                return Spec(shape, self.x.dtype), ("columns", 0)
            strides = (columns.length, self.groups * columns.length, 1)
            rows = Spec((self.groups, n * columns.positions, columns.length), self.x.dtype, strides)
            return rows, ("columns", 0)

        def weight(rows: int, like: Spec, name: str) -> Operand:
            length = math.prod(self.w.shape[1:]) if columns is None else columns.length
            return Spec((self.groups, rows // self.groups, length), like.dtype), (name, 0)

        if self.op == "conv2d_grad_weight":
            made, at = weight(self.w.shape[0], self.w if sums is None else sums, "w" if sums is None else "sums")
            return self._product(_turn(images("y")), unrolled("x"), (made, at), more=start > 0)
        by = weight(self.x.shape[1] if self.flips else self.w.shape[0], self.w, "filters" if filters else "w")
        if self.op == "conv2d" or self.flips:
            source, target = ("y", "x") if self.flips else ("x", "y")
            if self.last:
                return self._product(unrolled(source), _turn(by), images(target), epilogue=self.epilogue)
            return self._product(by, unrolled(source), images(target))
        if self.last:
            return self._product(images("y"), by, unrolled("x"))
        return self._product(_turn(by), images("y"), unrolled("x"))

    def _product(
        self,
        a: Operand,
        b: Operand,
        out: Operand,
        *,
        more: bool = False,
        epilogue: Epilogue = Epilogue.DEFAULT,
    ) -> ConvCall:
        """A product; ``more``: added to what is there."""
        plan = plan_matmul(
            a[0], b[0], out[0], epilogue=epilogue, beta=1.0 if more else 0.0, added=out[0] if more else None,
            tf32=self.tf32, workspace_bytes=self.workspace_bytes,
        )  # fmt: skip
        return ConvCall(plan, a[1], b[1], out[1])
