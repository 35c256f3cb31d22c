"""Kernels of conv2d and its gradients: windows of one image and group unrolled into a matrix, then one product."""

from __future__ import annotations

from typing import Any

import numpy as np

from brim_cpu.blocks import as_float32, carve, carve_bytes
from brim_cpu.registry import kernel
from brim_cpu.windows import window_slices

Parts = tuple[tuple[tuple[int, ...], Any], ...]


def _parts(x_shape: Any, w_shape: Any, g_shape: Any, groups: int, dtype: Any) -> Parts:
    """Scratch: unrolled windows (K, L), two matrices for outputs (O, L), weights (O, K) twice, one image group."""
    wide = as_float32(np.dtype(dtype))
    channels, outputs = w_shape[1], w_shape[0] // groups
    k, length = channels * w_shape[2] * w_shape[3], g_shape[2] * g_shape[3]
    return (
        ((channels, w_shape[2], w_shape[3], *g_shape[2:]), wide),
        ((outputs, length), wide),
        ((w_shape[0], k), wide),
        ((outputs, k), wide),
        ((channels, *x_shape[2:]), wide),
    )


def _unroll(columns: Any, image: Any, how: dict[str, Any]) -> Any:
    """``columns[c, a, b]`` = what window element (a, b) sees in channel c, 0 outside; returned as a matrix."""
    if any(how["padding"]):
        columns.fill(0)
    for a, b, into, of in window_slices(image.shape[1:], columns.shape[3:], columns.shape[1:3], **how):
        np.copyto(columns[:, a, b, into[0], into[1]], image[:, of[0], of[1]], casting="unsafe")
    return columns.reshape(-1, columns.shape[3] * columns.shape[4])


def _wide_weight(buffer: Any, w: Any, groups: int) -> Any:
    np.copyto(buffer.reshape(w.shape), w, casting="unsafe")
    return buffer.reshape(groups, -1, buffer.shape[1])


@kernel("conv2d", scratch=lambda ins, outs, *, groups, **_: carve_bytes(
    *_parts(ins[0].shape, ins[1].shape, outs[0].shape, groups, outs[0].dtype)
))  # fmt: skip
def _conv2d(out: Any, x: Any, w: Any, *, groups: int, scratch: Any, **how: Any) -> None:
    columns, result, weights, _, _ = carve(scratch, *_parts(x.shape, w.shape, out.shape, groups, out.dtype))
    weights = _wide_weight(weights, w, groups)
    c, o = w.shape[1], w.shape[0] // groups
    for n in range(x.shape[0]):
        for k in range(groups):
            matrix = _unroll(columns, x[n, k * c : (k + 1) * c], how)
            np.matmul(weights[k], matrix, out=result)
            np.copyto(out[n, k * o : (k + 1) * o], result.reshape(o, *out.shape[2:]), casting="unsafe")


@kernel("conv2d_grad_input", scratch=lambda ins, outs, *, groups, **_: carve_bytes(
    *_parts(outs[0].shape, ins[1].shape, ins[0].shape, groups, outs[0].dtype)
))  # fmt: skip
def _grad_input(out: Any, g: Any, w: Any, *, groups: int, size: Any, scratch: Any, **how: Any) -> None:
    columns, wide, weights, _, image = carve(scratch, *_parts(out.shape, w.shape, g.shape, groups, out.dtype))
    weights = _wide_weight(weights, w, groups)
    c, o = w.shape[1], w.shape[0] // groups
    matrix = columns.reshape(weights.shape[2], -1)
    for n in range(out.shape[0]):
        for k in range(groups):
            np.copyto(wide.reshape(o, *g.shape[2:]), g[n, k * o : (k + 1) * o], casting="unsafe")
            np.matmul(weights[k].T, wide, out=matrix)
            image.fill(0)
            for a, b, of, into in window_slices(out.shape[2:], g.shape[2:], w.shape[2:], **how):
                target = image[:, into[0], into[1]]
                np.add(target, columns[:, a, b, of[0], of[1]], out=target)
            np.copyto(out[n, k * c : (k + 1) * c], image, casting="unsafe")


@kernel("conv2d_grad_weight", scratch=lambda ins, outs, *, groups, **_: carve_bytes(
    *_parts(ins[1].shape, outs[0].shape, ins[0].shape, groups, outs[0].dtype)
))  # fmt: skip
def _grad_weight(out: Any, g: Any, x: Any, *, groups: int, kernel: Any, scratch: Any, **how: Any) -> None:
    columns, wide, total, part, _ = carve(scratch, *_parts(x.shape, out.shape, g.shape, groups, out.dtype))
    c, o = out.shape[1], out.shape[0] // groups
    total.fill(0)
    sums = total.reshape(groups, o, -1)
    for n in range(x.shape[0]):
        for k in range(groups):
            matrix = _unroll(columns, x[n, k * c : (k + 1) * c], how)
            np.copyto(wide.reshape(o, *g.shape[2:]), g[n, k * o : (k + 1) * o], casting="unsafe")
            np.matmul(wide, matrix.T, out=part)
            np.add(sums[k], part, out=sums[k])
    np.copyto(out, total.reshape(out.shape), casting="unsafe")
