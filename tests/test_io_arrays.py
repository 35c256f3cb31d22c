"""Arrays as safetensors: back as they were, exchanged with other tools, and refused when damaged."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import struct
import tracemalloc
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from brim import io
from brim.errors import CheckpointError, DTypeError


def names_in(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


DTYPES = [
    *(
        "bool",
        "uint8",
        "int8",
        "uint16",
        "int16",
        "uint32",
        "int32",
        "uint64",
        "int64",
        "float16",
        "float32",
        "float64",
    ),
    *("complex64", "complex128", ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2),
]


def random_array(shape: tuple[int, ...], dtype: object, seed: int = 0) -> np.ndarray:
    dtype = np.dtype(dtype)
    rng = np.random.default_rng(seed)
    if dtype == np.bool_:
        return rng.integers(0, 2, shape).astype(bool)
    return rng.integers(0, 256, (*shape, dtype.itemsize), dtype=np.uint8).view(dtype).reshape(shape)  # NaNs too


def assert_same(actual: np.ndarray, expected: np.ndarray) -> None:
    assert type(actual) is np.ndarray
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype.newbyteorder("="))
    assert actual.tobytes() == expected.astype(actual.dtype).tobytes()
    assert actual.flags.c_contiguous
    assert actual.flags.writeable


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_and_shape(tmp_path: Path, dtype: object) -> None:
    path = tmp_path / "a.safetensors"
    shapes = [(), (1,), (0,), (3, 0, 2), (5,), (2, 3), (1, 1, 1, 1, 7)]
    arrays = {f"x{index}": random_array(shape, dtype, index) for index, shape in enumerate(shapes)}
    digest = io.save_arrays(path, arrays, {"who": "é"})
    loaded, metadata = io.load_arrays(path)
    assert list(loaded) == list(arrays)
    for name, array in arrays.items():
        assert_same(loaded[name], array)
    assert metadata == {"who": "é"}
    assert io.verify_arrays(path) == digest
    assert names_in(tmp_path) == ["a.safetensors"]


@pytest.mark.parametrize("dtype", ["float32", "complex128", ml_dtypes.bfloat16, "bool"], ids=str)
def test_arrays_that_are_not_contiguous(tmp_path: Path, dtype: object) -> None:
    base = random_array((4, 6, 5), dtype)
    arrays = {
        "transposed": base.T,
        "strided": base[::2, ::-1, 1:4],
        "fortran": np.asfortranarray(base),
        "broadcast": np.broadcast_to(base[:, :1], base.shape),
        "read_only": base.copy(),
    }
    arrays["read_only"].flags.writeable = False
    io.save_arrays(tmp_path / "a", arrays)
    loaded, _ = io.load_arrays(tmp_path / "a")
    for name, array in arrays.items():
        assert_same(loaded[name], np.ascontiguousarray(array))


def test_big_endian_scalars_and_subclasses(tmp_path: Path) -> None:
    arrays = {
        "f": np.arange(6, dtype=">f4").reshape(2, 3).T,
        "c": np.array([1 + 2j], dtype=">c16"),
        "scalar": np.float32(3.5),
        "longlong": np.arange(3, dtype=np.longlong),
        "matrix": np.arange(6.0).reshape(2, 3).view(type("Sub", (np.ndarray,), {})),
    }
    io.save_arrays(tmp_path / "a", arrays)
    loaded, _ = io.load_arrays(tmp_path / "a")
    for name, array in arrays.items():
        assert_same(loaded[name], np.asarray(array))


@settings(max_examples=40, deadline=None, database=None)
@given(
    st.dictionaries(
        st.text(st.characters(codec="utf-8"), max_size=8).filter(lambda name: name != "__metadata__"),
        hnp.arrays(
            st.sampled_from([np.dtype(t) for t in ("?", "i1", "<i8", "<f2", "<f4", "<c16")]),
            hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4),
        ),
        max_size=5,
    ),
    st.dictionaries(
        st.text(st.characters(codec="utf-8")).filter(lambda key: not key.startswith("brim.")),
        st.text(st.characters(codec="utf-8")),
        max_size=3,
    ),
)
def test_any_names_shapes_and_metadata(
    tmp_path_factory: pytest.TempPathFactory, arrays: dict[str, np.ndarray], metadata: dict[str, str]
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    io.save_arrays(path, arrays, metadata)
    loaded, loaded_metadata = io.load_arrays(path)
    assert list(loaded) == list(arrays)
    assert loaded_metadata == metadata
    for name, array in arrays.items():
        assert_same(loaded[name], array)


def test_equal_content_gives_equal_bytes(tmp_path: Path) -> None:
    arrays = {"z": np.arange(3, dtype=np.int8), "a": np.ones((2, 2), np.float32), "c": np.zeros(2, np.complex128)}
    metadata = {f"key{n}": str(n) for n in range(8)}
    io.save_arrays(tmp_path / "a", arrays, metadata)
    copies = {name: np.asfortranarray(array.copy()) for name, array in arrays.items()}
    io.save_arrays(tmp_path / "b", copies, dict(reversed(metadata.items())))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    arrays["a"][0, 0] = 2
    io.save_arrays(tmp_path / "b", arrays, metadata)
    assert (tmp_path / "a").read_bytes() != (tmp_path / "b").read_bytes()


def test_the_checksum_is_what_the_documentation_says(tmp_path: Path) -> None:
    digest = io.save_arrays(tmp_path / "a", {"x": np.arange(1000.0)})
    content = (tmp_path / "a").read_bytes()
    assert content.count(digest.encode()) == 1
    assert hashlib.sha256(content.replace(digest.encode(), b"0" * 64)).hexdigest() == digest


@pytest.mark.parametrize("value", [[1.0], None, np.ma.masked_array([1.0], [True]), "x"], ids=lambda v: type(v).__name__)
def test_what_is_not_an_array_is_refused(tmp_path: Path, value: object) -> None:
    with pytest.raises(DTypeError, match="'weight': expected a NumPy array"):
        io.save_arrays(tmp_path / "a", {"weight": value})
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("dtype", ["O", "U3", "S3", "M8[s]", "i4,f4", np.longdouble, ml_dtypes.int4], ids=str)
def test_dtypes_without_a_place_in_the_format_are_refused(tmp_path: Path, dtype: object) -> None:
    if dtype is np.longdouble and np.dtype(dtype) == np.float64:
        pytest.skip("long double is double here")
    with pytest.raises(DTypeError, match=r"'weight': dtype .* float32"):
        io.save_arrays(tmp_path / "a", {"weight": np.zeros(2, dtype)})
    assert names_in(tmp_path) == []


@pytest.mark.parametrize(
    ("arrays", "metadata", "message"),
    [
        ({"__metadata__": np.zeros(1)}, {}, "__metadata__"),
        ({1: np.zeros(1)}, {}, "expected a string"),
        ({"\ud800": np.zeros(1)}, {}, "UTF-8"),
        ({}, {"epoch": 3}, r"metadata\['epoch'\]: expected a string"),
        ({}, {3: "x"}, "expected a string"),
        ({}, {"brim.sha256": "x"}, "reserved"),
    ],
)
def test_names_and_metadata_that_cannot_be_stored(tmp_path: Path, arrays: dict, metadata: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        io.save_arrays(tmp_path / "a", arrays, metadata)
    assert names_in(tmp_path) == []


def test_memory(tmp_path: Path) -> None:
    """Saving holds no second copy; loading holds the arrays and nothing more."""
    arrays = {f"w{n}": np.ones(1 << 20, np.float32) for n in range(8)}  # 32 MiB
    io.save_arrays(tmp_path / "a", arrays)  # imports are done
    io.load_arrays(tmp_path / "a")
    tracemalloc.start()
    try:
        io.save_arrays(tmp_path / "a", arrays)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
        tracemalloc.reset_peak()
        io.save_arrays(tmp_path / "a", {name: array[::2] for name, array in arrays.items()})
        assert tracemalloc.get_traced_memory()[1] < 3 << 20  # one of eight halves at a time
        tracemalloc.reset_peak()
        io.verify_arrays(tmp_path / "a")
        assert tracemalloc.get_traced_memory()[1] < 5 << 20
        tracemalloc.reset_peak()
        io.load_arrays(tmp_path / "a")
        assert 16 << 20 < tracemalloc.get_traced_memory()[1] < 17 << 20
    finally:
        tracemalloc.stop()


# Damage


def small_file(folder: Path) -> Path:
    path = folder / "small.safetensors"
    arrays = {"w": np.arange(3, dtype=np.float32), "mask": np.array([True, False]), "c": np.array(1j)}
    io.save_arrays(path, arrays, {"who": "me"})
    return path


def test_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    path = small_file(tmp_path)
    content = path.read_bytes()
    damaged = tmp_path / "damaged.safetensors"
    for position in range(len(content)):
        for bit in range(8):
            changed = bytearray(content)
            changed[position] ^= 1 << bit
            damaged.write_bytes(changed)
            with pytest.raises(CheckpointError, match=r"damaged\.safetensors"):
                io.load_arrays(damaged)
    io.load_arrays(path)


def test_every_truncation_and_extension_is_noticed(tmp_path: Path) -> None:
    content = small_file(tmp_path).read_bytes()
    damaged = tmp_path / "damaged.safetensors"
    for length in range(len(content)):
        damaged.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match="truncated"):
            io.load_arrays(damaged)
        with pytest.raises(CheckpointError, match="truncated"):
            io.verify_arrays(damaged)
    for extra in (b"\0", b"x" * 64, content):
        damaged.write_bytes(content + extra)
        with pytest.raises(CheckpointError, match="extended"):
            io.load_arrays(damaged)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b'"shape":[3]', b'"shape":[1,3]', "damaged|valid"),
        (b'"who":"me"', b'"who":"us"', "was changed or damaged"),
        (b'"w":{', b'"v":{', "was changed or damaged"),
        (b'"F32"', b'"I32"', "was changed or damaged"),
        (b'"brim.sha256"', b'"brim.sha257"', "missing"),
        (b'"w":{', b'"c":{', "'c' occurs twice"),
        (b'"brim.format":"1"', b'"brim.format":"2"', "newer brim"),
    ],
)
def test_an_edited_header_is_noticed(tmp_path: Path, old: bytes, new: bytes, message: str) -> None:
    path = small_file(tmp_path)
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + size].replace(old, new, 1)
    assert header != content[8 : 8 + size]
    path.write_bytes(struct.pack("<Q", len(header)) + header + content[8 + size :])  # consistent otherwise
    with pytest.raises(CheckpointError, match=message):
        io.load_arrays(path)


def test_swapped_data_is_noticed_by_the_checksum(tmp_path: Path) -> None:
    io.save_arrays(tmp_path / "a", {"x": np.zeros(100)})
    io.save_arrays(tmp_path / "b", {"x": np.ones(100)})
    a, b = (tmp_path / "a").read_bytes(), (tmp_path / "b").read_bytes()
    (tmp_path / "a").write_bytes(a[:-800] + b[-800:])
    with pytest.raises(CheckpointError, match=r"was changed or damaged.*intact copy"):
        io.load_arrays(tmp_path / "a")
    with pytest.raises(CheckpointError, match="was changed or damaged"):
        io.verify_arrays(tmp_path / "a")


class Bomb:
    def __reduce__(self) -> tuple:
        return (pytest.fail, ("was unpickled",))


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_is_refused_and_not_opened(tmp_path: Path, protocol: int) -> None:
    (tmp_path / "a.pkl").write_bytes(pickle.dumps([Bomb()] * 20, protocol))
    with pytest.raises(CheckpointError, match=r"a\.pkl.*pickle.*safetensors\.torch\.save_file"):
        io.load_arrays(tmp_path / "a.pkl")


def test_other_formats_are_refused_with_a_hint(tmp_path: Path) -> None:
    path = tmp_path / "file"

    def refused(message: str) -> None:
        with pytest.raises(CheckpointError, match=message):
            io.load_arrays(path)

    np.savez(tmp_path / "a.npz", x=np.zeros(3))
    path.write_bytes((tmp_path / "a.npz").read_bytes())
    refused(r"\.npz archive.*numpy\.load")
    np.save(tmp_path / "a.npy", np.zeros(3))
    path.write_bytes((tmp_path / "a.npy").read_bytes())
    refused(r"\.npy file")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps([1]))
    refused("never unpickles.*torch.load")
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    refused("git lfs pull")
    path.write_bytes(b"just some text, longer than ten bytes")
    refused("does not begin like one")
    path.write_bytes(b"")
    refused("truncated: the file has 0 bytes")
    path.unlink()
    path.mkdir()
    refused("got a folder")


def foreign(path: Path, header: object, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


ENTRY = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"a": ENTRY, "b": ENTRY}, bytes(4), "not a valid safetensors file"),
        ({"a": {**ENTRY, "shape": [2]}}, bytes(4), "not a valid safetensors file"),
        ({"a": {**ENTRY, "dtype": "F33"}}, bytes(4), "F33"),
        ({"a": {**ENTRY, "data_offsets": [1, 5]}}, bytes(5), "not a valid safetensors file"),
        ({"a": {**ENTRY, "shape": [1 << 62, 4]}}, bytes(4), "not a valid safetensors file"),
        ({"a": {"dtype": "F32", "shape": [0, 1 << 62, 9], "data_offsets": [0, 0]}}, b"", "impossible shape"),
        ({"a": 1}, b"", "not a valid safetensors file"),
        ({"a": ENTRY, "__metadata__": {"k": 1}}, bytes(4), "not a valid safetensors file"),
        ({"a": {**ENTRY, "dtype": "BOOL", "shape": [4]}}, b"\0\1\2\0", "other bytes than 0 and 1"),
        ({"a": {**ENTRY, "dtype": "F8_E8M0", "shape": [4]}}, bytes(4), "F8_E8M0, which brim does not have"),
        ({"__metadata__": {"brim.complex128": '["a"]'}}, b"", "missing or damaged"),
        (b'{"a":' + b"[" * 50_000, b"", "not acceptable JSON"),
        (b'{"a":\xff}', b"", "not acceptable JSON"),
    ],
)
def test_impossible_files_from_elsewhere_are_refused(tmp_path: Path, header: object, data: bytes, message: str) -> None:
    foreign(tmp_path / "a.safetensors", header, data)
    with pytest.raises(CheckpointError, match=rf"a\.safetensors.*{message}"):
        io.load_arrays(tmp_path / "a.safetensors")


def test_files_from_elsewhere_are_loaded(tmp_path: Path) -> None:
    foreign(tmp_path / "a", {"a": ENTRY}, np.float32(3).tobytes())
    arrays, metadata = io.load_arrays(tmp_path / "a")
    assert arrays["a"] == 3
    assert metadata == {}
    assert io.verify_arrays(tmp_path / "a") is None
    foreign(tmp_path / "a", {}, b"")
    assert io.load_arrays(tmp_path / "a") == ({}, {})


def test_the_library_reads_our_files_and_we_read_its_files(tmp_path: Path) -> None:
    library = pytest.importorskip("safetensors.numpy")
    arrays = {
        "b": random_array((3, 2), "float32"),
        "flag": np.array([True]),
        "a": random_array((4,), "int64"),
        "half": random_array((2,), "float16"),
        "scalar": np.array(2.5),
        "none": np.zeros((0, 3), np.float32),
    }
    io.save_arrays(tmp_path / "ours", arrays, {"who": "brim"})
    theirs = library.load_file(tmp_path / "ours")
    library.save_file(arrays, tmp_path / "theirs", {"who": "them"})
    ours, metadata = io.load_arrays(tmp_path / "theirs")
    assert metadata == {"who": "them"}
    for name, array in arrays.items():
        assert_same(ours[name], array)
        np.testing.assert_array_equal(theirs[name], array)


def test_weights_move_to_and_from_torch(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="PyTorch not installed")
    library = pytest.importorskip("safetensors.torch")
    names = ("bool", "uint8", "int64", "float16", "float32", "float64", "complex64", "bfloat16")
    arrays = {name: random_array((3, 2), getattr(ml_dtypes, name, name), seed) for seed, name in enumerate(names)}
    arrays["scalar"] = np.array(1.5, np.float32)
    arrays["z"] = random_array((4,), "complex128")
    io.save_arrays(tmp_path / "ours", arrays)
    tensors = library.load_file(tmp_path / "ours")
    assert torch.view_as_complex(tensors["z"]).numpy().tobytes() == arrays["z"].tobytes()
    tensors["z"] = tensors["z"][:, 0].contiguous()
    for name in names:
        assert tensors[name].dtype == getattr(torch, name)
        assert tensors[name].contiguous().view(torch.uint8).numpy().tobytes() == arrays[name].tobytes()
    library.save_file(tensors, tmp_path / "theirs")
    again, _ = io.load_arrays(tmp_path / "theirs")
    for name in (*names, "scalar"):
        assert_same(again[name], arrays[name])
