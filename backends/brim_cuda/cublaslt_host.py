"""cuBLASLt on host memory, in NumPy: what its documentation says each call means, for machines without a GPU.

It has the interface of ``brim_cuda.cublaslt.CublasLt`` and reads the same descriptors: column-major matrices, leading
dimensions, batch strides, transposes, epilogues, the rounding of the compute type. It is strict where the library only
asks: wrong sizes, overlapping results, unaligned addresses and memory outside of ``memory`` raise.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided

from brim.spec import DTYPES
from brim_cuda.cublaslt import (
    Algorithm,
    Attribute,
    ComputeType,
    CublasLtError,
    DataType,
    Epilogue,
    LayoutAttribute,
    MatmulAttribute,
    Operation,
    Order,
    PreferenceAttribute,
    Status,
)

__all__ = ["HostCublasLt", "to_tf32"]

Array = np.ndarray[Any, Any]
Attributes = dict[Attribute, int]

_DTYPES = {
    DataType.FLOAT32: DTYPES["float32"],
    DataType.FLOAT64: DTYPES["float64"],
    DataType.FLOAT16: DTYPES["float16"],
    DataType.BFLOAT16: DTYPES["bfloat16"],
    DataType.COMPLEX64: DTYPES["complex64"],
    DataType.COMPLEX128: DTYPES["complex128"],
}
_HALVES = (DataType.FLOAT16, DataType.BFLOAT16)
_COMPUTED_IN = {
    DataType.FLOAT32: (ComputeType.FLOAT32, ComputeType.TF32),
    DataType.FLOAT64: (ComputeType.FLOAT64,),
    DataType.FLOAT16: (ComputeType.FLOAT32,),
    DataType.BFLOAT16: (ComputeType.FLOAT32,),
    DataType.COMPLEX64: (ComputeType.FLOAT32, ComputeType.TF32),
    DataType.COMPLEX128: (ComputeType.FLOAT64,),
}
_RELU, _BIAS, _GELU, _AUX, _GRADIENT = 2, 4, 32, 128, 16
_ALIGNMENTS = tuple(PreferenceAttribute[f"MIN_ALIGNMENT_{operand}_BYTES"] for operand in "ABCD")


def to_tf32(values: Array) -> Array:
    """float32 rounded to 10 bits after the point, ties away from zero (PTX ``cvt.rna.tf32.f32``)."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
    return np.where(np.isfinite(values), rounded.view(np.float32), values)


class HostCublasLt:
    """The library's twin.

    Attributes:
        memory: (address, nbytes) of what may be read and written; None allows everything.
        workspace_used_bytes: what its algorithms say they need, at most what is offered.
        calls: number of products computed.
        live: number of descriptors and handles not yet freed.
        recording: None, or the list to which products are added instead of being computed.
    """

    def __init__(self) -> None:
        self.memory: list[tuple[int, int]] | None = None
        self.workspace_used_bytes = 0
        self.calls = 0
        self.recording: list[Callable[[], None]] | None = None
        self._objects: dict[int, tuple[str, Attributes]] = {}
        self._next = 1

    @property
    def live(self) -> int:
        return len(self._objects)

    def _new(self, kind: str, attributes: Attributes) -> int:
        self._objects[self._next] = kind, attributes
        self._next += 1
        return self._next - 1

    def _get(self, function: str, kind: str, number: int) -> Attributes:
        found, attributes = self._objects.get(number, ("", {}))
        if found != kind:
            raise CublasLtError(function, Status.INVALID_VALUE, f"{number} is {found or 'freed'}, not a {kind}")
        return attributes

    def _free(self, kind: str, number: int) -> None:
        self._get(f"free {kind}", kind, number)
        del self._objects[number]

    def create(self) -> int:
        return self._new("handle", {})

    def destroy(self, handle: int) -> None:
        self._free("handle", handle)

    def new_matmul(self, compute: int, scale: int) -> int:
        return self._new("matmul", {MatmulAttribute.COMPUTE_TYPE: compute, MatmulAttribute.SCALE_TYPE: scale})

    def free_matmul(self, descriptor: int) -> None:
        self._free("matmul", descriptor)

    def new_layout(self, dtype: int, rows: int, columns: int, ld: int) -> int:
        put = LayoutAttribute
        return self._new("layout", {put.TYPE: dtype, put.ROWS: rows, put.COLUMNS: columns, put.LD: ld})

    def free_layout(self, descriptor: int) -> None:
        self._free("layout", descriptor)

    def new_preference(self) -> int:
        return self._new("preference", {})

    def free_preference(self, descriptor: int) -> None:
        self._free("preference", descriptor)

    def set(self, descriptor: int, attribute: Attribute, value: int) -> None:
        kind = type(attribute).__name__.removesuffix("Attribute").lower()
        self._get("set", kind, descriptor)[attribute] = int(value)

    def heuristic(
        self, handle: int, matmul: int, a: int, b: int, c: int, d: int, preference: int, count: int
    ) -> list[Algorithm]:
        self._get("heuristic", "handle", handle)
        wants = self._get("heuristic", "preference", preference)
        self._problem(matmul, (a, b, c, d))
        offered = wants.get(PreferenceAttribute.MAX_WORKSPACE_BYTES, 0)
        alignments = tuple(wants.get(attribute, 256) for attribute in _ALIGNMENTS)
        if any(n & (n - 1) or n < 1 for n in alignments):
            raise CublasLtError("heuristic", Status.INVALID_VALUE, f"alignments {alignments} are no powers of two")
        used = min(offered, self.workspace_used_bytes)
        return [Algorithm((alignments, used), used)]

    def matmul(
        self, handle: int, matmul: int, alpha: Any, a: int, a_layout: int, b: int, b_layout: int, beta: Any,
        c: int, c_layout: int, d: int, d_layout: int, algorithm: Any, workspace: int, workspace_bytes: int, stream: int,
    ) -> None:  # fmt: skip
        self._get("matmul", "handle", handle)
        problem = self._problem(matmul, (a_layout, b_layout, c_layout, d_layout))
        alignments, used = algorithm
        for operand, address, alignment in zip("ABCD", (a, b, c, d), alignments):
            if address % alignment:
                _refuse(f"{operand} at {address} is not aligned to {alignment} bytes, as was promised")
        if used > workspace_bytes or (used and not workspace):
            _refuse(f"the algorithm needs {used} bytes of workspace, got {workspace_bytes} at {workspace}")
        run = partial(self._compute, problem, (a, b, c, d), _number(alpha), _number(beta), workspace, used)
        if self.recording is None:
            run()
        else:
            self.recording.append(run)

    def _compute(
        self, problem: _Problem, at: tuple[int, int, int, int], alpha: complex, beta: complex, workspace: int, used: int
    ) -> None:
        if used:
            self._bytes(workspace, used).fill(0xCD)  # nobody may rely on what is there
        a, b, c, d = at
        problem.run(self._bytes, a, b, c, d, alpha, beta)
        self.calls += 1

    def _problem(self, matmul: int, layouts: Sequence[int]) -> _Problem:
        return _Problem(
            self._get("matmul", "matmul", matmul), [self._get("matmul", "layout", layout) for layout in layouts]
        )

    def _bytes(self, address: int, nbytes: int) -> Array:
        """Host memory as an array of bytes."""
        if address == 0:
            _refuse("a null pointer is read or written")
        if self.memory is not None and not any(
            start <= address and address + nbytes <= start + size for start, size in self.memory
        ):
            _refuse(f"{nbytes} bytes at {address} are outside of the given memory")
        return np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(address))


def _refuse(reason: str) -> None:
    raise CublasLtError("cublasLtMatmul", Status.INVALID_VALUE, reason)


def _number(cell: Any) -> complex | float:
    """A ctypes cell, or two of them for a complex number."""
    return complex(cell[0], cell[1]) if isinstance(cell, ctypes.Array) else float(cell.value)


class _Layout:
    def __init__(self, attributes: Attributes) -> None:
        put = LayoutAttribute
        self.kind = DataType(attributes[put.TYPE])
        self.dtype = _DTYPES[self.kind]
        self.rows, self.columns, self.ld = attributes[put.ROWS], attributes[put.COLUMNS], attributes[put.LD]
        self.batch, self.stride = attributes.get(put.BATCH_COUNT, 1), attributes.get(put.BATCH_STRIDE, 0)
        if attributes.get(put.ORDER, Order.COLUMN) != Order.COLUMN:
            _refuse("this twin knows column-major matrices only")
        if min(self.rows, self.columns, self.batch) < 1 or self.ld < self.rows or self.stride < 0:
            _refuse(f"no matrix of {self.rows}x{self.columns}, ld {self.ld}, batch {self.batch} by {self.stride}")

    def view(self, memory: Callable[[int, int], Array], address: int) -> Array:
        """(batch, rows, columns) over memory."""
        item = self.dtype.itemsize
        elements = (self.batch - 1) * self.stride + (self.columns - 1) * self.ld + self.rows
        if address % item:
            _refuse(f"address {address} is not aligned to elements of {item} bytes")
        flat = memory(address, elements * item).view(self.dtype)
        return as_strided(flat, (self.batch, self.rows, self.columns), (self.stride * item, item, self.ld * item))


class _Problem:
    """One product: descriptors read and checked."""

    def __init__(self, matmul: Attributes, layouts: Sequence[Attributes]) -> None:
        put = MatmulAttribute
        self.a, self.b, self.c, self.d = a, b, c, d = [_Layout(attributes) for attributes in layouts]
        self.transposed = [matmul.get(t, Operation.NORMAL) == Operation.TRANSPOSED for t in (put.TRANSA, put.TRANSB)]
        self.compute, scale = ComputeType(matmul[put.COMPUTE_TYPE]), DataType(matmul[put.SCALE_TYPE])
        self.epilogue = int(Epilogue(matmul.get(put.EPILOGUE, Epilogue.DEFAULT)))
        self.bias, self.aux = matmul.get(put.BIAS_POINTER, 0), matmul.get(put.AUX_POINTER, 0)
        self.bias_stride = matmul.get(put.BIAS_BATCH_STRIDE, 0)
        self.aux_ld, self.aux_stride = matmul.get(put.AUX_LD, 0), matmul.get(put.AUX_BATCH_STRIDE, 0)
        m, k = (a.columns, a.rows) if self.transposed[0] else (a.rows, a.columns)
        inner, n = (b.columns, b.rows) if self.transposed[1] else (b.rows, b.columns)
        if inner != k or {(c.rows, c.columns), (d.rows, d.columns)} != {(m, n)}:
            _refuse(f"op(A) {m}x{k}, op(B) {inner}x{n}, C {c.rows}x{c.columns}, D {d.rows}x{d.columns}")
        if {a.batch, b.batch, c.batch} != {d.batch}:
            _refuse(f"batches of {a.batch}, {b.batch}, {c.batch} and {d.batch} matrices")
        apart, woven = d.stride >= (n - 1) * d.ld + m, d.stride >= m and (d.batch - 1) * d.stride + m <= d.ld
        if d.batch > 1 and not (apart or woven):
            _refuse("the matrices of the result overlap")
        self._check_types(scale)
        if self.epilogue != Epilogue.DEFAULT:
            self._check_epilogue(m)

    def _check_types(self, scale: DataType) -> None:
        a, d = self.a.kind, self.d.kind
        if self.b.kind != a or self.c.kind != d or not (a == d or (a in _HALVES and d == DataType.FLOAT32)):
            _refuse(f"no product of {a.name} and {self.b.kind.name} into {d.name}, adding {self.c.kind.name}")
        expected = DataType.FLOAT32 if a in _HALVES else a
        if self.compute not in _COMPUTED_IN[a] or scale != expected:
            _refuse(f"{a.name} is not computed in {self.compute.name} with numbers of {scale.name}")

    def _check_epilogue(self, m: int) -> None:
        wants = self.epilogue
        if self.a.kind in (DataType.COMPLEX64, DataType.COMPLEX128):
            _refuse("complex numbers have no epilogue")
        if wants & (_BIAS | _GRADIENT | Epilogue.BGRADA | Epilogue.BGRADB):
            if not self.bias:
                _refuse("the epilogue needs a bias pointer")
            if not wants & _BIAS and self.d.batch > 1:
                _refuse("gradients of a bias are not batched")
        if wants & _AUX:
            multiple = 8 if wants & _GELU or self._is(Epilogue.DGELU) else 128
            if not self.aux or self.aux_ld % multiple or self.aux_ld < m or self.aux_stride % multiple:
                _refuse(f"aux at {self.aux}, ld {self.aux_ld}, stride {self.aux_stride}: not multiples of {multiple}")
            if self.d.batch > 1 and not self.aux_stride:
                _refuse("aux of a batch needs a stride")

    def _is(self, epilogue: Epilogue) -> bool:
        """Whether the epilogue is this one, with or without a bias gradient."""
        return self.epilogue & ~_GRADIENT == epilogue

    def run(
        self, memory: Callable[[int, int], Array], a: int, b: int, c: int, d: int, alpha: Any, beta: Any
    ) -> None:  # fmt: skip
        wide = np.dtype(np.float32) if self.a.kind in _HALVES else self.a.dtype
        x, y = self._read(memory, self.a, a, 0, wide), self._read(memory, self.b, b, 1, wide)
        number = wide.type
        with np.errstate(all="ignore"):
            result = np.matmul(x, y) * number(alpha)
            if beta:
                result += self.c.view(memory, c).astype(wide) * number(beta)
            if self.epilogue != Epilogue.DEFAULT:
                result = self._finish(memory, result, x, y)
            self.d.view(memory, d)[...] = result.astype(self.d.dtype)

    def _read(self, memory: Any, layout: _Layout, address: int, side: int, wide: np.dtype[Any]) -> Array:
        values = layout.view(memory, address).astype(wide)
        if self.compute == ComputeType.TF32 and wide == np.float32:
            values = to_tf32(values)
        return values.swapaxes(1, 2) if self.transposed[side] else values

    def _finish(self, memory: Any, result: Array, x: Array, y: Array) -> Array:
        wants = self.epilogue
        item = self.d.dtype.itemsize
        if wants in (Epilogue.BGRADA, Epilogue.BGRADB):
            sums = x[0].sum(1) if wants == Epilogue.BGRADA else y[0].sum(0)
            memory(self.bias, sums.size * item).view(self.d.dtype)[...] = sums.astype(self.d.dtype)
            return result
        if wants & _BIAS:
            rows = self.d.rows
            flat = memory(self.bias, ((self.d.batch - 1) * self.bias_stride + rows) * item).view(self.d.dtype)
            bias = as_strided(flat, (self.d.batch, rows, 1), (self.bias_stride * item, item, 0))
            result = result + bias.astype(result.dtype)
        if self._is(Epilogue.DRELU):
            result = np.where(self._mask(memory), result, 0).astype(result.dtype)
        elif self._is(Epilogue.DGELU):
            result = result * _gelu_slope(self._numbers(memory).astype(result.dtype))
        elif wants & _AUX and wants & _RELU:
            self._mask(memory, result > 0)
        elif wants & _AUX:
            self._numbers(memory)[...] = result.astype(self.d.dtype)
        if wants & _GRADIENT and wants & _AUX:
            sums = result[0].sum(1)
            memory(self.bias, sums.size * item).view(self.d.dtype)[...] = sums.astype(self.d.dtype)
        if wants & _RELU:
            return np.maximum(result, 0)
        return _gelu(result) if wants & _GELU else result

    def _numbers(self, memory: Any) -> Array:
        like = _Layout({
            LayoutAttribute.TYPE: self.d.kind, LayoutAttribute.ROWS: self.d.rows,
            LayoutAttribute.COLUMNS: self.d.columns, LayoutAttribute.LD: self.aux_ld,
            LayoutAttribute.BATCH_COUNT: self.d.batch, LayoutAttribute.BATCH_STRIDE: self.aux_stride,
        })  # fmt: skip
        return like.view(memory, self.aux)

    def _mask(self, memory: Any, positive: Array | None = None) -> Array:
        """Bits (batch, rows, columns), read or written. Their order in a byte is the library's own affair."""
        batch, rows, columns, ld = self.d.batch, self.d.rows, self.d.columns, self.aux_ld
        bits = ((batch - 1) * self.aux_stride + columns * ld) // 8
        flat = memory(self.aux, bits)
        words = as_strided(flat, (batch, columns, ld // 8), (self.aux_stride // 8, ld // 8, 1))
        if positive is not None:
            padded = np.zeros((batch, columns, ld), bool)
            padded[:, :, :rows] = positive.swapaxes(1, 2)
            words[...] = np.packbits(padded, axis=-1, bitorder="little")
        found = np.unpackbits(np.ascontiguousarray(words), axis=-1, bitorder="little")
        return found[:, :, :rows].swapaxes(1, 2).astype(bool)


_SLOPE = math.sqrt(2 / math.pi)


def _gelu(x: Array) -> Array:
    """The tanh form: x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))."""
    near = np.clip(x, -10, 10)
    return (0.5 * x * (1 + np.tanh(_SLOPE * (near + 0.044715 * near**3)))).astype(x.dtype)


def _gelu_slope(x: Array) -> Array:
    near = np.clip(x, -10, 10)
    t = np.tanh(_SLOPE * (near + 0.044715 * near**3))
    return (0.5 * (1 + t) + 0.5 * near * (1 - t * t) * _SLOPE * (1 + 3 * 0.044715 * near**2)).astype(x.dtype)
