"""Writing a file so that a crash at any instant leaves either the old file or the new one, whole.

The content goes to a hidden temporary file in the same folder, is forced to the disk, and takes the place of the old
file by one rename. What a killed process leaves behind has a name that `remove_leftovers` knows.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

__all__ = ["StrPath", "atomic_write", "remove_leftovers", "replace", "sync_folder", "temporary_path"]

StrPath = str | os.PathLike[str]

_WINDOWS = os.name == "nt"
_TEMPORARY = re.compile(r"\.brim-[0-9a-f]{16}\.tmp")
_RETRY_DELAYS_S = (0.02, 0.1, 0.5)


@contextmanager
def atomic_write(path: StrPath, mode: str = "wb") -> Iterator[IO[Any]]:
    """Open a file for writing that replaces `path` when the block ends, and leaves `path` as it was if it does not.

    A symbolic link is followed: the file it points to is replaced, the link stays. A new file gets the permissions of
    any new file (the umask), a replaced one keeps those it had. Without an error, the content is on the disk at the end
    of the block.

    Arguments:
        path: the file to create or replace; its folder must exist.
        mode: ``"wb"``, or ``"w"`` for UTF-8 text with ``\\n`` line ends.

    Returns:
        A context manager that gives the open file.

    Raises:
        ValueError: another mode.
        OSError: the disk is full, permission is missing, or `path` is not a regular file. The old file is untouched and
            no temporary file is left.
    """
    if mode not in ("wb", "w"):
        raise ValueError(f"mode: expected 'wb' or 'w', got {mode!r}; a file that is replaced whole is only written")
    target = Path(os.path.realpath(path))
    old_permissions = _permissions_of_regular_file(target)
    temporary = temporary_path(target.parent)
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    try:
        text = mode == "w"
        with os.fdopen(handle, mode, encoding="utf-8" if text else None, newline="\n" if text else None) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if old_permissions is not None:
            os.chmod(temporary, old_permissions)
        replace(temporary, target)
    except BaseException as error:  # also on Ctrl-C: nothing may be left behind
        with suppress(OSError):
            os.unlink(temporary)
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            error.filename = os.fspath(path)  # "No space left on device" alone would not say where
        raise
    sync_folder(target.parent)


def _permissions_of_regular_file(target: Path) -> int | None:
    try:
        mode = os.stat(target).st_mode
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "Expected the path of a file, got a folder", str(target))
    if not stat.S_ISREG(mode):  # renaming over /dev/null would destroy it
        raise OSError(errno.EINVAL, "Expected a regular file, got a device, pipe or socket", str(target))
    return stat.S_IMODE(mode)


def temporary_path(folder: Path) -> Path:
    """A hidden path in `folder` that no other writer uses and that `remove_leftovers` recognises."""
    return folder / f".brim-{secrets.token_hex(8)}.tmp"


def replace(source: StrPath, target: StrPath) -> None:
    """`os.replace`, tried again for a moment on Windows, where a virus scanner or indexer may hold the file open."""
    for delay_s in _RETRY_DELAYS_S if _WINDOWS else ():
        try:
            os.replace(source, target)
            return
        except PermissionError:
            time.sleep(delay_s)
    os.replace(source, target)


def sync_folder(folder: StrPath) -> None:
    """Force the names in `folder` to the disk, where the operating system and the file system can do that."""
    if _WINDOWS:  # folders cannot be opened there
        return
    try:
        handle = os.open(folder, os.O_RDONLY)
    except PermissionError:  # a folder one may write to but not list
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems do not offer it
            raise
    finally:
        os.close(handle)


def remove_leftovers(folder: StrPath, older_than_s: float = 0.0) -> None:
    """Remove what killed writers left in `folder`: temporary files and folders of `temporary_path`, nothing else.

    Arguments:
        folder: where to look (not below it).
        older_than_s: spare what was changed more recently, in seconds: another process may be writing it.
    """
    now_s = time.time()
    with os.scandir(folder) as entries:
        leftovers = [entry for entry in entries if _TEMPORARY.fullmatch(entry.name)]
    for entry in leftovers:
        with suppress(OSError):  # gone already, or held open by someone: the next call tries again
            if now_s - entry.stat(follow_symlinks=False).st_mtime < older_than_s:
                continue
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path)
            else:
                os.unlink(entry.path)
