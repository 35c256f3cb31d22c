"""What the batches of a training look like: read off a loader, or inferred from the model and its loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from brim.data import DataLoader
from brim.nn import (
    BatchNorm1d,
    BCEWithLogitsLoss,
    CrossEntropyLoss,
    Embedding,
    HuberLoss,
    L1Loss,
    LayerNorm,
    Linear,
    Module,
    MSELoss,
    NLLLoss,
)
from brim.spec import Spec, as_dtype, default_float

__all__ = ["Batch", "TrainingBatch", "batches_of_loader", "infer_batch", "resized", "training_batches"]

Batch = tuple[Spec, Spec]
"""Shapes and dtypes of the inputs and the targets of a batch, both with the batch as their first axis."""

TrainingBatch = tuple[Batch, bool, bool]
"""A batch, and whether it begins and ends the group of batches whose gradients make one step."""


def resized(batch: Batch, size: int) -> Batch:
    """The same with another number of samples."""
    inputs, targets = batch
    return Spec((size, *inputs.shape[1:]), inputs.dtype), Spec((size, *targets.shape[1:]), targets.dtype)


def batches_of_loader(loader: DataLoader, batch_size: int | None = None) -> list[Batch]:
    """The distinct batches of an epoch, largest first; with ``batch_size``, those of a loader with that size.

    Raises:
        ValueError: a sample is not (inputs, targets).
    """
    fields = loader.spec()
    if len(fields) != 2:
        raise ValueError(
            f"the Trainer takes datasets of (inputs, targets); a sample of this one has {len(fields)} fields"
        )
    sizes = loader.batch_sizes
    if batch_size is not None:
        rest = loader.num_samples % batch_size
        sizes = (batch_size, *([rest] if rest and not loader.drop_last else []))
    return [resized((fields[0], fields[1]), size) for size in sizes]


def training_batches(batches: list[Batch], count: int, accumulate: int) -> list[TrainingBatch]:
    """Every kind of training step in an epoch once; the largest that updates the weights is first.

    Arguments:
        batches: the distinct batches, largest first; a second one is the epoch's last.
        count: batches in an epoch.
        accumulate: batches whose gradients make one step.
    """
    found = []
    for begin in sorted({0, (count - 1) // accumulate * accumulate}):  # the last group may be shorter
        end = min(begin + accumulate, count)
        for position in range(begin, end):
            batch = batches[-1] if position == count - 1 else batches[0]
            found.append((batch, position == begin, position == end - 1))
    return sorted(dict.fromkeys(found), key=lambda one: (-one[0][0].shape[0], not one[2], one[1]))


def infer_batch(
    model: Module,
    loss: Any,
    batch_size: int | None,
    inputs: Spec | None,
    targets: Spec | None,
    outputs_of: Callable[[Spec], Spec],
) -> Batch:
    """A batch from given specs, from the model's ``example_batch(batch_size)``, or from its first layer and the loss.

    Arguments:
        model, loss: of the training.
        batch_size: samples; that of ``inputs`` when None.
        inputs, targets: what is known.
        outputs_of: gives the model's outputs for inputs.

    Raises:
        ValueError: it cannot be told; the message says what to pass.
    """
    if inputs is None:
        if batch_size is None:
            raise ValueError("plan() needs a batch_size, or data=, or inputs= and targets= (brim.spec(shape, dtype))")
        example = getattr(model, "example_batch", None)
        if example is not None and targets is None:
            inputs, targets = example(batch_size)
        else:
            inputs = _inputs_of(model, batch_size)
    size = inputs.shape[0] if batch_size is None else batch_size
    inputs = Spec((size, *inputs.shape[1:]), inputs.dtype)
    if targets is None:
        targets = _targets_of(loss, outputs_of(inputs))
    return resized((inputs, targets), size)


def _inputs_of(model: Module, batch_size: int) -> Spec:
    for module in model.modules():
        if isinstance(module, Linear):
            return Spec((batch_size, module.in_features), module.weight.dtype)
        if isinstance(module, BatchNorm1d):
            return Spec((batch_size, module.num_features), default_float)
        if isinstance(module, LayerNorm):
            return Spec((batch_size, *module.normalized_shape), default_float)
        if any(True for _ in module.parameters(recurse=False)):
            what = "the length of a sequence" if isinstance(module, Embedding) else "the shape of its inputs"
            raise ValueError(
                f"the model's first layer, {type(module).__name__}, does not tell {what}: pass data=dataset, or "
                f"inputs=brim.spec(({batch_size}, ...)) with the batch as the first axis"
            )
    raise ValueError("the model has no layer that tells the shape of its inputs: pass data= or inputs=brim.spec(...)")


def _targets_of(loss: Any, outputs: Spec) -> Spec:
    if isinstance(loss, CrossEntropyLoss | NLLLoss):
        return Spec((outputs.shape[0], *outputs.shape[2:]), as_dtype("int64"))
    if isinstance(loss, MSELoss | L1Loss | HuberLoss | BCEWithLogitsLoss):
        return outputs
    name = getattr(loss, "__name__", type(loss).__name__)
    raise ValueError(f"what {name} compares with outputs {outputs} is not known: pass targets=brim.spec(shape, dtype)")
