"""The way to cuDNN without it: which ops ask, on which layouts, with which scratch; a twin in NumPy answers.

The emulated device has every kernel of brim's, too, so that what the twin computes is compared with the CPU's kernels
op by op, in eager code, in compiled steps and in replayed graphs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import brim
from brim import nn, optim
from brim.device import Device, _backends
from brim.models import GPT2
from brim.models.gpt2 import next_token_loss
from brim.nn import functional as F
from brim.op import REGISTRY
from brim.precision import float32_products
from brim.program.ir import Instruction, Program
from brim.spec import DTYPES, Spec
from brim_cuda.device import CudaBackend
from brim_cuda.dnn import ALIGNMENT_BYTES, DnnTensor, DnnUnsupported, Execute
from brim_cuda.dnn_attention import AttentionGradRequest, AttentionRequest, attention_request
from brim_cuda.dnn_conv import ConvRequest, conv_request
from brim_cuda.dnn_host import HostCudnn
from brim_cuda.emulation import EmulatedMachine
from brim_cuda.graphs import Graphed
from brim_cuda.registry import bind, dnn_work
from emulated import WHY_NOT

pytestmark = [pytest.mark.emulated, pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT or "-")]

NAME = "emulated-dnn"
TOLERANCE = {"float32": 2e-6, "float16": 2e-3, "bfloat16": 1.6e-2}
PLAIN: dict[str, Any] = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1}


@pytest.fixture(scope="module")
def place() -> Iterator[Device]:
    """An emulated device with cuDNN's twin."""
    machine = EmulatedMachine(total_bytes=2 << 30)
    machine.loader.dnn_library = HostCudnn()
    _backends[NAME] = CudaBackend(machine, NAME)
    found = brim.device(NAME)
    yield found
    found.memory.arena.release()
    found.memory.stage.release()
    found.memory.pool.release_cached()


@pytest.fixture
def twin(place: Device) -> HostCudnn:
    library = place.backend.machine.loader.dnn_library
    library.executed.clear()
    return library


def last(spec: Spec) -> Spec:
    """The same images, channels last in memory."""
    _, c, h, w = spec.shape
    return Spec(spec.shape, spec.dtype, (c * h * w, 1, w * c, c))


def close(got: Any, want: Any, dtype: str) -> None:
    got, want = (np.asarray(x.astype("float32").numpy()) for x in (got, want))
    assert np.abs(got - want).max() <= TOLERANCE[dtype] * max(1.0, np.abs(want).max())


# ---- convolutions ----------------------------------------------------------------------------------------------------

WAYS = {
    "plain": {},
    "strided": {"stride": (2, 1), "padding": (1, 2)},
    "dilated": {"dilation": 2, "padding": 2},
    "grouped": {"groups": 2, "padding": 1},
    "depthwise": {"groups": 4, "padding": 1, "stride": 2},
}


def convolved(on: Any, how: dict[str, Any], dtype: str) -> list[Any]:
    """A convolution and its gradients."""
    rng = np.random.default_rng(0)
    x, w = (
        brim.asarray(rng.standard_normal(shape).astype(np.float32), device=on).astype(dtype)
        for shape in ((2, 4, 9, 8), (8, 4 // how.get("groups", 1), 3, 3))
    )
    x.requires_grad = w.requires_grad = True
    y = F.conv2d(x, w, **how)
    (y * y).sum().backward()
    return [y.detach(), x.grad, w.grad]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("way", WAYS)
def test_convolutions_and_gradients(place: Device, twin: HostCudnn, way: str, dtype: str) -> None:
    for got, want in zip(convolved(place, WAYS[way], dtype), convolved("cpu", WAYS[way], dtype), strict=True):
        close(got, want, dtype)
    assert [plan.request.kind for plan in twin.executed] == ["fprop", "dgrad", "wgrad"]


def test_tf32_is_asked_for_only_where_it_was(place: Device, twin: HostCudnn) -> None:
    exact = convolved(place, {}, "float32")
    with float32_products("tf32"):
        rounded = convolved(place, {}, "float32")
    assert [plan.request.tf32 for plan in twin.executed] == [False] * 3 + [True] * 3
    strict, fast = (twin.executed[n].request.forbidden_notes for n in (0, 3))
    assert set(strict) - set(fast) == {"TENSOR_CORE"}
    assert {"NONDETERMINISTIC", "DOWN_CONVERT_INPUTS", "REDUCED_PRECISION_REDUCTION"} <= set(fast)
    assert not np.array_equal(rounded[0].numpy(), exact[0].numpy())
    np.testing.assert_allclose(rounded[0].numpy(), exact[0].numpy(), atol=2e-2)


def test_what_is_left_to_brims_kernels(place: Device, twin: HostCudnn) -> None:
    rng = np.random.default_rng(1)
    x, w = (brim.asarray(rng.standard_normal(shape), device=place) for shape in ((1, 3, 6, 6), (4, 3, 3, 3)))
    assert F.conv2d(x, w).dtype == DTYPES["float64"]
    assert F.conv2d(x[:0].astype("float32"), w.astype("float32")).shape == (0, 4, 4, 4)
    q = brim.asarray(rng.standard_normal((2, 5, 12)).astype(np.float16), device=place)
    assert brim.attention(q, q, q).shape == (2, 5, 12)  # 12 is no multiple of 8
    wide = q.astype("float32")
    assert brim.attention(wide, wide, wide).dtype == DTYPES["float32"]
    assert not twin.executed


def test_requests_say_how_images_lie() -> None:
    x, w, y = Spec((2, 4, 9, 8)), Spec((8, 4, 3, 3)), Spec((2, 8, 7, 6))
    first = conv_request("conv2d", [x, w], [y], PLAIN)
    assert first is not None
    request, _, copied = first
    assert request.x.strides == x.strides
    assert not any(copied)
    mixed = conv_request("conv2d", [last(x), w], [y], PLAIN)
    assert mixed is not None
    assert [t.strides for t in mixed[0].tensors] == [last(x).strides, w.strides, y.strides]
    gaps = Spec(x.shape, x.dtype, (1000, 250, 20, 2))
    found = conv_request("conv2d", [gaps, w], [y], PLAIN)
    assert found is not None
    assert found[0].x.strides == x.strides
    assert found[2] == (True, False)
    assert conv_request("conv2d", [x, w], [Spec(y.shape, y.dtype, (1000, 100, 10, 1))], PLAIN) is None
    grad = conv_request("conv2d_grad_weight", [last(y), last(x)], [w], PLAIN)
    assert grad is not None
    assert (grad[0].kind, grad[0].w.strides) == ("wgrad", w.strides)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_images_of_one_channel_or_pixel_are_read_in_the_order_of_the_others(dtype: str) -> None:
    kind = DTYPES[dtype]
    x, w = Spec((2, 1, 9, 8), kind), Spec((8, 1, 3, 3), kind)
    for y in (Spec((2, 8, 7, 6), kind), last(Spec((2, 8, 7, 6), kind))):
        found = conv_request("conv2d", [x, w], [y], PLAIN)
        assert found is not None
        assert (found[0].x.strides[1] == 1) is (y.strides[1] == 1)
    pixel = conv_request(
        "conv2d", [Spec((2, 4, 1, 1), kind), Spec((8, 4, 1, 1), kind)], [Spec((2, 8, 1, 1), kind)], PLAIN
    )
    assert pixel is not None
    assert (pixel[0].x.strides == (4, 1, 4, 4)) is (dtype == "bfloat16")


# ---- what follows a convolution --------------------------------------------------------------------------------------


class Residual(nn.Module):
    """Two convolutions with a bias; relu after each, the second after its input was added."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(8, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Any) -> Any:
        return F.relu(self.second(F.relu(self.first(x))) + x)


def joined(step: Any) -> list[Instruction]:
    program: Program = step._latest().runner.prepared.program
    return [i for i in program.instructions if i.op.name == "conv2d_epilogue"]


def test_bias_residual_and_relu_are_one_call(place: Device, twin: HostCudnn) -> None:
    brim.manual_seed(0)
    model = Residual().eval()
    x = np.random.default_rng(2).standard_normal((2, 8, 6, 5)).astype(np.float32)
    with brim.no_grad():
        want = model(brim.asarray(x)).numpy()
        model = model.to(place)
        step = brim.compile(lambda given: model(given), device=place)
        for _ in range(2):
            np.testing.assert_allclose(step(x).numpy(), want, rtol=1e-5, atol=1e-6)
    assert len(joined(step)) == 2
    found = [(p.request.bias is not None, p.request.added is not None, p.request.relu) for p in twin.executed[:2]]
    assert found == [(True, False, True), (True, True, True)]


def test_other_formulas_stay_apart(place: Device, twin: HostCudnn) -> None:
    x, w = (brim.asarray(np.ones(shape, np.float32), device=place) for shape in ((1, 4, 5, 5), (4, 4, 3, 3)))
    for formula in (lambda y: brim.tanh(y), lambda y: y * 0.5, lambda y: F.relu(y) + 1.0):
        step = brim.compile(lambda given, formula=formula: formula(F.conv2d(given, w)), device=place)
        with brim.no_grad():
            np.testing.assert_allclose(step(x).numpy(), formula(F.conv2d(x, w)).numpy(), rtol=1e-6)
        assert not joined(step)
    assert {plan.request.kind for plan in twin.executed} == {"fprop"}


# ---- steps -----------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Two 3x3 convolutions with batch norm, a strided one, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 16, 3, padding=1, stride=2), nn.ReLU(), nn.MaxPool2d(2),
        )  # fmt: skip
        self.head = nn.Linear(16, 5)

    def forward(self, x: Any) -> Any:
        return self.head(self.body(x).mean(axis=(2, 3)))


def trained(on: Any, precision: str) -> tuple[list[float], Any]:
    """Losses of a few steps, and the compiled step."""
    brim.manual_seed(4)
    model = Net().to(on)
    optimizer = optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

    def run(x: Any, y: Any) -> Any:
        if precision == "bfloat16":
            with brim.autocast("bfloat16"):
                loss = F.cross_entropy(model(x).astype("float32"), y)
        else:
            loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    step = brim.compile(run, device=on)
    rng = np.random.default_rng(5)
    x, y = rng.standard_normal((6, 4, 3, 12, 12)).astype(np.float32), rng.integers(0, 5, (6, 4))
    return [step(x[n], y[n]).item() for n in range(6)], step


def images_of(step: Any, name: str) -> list[Spec]:
    program: Program = step._latest().runner.prepared.program
    return [i.outs[0].spec for i in program.instructions if i.op.name.startswith(name) and "weight" not in i.op.name]


def test_a_step_in_float32(place: Device, twin: HostCudnn) -> None:
    losses, step = trained(place, "float32")
    np.testing.assert_allclose(losses, trained("cpu", "float32")[0], rtol=2e-5)
    assert {plan.request.kind for plan in twin.executed} == {"fprop", "dgrad", "wgrad"}
    assert all(spec.contiguous for spec in images_of(step, "conv2d")), "full float32 gains nothing by another order"
    graphs = [call for call in step._latest().runner._calls if isinstance(call, Graphed)]
    assert sum(graph.replays for graph in graphs) == 4, "cuDNN's calls are captured like any other"
    assert any(isinstance(call, Execute) for graph in graphs for call in graph.calls)
    assert "by cuDNN" in step.explain()


def test_a_step_in_bfloat16_lies_channels_last(place: Device, twin: HostCudnn) -> None:
    losses, step = trained(place, "bfloat16")
    np.testing.assert_allclose(losses, trained("cpu", "bfloat16")[0], rtol=3e-2)
    assert images_of(step, "conv2d")
    assert all(spec.strides[1] == 1 for spec in images_of(step, "conv2d"))
    assert {p.request.x.dtype for p in twin.executed} == {DTYPES["bfloat16"]}


def test_scratch_is_what_the_plan_says(place: Device, twin: HostCudnn) -> None:
    x, w, y = Spec((2, 4, 9, 8)), Spec((8, 4, 3, 3)), Spec((2, 8, 7, 6))
    found = conv_request("conv2d", [x, w], [y], PLAIN)
    assert found is not None
    kernel = place.backend.bind(REGISTRY["conv2d"], [x, w], [y], PLAIN)
    assert kernel.scratch_bytes == twin.plan(found[0]).workspace_bytes == 131 + x.nbytes + w.nbytes + y.nbytes
    assert kernel.aligned_bytes == ALIGNMENT_BYTES
    assert kernel.launches == 1
    own = bind(place.backend.machine.loader, REGISTRY["conv2d"], [x, w], [y], PLAIN)
    assert own.aligned_bytes == 1, "without cuDNN"


# ---- views that start between 16 bytes -------------------------------------------------------------------------------


def test_views_that_are_off_are_copied(place: Device, twin: HostCudnn) -> None:
    rng = np.random.default_rng(6)
    whole = brim.asarray(rng.standard_normal(2 * 3 * 5 * 5 + 1).astype(np.float32), device=place)
    w = brim.asarray(rng.standard_normal((4, 3, 3, 3)).astype(np.float32), device=place)

    def run(flat: Any) -> Any:
        return F.conv2d(flat[1:].reshape((2, 3, 5, 5)), w)

    with brim.no_grad():
        want = F.conv2d(brim.asarray(whole.numpy()[1:].reshape(2, 3, 5, 5)), brim.asarray(w.numpy())).numpy()
        np.testing.assert_allclose(run(whole).numpy(), want, rtol=1e-5, atol=1e-6)
        step = brim.compile(run, device=place)
        np.testing.assert_allclose(step(whole).numpy(), want, rtol=1e-5, atol=1e-6)
        out = brim.asarray(np.zeros(2 * 4 * 3 * 3 + 1, np.float32), device=place)
        REGISTRY["conv2d"].into(out[1:].reshape((2, 4, 3, 3)), whole[1:].reshape((2, 3, 5, 5)), w, **PLAIN)
        np.testing.assert_allclose(out.numpy()[1:].reshape(want.shape), want, rtol=1e-5, atol=1e-6)
    assert len(twin.executed) == 3


def test_an_address_that_is_off_is_refused(twin: HostCudnn) -> None:
    x, w, y = Spec((2, 4, 9, 8)), Spec((8, 4, 3, 3)), Spec((2, 8, 7, 6))
    found = conv_request("conv2d", [x, w], [y], PLAIN)
    assert found is not None
    with pytest.raises(ValueError, match=r"multiples of 16 bytes, one starts at 0x1004: copy that view"):
        Execute(twin, twin.plan(found[0]), [0x1000, 0x1004, 0x2000], 0, 0, lambda error: error)


# ---- attention -------------------------------------------------------------------------------------------------------

SHAPES = {
    "heads": ((1, 2, 128, 16), (1, 2, 256, 16)), "batch": ((2, 256, 8), (2, 128, 8)), "one": ((128, 24), (128, 24)),
}  # fmt: skip


def attended(on: Any, shapes: tuple[tuple[int, ...], tuple[int, ...]], causal: bool, dtype: str) -> list[Any]:
    rng = np.random.default_rng(7)
    q, k, v = (
        brim.asarray(rng.standard_normal(shape).astype(np.float32), device=on).astype(dtype)
        for shape in (shapes[0], shapes[1], (*shapes[1][:-1], shapes[1][-1] + 8))
    )
    if on == "cpu":  # where half-width scores are rounded: in float32, from the same numbers
        q, k, v = (x.astype("float32") for x in (q, k, v))
    for x in (q, k, v):
        x.requires_grad = True
    y = brim.attention(q, k, v, causal=causal, scale=0.3)
    (y * y).sum().backward()
    return [y.detach(), q.grad, k.grad, v.grad]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", SHAPES)
def test_attention_and_gradients(place: Device, twin: HostCudnn, name: str, dtype: str, causal: bool) -> None:
    got, want = (attended(on, SHAPES[name], causal, dtype) for on in (place, "cpu"))
    for one, other in zip(got, want, strict=True):
        close(one, other, dtype)
    forward, backward = (plan.request for plan in twin.executed)
    assert isinstance(forward, AttentionRequest)
    assert isinstance(backward, AttentionGradRequest)
    assert forward.causal is backward.causal is causal


@pytest.mark.parametrize(("queries", "keys", "asked"), [(128, 256, True), (1, 128, False), (128, 192, False)])
def test_the_gradient_of_tiles_that_are_not_full_is_left_to_brims_kernels(queries: int, keys: int, asked: bool) -> None:
    """cuDNN may give NaN there; the result itself is right."""
    half, params = DTYPES["float16"], {"causal": False, "scale": 0.5}
    q, k, logs = Spec((2, queries, 16), half), Spec((2, keys, 16), half), Spec((2, queries))
    assert attention_request("attention", [q, k, k], [q, logs], **params) is not None
    found = attention_request("attention_grad", [q, q, k, k, q, logs], [q, k, k], **params)
    assert (found is not None) is asked
    assert attention_request("attention", [q, k, k], [q, logs], causal=False, scale=-0.5) is None


def test_heads_are_read_where_a_projection_wrote_them(place: Device, twin: HostCudnn) -> None:
    """(batch, rows, 3, heads, numbers) seen as (batch, heads, rows, numbers): dense rows, no copy."""
    rng = np.random.default_rng(8)
    both = rng.standard_normal((2, 6, 3, 4, 8)).astype(np.float16)
    found = []
    for on in (place, "cpu"):
        x = brim.asarray(both, device=on)
        q, k, v = (x[:, :, n].permute_dims((0, 2, 1, 3)) for n in range(3))
        found.append(brim.attention(q, k, v, causal=True))
    close(*found, "float16")
    request = twin.executed[0].request
    assert isinstance(request, AttentionRequest)
    assert request.q.strides == request.v.strides == (6 * 96, 8, 96, 1)


def test_what_rows_must_look_like() -> None:
    half = DTYPES["float16"]
    shape, logs = (2, 3, 8, 16), Spec((2, 3, 8))
    dense = Spec(shape, half)
    turned = Spec(shape, half, (384, 128, 1, 8))
    found = attention_request("attention", [dense, turned, dense], [dense, logs], causal=False, scale=1.0)
    assert found is not None
    assert found[2] == (False, True, False), "rows whose numbers lie apart are copied"
    expanded = Spec(shape, half, (0, 128, 16, 1))
    found = attention_request("attention", [expanded, dense, dense], [dense, logs], causal=False, scale=1.0)
    assert found is not None
    assert found[2] == (True, False, False)
    assert attention_request("attention", [dense] * 3, [turned, logs], causal=False, scale=1.0) is None
    deep = Spec((1, *shape), half)
    many = attention_request("attention", [deep] * 3, [deep, Spec((1, *shape[:-1]))], causal=False, scale=1.0)
    assert many is None


def test_logarithms_are_those_of_the_own_kernel(place: Device, twin: HostCudnn) -> None:
    x = brim.asarray(np.random.default_rng(9).standard_normal((2, 5, 8)).astype(np.float16), device=place)
    op = REGISTRY["attention"]
    _, logs = op(x, x, x, causal=True, scale=0.5)
    assert twin.executed
    place.backend.machine.loader.dnn_library, kept = None, twin
    try:
        own = op.infer([x.spec] * 3, {"causal": True, "scale": 0.5})
        outs = [brim.asarray(np.zeros(s.shape, s.dtype), device=place) for s in own]
        kernel = place.backend.bind(op, [x.spec] * 3, own, {"causal": True, "scale": 0.5})
        kernel.run(tuple(out.array for out in outs), x.array, x.array, x.array, scratch=None)
    finally:
        place.backend.machine.loader.dnn_library = kept
    np.testing.assert_allclose(logs.numpy(), outs[1].numpy(), rtol=1e-5, atol=1e-6)


# ---- the twin is strict ----------------------------------------------------------------------------------------------


def test_the_twin_refuses_what_the_library_would(twin: HostCudnn) -> None:
    image = DnnTensor((1, 8, 4, 4), (128, 16, 4, 1), DTYPES["float32"])
    weight = DnnTensor((8, 8, 1, 1), (8, 1, 1, 1), DTYPES["float32"])
    plan = twin.plan(ConvRequest("fprop", image, weight, image, (1, 1), (0, 0), (1, 1)))
    with pytest.raises(ValueError, match="no workspace"):
        twin.execute(plan, {1: 16, 2: 16, 3: 16}, 0, 0)
    with pytest.raises(ValueError, match="3 addresses are needed"):
        twin.execute(plan, {1: 16}, 64, 0)
    wide = DnnTensor((1, 1, 4, 512), (2048, 2048, 512, 1), DTYPES["float16"])
    rows = DnnTensor((1, 1, 4, 1), (4, 4, 1, 1), DTYPES["float32"])
    with pytest.raises(DnnUnsupported, match="256"):
        twin.plan(AttentionRequest(wide, wide, wide, wide, rows, False, 1.0))


def test_an_op_without_a_plan_is_bound_to_brims_kernel(place: Device, twin: HostCudnn) -> None:
    wide = Spec((1, 1, 4, 512), DTYPES["float16"])
    params = {"causal": False, "scale": 1.0}
    assert dnn_work(twin, REGISTRY["attention"], [wide] * 3, [wide, Spec((1, 1, 4))], params) is None
    with pytest.raises(KeyError, match="512"):  # which does not take it either
        place.backend.bind(REGISTRY["attention"], [wide] * 3, [wide, Spec((1, 1, 4))], params)


def test_an_epilogue_is_joined_only_where_both_layouts_have_a_plan(place: Device, twin: HostCudnn) -> None:
    class Picky(HostCudnn):
        def plan(self, request: Any) -> Any:
            if request.x.strides[1] == 1:
                raise DnnUnsupported("channels last")
            return super().plan(request)

    x, w = (brim.asarray(np.ones(shape, np.float32), device=place) for shape in ((1, 4, 5, 5), (4, 4, 3, 3)))
    found = []
    for library in (twin, Picky()):
        place.backend.machine.loader.dnn_library = library
        step = brim.compile(lambda given: F.relu(F.conv2d(given, w)), device=place)
        try:
            with brim.no_grad():
                np.testing.assert_array_equal(step(x).numpy(), np.full((1, 4, 3, 3), 36, np.float32))
        finally:
            place.backend.machine.loader.dnn_library = twin
        found.append(len(joined(step)))
    assert found == [1, 0]


def test_a_language_models_step_in_bfloat16(place: Device, twin: HostCudnn) -> None:
    """Attention and its gradient in a compiled training step, on heads that lie where a projection wrote them; of a
    whole tile of positions, without which cuDNN is not asked for the gradient."""

    def losses(on: Any) -> list[float]:
        brim.manual_seed(1)
        model = GPT2(layers=2, width=32, heads=2, vocabulary=37, context=128, dropout=0.0).to(on)
        optimizer = optim.SGD(model.parameters(), lr=0.1)

        def run(tokens: Any) -> Any:
            with brim.autocast("bfloat16"):
                loss = next_token_loss(model(tokens), tokens)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss.detach()

        step = brim.compile(run, device=on)
        tokens = np.random.default_rng(3).integers(0, 37, (2, 128))
        return [step(tokens).item() for _ in range(4)]

    np.testing.assert_allclose(losses(place), losses("cpu"), rtol=2e-2)
    kinds = [type(plan.request) for plan in twin.executed]
    assert kinds[:4] == [AttentionRequest, AttentionRequest, AttentionGradRequest, AttentionGradRequest]
    assert len(kinds) == 4 * 4
