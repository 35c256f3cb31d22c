"""Trainer: fit, evaluate and predict with a model; saves what a killed run needs to continue bit for bit.

Its steps (``steps.py``) are planned before the first one and then replayed (``planning.py``).
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal

import numpy as np

from brim import random
from brim.data import DataLoader
from brim.device import device as find_device
from brim.errors import CheckpointError, DeviceError
from brim.gathered import Gathered
from brim.io import check_compatible, latest_checkpoint, load_checkpoint
from brim.memory.budget import BudgetLike
from brim.memory.guard import give_back_on_refusal
from brim.memory.host import SwapWatch
from brim.nn import CrossEntropyLoss, Module
from brim.optim import GradScaler, Optimizer, ReduceLROnPlateau
from brim.program.plan import Plan
from brim.spec import Spec
from brim.tensor import Tensor
from brim.train.batches import batches_of_loader, infer_batch, training_batches
from brim.train.callbacks import Callback, improved
from brim.train.diagnose import first_non_finite
from brim.train.interrupt import on_interrupt
from brim.train.metrics import Averages, Metric, find_metrics
from brim.train.planning import EagerSteps, PlannedSteps, as_tensor, evaluating, largest_batch_quickly, real_device
from brim.train.progress import Progress
from brim.train.record import describe_results, describe_settings
from brim.train.run_folder import RunFolder
from brim.train.steps import LossNotFinite, Steps
from brim.units import format_bytes

__all__ = ["Trainer"]


_SWAP_EVERY_S = 0.1  # how often it is read what lies in swap, which takes 30 us
_SWAP_TOLERANCE_BYTES = 16 * 2**20  # idle pages that the system moves out on its own


class Trainer:
    """Trains a model and keeps the books.

    Arguments:
        model: the model; moved to ``device`` if one is given.
        optimizer: of the model's parameters.
        loss: ``loss(outputs, targets)``; cross entropy when None.
        budget: memory budget in force while fitting, evaluating and predicting (see ``brim.memory.budget``).
        metrics: names in ``brim.train.METRICS``, or functions of two NumPy arrays.
        schedule: stepped after each epoch; ReduceLROnPlateau gets the validation loss.
        clip_norm: clip the norm of the gradients to this.
        accumulate: batches whose gradients make one step.
        callbacks: see ``brim.train.Callback``.
        seed: of the order of the samples.
        device: where to train.
        progress: print progress.
        on_swap: "error", "warn" or "off": what to do when more than 16 MiB of this process move to swap within a tenth
            of a second (looked at between two steps, and after each epoch). The default stops: a run that swaps goes on
            many times slower.
        compile: plan each step before the first and replay it; False runs every operation by itself, for debugging
            and for models that cannot be traced. Both train to the same numbers, bit for bit; evaluation and prediction
            differ by rounding, since planned ones fold batch norm into the layer before it.
        fit: what to do when a step does not fit the budget: None refuses; "recompute" keeps fewer activations and
            computes them again in the backward pass, with the same numbers; "microbatch" splits each batch into as
            few parts as fit and adds their gradients, the same up to rounding (losses that are a mean or a sum over
            samples; batch norm normalises each part by itself).
        recompute: names of layers whose activations are computed again in the backward pass in any case.
        activations: dtype in which activations are kept for the backward pass, such as "bfloat16"; None as computed.
        precision: "fp32", "bf16" (products and activations in bfloat16), "fp16" (the same in float16, with a scale of
            the loss that adapts itself; steps whose gradients overflow are skipped), or "tf32" (see
            ``brim.set_float32_precision``). Parameters are float32 in all of them. See ``brim.autocast``.

    Attributes:
        history: one dict per epoch: epoch, step, lr, loss, metrics, and with ``val_`` those of the validation.
        epoch, step: epochs and optimizer steps done.
        stopped: why the training ended early, or an empty string.
        interrupted: whether Ctrl-C ended it.
        options: compile, fit, recompute, activations and precision, as given.
        planned: the plan of the latest ``fit``; None with ``compile=False``.
    """

    def __init__(
        self,
        model: Module,
        optimizer: Optimizer,
        loss: Any = None,
        budget: BudgetLike | None = None,
        metrics: Iterable[str | Metric] = ("accuracy",),
        schedule: Any = None,
        clip_norm: float | None = None,
        accumulate: int = 1,
        callbacks: Iterable[Callback] = (),
        seed: int = 0,
        device: Any = None,
        progress: bool = True,
        on_swap: Literal["error", "warn", "off"] = "error",
        compile: bool = True,
        fit: Literal["recompute", "microbatch"] | None = None,
        recompute: Iterable[str] | str = (),
        activations: Any = None,
        precision: Literal["fp32", "bf16", "fp16", "tf32"] = "fp32",
    ) -> None:
        if accumulate < 1:
            raise ValueError(f"accumulate: expected 1 or more batches, got {accumulate!r}")
        if fit not in (None, "recompute", "microbatch"):
            raise ValueError(f"fit: expected 'recompute', 'microbatch' or None, got {fit!r}")
        self.model = model if device is None else model.to(device)
        self.optimizer, self.schedule = optimizer, schedule
        self.loss = CrossEntropyLoss() if loss is None else loss
        self.budget, self.metrics = budget, find_metrics(metrics)
        self.clip_norm, self.accumulate, self.seed = clip_norm, accumulate, seed
        self.callbacks, self.progress = list(callbacks), progress
        first = next(iter(model.parameters()), None)
        self.device = first.device if first is not None else find_device(device)
        self.history: list[dict[str, Any]] = []
        self.epoch = self.step = 0
        self.stopped, self.interrupted = "", False
        self.elapsed_s = 0.0
        self.swap_watch = SwapWatch(on_swap, tolerance_bytes=_SWAP_TOLERANCE_BYTES)
        self._averages = Averages()
        self._best: float | None = None
        self._loader_state: dict[str, Any] | None = None
        self.planned: Plan | None = None
        self._steps = Steps(model, self.loss, optimizer, clip_norm, accumulate, bool(self.metrics), precision)
        layers = [recompute] if isinstance(recompute, str) else list(recompute)
        self.options = {"compile": compile, "fit": fit, "recompute": layers, "activations": activations}
        self.options["precision"] = precision
        if not compile and (fit or layers or activations):
            raise ValueError("fit, recompute and activations are for planned steps; leave compile=False out")
        self._run: EagerSteps | PlannedSteps = (
            PlannedSteps(self._steps, real_device(self.device), recompute=layers, activations=activations)
            if compile
            else EagerSteps(self._steps, self.device)
        )

    @property
    def scaler(self) -> GradScaler | None:
        """What scales the loss with ``precision="fp16"``."""
        return self._steps.scaler

    # ---------------------------------------------------------------- planning

    def plan(
        self,
        batch_size: int | None = None,
        data: Any = None,
        inputs: Spec | None = None,
        targets: Spec | None = None,
        validation: Any = None,
        evaluation: bool = True,
        device_profile: str | None = None,
    ) -> Plan:
        """What training will need, before anything is allocated or run; works for a model on the meta device too.

        Without ``data`` and ``inputs`` the shapes are inferred: inputs from the model's first layer (Linear,
        BatchNorm1d, LayerNorm) or its method ``example_batch(batch_size)``, targets from the loss.

        Arguments:
            batch_size: samples in a batch.
            data: a dataset of (inputs, targets) or a DataLoader: also plans the smaller last batch of an epoch.
            inputs, targets: ``brim.spec(shape, dtype)`` with the batch as the first axis.
            validation: a dataset whose evaluation is planned, too; without one, that of the training's batches.
            evaluation: False plans the training alone.
            device_profile: plan for this card instead (``brim.program.profiles``); everything is estimated then.

        Raises:
            ValueError: the shapes cannot be inferred; the message says what to pass.
            TraceError: a step cannot be planned.
        """
        run = self._run
        if not isinstance(run, PlannedSteps):
            raise ValueError("plan() needs planned steps: leave compile=False out")
        if device_profile is not None:
            run = run.on_profile(device_profile)
        loader = other = None
        if data is not None:
            loader = data if isinstance(data, DataLoader) else self._loader(data, batch_size or 64, shuffle=True)
            batches = batches_of_loader(loader, batch_size)
            count = -(-loader.num_samples // batches[0][0].shape[0]) if len(batches) > 1 else len(loader)
        else:
            batches = [infer_batch(self.model, self.loss, batch_size, inputs, targets, run.output_spec)]
            count = self.accumulate
        held_out = batches if evaluation else []
        if validation is not None:
            other = self._loader(validation, batches[0][0].shape[0], False)
            held_out = batches_of_loader(other)
        run.feed_from(loader, loader if validation is None else other)
        return run.plan(training_batches(batches, count, self.accumulate), held_out)

    def _admit(self, loader: DataLoader, validation: Any, progress: Progress) -> None:
        """Plan all that ``fit`` will run, hold it against the budget, say what it comes to."""
        run = self._run
        if not isinstance(run, PlannedSteps):
            return
        train = training_batches(batches_of_loader(loader), len(loader), self.accumulate)
        other = None if validation is None else self._loader(validation, loader.batch_size, False)
        held_out = () if other is None else batches_of_loader(other)
        run.feed_from(loader, other)
        plan = self.planned = run.admit(train, held_out, self.options["fit"], progress.message)
        limit_bytes = self.device.memory.limit_bytes
        line = f"planned: peak {format_bytes(plan.peak_bytes)}"
        if limit_bytes is None:
            progress.message(f"{line}, no budget")
            return
        line += f" of {format_bytes(limit_bytes)}"
        if self.progress and (most := largest_batch_quickly(plan, self.device, limit_bytes)) is not None:
            line += f"; batch {most:,} would be the largest"
        progress.message(line)

    # ---------------------------------------------------------------- training

    def fit(
        self,
        train: Any,
        epochs: int,
        validation: Any = None,
        batch_size: int = 64,
        out: str | Path | None = None,
        resume: bool = False,
        checkpoint_every: int | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> list[dict[str, Any]]:
        """Train for ``epochs`` epochs; after a resume or ``load``, up to ``epochs`` in all.

        Arguments:
            train: a dataset of (inputs, targets), shuffled each epoch, or a DataLoader.
            epochs: how many.
            validation: a dataset to evaluate after each epoch.
            batch_size: samples in a batch, where ``train`` is a dataset.
            out: folder for config.json, metrics.jsonl, summary.json, model.safetensors, log.txt and checkpoints.
            resume: continue from the newest checkpoint in ``out``, if there is one.
            checkpoint_every: also save a checkpoint every so many steps.
            config: hyper-parameters to record in config.json beside the Trainer's own.

        Returns:
            The history.

        Raises:
            BudgetExceeded: a step does not fit the budget; the memory it took is given back.
            FloatingPointError: the loss is not finite; the message names the layer. Checkpoints are untouched.
            CheckpointError: the checkpoint in ``out`` is damaged or of another model.
        """
        if epochs < 1:
            raise ValueError(f"epochs: expected 1 or more, got {epochs!r}")
        loader = train if isinstance(train, DataLoader) else self._loader(train, batch_size, shuffle=True)
        folder = (
            None
            if out is None
            else RunFolder(out, {**describe_settings(self, epochs, loader.batch_size), **(config or {})})
        )
        if resume and folder is not None and (found := latest_checkpoint(folder.path, "last")) is not None:
            self.load(found)
            folder.keep_metrics(len(self.history))
        goal = epochs if self._loader_state is not None else self.epoch + epochs
        if self._loader_state is not None:
            loader.load_state_dict(self._loader_state)
            self._loader_state = None
        self.stopped, self.interrupted = "", False
        log = None if folder is None else folder.log
        with self._limited(), on_interrupt(self._ask_to_stop):
            self.device.memory.reset_peak()
            progress = Progress(goal, loader.num_samples, self._memory, self.progress, log)
            try:
                self._admit(loader, validation, progress)
                progress.begin()
                for callback in self.callbacks:
                    callback.on_fit_begin(self)
                while self.epoch < goal and not self.stopped:
                    self._run_epoch(loader, validation, folder, progress, checkpoint_every)
                for callback in self.callbacks:
                    callback.on_fit_end(self)
                if self.stopped:
                    progress.message(f"stopped after epoch {self.epoch}, step {self.step}: {self.stopped}")
            finally:
                progress.close()
            if folder is not None:
                folder.finish(self._model_arrays(), describe_results(self, self._best))
        return self.history

    def stop(self, reason: str) -> None:
        """End the training after this step or epoch."""
        self.stopped = self.stopped or reason

    def _ask_to_stop(self) -> None:
        self.interrupted = True
        self.stop("interrupted by Ctrl-C")

    def _run_epoch(
        self, loader: DataLoader, validation: Any, folder: RunFolder | None, progress: Progress, every: int | None
    ) -> None:
        start_s = time.perf_counter()
        self.model.train()
        with give_back_on_refusal():
            finished = self._run_steps(loader, folder, progress, every)
        self.swap_watch.check(f"step {self.step}")
        if not finished:
            if folder is not None:
                self._checkpoint(folder, "last", loader, 2)
            return
        elapsed_s = time.perf_counter() - start_s
        self.elapsed_s += elapsed_s
        record: dict[str, Any] = {
            "epoch": self.epoch + 1,
            "step": self.step,
            "lr": self.optimizer.param_groups[0]["lr"],
            **self._averages.means(),
        }
        if validation is not None:
            found = self._evaluate(validation, loader.batch_size)
            record |= {f"val_{name}": value for name, value in found.items()}
        self._end_epoch(record, loader, folder, progress, elapsed_s)

    def _run_steps(self, loader: DataLoader, folder: RunFolder | None, progress: Progress, every: int | None) -> bool:
        """The steps that are left of an epoch; False when ``stop`` ended it early. What is done in each step counts
        against small models, so that what may wait (reading the memory in swap, showing progress) goes by the clock."""
        batches, accumulate, steps, callbacks = len(loader), self.accumulate, self._steps, self.callbacks
        look_s = time.perf_counter() + _SWAP_EVERY_S
        for inputs, targets in loader.for_steps(self.device):
            position = loader.position
            begun = (position - 1) // accumulate * accumulate
            steps.share = 1.0 / min(accumulate, batches - begun)
            stepped = position % accumulate == 0 or position == batches
            loss = self._batch(inputs, targets, position == begun + 1, stepped)
            self.step += stepped
            now_s = progress.step(self.epoch, position * loader.batch_size, len(targets), self._averages)
            del inputs, targets  # the next batch is written into the same memory, which is still in the cache
            if not stepped:
                continue
            if now_s >= look_s:
                look_s = now_s + _SWAP_EVERY_S
                self.swap_watch.check(f"step {self.step}")
            for callback in callbacks:
                callback.on_step_end(self, loss)
            if folder is not None and every and self.step % every == 0:
                self._checkpoint(folder, "last", loader, 2)
            if self.stopped and position < batches:
                return False
        return True

    def _end_epoch(
        self,
        record: dict[str, Any],
        loader: DataLoader,
        folder: RunFolder | None,
        progress: Progress,
        elapsed_s: float,
    ) -> None:
        progress.epoch(self.epoch, {k: v for k, v in record.items() if k not in ("epoch", "step")})
        watched = record.get("val_loss", record["loss"])
        if isinstance(self.schedule, ReduceLROnPlateau):
            self.schedule.step(watched)
        elif self.schedule is not None:
            self.schedule.step()
        self._averages = Averages()
        self.epoch += 1
        self.history.append(record)
        for callback in self.callbacks:
            callback.on_epoch_end(self, record)
        better = improved(watched, self._best)
        self._best = watched if better else self._best
        if folder is not None:
            folder.append_metrics({**record, "elapsed_s": elapsed_s})
            if better:
                self._checkpoint(folder, "best", loader, 1)
            self._checkpoint(folder, "last", loader, 2)

    def _batch(self, inputs: np.ndarray[Any, Any], targets: np.ndarray[Any, Any], first: bool, last: bool) -> float:
        with self._run.exclusive():
            try:
                outputs = self._run.train(inputs, targets, first, last)
            except LossNotFinite:
                raise self._not_finite(inputs) from None
            value = self._steps.loss_value
            means = {"loss": value}
            if self.metrics:
                means |= self._measure(outputs, targets)
            self._averages.add(len(targets), means)
        return value

    def _not_finite(self, inputs: np.ndarray[Any, Any]) -> FloatingPointError:
        self.device.memory.arena.release()  # to run the layers one by one
        self.device.memory.stage.release()
        with self._steps.precision.forward():
            where = first_non_finite(self.model, as_tensor(inputs, self.device))
        return FloatingPointError(
            f"the loss is {self._steps.loss_value} at step {self.step + 1}: {where}; lower the learning rate, or set "
            "clip_norm"
        )

    def _measure(self, outputs: Any, targets: np.ndarray[Any, Any]) -> dict[str, float]:
        if not self.metrics:
            return {}
        host = self._run.on_host(outputs)
        targets = targets.numpy() if isinstance(targets, Gathered) else targets
        return {name: float(metric(host, targets)) for name, metric in self.metrics.items()}

    # ---------------------------------------------------------------- using the model

    def evaluate(self, dataset: Any, batch_size: int = 256) -> dict[str, float]:
        """Mean loss and metrics over a dataset, in evaluation mode."""
        with self._limited():
            return self._evaluate(dataset, batch_size)

    def _evaluate(self, dataset: Any, batch_size: int) -> dict[str, float]:
        averages = Averages()
        with evaluating(self.model), give_back_on_refusal():
            for inputs, targets in self._loader(dataset, batch_size, shuffle=False).for_steps(self.device):
                with self._run.exclusive():
                    outputs = self._run.evaluate(inputs, targets)
                    averages.add(len(targets), {"loss": self._steps.loss_value, **self._measure(outputs, targets)})
        return averages.means()

    def predict(self, inputs: Any, batch_size: int = 256) -> np.ndarray[Any, Any]:
        """The model's outputs for an array of inputs (N, ...) or a dataset, in evaluation mode, as one array."""
        outputs = []
        with self._limited(), evaluating(self.model), give_back_on_refusal():
            if isinstance(inputs, Tensor):
                inputs = inputs.detach().numpy()
            if isinstance(inputs, np.ndarray):
                starts = range(0, len(inputs), batch_size)
                batches: Iterable[Any] = (inputs[i : i + batch_size] for i in starts)
            else:
                batches = (batch[0] for batch in self._loader(inputs, batch_size, shuffle=False).for_steps(self.device))
            for batch in batches:
                with self._run.exclusive():
                    outputs.append(np.array(self._run.predict(batch).detach().numpy()))
        if not outputs:
            raise ValueError("predict: there are no inputs")
        return np.concatenate(outputs)

    def _loader(self, dataset: Any, batch_size: int, shuffle: bool) -> DataLoader:
        if isinstance(dataset, DataLoader):
            return dataset
        return DataLoader(dataset, batch_size, shuffle=shuffle, seed=self.seed, device=self.device)

    def _limited(self) -> AbstractContextManager[None]:
        if self.device.is_meta:
            raise DeviceError(
                "the model is on the meta device, which has shapes and no values: it can be planned, not run; build it "
                "outside brim.meta()"
            )
        return nullcontext() if self.budget is None else self.device.memory.lowered(self.budget)

    def _memory(self) -> tuple[int, int | None]:
        return self.device.memory.live_bytes, self.device.memory.limit_bytes

    # ---------------------------------------------------------------- saving

    def save(self, folder: str | Path) -> Path:
        """Save a checkpoint and model.safetensors to a folder; returns the checkpoint's path."""
        run = RunFolder(folder, describe_settings(self, self.epoch, None))
        path = self._checkpoint(run, "last", None, 2)
        run.finish(self._model_arrays(), describe_results(self, self._best))
        return path

    def load(self, path: str | Path) -> None:
        """Restore everything from a checkpoint, or from the newest one of a run's folder.

        Raises:
            CheckpointError: none there, damaged, or of another model.
        """
        checkpoint = load_checkpoint(latest_checkpoint(path, "last") or path)
        arrays, state = checkpoint.arrays_by_part["model"], checkpoint.state
        own = self.model.state_dict()
        check_compatible(
            {name: (value.shape, value.dtype) for name, value in own.items()},
            {name: (value.shape, value.dtype) for name, value in arrays.items()},
            str(checkpoint.path),
        )
        if len(state["callbacks"]) != len(self.callbacks):
            raise CheckpointError(
                f"{checkpoint.path}: saved with {len(state['callbacks'])} callbacks, there are {len(self.callbacks)}"
            )
        self.optimizer.load_state(checkpoint.arrays_by_part.get("optimizer", {}), state["optimizer"])
        self.model.load_state_dict(arrays)
        if self.schedule is not None and state["schedule"] is not None:
            self.schedule.load_state_dict(state["schedule"])
        for callback, saved in zip(self.callbacks, state["callbacks"]):
            callback.load_state_dict(saved)
        random.set_state(state["random"])
        self.history = list(state["history"])
        self.epoch, self.step, self._best = state["epoch"], state["step"], state["best"]
        self.elapsed_s = state["elapsed_s"]
        if self.scaler is not None and state.get("scaler"):  # a run of another precision has none
            self.scaler.load_state_dict(state["scaler"])
        self._averages.load_state_dict(state["averages"])
        self._loader_state = state["loader"]

    def _checkpoint(self, folder: RunFolder, series: str, loader: DataLoader | None, keep: int) -> Path:
        arrays = {"model": self._model_arrays(), "optimizer": self.optimizer.state_arrays()}
        state = {
            "optimizer": self.optimizer.state_settings(),
            "schedule": None if self.schedule is None else self.schedule.state_dict(),
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
            "callbacks": [callback.state_dict() for callback in self.callbacks],
            "random": random.get_state(),
            "loader": None if loader is None else loader.state_dict(),
            "history": self.history,
            "averages": self._averages.state_dict(),
            "epoch": self.epoch,
            "step": self.step,
            "best": self._best,
            "elapsed_s": self.elapsed_s,
        }
        return folder.checkpoint(series, arrays, state, self.step, keep)

    def _model_arrays(self) -> dict[str, np.ndarray[Any, Any]]:
        return {name: v.detach().numpy() for name, v in self.model.state_dict().items()}
