"""libcublasLt through ctypes: typed prototypes, the numbers of its header by name, every status checked.

Why an own binding: CuPy wraps cuBLAS only, and refuses it in stream capture; nvmath-python would do, but brings 75 MB
and three packages for the fifteen functions that are needed here. Each call takes its stream, so it can be captured.

Importing this module loads nothing. ``load()`` finds the library by cuda-pathfinder (a dependency of CuPy), else in the
NVIDIA wheels, else where the system's loader looks. Numbers are those of cublasLt.h and library_types.h of CUDA 12 and
13 (https://docs.nvidia.com/cuda/cublas/#using-the-cublaslt-api).
"""

from __future__ import annotations

import ctypes
import ctypes.util
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from ctypes import POINTER, Structure, byref, c_char_p, c_float, c_int, c_int32, c_int64, c_size_t, c_uint32, c_uint64
from ctypes import c_void_p as Pointer
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any, Protocol

from brim.errors import DeviceError

__all__ = [
    "Algorithm",
    "ComputeType",
    "CublasLt",
    "CublasLtError",
    "CublasLtMissing",
    "DataType",
    "Epilogue",
    "Interface",
    "LayoutAttribute",
    "MatmulAttribute",
    "Operation",
    "Order",
    "PreferenceAttribute",
    "ReductionScheme",
    "Status",
    "find",
    "load",
]


class Status(IntEnum):
    """cublasStatus_t."""

    SUCCESS = 0
    NOT_INITIALIZED = 1
    ALLOC_FAILED = 3
    INVALID_VALUE = 7
    ARCH_MISMATCH = 8
    MAPPING_ERROR = 11
    EXECUTION_FAILED = 13
    INTERNAL_ERROR = 14
    NOT_SUPPORTED = 15
    LICENSE_ERROR = 16


class DataType(IntEnum):
    """cudaDataType_t."""

    FLOAT32 = 0
    FLOAT64 = 1
    FLOAT16 = 2
    COMPLEX64 = 4
    COMPLEX128 = 5
    BFLOAT16 = 14


class ComputeType(IntEnum):
    """cublasComputeType_t: what products are added up in. TF32 reads float32 with 10 bits after the point."""

    FLOAT32 = 68
    FLOAT64 = 70
    TF32 = 77


class Operation(IntEnum):
    """cublasOperation_t: how an operand is read."""

    NORMAL = 0
    TRANSPOSED = 1


class Order(IntEnum):
    """cublasLtOrder_t."""

    COLUMN = 0
    ROW = 1


class Epilogue(IntEnum):
    """cublasLtEpilogue_t: what is done to D before it is stored. Rows are rows of the column-major D.

    BIAS adds a vector over the rows. AUX stores what went into the activation (a gradient, D..., reads it): numbers for
    GELU, a bit "was positive" for RELU. BGRAD sums the gradient over columns into a vector; BGRADA, BGRADB an operand.
    """

    DEFAULT = 1
    RELU = 2
    BIAS = 4
    RELU_BIAS = 6
    GELU = 32
    GELU_BIAS = 36
    RELU_AUX = 130
    RELU_AUX_BIAS = 134
    DRELU = 136
    DRELU_BGRAD = 152
    GELU_AUX = 160
    GELU_AUX_BIAS = 164
    DGELU = 192
    DGELU_BGRAD = 208
    BGRADA = 256
    BGRADB = 512


class ReductionScheme(IntEnum):
    """cublasLtReductionScheme_t: how parts of a split sum over K are added; none of them is the order of threads."""

    NONE = 0
    IN_PLACE = 1
    COMPUTE_TYPE = 2
    OUTPUT_TYPE = 4


class MatmulAttribute(IntEnum):
    """cublasLtMatmulDescAttributes_t."""

    COMPUTE_TYPE = 0
    SCALE_TYPE = 1
    POINTER_MODE = 2
    TRANSA = 3
    TRANSB = 4
    EPILOGUE = 7
    BIAS_POINTER = 8
    BIAS_BATCH_STRIDE = 10
    AUX_POINTER = 11
    AUX_LD = 12
    AUX_BATCH_STRIDE = 13
    AUX_DATA_TYPE = 22
    BIAS_DATA_TYPE = 26


class LayoutAttribute(IntEnum):
    """cublasLtMatrixLayoutAttribute_t."""

    TYPE = 0
    ORDER = 1
    ROWS = 2
    COLUMNS = 3
    LD = 4
    BATCH_COUNT = 5
    BATCH_STRIDE = 6


class PreferenceAttribute(IntEnum):
    """cublasLtMatmulPreferenceAttributes_t."""

    MAX_WORKSPACE_BYTES = 1
    REDUCTION_SCHEME_MASK = 3
    MIN_ALIGNMENT_A_BYTES = 5
    MIN_ALIGNMENT_B_BYTES = 6
    MIN_ALIGNMENT_C_BYTES = 7
    MIN_ALIGNMENT_D_BYTES = 8


Attribute = MatmulAttribute | LayoutAttribute | PreferenceAttribute

# The C type of each attribute: the library refuses another size.
_TYPES: dict[tuple[type, int], Any] = {
    (MatmulAttribute, MatmulAttribute.COMPUTE_TYPE): c_int32,
    (MatmulAttribute, MatmulAttribute.SCALE_TYPE): c_int32,
    (MatmulAttribute, MatmulAttribute.POINTER_MODE): c_int32,
    (MatmulAttribute, MatmulAttribute.TRANSA): c_int32,
    (MatmulAttribute, MatmulAttribute.TRANSB): c_int32,
    (MatmulAttribute, MatmulAttribute.EPILOGUE): c_uint32,
    (MatmulAttribute, MatmulAttribute.BIAS_POINTER): c_uint64,
    (MatmulAttribute, MatmulAttribute.BIAS_BATCH_STRIDE): c_int64,
    (MatmulAttribute, MatmulAttribute.AUX_POINTER): c_uint64,
    (MatmulAttribute, MatmulAttribute.AUX_LD): c_int64,
    (MatmulAttribute, MatmulAttribute.AUX_BATCH_STRIDE): c_int64,
    (MatmulAttribute, MatmulAttribute.AUX_DATA_TYPE): c_int32,
    (MatmulAttribute, MatmulAttribute.BIAS_DATA_TYPE): c_int32,
    (LayoutAttribute, LayoutAttribute.TYPE): c_uint32,
    (LayoutAttribute, LayoutAttribute.ORDER): c_int32,
    (LayoutAttribute, LayoutAttribute.ROWS): c_uint64,
    (LayoutAttribute, LayoutAttribute.COLUMNS): c_uint64,
    (LayoutAttribute, LayoutAttribute.LD): c_int64,
    (LayoutAttribute, LayoutAttribute.BATCH_COUNT): c_int32,
    (LayoutAttribute, LayoutAttribute.BATCH_STRIDE): c_int64,
    (PreferenceAttribute, PreferenceAttribute.MAX_WORKSPACE_BYTES): c_uint64,
    (PreferenceAttribute, PreferenceAttribute.REDUCTION_SCHEME_MASK): c_uint32,
    (PreferenceAttribute, PreferenceAttribute.MIN_ALIGNMENT_A_BYTES): c_uint32,
    (PreferenceAttribute, PreferenceAttribute.MIN_ALIGNMENT_B_BYTES): c_uint32,
    (PreferenceAttribute, PreferenceAttribute.MIN_ALIGNMENT_C_BYTES): c_uint32,
    (PreferenceAttribute, PreferenceAttribute.MIN_ALIGNMENT_D_BYTES): c_uint32,
}


class CublasLtError(DeviceError):
    """A call that cuBLASLt refused.

    Attributes:
        function: the call.
        status: its status, a number of ``Status`` where that is known.
        context: what was being done.
    """

    def __init__(self, function: str, status: int, context: str = "") -> None:
        name = Status(status).name if status in Status._value2member_map_ else "unknown"
        self.function, self.status, self.context = function, status, context
        hint = _HINTS.get(status, "")
        super().__init__(f"{context}{': ' if context else ''}{function} failed with {name} ({status}){hint}")

    def about(self, context: str) -> CublasLtError:
        """The same error that also says what was computed."""
        return CublasLtError(self.function, self.status, f"{context}: {self.context}" if self.context else context)


_HINTS: dict[int, str] = {
    Status.NOT_INITIALIZED: "; there is no usable CUDA device or context: run nvidia-smi and check the driver",
    Status.ALLOC_FAILED: "; host memory ran out",
    Status.INVALID_VALUE: "; the library does not know a type, layout or epilogue: it may be older than CUDA 12",
    Status.ARCH_MISMATCH: "; this device is too old for the type",
    Status.NOT_SUPPORTED: "; no algorithm of the library fits the types, layouts, alignment and workspace",
    Status.EXECUTION_FAILED: "; an earlier kernel may have failed: synchronize after each step to find it",
}


class CublasLtMissing(DeviceError):
    """No libcublasLt was found."""


class _AlgorithmData(Structure):
    """cublasLtMatmulAlgo_t: opaque."""

    _fields_ = (("data", c_uint64 * 8),)


class _HeuristicResult(Structure):
    """cublasLtMatmulHeuristicResult_t."""

    _fields_ = (
        ("algorithm", _AlgorithmData),
        ("workspace_bytes", c_size_t),
        ("state", c_int),
        ("waves", c_float),
        ("reserved", c_int * 4),
    )


@dataclass(frozen=True, slots=True)
class Algorithm:
    """A way to compute one product.

    Attributes:
        data: what the library's ``matmul`` takes; opaque.
        workspace_bytes: memory it needs, at most what was offered.
    """

    data: Any
    workspace_bytes: int


class Interface(Protocol):
    """What ``brim_cuda.gemm_run`` calls: the library, or its NumPy twin. Handles and descriptors are integers."""

    def create(self) -> int: ...
    def destroy(self, handle: int) -> None: ...
    def new_matmul(self, compute: int, scale: int) -> int: ...
    def free_matmul(self, descriptor: int) -> None: ...
    def new_layout(self, dtype: int, rows: int, columns: int, ld: int) -> int: ...
    def free_layout(self, descriptor: int) -> None: ...
    def new_preference(self) -> int: ...
    def free_preference(self, descriptor: int) -> None: ...
    def set(self, descriptor: int, attribute: Attribute, value: int) -> None: ...
    def heuristic(
        self, handle: int, matmul: int, a: int, b: int, c: int, d: int, preference: int, count: int
    ) -> list[Algorithm]: ...
    def matmul(
        self, handle: int, matmul: int, alpha: Any, a: int, a_layout: int, b: int, b_layout: int, beta: Any,
        c: int, c_layout: int, d: int, d_layout: int, algorithm: Any, workspace: int, workspace_bytes: int, stream: int,
    ) -> None: ...  # fmt: skip


_PROTOTYPES: dict[str, tuple[Any, ...]] = {
    "cublasLtCreate": (POINTER(Pointer),),
    "cublasLtDestroy": (Pointer,),
    "cublasLtMatmulDescCreate": (POINTER(Pointer), c_int, c_int),
    "cublasLtMatmulDescDestroy": (Pointer,),
    "cublasLtMatmulDescSetAttribute": (Pointer, c_int, Pointer, c_size_t),
    "cublasLtMatmulDescGetAttribute": (Pointer, c_int, Pointer, c_size_t, POINTER(c_size_t)),
    "cublasLtMatrixLayoutCreate": (POINTER(Pointer), c_int, c_uint64, c_uint64, c_int64),
    "cublasLtMatrixLayoutDestroy": (Pointer,),
    "cublasLtMatrixLayoutSetAttribute": (Pointer, c_int, Pointer, c_size_t),
    "cublasLtMatrixLayoutGetAttribute": (Pointer, c_int, Pointer, c_size_t, POINTER(c_size_t)),
    "cublasLtMatmulPreferenceCreate": (POINTER(Pointer),),
    "cublasLtMatmulPreferenceDestroy": (Pointer,),
    "cublasLtMatmulPreferenceSetAttribute": (Pointer, c_int, Pointer, c_size_t),
    "cublasLtMatmulPreferenceGetAttribute": (Pointer, c_int, Pointer, c_size_t, POINTER(c_size_t)),
    "cublasLtMatmulAlgoGetHeuristic": (*(Pointer,) * 7, c_int, POINTER(_HeuristicResult), POINTER(c_int)),
    "cublasLtMatmul": (
        Pointer, Pointer,  # handle, operation
        Pointer, Pointer, Pointer, Pointer, Pointer,  # alpha, A, B
        Pointer, Pointer, Pointer, Pointer, Pointer,  # beta, C, D
        Pointer, Pointer, c_size_t, Pointer,  # algorithm, workspace, stream
    ),
}  # fmt: skip

_FAMILY = {
    MatmulAttribute: "cublasLtMatmulDesc",
    LayoutAttribute: "cublasLtMatrixLayout",
    PreferenceAttribute: "cublasLtMatmulPreference",
}


class CublasLt:
    """A loaded libcublasLt.

    Arguments:
        path: the shared library.

    Raises:
        CublasLtMissing: it cannot be loaded, or lacks a function.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            library = ctypes.CDLL(path)
            library.cublasLtGetVersion.restype = c_size_t
            library.cublasLtGetVersion.argtypes = ()
            library.cublasLtGetStatusName.restype = c_char_p
            library.cublasLtGetStatusName.argtypes = (c_int,)
            for name, arguments in _PROTOTYPES.items():
                function = getattr(library, name)
                function.argtypes, function.restype = arguments, c_int
        except (OSError, AttributeError) as error:
            raise CublasLtMissing(f"{path} is no usable libcublasLt: {error}") from error
        self._library = library
        self._matmul = library.cublasLtMatmul

    def version(self) -> int:
        """10000 major + 100 minor + patch."""
        return int(self._library.cublasLtGetVersion())

    def status_name(self, status: int) -> str:
        """What the library itself calls a status."""
        return bytes(self._library.cublasLtGetStatusName(status)).decode()

    def _call(self, name: str, *args: Any) -> None:
        status = getattr(self._library, name)(*args)
        if status:
            raise CublasLtError(name, status)

    def _new(self, name: str, *args: Any) -> int:
        made = Pointer()
        self._call(name, byref(made), *args)
        return int(made.value or 0)

    def create(self) -> int:
        """A handle for the current device. Raises CublasLtError where there is none."""
        return self._new("cublasLtCreate")

    def destroy(self, handle: int) -> None:
        self._call("cublasLtDestroy", handle)

    def new_matmul(self, compute: int, scale: int) -> int:
        """A descriptor of a product that is added up in ``compute``, with alpha and beta of type ``scale``."""
        return self._new("cublasLtMatmulDescCreate", compute, scale)

    def free_matmul(self, descriptor: int) -> None:
        self._call("cublasLtMatmulDescDestroy", descriptor)

    def new_layout(self, dtype: int, rows: int, columns: int, ld: int) -> int:
        """A column-major matrix of ``rows`` x ``columns``, ``ld`` elements from one column to the next."""
        return self._new("cublasLtMatrixLayoutCreate", dtype, rows, columns, ld)

    def free_layout(self, descriptor: int) -> None:
        self._call("cublasLtMatrixLayoutDestroy", descriptor)

    def new_preference(self) -> int:
        return self._new("cublasLtMatmulPreferenceCreate")

    def free_preference(self, descriptor: int) -> None:
        self._call("cublasLtMatmulPreferenceDestroy", descriptor)

    def set(self, descriptor: int, attribute: Attribute, value: int) -> None:
        """Set an attribute of a descriptor, whose kind is that of the attribute."""
        cell = _TYPES[type(attribute), attribute](value)
        name = _FAMILY[type(attribute)] + "SetAttribute"
        self._call(name, descriptor, attribute, byref(cell), ctypes.sizeof(cell))

    def get(self, descriptor: int, attribute: Attribute) -> int:
        """The value of an attribute of a descriptor."""
        cell, written = _TYPES[type(attribute), attribute](), c_size_t()
        name = _FAMILY[type(attribute)] + "GetAttribute"
        self._call(name, descriptor, attribute, byref(cell), ctypes.sizeof(cell), byref(written))
        assert written.value == ctypes.sizeof(cell), f"{attribute!r} has {written.value} bytes"
        return int(cell.value)

    def heuristic(
        self, handle: int, matmul: int, a: int, b: int, c: int, d: int, preference: int, count: int
    ) -> list[Algorithm]:
        """Up to ``count`` algorithms, the one that should be fastest first; none when nothing fits."""
        results, found = (_HeuristicResult * count)(), c_int()
        try:
            self._call(
                "cublasLtMatmulAlgoGetHeuristic", handle, matmul, a, b, c, d, preference, count, results, byref(found)
            )
        except CublasLtError as error:
            if error.status != Status.NOT_SUPPORTED:
                raise
            return []
        good = [result for result in results[: found.value] if result.state == Status.SUCCESS]
        return [Algorithm(_AlgorithmData.from_buffer_copy(r.algorithm), r.workspace_bytes) for r in good]

    def matmul(
        self, handle: int, matmul: int, alpha: Any, a: int, a_layout: int, b: int, b_layout: int, beta: Any,
        c: int, c_layout: int, d: int, d_layout: int, algorithm: Any, workspace: int, workspace_bytes: int, stream: int,
    ) -> None:  # fmt: skip
        """D = epilogue(alpha op(A) op(B) + beta C), launched on ``stream``; alpha and beta are ctypes cells."""
        status = self._matmul(
            handle, matmul, byref(alpha), a, a_layout, b, b_layout, byref(beta), c, c_layout, d, d_layout,
            byref(algorithm), workspace, workspace_bytes, stream,
        )  # fmt: skip
        if status:
            raise CublasLtError("cublasLtMatmul", status)


def _pathfinder() -> Iterator[str]:
    try:
        pathfinder = importlib.import_module("cuda.pathfinder")
    except ImportError:
        return
    try:
        loaded = pathfinder.load_nvidia_dynamic_lib("cublasLt")
    except Exception:  # its own error class has changed place between versions; the search goes on below
        return
    if loaded.abs_path:
        yield str(loaded.abs_path)


def _wheels() -> Iterator[str]:
    found = importlib.util.find_spec("nvidia")
    pattern = "cublasLt64_*.dll" if sys.platform == "win32" else "libcublasLt.so.*"
    for root in found.submodule_search_locations or () if found else ():
        for folder in ("cu13/lib", "cublas/lib", "cu13/bin/x86_64", "cublas/bin"):
            yield from sorted(map(str, Path(root, folder).glob(pattern)))


def _system() -> Iterator[str]:
    name = ctypes.util.find_library("cublasLt")
    if name:
        yield name


def find() -> str:
    """Where libcublasLt is. Raises CublasLtMissing saying what to install."""
    for search in (_pathfinder, _wheels, _system):
        for path in search():
            return path
    raise CublasLtMissing(
        "matrix products on CUDA need libcublasLt, which was found neither in an NVIDIA wheel nor in a CUDA toolkit; "
        'install "brim[cuda12]" (driver 525 or newer) or "brim[cuda13]" (driver 580 or newer)'
    )


def load() -> CublasLt:
    """The library, loaded. Raises CublasLtMissing."""
    return CublasLt(find())
