"""Training steps of a size for GPUs: the MLP, ResNet-18 and ResNet-50 on 224 x 224, transformers, many tiny operations.

ResNets: He et al. 2015, arXiv:1512.03385, for ImageNet: a 7 x 7 stem, basic blocks (18) or bottlenecks (50) whose
stride is in the 3 x 3 convolution. GPT-2: Radford et al. 2019, 12 blocks of 768, 12 heads, 1,024 tokens of 50,257, the
head shares the embedding's weights; without dropout. The MLP and the small transformer are those of the CPU's table.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from brim_bench.workload import Job, Workload, with_tiny
from brim_bench.workloads import language, mlp
from brim_bench.workloads.rotating import count_sets, in_turn
from brim_bench.workloads.training import CHECKED_STEPS, classifier_step

__all__ = ["MLPS", "RESNETS", "TINY_OPS", "TRANSFORMERS"]

_STAGES = {  # widths, blocks of each stage, growth of a bottleneck
    "resnet18": ((64, 128, 256, 512), (2, 2, 2, 2), 1),
    "resnet50": ((64, 128, 256, 512), (3, 4, 6, 3), 4),
    "tiny18": ((4, 8), (1, 1), 1),
    "tiny50": ((4, 8), (1, 1), 4),
}
# After three steps, as on the CPU; half-width products add their own rounding to each of them.
_TOLERANCES = {
    "fp32": {"losses": 5e-3, "update": 0.1},
    "tf32": {"losses": 1e-2, "update": 0.2},
    "bf16": {"losses": 3e-2, "update": 0.4},
}


def steps_in_turn(side: Any, model: Any, which: str, batches: list[tuple[Any, Any]]) -> Job:
    """A Job of training steps of ``model`` on batches that rotate; its weights are set here.

    Arguments:
        model: in training mode.
        which: the optimizer, "sgd" or "adamw".
        batches: on the device; results are those of steps on the first one.
    """
    model = side.load(model, seed=1)
    parameters = list(model.parameters())
    step = classifier_step(side, model, side.optimizer(which, parameters))

    def results() -> dict[str, Any]:
        before = [side.sample(one) for one in parameters]
        losses = [float(side.numpy(step(*batches[0]))) for _ in range(CHECKED_STEPS)]
        moved = [(side.sample(one) - old).reshape(-1) for one, old in zip(parameters, before, strict=True)]
        return {"losses": np.asarray(losses), "update": np.concatenate(moved)}

    runs = [lambda x=x, y=y: step(x, y) for x, y in batches]
    return Job(in_turn(runs), results, side.compiled(step), len(batches))


def _classes(side: Any, shape: tuple[int, ...], classes: int, seed: int) -> Any:
    return side.asarray(np.random.default_rng(seed).integers(0, classes, shape))


def gpu_mlp(side: Any, checking: bool, batch: int) -> Job:
    """Forward, cross entropy, backward, SGD with momentum."""
    sets = count_sets(side, 4.0 * 784 * batch)
    batches = [(side.noise((batch, 784), one), _classes(side, (batch,), 10, one)) for one in range(sets)]
    return steps_in_turn(side, mlp.network(side, checking), "sgd", batches)


# ---- images


def _resnet(side: Any, name: str, classes: int) -> Any:
    nn, relu = side.nn, side.F.relu
    widths, blocks, growth = _STAGES[name]

    def conv(old: int, new: int, kernel: int, stride: int = 1) -> Any:
        return nn.Conv2d(old, new, kernel, stride, kernel // 2, bias=False)

    class Block(nn.Module):  # type: ignore[name-defined]
        def __init__(self, old: int, width: int, stride: int) -> None:
            super().__init__()
            new = width * growth
            kernels = [(old, width, 3, stride), (width, new, 3, 1)]
            if growth > 1:
                kernels = [(old, width, 1, 1), (width, width, 3, stride), (width, new, 1, 1)]
            layers: list[Any] = []
            for number, kernel in enumerate(kernels):
                layers += [nn.ReLU()] if number else []
                layers += [conv(*kernel), nn.BatchNorm2d(kernel[1])]
            self.main = nn.Sequential(*layers)
            changes = stride != 1 or old != new
            project = nn.Sequential(conv(old, new, 1, stride), nn.BatchNorm2d(new)) if changes else nn.Identity()
            self.project = project

        def forward(self, x: Any) -> Any:
            return relu(self.main(x) + self.project(x))

    width = widths[0]
    layers = [conv(3, width, 7, 2), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    for number, (stage, count) in enumerate(zip(widths, blocks, strict=True)):
        for block in range(count):
            layers.append(Block(width, stage, 2 if number and not block else 1))
            width = stage * growth
    return nn.Sequential(*layers, side.global_average(), nn.Linear(width, classes))


def gpu_resnet(side: Any, checking: bool, model: str, batch: int, height: int, classes: int) -> Job:
    """Forward, cross entropy, backward, SGD with momentum."""
    shape = (batch, 3, height, height)
    sets = count_sets(side, 4.0 * 3 * batch * height**2)
    batches = [
        (side.channels_last(side.noise(shape, one)), _classes(side, (batch,), classes, one)) for one in range(sets)
    ]
    return steps_in_turn(side, side.channels_last(_resnet(side, model, classes)), "sgd", batches)


def _convolutions(model: str, height: int, classes: int) -> list[tuple[int, int, int, int]]:
    """(inputs, outputs, kernel, height of the result) of each layer with weights, the first first."""
    widths, blocks, growth = _STAGES[model]
    half = (height + 1) // 2
    width, found = widths[0], [(3, widths[0], 7, half)]
    h = (half + 1) // 2
    for number, (stage, count) in enumerate(zip(widths, blocks, strict=True)):
        for block in range(count):
            before, h = h, (h + 1) // 2 if number and not block else h
            new = stage * growth
            if growth > 1:
                found += [(width, stage, 1, before), (stage, stage, 3, h), (stage, new, 1, h)]
            else:
                found += [(width, stage, 3, h), (stage, new, 3, h)]
            if before != h or width != new:
                found.append((width, new, 1, h))
            width = new
    return [*found, (width, classes, 1, 1)]


def _resnet_step(model: str, batch: int, height: int, classes: int, precision: str, name: str) -> Workload:
    layers = _convolutions(model, height, classes)
    products = [2.0 * batch * a * b * k * k * h * h for a, b, k, h in layers]
    parameters = sum(a * b * k * k for a, b, k, _ in layers)
    activations = batch * sum(b * h * h for _, b, _, h in layers)
    item = 2 if precision == "bf16" else 4
    return Workload(
        f"gpu_{name}_b{batch}_{precision}",
        f"training step of {name} on {height} x {height} (SGD with momentum), batch {batch}, {precision}",
        "gpu_resnet", {"model": model, "batch": batch, "height": height, "classes": classes},
        flops=3 * sum(products) - products[0],
        # Each result of a convolution is normalised (read twice), the result kept; the same again backward.
        nbytes=24.0 * parameters + item * 8.0 * activations,
        build=gpu_resnet, tolerances=_TOLERANCES[precision], precision=precision,
        needs_bytes=24.0 * parameters + 4 * 6.0 * activations + 2 * 2**30, random=False, importance=1,
    )  # fmt: skip


# ---- language


def gpu_lm(
    side: Any, checking: bool, batch: int, tokens: int, width: int, heads: int, blocks: int, words: int, p: float
) -> Job:
    """Forward, cross entropy over all tokens, backward, AdamW."""
    model = language.network(side, tokens, width, heads, blocks, words, 0.0 if checking else p, shared=p == 0)
    sets = count_sets(side, 16.0 * batch * tokens)
    shape = (batch, tokens)
    batches = [(_classes(side, shape, words, 2 * n), _classes(side, shape, words, 2 * n + 1)) for n in range(sets)]
    return steps_in_turn(side, model, "adamw", batches)


def _lm_step(
    name: str, batch: int, tokens: int, width: int, heads: int, blocks: int, words: int, p: float, precision: str,
    importance: int,
) -> Workload:  # fmt: skip
    rows, weights = batch * tokens, blocks * 12.0 * width**2 + width * words
    # Scores and their sums: half of the pairs are seen.
    products = 2.0 * rows * weights + blocks * 2.0 * rows * tokens * width
    item, kept = (2 if precision == "bf16" else 4), rows * (blocks * 16.0 * width + 2 * words)
    return Workload(
        f"gpu_{name}_b{batch}_{precision}",
        f"training step of a transformer ({blocks} blocks of {width}, {tokens:,} tokens, AdamW), batch {batch}, "
        f"{precision}", "gpu_lm",
        {"batch": batch, "tokens": tokens, "width": width, "heads": heads, "blocks": blocks, "words": words, "p": p},
        flops=3 * products, nbytes=32.0 * weights + 4.0 * item * kept, build=gpu_lm, precision=precision,
        # Adam divides by the gradient's size: where it is zero but for rounding (the bias of keys), steps are noise.
        tolerances=_TOLERANCES[precision], needs_bytes=20.0 * weights + 4 * 2.5 * kept + 2 * 2**30, random=p > 0,
        importance=importance,
    )  # fmt: skip


# ---- many tiny operations


def gpu_tiny_ops(side: Any, checking: bool, layers: int, width: int, batch: int) -> Job:
    """A deep and narrow network: all of its time is what it takes to launch."""
    nn, parts = side.nn, []
    for _ in range(layers):
        parts += [nn.Linear(width, width), nn.LayerNorm(width), nn.ReLU()]
    x, y = side.noise((batch, width)), _classes(side, (batch,), width, 0)
    return steps_in_turn(side, nn.Sequential(*parts), "adamw", [(x, y)])


def _tiny_ops(layers: int, width: int, batch: int) -> Workload:
    return Workload(
        "gpu_launch_overhead", f"training step of {layers} x (linear, layer norm, ReLU) of width {width}, batch "
        f"{batch}, AdamW: launches and nothing else", "gpu_tiny_ops",
        {"layers": layers, "width": width, "batch": batch}, build=gpu_tiny_ops, tolerances=_TOLERANCES["fp32"],
        needs_bytes=2**30, random=False, importance=1,
    )  # fmt: skip


def _mlp(batch: int) -> Workload:
    return Workload(
        f"gpu_mlp_b{batch}", f"training step of an MLP 784-256-256-10 (batch norm, dropout, SGD), batch {batch:,}",
        "gpu_mlp", {"batch": batch}, flops=mlp.step_flops(batch), nbytes=mlp.step_bytes(batch), build=gpu_mlp,
        tolerances=_TOLERANCES["fp32"], needs_bytes=2**30, importance=0,
    )  # fmt: skip


MLPS = tuple(with_tiny(_mlp, {"batch": 16}, batch=batch) for batch in (32, 128, 1024))

RESNETS = tuple(
    with_tiny(
        _resnet_step, {"model": f"tiny{name[6:]}", "batch": 4, "height": 33, "classes": 7},
        model=name, batch=batch, height=224, classes=1000, precision=precision, name=name,
    )
    for name, batch in (("resnet18", 128), ("resnet50", 64))
    for precision in ("bf16", "tf32")
)  # fmt: skip

_TINY_LM = {"batch": 2, "tokens": 12, "width": 16, "heads": 2, "blocks": 1, "words": 31}

TRANSFORMERS = (
    with_tiny(
        _lm_step, _TINY_LM, name="lm", batch=32, tokens=64, width=128, heads=4, blocks=2, words=65, p=0.1,
        precision="fp32", importance=0,
    ),
    with_tiny(
        _lm_step, _TINY_LM, name="gpt2", batch=8, tokens=1024, width=768, heads=12, blocks=12, words=50_257, p=0.0,
        precision="bf16", importance=0,
    ),
)  # fmt: skip

TINY_OPS = (with_tiny(_tiny_ops, {"layers": 3, "width": 8, "batch": 4}, layers=48, width=64, batch=16),)
