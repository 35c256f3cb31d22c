"""The only place that turns numbers into text for people: bytes, durations."""

from __future__ import annotations

__all__ = ["format_bytes", "format_duration"]

_BINARY = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def format_bytes(count_bytes: float, *, exact: bool = False) -> str:
    """Binary units with one decimal: ``412.3 MiB``; whole bytes below one KiB, or always if exact: ``4,323,293 B``."""
    if exact:
        return f"{int(count_bytes):,} B"
    sign = "-" if count_bytes < 0 else ""
    value = abs(count_bytes)
    if value < 1024:
        return f"{sign}{int(value)} B"
    for unit in _BINARY[1:]:
        value /= 1024
        if value < 1023.95 or unit == _BINARY[-1]:
            break
    return f"{sign}{value:,.1f} {unit}"


def format_duration(elapsed_s: float) -> str:
    """``850 ms``, ``12.3 s``, ``4 min 05 s``, ``3 h 20 min``, ``54.0 days``: two significant units at most."""
    if elapsed_s < 1:
        return f"{elapsed_s * 1e3:.0f} ms"
    if elapsed_s < 60:
        return f"{elapsed_s:.1f} s"
    if elapsed_s < 3600:
        minutes, seconds = divmod(round(elapsed_s), 60)
        return f"{minutes} min {seconds:02d} s"
    if elapsed_s < 48 * 3600:
        hours, minutes = divmod(round(elapsed_s / 60), 60)
        return f"{hours} h {minutes:02d} min"
    return f"{elapsed_s / 86400:,.1f} days"
