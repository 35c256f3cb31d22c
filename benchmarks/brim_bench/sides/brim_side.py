"""brim, run as its user runs it: steps through ``brim.compile`` (or eagerly, with ``--eager``)."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import numpy as np

import brim
from brim import data, nn, optim
from brim.check.environment import facts
from brim_bench.sides.base import Side, weights
from brim_bench.timing import Events
from brim_bench.workload import Job

__all__ = ["Brim"]


class _GlobalAverage(nn.Module):
    def forward(self, x: Any) -> Any:
        return x.mean(axis=(2, 3))


class _Feed:
    """Batches as planned steps take them: the Trainer's way."""

    def __init__(self, loader: data.DataLoader) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        return iter(self.loader.for_steps())


class Brim(Side):
    """The framework under test."""

    name: ClassVar[str] = "brim"
    import_code: ClassVar[str] = "import brim"
    nn, F = nn, nn.functional

    def __init__(self, device: str = "cpu", threads: int = 1, eager: bool = False) -> None:
        super().__init__(device, threads, eager)
        brim.manual_seed(0)
        self.place = brim.device(device)
        brim.set_default_device(self.place)
        brim.set_threads(threads)
        self._live_bytes = self._allocations = 0
        measuring = getattr(self.place.backend, "measuring", None)
        self.measuring = None if measuring is None else measuring(self.place.index)
        self.rotation_bytes = 2.0 * self.card().get("l2_bytes", 0)

    def version(self) -> str:
        return brim.__version__

    def threads_used(self) -> int:
        return brim.get_threads()

    def facts(self) -> dict[str, str]:
        told = getattr(self.place.backend, "native_status", None)
        native = {} if told is None else {"native kernels": str(told()).partition(" (/")[0]}  # without the file's place
        return facts(self.place) | native | {"steps": "eager" if self.eager else "brim.compile"}

    def asarray(self, host: np.ndarray[Any, Any]) -> Any:
        return brim.asarray(host, device=self.place)

    def numpy(self, value: Any) -> np.ndarray[Any, Any]:
        return value.detach().numpy()

    def repeated(self, block: Any, shape: Sequence[int], dtype: str) -> Any:
        times = -(-math.prod(shape) // block.shape[0])
        flat = brim.broadcast_to(block.astype(dtype).reshape((1, -1)), (times, block.shape[0])).reshape((-1,))
        flat = flat if flat.shape[0] == math.prod(shape) else flat[: math.prod(shape)].copy()
        return flat.reshape(tuple(shape))

    def parameter(self, host: np.ndarray[Any, Any]) -> Any:
        return nn.Parameter(host if isinstance(host, brim.Tensor) else self.asarray(host))

    def load(self, model: Any, seed: int) -> Any:
        found = weights({name: p.shape for name, p in model.named_parameters()}, seed)
        model = model.to(self.place)
        model.load_state_dict({name: brim.asarray(host) for name, host in found.items()}, strict=False)
        return model

    def optimizer(self, which: str, parameters: Iterable[Any]) -> Any:
        if which == "sgd":
            return optim.SGD(parameters, lr=0.01, momentum=0.9)
        return optim.AdamW(parameters, lr=1e-3, weight_decay=0.01)

    def output_shape(self, layer: Any, x: Any) -> tuple[int, ...]:
        with brim.no_grad():
            return tuple(layer(x).shape)

    def permute(self, x: Any, axes: Sequence[int]) -> Any:
        return x.permute_dims(tuple(axes))

    def thirds(self, x: Any) -> Sequence[Any]:
        return brim.ops.split(x, 3, axis=-1)

    def global_average(self) -> Any:
        return _GlobalAverage()

    def loader(self, x: np.ndarray[Any, Any], y: np.ndarray[Any, Any], batch: int) -> Iterable[tuple[Any, Any]]:
        return data.DataLoader(data.ArrayDataset(x, y), batch_size=batch, shuffle=True)

    def feed(
        self, x: np.ndarray[Any, Any], y: np.ndarray[Any, Any], batch: int, resident: bool
    ) -> Iterable[tuple[Any, Any]]:
        dataset = data.ArrayDataset(x, y)
        return _Feed(data.DataLoader(dataset, batch_size=batch, shuffle=True, device=self.place, resident=resident))

    def set_precision(self, name: str) -> None:
        brim.set_float32_precision("tf32" if name == "tf32" else "full")

    def casts(self) -> AbstractContextManager[Any]:
        return brim.autocast("bfloat16", enabled=self.precision == "bf16")

    def step(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        return fn if self.eager else brim.compile(fn)

    def _last(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """Results that are used before the next run: no copy of them is asked for."""
        return fn if self.eager else brim.compile(fn, copy=False)

    def forward(self, fn: Callable[[], Any]) -> Callable[[], Any]:
        return self._last(fn)

    def inference(self, model: Any) -> Callable[..., Any]:
        def infer(x: Any) -> Any:
            with brim.no_grad():
                return model(x)

        return self._last(infer)

    def with_gradients(
        self, fn: Callable[[Any], Any], x: Any, gradient: Any, parameters: Sequence[Any] = ()
    ) -> Callable[[], Any]:
        def run() -> tuple[Any, ...]:
            leaf = x.detach().requires_grad_()
            y = fn(leaf)
            return (y.detach(), *brim.grad(y, [leaf, *parameters], gradient))

        return self._last(run)

    def synchronize(self) -> None:
        self.place.backend.synchronize(self.place.index)

    def events(self) -> Events | None:
        return self.measuring

    def card(self) -> dict[str, Any]:
        if self.measuring is None:
            return {}
        memory = self.place.memory.sizes()
        return {**self.measuring.card(), "total_bytes": memory[0]}

    def state(self) -> dict[str, float]:
        return {} if self.measuring is None else self.measuring.state()

    def compiled(self, fn: Any) -> tuple[Any, ...]:
        return (fn,) if hasattr(fn, "current_plan") else ()

    def start_memory(self) -> None:
        gc.collect()
        self.place.memory.arena.release()
        self.place.memory.stage.release()
        brim.empty_cache(self.place)
        brim.reset_peak_memory(self.place)
        self._live_bytes = brim.memory_stats(self.place)["live_bytes"]

    def memory_figures(self, job: Job) -> dict[str, float]:
        """The plan's peak and what the ledger held at most, both without the overhead; allocations of a run."""
        before = brim.memory_stats(self.place)
        job.run()
        after = brim.memory_stats(self.place)
        found = {
            "held_peak_bytes": after["peak_bytes"] - self._live_bytes,
            **(
                {}
                if self.measuring is None
                else {"reserved_peak_bytes": after["peak_held_bytes"] - self.place.memory.overhead_bytes}
            ),
            "allocations_per_run": after["allocations"] - before["allocations"],
        }
        plans = [one.peak_bytes - one.overhead_bytes for one in (step.current_plan() for step in job.compiled)]
        return found | ({"planned_peak_bytes": max(plans)} if plans else {})
