"""The steps of a training as ordinary eager functions: train on a batch, evaluate a batch, predict a batch.

The Trainer runs them as they are, or as planned steps (``brim.compile``); both give the same numbers. So nothing here
may read a value: numbers of the host go through ``brim.context``, and the loss is handed to the host by ``after_step``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from brim import ops
from brim.autograd import no_grad
from brim.context import after_step, context, host_scalar, phase_scope
from brim.nn import Module
from brim.optim import Optimizer, clip_grad_norm_
from brim.optim.optimizer import layer_of
from brim.tensor import empty
from brim.train.precision import HALF_WIDTH, Precision

__all__ = ["LossNotFinite", "Steps"]


class LossNotFinite(Exception):
    """The loss of a training step is NaN or infinite; no weight was changed. Caught by the Trainer, which looks why."""


class Steps:
    """What the Trainer does with one batch.

    Arguments:
        model, loss, optimizer: as of the Trainer.
        clip_norm: clip the norm of all gradients together to this, or None.
        accumulate: batches whose gradients make one step.
        keep_outputs: return the model's outputs from ``train`` and ``evaluate`` (for metrics).
        precision: name of one of ``brim.train.precision.PRECISIONS``.

    Attributes:
        share: weight of the next batch's loss among those whose gradients make one step.
        loss_value: loss of the last batch.
    """

    def __init__(
        self,
        model: Module,
        loss: Any,
        optimizer: Optimizer,
        clip_norm: float | None = None,
        accumulate: int = 1,
        keep_outputs: bool = False,
        precision: str = "fp32",
    ) -> None:
        self.model, self.loss, self.optimizer = model, loss, optimizer
        self.clip_norm, self.accumulate, self.keep_outputs = clip_norm, accumulate, keep_outputs
        self.precision = Precision(precision, model, optimizer)
        self.scaler = self.precision.scaler
        self.share = 1.0
        self.loss_value = math.nan
        self._kept: dict[int, Any] = {}  # id of a parameter -> the sum of its gradients so far

    def in_half(self) -> Steps | None:
        """These steps with ``precision="bf16"``; None where they compute in half width already, or may not."""
        if self.precision.name in HALF_WIDTH:
            return None
        try:
            return Steps(
                self.model, self.loss, self.optimizer, self.clip_norm, self.accumulate, self.keep_outputs, "bf16"
            )
        except ValueError:  # the model has parameters that are not float32
            return None

    # ---------------------------------------------------------------- training

    def train(self, inputs: Any, targets: Any, first: bool = True, last: bool = True, parts: int = 1) -> Any:
        """Forward, backward, and with the last batch of a group clipping and the optimizer's update.

        Arguments:
            inputs, targets: the batch, (N, ...).
            first, last: whether the batch begins and ends the group whose gradients make one step.
            parts: micro-batches into which the batch is split to need less memory. The gradients are those of the
                whole batch up to rounding, for losses that are the mean or sum over the samples; batch norm
                normalises each micro-batch by itself.

        Returns:
            The model's outputs, or None without ``keep_outputs``.

        Raises:
            LossNotFinite: before any weight is changed.
        """
        with self.precision.whole():
            return self._train(inputs, targets, first, last, parts)

    def _train(self, inputs: Any, targets: Any, first: bool, last: bool, parts: int) -> Any:
        outputs = []
        total = None
        for x, y, weight in self._micro_batches(inputs, targets, parts):
            with self.precision.forward():
                out = self.model(x)
                loss = self.loss(out, y) if weight == 1.0 else self.loss(out, y) * weight
            if parts == 1:
                after_step(loss, self._receive_training)
            else:
                part = loss.detach()
                total = part if total is None else total + part
            if self.keep_outputs:
                outputs.append(self.precision.readable(out.detach()))
            if not (first and last):
                loss = loss * host_scalar(lambda: self.share)
            (loss if self.scaler is None else self.scaler.scale(loss)).backward()
            out = loss = None
        if total is not None:
            after_step(total, self._receive_training)
        if not (first and last):
            self._keep_gradients(first, last)
        if last:
            self._update()
        if not self.keep_outputs:
            return None
        return outputs[0] if parts == 1 else ops.concat(outputs)

    def _micro_batches(self, inputs: Any, targets: Any, parts: int) -> Iterator[tuple[Any, Any, float]]:
        """Slices of a batch, and the weight of each one's loss in the batch's."""
        if parts == 1:
            yield inputs, targets, 1.0
            return
        N = inputs.shape[0]
        summed = getattr(self.loss, "reduction", "mean") == "sum"
        for part in range(parts):
            begin, end = N * part // parts, N * (part + 1) // parts
            yield inputs[begin:end], targets[begin:end], 1.0 if summed else (end - begin) / N

    def _update(self) -> None:
        params: Any = self.model.parameters()
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
            params = [p for group in self.optimizer.param_groups for p in group["params"]]  # others stay scaled
        if self.clip_norm is not None:
            clip_grad_norm_(params, self.clip_norm)
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.optimizer.zero_grad()

    def _keep_gradients(self, first: bool, last: bool) -> None:
        """Between the batches of a group, sums of gradients lie in memory of their own, the same for every group."""
        with no_grad(), phase_scope("backward"):
            for param in self.model.parameters():
                grad, param.grad = param.grad, None
                kept = self._kept.get(id(param))
                if grad is None and kept is None:
                    continue
                if kept is None or (kept.shape, kept.dtype, kept.device) != (param.shape, param.dtype, param.device):
                    kept = self._new_sum(param)
                if grad is None:  # this batch does not use the parameter
                    if last:
                        param.grad = kept.copy()
                    elif first:
                        kept.write(0.0)
                    continue
                total = grad if first else kept + grad
                if last:
                    param.grad = total.book_as("grads")
                else:
                    kept.write(total)

    def _new_sum(self, param: Any) -> Any:
        key = id(param)
        if context.interpreter is None:
            made = empty(param.shape, dtype=param.dtype, device=param.device, op="gradient").write(0.0)
            made = made.book_as("grads", layer_of(param))
        else:  # it outlives the step that is being recorded
            made = context.interpreter.new_state(param, 0.0, "grads", lambda: self._kept.pop(key, None))
        self._kept[key] = made
        return made

    def _receive_training(self, value: float) -> None:
        self.loss_value = float(value)
        if not math.isfinite(self.loss_value):
            raise LossNotFinite

    # ---------------------------------------------------------------- using the model

    def evaluate(self, inputs: Any, targets: Any) -> Any:
        """Loss of a batch; returns the outputs, or None without ``keep_outputs``. The model is in evaluation mode."""
        with no_grad(), self.precision.whole():
            with self.precision.forward():
                outputs = self.model(inputs)
                loss = self.loss(outputs, targets)
            after_step(loss, self._receive)
            return self.precision.readable(outputs) if self.keep_outputs else None

    def predict(self, inputs: Any) -> Any:
        """The model's outputs for a batch."""
        with no_grad(), self.precision.whole():
            with self.precision.forward():
                outputs = self.model(inputs)
            return self.precision.readable(outputs)

    def _receive(self, value: float) -> None:
        self.loss_value = float(value)
