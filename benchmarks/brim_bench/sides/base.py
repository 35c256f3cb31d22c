"""What a workload may ask of a side: the library's names (PyTorch's), its arrays, and how it wants a step to be run.

A side whose names are not PyTorch's overrides whole workloads instead: a method called like ``Workload.kind``, with the
workload's parameters, returns the Job.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np

from brim_bench.timing import Events
from brim_bench.workload import Job, Workload

__all__ = ["Side", "Unsupported"]

_BLOCK = 2**22 - 3  # odd: rows of a repeated block differ


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
        rotation_bytes: inputs that runs take in turn shall be so large together (twice the device's last cache); 0
            on the CPU, where the same arrays are used again.
    """

    name: ClassVar[str] = ""
    import_code: ClassVar[str] = ""
    nn: Any = None
    F: Any = None
    rotation_bytes: float = 0.0
    precision: str = "fp32"
    compiles: ClassVar[bool] = False  # a variant of a side that takes part in everything

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

    def noise(self, shape: Sequence[int], seed: int = 0, dtype: str = "float32") -> Any:
        """Normal numbers, the same on every side; made on the host in a block that is repeated on the device."""
        count = math.prod(shape)
        return self.repeated(self.asarray(_normal(min(count, _BLOCK), seed).copy()), shape, dtype)

    def repeated(self, block: Any, shape: Sequence[int], dtype: str) -> Any:
        """A row-major array of this shape: the flat block again and again, in another dtype."""
        raise Unsupported(f"{self.name} cannot repeat arrays")

    def sample(self, value: Any) -> np.ndarray[Any, Any]:
        """A host array of float32: a quarter of a million values or a few more, evenly spread, of what may be huge."""
        flat = value.detach().reshape(-1)
        return self.numpy(flat[:: max(1, flat.shape[0] // 2**18)]).astype(np.float32)

    def images(self, host: np.ndarray[Any, Any]) -> Any:
        """The same for images (N, C, H, W), in the layout that the side prefers."""
        return self.asarray(host)

    def channels_last(self, model: Any) -> Any:
        """A model in the layout that the side prefers for images."""
        return model

    def parameter(self, host: np.ndarray[Any, Any]) -> Any:
        """A trainable parameter, from a host array or one of the library's."""
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

    def feed(
        self, x: np.ndarray[Any, Any], y: np.ndarray[Any, Any], batch: int, resident: bool
    ) -> Iterable[tuple[Any, Any]]:
        """Shuffled batches on the device, by the quickest way that the library has.

        Arguments:
            x, y: the data set on the host.
            batch: samples of each batch.
            resident: the whole set lies on the device from the beginning.
        """
        raise Unsupported(f"{self.name} has no data path to a device")

    # ---- how things run

    def set_precision(self, name: str) -> None:
        """How products of float32 arrays are computed from now on: in full ("fp32", "bf16"), or as "tf32"."""
        if name != "fp32":
            raise Unsupported(f"{self.name} has no precision {name!r}")

    def casts(self) -> AbstractContextManager[Any]:
        """Within it a forward pass runs in the workload's precision: autocast for "bf16"."""
        return contextlib.nullcontext()

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

    # ---- the device

    def events(self) -> Events | None:
        """Marks on the device's stream; None where the host's clock is the one to use."""
        return None

    def card(self) -> dict[str, Any]:
        """Of a device: "name", "total_bytes", "free_bytes", "l2_bytes", "uuid"; empty for the CPU."""
        return {}

    def state(self) -> dict[str, float]:
        """Of a device now: clocks, temperature, power, as far as the driver tells."""
        return {}

    # ---- memory

    def compiled(self, fn: Any) -> tuple[Any, ...]:
        """What ``memory_figures`` wants to know of a compiled step."""
        return ()

    def start_memory(self) -> None:
        """Before a workload is built: give back what an earlier one left, start high-water marks anew."""

    def memory_figures(self, job: Job) -> dict[str, float]:
        """Exact figures, where the library has them."""
        return {}

    def refuses(self, error: Exception) -> bool:
        """Whether an error says that the library cannot do this workload, which is no failure of the comparison."""
        return isinstance(error, Unsupported)

    # ---- building

    def build(self, workload: Workload, checking: bool) -> Job:
        """The workload on this side: by its own method, or by the common builder."""
        if not workload.fuses and self.compiles:
            raise Unsupported("one operation, in which there is nothing to compile")
        self.checking, self.precision = checking, workload.precision
        self.set_precision(workload.precision)
        own = getattr(self, workload.kind, None)
        if own is not None:
            return own(**workload.params)
        if workload.build is None:
            raise Unsupported(f"{workload.name} is a process of its own")
        return workload.build(self, checking, **workload.params)


@lru_cache(maxsize=16)
def _normal(count: int, seed: int) -> np.ndarray[Any, Any]:
    """Normal numbers; large blocks take longer to make than to copy to a device."""
    found = np.random.default_rng(seed).standard_normal(count, np.float32)
    found.setflags(write=False)
    return found


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
