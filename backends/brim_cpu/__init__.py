"""brim's CPU backend: NumPy arrays, and a NumPy kernel for every op.

The entry point ``brim.backends: cpu`` names ``backend``.
"""

from __future__ import annotations

from brim_cpu.device import CpuBackend


def backend() -> CpuBackend:
    """The backend object that brim's device layer asks for."""
    return CpuBackend()
