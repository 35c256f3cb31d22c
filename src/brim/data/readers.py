"""The data sets that brim knows by name, and `load`, which takes a name or a file and gives training and test data."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Literal

import numpy as np

from brim.data.dataset import ArrayDataset, train_validation_split
from brim.data.idx import read_idx
from brim.data.npz import npz_contents, read_npz
from brim.data.sources import FASHION_MNIST, MNIST, Source, fetch, find
from brim.data.tables import read_csv
from brim.data.transforms import Cast, Normalize, Transform
from brim.errors import DataError

__all__ = ["DATASETS", "load", "load_digits", "load_fashion_mnist", "load_mnist"]

Path_ = str | os.PathLike[str]
Download = bool | Literal["auto"]
Pair = tuple[ArrayDataset, ArrayDataset]

_DIGITS_TEST = 360  # of 1,797
_DIGITS_SEED = 0
_TABLE_SUFFIXES = (".csv", ".tsv", ".txt", ".csv.gz", ".tsv.gz", ".txt.gz")


def load_digits() -> Pair:
    """UCI handwritten digits, packaged with brim: 1,437 training and 360 test images, 8x8 pixels, ten classes.

    Images have shape (1, 8, 8); stored as uint8 from 0 to 16, read as float32 from 0 to 1. The split is always the
    same: drawn by seed 0 with the same share of every digit. Source: E. Alpaydin and C. Kaynak (1998), Optical
    Recognition of Handwritten Digits, UCI Machine Learning Repository, https://doi.org/10.24432/C50P49, CC BY 4.0.

    Returns:
        ``(train, test)``.
    """
    with resources.as_file(resources.files("brim.data") / "files" / "digits.csv.gz") as path:
        pixels, labels = read_csv(path, dtype=np.uint8, header=False, classes=True).arrays
    digits = ArrayDataset(
        pixels.reshape(-1, 1, 8, 8), labels, transform=Normalize(scale=1 / 16), class_names=list("0123456789")
    )
    return train_validation_split(digits, _DIGITS_TEST / len(digits), _DIGITS_SEED, stratify=True)


def load_fashion_mnist(root: Path_ | None = None, download: Download = False) -> Pair:
    """Fashion-MNIST: 60,000 training and 10,000 test images of clothes, 28x28 pixels, ten classes (Xiao et al. 2017).

    Images have shape (1, 28, 28); stored as uint8, read as float32 with mean 0 and deviation 1 over the training set.

    Arguments:
        root: a folder that has the four files, or has them in ``fashion-mnist/``. Looked in next: the folder that the
            environment variable ``BRIM_DATA`` names, the system's data folders, the user's cache.
        download: ``"auto"`` (or True) fetches the files if none of these has them, into ``root/fashion-mnist`` or the
            user's cache; needs the extra ``brim[data]``.

    Returns:
        ``(train, test)``.

    Raises:
        DataError: not found (listing every place and what to do), damaged, or not this data set: naming the file.
    """
    return _load_idx(FASHION_MNIST, root, download)


def load_mnist(root: Path_ | None = None, download: Download = False) -> Pair:
    """MNIST: 60,000 training and 10,000 test images of handwritten digits, 28x28 pixels (LeCun et al. 1998).

    Arguments, returns and errors as in `load_fashion_mnist`, with ``mnist`` as the folder's name.
    """
    return _load_idx(MNIST, root, download)


DATASETS: dict[str, Callable[[Path_ | None, Download], Pair]] = {
    "digits": lambda root, download: load_digits(),
    FASHION_MNIST.name: load_fashion_mnist,
    MNIST.name: load_mnist,
}


def load(
    name_or_path: Path_,
    root: Path_ | None = None,
    *,
    download: Download = "auto",
    held_out: float = 0.2,
    seed: int = 0,
    target: str | int = "last",
    standardize: bool = False,
) -> Pair:
    """Training and test data by the name of a data set, or from a .csv or .npz file.

    An .npz file with x_train, y_train, x_test and y_test gives these. Of other files a share is held out for the test,
    the same share of each class. uint8 inputs are read as float32 from 0 to 1, floats as float32, integers as they are.

    Arguments:
        name_or_path: "digits", "fashion-mnist", "mnist", or a file: .csv, .tsv, .txt (gzipped or not), .npz.
        root: where to look for a named data set (see load_fashion_mnist), or the folder of a relative path.
        download: whether a named data set that is nowhere to be found is fetched.
        held_out: share of a file's samples that become the test part.
        seed: of that draw.
        target: the column to predict in a table (see read_csv).
        standardize: bring each column or channel of a file to mean 0 and deviation 1 over the training part.

    Returns:
        ``(train, test)``.

    Raises:
        DataError: unknown name (listing the known ones), no such file, or a file that cannot be read.
    """
    given = os.fspath(name_or_path)
    if given in DATASETS:
        return DATASETS[given](root, download)
    path = _existing_file(given, root)
    if path.name.lower().endswith(_TABLE_SUFFIXES):
        train, test = train_validation_split(read_csv(path, target), held_out, seed)
    elif path.suffix.lower() == ".npz":
        train, test = _split_npz(path, held_out, seed)
    else:
        raise DataError(f"{path}: brim reads {', '.join(_TABLE_SUFFIXES)} and .npz files")
    transform = _reading(train, standardize)
    return train.with_transform(transform), test.with_transform(transform)


def _split_npz(path: Path, held_out: float, seed: int) -> Pair:
    by_name = {key.lower(): key for key in npz_contents(path)}
    parts = [by_name.get(name, "") for name in ("x_train", "y_train", "x_test", "y_test")]
    if not all(parts):
        return train_validation_split(read_npz(path), held_out, seed)
    train, test = read_npz(path, parts[:2]), read_npz(path, parts[2:])
    x_test, y_test = test.arrays
    y_train = train.arrays[1]
    if x_test.shape[1:] != train.arrays[0].shape[1:] or y_test.shape[1:] != y_train.shape[1:]:
        raise DataError(f"{path}: the samples of the training and the test arrays have different shapes")
    if train.num_classes is None:
        return train, test
    if y_test.dtype.kind not in "iu" or (y_test.size and not 0 <= y_test.min() <= y_test.max() < train.num_classes):
        raise DataError(f"{path}: {parts[3]} holds values that are not classes from 0 to {train.num_classes - 1}")
    # The test part may lack a class; it is the training part that says how many there are.
    return train, ArrayDataset(x_test, y_test.astype(np.int64), num_classes=train.num_classes)


def _reading(train: ArrayDataset, standardize: bool) -> Transform | None:
    inputs = train.arrays[0]
    if standardize and inputs.ndim > 1:
        return Normalize.fit(train.field(0))
    if inputs.dtype == np.uint8:
        return Normalize(scale=1 / 255)
    return Cast("float32") if inputs.dtype.kind == "f" and inputs.dtype != np.float32 else None


def _existing_file(given: str, root: Path_ | None) -> Path:
    places = [Path(given).expanduser()]
    if root is not None:
        places.append(Path(root).expanduser() / given)
    for path in places:
        if path.is_file():
            return path
    known = ", ".join(DATASETS)
    if places[0].suffix or len(places[0].parts) > 1:
        raise DataError(f"no such file: {' nor '.join(map(str, places))} (data sets known by name: {known})")
    close = difflib.get_close_matches(given.lower().replace("_", "-"), DATASETS, n=1)
    guess = f" Did you mean {close[0]!r}?" if close else ""
    raise DataError(f"unknown data set {given!r}.{guess} Known are {known}, and the path of a .csv or .npz file")


def _load_idx(source: Source, root: Path_ | None, download: Download) -> Pair:
    if download not in (False, True, "auto"):
        raise ValueError(f"download is False or 'auto', not {download!r}")
    files, report = find(source, root)
    if not files and download:
        try:
            files = fetch(source, root)
        except DataError as error:
            raise DataError(f"{error}\n{_not_found(source, report)}") from error
    if not files:
        raise DataError(_not_found(source, report))
    train_images, train_labels, test_images, test_labels = (files[name] for name in source.md5)
    return _read_pair(source, train_images, train_labels), _read_pair(source, test_images, test_labels)


def _not_found(source: Source, report: list[str]) -> str:
    ways = [
        f"put {', '.join(source.md5)} (gzipped or not) into one of these folders;",
        "name a folder that has them, as root or in the environment variable BRIM_DATA;",
        "let brim fetch them: download='auto', after pip install 'brim[data]'.",
    ]
    if source.package_hint:
        ways.insert(2, f"{source.package_hint};")
    looked, todo = ("".join(f"\n  {line}" for line in lines) for lines in (report, ways))
    return f"{source.title} was not found. Looked in:{looked}\nDo one of these:{todo}"


def _read_pair(source: Source, images_path: Path, labels_path: Path) -> ArrayDataset:
    images, labels = read_idx(images_path), read_idx(labels_path)
    if images.dtype != np.uint8 or images.shape[1:] != (28, 28):
        raise DataError(f"{images_path}: expected uint8 images of shape (N, 28, 28), not {images.dtype} {images.shape}")
    if labels.dtype != np.uint8 or labels.ndim != 1:
        raise DataError(f"{labels_path}: expected uint8 labels of shape (N,), not {labels.dtype} {labels.shape}")
    if len(images) != len(labels) or len(images) == 0:
        raise DataError(f"{images_path} has {len(images):,} images, but {labels_path} has {len(labels):,} labels")
    if labels.max() >= len(source.class_names):
        raise DataError(f"{labels_path}: expected labels from 0 to {len(source.class_names) - 1}, found {labels.max()}")
    for other in (FASHION_MNIST, MNIST):
        if other is not source and any(labels[:10].tolist() == list(first) for first in other.first_labels):
            raise DataError(f"{labels_path} has the labels of {other.title}, not of {source.title}: the wrong folder?")
    return ArrayDataset(
        images[:, None],
        labels.astype(np.int64),
        transform=Normalize(source.mean, source.std, scale=1 / 255),
        class_names=source.class_names,
    )
