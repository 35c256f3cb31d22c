"""Mixed precision: the table covers every op, casts happen where it says, gradients stay float32, planned is eager."""

from __future__ import annotations

import gc
import importlib
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import brim
from brim import nn, ops, optim
from brim.autograd import AutogradError
from brim.check.networks import NETWORKS, Net, compiled, make
from brim.check.place import on
from brim.context import context
from brim.op import REGISTRY, elementwise
from brim.program.compile import CompiledStep
from emulated import device as emulated_device
from small_training import Training, random_floats

F = nn.functional
OPS = frozenset(REGISTRY)  # as imported: tests register ops of their own
autocast = importlib.import_module("brim.autocast")
TABLE = {name: getattr(autocast, name) for name in ("LOW", "FLOAT32", "WIDEST", "KEPT")}
HALVES = ("bfloat16", "float16")
over_halves = pytest.mark.parametrize("half", HALVES)


def _tensor(*shape: int, dtype: str = "float32", grad: bool = False) -> brim.Tensor:
    made = brim.asarray(np.random.default_rng(len(shape)).uniform(0.1, 1.1, shape).astype(np.float32))
    return made.astype(dtype).detach().requires_grad_(grad)


def _casts(step: CompiledStep) -> int:
    """Instructions that convert float32 as it is into half width."""
    return sum(
        i.op.name == "astype" and i.outs[0].spec.dtype.itemsize == 2 and i.phase == "forward"
        for i in step.program().instructions
    )


# ------------------------------------------------------------------------------------------------------ the table


def test_every_op_stands_in_the_table_once() -> None:
    rows = list(TABLE.values())
    named = frozenset().union(*rows)
    assert sorted(OPS - named) == [], "ops without a policy"
    assert sum(map(len, rows)) == len(named), "ops with two policies"
    functions = named - OPS
    assert sorted(name for name in functions if not hasattr(F, name) and not hasattr(ops, name)) == []
    for name in functions:  # a function is cast by its decorator, or its entry would do nothing
        found = [getattr(place, name) for place in (F, ops) if hasattr(place, name)]
        assert all(hasattr(function, "__wrapped__") for function in found), name


def test_an_op_that_the_table_does_not_name_is_left_alone() -> None:
    doubled = elementwise("autocast_test_unknown", lambda x: x + x)
    try:
        with brim.autocast("bfloat16"):
            for dtype in ("float32", "bfloat16"):
                assert doubled(_tensor(3, dtype=dtype)).dtype == brim.DTYPES[dtype]
    finally:
        del REGISTRY["autocast_test_unknown"]


LOW: dict[str, Callable[[Any, Any], Any]] = {
    "matmul": lambda x, y: x @ y,
    "linear": lambda x, y: F.linear(x, y, y[0]),
    "conv2d": lambda x, y: ops.conv2d(x.reshape((1, 1, 4, 4)), y.reshape((1, 1, 4, 4)), y[0, :1]),
    "einsum": lambda x, y: ops.einsum("ij,jk->ik", x, y),
    "tensordot": lambda x, y: ops.tensordot(x, y, 1),
    "attention": lambda x, y: F.scaled_dot_product_attention(x, y, y, attn_mask=x),
    "causal attention": lambda x, y: F.scaled_dot_product_attention(x, y, y, is_causal=True),
}
FLOAT32: dict[str, Callable[[Any], Any]] = {
    "exp": ops.exp, "log": ops.log, "pow": lambda x: x**3, "rsqrt": ops.rsqrt, "reciprocal": ops.reciprocal,
    "softplus": ops.softplus, "logaddexp": lambda x: ops.logaddexp(x, 1.0), "cosh": ops.cosh,
    "sum": ops.sum, "prod": ops.prod, "mean": ops.mean, "var": ops.var, "std": ops.std,
    "cumulative_sum": lambda x: ops.cumulative_sum(x, axis=0), "softmax": ops.softmax, "log_softmax": ops.log_softmax,
    "logsumexp": ops.logsumexp, "cross_entropy": lambda x: F.cross_entropy(x, ops.argmax(x, axis=1)),
    "soft cross_entropy": lambda x: F.cross_entropy(x, x), "nll_loss": lambda x: F.nll_loss(x, ops.argmax(x, axis=1)),
    "mse_loss": lambda x: F.mse_loss(x, 2 * x), "l1_loss": lambda x: F.l1_loss(x, 2 * x),
    "huber_loss": lambda x: F.huber_loss(x, 2 * x), "bce": lambda x: F.binary_cross_entropy_with_logits(x, x),
}  # fmt: skip
KEPT: dict[str, Callable[[Any], Any]] = {
    "relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": F.tanh, "sigmoid": F.sigmoid, "neg": lambda x: -x,
    "scalar": lambda x: 1.5 * x + 1.0, "max": ops.max, "sort": ops.sort, "reshape": lambda x: x.reshape((-1,)),
    "slice": lambda x: x[1:, ::2], "dropout": lambda x: F.dropout(x, 0.5), "copy": ops.copy,
    "layer_norm": lambda x: F.layer_norm(x, (4,)), "batch_norm": lambda x: F.batch_norm(x, None, None, training=True),
    "max_pool2d": lambda x: F.max_pool2d(x.reshape((1, 1, 4, 4)), 2), "causal_softmax": ops.causal_softmax,
    "explicit sum": lambda x: ops.sum(x, dtype=x.dtype), "explicit prod": lambda x: ops.prod(x, dtype=x.dtype),
    "explicit cumulative_sum": lambda x: ops.cumulative_sum(x, axis=0, dtype=x.dtype),
}  # fmt: skip
WIDEST: dict[str, Callable[[Any, Any], Any]] = {
    "add": lambda x, y: x + y, "multiply": lambda x, y: x * y, "where": lambda x, y: ops.where(x > y, x, y),
    "maximum": ops.maximum, "concat": lambda x, y: ops.concat([x, y]), "stack": lambda x, y: ops.stack([x, y]),
}  # fmt: skip


@over_halves
def test_results_have_the_dtypes_of_the_table(half: str) -> None:
    full, low = _tensor(4, 4), _tensor(4, 4, dtype=half)
    other = _tensor(4, 4, dtype=HALVES[half == "bfloat16"])
    with brim.autocast(half):
        for name, binary in LOW.items():
            found = {binary(x, y).dtype.name for x in (full, low, other) for y in (full, low)}
            assert found == {half}, name
        for name, unary in FLOAT32.items():
            assert {unary(x).dtype.name for x in (full, low, other)} == {"float32"}, name
        for name, unary in KEPT.items():
            assert [unary(x).dtype.name for x in (full, low)] == ["float32", half], name
        for name, binary in WIDEST.items():
            pairs = ((full, low), (low, full), (full, full), (low, low))
            assert [binary(x, y).dtype.name for x, y in pairs] == [*["float32"] * 3, half], name
            assert binary(low, other).dtype.name == "float32", name
    assert (full @ full).dtype.name == "float32"


@over_halves
def test_float64_complex_and_integers_are_never_touched(half: str) -> None:
    wide, full, whole = _tensor(4, 4, dtype="float64"), _tensor(4, 4), brim.asarray(np.eye(4, dtype=np.int32))
    with brim.autocast(half):
        assert [(wide @ y).dtype.name for y in (wide, full)] == ["float64"] * 2
        assert F.linear(wide, wide, wide[0]).dtype.name == "float64"
        assert (whole @ whole).dtype.name == "int32"
        assert (whole @ full).dtype.name == half  # the integer follows the float, as without autocast
        assert ops.sum(whole).dtype.name == "int64"
        assert ops.exp(wide).dtype.name == F.mse_loss(wide, wide).dtype.name == "float64"
        assert ops.sum(wide.astype("complex64")).dtype.name == "complex64"


def test_writes_into_a_given_tensor_are_not_cast() -> None:
    x, out = _tensor(4, 4), brim.zeros((4, 4))
    with brim.autocast("bfloat16"):
        REGISTRY["matmul"].into(out, x, x)
        x.write(x + 1.0)
    assert out.dtype.name == "float32"
    assert not np.array_equal(out.numpy(), out.astype("bfloat16").astype("float32").numpy())


@over_halves
def test_a_composite_is_one_op(half: str) -> None:
    """Its body would compute 1/sqrt(var) of a half-width x in other dtypes otherwise, and products low."""
    x = _tensor(6, 8, dtype=half)
    outside = [F.layer_norm(x, (8,)), ops.causal_softmax(x), *ops.batch_norm(x)]
    attention = [t.astype(half) for t in (_tensor(2, 3, 4), _tensor(2, 5, 4), _tensor(2, 5, 4))]
    outside.append(F.scaled_dot_product_attention(*attention))
    with brim.autocast(half):
        inside = [F.layer_norm(x, (8,)), ops.causal_softmax(x), *ops.batch_norm(x)]
        inside.append(F.scaled_dot_product_attention(*attention))
    for one, other in zip(inside, outside, strict=True):
        assert one.dtype == other.dtype
        assert one.numpy().tobytes() == other.numpy().tobytes()


# ------------------------------------------------------------------------------------------------- the context


def _state() -> Any:
    return None if context.autocast is None else context.autocast.dtype.name


def test_it_nests_and_ends_with_the_block() -> None:
    seen = [_state()]
    with brim.autocast("bfloat16"):
        seen.append(_state())
        with brim.autocast("float16"):
            seen.append(_state())
            with brim.autocast(enabled=False):
                seen.append(_state())
            seen.append(_state())
        seen.append(_state())
    with pytest.raises(KeyError), brim.autocast(brim.float16):
        raise KeyError
    assert [*seen, _state()] == [None, "bfloat16", "float16", None, "float16", "bfloat16", None]
    twice = brim.autocast("float16")
    with twice, twice:
        pass
    with twice:
        assert _state() == "float16"
    assert _state() is None


def test_it_decorates_and_holds_for_one_thread() -> None:
    seen: list[Any] = []
    inside, done = threading.Event(), threading.Event()

    @brim.autocast("float16")
    def decorated(wait: bool) -> Any:
        if wait:
            inside.set()
            done.wait(10)
        return _state()

    thread = threading.Thread(target=lambda: seen.append(decorated(True)))
    thread.start()
    inside.wait(10)
    assert _state() is None, "another thread's"
    assert decorated(False) == "float16"
    done.set()
    thread.join()
    assert (seen, _state()) == (["float16"], None)


@pytest.mark.parametrize("dtype", ["float32", "float64", "half", "int8", 16, None])
def test_another_dtype_is_refused(dtype: Any) -> None:
    with pytest.raises(ValueError, match="'bfloat16' or 'float16'"):
        brim.autocast(dtype)


# ------------------------------------------------------------------------------------------------- gradients


def _loss_of(model: nn.Module, x: Any, y: Any) -> Any:
    return F.cross_entropy(model(x), y)


@over_halves
def test_gradients_are_float32_and_the_same_inside_and_outside(half: str) -> None:
    found = []
    for inside in (False, True):
        model, (x, y) = Training().model, map(brim.asarray, Training().batch(8))
        brim.manual_seed(2)
        with brim.autocast(half):
            loss = _loss_of(model, x, y)
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        assert loss.dtype.name == "float32"
        grads = [p.grad for p in model.parameters()]
        assert {(p.dtype.name, g.dtype.name) for p, g in zip(model.parameters(), grads, strict=True)} == {
            ("float32", "float32")
        }
        found.append([g.numpy().tobytes() for g in grads])
    assert found[0] == found[1]


def test_gradients_of_gradients() -> None:
    w, x = _tensor(5, 4, grad=True), _tensor(3, 4, grad=True)
    with brim.autocast("bfloat16"):
        loss = F.tanh(F.linear(x, w)).sum()
        (g,) = brim.grad(loss, [x], create_graph=True)
        (second,) = brim.grad((g * g).sum(), [w])
    assert (g.dtype.name, second.dtype.name) == ("float32", "float32")
    full = F.tanh(F.linear(x, w)).sum()
    (h,) = brim.grad(full, [x], create_graph=True)
    (want,) = brim.grad((h * h).sum(), [w])
    np.testing.assert_allclose(second.numpy(), want.numpy(), rtol=0.1, atol=0.05)


def test_a_parameter_is_cast_once_for_as_long_as_it_keeps_its_values() -> None:
    w, x = _tensor(4, 4, grad=True), _tensor(4, 4)
    for _ in range(2):
        with brim.autocast("bfloat16"):
            made = F.linear(x, w) + F.linear(2 * x, w) + F.linear(x, w)
            casts = context.autocast._made
            assert len(casts) == 1
            first = casts[id(w)][3]
            F.linear(x, w)
            assert casts[id(w)][3] is first
            with brim.no_grad():
                w.write(w * 0.5)
                F.linear(x, w)
                assert casts[id(w)][3] is not first, "an old value"
            again = F.linear(x, w)
            assert again.requires_grad, "a cast without a gradient"
            again.sum().backward()
            F.linear(x, w).sum().backward()  # the record of the first cast is used up
        del made
    assert w.grad.dtype.name == "float32"
    low = x.astype("bfloat16").numpy().astype("f4")
    np.testing.assert_allclose(w.grad.numpy(), np.broadcast_to(4 * low.sum(0), (4, 4)), rtol=1e-2)


def test_backward_twice_is_refused_as_ever() -> None:
    w, x = _tensor(4, 4, grad=True), _tensor(4, 4)
    with brim.autocast("bfloat16"):
        loss = F.linear(x, w).sum()
        loss.backward()
        with pytest.raises(AutogradError):
            loss.backward()


# ------------------------------------------------------------------------------------------------- planned steps


def test_another_state_is_another_program() -> None:
    training = Training()
    x, y = training.batch(8)

    def step() -> str:
        training.compiled(x, y)
        return str(training.compiled.program())

    plain = step()
    with brim.autocast("bfloat16"):
        low = step()
        assert len(training.traces()) == 2
        step()
        with brim.autocast("float16"):
            assert "float16" in step()
        with brim.autocast(enabled=False):
            assert "bfloat16" not in step()
    assert len(training.traces()) == 3, "a state that was seen before is replayed"
    assert "autocast" not in plain
    assert ("bfloat16" in plain, "bfloat16" in low) == (False, True)
    assert "bfloat16" in training.traces()[1]


def test_a_step_may_open_it_inside_and_casts_each_parameter_once() -> None:
    w, x = _tensor(6, 6, grad=True), random_floats(6, 6)

    def step(x: Any) -> Any:
        with brim.autocast("bfloat16"):
            y = F.linear(x, w)
            for _ in range(3):
                y = F.linear(F.relu(y), w)
        y.astype("float32").sum().backward()
        found, w.grad = w.grad, None
        return found

    made = brim.compile(step, passes=())  # as traced
    want = step(brim.asarray(x)).numpy().tobytes()
    for state in (True, False):
        with brim.autocast("float16", enabled=state):
            assert made(x).numpy().tobytes() == want
            assert _casts(made) == 2, "the argument and the parameter"


def test_a_plan_keeps_the_state_it_was_made_in() -> None:
    training = Training()
    step = CompiledStep(training.step)
    with brim.autocast("bfloat16"):
        low = step.plan(*training.batch(64))
    full = step.plan(*training.batch(64))
    assert low.hash != full.hash
    assert low.replan([(64, 4), (64,)]).hash == low.hash
    with brim.autocast("bfloat16"):
        assert full.replan([(64, 4), (64,)]).hash == full.hash


def test_activations_in_half_width_take_half_the_memory() -> None:
    gc.collect()
    brim.device("cpu").memory.arena.release()
    others_bytes = brim.memory_stats()["live_bytes"]
    brim.manual_seed(0)
    layers = [layer for _ in range(8) for layer in (nn.Linear(64, 64), nn.GELU())]
    model = nn.Sequential(*layers, nn.Linear(64, 4))
    optimizer = optim.SGD(model.parameters(), lr=0.1)

    def step(x: Any, y: Any) -> Any:
        loss = _loss_of(model, x, y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    x, y = random_floats(1024, 64), np.arange(1024) % 4
    peaks, kept = {}, {}
    for half in (None, *HALVES):
        made = CompiledStep(step)
        with brim.autocast(half or "float16", enabled=half is not None):
            planned = made.plan(x, y)
            brim.reset_peak_memory()
            made(x, y)
            held_bytes = brim.memory_stats()["peak_bytes"] - others_bytes
        peaks[half], kept[half] = planned.peak_bytes, planned.by_kind()["activations"]
        assert held_bytes == planned.peak_bytes
        del made
        brim.device("cpu").memory.arena.release()
    assert kept["bfloat16"] == kept["float16"] < 0.6 * kept[None]
    assert peaks["bfloat16"] < 0.75 * peaks[None]


# ------------------------------------------------------------------------------------------------- networks

# Largest relative distance of a loss from float32's over the five steps of a run. Seen: 3.7e-3 and 1.8e-3.
DISTANCE = {"bfloat16": 1e-2, "float16": 4e-3}


Run = tuple[list[float], list[np.ndarray]]


def _run(net: Net, steps: Any, tensors: bool) -> Run:
    """The losses of a run, and all parameters, buffers, states and waiting gradients after it."""
    losses: list[float] = []
    for which, arguments in net.calls:
        result = steps[which](*(map(brim.asarray, arguments) if tensors else arguments))
        parts = list(result.values()) if isinstance(result, dict) else result if isinstance(result, tuple) else [result]
        if parts[0] is not None:
            assert parts[0].dtype.name == "float32"
            losses.append(float(parts[0]))
    state = net.state()
    assert {state[key].dtype.name for key in state if key.endswith(".grad") and state[key] is not None} <= {"float32"}
    return losses, [value for value in state.values() if isinstance(value, np.ndarray)]


_full: dict[str, Run] = {}


def _in_full(name: str) -> None:
    """Run a network in float32, once."""
    if name not in _full:
        net = make(name)
        _full[name] = _run(net, net.steps, True)


@over_halves
@pytest.mark.parametrize("name", list(NETWORKS))
def test_networks_train_as_in_float32_and_planned_as_eager(name: str, half: str) -> None:
    _in_full(name)
    with brim.autocast(half):
        net = make(name)
        losses, state = _run(net, net.steps, True)
        net = make(name)
        planned_losses, planned_state = _run(net, compiled(net), False)
    assert planned_losses == losses
    assert [a.tobytes() for a in planned_state] == [a.tobytes() for a in state]
    assert losses == pytest.approx(_full[name][0], rel=DISTANCE[half])
    if (name, half) != ("mixed_precision", "bfloat16"):  # it casts by itself
        assert losses != _full[name][0]


@pytest.mark.emulated
@over_halves
@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_the_cuda_backend_does_the_same(name: str, half: str) -> None:
    _in_full(name)
    with brim.autocast(half):
        net = make(name)
        losses, state = _run(net, net.steps, True)
        for planned in (False, True):
            with on(emulated_device()):
                net = make(name)
                steps = compiled(net, device=emulated_device()) if planned else net.steps
                found, there = _run(net, steps, not planned)
            assert found == pytest.approx(losses, rel=DISTANCE[half])
            for one, other, full in zip(there, state, _full[name][1], strict=True):
                # No further from float32 than the CPU is; sums in another order may round to the next number.
                size, near, far = (np.linalg.norm(a.astype("f8")) for a in (full, other - full, one - full))
                assert far <= 2 * near + 0.05 * size
            moved = [p for m in net.modules for p in m.parameters()]
            assert {p.dtype.name for p in moved} == {"float32"}
            assert {p.device for p in moved} == {emulated_device()}
