"""Rows of the ops that layers and losses are made of."""

from __future__ import annotations

from typing import Any

import numpy as np

from brim import ops
from brim.check.table import Bad, In, Row
from brim.errors import ShapeError

LOOSE = {"float16": (2e-2, 2e-2), "bfloat16": (1e-1, 1e-1), "float32": (1e-4, 1e-4)}
HOW = {"stride": (2, 1), "padding": (1, 0), "dilation": (1, 2), "groups": 2}
# The fast algorithm, where the sizes are such that a backend that has one chooses it.
FAST = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 1, "fast": True}
NEAR = {"float16": (2e-2, 2e-1), "bfloat16": (1e-1, 1.0), "float32": (1e-4, 2e-3)}  # sums of some hundred products
_WIDE = (2, 32, 16, 17)
LABELS = np.array([2, 0, -100, 3, 3])


def _windows(size: Any, kernel: Any, stride: Any, padding: Any, dilation: Any) -> Any:
    """(output row, output column, [(a, b, image row, image column) inside the image])."""
    h, w = size
    rows = (h + 2 * padding[0] - dilation[0] * (kernel[0] - 1) - 1) // stride[0] + 1
    columns = (w + 2 * padding[1] - dilation[1] * (kernel[1] - 1) - 1) // stride[1] + 1
    for i, j in np.ndindex(rows, columns):
        cells = [
            (a, b, i * stride[0] + a * dilation[0] - padding[0], j * stride[1] + b * dilation[1] - padding[1])
            for a, b in np.ndindex(*kernel)
        ]
        yield i, j, [(a, b, y, x) for a, b, y, x in cells if 0 <= y < h and 0 <= x < w]


def _conv_terms(x: Any, w: Any, g: Any, groups: int, how: dict[str, Any]) -> None:
    """Adds to whichever of the three arrays is not given (a zero array marked by its ``write`` flag in ``how``)."""
    target = how.pop("target")
    c, o = w.shape[1], w.shape[0] // groups
    for i, j, cells in _windows(x.shape[2:], w.shape[2:], **how):
        for k in range(groups):
            cs, os = slice(k * c, (k + 1) * c), slice(k * o, (k + 1) * o)
            for a, b, y, z in cells:
                if target == "out":
                    g[:, os, i, j] += x[:, cs, y, z] @ w[os, :, a, b].T
                elif target == "x":
                    x[:, cs, y, z] += g[:, os, i, j] @ w[os, :, a, b]
                else:
                    w[os, :, a, b] += g[:, os, i, j].T @ x[:, cs, y, z]


def _conv(x: Any, w: Any, *, groups: int, fast: bool = False, **how: Any) -> Any:
    sites = [(i, j) for i, j, _ in _windows(x.shape[2:], w.shape[2:], **how)]
    out = np.zeros((x.shape[0], w.shape[0], sites[-1][0] + 1, sites[-1][1] + 1))
    _conv_terms(x, w, out, groups, {**how, "target": "out"})
    return out


def _conv_input(g: Any, w: Any, *, size: Any, groups: int, fast: bool = False, **how: Any) -> Any:
    x = np.zeros((g.shape[0], w.shape[1] * groups, *size))
    _conv_terms(x, w, g, groups, {**how, "target": "x"})
    return x


def _conv_weight(g: Any, x: Any, *, kernel: Any, groups: int, fast: bool = False, **how: Any) -> Any:
    w = np.zeros((g.shape[1], x.shape[1] // groups, *kernel))
    _conv_terms(x, w, g, groups, {**how, "target": "w"})
    return w


def _max_pool(x: Any, **how: Any) -> Any:
    found = [(i, j, [x[:, :, y, z] for _, _, y, z in cells]) for i, j, cells in _windows(x.shape[2:], **how)]
    out = np.zeros((*x.shape[:2], found[-1][0] + 1, found[-1][1] + 1))
    for i, j, seen in found:
        out[:, :, i, j] = np.max(seen, axis=0)
    return out, None


def _avg_pool(x: Any, *, count_include_pad: bool, **how: Any) -> Any:
    cells = list(_windows(x.shape[2:], dilation=(1, 1), **how))
    out = np.zeros((*x.shape[:2], cells[-1][0] + 1, cells[-1][1] + 1))
    for i, j, inside in cells:
        count = np.prod(how["kernel"]) if count_include_pad else len(inside)
        out[:, :, i, j] = sum(x[:, :, y, z] for _, _, y, z in inside) / count
    return out


def _avg_pool_grad(g: Any, *, size: Any, count_include_pad: bool, **how: Any) -> Any:
    out = np.zeros((*g.shape[:2], *size))
    for i, j, inside in _windows(size, dilation=(1, 1), **how):
        for _, _, y, z in inside:
            out[:, :, y, z] += g[:, :, i, j] / (np.prod(how["kernel"]) if count_include_pad else len(inside))
    return out


def _put_at(g: Any, index: Any, *, size: Any, **how: Any) -> Any:
    out = np.zeros((*g.shape[:2], size[0] * size[1]))
    for n, c, i, j in np.ndindex(*g.shape):
        out[n, c, index[n, c, i, j]] += g[n, c, i, j]
    return out.reshape(*g.shape[:2], *size)


def _pick_at(x: Any, index: Any, **how: Any) -> Any:
    flat = x.reshape(*x.shape[:2], -1)
    return np.take_along_axis(flat, index.reshape(*index.shape[:2], -1), axis=2).reshape(index.shape)


def _normal(x: Any, w: Any, b: Any, axes: Any, eps: float) -> Any:
    mean, var = x.mean(axes, keepdims=True), x.var(axes, keepdims=True)
    return (x - mean) / np.sqrt(var + eps) * w + b, mean, var


def _softmax(x: Any, *, axis: int) -> Any:
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def _dropout(x: Any, *, p: float) -> Any:
    bits = np.random.Philox(counter=[0, 0, 3, 0], key=[7, 0])
    keep = np.random.Generator(bits).random(x.shape, dtype=np.float32) >= np.float32(p)
    return x * keep / (1 - p)


def _pick(x: Any, index: Any, *, ignore_index: int) -> Any:
    return np.array([0.0 if c == ignore_index else row[c] for row, c in zip(x, index, strict=True)])


def _put(g: Any, index: Any, *, classes: int, ignore_index: int) -> Any:
    out = np.zeros((len(index), classes))
    for n, c in enumerate(index):
        if c != ignore_index:
            out[n, c] = g[n]
    return out


def _spots(shape: tuple[int, ...], size: Any) -> In:
    """Indices into images of this size, each of an element of its window (of ``_SPARSE``)."""

    def values(rng: np.random.Generator) -> Any:
        at = []
        for axis in (0, 1):
            step, around, apart = (_SPARSE[name][axis] for name in ("stride", "padding", "dilation"))
            starts = np.expand_dims(np.arange(shape[2 + axis]) * step - around, 1 - axis)
            element = rng.integers(0, _SPARSE["kernel"][axis], shape)
            at.append(np.clip(starts + element * apart, 0, size[axis] - 1))
        return at[0] * size[1] + at[1]

    return In(shape, dtype="int32", values=values)


_labels = In((5,), dtype="int64", values=lambda rng: LABELS)
_distinct = In((2, 3, 5, 4), values=lambda rng: rng.permutation(120).reshape(2, 3, 5, 4) / 30)
_POOL = {"kernel": (3, 2), "stride": (2, 1), "padding": (1, 0)}
_SPARSE = {**_POOL, "dilation": (1, 2)}

# Inputs of a few MB, for measuring what kernels allocate.
_IMAGE_ROWS = (In((1024, 1024)),)
_classes = In((4096,), 0, 255, "int64")
_images, _weights, _gradients = In((8, 16, 64, 64)), In((32, 8, 3, 2)), In((8, 32, 32, 62))
_planes = In((4, 16, 128, 128))
_big_spots = _spots((4, 16, 64, 126), (128, 128))

ROWS = [
    Row("softmax", (In((3, 4)),), _softmax, {"axis": 1}, torch=lambda t, x: t.softmax(x, 1), big=_IMAGE_ROWS),
    Row(
        "log_softmax",
        (In((3, 4)),),
        lambda x, *, axis: np.log(_softmax(x, axis=axis)),
        {"axis": 0},
        torch=lambda t, x: t.log_softmax(x, 0),
        big=_IMAGE_ROWS,
    ),
    Row(
        "dropout",
        (In((40, 50)),),
        _dropout,
        {"p": 0.3},
        call=lambda x, *, p: ops.dropout(x, 7, 3, p=p),
        covers=("dropout",),
        big=(In((1024, 1024)),),
    ),
    Row(
        "batch_norm",
        (In((4, 3, 5)), In((3,)), In((3,))),
        lambda x, w, b, *, eps: _normal(x, w[:, None], b[:, None], (0, 2), eps),
        {"eps": 1e-3},
        tolerance=LOOSE,
        big=(In((64, 32, 512)), In((32,)), In((32,))),
    ),
    Row(
        "layer_norm",
        (In((4, 3, 5)), In((3, 5)), In((3, 5))),
        lambda x, w, b, *, ndim, eps: _normal(x, w, b, (1, 2), eps),
        {"ndim": 2, "eps": 1e-3},
        tolerance=LOOSE,
        big=(In((64, 32, 512)), In((32, 512)), In((32, 512))),
    ),
    Row("pick_classes", (In((5, 4)), _labels), _pick, {"ignore_index": -100}, big=(In((4096, 256)), _classes)),
    Row(
        "put_classes",
        (In((5,)), _labels),
        _put,
        {"classes": 4, "ignore_index": -100},
        big=(In((4096,)), _classes),
        big_params={"classes": 256},
    ),
    Row("conv2d", (In((2, 4, 5, 6)), In((6, 2, 3, 2))), _conv, HOW, tolerance=LOOSE, big=(_images, _weights)),
    Row(
        "conv2d_grad_input",
        (In((2, 6, 3, 4)), In((6, 2, 3, 2))),
        _conv_input,
        {**HOW, "size": (5, 6)},
        tolerance=LOOSE,
        big=(_gradients, _weights),
        big_params={"size": (64, 64)},
    ),
    Row(
        "conv2d_grad_weight",
        (In((2, 6, 3, 4)), In((2, 4, 5, 6))),
        _conv_weight,
        {**HOW, "kernel": (3, 2)},
        tolerance=LOOSE,
        big=(_gradients, _images),
    ),
    Row("conv2d", (In(_WIDE), In((32, 32, 3, 3))), _conv, FAST, tolerance=NEAR),
    Row(
        "conv2d_grad_input",
        (In(_WIDE), In((32, 32, 3, 3))),
        _conv_input,
        {**FAST, "size": _WIDE[2:]},
        tolerance=NEAR,
    ),
    Row("conv2d_grad_weight", (In(_WIDE), In(_WIDE)), _conv_weight, {**FAST, "kernel": (3, 3)}, tolerance=NEAR),
    Row("max_pool2d", (_distinct,), _max_pool, _SPARSE, tolerance=LOOSE, big=(_planes,)),
    Row(
        "max_pool2d_grad",
        (In((2, 3, 3, 2)), _spots((2, 3, 3, 2), (5, 4))),
        _put_at,
        {**_SPARSE, "size": (5, 4)},
        tolerance=LOOSE,
        big=(In((4, 16, 64, 126)), _big_spots),
        big_params={"size": (128, 128)},
        bad=(
            Bad((In((2, 3, 3, 3)), In((2, 3, 3, 3), dtype="int32")), ShapeError, {**_SPARSE, "size": (5, 4)}),
            Bad((In((2, 3, 3, 2)), In((2, 1, 3, 2), dtype="int32")), ShapeError, {**_SPARSE, "size": (5, 4)}),
        ),
    ),
    Row(
        "max_pool2d_pick",
        (In((2, 3, 5, 4)), _spots((2, 3, 3, 2), (5, 4))),
        _pick_at,
        _SPARSE,
        big=(_planes, _big_spots),
    ),
    Row(
        "avg_pool2d",
        (In((2, 3, 5, 4)),),
        _avg_pool,
        {**_POOL, "count_include_pad": False},
        tolerance=LOOSE,
        big=(_planes,),
    ),
    Row(
        "avg_pool2d_grad",
        (In((2, 3, 3, 3)),),
        _avg_pool_grad,
        {**_POOL, "count_include_pad": True, "size": (5, 4)},
        tolerance=LOOSE,
        big=(In((4, 16, 64, 127)),),
        big_params={"size": (128, 128)},
    ),
]
