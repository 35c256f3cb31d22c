"""brim's native library through ctypes: which variant is loaded, and its functions with bound arguments.

``BRIM_NATIVE=0`` leaves it out, then every op runs its NumPy kernel; the name of a variant (``x86-64-v3``) asks for
that one. Without a library nothing here fails: ``available()`` is False and ``status()`` says why.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from brim.backend import ScalarCell, join_neighbours
from brim_cpu import native_build
from brim_cpu.processors import checked_threads, default_threads

__all__ = ["Call", "Function", "available", "chained", "get_threads", "pointer", "set_threads", "status"]

_lock = threading.RLock()
_threads: int | None = None  # what set_threads chose
_library: ctypes.CDLL | None = None
_status = ""


def available() -> bool:
    """Whether native kernels run; the first call loads (in a checkout perhaps compiles) the library."""
    return _load() is not None


def status() -> str:
    """One line for ``brim info``: the variant that runs, or why there is none."""
    _load()
    return _status


def set_threads(count: int) -> None:
    """Run native kernels on so many threads, the caller's among them. Raises ValueError."""
    global _threads
    with _lock:
        _threads = checked_threads(count)
        if _library is not None:
            _library.brim_set_threads(ctypes.c_int64(_threads))


def get_threads() -> int:
    """How many threads native kernels run on."""
    return default_threads() if _threads is None else _threads


def pointer(array: np.ndarray[Any, Any]) -> int:
    """Address of an array's first element."""
    return int(array.__array_interface__["data"][0])


_TYPES: dict[str, Any] = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "f": ctypes.c_float, "d": ctypes.c_double}


class _Word(ctypes.Union):
    """An argument as calls.cpp reads it; the field is the letter of its type."""

    _fields_ = list(_TYPES.items())


class _Bound(ctypes.Structure):
    _fields_ = [("caller", ctypes.c_void_p), ("function", ctypes.c_void_p), ("words", ctypes.c_void_p)]


_BOUND_BYTES = ctypes.sizeof(_Bound)


class Call:
    """A native function with its arguments; calling it converts nothing and holds no lock of Python's.

    Attributes:
        keeps: what the arguments point to.
        renewals: functions without arguments, called before each run: they write numbers that change from run to run.
        checks: functions without arguments, called where the native function asked to stop (``stop_calls`` in
            common.hpp), in place of what would come next: they say why, by an exception.
    """

    __slots__ = ("_address", "_run", "_words", "bound", "checks", "keeps", "renewals")

    def __init__(self, run: Any, bound: _Bound, words: Any, keeps: tuple[Any, ...]) -> None:
        self._run, self._words, self.bound, self.keeps = run, words, bound, keeps
        self._address = ctypes.addressof(bound)
        self.renewals: list[Callable[[], None]] = []
        self.checks: list[Callable[[], None]] = []

    def __call__(self) -> None:
        for renew in self.renewals:
            renew()
        if self._run(self._address, 1) < 0:
            for check in self.checks:
                check()


def chained(calls: Sequence[Callable[[], None]]) -> list[Callable[[], None]]:
    """The same calls, neighbours of the native library joined into one call each."""
    return join_neighbours(calls, lambda call: isinstance(call, Call), _chain)


def _chain(calls: Sequence[Call]) -> Callable[[], None]:
    table = (_Bound * len(calls))(*(call.bound for call in calls))
    run, start, count = calls[0]._run, ctypes.addressof(table), len(calls)
    renewals = [renew for call in calls for renew in call.renewals]

    def chain() -> None:
        for renew in renewals:
            renew()
        done = 0
        while done < count:  # it comes back to let Ctrl-C through
            made = run(start + done * _BOUND_BYTES, count - done)
            if made < 0:  # the call after the first -1 - made asked to stop
                for check in calls[done - 1 - made].checks:
                    check()
                return
            done += made

    chain.keeps = (table, *calls)  # type: ignore[attr-defined]
    return chain


class Function:
    """A function of the library, declared once: ``Function("brim_softmax_f32", "ppii")``.

    Arguments:
        name: the exported name.
        signature: a letter for each argument: p pointer (a NumPy array, or None), i int64, f float, d double; it must
            stand in the table of native/calls.cpp. All return nothing.
    """

    def __init__(self, name: str, signature: str) -> None:
        self.name, self.signature = name, signature
        self._found: tuple[Any, int, int] | None = None
        self._typed: Any = None

    def bind(self, *arguments: Any) -> Call:
        """A call with these arguments, which it keeps alive; a number may be a ``ScalarCell``, read at each run."""
        if len(arguments) != len(self.signature):
            raise TypeError(f"{self.name} takes {len(self.signature)} arguments, got {len(arguments)}")
        run, caller, function = self._found or self._find()
        words = (_Word * len(arguments))()
        renewals: list[Callable[[], None]] = []
        for word, letter, argument in zip(words, self.signature, arguments):
            if letter == "p":
                word.p = argument if argument is None or isinstance(argument, int) else pointer(argument)
            elif isinstance(argument, ScalarCell):
                renewals.append(partial(_renew, word, letter, argument))
            else:
                setattr(word, letter, argument)
        call = Call(run, _Bound(caller, function, ctypes.addressof(words)), words, arguments)
        call.renewals += renewals
        return call

    @property
    def was_bound(self) -> bool:
        """Whether any call of it was made ready."""
        return self._found is not None

    def call(self, *arguments: Any) -> None:
        """Call with these arguments at once: a third of the time of binding a call that is made only once."""
        if self._typed is None:
            types = [_TYPES[letter] for letter in self.signature]
            self._typed = ctypes.CFUNCTYPE(None, *types)((self._found or self._find())[2])
        self._typed(*(pointer(x) if isinstance(x, np.ndarray) else x for x in arguments))

    def _find(self) -> tuple[Any, int, int]:
        """What runs calls, and addresses of the caller for this signature and of the function."""
        library = _load()
        if library is None:
            raise RuntimeError(f"{self.name} is a native function, and there is no native library: {_status}")
        function = ctypes.cast(getattr(library, self.name), ctypes.c_void_p).value
        assert function is not None
        library.brim_caller.restype = ctypes.c_void_p
        caller = library.brim_caller(self.signature.encode())
        if caller is None:
            raise RuntimeError(f"{self.name}: the signature {self.signature!r} is not in native/calls.cpp")
        run = library.brim_run
        run.argtypes, run.restype = (ctypes.c_void_p, ctypes.c_int64), ctypes.c_int64
        self._found = run, caller, function
        return self._found


def _renew(word: _Word, letter: str, cell: ScalarCell) -> None:
    setattr(word, letter, cell.value)


def _load() -> ctypes.CDLL | None:
    global _library, _status
    if not _status:
        with _lock:
            if not _status:
                _library, _status = _find(os.environ.get("BRIM_NATIVE", ""))
    return _library


def _find(wish: str) -> tuple[ctypes.CDLL | None, str]:
    if wish.strip().lower() in ("0", "off", "no", "false"):
        return None, f"off (BRIM_NATIVE={wish})"
    usable = native_build.runnable()
    if wish in native_build.variants():
        if wish not in usable:
            return None, f"off: this processor does not run {wish} (BRIM_NATIVE), but {', '.join(usable)}"
        usable = [wish]
    elif wish.strip().lower() not in ("", "1", "on", "yes", "true"):
        return None, f"off: BRIM_NATIVE is 0, 1 or one of {', '.join(native_build.variants())}, not {wish!r}"
    reasons: list[str] = []
    for variant in usable:  # a better one may be too much for an old compiler
        try:
            path = native_build.prebuilt(variant) or native_build.cached(variant)
            library = ctypes.CDLL(str(path))
            library.brim_set_threads(ctypes.c_int64(get_threads()))
            return library, f"{variant} ({path})"
        except (native_build.BuildError, OSError) as error:
            reasons.append(str(error))
    return None, f"none, NumPy's kernels are used: {reasons[0]}"
