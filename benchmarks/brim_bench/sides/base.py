"""What a workload may ask of a side: the library's names (PyTorch's), its arrays, and how it wants a step to be run.

A side whose names are not PyTorch's overrides whole workloads instead: a method called like ``Workload.kind``, with the
workload's parameters, returns the Job.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from brim_bench.workload import Job, Workload

__all__ = ["Side", "Unsupported"]


class Unsupported(Exception):
    """A side does not have this workload; the text says why."""


class Side:
    """One contestant, alive in a process of its own.

    Arguments:
        device: "cpu", "cuda" or another of brim's devices.
        threads: how many threads it may use; the environment's variables are set before the process starts.
        eager: without the library's compilation of steps.

    Attributes:
        name: as in ``--vs``.
        import_code: what a user's first line is, for the time to import.
        nn, F: layers and functions by PyTorch's names.
        checking: the workload that is built is compared, not timed: nothing in it may be random.
    """

    name: ClassVar[str] = ""
    import_code: ClassVar[str] = ""
    nn: Any = None
    F: Any = None

    def __init__(self, device: str = "cpu", threads: int = 1, eager: bool = False) -> None:
        self.device, self.threads, self.eager = device, threads, eager
        self.checking = False

    # ---- what it is

    def version(self) -> str:
        """Of the library."""
        return "?"

    def threads_used(self) -> int:
        """How many threads the library says that it uses."""
        return self.threads

    def facts(self) -> dict[str, str]:
        """More to record about this side and its device."""
        return {}

    # ---- arrays and layers

    def asarray(self, host: np.ndarray[Any, Any]) -> Any:
        """The library's array on the side's device."""
        raise Unsupported(f"{self.name} has no arrays for this workload")

    def numpy(self, value: Any) -> np.ndarray[Any, Any]:
        """A host array of a result."""
        return np.asarray(value)

    def images(self, host: np.ndarray[Any, Any]) -> Any:
        """The same for images (N, C, H, W), in the layout that the side prefers."""
        return self.asarray(host)

    def channels_last(self, model: Any) -> Any:
        """A model in the layout that the side prefers for images."""
        return model

    def parameter(self, host: np.ndarray[Any, Any]) -> Any:
        """A trainable parameter."""
        raise Unsupported(f"{self.name} has no parameters")

    def load(self, model: Any, seed: int) -> Any:
        """The model on the device, its weights set to ``weights(shapes)``."""
        raise Unsupported(f"{self.name} has no models")

    def optimizer(self, which: str, parameters: Iterable[Any]) -> Any:
        """SGD with momentum 0.9 and rate 0.01, or AdamW with rate 1e-3 and decay 0.01."""
        raise Unsupported(f"{self.name} has no optimizers")

    def output_shape(self, layer: Any, x: Any) -> tuple[int, ...]:
        """Of a layer's result for x."""
        return tuple(layer(x).shape)

    def permute(self, x: Any, axes: Sequence[int]) -> Any:
        """Axes in another order."""
        return x.permute(axes)

    def thirds(self, x: Any) -> Sequence[Any]:
        """Three equal pieces along the last axis."""
        raise Unsupported(f"{self.name} cannot split arrays")

    def global_average(self) -> Any:
        """A layer (N, C, H, W) -> (N, C): the mean of each channel."""
        raise Unsupported(f"{self.name} has no pooling")

    def loader(self, x: np.ndarray[Any, Any], y: np.ndarray[Any, Any], batch: int) -> Iterable[tuple[Any, Any]]:
        """Shuffled batches, another order each time."""
        raise Unsupported(f"{self.name} has no data loader")

    # ---- how things run

    def step(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """A training step or an update, as a user of the library would run it."""
        return fn

    def forward(self, fn: Callable[[], Any]) -> Callable[[], Any]:
        """A computation without gradients."""
        return fn

    def wrapped(self, model: Any) -> Callable[..., Any]:
        """A model within a training step."""
        return model

    def inference(self, model: Any) -> Callable[..., Any]:
        """A model in evaluation mode, without gradients."""
        return model

    def with_gradients(
        self, fn: Callable[[Any], Any], x: Any, gradient: Any, parameters: Sequence[Any] = ()
    ) -> Callable[[], Any]:
        """Runs ``y = fn(x)`` and its backward pass from ``gradient`` (None: y is one number): y, dx, dparameters."""
        raise Unsupported(f"{self.name} has no gradients")

    def synchronize(self) -> None:
        """Return when the device has finished."""

    # ---- memory

    def compiled(self, fn: Any) -> tuple[Any, ...]:
        """What ``memory_figures`` wants to know of a compiled step."""
        return ()

    def start_memory(self) -> None:
        """Before a workload is built: give back what an earlier one left, start high-water marks anew."""

    def memory_figures(self, job: Job) -> dict[str, float]:
        """Exact figures, where the library has them."""
        return {}

    # ---- building

    def build(self, workload: Workload, checking: bool) -> Job:
        """The workload on this side: by its own method, or by the common builder."""
        self.checking = checking
        own = getattr(self, workload.kind, None)
        if own is not None:
            return own(**workload.params)
        if workload.build is None:
            raise Unsupported(f"{workload.name} is a process of its own")
        return workload.build(self, checking, **workload.params)


def weights(shapes: Mapping[str, Sequence[int]], seed: int) -> dict[str, np.ndarray[Any, Any]]:
    """Initial weights by name, the same for every library.

    Matrices and kernels are normal with variance 1 / inputs, biases small; the weights of norms stay ones.
    """
    rng, found = np.random.default_rng(seed), {}
    for name, shape in shapes.items():
        if len(shape) > 1:
            found[name] = rng.standard_normal(tuple(shape), np.float32) / np.sqrt(np.prod(shape[1:]), dtype=np.float32)
        elif name.endswith("bias"):
            found[name] = 0.01 * rng.standard_normal(tuple(shape), np.float32)
    return found
