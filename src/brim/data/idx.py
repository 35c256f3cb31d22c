"""The idx format of the MNIST family: a header of magic number and sizes, then the values, big-endian; often gzipped.

Format: http://yann.lecun.com/exdb/mnist/ (two zero bytes, a type code, the number of axes, one uint32 per axis).
"""

from __future__ import annotations

import gzip
import math
import os
import struct
import zlib
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

from brim.data.transforms import Array
from brim.errors import DataError

__all__ = ["open_maybe_gzip", "read_idx"]

_TYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_GZIP_MAGIC = b"\x1f\x8b"
_MAX_DEFLATE_RATIO = 1032  # a gzip file cannot hold more than this many bytes per byte (zlib's technical notes)


def open_maybe_gzip(path: str | os.PathLike[str]) -> IO[bytes]:
    """A file's content as bytes, unpacked if it begins like a gzip file, whatever its name."""
    with open(path, "rb") as file:
        packed = file.read(2) == _GZIP_MAGIC
    return cast("IO[bytes]", gzip.open(path, "rb")) if packed else open(path, "rb")


def read_idx(path: str | os.PathLike[str]) -> Array:
    """The array in an idx file, gzipped or not.

    Arguments:
        path: the file.

    Returns:
        An array in the machine's byte order, with the shape and dtype that the header declares.

    Raises:
        DataError: naming the file: not an idx file, truncated, damaged, or longer than its header says.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        with open_maybe_gzip(path) as file:
            dtype, shape = _read_header(path, file)
            nbytes = math.prod(shape) * dtype.itemsize
            if nbytes > size * _MAX_DEFLATE_RATIO:  # before anything is allocated
                raise DataError(f"{path}: {_says(dtype, shape)}, {nbytes:,} bytes; a file of {size:,} bytes has fewer")
            flat = np.empty(nbytes, np.uint8)
            view, got = flat.data, 0
            while got < nbytes and (count := cast(Any, file).readinto(view[got:])):
                got += count
            if got < nbytes:
                raise DataError(f"{path} is truncated: {_says(dtype, shape)}, {nbytes:,} bytes, but {got:,} are there")
            if file.read(1):  # reading to the end also checks gzip's checksum
                raise DataError(f"{path} has more bytes than expected: {_says(dtype, shape)}, {nbytes:,} bytes")
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path} is damaged or truncated (gzip: {error}); delete it and fetch it again") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    return flat.view(dtype).reshape(shape).astype(dtype.newbyteorder("="), copy=False)


def _read_header(path: Path, file: IO[bytes]) -> tuple[np.dtype[Any], tuple[int, ...]]:
    magic = file.read(4)
    if len(magic) < 4 or magic[:2] != b"\0\0" or magic[2] not in _TYPES or magic[3] == 0:
        raise DataError(
            f"{path} is not an idx file: it should begin with 00 00, a type code of 08, 09 or 0b to 0e and the number "
            f"of axes; it begins with {magic.hex(' ') or 'nothing'}"
        )
    sizes = file.read(4 * magic[3])
    if len(sizes) < 4 * magic[3]:
        raise DataError(f"{path} is truncated: the header announces {magic[3]} axes and ends before their sizes")
    return np.dtype(_TYPES[magic[2]]), struct.unpack(f">{magic[3]}I", sizes)


def _says(dtype: np.dtype[Any], shape: tuple[int, ...]) -> str:
    return f"the header says {dtype.name} {' x '.join(map(str, shape))}"
