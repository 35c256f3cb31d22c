"""Where the files of a published data set are: folders to look in, addresses and checksums to download from.

A source is a fact sheet. Finding its files never touches the network; downloading happens only in `fetch`, and only
when a caller asked for it.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from brim.errors import DataError

__all__ = ["FASHION_MNIST", "MNIST", "SYSTEM_FOLDERS", "Source", "fetch", "find", "user_cache"]

# Where packages put data sets; Debian's dataset-fashion-mnist uses the first.
SYSTEM_FOLDERS: tuple[Path, ...] = tuple(
    dict.fromkeys(
        Path(folder)
        for folder in (
            "/usr/share/datasets",
            "/usr/share/brim",
            "/usr/local/share/datasets",
            "/usr/local/share/brim",
            Path(sys.prefix) / "share" / "brim",
        )
    )
)


@dataclass(frozen=True)
class Source:
    """A published data set of four idx files.

    Attributes:
        name: its folder's name and the name users type.
        title: its name in messages.
        torchvision_folder: where torchvision puts it under a root.
        md5: each file's published checksum (of the gzip file as published; repacked copies hold the same data).
        urls: where the files are, tried in turn.
        first_labels: the first labels of the train and the test file: other data sets use the same file names.
        mean, std: of all training pixels after division by 255.
        class_names: in order.
        package_hint: another way to get it.
    """

    name: str
    title: str
    torchvision_folder: str
    md5: dict[str, str]
    urls: tuple[str, ...]
    first_labels: tuple[tuple[int, ...], tuple[int, ...]]
    mean: float
    std: float
    class_names: tuple[str, ...]
    package_hint: str = ""


FASHION_MNIST = Source(
    name="fashion-mnist",
    title="Fashion-MNIST",
    torchvision_folder="FashionMNIST/raw",
    md5={
        "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
        "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
        "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
    },
    urls=(
        "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    ),
    first_labels=((9, 0, 0, 3, 0, 2, 7, 2, 5, 5), (9, 2, 1, 1, 6, 1, 4, 6, 5, 7)),
    mean=0.2860,
    std=0.3530,
    class_names=(
        "T-shirt/top",
        "Trouser",
        "Pullover",
        "Dress",
        "Coat",
        "Sandal",
        "Shirt",
        "Sneaker",
        "Bag",
        "Ankle boot",
    ),
    package_hint="on Debian and Ubuntu: apt install dataset-fashion-mnist",
)

MNIST = Source(
    name="mnist",
    title="MNIST",
    torchvision_folder="MNIST/raw",
    md5={
        "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
        "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
        "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
        "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
    },
    urls=("https://ossci-datasets.s3.amazonaws.com/mnist/", "https://storage.googleapis.com/cvdf-datasets/mnist/"),
    first_labels=((5, 0, 4, 1, 9, 2, 1, 3, 1, 4), (7, 2, 1, 0, 4, 1, 4, 9, 5, 9)),
    mean=0.1307,
    std=0.3081,
    class_names=tuple("0123456789"),
)


def user_cache() -> Path:
    """brim's folder in the user's cache: ``XDG_CACHE_HOME`` where set, else what the platform uses."""
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    if xdg and os.path.isabs(xdg):  # the XDG specification says to ignore relative paths
        return Path(xdg) / "brim"
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA")
        return (Path(local) if local else Path.home() / "AppData" / "Local") / "brim" / "Cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "brim"
    return Path.home() / ".cache" / "brim"


def find(source: Source, root: str | os.PathLike[str] | None = None) -> tuple[dict[str, Path], list[str]]:
    """The four files of a source, all from one folder.

    Looked in, in this order: ``root``, the environment variable ``BRIM_DATA``, the system's folders, the user's cache.
    A folder that the user named may have the files in itself, in ``source.name`` or where torchvision puts them; the
    others have them in ``source.name``. A file may be gzipped or not.

    Returns:
        ``(files, report)``: the path of each file by its published name, empty if no folder has all four; and a line
        for each folder looked in.
    """
    named = [("root", root)] if root is not None else []
    if given := os.environ.get("BRIM_DATA"):
        named.append(("BRIM_DATA", given))
    places: list[tuple[str, Path]] = []
    for origin, folder in named:
        base = Path(folder).expanduser()
        places += [(origin, base / source.name), (origin, base / source.torchvision_folder), (origin, base)]
    places += [("system", folder / source.name) for folder in SYSTEM_FOLDERS]
    places.append(("user cache", user_cache() / source.name))
    report: list[str] = []
    for origin, place in places:
        files = {name: path for name in source.md5 if (path := _present(place, name)) is not None}
        if len(files) == len(source.md5):
            return files, report
        if not place.is_dir():
            state = "no such folder"
        elif files:
            state = f"lacks {', '.join(name for name in source.md5 if name not in files)}"
        else:
            state = "has none of the files"
        report.append(f"{place} ({origin}): {state}")
    return {}, report


def _present(folder: Path, name: str) -> Path | None:
    for candidate in (folder / name, folder / name.removesuffix(".gz")):
        if candidate.is_file():
            return candidate
    return None


def fetch(source: Source, root: str | os.PathLike[str] | None = None) -> dict[str, Path]:
    """Fetch a source's files into ``root``, or into the user's cache, and check them against their published checksums.

    Raises:
        DataError: pooch is not installed, no address answers, or a checksum differs (nothing is kept then).
    """
    folder = (user_cache() if root is None else Path(root).expanduser()) / source.name
    try:
        import pooch
    except ImportError as error:
        raise DataError(
            f"downloading {source.title} needs pooch, which is not installed: pip install 'brim[data]'"
        ) from error
    files = {}
    for name, md5 in source.md5.items():
        failures = []
        for url in source.urls:
            try:
                files[name] = Path(pooch.retrieve(url + name, known_hash=f"md5:{md5}", fname=name, path=folder))
                break
            except (OSError, ValueError) as error:  # no connection or no such page; another checksum
                failures.append(f"  {url + name}: {error}")
        else:
            raise DataError(f"{source.title}: {name} could not be downloaded\n" + "\n".join(failures))
    return files
