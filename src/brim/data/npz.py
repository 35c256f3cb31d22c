"""Reader of NumPy's .npz files: sizes and dtypes are checked before anything is allocated, and nothing is unpickled."""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from brim.data.dataset import ArrayDataset, count_classes
from brim.data.transforms import Array, Transform
from brim.errors import DataError, DTypeError, ShapeError
from brim.spec import Spec, as_dtype

__all__ = ["npz_contents", "read_npz"]

_TARGETS = frozenset({"y", "label", "labels", "target", "targets", "y_train", "y_test"})


def npz_contents(path: str | os.PathLike[str]) -> dict[str, Spec]:
    """Name, shape and dtype of each array in an .npz file, from the headers alone.

    Raises:
        DataError: naming the file: not a zip file, damaged, or an array that cannot become a tensor (objects, text).
    """
    path = Path(path)
    specs: dict[str, Spec] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                key = member.filename.removesuffix(".npy")
                if key == member.filename:
                    raise DataError(f"{path} is not an .npz file: it contains {member.filename!r}")
                specs[key] = _member_spec(path, archive, member, key)
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} is not a readable .npz file (damaged or truncated?): {error}") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    return specs


def read_npz(
    path: str | os.PathLike[str],
    keys: Sequence[str] | None = None,
    *,
    transform: Transform | Sequence[Transform | None] | None = None,
) -> ArrayDataset:
    """A dataset from the arrays of an .npz file.

    Arguments:
        path: the file, as `numpy.savez` or `numpy.savez_compressed` writes it.
        keys: which arrays, in order: inputs first, targets last. By default all of them, in the file's order, but one
            that is called like a target (y, label, target...) last.
        transform: as in ArrayDataset.

    Returns:
        The dataset. Where the last of several arrays are class indices (see `count_classes`), they become int64.

    Raises:
        DataError: naming the file, and what it contains.
    """
    path = Path(path)
    specs = npz_contents(path)
    listing = ", ".join(f"{key} {spec}" for key, spec in specs.items()) or "nothing"
    if keys is None:
        keys = sorted(specs, key=lambda key: key.lower() in _TARGETS)  # stable: others keep the file's order
    elif isinstance(keys, str):
        raise TypeError(f"keys is a sequence of names, such as [{keys!r}], not one name")
    if missing := [key for key in keys if key not in specs]:
        raise DataError(f"{path} has no array {', '.join(map(repr, missing))}; it contains {listing}")
    if not keys:
        raise DataError(f"{path} holds no arrays")
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays: list[Array] = [archive[key] for key in keys]
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, OSError) as error:
        raise DataError(f"{path} is damaged: {error}") from error
    num_classes = count_classes(arrays[-1]) if len(arrays) > 1 else None
    if num_classes is not None:
        arrays[-1] = arrays[-1].astype(np.int64)
    try:
        return ArrayDataset(*arrays, transform=transform, num_classes=num_classes)
    except ShapeError as error:
        raise DataError(f"{path}: {error}. It contains {listing}; choose with keys=[inputs, targets]") from error


def _member_spec(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo, key: str) -> Spec:
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        if version == (1, 0):
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        elif version == (2, 0):
            shape, _, dtype = np.lib.format.read_array_header_2_0(file)
        else:  # (3, 0) is only for field names in other alphabets
            raise DataError(f"{path}: array {key!r} has named fields; store each field as an array")
        header_bytes = file.tell()
    if dtype.hasobject:
        raise DataError(
            f"{path}: array {key!r} holds Python objects; reading them means unpickling, which can run any code, so "
            f"brim refuses. Store plain numbers"
        )
    try:
        spec = Spec(shape, as_dtype(dtype))
    except DTypeError as error:
        raise DataError(f"{path}: array {key!r}: {error}") from error
    if member.file_size - header_bytes != spec.nbytes:
        raise DataError(
            f"{path}: array {key!r} ({spec}) should hold {spec.nbytes:,} bytes after its header, but holds "
            f"{member.file_size - header_bytes:,}"
        )
    return spec
