"""How a NumPy kernel is registered: ``@kernel("name")`` on a function ``f(out, *ins, scratch=None, **params)``.

A kernel writes every element of ``out`` and allocates nothing. What it needs besides, it declares here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from brim.spec import Scalar, Spec

__all__ = ["KERNELS", "KernelRecord", "kernel"]

Specs = Sequence[Spec | Scalar]


@dataclass(frozen=True, slots=True)
class KernelRecord:
    """A kernel and its declared needs, each a pure function of (input specs, output specs, params) or a constant.

    Attributes:
        run: the function.
        scratch: bytes of the ``scratch`` array (uint8, 64-byte aligned) it wants.
        library: upper bound of the bytes a NumPy call inside allocates and frees by itself (sorting has no ``out=``).
        contiguous: True: all inputs must be row-major; or the indices of those that must be.
        aliasing: an output may be one of the inputs, element for element.
        prepare: called as ``run`` is, gives calls that do the same with everything bound, or None (``BoundKernel``).
    """

    run: Callable[..., None]
    scratch: Callable[..., int] | None = None
    library: Callable[..., int] | None = None
    contiguous: bool | tuple[int, ...] = False
    aliasing: bool = False
    prepare: Callable[..., list[Callable[[], None]] | None] | None = None


KERNELS: dict[str, KernelRecord] = {}


def kernel(
    name: str,
    *,
    scratch: Callable[..., int] | None = None,
    library: Callable[..., int] | None = None,
    contiguous: bool | tuple[int, ...] = False,
    aliasing: bool = False,
    prepare: Callable[..., list[Callable[[], None]] | None] | None = None,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorator: register a NumPy kernel for the op ``name``.

    ``scratch`` and ``library`` are called as ``f(ins, outs, **params)`` with lists of Specs (scalars stay scalars).
    """

    def register(run: Callable[..., None]) -> Callable[..., None]:
        if name in KERNELS:
            raise ValueError(f"a CPU kernel for {name!r} exists already")
        KERNELS[name] = KernelRecord(run, scratch, library, contiguous, aliasing, prepare)
        return run

    return register
