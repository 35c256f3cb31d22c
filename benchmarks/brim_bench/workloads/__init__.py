"""The workloads, one file a family; ``WORKLOADS`` lists the CPU's in the order of the table, ``GPU_WORKLOADS`` a GPU's.

Written once for all sides whose names are PyTorch's (brim, PyTorch and its variants), through ``brim_bench.sides``.
"""

from __future__ import annotations

from brim_bench.workload import Workload
from brim_bench.workloads import (
    gpu_memory,
    gpu_ops,
    gpu_steps,
    images,
    language,
    layers,
    mlp,
    optimizers,
    primitives,
    process,
)

__all__ = ["EVERY", "GPU_WORKLOADS", "WORKLOADS", "of_device"]

WORKLOADS: tuple[Workload, ...] = (
    *primitives.WORKLOADS,
    *layers.WORKLOADS,
    *optimizers.WORKLOADS,
    *mlp.STEPS,
    *images.WORKLOADS,
    *language.WORKLOADS,
    *mlp.INFERENCE,
    *mlp.EPOCH,
    *process.WORKLOADS,
)

GPU_WORKLOADS: tuple[Workload, ...] = (
    *gpu_steps.MLPS,
    *gpu_steps.RESNETS,
    *gpu_steps.TRANSFORMERS,
    *gpu_steps.TINY_OPS,
    *gpu_ops.GEMMS,
    *gpu_ops.ATTENTION,
    *gpu_ops.ELEMENTWISE,
    *gpu_ops.NORMS,
    *gpu_memory.UPDATES,
    *gpu_memory.DATA_PATHS,
)

EVERY = (*WORKLOADS, *GPU_WORKLOADS)


def of_device(device: str) -> tuple[Workload, ...]:
    """The workloads whose sizes are meant for this kind of device."""
    return WORKLOADS if device.partition(":")[0] == "cpu" else GPU_WORKLOADS
