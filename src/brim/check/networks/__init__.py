"""Small real networks with their training steps, as a user would write them: what planned steps are checked on.

Each entry of ``NETWORKS`` is a function that builds one: modules, optimizers, the step and what it is called with.
Sizes are small, and the axes of every array differ where they can, so that a mixed-up axis is noticed; ``times``
multiplies the batch where a check wants arrays large enough to be seen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import brim
from brim.check.networks.dense import dropout_heavy, gradient_penalty, hypergradient, mixed_precision, mlp, rmsprop
from brim.check.networks.half import autocast_attention, scaled_cnn
from brim.check.networks.images import cnn, recomputed, residual, unet
from brim.check.networks.net import STEPS, Net
from brim.check.networks.sequences import embedding, lstm, shared_weights, transformer
from brim.check.networks.updates import accumulation_across_calls, accumulation_in_a_step, clipped, two_optimizers
from brim.program.compile import CompiledStep
from brim.program.compile import compile as compile_step

__all__ = ["CHOSEN", "IN_HALF", "NETWORKS", "STEPS", "Net", "compiled", "make"]

NETWORKS: dict[str, Callable[..., Net]] = {
    make.__name__: make
    for make in (
        mlp, cnn, residual, recomputed, unet, shared_weights, transformer, embedding, dropout_heavy,
        accumulation_in_a_step, accumulation_across_calls, mixed_precision, two_optimizers, rmsprop, lstm,
        hypergradient, clipped, gradient_penalty,
    )
}  # fmt: skip

IN_HALF: dict[str, Callable[..., Net]] = {make.__name__: make for make in (autocast_attention, scaled_cnn)}
"""Networks that choose half width by themselves: their numbers are as far from float32 as that is."""

CHOSEN = (
    "mlp", "cnn", "residual", "recomputed", "unet", "transformer", "lstm", "embedding", "dropout_heavy",
    "mixed_precision", "accumulation_across_calls", "gradient_penalty",
    *IN_HALF,
)  # fmt: skip
"""The fourteen that ``brim check`` runs: between them every kind of layer, most optimizers, all precisions."""


def make(name: str, times: int = 1) -> Net:
    """A network with the same weights at every call."""
    brim.manual_seed(3)
    return (NETWORKS.get(name) or IN_HALF[name])(times)


def compiled(net: Net, **options: Any) -> list[CompiledStep]:
    """The steps of a network, planned."""
    return [compile_step(step, **{**net.options, **options}) for step in net.steps]
