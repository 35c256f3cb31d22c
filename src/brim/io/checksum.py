"""The checksum that every brim file carries inside itself, and the one rule for computing it.

It is the SHA-256 of the whole file, from its first byte to its last, taken while the 64 digits of the checksum
themselves read ``0``. So it covers names, shapes and metadata as well as data, and needs no second file.
"""

from __future__ import annotations

import hashlib
import re

from brim.errors import CheckpointError

__all__ = ["BLANK", "KEY", "check_sealed", "find_digest", "mismatch", "seal"]

KEY = "brim.sha256"
BLANK = "0" * 64
_STORED = re.compile(rb'"brim\.sha256": ?"([^"]*)"')


def find_digest(head: bytes | bytearray) -> tuple[str, int] | None:
    """The first stored checksum in `head` and its position in bytes; None where there is none."""
    match = _STORED.search(head)
    return None if match is None else (match[1].decode("latin-1"), match.start(1))


def seal(data: bytes) -> bytes:
    """A whole file's content in which the first checksum, written as `BLANK`, is replaced by the true one."""
    position = data.index(BLANK.encode())
    digest = hashlib.sha256(data).hexdigest().encode()
    return data[:position] + digest + data[position + len(digest) :]


def check_sealed(data: bytes, source: str) -> str:
    """Verify a whole file's content and return its checksum.

    Raises:
        CheckpointError: no checksum, or another one than the content has.
    """
    found = find_digest(data)
    if found is None:
        raise CheckpointError(f"{source}: carries no {KEY!r}; it is truncated, or not a file that brim wrote")
    stored, position = found
    blank = data[:position] + BLANK.encode()[: len(stored)] + data[position + len(stored) :]
    computed = hashlib.sha256(blank).hexdigest()
    if computed != stored:
        raise mismatch(source, stored, computed)
    return stored


def mismatch(source: str, stored: str, computed: str, remedy: str = "use an intact copy") -> CheckpointError:
    """The error for a file whose content does not have the checksum that it carries."""
    return CheckpointError(
        f"{source}: was changed or damaged after brim wrote it: it carries the SHA-256 {stored[:12]}..., "
        f"its content has {computed[:12]}...; {remedy}"
    )
