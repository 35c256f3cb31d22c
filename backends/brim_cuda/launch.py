"""The typed launch layer: kernels with declared parameters, calls of them, products, and the interface of a loader.

A loader turns kernels into functions: ``brim_cuda.gpu`` on a GPU, ``brim_cuda.emulation`` on the CPU. Both get the same
grids, blocks and packed arguments. Every argument has a declared type, so that no Python float reaches a kernel as a
double and no array of the wrong dtype is read. ``brim_cuda.steps`` runs them.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from brim.backend import ScalarCell
from brim.spec import DTYPES, Spec
from brim_cuda.dnn import Dnn, DnnPlan
from brim_cuda.gemm import GemmPlan
from brim_cuda.gemm_run import GemmRunner

__all__ = [
    "BLOCK",
    "BLOCKS_MAX",
    "C_TYPES",
    "SHARED_BYTES_MAX",
    "THREADS_MAX",
    "Call",
    "DnnCall",
    "Entry",
    "In",
    "Kernel",
    "Loader",
    "Out",
    "Param",
    "Place",
    "Product",
    "Scratch",
    "Table",
    "blocks_for",
    "check_launch",
    "index_dtype",
    "named_kernel",
    "pack",
    "pointer",
    "scalar_of",
]

BLOCK = 256
"""Threads of a block, unless a kernel wants another number."""

SHARED_BYTES_MAX = 48 << 10  # more has to be asked for kernel by kernel, and not every GPU has it
THREADS_MAX = 1024
BLOCKS_MAX = (2**31 - 1, 65535, 65535)
"""What every GPU launches: dynamic shared memory of a block, its threads, blocks along x, y and z."""

C_TYPES: dict[np.dtype[Any], str] = {
    DTYPES["bool"]: "bool",
    **{DTYPES[f"int{bits}"]: f"i{bits}" for bits in (8, 16, 32, 64)},
    **{DTYPES[f"uint{bits}"]: f"u{bits}" for bits in (8, 16, 32, 64)},
    DTYPES["float16"]: "f16",
    DTYPES["bfloat16"]: "bf16",
    DTYPES["float32"]: "float",
    DTYPES["float64"]: "double",
    DTYPES["complex64"]: "c64",
    DTYPES["complex128"]: "c128",
}
"""How brim's dtypes are called in the ``.cuh`` files."""


@dataclass(frozen=True, slots=True)
class Param:
    """One parameter of a kernel.

    Attributes:
        name: its name in the source.
        dtype: dtype of the number, of the elements pointed to, or of a struct (a structured dtype).
        is_pointer: whether it is the address of an array on the device.
        ctype: its type in the source; by default from ``dtype``.
    """

    name: str
    dtype: np.dtype[Any]
    is_pointer: bool = False
    ctype: str = ""

    def __str__(self) -> str:
        ctype = self.ctype or C_TYPES[self.dtype]
        return f"{ctype}* {self.name}" if self.is_pointer else f"{ctype} {self.name}"


def pointer(name: str, dtype: np.dtype[Any], *, const: bool = False) -> Param:
    """A parameter that points to elements of this dtype."""
    return Param(name, dtype, True, ("const " if const else "") + C_TYPES[dtype])


@dataclass(frozen=True, slots=True)
class Kernel:
    """A ``__global__`` function.

    Attributes:
        name: its name, the same as of no other kernel.
        params: its parameters, in order.
        source: its text, without what it includes.
        includes: files of ``brim_cuda/kernels`` that come before it, in order.
    """

    name: str
    params: tuple[Param, ...]
    source: str
    includes: tuple[str, ...]


def named_kernel(prefix: str, params: Sequence[Param], text: str, includes: Sequence[str]) -> Kernel:
    """A kernel from a text in which NAME and PARAMS stand for its name and parameters.

    Its name is made of the text, so that equal kernels are one.
    """
    text = text.replace("PARAMS", ", ".join(map(str, params)))
    name = f"{prefix}_{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    return Kernel(name, tuple(params), text.replace("NAME", name), tuple(includes))


@dataclass(frozen=True, slots=True)
class In:
    """Argument: input ``index`` of the op, an array or a scalar, as the parameter's type.

    ``offset`` counts elements from an array's first one.
    """

    index: int
    offset: int = 0


@dataclass(frozen=True, slots=True)
class Out:
    """Argument: output ``index`` of the op, from its element ``offset`` on."""

    index: int
    offset: int = 0


@dataclass(frozen=True, slots=True)
class Scratch:
    """Argument: the scratch from a byte on."""

    offset_bytes: int


Place = In | Out | Scratch
"""Where an operand of a product starts."""


@dataclass(frozen=True, slots=True)
class Entry:
    """What one number in a struct says of an operand: where it starts, or its value if it is a scalar.

    Attributes:
        field: a field of the struct that is an array.
        position: the number's indices in that array.
        place: the operand.
        dtype: of the elements that an address points to; None for a scalar, which becomes one of the field's dtype.
    """

    field: str
    position: tuple[int, ...]
    place: In | Out
    dtype: np.dtype[Any] | None = None


@dataclass(frozen=True, slots=True)
class Table:
    """Argument: a struct that holds addresses and scalars of many operands.

    Attributes:
        values: one element of the parameter's dtype, with everything else that it holds.
        entries: what is filled in when the operands are known.
    """

    values: np.ndarray[Any, Any]
    entries: tuple[Entry, ...]


def check_launch(name: str, blocks: tuple[int, ...], threads: int, shared_bytes: int) -> None:
    """Raises ValueError for a launch that a GPU would refuse, whether there is one or not."""
    fits = all(0 < number <= limit for number, limit in zip(blocks, BLOCKS_MAX))
    if not fits or not 0 < threads <= THREADS_MAX or shared_bytes > SHARED_BYTES_MAX:
        raise ValueError(
            f"kernel {name} asks for {blocks} blocks of {threads} threads with {shared_bytes} bytes of shared "
            f"memory; GPUs take 1 to {BLOCKS_MAX}, {THREADS_MAX} and {SHARED_BYTES_MAX} at most: fix its binder"
        )


@dataclass(frozen=True, slots=True)
class Call:
    """One launch of a kernel.

    Attributes:
        kernel: which.
        blocks: size of the grid, up to three numbers.
        args: one an argument: ``In``, ``Out``, ``Scratch``, ``Table``, or a number (a NumPy structure for a struct).
        threads: size of a block.
        shared_bytes: dynamic shared memory.
        only_if_apart: an input and an output; nothing is launched where they are the same memory.
    """

    kernel: Kernel
    blocks: tuple[int, ...]
    args: tuple[Any, ...]
    threads: int = BLOCK
    shared_bytes: int = 0
    only_if_apart: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        check_launch(self.kernel.name, self.blocks, self.threads, self.shared_bytes)


@dataclass(frozen=True, slots=True)
class Product:
    """One planned matrix product, computed by cuBLASLt.

    Attributes:
        plan: from ``gemm.plan_matmul`` or one of ``gemm_conv.plan_conv``.
        a, b, out: where the operands start.
        added, bias, aux: where those start that the plan has, else None.
        workspace: where ``plan.workspace_bytes`` of scratch start, None where it has none.
    """

    plan: GemmPlan
    a: Place
    b: Place
    out: Place
    added: Place | None = None
    bias: Place | None = None
    aux: Place | None = None
    workspace: Place | None = None


@dataclass(frozen=True, slots=True)
class DnnCall:
    """One planned request, computed by cuDNN.

    Attributes:
        plan: from ``dnn.Dnn.plan``.
        places: where the request's tensors start, in their order.
        workspace: where ``plan.workspace_bytes`` of scratch start, None where it has none.
    """

    plan: DnnPlan
    places: tuple[Place, ...]
    workspace: Place | None = None


class Loader(Protocol):
    """Turns kernels into functions that run on a device."""

    def functions(self, kernels: Sequence[Kernel]) -> list[Callable[..., None]]:
        """For each kernel ``launch(blocks, threads, shared_bytes, packed)``; compiled together where possible."""

    def address(self, array: Any) -> int:
        """Address of an array's first element on the device."""

    def device(self) -> int:
        """Number of the current device."""

    def gemm(self) -> GemmRunner:
        """What computes matrix products on the current device."""

    def open_dnn(self) -> str:
        """Make cuDNN ready on the current device, if it is wanted and there; one line about it. Raises DeviceError."""

    def close_dnn(self) -> None:
        """Do not use cuDNN on the current device."""

    def dnn(self) -> Dnn | None:
        """cuDNN on the current device; None where it is not used."""

    def stream(self) -> int:
        """The stream that launches go to."""


def pack(param: Param, value: Any) -> Any:
    """A value as the NumPy scalar or structure that is passed for a parameter.

    Raises:
        TypeError: its type is not the declared one (a float for an integer, a number for a pointer...).
        OverflowError: an integer that the declared type does not hold.
    """
    if param.is_pointer:
        raise TypeError(f"parameter {param.name} is a pointer: pass an array, not {type(value).__name__}")
    dtype = param.dtype
    if dtype.fields is not None:
        if not (isinstance(value, np.ndarray) and value.dtype == dtype and value.size == 1):
            raise TypeError(f"parameter {param.name} is a struct: pass one element of its dtype, not {value!r}")
        return value
    if isinstance(value, np.generic):
        if value.dtype != dtype:
            raise TypeError(f"parameter {param.name} is {dtype}, got {value.dtype}")
        return _as_passed(value)
    kinds: dict[str, Any] = {"b": bool, "i": int, "u": int, "c": (bool, int, float, complex)}
    fits = kinds.get(dtype.kind, (bool, int, float))
    if not isinstance(value, fits) or (isinstance(value, bool) and dtype.kind in "iu"):
        raise TypeError(f"parameter {param.name} is {dtype}, got {type(value).__name__} {value!r}")
    return _as_passed(dtype.type(value))


def _as_passed(number: Any) -> Any:
    """The half-width floats travel as their bits: not every launcher knows bfloat16."""
    return number.view(np.uint16) if number.dtype in (DTYPES["float16"], DTYPES["bfloat16"]) else number


def scalar_of(value: Any, param: Param) -> Any:
    """A scalar input of an op as the number that a parameter takes: converted as NumPy converts a Python number."""
    number = value.value if isinstance(value, ScalarCell) else value
    return param.dtype.type(number)


def blocks_for(threads: int, limit: int = 32768) -> int:
    """Blocks of ``BLOCK`` threads; kernels loop where there would be more than ``limit``."""
    return max(1, min(math.ceil(threads / BLOCK), limit))


def index_dtype(arrays: Sequence[Spec]) -> np.dtype[Any]:
    """int32 where that counts every element and reaches every address (in elements) with room to step, else int64."""
    reach = 0
    for spec in arrays:
        span = sum(abs(step) * (dim - 1) for dim, step in zip(spec.shape, spec.strides, strict=True) if dim > 0)
        reach = max(reach, spec.size, span)
    return DTYPES["int32" if reach < 2**30 else "int64"]
