"""cuDNN on host memory, in NumPy: what each request means, for machines without a GPU.

It has the interface of ``brim_cuda.dnn.Dnn``. It is strict where the library only asks: unaligned or missing addresses
raise, and the workspace is overwritten from end to end, so that scratch that is smaller than planned, or memory of
something else, is seen.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from brim.spec import DTYPES
from brim_cuda.cublaslt_host import to_tf32
from brim_cuda.dnn import ALIGNMENT_BYTES, DnnPlan, DnnTensor, DnnUnsupported, Request
from brim_cuda.dnn_attention import AttentionGradRequest, AttentionRequest
from brim_cuda.dnn_conv import ConvRequest

__all__ = ["HostCudnn"]

Array = np.ndarray[Any, Any]
_F32 = DTYPES["float32"]
_NUMBERS_MAX = 256
_NOISE = 0xA5


class HostCudnn:
    """The library's twin. Implements ``brim_cuda.dnn.Dnn``.

    Attributes:
        executed: the plans that ran, in order.
        recording: the list to which launches are added instead of running; None to run them.
    """

    def __init__(self) -> None:
        self.executed: list[DnnPlan] = []
        self.recording: list[Callable[[], Any]] | None = None

    def version(self) -> str:
        """None."""
        return "NumPy in place of cuDNN"

    def plan(self, request: Request) -> DnnPlan:
        """With scratch of a size of its own for each kind of request. Raises DnnUnsupported."""
        if isinstance(request, ConvRequest):
            if request.w.shape[0] * request.w.shape[1] == 0:
                raise DnnUnsupported("no channels")
            # The library turns what does not lie channels last, and needs a few numbers besides.
            turned = [t for t in (request.x, request.w, request.y) if t.strides[1] != 1 or t.shape[1] == 1]
            return DnnPlan(request, f"host_{request.kind}", 131 + sum(_nbytes(t) for t in turned))
        if isinstance(request, AttentionRequest | AttentionGradRequest):
            if max(request.q.shape[-1], request.v.shape[-1]) > _NUMBERS_MAX:
                raise DnnUnsupported(f"rows of more than {_NUMBERS_MAX} numbers")
            kind = "host_attention" if isinstance(request, AttentionRequest) else "host_attention_grad"
            return DnnPlan(request, kind, 0 if kind == "host_attention" else _nbytes(request.logs))
        raise DnnUnsupported(f"no twin of {type(request).__name__}")

    def execute(self, plan: DnnPlan, pack: dict[int, int], workspace: int, stream: int) -> None:
        """At once, or when it is replayed. Raises ValueError for addresses that the library would fault at."""
        run = partial(self._run, plan, dict(pack), workspace)
        if self.recording is None:
            run()
        else:
            self.recording.append(run)

    def _run(self, plan: DnnPlan, pack: dict[int, int], workspace: int) -> None:
        self.executed.append(plan)
        tensors = plan.request.tensors
        if sorted(pack) != list(range(1, len(tensors) + 1)):
            raise ValueError(f"{plan.request.title}: {len(tensors)} addresses are needed, got numbers {sorted(pack)}")
        if plan.workspace_bytes:
            if not workspace:
                raise ValueError(f"{plan.request.title}: no workspace, {plan.workspace_bytes} bytes are needed")
            ctypes.memset(workspace, _NOISE, plan.workspace_bytes)
        arrays = [_array(pack[n], tensor) for n, tensor in enumerate(tensors, 1)]
        with np.errstate(all="ignore"):
            if isinstance(plan.request, ConvRequest):
                _convolve(plan.request, arrays)
            elif isinstance(plan.request, AttentionRequest):
                _attend(plan.request, arrays)
            else:
                assert isinstance(plan.request, AttentionGradRequest)
                _attend_grad(plan.request, arrays)


def _nbytes(tensor: DnnTensor) -> int:
    return math.prod(tensor.shape) * tensor.dtype.itemsize


def _array(address: int, tensor: DnnTensor) -> Array:
    if not address or address % ALIGNMENT_BYTES:
        raise ValueError(f"address {address:#x} is no multiple of {ALIGNMENT_BYTES}")
    memory: Any = (ctypes.c_char * tensor.extent_bytes).from_address(address)
    steps = tuple(step * tensor.dtype.itemsize for step in tensor.strides)
    return np.ndarray(tensor.shape, tensor.dtype, memory, 0, steps)


def _convolve(request: ConvRequest, arrays: list[Array]) -> None:
    x, w, y = arrays[:3]
    (sh, sw), (ph, pw), (dh, dw) = request.stride, request.padding, request.dilation
    groups = x.shape[1] // w.shape[1]
    (n, c, h, width), (o, inner, kh, kw), (high, wide) = x.shape, w.shape, y.shape[2:]
    read = to_tf32 if request.tf32 else np.asarray
    padded = np.zeros((n, groups, c // groups, h + 2 * ph, width + 2 * pw), _F32)
    image = padded[..., ph : ph + h, pw : pw + width]
    weight = np.zeros((groups, o // groups, inner, kh, kw), _F32)
    result = np.zeros((n, groups, o // groups, high, wide), _F32)
    if request.kind != "dgrad":
        image[...] = read(x.astype(_F32)).reshape(image.shape)
    if request.kind != "wgrad":
        weight[...] = read(w.astype(_F32)).reshape(weight.shape)
    if request.kind != "fprop":
        result[...] = read(y.astype(_F32)).reshape(result.shape)
    for r in range(kh):
        for s in range(kw):
            rows = slice(r * dh, r * dh + sh * (high - 1) + 1, sh)
            columns = slice(s * dw, s * dw + sw * (wide - 1) + 1, sw)
            if request.kind == "fprop":
                result += np.einsum("ngcij,goc->ngoij", padded[..., rows, columns], weight[..., r, s], optimize=True)
            elif request.kind == "dgrad":
                padded[..., rows, columns] += np.einsum("ngoij,goc->ngcij", result, weight[..., r, s], optimize=True)
            else:
                weight[..., r, s] = np.einsum("ngoij,ngcij->goc", result, padded[..., rows, columns], optimize=True)
    if request.kind == "dgrad":
        x[...] = image.reshape(x.shape)
    elif request.kind == "wgrad":
        w[...] = weight.reshape(w.shape)
    else:
        total = result.reshape(y.shape)
        for more in arrays[3:]:
            total = total + more.astype(_F32)
        y[...] = np.maximum(total, 0) if request.relu else total


def _scores(q: Array, k: Array, causal: bool, scale: float) -> Array:
    scores = (q.astype(_F32) @ k.astype(_F32).swapaxes(-1, -2)) * np.float32(scale)
    if causal:
        scores = np.where(np.tri(*scores.shape[-2:]) > 0, scores, np.float32(-np.inf))
    return scores


def _attend(request: AttentionRequest, arrays: list[Array]) -> None:
    q, k, v, y, logs = arrays
    scores = _scores(q, k, request.causal, request.scale)
    top = scores.max(axis=-1, keepdims=True)
    weights = np.exp(scores - top)
    total = weights.sum(axis=-1, keepdims=True)
    logs[...] = top + np.log(total)
    y[...] = (weights / total) @ v.astype(_F32)


def _attend_grad(request: AttentionGradRequest, arrays: list[Array]) -> None:
    q, k, v, y, g, logs = (array.astype(_F32) for array in arrays[:6])
    weights = np.exp(_scores(q, k, request.causal, request.scale) - logs)
    sums = (g * y).sum(axis=-1, keepdims=True)
    slopes = weights * (g @ v.swapaxes(-1, -2) - sums) * np.float32(request.scale)
    for array, made in zip(arrays[6:], (slopes @ k, slopes.swapaxes(-1, -2) @ q, weights.swapaxes(-1, -2) @ g)):
        array[...] = made
