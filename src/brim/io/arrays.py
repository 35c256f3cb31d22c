"""NumPy arrays on disk in the safetensors format: checked on loading, never pickled, exchangeable with other tools.

The format (https://github.com/huggingface/safetensors#format): 8 bytes with the length of a JSON header, the header
(name -> dtype, shape, range of bytes; and string metadata), the data.

Reading lets the `safetensors` library judge the structure. Writing does not use it: it cannot write a checksum that is
known only when the data has been written, nor give equal content equal bytes (it writes metadata in random order), nor
keep the order of names. Here each array goes straight from its memory to the file; only one that is not contiguous or
not little-endian is copied, one at a time.

What brim adds to the metadata has keys that start with ``brim.``: `brim.sha256` is the checksum of the file (see
checksum.py), and `brim.complex128` lists the arrays of that dtype, which the format does not have: they are stored as
float64 with a last axis of 2, real and imaginary part, as `torch.view_as_complex` reads them.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from typing import IO, Any

import ml_dtypes
import numpy as np

from brim.errors import CheckpointError, DTypeError
from brim.io.atomic import StrPath, atomic_write
from brim.io.checksum import BLANK, KEY, find_digest, mismatch
from brim.io.json_files import unique_names
from brim.units import format_bytes

__all__ = ["load_arrays", "read_arrays", "save_arrays", "verify_arrays"]

_FORMAT_KEY, _FORMAT = "brim.format", "1"
_COMPLEX_KEY = "brim.complex128"
_HEADER_LIMIT_BYTES = 100_000_000  # the library refuses longer ones
_CHUNK_BYTES = 1 << 22  # hashed and written while in the cache

_DTYPES = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "C64": np.dtype(np.complex64),
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_COMPLEX128 = np.dtype(np.complex128)

_CONVERT = "load it in PyTorch (torch.load(path, weights_only=True)) and write it with safetensors.torch.save_file"
# What people pass by mistake: (first bytes, also contained in the first 256 bytes, what it is, what to do).
_OTHER_FORMATS = (
    (b"PK\x03\x04", b".npy", "a NumPy .npz archive", "read it with numpy.load and write it with save_arrays"),
    (
        b"PK\x03\x04",
        b"",
        "a zip archive, as PyTorch's .pt files are, which hold a pickle; brim never unpickles",
        _CONVERT,
    ),
    (b"\x93NUMPY", b"", "a NumPy .npy file", "read it with numpy.load and write it with save_arrays"),
    (b"\x89HDF", b"", "an HDF5 file", "read it with h5py or Keras and write it with save_arrays"),
    (b"\x1f\x8b", b"", "compressed with gzip", "unpack it first"),
    (b"version https://git-lfs", b"", "a Git LFS pointer, not the file itself", "fetch the file with 'git lfs pull'"),
    *(
        (b"\x80" + bytes([n]), b"", "a pickle; brim never unpickles, it could run any code", _CONVERT)
        for n in range(2, 6)
    ),
)


def save_arrays(path: StrPath, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> str:
    """Write named arrays to a safetensors file, atomically and with a checksum; equal content gives equal bytes.

    Memory: nothing but one copy of one array at a time, and only where that is not contiguous or not little-endian.
    The arrays must not change while they are written.

    Arguments:
        path: the file to create or replace.
        arrays: name -> array of any shape, of dtype bool, (u)int8 to 64, float16/32/64, bfloat16, float8_e4m3fn,
            float8_e5m2, complex64 or complex128. The order of names is kept.
        metadata: further strings for the header; keys that start with ``brim.`` are reserved.

    Returns:
        The checksum of the file: 64 hexadecimal digits (see checksum.py).

    Raises:
        DTypeError: something that is not an array, or of a dtype that the format does not have.
        ValueError: a name or metadata that cannot be stored.
        OSError: the file could not be written; the old one is untouched.
    """
    arrays = {name: _checked(name, array) for name, array in arrays.items()}
    # Widest items first, as the library lays them out: every array then starts at a multiple of its item size.
    written = sorted(arrays, key=lambda name: -arrays[name].itemsize)
    head = _head(arrays, written, metadata or {})
    sha256 = hashlib.sha256()
    with atomic_write(path) as file:
        _write_hashed(file, memoryview(head), sha256)
        for name in written:
            _write_hashed(file, _bytes_of(arrays[name]), sha256)
        file.seek(head.index(BLANK.encode()))
        file.write(sha256.hexdigest().encode())
    return sha256.hexdigest()


def _checked(name: str, array: Any) -> np.ndarray:
    _check_text("arrays: a name", name)
    if name == "__metadata__":
        raise ValueError("arrays: the name '__metadata__' belongs to the format; use another")
    if isinstance(array, np.generic):
        array = np.asarray(array)
    if not isinstance(array, np.ndarray) or isinstance(array, np.ma.MaskedArray):  # a mask would be lost
        raise DTypeError(f"{name!r}: expected a NumPy array, got {type(array).__name__}; convert it with numpy.asarray")
    if array.dtype.newbyteorder("=") not in (*_CODES, _COMPLEX128):
        raise DTypeError(
            f"{name!r}: dtype {array.dtype} cannot be stored in a safetensors file; convert it with astype() to one of "
            + ", ".join(str(dtype) for dtype in (*_CODES, _COMPLEX128))
        )
    return array


def _check_text(what: str, text: object) -> None:
    if not isinstance(text, str):
        raise ValueError(f"{what}: expected a string, got {text!r} ({type(text).__name__})")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{what}: {text!r} cannot be written as UTF-8: {error.reason}") from None


def _head(arrays: Mapping[str, np.ndarray], written: list[str], metadata: Mapping[str, str]) -> bytes:
    """The file up to its data, which follows in the order `written`; the checksum is still blank."""
    for key, text in metadata.items():
        _check_text("metadata: a key", key)
        _check_text(f"metadata[{key!r}]", text)
        if key.startswith("brim."):
            raise ValueError(f"metadata: the key {key!r} is reserved, as all that start with 'brim.'; rename it")
    ranges, end = {}, 0
    for name in written:
        ranges[name] = [end, end + arrays[name].nbytes]
        end += arrays[name].nbytes
    entries, complex_names = {}, []
    for name, array in arrays.items():
        dtype, shape = array.dtype.newbyteorder("="), array.shape
        if dtype == _COMPLEX128:  # its bytes are those of (real, imaginary) pairs already
            dtype, shape = np.dtype(np.float64), (*shape, 2)
            complex_names.append(name)
        entries[name] = {"dtype": _CODES[dtype], "shape": shape, "data_offsets": ranges[name]}
    own = {KEY: BLANK, _FORMAT_KEY: _FORMAT} | ({_COMPLEX_KEY: json.dumps(complex_names)} if complex_names else {})
    fields = {"__metadata__": own | dict(sorted(metadata.items())), **entries}
    header = json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    if len(header) > _HEADER_LIMIT_BYTES:
        raise ValueError(
            f"the names and metadata take {format_bytes(len(header))}, the format allows "
            f"{format_bytes(_HEADER_LIMIT_BYTES)}; spread the arrays over several files"
        )
    return len(header).to_bytes(8, "little") + header


def _bytes_of(array: np.ndarray) -> memoryview:
    """The content in C order, little-endian; a view where the array is so already."""
    if array.dtype.byteorder == ">":
        array = array.astype(array.dtype.newbyteorder("<"), order="C")
    return np.asarray(array, order="C").reshape(-1).view(np.uint8).data


def _write_hashed(file: IO[bytes], content: memoryview, sha256: Any) -> None:
    for begin in range(0, len(content), _CHUNK_BYTES):
        chunk = content[begin : begin + _CHUNK_BYTES]
        sha256.update(chunk)
        file.write(chunk)


def load_arrays(path: StrPath) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Read a safetensors file written by `save_arrays` or by another tool.

    A file from `save_arrays` is refused if a single bit of it is not as it was written. One from another tool has no
    checksum: its structure is verified. Memory: the arrays themselves, nothing more.

    Arguments:
        path: the file.

    Returns:
        name -> array (writable, contiguous, in the order of the header), and the metadata without brim's own keys.

    Raises:
        CheckpointError: the file is missing, truncated, extended, damaged, edited, or of another format; the message
            names it and says which.
    """
    arrays, metadata, _ = read_arrays(path)
    return arrays, metadata


def read_arrays(path: StrPath) -> tuple[dict[str, np.ndarray], dict[str, str], str | None]:
    """As `load_arrays`, with the verified checksum as third value: None in a file from another tool."""
    source = os.fspath(path)
    with _opened(path) as (file, header):
        sha256 = hashlib.sha256(header.head_blank)
        arrays = dict.fromkeys(header.entries, np.empty(0))
        for name in sorted(header.entries, key=lambda name: header.entries[name]["data_offsets"]):
            entry = header.entries[name]
            dtype = _DTYPES.get(entry["dtype"])
            if dtype is None:
                raise CheckpointError(
                    f"{source}: {name!r} has the dtype {entry['dtype']}, which brim does not have; "
                    f"convert it to one of {', '.join(_DTYPES)} with the tool that wrote it"
                )
            try:
                array = np.empty(entry["shape"], dtype)
            except ValueError as error:
                raise CheckpointError(f"{source}: {name!r} has an impossible shape {entry['shape']}: {error}") from None
            content = array.reshape(-1).view(np.uint8)
            _read_hashed(file, content.data, sha256, source)
            if dtype == np.bool_ and content.size and content.max() > 1:
                raise CheckpointError(
                    f"{source}: {name!r} is of dtype bool but holds other bytes than 0 and 1; use an intact copy"
                )
            arrays[name] = array
        digest = header.check(sha256, source)
    return _with_complex(arrays, header.metadata, source), header.user_metadata, digest


def verify_arrays(path: StrPath) -> str | None:
    """Check a safetensors file as `load_arrays` does, without keeping its data.

    Returns:
        Its checksum; None if it has none, being from another tool.

    Raises:
        CheckpointError: as `load_arrays`.
    """
    with _opened(path) as (file, header):
        sha256 = hashlib.sha256(header.head_blank)
        buffer = memoryview(bytearray(_CHUNK_BYTES))
        for begin in range(0, header.data_bytes, _CHUNK_BYTES):
            _read_hashed(file, buffer[: min(_CHUNK_BYTES, header.data_bytes - begin)], sha256, os.fspath(path))
        return header.check(sha256, os.fspath(path))


@dataclass(frozen=True)
class _Header:
    entries: dict[str, dict[str, Any]]
    metadata: dict[str, str]
    data_bytes: int
    head_blank: bytes  # the file up to its data, with a blank checksum
    digest: str | None

    @property
    def user_metadata(self) -> dict[str, str]:
        return {key: text for key, text in self.metadata.items() if not key.startswith("brim.")}

    def check(self, sha256: Any, source: str) -> str | None:
        if self.digest is not None and sha256.hexdigest() != self.digest:
            remedy = "use an intact copy (if another tool changed it on purpose, remove its metadata keys 'brim.*')"
            raise mismatch(source, self.digest, sha256.hexdigest(), remedy)
        return self.digest


@contextmanager
def _opened(path: StrPath) -> Iterator[tuple[FileIO, _Header]]:
    source = os.fspath(path)
    if os.path.isdir(path):
        raise CheckpointError(f"{source}: expected a .safetensors file, got a folder; name a file in it")
    try:
        file = FileIO(path)  # without a buffer: the data goes from the system straight into the arrays
    except OSError as error:
        raise CheckpointError(f"{source}: cannot be read: {error.strerror}; check the path") from error
    with file:
        yield file, _read_header(file, source)


def _read_header(file: FileIO, source: str) -> _Header:
    file_bytes = os.fstat(file.fileno()).st_size
    first = file.read(256)
    header_bytes = int.from_bytes(first[:8], "little")
    if len(first) < 10 or first[8:9] != b"{":  # "{}" is the shortest header
        raise CheckpointError(f"{source}: {_what_else(first)}")
    if header_bytes > min(file_bytes - 8, _HEADER_LIMIT_BYTES):
        raise CheckpointError(
            f"{source}: truncated or damaged: its header should take {header_bytes} bytes, the file has "
            f"{file_bytes - 8} after the first 8; use an intact copy"
        )
    file.seek(0)
    head = bytearray(8 + header_bytes)
    _read_hashed(file, memoryview(head), hashlib.sha256(), source)
    try:
        entries = json.loads(head[8:].decode(), object_pairs_hook=unique_names)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{source}: damaged: its header is not acceptable JSON: {error}; use an intact copy"
        ) from None
    data_bytes = file_bytes - len(head)
    _check_length(entries, data_bytes, source)
    _check_structure(source)
    metadata = entries.pop("__metadata__", None) or {}
    digest = metadata.get(KEY)
    if digest is not None:
        _, position = find_digest(head) or ("", 0)
        if head[position : position + len(digest)] != digest.encode():  # the first match was something else
            raise CheckpointError(f"{source}: damaged: its checksum is not where it was written; use an intact copy")
        head[position : position + len(digest)] = BLANK.encode()[: len(digest)]
    elif any(key.startswith("brim.") for key in metadata):
        raise CheckpointError(
            f"{source}: brim wrote it, but its metadata {KEY!r} is missing or damaged; use an intact copy"
        )
    if digest is not None and metadata.get(_FORMAT_KEY) != _FORMAT:
        raise CheckpointError(
            f"{source}: has the format {metadata.get(_FORMAT_KEY)!r}, this brim reads {_FORMAT!r}; "
            "it is damaged, or from a newer brim: upgrade"
        )
    return _Header(entries, metadata, data_bytes, bytes(head), digest)


def _what_else(first: bytes) -> str:
    for start, contained, what, remedy in _OTHER_FORMATS:
        if first.startswith(start) and contained in first:
            return f"expected a safetensors file, this is {what}; {remedy}"
    if len(first) < 10:
        return f"truncated: the file has {len(first)} bytes, too few for any safetensors file; use an intact copy"
    return "expected a safetensors file, it does not begin like one; check the path, or use an intact copy"


def _check_length(entries: Any, data_bytes: int, source: str) -> None:
    """Say plainly what the library would call "incomplete metadata"; whatever else is wrong is left to it."""
    try:
        ends = [entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"]
        promised_bytes = max(ends, default=0) + 0
    except (AttributeError, TypeError, KeyError, IndexError):
        return
    if promised_bytes != data_bytes:
        what = "truncated" if data_bytes < promised_bytes else "extended or damaged"
        raise CheckpointError(
            f"{source}: {what}: its header lists {promised_bytes} bytes of data, the file has {data_bytes}; "
            "use an intact copy"
        )


def _check_structure(source: str) -> None:
    try:
        import safetensors
    except ImportError as error:
        raise ImportError("reading weights needs the package safetensors: pip install safetensors") from error
    try:
        with safetensors.safe_open(source, framework="np"):
            pass
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{source}: not a valid safetensors file: {error}; use an intact copy") from None


def _read_hashed(file: FileIO, buffer: memoryview, sha256: Any, source: str) -> None:
    begin = 0
    while begin < len(buffer):
        try:
            count = file.readinto(buffer[begin : begin + _CHUNK_BYTES])
        except OSError as error:
            raise CheckpointError(f"{source}: cannot be read: {error.strerror}; is the disk in order?") from error
        if not count:
            raise CheckpointError(f"{source}: became shorter while it was read; is it being written right now?")
        sha256.update(buffer[begin : begin + count])
        begin += count


def _with_complex(arrays: dict[str, np.ndarray], metadata: dict[str, str], source: str) -> dict[str, np.ndarray]:
    try:
        for name in json.loads(metadata.get(_COMPLEX_KEY, "[]")):
            arrays[name] = arrays[name].view(_COMPLEX128).reshape(arrays[name].shape[:-1])
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{source}: its metadata {_COMPLEX_KEY!r} does not fit its arrays: {error}") from None
    return arrays
