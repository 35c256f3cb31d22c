"""Workloads of the benchmark for GPUs at full size, planned for a card that is not here, in the memory they state."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

import brim
from brim_bench.sides.brim_side import Brim
from brim_bench.workloads import GPU_WORKLOADS


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    """A side in this process sets its threads and its precision; tests after this one get them back."""
    threads, place = brim.get_threads(), brim.default_device()
    yield
    brim.set_threads(threads)
    brim.set_float32_precision("full")
    brim.set_default_device(place)


class Planning(Brim):
    """Builds workloads without memory; a step is planned for a card and never run."""

    def __init__(self) -> None:
        super().__init__("cpu", 1)
        self.plans: list[Any] = []

    def asarray(self, host: Any) -> Any:
        return brim.zeros(host.shape, dtype=host.dtype.name)

    def noise(self, shape: Any, seed: int = 0, dtype: str = "float32") -> Any:
        return brim.zeros(tuple(shape), dtype=dtype)

    def repeated(self, block: Any, shape: Any, dtype: str) -> Any:
        return brim.zeros(tuple(shape), dtype=dtype)

    def load(self, model: Any, seed: int) -> Any:
        return model

    def step(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arguments: self.plans.append(brim.plan(fn, *arguments, device_profile="h100-80gb"))

    _last = step


@pytest.mark.parametrize("name", [
    "gpu_mlp_b1024", "gpu_resnet18_b128_bf16", "gpu_resnet50_b64_tf32", "gpu_lm_b32_fp32", "gpu_gpt2_b8_bf16",
    "gpu_launch_overhead", "gpu_gemm_8192x8192x8192_bf16", "gpu_attention_8192_bf16", "gpu_eltwise_float32",
    "gpu_ln_bfloat16", "gpu_bn_fp32", "gpu_dropout_fp32", "gpu_xent_50257_fp32", "gpu_adamw_1G", "gpu_sgd_10M",
])  # fmt: skip
def test_full_sizes_are_planned_for_a_card_that_is_not_here(name: str) -> None:
    workload = next(one for one in GPU_WORKLOADS if one.name == name)
    side = Planning()
    with brim.meta():
        job = side.build(workload, False)
    job.run()
    (plan,) = side.plans
    assert plan.profile == "h100-80gb"
    assert workload.nbytes / 16 < plan.peak_bytes <= workload.needs_bytes, (plan.peak_bytes, workload.needs_bytes)
