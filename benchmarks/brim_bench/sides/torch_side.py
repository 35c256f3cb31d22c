"""PyTorch: eager as its documentation shows it, eager with its own fast options, and compiled.

On CUDA every variant has fused optimizers, images in channels_last and cuDNN's search for the quickest algorithms,
since nobody who measures leaves them out.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import numpy as np
import torch

from brim_bench.sides.base import Side, Unsupported, weights
from brim_bench.timing import Events

__all__ = ["Torch", "TorchCompile", "TorchFused", "TorchGraphs"]


class _CudaEvents:
    """``brim_bench.timing.Events`` on the current stream."""

    def mark(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, before: Any, after: Any) -> float:
        after.synchronize()
        return before.elapsed_time(after) * 1e-3


class Torch(Side):
    """Eager PyTorch."""

    name: ClassVar[str] = "torch"
    import_code: ClassVar[str] = "import torch"
    fused: bool | None = None  # None: the optimizer's own choice
    last: bool = False  # images as channels_last
    nn, F = torch.nn, torch.nn.functional

    def __init__(self, device: str = "cpu", threads: int = 1, eager: bool = False) -> None:
        super().__init__(device, threads, eager)
        if device.partition(":")[0] not in ("cpu", "cuda"):
            raise Unsupported(f"PyTorch has no device {device!r}")
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        self.place = torch.device(device)
        if self.place.type == "cuda":
            if not torch.cuda.is_available():
                raise Unsupported("this PyTorch has no CUDA, or sees no device")
            torch.cuda.set_device(self.place)
            self.fused = self.last = True
            torch.backends.cudnn.benchmark = True  # its quickest algorithms, tried at the first run
            self.rotation_bytes = 2.0 * torch.cuda.get_device_properties(self.place).L2_cache_size

    def version(self) -> str:
        return str(torch.__version__)

    def threads_used(self) -> int:
        return torch.get_num_threads()

    def facts(self) -> dict[str, str]:
        options = {"fused optimizers": self.fused, "channels_last": self.last}
        found = {"options": ", ".join(name for name, on in options.items() if on) or "none"}
        if self.place.type == "cuda":
            found |= {"device": torch.cuda.get_device_name(self.place), "cuda": str(torch.version.cuda)}
            found["cudnn"] = f"{torch.backends.cudnn.version()}, benchmark mode"
        return found

    def asarray(self, host: np.ndarray[Any, Any]) -> Any:
        return torch.from_numpy(np.ascontiguousarray(host)).to(self.place)

    def numpy(self, value: Any) -> np.ndarray[Any, Any]:
        host = value.detach().cpu()
        return (host.float() if host.dtype == torch.bfloat16 else host).numpy()

    def repeated(self, block: Any, shape: Sequence[int], dtype: str) -> Any:
        count = math.prod(shape)
        times = -(-count // block.shape[0])
        return block.to(getattr(torch, dtype)).repeat(times)[:count].clone().reshape(tuple(shape))

    def images(self, host: np.ndarray[Any, Any]) -> Any:
        found = self.asarray(host)
        return found.contiguous(memory_format=torch.channels_last) if self.last and found.ndim == 4 else found

    def channels_last(self, model: Any) -> Any:
        return model.to(memory_format=torch.channels_last) if self.last else model

    def parameter(self, host: np.ndarray[Any, Any]) -> Any:
        return torch.nn.Parameter(host if isinstance(host, torch.Tensor) else self.asarray(host))

    def load(self, model: Any, seed: int) -> Any:
        found = weights({name: p.shape for name, p in model.named_parameters()}, seed)
        model.load_state_dict({name: torch.from_numpy(host) for name, host in found.items()}, strict=False)
        return model.to(self.place)

    def optimizer(self, which: str, parameters: Iterable[Any]) -> Any:
        if which == "sgd":
            return torch.optim.SGD(parameters, lr=0.01, momentum=0.9, fused=self.fused)
        return torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.01, fused=self.fused)

    def thirds(self, x: Any) -> Sequence[Any]:
        return x.chunk(3, dim=-1)

    def global_average(self) -> Any:
        return torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())

    def loader(self, x: np.ndarray[Any, Any], y: np.ndarray[Any, Any], batch: int) -> Iterable[tuple[Any, Any]]:
        dataset = torch.utils.data.TensorDataset(self.asarray(x), self.asarray(y))
        return torch.utils.data.DataLoader(dataset, batch_size=batch, shuffle=True)

    def feed(
        self, x: np.ndarray[Any, Any], y: np.ndarray[Any, Any], batch: int, resident: bool
    ) -> Iterable[tuple[Any, Any]]:
        if resident:
            return _Resident(self.asarray(x), self.asarray(y), batch)
        dataset = torch.utils.data.TensorDataset(torch.from_numpy(x), torch.from_numpy(y))
        pinned = self.place.type == "cuda"
        loader = torch.utils.data.DataLoader(dataset, batch_size=batch, shuffle=True, pin_memory=pinned)
        return _Moved(loader, self.place)

    def set_precision(self, name: str) -> None:
        kind = "tf32" if name == "tf32" else "ieee"
        if self.place.type == "cuda":
            torch.backends.cuda.matmul.fp32_precision = kind
            torch.backends.cudnn.conv.fp32_precision = kind

    def casts(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.place.type, torch.bfloat16, enabled=self.precision == "bf16")

    def events(self) -> Events | None:
        return _CudaEvents() if self.place.type == "cuda" else None

    def inference(self, model: Any) -> Callable[..., Any]:
        forward = self.wrapped(model)

        def infer(x: Any) -> Any:
            with torch.inference_mode():
                return forward(x)

        return infer

    def with_gradients(
        self, fn: Callable[[Any], Any], x: Any, gradient: Any, parameters: Sequence[Any] = ()
    ) -> Callable[[], Any]:
        forward, leaf = self.wrapped(fn), x.detach().requires_grad_()

        def run() -> tuple[Any, ...]:
            leaf.grad = None
            for one in parameters:
                one.grad = None
            y = forward(leaf)
            y.backward(gradient)
            return (y, leaf.grad, *[one.grad for one in parameters])

        return run

    def synchronize(self) -> None:
        if self.place.type == "cuda":
            torch.cuda.synchronize(self.place)

    def start_memory(self) -> None:
        gc.collect()
        if self.place.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.place)

    def memory_figures(self, job: Any) -> dict[str, float]:
        if self.place.type != "cuda":
            return {}
        return {
            "held_peak_bytes": torch.cuda.max_memory_allocated(self.place),
            "reserved_peak_bytes": torch.cuda.max_memory_reserved(self.place),
        }


class _Moved:
    """Batches of a loader, copied to the device without waiting where they are pinned."""

    def __init__(self, loader: Any, place: Any) -> None:
        self.loader, self.place = loader, place

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        for x, y in self.loader:
            yield x.to(self.place, non_blocking=True), y.to(self.place, non_blocking=True)


class _Resident:
    """Batches of a data set that lies on the device, picked there by the order of the epoch."""

    def __init__(self, x: Any, y: Any, batch: int) -> None:
        self.x, self.y, self.batch = x, y, batch

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        order = torch.randperm(self.x.shape[0], device=self.x.device)
        for picked in order.split(self.batch):
            yield self.x[picked], self.y[picked]


class TorchFused(Torch):
    """Eager PyTorch with its own fast options: fused optimizers, images as channels_last."""

    name: ClassVar[str] = "torch_fused"
    fused: bool | None = True
    last: bool = True


class TorchCompile(TorchFused):
    """The same through ``torch.compile``; needs a C++ compiler on the CPU, Triton on CUDA."""

    name: ClassVar[str] = "torch_compile"
    compiles: ClassVar[bool] = True
    mode: ClassVar[str] = "default"

    def facts(self) -> dict[str, str]:
        return {**super().facts(), "steps": f"torch.compile, mode {self.mode}"}

    def wrapped(self, model: Any) -> Callable[..., Any]:
        return torch.compile(model, mode=self.mode)

    def forward(self, fn: Callable[[], Any]) -> Callable[[], Any]:
        return torch.compile(fn, mode=self.mode)

    def start_memory(self) -> None:
        torch.compiler.reset()  # compiled code keeps graphs, and they their memory
        super().start_memory()

    def refuses(self, error: Exception) -> bool:
        compiler = type(error).__module__.startswith(("torch._dynamo", "torch._inductor", "torch._functorch"))
        return compiler or super().refuses(error)


class TorchGraphs(TorchCompile):
    """Compiled in the mode that replays CUDA graphs; on the CPU the same as the default mode."""

    name: ClassVar[str] = "torch_graphs"
    mode: ClassVar[str] = "reduce-overhead"

    def wrapped(self, model: Any) -> Callable[..., Any]:
        return _marking(super().wrapped(model))

    def forward(self, fn: Callable[[], Any]) -> Callable[[], Any]:
        return _marking(super().forward(fn))


def _marking(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """Tells the graphs' memory that a new run begins, and the results of the last one are no longer needed."""

    def run(*args: Any) -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        return compiled(*args)

    return run
