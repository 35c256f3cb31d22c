"""The budget grammar: how a memory limit is written, and what it comes to in bytes. No other file parses a budget.

========================  ====================================================================================
written                   meaning
========================  ====================================================================================
``6442450944``            bytes (int; the same digits as text mean the same)
``"6GiB"``                6 x 2^30 bytes; also B, KiB, MiB, TiB
``"6GB"``                 6 x 10^9 bytes; also kB, MB, TB
``"1.5GiB"``, ``"6 gib"`` decimals (rounded down to a whole byte), spaces and either case are fine: a budget is
                          never in bits, so case carries no meaning
``"80%"``                 of what this process can see: the smallest of memory, cgroup limits, the MIG instance, ...
``"auto"``                what is free now less some headroom; the default when nothing is given
``"off"``                 no limit; nothing else means that
``{"cpu": "2GiB", ...}``  one budget per device; as text ``cpu=2GiB,cuda:0=6GiB``; ``*`` stands for all others
========================  ====================================================================================

``"6G"`` is refused, since half of its readers see 2^30 and half 10^9.
"""

from __future__ import annotations

import operator
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from typing import Literal, TypeAlias

from brim.errors import BudgetSyntaxError
from brim.units import format_bytes

__all__ = [
    "ENVIRONMENT_VARIABLE",
    "Budget",
    "BudgetLike",
    "budget_for",
    "budget_from_environment",
    "parse_budget",
    "parse_budgets",
    "tighter",
]

ENVIRONMENT_VARIABLE = "BRIM_BUDGET"

_UNIT_BYTES = {
    "B": 1,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
    "kB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
}
_UNIT_BY_CASEFOLD = {unit.casefold(): unit for unit in _UNIT_BYTES}
_LARGEST_BYTES = 2**63 - 1
_HOW = 'Write a size such as "6GiB" (2^30) or "6GB" (10^9), a share such as "80%", "auto", or "off" for no limit.'
# 30 digits reach far beyond any memory and keep the arithmetic on hostile input short.
_AMOUNT = re.compile(
    r"(?P<sign>[+-]?)\s*(?P<number>[0-9]{1,30}(?:\.[0-9]{1,30})?|\.[0-9]{1,30})\s*(?P<unit>[^\W\d_]*|%)"
)
_DEVICE = re.compile(r"\*|[a-z][a-z0-9_]*(:[0-9]{1,6})?")
_WORDS_FOR_NO_LIMIT = {"inf", "infinity", "unlimited", "none", "no", "never", "max", "false", "disabled", "nolimit"}


@dataclass(frozen=True)
class Budget:
    """A declared limit, before it is known what it comes to on a device.

    Arguments:
        kind: ``bytes``, ``percent``, ``auto`` or ``off``.
        amount: whole bytes, or percent (0 < amount <= 100); 0 for ``auto`` and ``off``.

    ``str()`` writes it in the grammar; parsing that text gives an equal budget.
    """

    kind: Literal["bytes", "percent", "auto", "off"]
    amount: int | Decimal = 0

    def __post_init__(self) -> None:
        if self.kind == "bytes":
            object.__setattr__(self, "amount", _checked_bytes(self.amount))
        elif self.kind == "percent":
            object.__setattr__(self, "amount", _checked_percent(self.amount))
        elif self.kind not in ("auto", "off"):
            raise BudgetSyntaxError(f"budget kind {self.kind!r} is not one of bytes, percent, auto, off")
        elif self.amount != 0:
            raise BudgetSyntaxError(f"budget kind {self.kind!r} takes no amount, got {self.amount!r}")

    def __str__(self) -> str:
        if self.kind == "bytes":
            count = int(self.amount)
            exact = [f"{count // size}{unit}" for unit, size in _UNIT_BYTES.items() if count % size == 0]
            return min(reversed(exact), key=len)  # the shortest that is exact
        if self.kind == "percent":
            digits = format(Decimal(self.amount), "f")
            return (digits.rstrip("0").rstrip(".") if "." in digits else digits) + "%"
        return self.kind

    def resolve(self, total_bytes: int, available_bytes: int, headroom_bytes: int = 0) -> int | None:
        """The limit in bytes on a device, for everything that this process holds there.

        Arguments:
            total_bytes: what this process can see of the device (``HostMemory.limit_bytes``, a MIG instance, ...).
            available_bytes: what is free for it now, before it holds anything.
            headroom_bytes: what ``auto`` leaves to others.

        Returns:
            At most ``total_bytes``; None only for ``off``.
        """
        if self.kind == "off":
            return None
        if self.kind == "bytes":
            return min(int(self.amount), total_bytes)
        if self.kind == "percent":
            return int(total_bytes * Fraction(self.amount) / 100)
        return max(0, min(available_bytes - headroom_bytes, total_bytes))


BudgetLike: TypeAlias = "int | str | Budget | Mapping[str, int | str | Budget | None] | None"
"""Whatever a user may pass as ``budget=``."""

_AUTO = Budget("auto")


def parse_budget(value: BudgetLike, device: str | None = None) -> Budget:
    """One budget from what a user wrote; None means ``auto``.

    Arguments:
        value: see the table at the top of this file.
        device: whose budget to take if ``value`` has one per device, e.g. ``"cuda:0"``.

    Raises:
        BudgetSyntaxError: the text says what was expected, what came and what to write instead.
    """
    if isinstance(value, Mapping) or (isinstance(value, str) and "=" in value):
        budgets = parse_budgets(value)
        if device is None and len(budgets) > 1:
            raise BudgetSyntaxError(
                f"budget {_quoted(value)} is one per device, but one for a single device is wanted here: "
                f'write for example "{next(iter(budgets.values()))}"'
            )
        return budget_for(budgets, device or "*")
    return _parse_one(value)


def parse_budgets(value: BudgetLike) -> dict[str, Budget]:
    """Budgets by device name; key ``"*"``, always there, is for the devices that are not named (``auto`` if not given).

    Arguments:
        value: see the table at the top of this file.

    Raises:
        BudgetSyntaxError: as :func:`parse_budget`; also a device named twice or a name that cannot be a device.
    """
    items: list[tuple[object, object]]
    if isinstance(value, Mapping):
        items = list(value.items())
    elif isinstance(value, str) and "=" in value:
        items = [_device_item(part, value) for part in value.split(",")]
    else:
        return {"*": _parse_one(value)}
    budgets: dict[str, Budget] = {}
    for key, one in items:
        device = str(key).strip().lower()
        if not _DEVICE.fullmatch(device):
            raise BudgetSyntaxError(f'{_quoted(str(key))} is no device name: write "cpu", "cuda", "cuda:0" or "*"')
        if device in budgets:
            raise BudgetSyntaxError(f"two budgets for device {device!r}: keep one")
        try:
            budgets[device] = _parse_one(one)
        except BudgetSyntaxError as error:
            raise BudgetSyntaxError(f"device {device!r}: {error}") from None
    budgets.setdefault("*", _AUTO)
    return budgets


def budget_for(budgets: Mapping[str, Budget], device: str) -> Budget:
    """The budget of one device: by full name, else by type (``cuda`` covers ``cuda:0``), else ``"*"``, else auto."""
    device = device.strip().lower()
    kind, _, index = device.partition(":")
    for name in (device, kind if index else f"{kind}:0", "*"):
        if name in budgets:
            return budgets[name]
    return _AUTO


def budget_from_environment(environ: Mapping[str, str] = os.environ) -> dict[str, Budget]:
    """Budgets from the variable ``BRIM_BUDGET`` (same grammar); ``{"*": auto}`` where it is not set.

    Raises:
        BudgetSyntaxError: names the variable.
    """
    text = environ.get(ENVIRONMENT_VARIABLE)
    if text is None:
        return {"*": _AUTO}
    try:
        return parse_budgets(text)
    except BudgetSyntaxError as error:
        raise BudgetSyntaxError(f"environment variable {ENVIRONMENT_VARIABLE}={_quoted(text)}: {error}") from None


def tighter(outer_bytes: int | None, inner_bytes: int | None, inner: Budget | None = None) -> int | None:
    """The limit inside a nested budget: the inner one, which may lower the outer one and never raise it.

    Arguments:
        outer_bytes: resolved limit outside, None for no limit.
        inner_bytes: resolved limit inside, None for no limit.
        inner: the inner budget as declared. ``auto`` asks for no certain amount, so it is lowered without complaint.

    Raises:
        BudgetSyntaxError: the inner limit would raise the outer one (a ValueError).
    """
    if outer_bytes is None:
        return inner_bytes
    if inner_bytes is not None and inner_bytes <= outer_bytes:
        return inner_bytes
    if inner is not None and inner.kind == "auto":
        return outer_bytes
    if inner_bytes is None:
        raise BudgetSyntaxError(
            f"an inner budget may only lower the outer one: 'off' would lift the limit of {format_bytes(outer_bytes)}; "
            "take the inner budget out, or declare 'off' at the outermost place"
        )
    exact = format_bytes(inner_bytes) == format_bytes(outer_bytes)
    raise BudgetSyntaxError(
        "an inner budget may only lower the outer one: "
        f"{format_bytes(inner_bytes, exact=exact)} is more than {format_bytes(outer_bytes, exact=exact)}; "
        "lower the inner budget, or raise the outer one"
    )


def _parse_one(value: object) -> Budget:
    """One budget that is not per device."""
    if value is None:
        return _AUTO
    if isinstance(value, Budget):
        return value
    if isinstance(value, str):
        return _parse_text(value)
    if isinstance(value, bool):
        raise BudgetSyntaxError(f"budget {value} is a truth value, not a size. {_HOW}")
    if isinstance(value, (float, Decimal, Fraction)):
        raise BudgetSyntaxError(_about_fraction(value))
    return Budget("bytes", _checked_bytes(value))


def _parse_text(text: str) -> Budget:
    word = text.strip().casefold()
    if not word:
        raise BudgetSyntaxError(f"the budget is empty. {_HOW}")
    if word == "auto":
        return _AUTO
    if word == "off":
        return Budget("off")
    if word.lstrip("+-") == "nan":
        raise BudgetSyntaxError(f"budget {_quoted(text)} is not a number. {_HOW}")
    if word.lstrip("+-") in _WORDS_FOR_NO_LIMIT:
        raise BudgetSyntaxError(f'budget {_quoted(text)}: only "off" removes the limit. {_HOW}')
    match = _AMOUNT.fullmatch(text.strip())
    if match is None:
        hint = " Write the decimal point as '.', without thousands separators." if "," in text or "_" in text else ""
        raise BudgetSyntaxError(f"budget {_quoted(text)} is not understood.{hint} {_HOW}")
    sign, digits, unit = match["sign"], match["number"], match["unit"]
    number = Decimal(digits)
    if sign == "-" and number:
        raise BudgetSyntaxError(f"budget {_quoted(text)} is negative. {_HOW}")
    if not number:
        raise BudgetSyntaxError(f"budget {_quoted(text)} leaves no memory at all. {_HOW}")
    if unit == "%":
        return Budget("percent", number)
    if unit.casefold() in {"k", "m", "g", "t", "ki", "mi", "gi", "ti"}:
        raise BudgetSyntaxError(_two_readings(text, number, unit))
    name = _UNIT_BY_CASEFOLD.get(unit.casefold()) if unit else "B"
    if name is None:
        raise BudgetSyntaxError(
            f"budget {_quoted(text)}: unknown unit {unit!r}, known are {', '.join(_UNIT_BYTES)} and %"
        )
    size = Fraction(number) * _UNIT_BYTES[name]
    if size < 1 or (name == "B" and size.denominator != 1):
        raise BudgetSyntaxError(f"budget {_quoted(text)} is a fraction of a byte. {_HOW}")
    return Budget("bytes", int(size))  # down: a limit is never more than what was written


def _two_readings(text: str, number: Decimal, unit: str) -> str:
    """``6G`` may mean 2^30 or 10^9: name both with their bytes."""
    prefix = unit[0].upper()
    readings = []
    for name in (f"{prefix}iB", f"{'k' if prefix == 'K' else prefix}B"):
        count = int(Fraction(number) * _UNIT_BYTES[name])
        readings.append(f'"{number:f}{name}" is {format_bytes(count, exact=True)}')
    return f"budget {_quoted(text)} can be read in two ways: {' and '.join(readings)}. Write the one you mean."


def _about_fraction(value: float | Decimal | Fraction) -> str:
    """Why a number that is not an int is refused, and what was probably meant."""
    if value != value:
        return f"budget {value} is not a number. {_HOW}"
    if value in (float("inf"), float("-inf")):
        return f'budget {value}: only "off" removes the limit. {_HOW}'
    if 0 < value <= 1:
        return f'budget {value} is a fraction of a byte; for a share of the memory write "{float(value) * 100:g}%"'
    whole = int(value)
    if value == whole and abs(whole) <= _LARGEST_BYTES:
        return f"budget {value} is a float, and bytes are whole numbers: write {whole} or a text. {_HOW}"
    return f"budget {value} is not a whole number of bytes. {_HOW}"


def _checked_bytes(value: object) -> int:
    if isinstance(value, bool):
        raise BudgetSyntaxError(f"budget {value} is a truth value, not a size. {_HOW}")
    try:
        count = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise BudgetSyntaxError(f"budget of type {type(value).__name__} is not understood. {_HOW}") from None
    if count < 0:
        raise BudgetSyntaxError(f"budget {format_bytes(max(count, -_LARGEST_BYTES), exact=True)} is negative. {_HOW}")
    if count == 0:
        raise BudgetSyntaxError(f"budget 0 leaves no memory at all. {_HOW}")
    if count > _LARGEST_BYTES:
        raise BudgetSyntaxError(f'the budget is larger than any memory; only "off" removes the limit. {_HOW}')
    return count


def _checked_percent(value: object) -> Decimal:
    try:
        if isinstance(value, bool):
            raise TypeError
        share = value if isinstance(value, Decimal) else Decimal(str(value))
    except (InvalidOperation, TypeError):
        raise BudgetSyntaxError(f"budget share {value!r} is not a number of percent. {_HOW}") from None
    if not share.is_finite() or share <= 0:
        raise BudgetSyntaxError(f"budget {share}% is no share of the memory: it must be over 0 % and at most 100 %")
    if share > 100:
        raise BudgetSyntaxError(
            f"budget {share:f}% is more than there is: it must be over 0 % and at most 100 %. {_HOW}"
        )
    return share


def _device_item(part: str, whole: str) -> tuple[str, str]:
    """``cuda:0=6GiB`` -> (``cuda:0``, ``6GiB``)."""
    device, equals, text = part.partition("=")
    if not equals:
        raise BudgetSyntaxError(
            f"budget {_quoted(whole)}: {_quoted(part.strip())} names no device; write for example "
            '"cpu=2GiB,cuda:0=6GiB", and "*=..." for all other devices'
        )
    return device, text


def _quoted(value: object) -> str:
    """The value as the user wrote it, cut to a length that leaves the message readable."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
