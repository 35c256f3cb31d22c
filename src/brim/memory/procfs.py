"""Reading the small text files of Linux's ``/proc`` and ``/sys``: missing means silent, sizes come out in bytes."""

from __future__ import annotations

import re
from pathlib import Path

__all__ = ["host_path", "kib_lines", "limit_number", "read_text", "stat_lines", "unescaped"]


def read_text(path: Path) -> str:
    """Text of a file; empty where it is missing or closed to us, which in these trees means "says nothing"."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def limit_number(text: str) -> int | None:
    """A limit file's bytes; None for ``max``, -1 and an empty file."""
    text = text.strip()
    return int(text) if text.isdecimal() else None


def stat_lines(text: str) -> dict[str, int]:
    """``name 123`` lines, as in memory.stat."""
    pairs = (line.split() for line in text.splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdecimal()}


def kib_lines(text: str) -> dict[str, int]:
    """``Name:  123 kB`` lines, as in meminfo and status, in bytes (the kernel's kB is 1024 bytes)."""
    return {name: int(kib) * 1024 for name, kib in re.findall(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE)}


def unescaped(field: str) -> str:
    """A path of mountinfo, which writes space, tab, newline and backslash as octal numbers."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)


def host_path(root: Path, absolute: str) -> Path:
    """An absolute path of the machine that lies below ``root``."""
    return root / absolute.lstrip("/")
