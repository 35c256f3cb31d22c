"""The Trainer's steps made ready to run: planned together and replayed, or run eagerly.

Training step, smaller last batch, evaluation and its last batch take turns in one arena; the plan of all of them is
what is held against the budget before the first step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from brim.autograd import no_grad
from brim.data import DataLoader
from brim.device import Device, process_default
from brim.errors import ShapeError, TraceError
from brim.gathered import Gathered
from brim.memory.guard import give_back_on_refusal
from brim.memory.pool import round_up
from brim.nn import Module
from brim.program.admit import needed_bytes, refusal, staged_where_it_fits
from brim.program.batch import BatchSearch
from brim.program.compile import EXACT_TO_FIT, CompiledStep, leaner
from brim.program.fit import choose_recomputation, describe, remedies
from brim.program.ir import Value
from brim.program.plan import Plan, PlannedProgram, Resident
from brim.program.profiles import ProfileDevice, profile_facts
from brim.spec import Spec
from brim.tensor import Tensor, asarray
from brim.train.batches import Batch, TrainingBatch
from brim.train.steps import Steps

__all__ = ["EagerSteps", "PlannedSteps", "as_tensor", "evaluating", "largest_batch_quickly", "real_device"]

_MOST_PARTS = 256


class EagerSteps:
    """The steps as they are, on tensors made of each batch: for debugging, and for what cannot be traced."""

    def __init__(self, steps: Steps, device: Device) -> None:
        self.steps, self.device = steps, device

    def _tensor(self, array: Any) -> Tensor:
        return as_tensor(array, self.device)

    def exclusive(self) -> AbstractContextManager[Any]:
        """Nothing to hold: outputs have memory of their own."""
        return nullcontext()

    def on_host(self, outputs: Any) -> Any:
        """Outputs as a NumPy array, which keeps their memory."""
        return outputs.detach().numpy()

    def train(self, inputs: Any, targets: Any, first: bool, last: bool) -> Any:
        """``Steps.train``."""
        return self.steps.train(self._tensor(inputs), self._tensor(targets), first, last)

    def evaluate(self, inputs: Any, targets: Any) -> Any:
        """``Steps.evaluate``."""
        return self.steps.evaluate(self._tensor(inputs), self._tensor(targets))

    def predict(self, inputs: Any) -> Any:
        """``Steps.predict``."""
        return self.steps.predict(self._tensor(inputs))


def as_tensor(batch: Any, device: Device) -> Tensor:
    """A field of a batch, from the host or to be gathered, as a tensor."""
    return batch.tensor() if isinstance(batch, Gathered) else asarray(batch, device=device)


class PlannedSteps:
    """The steps as planned programs.

    Arguments:
        steps: the plain functions.
        device: where they run.
        options: of ``CompiledStep``, for the training step.

    Attributes:
        parts: micro-batches into which a training step splits its batch.
        data_sets: memory of data sets that are kept on the device.
        from_host: whether batches of the training, and of the evaluation, are copied from the host.
    """

    def __init__(self, steps: Steps, device: Device, **options: Any) -> None:
        self.steps, self.device = steps, device
        self.parts = 1
        self.data_sets: list[Resident] = []
        self.from_host: tuple[bool, ...] = (True, True)
        self._train = CompiledStep(steps.train, name="training step", device=device, copy=False, **options)
        self._evaluate = CompiledStep(steps.evaluate, name="evaluation", device=device, copy=False)
        self._predict = CompiledStep(steps.predict, name="prediction", device=device, copy=False)

    def exclusive(self) -> AbstractContextManager[Any]:
        """Inside, no other thread's step runs on the device: outputs last until the next step, whosever it is."""
        return nullcontext() if self.device.memory is None else self.device.memory.arena.lock

    def on_host(self, outputs: Any) -> Any:
        """Outputs as a NumPy array; it lasts until the next run of any program, and so keeps no memory."""
        if outputs.device.backend.shares_host_memory:
            return outputs.array
        return (self._train if self.steps.model.training else self._evaluate).on_host(outputs)

    def on_profile(self, name: str) -> PlannedSteps:
        """The same steps, to be planned for the card that a profile describes; they cannot be run there."""
        return self._like(self.steps, ProfileDevice(name, self.device))

    def _like(self, steps: Steps, device: Device) -> PlannedSteps:
        """Other steps, or another device, with the options of these."""
        made = PlannedSteps(steps, device, **asdict(self._train.options))
        made.parts, made.data_sets, made.from_host = self.parts, self.data_sets, self.from_host
        return made

    # ---------------------------------------------------------------- running

    def train(self, inputs: Any, targets: Any, first: bool, last: bool) -> Any:
        """``Steps.train``, planned; what it returns lasts until the next run of any program."""
        try:
            return self._train(inputs, targets, first, last, self.parts)
        except TraceError as error:
            raise _with_hint(error) from None

    def evaluate(self, inputs: Any, targets: Any) -> Any:
        """``Steps.evaluate``, planned."""
        with hinting():
            return self._evaluate(inputs, targets)

    def predict(self, inputs: Any) -> Any:
        """``Steps.predict``, planned."""
        with hinting():
            return self._predict(inputs)

    def explain(self) -> str:
        """Why there are the programs that there are."""
        named = (("train", self._train), ("evaluate", self._evaluate), ("predict", self._predict))
        return "\n".join(f"{name}: {line}" for name, step in named for line in step.explain().splitlines())

    # ---------------------------------------------------------------- planning

    def output_spec(self, inputs: Spec) -> Spec:
        """Shape and dtype of the model's outputs. Raises ValueError when there are several."""
        with hinting(), evaluating(self.steps.model):
            outputs = self._predict.plan(inputs).programs[0].prepared.program.results
        if len(outputs) != 1:
            raise ValueError(
                f"the model gives {len(outputs)} tensors, so the targets cannot be inferred: pass targets="
            )
        return Spec(outputs[0].spec.shape, outputs[0].spec.dtype)

    def plan(self, train: Sequence[TrainingBatch], evaluation: Sequence[Batch] = (), parts: int | None = None) -> Plan:
        """The plan of all programs together; nothing is allocated or run.

        Arguments:
            train: each kind of training step, the largest first (``training_batches``).
            evaluation: batches of the evaluation, the largest first.
            parts: micro-batches of a training step; ``self.parts`` when None.

        Raises:
            TraceError: a step cannot be planned.
        """
        used = self.parts if parts is None else parts
        largest = train[0][0][0].shape[0]
        whole: list[tuple[str, Plan, bool]] = []  # programs of whole batches: what other batch sizes are planned with
        programs = []
        with hinting(), mode(self.steps.model, True):
            for batch, first, last in train:
                name = "training step" if batch[0].shape[0] == largest else "last batch"
                if not last:
                    name = "first gradients" if first else "further gradients"
                one = self._train.plan(*batch, first, last, used)
                programs.append(self._fed(_named(name, one), self.from_host[0]))
                if batch[0].shape[0] == largest:
                    whole.append((name, one, True))
        with hinting(), evaluating(self.steps.model):
            for number, batch in enumerate(evaluation):
                name = "evaluation" if number == 0 else "last evaluation batch"
                one = self._evaluate.plan(*batch)
                programs.append(self._fed(_named(name, one), self.from_host[1]))
                if number == 0:
                    whole.append((name, one, False))
        return self._joined(programs, whole, self._alternatives(train) if used == self.parts else [])

    def feed_from(self, training: DataLoader | None, evaluation: DataLoader | None) -> None:
        """Plan for batches of these loaders from now on; data sets that they keep on the device are planned, too."""
        loaders = training, evaluation
        self.from_host = tuple(one is None or not one.is_resident(self.device) for one in loaders)
        self.data_sets, unit = [], self.device.backend.alignment_bytes
        for loader in dict.fromkeys(one for one in loaders if one is not None):
            for number, (spec, exists) in enumerate(loader.resident_memory(self.device)):
                value = Value(spec, "state", "inputs", "dataset")
                key = id(loader), number
                self.data_sets.append(Resident(key, value, round_up(value.nbytes, unit), exists))

    @staticmethod
    def _fed(program: PlannedProgram, from_host: bool) -> PlannedProgram:
        program.host_inputs = [from_host] * len(program.prepared.program.inputs)
        return program

    def _joined(
        self,
        programs: Sequence[PlannedProgram],
        whole: Sequence[tuple[str, Plan, bool]],
        alternatives: Sequence[tuple[str, Callable[[], Plan]]] = (),
    ) -> Plan:
        data_sets, from_host = self.data_sets, self.from_host
        programs[0].residents = [*programs[0].residents, *data_sets]

        def replan(shapes: list[tuple[int, ...]]) -> Plan:
            found = []
            for name, one, is_training in whole:  # partial batches are left out: they need less than whole ones
                assert one.replan is not None
                with mode(self.steps.model, True) if is_training else evaluating(self.steps.model):
                    made = one.replan([(shapes[0][0], *shape[1:]) for shape in one.input_shapes])
                found.append((name, made, is_training))
            self.data_sets, self.from_host = data_sets, from_host  # as they were when this plan was made
            named = [self._fed(_named(name, made), from_host[not is_training]) for name, made, is_training in found]
            return self._joined(named, found)

        shapes = whole[0][1].input_shapes
        options = self._train.options
        facts = profile_facts(self.device)
        return Plan(
            programs, self.device.name, "training step", None, replan, shapes,
            options=options, alternatives=alternatives, **facts,
        )  # fmt: skip

    def admit(
        self, train: Sequence[TrainingBatch], evaluation: Sequence[Batch], fit: str | None, tell: Callable[[str], Any]
    ) -> Plan:
        """Plan everything, hold it against the budget, and take the arena.

        Arguments:
            train, evaluation: as of ``plan``.
            fit: "recompute" or "microbatch": make it fit so; None refuses.
            tell: called with a line that says what was done to make it fit.

        Raises:
            BudgetExceeded: it does not fit; nothing was allocated or changed.
        """
        with give_back_on_refusal():
            made = self.plan(train, evaluation)
            refused = refusal(made, self.device)
            if refused is not None and (exact := self._exactly(made, train, evaluation)) is not None:
                tell(EXACT_TO_FIT)
                made, refused = exact, None
            if refused is not None and refused.most_bytes is not None:
                if fit == "recompute":
                    choice = choose_recomputation(made, refused.most_bytes, refused.needed)
                    if choice is not None and choice.fits:
                        self._train.options = replace(self._train.options, recompute=choice.layers)
                        tell(describe(made.what, choice, refused.most_bytes))
                        made = self.plan(train, evaluation)
                elif fit == "microbatch" and (parts := self._fewest_parts(train)) is not None:
                    self.parts = parts
                    tell(f"{self._parts_text(train, parts)} to fit")
                    made = self.plan(train, evaluation)
                refused = refusal(made, self.device)
            if refused is not None:
                raise refused.error(remedies)
            self.device.memory.arena.reserve(made.arena_bytes)
        return staged_where_it_fits(made, self.device)

    def _exactly(self, refused: Plan, train: Sequence[TrainingBatch], evaluation: Sequence[Batch]) -> Plan | None:
        """The plan with exact convolutions, if there were others and it fits; the steps are then run so."""
        if all(one.traced is None or len(leaner(refused.options, one.traced)) == 1 for one in refused.programs):
            return None
        steps = (self._train, self._evaluate, self._predict)
        before = [step.options for step in steps]
        for step in steps:
            step.options = replace(step.options, exact_convolutions=True)
        made = self.plan(train, evaluation)
        if refusal(made, self.device) is None:
            return made
        for step, options in zip(steps, before, strict=True):
            step.options = options
        return None

    @staticmethod
    def _parts_text(train: Sequence[TrainingBatch], parts: int) -> str:
        N = train[0][0][0].shape[0]
        return f"{parts} micro-batches of {'' if N % parts == 0 else 'at most '}{-(-N // parts)}"

    def _fewest_parts(self, train: Sequence[TrainingBatch]) -> int | None:
        """The fewest micro-batches with which the training steps fit, or None."""
        most = min(train[0][0][0].shape[0], _MOST_PARTS)

        def fits(parts: int) -> bool:
            return refusal(self.plan(train, (), parts), self.device) is None

        low, high = self.parts, min(self.parts * 2, most)
        while not fits(high):
            if high == most:
                return None
            low, high = high, min(high * 2, most)
        while high - low > 1:  # low does not fit, high does
            middle = (low + high) // 2
            low, high = (low, middle) if fits(middle) else (middle, high)
        return high

    def _alternatives(self, train: Sequence[TrainingBatch]) -> list[tuple[str, Callable[[], Plan]]]:
        """Half-width computing and micro-batches, as remedies for a plan that does not fit."""
        most = min(train[0][0][0].shape[0], _MOST_PARTS)
        found: list[tuple[str, Callable[[], Plan]]] = []
        half = self._in_half()
        if half is not None:
            found.append(('precision="bf16"', partial(half.plan, train, ())))
        parts = 2 * self.parts
        while parts <= most and parts < 16 * self.parts:
            found.append((self._parts_text(train, parts), partial(self.plan, train, (), parts)))
            parts *= 2
        return found

    def _in_half(self) -> PlannedSteps | None:
        """The same steps in bfloat16 where a model may be trained so and is not yet; else None."""
        steps = self.steps.in_half()
        return None if steps is None else self._like(steps, self.device)


def largest_batch_quickly(plan: Plan, device: Device, limit_bytes: int, seconds: float = 2.0) -> int | None:
    """The largest batch that fits beside what is live on the device, or None when the search would take longer."""
    deadline_s = time.monotonic() + seconds
    try:
        return BatchSearch(
            plan, limit_bytes, lambda one: needed_bytes(one, device), lambda: time.monotonic() >= deadline_s
        ).run()
    except (ValueError, TraceError, ShapeError):  # some models take batches of one size only
        return None


def _named(name: str, plan: Plan) -> PlannedProgram:
    """A plan's only program under another name."""
    found = plan.programs[0]
    found.name = name
    return found


def real_device(place: Device) -> Device:
    """Where a model will run: its device, or for a model without memory the process's default device."""
    return process_default() if place.is_meta else place


@contextmanager
def evaluating(model: Module) -> Iterator[None]:
    """The model in evaluation mode inside the block, without gradients."""
    with mode(model, False), no_grad():
        yield


@contextmanager
def mode(model: Module, is_training: bool) -> Iterator[None]:
    """All layers of a model in training or evaluation mode inside the block."""
    before = [(module, module.training) for module in model.modules()]
    model.train(is_training)
    try:
        yield
    finally:
        for module, was in before:
            if module.training is not was:
                module.training = was


@contextmanager
def hinting() -> Iterator[None]:
    """A step that cannot be planned can still be run."""
    try:
        yield
    except TraceError as error:
        raise _with_hint(error) from None


def _with_hint(error: TraceError) -> TraceError:
    return TraceError(f"{error}. Trainer(compile=False) runs it eagerly, without a plan")
