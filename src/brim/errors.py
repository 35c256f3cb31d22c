"""Every error class of brim: each is also the built-in error that a caller would catch.

A message says what was expected, what came, and what to do next.
"""

from __future__ import annotations

from typing import Any

__all__ = [
    "BrimError",
    "BudgetExceeded",
    "BudgetSyntaxError",
    "CheckpointError",
    "DTypeError",
    "DataError",
    "DeviceError",
    "ShapeError",
    "SpillDetected",
    "SwapDetected",
    "TraceError",
]


class BrimError(Exception):
    """Base of all errors that brim raises on purpose."""


class ShapeError(BrimError, ValueError):
    """Shapes that do not fit together, or an axis that does not exist."""


class DTypeError(BrimError, TypeError):
    """A dtype that an operation does not accept."""


class DeviceError(BrimError, RuntimeError):
    """A device that is missing, or tensors of different devices in one operation."""


class TraceError(BrimError, RuntimeError):
    """Something that cannot be part of a planned step."""


class CheckpointError(BrimError, ValueError):
    """A checkpoint that is missing, truncated, tampered with, or made for another model."""


class DataError(BrimError, ValueError):
    """A data file that is missing, malformed, or not what its name says."""


class BudgetSyntaxError(BrimError, ValueError):
    """A memory budget that cannot be read, or asks for what none may: nothing, over 100 %, more than an outer one."""


class BudgetExceeded(BrimError, MemoryError):
    """A memory request or a planned step that does not fit its budget; nothing was allocated for it.

    ``report`` is a :class:`brim.memory.report.MemoryReport` (or None): plain numbers and texts, never an array, so the
    error can be pickled, sent between processes, and kept without keeping memory alive.
    """

    def __init__(self, message: str, report: Any = None) -> None:
        super().__init__(message)
        self.report = report

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (str(self), self.report)


class SwapDetected(BudgetExceeded):
    """Part of this process was moved to swap: from here on it would run, but many times slower.

    ``swapped_bytes`` is how much moved out since the check before.
    """

    def __init__(self, message: str, report: Any = None, swapped_bytes: int = 0) -> None:
        super().__init__(message, report)
        self.swapped_bytes = swapped_bytes

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (str(self), self.report, self.swapped_bytes)


class SpillDetected(BudgetExceeded):
    """The driver put device memory into host memory: what lies there would be used, but many times slower.

    ``spilled_bytes`` is how much, or at least what was taken when it was noticed.
    """

    def __init__(self, message: str, report: Any = None, spilled_bytes: int = 0) -> None:
        super().__init__(message, report)
        self.spilled_bytes = spilled_bytes

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (str(self), self.report, self.spilled_bytes)
