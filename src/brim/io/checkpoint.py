"""Checkpoints of a training run: folders that are complete or not there, whenever the process is killed.

    run/checkpoints/000007-last-600/model.safetensors      the arrays of one part
                                    optimizer.safetensors  of another
                                    state.json             everything else, and the size and checksum of each file

The name says: the seventh checkpoint saved in this run, of the series "last", at step 600. A checkpoint is written in a
hidden folder, forced to the disk, and gets its name by one rename; only then are older ones of its series removed. So
the newest is the one with the highest first number, there is no pointer that could be wrong, and going back to an
earlier step and on from there keeps the order. One process at a time may save into a run's folder.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from brim.errors import CheckpointError
from brim.io.arrays import read_arrays, save_arrays, verify_arrays
from brim.io.atomic import StrPath, atomic_write, remove_leftovers, replace, sync_folder, temporary_path
from brim.io.checksum import BLANK, KEY, check_sealed, seal
from brim.io.json_files import json_text, parse_json, read_bytes

__all__ = [
    "Checkpoint",
    "check_compatible",
    "latest_checkpoint",
    "list_checkpoints",
    "load_checkpoint",
    "save_checkpoint",
]

_SUBFOLDER = "checkpoints"
_STATE_FILE = "state.json"
_FORMAT = 1
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_FOLDER_NAME = re.compile(r"(\d{6,})-([A-Za-z0-9][A-Za-z0-9_.-]*)-(\d+)")
_SPARE_S = 3600.0  # in the run's folder another process may be writing something: spare what is younger
_MAX_LISTED = 20


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """What `load_checkpoint` read: `arrays_by_part` as saved, `state` as JSON returns it, where it was, which it is."""

    path: Path
    name: str
    step: int
    arrays_by_part: dict[str, dict[str, np.ndarray]]
    state: dict[str, Any]


def save_checkpoint(
    folder: StrPath,
    name: str,
    arrays_by_part: Mapping[str, Mapping[str, np.ndarray]],
    state: Mapping[str, Any],
    *,
    step: int,
    keep: int = 2,
) -> Path:
    """Save a checkpoint below `folder` and then remove the oldest of the same series, so that `keep` remain.

    Killed at any instant, it leaves the earlier checkpoints or those and the new one, each whole.

    Arguments:
        folder: the run's folder; created when missing, with a folder ``checkpoints`` in it.
        name: the series: ``"last"``, ``"best"``...; each is counted and cleaned by itself.
        arrays_by_part: part (``"model"``, ``"optimizer"``...) -> name -> array; one safetensors file per part.
        state: everything else, as `write_json` takes it.
        step: how far the training is; 0 or more.
        keep: how many of this series remain, 1 or more.

    Returns:
        The path of the new checkpoint, for `load_checkpoint`.

    Raises:
        ValueError, TypeError, DTypeError: something that cannot be stored. Nothing was written.
        OSError: it could not be written; the earlier checkpoints are untouched and nothing is left behind.
        CheckpointError: another process saves into the same folder.
    """
    _check_arguments(name, arrays_by_part, state, step, keep)
    json_text(state)  # refuse what JSON cannot hold before writing anything
    top = Path(folder) / _SUBFOLDER
    top.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder, older_than_s=_SPARE_S)
    remove_leftovers(top)
    serial = max((_serial(path) for path in _complete(top)), default=0) + 1
    path = top / f"{serial:06d}-{name}-{step}"
    temporary = temporary_path(top)
    try:
        temporary.mkdir()
        files = {}
        for part, arrays in arrays_by_part.items():
            file = temporary / f"{part}.safetensors"
            digest = save_arrays(file, arrays, {"format": "pt"})  # the mark that Hugging Face tools ask for
            files[file.name] = {"size_bytes": file.stat().st_size, "sha256": digest}
        content = {KEY: BLANK, "format": _FORMAT, "name": name, "step": step, "files": files, "state": state}
        with atomic_write(temporary / _STATE_FILE) as state_file:
            state_file.write(seal(json_text(content, indent=1).encode() + b"\n"))
        replace(temporary, path)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, FileNotFoundError):  # what this function had just made
            raise CheckpointError(
                f"{temporary}: vanished while it was written; does another process save into {folder} too?"
            ) from error
        raise
    sync_folder(top)
    sync_folder(folder)
    for old in list_checkpoints(folder, name)[keep:]:
        _remove(old)
    return path


def _check_arguments(
    name: str, arrays_by_part: Mapping[str, Mapping[str, np.ndarray]], state: Mapping[str, Any], step: int, keep: int
) -> None:
    for what, word in (("name", name), *(("part", part) for part in arrays_by_part)):
        if not isinstance(word, str) or not _NAME.fullmatch(word):
            raise ValueError(
                f"{what}: expected letters, digits, '_', '.' and '-' after a letter or digit, got {word!r}"
            )
    if len({part.lower() for part in arrays_by_part}) != len(arrays_by_part):
        raise ValueError(
            f"parts {list(arrays_by_part)}: two differ only by case, which some file systems ignore; rename one"
        )
    if not isinstance(state, Mapping):
        raise TypeError(f"state: expected a dict, got {type(state).__name__}")
    for what, number, least in (("step", step, 0), ("keep", keep, 1)):
        if isinstance(number, bool) or not isinstance(number, int | np.integer) or number < least:
            raise ValueError(f"{what}: expected a whole number, {least} or more, got {number!r}")


def _remove(path: Path) -> None:
    """Remove a checkpoint; killed on the way, what remains has no checkpoint's name. A failure is for the next save."""
    with suppress(OSError):
        hidden = temporary_path(path.parent)
        replace(path, hidden)
        shutil.rmtree(hidden)


def list_checkpoints(folder: StrPath, name: str | None = None) -> list[Path]:
    """The checkpoints of a run (of one series if `name` is given), newest first; nothing is read but folder names."""
    found = _complete(Path(folder) / _SUBFOLDER)
    if name is not None:
        found = [path for path in found if _series(path) == name]
    return sorted(found, key=_serial, reverse=True)


def latest_checkpoint(folder: StrPath, name: str | None = None) -> Path | None:
    """The newest checkpoint of a run (of one series if `name` is given), for `load_checkpoint`; None if it has none."""
    return next(iter(list_checkpoints(folder, name)), None)


def _complete(top: Path) -> list[Path]:
    if not top.is_dir():
        return []
    return [path for path in top.iterdir() if _FOLDER_NAME.fullmatch(path.name) and path.is_dir()]


def _serial(path: Path) -> int:
    match = _FOLDER_NAME.fullmatch(path.name)
    return int(match[1]) if match else 0


def _series(path: Path) -> str:
    match = _FOLDER_NAME.fullmatch(path.name)
    return match[2] if match else ""


def load_checkpoint(path: StrPath) -> Checkpoint:
    """Read one checkpoint, verifying every file of it.

    Raises:
        CheckpointError: it is missing, incomplete, damaged, edited, or mixed from several; the message names the file,
            and the newest intact checkpoint beside it.
    """
    path = Path(path)
    if not (path / _STATE_FILE).is_file() and not (path.is_dir() and _FOLDER_NAME.fullmatch(path.name)):
        newest = next(filter(None, map(latest_checkpoint, (path, path.parent, path.parent.parent))), None)
        hint = f"the newest one there is {newest}" if newest else "there is none near it"
        raise CheckpointError(f"{path}: expected the folder of one checkpoint, got something else; {hint}")
    try:
        content = _read_state(path)
        arrays_by_part = {}
        for file, entry in content["files"].items():
            _check_size(path / file, entry)
            arrays, _, digest = read_arrays(path / file)
            _check_digest(path / file, entry, digest)
            arrays_by_part[file.removesuffix(".safetensors")] = arrays
    except CheckpointError as error:
        raise CheckpointError(f"{error}\n{_intact_beside(path)}") from error
    return Checkpoint(path, content["name"], content["step"], arrays_by_part, content["state"])


def _read_state(path: Path) -> dict[str, Any]:
    source = path / _STATE_FILE
    data = read_bytes(source)
    check_sealed(data, str(source))
    content: dict[str, Any] = parse_json(data, str(source))
    if content.get("format") != _FORMAT:
        raise CheckpointError(
            f"{source}: has the format {content.get('format')!r}, this brim reads {_FORMAT}; "
            "a newer brim wrote it: upgrade"
        )
    return content


def _check_size(file: Path, entry: Mapping[str, Any]) -> None:
    size_bytes = file.stat().st_size if file.is_file() else None
    if size_bytes is None:
        raise CheckpointError(f"{file}: is missing; the checkpoint is incomplete")
    if size_bytes != entry["size_bytes"]:
        what = "truncated" if size_bytes < entry["size_bytes"] else "extended, or of another checkpoint"
        raise CheckpointError(f"{file}: {what}: has {size_bytes} bytes, was saved with {entry['size_bytes']}")


def _check_digest(file: Path, entry: Mapping[str, Any], digest: str | None) -> None:
    if digest != entry["sha256"]:
        raise CheckpointError(
            f"{file}: is whole, but not the file that was saved in this checkpoint (its checksum is "
            f"{(digest or 'missing')[:12]}, not {entry['sha256'][:12]}): files of different checkpoints were mixed"
        )


def _intact_beside(path: Path) -> str:
    siblings = sorted((other for other in _complete(path.parent) if other != path), key=_serial, reverse=True)
    for other in siblings:
        with suppress(CheckpointError):
            for file, entry in _read_state(other)["files"].items():
                _check_size(other / file, entry)
                _check_digest(other / file, entry, verify_arrays(other / file))
            return f"The newest intact checkpoint beside it: {other}"
    return f"No other intact checkpoint is in {path.parent}"


def check_compatible(
    expected: Mapping[str, tuple[tuple[int, ...], Any]],
    found: Mapping[str, tuple[tuple[int, ...], Any]],
    what: str,
) -> None:
    """Compare the names, shapes and dtypes of a model or optimizer with those of a file, and list every difference.

    Arguments:
        expected: name -> (shape, dtype) of the object to be filled; dtype None accepts any (the caller converts).
        found: name -> (shape, dtype) in the file.
        what: what is being loaded from where, the beginning of the message.

    Raises:
        CheckpointError: missing or unexpected names, other shapes or dtypes: all of them, each kind cut after 20.
    """
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected]
    shapes, dtypes = [], []
    for name in expected:
        if name not in found:
            continue
        (shape, dtype), (found_shape, found_dtype) = expected[name], found[name]
        if tuple(shape) != tuple(found_shape):
            shapes.append(f"{name}: expected {tuple(shape)}, found {tuple(found_shape)}")
        elif dtype is not None and str(dtype) != str(found_dtype):
            dtypes.append(f"{name}: expected {dtype}, found {found_dtype}")
    kinds = (("missing", missing), ("unexpected", unexpected), ("other shape", shapes), ("other dtype", dtypes))
    if not any(items for _, items in kinds):
        return
    lines = [f"{what}: does not fit: " + ", ".join(f"{len(items)} {kind}" for kind, items in kinds if items)]
    for kind, items in kinds:
        lines += [f"  {kind}: {item}" for item in items[:_MAX_LISTED]]
        if len(items) > _MAX_LISTED:
            lines.append(f"  {kind}: ... and {len(items) - _MAX_LISTED} more")
    lines.append(_remedy(missing, unexpected))
    raise CheckpointError("\n".join(lines))


def _remedy(missing: list[str], unexpected: list[str]) -> str:
    """The next step: wrappers such as DataParallel (``module.``) prefix every name, which is worth recognising."""
    for name in missing[:1]:
        for other in unexpected:
            prefix = other.removesuffix(name)
            if prefix.endswith(".") and {prefix + key for key in missing} <= set(unexpected):
                return (
                    f"All missing names are there with the prefix {prefix!r}: remove it from the names and load again"
                )
    return "Load a file that was made for the same architecture, or build the model with the sizes above"
