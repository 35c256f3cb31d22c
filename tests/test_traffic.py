"""Kernels and bytes of planned programs: counted by hand for small ones, never below the least for networks."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest

import brim
from brim import nn, optim
from brim.check.networks import NETWORKS, make
from brim.errors import DataError
from brim.ops import relu
from brim.program.options import Options
from brim.program.passes import default_passes
from brim.program.schema import validate
from brim.program.traffic import Count, Traffic
from brim.program.verify import verify
from brim_bench.fusion import STEPS, traffics

F = nn.functional


def _traffic(fn: Any, *shapes: Any, passes: Any = None, **options: Any) -> Traffic:
    step = brim.compile(fn, passes=passes, **options)
    return step.plan(*(brim.spec(*s) if isinstance(s[0], tuple) else brim.spec(s) for s in shapes)).traffic()


def _of(traffic: Traffic, op: str) -> Count:
    (found,) = [c for i, c in zip(traffic.program.instructions, traffic.counts, strict=True) if i.op.name == op]
    return found


def test_a_chain_by_hand() -> None:
    def chain(x: Any) -> Any:
        return relu(x * 2.0 + 1.0)

    before, after = _traffic(chain, (100,), passes=()), _traffic(chain, (100,))
    assert before.total == Count(3, 1200, 1200)
    assert after.total == Count(1, 400, 400)
    assert before.least == after.least
    assert (after.least.launches, after.least.nbytes) == (1, 800)
    assert after.total.nbytes == after.least.nbytes


def test_what_is_broadcast_is_read_once() -> None:
    assert _traffic(lambda x, b: x + b, (4, 5), (5,)).total == Count(1, 80 + 20, 80)
    assert _traffic(lambda x, b: x + b, (4, 5), (4, 1)).total == Count(1, 80 + 16, 80)
    assert _traffic(lambda x: x + x, (4, 5)).total == Count(1, 80, 80)


def test_views_move_nothing() -> None:
    traffic = _traffic(lambda x: x.permute_dims((1, 0)).reshape(2, 10)[:1] * 2.0, (4, 5), passes=())
    assert _of(traffic, "multiply") == Count(1, 40, 40)
    assert _traffic(lambda x: x.mT, (4, 5)).least.nbytes == 0
    windows = _traffic(lambda x: x[0:6] + x[2:8], (8,))  # 12 numbers are asked for, 8 are there
    assert windows.total == Count(1, 32, 24)


@pytest.mark.parametrize("shared", [False, True])
def test_products(shared: bool) -> None:
    if shared:
        traffic = _traffic(lambda x: x @ x.mT, (6, 7), passes=())
        assert _of(traffic, "matmul").read_bytes == 6 * 7 * 4
    else:
        traffic = _traffic(lambda x, y: x @ y, (3, 6, 7), (7, 5), passes=())
        assert _of(traffic, "matmul").read_bytes == (3 * 6 * 7 + 7 * 5) * 4
    assert traffic.total.flops == (2 * 6 * 6 * 7 if shared else 2 * 3 * 6 * 5 * 7)
    assert traffic.least.launches == 1


def test_products_with_an_epilogue() -> None:
    with brim.meta():
        layer = nn.Linear(64, 48)
        step = brim.compile(lambda x: relu(layer(x)), device=None)
    traffic = brim.plan(step, brim.spec((32, 64)), device_profile="h100-80gb").traffic()
    (only,) = [i.op.name for i in traffic.program.instructions if "matmul" in i.op.name]
    assert only == "matmul_epilogue"
    assert traffic.total.flops == 2 * 32 * 64 * 48
    assert traffic.total.read_bytes == 4 * (32 * 64 + 48 * 64 + 48)


def test_convolutions_and_their_gradients() -> None:
    with brim.meta():
        layer = nn.Conv2d(4, 6, 3, padding=1, groups=2, bias=False)

    def step(x: Any) -> Any:
        x = x.detach().requires_grad_()
        return brim.grad(layer(x).sum(), [x, layer.weight])

    traffic = _traffic(step, (2, 4, 8, 8), passes=())
    one = 2 * (2 * 6 * 8 * 8) * (2 * 3 * 3)  # two of each multiplication: images, outputs, and a filter
    assert [_of(traffic, f"conv2d{part}").flops for part in ("_grad_input", "_grad_weight")] == [one, one]
    assert _traffic(lambda x: layer(x), (2, 4, 8, 8)).total.flops == one


def test_an_update_in_place_reaches_the_least() -> None:
    parameter = nn.Parameter(brim.zeros(1000))
    optimizer = optim.SGD([parameter], lr=0.1, momentum=0.9)

    def step(g: Any) -> None:
        parameter.grad = g
        optimizer.step()
        optimizer.zero_grad()

    traffic = _traffic(step, (1000,))
    assert traffic.total == Count(1, 3 * 4000, 2 * 4000)  # parameter, velocity, gradient; the first two come back
    assert traffic.least.nbytes == traffic.total.nbytes
    assert list(_traffic(step, (1000,), passes=()).by_phase()) == ["forward", "backward", "update"]
    assert _traffic(step, (1000,), passes=()).total.nbytes > 2 * traffic.total.nbytes


def test_reading_and_writing_by_index_touches_what_it_takes() -> None:
    table = nn.Parameter(brim.zeros((1000, 4)))

    def forward(rows: Any) -> Any:
        return F.embedding(rows, table)

    def step(rows: Any) -> Any:
        return brim.grad(forward(rows).sum(), [table])

    read = _traffic(forward, ((5,), "int64"))
    assert read.total == Count(1, 5 * 8 + 5 * 16, 5 * 16)
    assert read.least.nbytes == read.total.nbytes
    back = _of(_traffic(step, ((5,), "int64"), passes=()), "index_add")
    assert back.written_bytes == 16_000  # from a number: all of it is written


def test_in_place_by_index() -> None:
    state = brim.zeros(1000)

    def step(rows: Any, values: Any) -> None:
        state[rows] = values

    put = _of(_traffic(step, ((5,), "int64"), (5,)), "put")
    assert (put.read_bytes, put.written_bytes) == (5 * 8 + 5 * 4, 5 * 4)


# ---------------------------------------------------------------- the least


def _crossing(step: Any, *shapes: Any) -> int:
    """Bytes of the least but for inputs, parameters and results."""
    return _traffic(step, *shapes).least.nbytes


def test_what_crosses_from_forward_to_backward() -> None:
    """The product, not what follows it elementwise as well; of a ReLU a byte an element tells enough."""
    w = nn.Parameter(brim.zeros((32, 16)))

    def of(act: Any) -> Any:
        def step(x: Any) -> Any:
            loss = act(x @ w).sum()
            return loss, *brim.grad(loss, [w])

        return step

    inputs = (8 * 32 + 32 * 16) * 4
    result = 4 + 32 * 16 * 4
    plain = _crossing(of(lambda y: y), (8, 32))
    assert plain == inputs + 8 * 32 * 4 + result  # x once more for the gradient, nothing saved
    assert _crossing(of(lambda y: y * y), (8, 32)) == plain + 2 * 8 * 16 * 4
    assert _crossing(of(lambda y: (y * 3.0 + 1.0) * y * (y - 1.0)), (8, 32)) == plain + 2 * 8 * 16 * 4
    assert _crossing(of(relu), (8, 32)) == plain + 2 * 8 * 16
    assert _crossing(of(lambda y: relu(y) * y), (8, 32)) == plain + 2 * 8 * 16 * 4


def test_a_dropout_mask_never_crosses() -> None:
    w = nn.Parameter(brim.zeros((32, 16)))

    def of(p: float) -> Any:
        def step(x: Any) -> Any:
            loss = F.dropout(x @ w, p).sum()
            return loss, *brim.grad(loss, [w])

        return step

    assert _crossing(of(0.5), (8, 32)) == _crossing(of(0.0), (8, 32))


def test_the_smaller_of_what_could_cross() -> None:
    """A product in bfloat16 rather than in float32."""
    w = nn.Parameter(brim.zeros((64, 64)))

    def step(x: Any) -> Any:
        half = (x @ w).astype("bfloat16").astype("float32")
        loss = (half * half).sum()
        return loss, *brim.grad(loss, [w])

    x, ww, y = 8 * 64 * 4, 64 * 64 * 4, 8 * 64 * 4
    assert _crossing(step, (8, 64)) == (x + ww + 4) + x + ww + 2 * (y // 2)


def test_options_change_the_least() -> None:
    with brim.meta():
        model = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 8))

    def step(x: Any) -> Any:
        return brim.grad(model(x).sum(), list(model.parameters()))

    plan = brim.compile(step).plan(brim.spec((512, 64)))
    half = plan.vary(Options(activations="bfloat16"))
    assert half.traffic().least.nbytes < plan.traffic().least.nbytes
    assert half.traffic().total.nbytes >= half.traffic().least.nbytes


@pytest.mark.parametrize("name", list(NETWORKS))
@pytest.mark.parametrize("profile", [None, "h100-80gb"])
def test_networks(name: str, profile: str | None) -> None:
    """Nothing is below the least, phases and ops add up, and passes lower kernels and bytes."""
    net = make(name)
    for number, step in enumerate(net.steps):
        arguments = next((arguments for which, arguments in net.calls if which == number), None)
        if arguments is None:
            continue
        specs = [brim.spec(a.shape, a.dtype) for a in arguments]
        found = []
        for passes in ((), None):
            compiled = brim.compile(step, passes=passes, **net.options)
            plan = brim.plan(compiled, *specs, device_profile=profile)
            traffic = plan.traffic()
            verify(traffic.program)
            total = traffic.total
            if not arguments:  # an update without a gradient before it
                assert total == Count()
                return
            assert total.nbytes >= traffic.least.nbytes > 0
            assert total.launches >= traffic.least.launches > 0
            assert sum(traffic.by_phase().values(), Count()) == sum(traffic.by_op().values(), Count()) == total
            found.append(traffic)
        before, after = found
        assert before.least == after.least
        assert after.total.nbytes < before.total.nbytes
        assert after.total.launches < before.total.launches


def test_launches_are_those_of_the_kernels() -> None:
    with brim.meta():
        model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 8))
        optimizer = optim.Adam(model.parameters())

    def step(x: Any) -> Any:
        loss = model(x).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    plan = brim.plan(step, brim.spec((16, 64)), device_profile="h100-80gb")
    kernels = plan.programs[0].prepared.kernels
    assert plan.traffic().total.launches == sum(len(kernel.run.__self__.steps) for kernel in kernels)  # type: ignore[attr-defined]
    by_op = plan.traffic().by_op()
    assert by_op["fused_many"].launches >= 1


# ---------------------------------------------------------------- what users see


def test_reports() -> None:
    w = nn.Parameter(brim.zeros((32, 16)))

    def step(x: Any) -> Any:
        loss = relu(x @ w).sum()
        (g,) = brim.grad(loss, [w])
        return loss, g

    run = brim.compile(step)
    assert "kernel" not in run.explain()
    run(np.ones((8, 32), np.float32))
    said = run.explain().splitlines()
    traffic = run.current_plan().traffic()
    assert said[0].startswith("traced for")
    assert said[1] == f"a run: {traffic.summary()}"
    assert f"{traffic.total.launches} kernels (at least 2)" in said[1]
    assert [line.split(":")[0].strip() for line in said[2:]] == ["forward", "backward"]
    text = str(traffic)
    for word in ("phase", "largest", "matmul", "forward", "least", "Gflop"):
        assert word in text
    assert [number for number, _ in traffic.largest(2)] == [number for number, _ in traffic.largest()][:2]


def test_fusing_is_what_lowers_it() -> None:
    """Up to and with ``fuse``: fewer kernels than before it."""
    passes = list(default_passes(brim.device("cpu").backend))
    names = [getattr(one, "func", one).__name__ for one in passes]
    at = names.index("fuse")
    net = make("transformer")
    specs = [brim.spec(a.shape, a.dtype) for a in net.calls[0][1]]
    counts = [brim.compile(net.steps[0], passes=passes[:n]).plan(*specs).traffic().total for n in (at, at + 1)]
    assert counts[1].launches < counts[0].launches
    assert counts[1].nbytes < counts[0].nbytes


def test_the_document_tells_it_and_is_checked() -> None:
    w = nn.Parameter(brim.zeros((32, 16)))
    plan = brim.plan(lambda x: relu(x @ w), brim.spec((8, 32)))
    document = plan.to_dict()
    validate(document)
    (program,) = document["programs"]
    total = plan.traffic().total
    assert program["traffic"]["read_bytes"] == total.read_bytes
    assert sum(one["flops"] for one in program["instructions"]) == program["traffic"]["flops"] == 2 * 8 * 32 * 16
    for name, wrong in (("launches", 17), ("least_bytes", total.nbytes + 1), ("flops", -1), ("unknown", 1)):
        bad = copy.deepcopy(document)
        bad["programs"][0]["traffic"][name] = wrong
        with pytest.raises(DataError, match=rf"programs\[0\].traffic.{name}"):
            validate(bad)
    older = copy.deepcopy(document)  # written before there was such a field
    del older["programs"][0]["traffic"]
    validate(older)


@pytest.mark.parametrize("device", ["cpu", "h100-80gb"])
def test_the_benchmark_of_fusion(device: str) -> None:
    traced, fused, planned = traffics(STEPS["mlp_step_b128"](), device)
    assert traced.total.launches > fused.total.launches > planned.total.launches > planned.least.launches
    assert traced.total.nbytes > fused.total.nbytes > planned.total.nbytes > planned.least.nbytes
    assert traced.least == fused.least == planned.least
    assert planned.total.flops == traced.total.flops == 2 * 128 * (3 * (784 * 256 + 256 * 256 + 2560) - 784 * 256)
