"""The ctypes binding of cuBLASLt: against the real library where it is installed (no GPU needed), else by itself."""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import shutil
import subprocess
from collections.abc import Iterator
from enum import IntEnum
from pathlib import Path
from typing import Any

import pytest

from brim.errors import DeviceError
from brim.spec import DTYPES, Spec
from brim_cuda import cublaslt
from brim_cuda.cublaslt import (
    ComputeType,
    CublasLt,
    CublasLtError,
    CublasLtMissing,
    DataType,
    Epilogue,
    LayoutAttribute,
    MatmulAttribute,
    Operation,
    Order,
    PreferenceAttribute,
    ReductionScheme,
    Status,
)
from brim_cuda.gemm import plan_matmul
from brim_cuda.gemm_run import _Built


@pytest.fixture(scope="module")
def library() -> CublasLt:
    try:
        return cublaslt.load()
    except CublasLtMissing:
        pytest.skip("libcublasLt is not installed (pip install nvidia-cublas-cu12)")


@pytest.fixture
def matmul(library: CublasLt) -> Iterator[int]:
    made = library.new_matmul(ComputeType.FLOAT32, DataType.FLOAT32)
    yield made
    library.free_matmul(made)


def test_the_library_is_one_we_know(library: CublasLt) -> None:
    assert 120000 <= library.version() < 140000


def test_the_library_knows_our_statuses(library: CublasLt) -> None:
    for status in Status:
        assert library.status_name(status) == f"CUBLAS_STATUS_{status.name}"


def test_every_attribute_of_a_product_can_be_set_and_read(library: CublasLt, matmul: int) -> None:
    values = {
        MatmulAttribute.COMPUTE_TYPE: ComputeType.TF32,
        MatmulAttribute.SCALE_TYPE: DataType.FLOAT32,
        MatmulAttribute.POINTER_MODE: 0,
        MatmulAttribute.TRANSA: Operation.TRANSPOSED,
        MatmulAttribute.TRANSB: Operation.TRANSPOSED,
        MatmulAttribute.EPILOGUE: Epilogue.GELU_AUX_BIAS,
        MatmulAttribute.BIAS_POINTER: 1 << 40,
        MatmulAttribute.BIAS_BATCH_STRIDE: 1 << 33,
        MatmulAttribute.AUX_POINTER: 1 << 41,
        MatmulAttribute.AUX_LD: 1 << 34,
        MatmulAttribute.AUX_BATCH_STRIDE: 1 << 35,
        MatmulAttribute.AUX_DATA_TYPE: DataType.BFLOAT16,
        MatmulAttribute.BIAS_DATA_TYPE: DataType.FLOAT16,
    }
    assert set(values) == set(MatmulAttribute)
    for attribute, value in values.items():
        library.set(matmul, attribute, value)
    assert {attribute: library.get(matmul, attribute) for attribute in values} == values


@pytest.mark.parametrize("epilogue", list(Epilogue), ids=lambda e: e.name)
def test_every_epilogue_is_accepted(library: CublasLt, matmul: int, epilogue: Epilogue) -> None:
    library.set(matmul, MatmulAttribute.EPILOGUE, epilogue)
    assert library.get(matmul, MatmulAttribute.EPILOGUE) == epilogue


@pytest.mark.parametrize("compute", list(ComputeType), ids=lambda c: c.name)
@pytest.mark.parametrize("scale", list(DataType), ids=lambda s: s.name)
def test_compute_and_scale_types_are_told_apart(library: CublasLt, compute: ComputeType, scale: DataType) -> None:
    made = library.new_matmul(compute, scale)
    assert library.get(made, MatmulAttribute.COMPUTE_TYPE) == compute
    assert library.get(made, MatmulAttribute.SCALE_TYPE) == scale
    library.free_matmul(made)


@pytest.mark.parametrize("dtype", list(DataType), ids=lambda d: d.name)
def test_every_attribute_of_a_layout(library: CublasLt, dtype: DataType) -> None:
    made = library.new_layout(dtype, 3, 5, 7)
    assert library.get(made, LayoutAttribute.TYPE) == dtype
    assert library.get(made, LayoutAttribute.ORDER) == Order.COLUMN
    assert [library.get(made, a) for a in (LayoutAttribute.ROWS, LayoutAttribute.COLUMNS, LayoutAttribute.LD)] == [
        3,
        5,
        7,
    ]
    assert library.get(made, LayoutAttribute.BATCH_COUNT) == 1
    for attribute, value in ((LayoutAttribute.BATCH_COUNT, 9), (LayoutAttribute.BATCH_STRIDE, 1 << 40)):
        library.set(made, attribute, value)
        assert library.get(made, attribute) == value
    library.set(made, LayoutAttribute.ORDER, Order.ROW)
    assert library.get(made, LayoutAttribute.ORDER) == Order.ROW
    library.free_layout(made)


def test_every_attribute_of_a_preference(library: CublasLt) -> None:
    made = library.new_preference()
    assert library.get(made, PreferenceAttribute.MIN_ALIGNMENT_A_BYTES) == 256
    for attribute in PreferenceAttribute:
        value = 33 << 20 if attribute == PreferenceAttribute.MAX_WORKSPACE_BYTES else 2
        library.set(made, attribute, value)
        assert library.get(made, attribute) == value
    library.set(made, PreferenceAttribute.REDUCTION_SCHEME_MASK, ReductionScheme.COMPUTE_TYPE)
    library.free_preference(made)


def test_every_attribute_has_a_c_type_of_the_size_the_library_wants(library: CublasLt, matmul: int) -> None:
    """The library refuses a buffer of another size."""
    for kind in (MatmulAttribute, LayoutAttribute, PreferenceAttribute):
        assert {(kind, member) for member in kind} <= set(cublaslt._TYPES)
    wrong = ctypes.c_int16(1)
    with pytest.raises(CublasLtError, match="INVALID_VALUE"):
        library._call(
            "cublasLtMatmulDescSetAttribute", matmul, MatmulAttribute.TRANSA, ctypes.byref(wrong), ctypes.sizeof(wrong)
        )


def test_plans_become_descriptors(library: CublasLt) -> None:
    a = Spec((3, 5, 4), DTYPES["bfloat16"], (20, 1, 5))
    b, out = Spec((3, 4, 8), a.dtype), Spec((3, 5, 8), a.dtype)
    built = _Built(library, plan_matmul(a, b, out, epilogue=Epilogue.GELU_AUX_BIAS))
    want = {
        MatmulAttribute.TRANSA: Operation.NORMAL,
        MatmulAttribute.TRANSB: Operation.TRANSPOSED,
        MatmulAttribute.EPILOGUE: Epilogue.GELU_AUX_BIAS,
        MatmulAttribute.BIAS_DATA_TYPE: DataType.BFLOAT16,
        MatmulAttribute.AUX_LD: 8,
        MatmulAttribute.AUX_BATCH_STRIDE: 40,
    }
    assert {attribute: library.get(built.matmul, attribute) for attribute in want} == want
    layout = {
        LayoutAttribute.ROWS: 5,
        LayoutAttribute.COLUMNS: 4,
        LayoutAttribute.LD: 5,
        LayoutAttribute.BATCH_COUNT: 3,
        LayoutAttribute.BATCH_STRIDE: 20,
        LayoutAttribute.TYPE: DataType.BFLOAT16,
    }
    assert {attribute: library.get(built.second, attribute) for attribute in layout} == layout


def test_a_wrong_handle_is_an_error(library: CublasLt, matmul: int) -> None:
    layout, ask = library.new_layout(DataType.FLOAT32, 4, 4, 4), library.new_preference()
    with pytest.raises(CublasLtError) as caught:
        library.heuristic(0, matmul, layout, layout, layout, layout, ask, 1)
    assert caught.value.status in (Status.NOT_INITIALIZED, Status.INVALID_VALUE)
    one, zero = ctypes.c_float(1), ctypes.c_float(0)
    algorithm = cublaslt._AlgorithmData()
    with pytest.raises(CublasLtError, match="cublasLtMatmul failed"):
        library.matmul(0, matmul, one, 0, layout, 0, layout, zero, 0, layout, 0, layout, algorithm, 0, 0, 0)
    library.free_layout(layout)
    library.free_preference(ask)


def test_without_a_device_there_is_no_handle(library: CublasLt) -> None:
    try:
        handle = library.create()
    except CublasLtError as error:
        assert error.status in (Status.NOT_INITIALIZED, Status.ALLOC_FAILED, Status.INTERNAL_ERROR)
        assert "cublasLtCreate failed" in str(error)
    else:
        library.destroy(handle)


# ---- without the library ----


def test_structures_have_the_sizes_of_the_header() -> None:
    assert ctypes.sizeof(cublaslt._AlgorithmData) == 64
    assert ctypes.sizeof(cublaslt._HeuristicResult) == 64 + 8 + 4 + 4 + 16


def test_numbers_of_epilogues_are_sums_of_their_parts() -> None:
    e = Epilogue
    assert e.GELU_AUX_BIAS == e.GELU | 128 | e.BIAS == 164
    assert e.RELU_AUX_BIAS == e.RELU | 128 | e.BIAS == 134
    assert e.DGELU_BGRAD == e.DGELU | 16 == 208
    assert e.DRELU_BGRAD == e.DRELU | 16 == 152
    for kind in (Status, DataType, ComputeType, Epilogue, MatmulAttribute, LayoutAttribute, PreferenceAttribute):
        assert issubclass(kind, IntEnum)


def test_every_function_is_typed() -> None:
    assert all(arguments and None not in arguments for arguments in cublaslt._PROTOTYPES.values())
    assert len(cublaslt._PROTOTYPES["cublasLtMatmul"]) == 16
    assert len(cublaslt._PROTOTYPES["cublasLtMatmulAlgoGetHeuristic"]) == 10


def test_errors_say_what_failed_and_what_to_do() -> None:
    error = CublasLtError("cublasLtMatmul", 15).about("matmul of float32[2x2]")
    assert str(error).startswith("matmul of float32[2x2]: cublasLtMatmul failed with NOT_SUPPORTED (15); no algorithm")
    assert isinstance(error, DeviceError)
    assert "unknown (99)" in str(CublasLtError("cublasLtCreate", 99))


def test_a_missing_library_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for search in ("_pathfinder", "_wheels", "_system"):
        monkeypatch.setattr(cublaslt, search, lambda: iter(()))
    with pytest.raises(CublasLtMissing, match=r"brim\[cuda12\]"):
        cublaslt.load()


def test_a_file_that_is_no_library_is_named(tmp_path: Any) -> None:
    fake = tmp_path / "libcublasLt.so.12"
    fake.write_bytes(b"no library")
    with pytest.raises(CublasLtMissing, match=r"libcublasLt\.so\.12 is no usable libcublasLt"):
        CublasLt(str(fake))
    name = ctypes.util.find_library("c")
    if name:
        with pytest.raises(CublasLtMissing, match="cublasLtGetVersion"):
            CublasLt(name)


def test_the_search_takes_the_first_place_that_has_it(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "cublas" / "lib"
    folder.mkdir(parents=True)
    (folder / "libcublasLt.so.12").write_bytes(b"")

    class Found:
        submodule_search_locations = (str(tmp_path),)

    monkeypatch.setattr(cublaslt.importlib.util, "find_spec", lambda name: Found())
    monkeypatch.setattr(cublaslt.sys, "platform", "linux")
    monkeypatch.setattr(cublaslt, "_pathfinder", lambda: iter(()))
    assert cublaslt.find() == str(folder / "libcublasLt.so.12")
    monkeypatch.setattr(cublaslt.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(cublaslt.ctypes.util, "find_library", lambda name: "libcublasLt.so.13")
    assert cublaslt.find() == "libcublasLt.so.13"
    monkeypatch.undo()
    assert importlib.import_module("brim_cuda.cublaslt") is cublaslt


def test_pathfinder_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    class Loaded:
        abs_path = "/opt/libcublasLt.so.12"

    class Pathfinder:
        @staticmethod
        def load_nvidia_dynamic_lib(name: str) -> Loaded:
            assert name == "cublasLt"
            return Loaded()

    monkeypatch.setattr(cublaslt.importlib, "import_module", lambda name: Pathfinder)
    assert cublaslt.find() == "/opt/libcublasLt.so.12"

    def missing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(cublaslt.importlib, "import_module", missing)
    assert list(cublaslt._pathfinder()) == []


# ---- against NVIDIA's header ----

HEADER_NAMES: dict[type[IntEnum], tuple[str, dict[str, str]]] = {
    Status: ("CUBLAS_STATUS_", {}),
    Epilogue: ("CUBLASLT_EPILOGUE_", {}),
    DataType: (
        "CUDA_",
        {
            "FLOAT32": "R_32F",
            "FLOAT64": "R_64F",
            "FLOAT16": "R_16F",
            "BFLOAT16": "R_16BF",
            "COMPLEX64": "C_32F",
            "COMPLEX128": "C_64F",
        },
    ),
    ComputeType: ("CUBLAS_COMPUTE_", {"FLOAT32": "32F", "FLOAT64": "64F", "TF32": "32F_FAST_TF32"}),
    Operation: ("CUBLAS_OP_", {"NORMAL": "N", "TRANSPOSED": "T"}),
    Order: ("CUBLASLT_ORDER_", {"COLUMN": "COL"}),
    ReductionScheme: ("CUBLASLT_REDUCTION_SCHEME_", {"IN_PLACE": "INPLACE"}),
    MatmulAttribute: (
        "CUBLASLT_MATMUL_DESC_",
        {f"AUX_{name}": f"EPILOGUE_AUX_{name}" for name in ("POINTER", "LD", "BATCH_STRIDE", "DATA_TYPE")},
    ),
    LayoutAttribute: ("CUBLASLT_MATRIX_LAYOUT_", {"COLUMNS": "COLS", "BATCH_STRIDE": "STRIDED_BATCH_OFFSET"}),
    PreferenceAttribute: ("CUBLASLT_MATMUL_PREF_", {}),
}


def header_folders() -> list[Path]:
    found = importlib.util.find_spec("nvidia")
    roots = [Path(root) for root in found.submodule_search_locations or ()] if found else []
    folders = [*(p for root in roots for p in sorted(root.glob("*/include"))), Path("/usr/local/cuda/include")]
    return [folder for folder in folders if folder.is_dir()]


def test_numbers_and_sizes_are_those_of_the_header(tmp_path: Path) -> None:
    compiler = shutil.which("g++")
    folders = header_folders()
    for name in ("cublasLt.h", "library_types.h", "cuda_runtime_api.h"):
        if not any((folder / name).exists() for folder in folders):
            pytest.skip(f"{name} of the CUDA toolkit is not installed")
    if compiler is None:
        pytest.skip("no C++ compiler")
    lines = [
        f"static_assert(int({prefix}{names.get(member.name, member.name)}) == {int(member)});"
        for kind, (prefix, names) in HEADER_NAMES.items()
        for member in kind
    ]
    lines.append(f"static_assert(sizeof(cublasLtMatmulAlgo_t) == {ctypes.sizeof(cublaslt._AlgorithmData)});")
    lines.append(
        f"static_assert(sizeof(cublasLtMatmulHeuristicResult_t) == {ctypes.sizeof(cublaslt._HeuristicResult)});"
    )
    source = tmp_path / "numbers.cpp"
    includes = [flag for folder in folders for flag in ("-isystem", str(folder))]

    def compiled(text: list[str]) -> subprocess.CompletedProcess[str]:
        source.write_text("\n".join(["#include <cublasLt.h>", *text]) + "\n")
        command = [compiler, "-std=c++17", "-fsyntax-only", *includes, str(source)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    done = compiled(lines)
    assert done.returncode == 0, done.stderr
    assert len(lines) > 60
    assert "static assertion failed" in compiled(["static_assert(int(CUBLASLT_EPILOGUE_BIAS) == 5);"]).stderr
