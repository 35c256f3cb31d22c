"""Single operations of a size for GPUs: products, a chain of elementwise operations, norms, softmax, losses, attention.

Sizes are such that what is bound by memory moves more than twice the last cache of the cards of 2024 in each run.
Least traffic is counted as in ``primitives`` and ``layers``: a row that a block of threads can keep is read once.
"""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np

from brim_bench.workload import Job, Workload, with_tiny
from brim_bench.workloads.layers import dropout_results
from brim_bench.workloads.rotating import count_sets, in_turn

__all__ = ["ATTENTION", "ELEMENTWISE", "GEMMS", "NORMS"]

ITEM = {"float32": 4, "bfloat16": 2}
_TOLERANCE = {"fp32": 1e-4, "tf32": 5e-3, "bf16": 2e-2}


def gpu_gemm(side: Any, checking: bool, m: int, k: int, n: int, dtype: str) -> Job:
    """a @ b of (m, k) and (k, n)."""
    sets = count_sets(side, ITEM[dtype] * (m * k + k * n))
    runs = []
    for number in range(sets):
        a, b = side.noise((m, k), 2 * number, dtype), side.noise((k, n), 2 * number + 1, dtype)
        runs.append(side.forward(lambda a=a, b=b: a @ b))
    return Job(
        in_turn(runs), lambda: {"product": side.sample(runs[0]())},
        tuple(one for run in runs for one in side.compiled(run)), sets,
    )  # fmt: skip


def gpu_eltwise(side: Any, checking: bool, count: int, dtype: str) -> Job:
    """relu(1.5 x + 0.25)."""
    sets, relu, runs = count_sets(side, ITEM[dtype] * count), side.F.relu, []
    for number in range(sets):
        x = side.noise((count,), number, dtype)
        runs.append(side.forward(lambda x=x: relu(x * 1.5 + 0.25)))
    return Job(
        in_turn(runs), lambda: {"result": side.sample(runs[0]())},
        tuple(one for run in runs for one in side.compiled(run)), sets,
    )  # fmt: skip


def _layer(side: Any, function: Any, shape: tuple[int, ...], dtype: str, parameters: Any = (), look: Any = None) -> Job:
    """Forward and backward of ``function``, gradients of its input and parameters; results have the input's shape."""
    sets = count_sets(side, 2 * ITEM[dtype] * prod(shape))
    runs, first = [], None
    for number in range(sets):
        x, gradient = side.noise(shape, 2 * number, dtype), side.noise(shape, 2 * number + 1, dtype)
        if len(shape) == 4:
            x, gradient = side.channels_last(x), side.channels_last(gradient)
        first = first or (x, gradient)
        runs.append(side.with_gradients(function, x, gradient, parameters))

    def results() -> dict[str, Any]:
        y, dx, *rest = (side.sample(value) for value in runs[0]())
        if look is not None:
            assert first is not None
            return look(side.sample(first[0]), side.sample(first[1]), y, dx)
        found = {"result": y, "gradient": dx}
        return found | {f"gradient of parameter {n}": one for n, one in enumerate(rest)}

    return Job(in_turn(runs), results, tuple(one for run in runs for one in side.compiled(run)), sets)


def gpu_ln(side: Any, checking: bool, n: int, d: int, dtype: str) -> Job:
    """Layer norm over rows, weights in the dtype of the rows."""
    hosts = np.linspace(0.5, 1.5, d, dtype=np.float32), np.zeros(d, np.float32)
    weight, bias = (side.parameter(side.repeated(side.asarray(one), (d,), dtype)) for one in hosts)
    norm = side.F.layer_norm
    return _layer(side, lambda x: norm(x, (d,), weight, bias), (n, d), dtype, [weight, bias])


def gpu_bn(side: Any, checking: bool, shape: tuple[int, ...]) -> Job:
    """Batch norm over images in training."""
    layer = side.load(side.nn.BatchNorm2d(shape[1]), seed=1)
    return _layer(side, layer, shape, "float32", list(layer.parameters()))


def gpu_softmax(side: Any, checking: bool, n: int, c: int) -> Job:
    """Softmax over rows."""
    softmax = side.F.softmax
    return _layer(side, lambda x: softmax(x, -1), (n, c), "float32")


def gpu_dropout(side: Any, checking: bool, n: int, d: int) -> Job:
    """Dropout of a half, forward and backward."""
    return _layer(side, side.load(side.nn.Dropout(0.5), seed=1), (n, d), "float32", look=dropout_results)


def gpu_xent(side: Any, checking: bool, n: int, c: int) -> Job:
    """Cross entropy of (n, c) scores, and its gradient."""
    sets, runs = count_sets(side, 4.0 * n * c), []
    y = side.asarray(np.random.default_rng(1).integers(0, c, n))
    entropy = side.F.cross_entropy
    for number in range(sets):
        runs.append(side.with_gradients(lambda x: entropy(x, y), side.noise((n, c), number), None))

    def results() -> dict[str, Any]:
        loss, gradient = runs[0]()
        return {"loss": side.numpy(loss), "gradient": side.sample(gradient)}

    return Job(in_turn(runs), results, tuple(one for run in runs for one in side.compiled(run)), sets)


def gpu_attention(side: Any, checking: bool, batch: int, heads: int, tokens: int, width: int, dtype: str) -> Job:
    """Causal attention, forward and backward, by the library's own function."""
    shape = (batch, heads, tokens, width)
    sets, runs, attend = count_sets(side, 4 * ITEM[dtype] * prod(shape)), [], side.F.scaled_dot_product_attention
    for number in range(sets):
        q, k, v, gradient = (side.noise(shape, 4 * number + one, dtype) for one in range(4))
        k, v = side.parameter(k), side.parameter(v)
        runs.append(side.with_gradients(lambda q, k=k, v=v: attend(q, k, v, is_causal=True), q, gradient, [k, v]))

    def results() -> dict[str, Any]:
        names = ("result", "gradient of q", "gradient of k", "gradient of v")
        return {name: side.sample(value) for name, value in zip(names, runs[0](), strict=True)}

    return Job(in_turn(runs), results, tuple(one for run in runs for one in side.compiled(run)), sets)


# ---- sizes


def _gemm(m: int, k: int, n: int, precision: str) -> Workload:
    dtype = "bfloat16" if precision == "bf16" else "float32"
    nbytes = ITEM[dtype] * (m * k + k * n + m * n)
    return Workload(
        f"gpu_gemm_{m}x{k}x{n}_{precision}", f"product of {m} x {k} and {k} x {n}, {precision}", "gpu_gemm",
        {"m": m, "k": k, "n": n, "dtype": dtype}, flops=2.0 * m * k * n, nbytes=nbytes, build=gpu_gemm,
        tolerances={"product": _TOLERANCE[precision]}, precision=precision, needs_bytes=4 * nbytes + 2**30,
        random=False, fuses=False, importance=2 if m == 8192 else 5,
    )  # fmt: skip


def _eltwise(count: int, dtype: str) -> Workload:
    nbytes = 2 * ITEM[dtype] * count
    return Workload(
        f"gpu_eltwise_{dtype}", f"relu(1.5 x + 0.25) of {count:,} numbers, {dtype}", "gpu_eltwise",
        {"count": count, "dtype": dtype}, nbytes=nbytes, build=gpu_eltwise,
        tolerances={"result": 1e-6 if dtype == "float32" else 2e-2}, needs_bytes=3 * nbytes + 2**30, random=False,
        importance=3,
    )  # fmt: skip


_CLOSE = {"result": 1e-4, "gradient": 1e-3, "gradient of parameter 0": 1e-3, "gradient of parameter 1": 1e-3}
# Sums over 16,384 rows of bfloat16 are rounded once at their end: weights' gradients differ by the order alone.
_CLOSE_BF16 = dict.fromkeys(_CLOSE, 3e-2)


def _ln(n: int, d: int, dtype: str) -> Workload:
    nbytes = ITEM[dtype] * n * d * 5.0  # x, y; x, dy, dx
    return Workload(
        f"gpu_ln_{dtype}", f"layer norm of {n:,} rows of {d:,}, {dtype}, forward and backward", "gpu_ln",
        {"n": n, "d": d, "dtype": dtype}, nbytes=nbytes, build=gpu_ln,
        tolerances=_CLOSE if dtype == "float32" else _CLOSE_BF16, needs_bytes=3 * nbytes + 2**30, random=False,
        importance=3,
    )  # fmt: skip


def _bn(shape: tuple[int, ...]) -> Workload:
    nbytes = 4 * prod(shape) * 8.0  # forward reads x for the statistics and for the result; backward x and dy twice
    return Workload(
        "gpu_bn_fp32", f"batch norm of {shape[0]} images of {shape[1]} x {shape[2]} x {shape[3]} in training, forward "
        "and backward", "gpu_bn", {"shape": shape}, nbytes=nbytes, build=gpu_bn, tolerances=_CLOSE,
        needs_bytes=2 * nbytes + 2**30, random=False, importance=3,
    )  # fmt: skip


def _softmax(n: int, c: int) -> Workload:
    nbytes = 4.0 * n * c * 5  # x, y; y, dy, dx
    return Workload(
        "gpu_softmax_fp32", f"softmax of {n:,} rows of {c:,}, forward and backward", "gpu_softmax", {"n": n, "c": c},
        nbytes=nbytes, build=gpu_softmax, tolerances={"result": 1e-4, "gradient": 1e-3},
        needs_bytes=2 * nbytes + 2**30, random=False, importance=4,
    )  # fmt: skip


def _dropout(n: int, d: int) -> Workload:
    nbytes = 4.0 * n * d * 4  # x, y; dy, dx
    return Workload(
        "gpu_dropout_fp32", f"dropout of a half of {n:,} x {d:,}, forward and backward", "gpu_dropout",
        {"n": n, "d": d}, nbytes=nbytes, build=gpu_dropout,
        tolerances={"share kept": 5e-2 if n * d < 2**16 else 5e-3, "kept values are doubled": 0.0},
        needs_bytes=2 * nbytes + 2**30, random=False, importance=3,
    )  # fmt: skip


def _xent(n: int, c: int) -> Workload:
    nbytes = 4.0 * n * c * 2  # at best a block keeps its row of scores: read once, the gradient written once
    return Workload(
        f"gpu_xent_{c}_fp32", f"cross entropy of {n:,} x {c:,} scores, with its gradient", "gpu_xent",
        {"n": n, "c": c}, nbytes=nbytes, build=gpu_xent, tolerances={"loss": 1e-4, "gradient": 1e-4},
        needs_bytes=4 * nbytes + 2**30, random=False, importance=3,
    )  # fmt: skip


def _attention(batch: int, heads: int, tokens: int, width: int, dtype: str) -> Workload:
    elements = batch * heads * tokens * width
    return Workload(
        f"gpu_attention_{tokens}_bf16",
        f"causal attention of {batch} x {heads} heads of {width}, {tokens:,} tokens, {dtype}, forward and backward",
        "gpu_attention", {"batch": batch, "heads": heads, "tokens": tokens, "width": width, "dtype": dtype},
        # Two products forward, four backward, each of half the pairs; scores that are made again are not counted.
        flops=6 * 2.0 * elements * tokens / 2, nbytes=ITEM[dtype] * elements * 12.0, build=gpu_attention,
        tolerances=dict.fromkeys(("result", "gradient of q", "gradient of k", "gradient of v"), 3e-2),
        precision="bf16", needs_bytes=40.0 * ITEM[dtype] * elements + 2**30, random=False, fuses=False,
        importance=2 if tokens in (1024, 4096) else 4,
    )  # fmt: skip


_TINY_GEMM = {"m": 24, "k": 40, "n": 16}

GEMMS = tuple(
    with_tiny(_gemm, _TINY_GEMM, m=m, k=k, n=n, precision=precision)
    for m, k, n, found in (
        (8192, 8192, 8192, ("fp32", "tf32", "bf16")),
        (4096, 4096, 4096, ("tf32", "bf16")),
        (8192, 768, 3072, ("bf16",)),
        (128, 784, 256, ("fp32",)),
    )
    for precision in found
)

ELEMENTWISE = tuple(with_tiny(_eltwise, {"count": 5000}, count=2**27, dtype=dtype) for dtype in ITEM)

NORMS = (
    *[with_tiny(_ln, {"n": 40, "d": 24}, n=16_384, d=4096, dtype=dtype) for dtype in ITEM],
    with_tiny(_bn, {"shape": (4, 6, 5, 5)}, shape=(64, 256, 56, 56)),
    with_tiny(_softmax, {"n": 30, "c": 20}, n=16_384, c=4096),
    with_tiny(_dropout, {"n": 100, "d": 200}, n=16_384, d=4096),
    with_tiny(_xent, {"n": 20, "c": 1000}, n=8192, c=32_768),
    with_tiny(_xent, {"n": 20, "c": 1003}, n=4096, c=50_257),
)

ATTENTION = tuple(
    with_tiny(
        _attention, {"batch": 2, "heads": 2, "tokens": tokens // 64, "width": 16},
        batch=16_384 // tokens, heads=16, tokens=tokens, width=64, dtype="bfloat16",
    )
    for tokens in (512, 1024, 2048, 4096, 8192)
)  # fmt: skip
