"""The loader for a GPU: kernels compiled by ``brim_cuda.nvrtc``, loaded and launched through CuPy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from brim_cuda.launch import Kernel
from brim_cuda.nvrtc import compile_cubin
from brim_cuda.source import translation_unit

__all__ = ["CupyLoader"]


class CupyLoader:
    """Functions on the current device of CuPy; launches go to CuPy's current stream. Implements ``launch.Loader``."""

    def __init__(self) -> None:
        import cupy

        self._cupy = cupy
        self._functions: dict[tuple[int, Kernel], Any] = {}

    def functions(self, kernels: Sequence[Kernel]) -> list[Callable[..., None]]:
        """Launchers of these kernels; those that are new are compiled together, for this device's architecture."""
        device = self._cupy.cuda.Device()
        new = [k for k in dict.fromkeys(kernels) if (device.id, k) not in self._functions]
        if new:
            module = self._cupy.cuda.function.Module()
            module.load(compile_cubin(translation_unit(new), f"sm_{device.compute_capability}").cubin)
            self._functions.update({(device.id, k): module.get_function(k.name) for k in new})
        return [partial(_launch, self._functions[device.id, k]) for k in kernels]

    def address(self, array: Any) -> int:
        """Address on the device."""
        return int(array.data.ptr)


def _launch(function: Any, blocks: tuple[int, ...], threads: int, shared_bytes: int, packed: Sequence[Any]) -> None:
    # CuPy passes NumPy scalars by their own size, and an array of one element (a struct) by value.
    function(blocks, (threads,), packed, shared_mem=shared_bytes)
