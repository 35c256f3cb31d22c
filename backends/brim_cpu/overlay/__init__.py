"""Native kernels laid over the NumPy kernels: for an op, a dtype and a layout the native one if there is one.

A module here holds binders, ``@overlay("op") def f(ins, outs, **params)``, each a pure function of Specs: it returns a
``NativeKernel``, or None where NumPy's kernel is to run (or a composite's body). native/README.md has the recipe.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from brim.backend import BoundKernel
from brim.spec import Scalar, Spec
from brim_cpu import native
from brim_cpu.registry import KERNELS

__all__ = [
    "HALVES",
    "OVERLAYS",
    "SMALL_BYTES",
    "NativeKernel",
    "bind_native",
    "overlay",
    "overlay_half",
    "small_numpy",
]

Call = Callable[[], None]
Binder = Callable[..., "NativeKernel | None"]

SMALL_BYTES = 16 * 1024
"""Up to results of so many bytes one NumPy call costs less than binding and making a native one."""


@dataclass(frozen=True, slots=True)
class NativeKernel:
    """A native kernel chosen for certain specs.

    Attributes:
        calls: ``calls(out, *ins, scratch)``: the bound calls (``native.Function.bind``) that together compute the op on
            these arrays; ``out`` is an array, or a tuple for several outputs. A scalar may be a ``ScalarCell``.
        scratch_bytes: size of the flat uint8 array ``scratch`` that they want.
        contiguous: which inputs must be row-major (the caller copies the others); True for all of them.
        aliasing: an output may be one of the inputs, element for element.
        any_output: outputs may have other strides than their specs say (eager writes into views).
        small: a NumPy kernel that gives the same bits, for eager code where binding costs more than it saves.
    """

    calls: Callable[..., Sequence[Call]]
    scratch_bytes: int = 0
    contiguous: bool | tuple[bool, ...] = False
    aliasing: bool = False
    any_output: bool = False
    small: Callable[..., None] | None = None

    def bound(self, inputs: int) -> BoundKernel:
        """As the framework wants it."""

        def prepare(out: Any, *ins: Any, scratch: Any = None, **params: Any) -> list[Call]:
            return list(self.calls(out, *ins, scratch=scratch))

        def run(out: Any, *ins: Any, scratch: Any = None, **params: Any) -> None:
            for call in self.calls(out, *ins, scratch=scratch):
                call()

        flags = (self.contiguous,) * inputs if isinstance(self.contiguous, bool) else self.contiguous
        return BoundKernel(
            self.small or run,
            self.scratch_bytes,
            contiguous=flags,
            aliasing=self.aliasing,
            prepare=prepare,
            exact_outputs=not self.any_output,
        )


def small_numpy(name: str, out: Spec, most_bytes: int = SMALL_BYTES) -> Callable[..., None] | None:
    """NumPy's kernel of an op where its result is small, for ``NativeKernel.small``."""
    return KERNELS[name].run if out.nbytes <= most_bytes else None


OVERLAYS: dict[str, Binder] = {}
HALVES: dict[str, Binder] = {}
"""Binders for results of half width, where the one in ``OVERLAYS`` has no kernel for them."""


def overlay(*names: str) -> Callable[[Binder], Binder]:
    """Decorator: register the binder of native kernels for these ops; it is called ``f(ins, outs, **params)``."""
    return _registering(OVERLAYS, names)


def overlay_half(*names: str) -> Callable[[Binder], Binder]:
    """Decorator: the same, for float16 and bfloat16."""
    return _registering(HALVES, names)


def _registering(binders: dict[str, Binder], names: tuple[str, ...]) -> Callable[[Binder], Binder]:
    def register(binder: Binder) -> Binder:
        for name in names:
            if name in binders:
                raise ValueError(f"a native kernel for {name!r} exists already")
            binders[name] = binder
        return binder

    return register


@cache
def _import_families() -> None:
    """Register all binders, whichever of their modules were imported before."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")


def bind_native(
    name: str, ins: Sequence[Spec | Scalar], outs: Sequence[Spec], params: dict[str, Any]
) -> BoundKernel | None:
    """The native kernel of an op on these specs; None where there is none, or no native library."""
    _import_families()
    binder = OVERLAYS.get(name)
    if binder is None or not native.available():
        return None
    found = binder(ins, outs, **params)
    if found is None and name in HALVES and outs[0].dtype.name in ("float16", "bfloat16"):
        found = HALVES[name](ins, outs, **params)
    return None if found is None else found.bound(len(ins))
