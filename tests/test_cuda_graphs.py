"""Steps as graphs without a GPU: what is captured, what changes between replays, what is refused and what is said.

On the emulated device a capture runs nothing and notes every launch with its arguments of then, as a GPU's does; the
driver's functions are tested with a stand-in that keeps the same books.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import brim
from brim import nn, optim
from brim.errors import DeviceError
from brim_cuda.graph_driver import Driver, capture
from brim_cuda.graphs import WARM_RUNS, CaptureRefused, Graphed
from emulated import device
from fake_cuda_driver import FakeDriverLibrary

pytestmark = pytest.mark.emulated

RUNS = 6


class Trained:
    """A small classifier with everything that changes from step to step: dropout, Adam's count, a learning rate."""

    def __init__(self, place: Any) -> None:
        brim.manual_seed(3)
        self.place = place
        layers = nn.Sequential(nn.Linear(12, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.4), nn.Linear(16, 5))
        self.model = layers.to(place)
        self.optimizer = optim.Adam(self.model.parameters(), lr=0.01)
        self.step = brim.compile(self._step, device=place)
        rng = np.random.default_rng(0)
        self.x = rng.standard_normal((RUNS, 9, 12)).astype(np.float32)
        self.y = rng.integers(0, 5, (RUNS, 9))

    def _step(self, x: Any, y: Any) -> Any:
        loss = nn.functional.cross_entropy(self.model(x), y)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def run(self, first: int = 0, last: int = RUNS) -> list[float]:
        losses = []
        for n in range(first, last):
            self.optimizer.param_groups[0]["lr"] = 0.01 / (n + 1)
            losses.append(self.step(self.x[n], self.y[n]).item())
        return losses

    def state(self) -> list[np.ndarray]:
        return [value.numpy() for value in self.model.state_dict().values()]

    def graphs(self) -> list[Graphed]:
        return [call for call in self.step._latest().runner._calls if isinstance(call, Graphed)]


def test_replays_compute_what_launches_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BRIM_CUDA_GRAPHS", "0")
    plain = Trained(device())
    expected = plain.run()
    assert not plain.graphs()
    monkeypatch.delenv("BRIM_CUDA_GRAPHS")
    graphed = Trained(device())
    assert graphed.run() == expected
    for one, other in zip(graphed.state(), plain.state(), strict=True):
        np.testing.assert_array_equal(one, other)
    (graph,) = graphed.graphs()
    assert (graph.runs, graph.replays, graph.reason) == (RUNS, RUNS - WARM_RUNS, "")
    assert "replayed as one graph" in graphed.step.explain()


def test_numbers_that_change_reach_the_replay() -> None:
    """Without renewal, a replay repeats the learning rate, the count and the dropout mask of its capture."""
    right = Trained(device())
    right.run()
    stale = Trained(device())
    stale.run(0, WARM_RUNS + 1)
    (graph,) = stale.graphs()
    assert graph._changing, "dropout and the update change from step to step"
    graph._changing = []
    stale.run(WARM_RUNS + 1)
    assert any((a != b).any() for a, b in zip(stale.state(), right.state(), strict=True))


def test_inputs_of_each_step_are_read_by_its_replay() -> None:
    model = nn.Linear(4, 3).to(device())

    def forward(x: Any) -> Any:
        with brim.no_grad():
            return brim.ops.exp(brim.ops.tanh(model(x)) * 2.0 - 0.5).sum(axis=1).sqrt()

    compiled = brim.compile(forward, device=device())
    results = []
    for n in range(WARM_RUNS + 3):
        x = np.full((2, 4), float(n), np.float32)
        results.append(compiled(x).numpy())
        np.testing.assert_allclose(results[-1], forward(brim.asarray(x, device=device())).numpy(), 1e-6)
    assert len({result.tobytes() for result in results}) == len(results)


def test_a_step_moved_by_a_larger_one_is_captured_anew() -> None:
    expected = Trained(device()).run()
    trained = Trained(device())
    losses = trained.run(0, 4)
    big = brim.compile(lambda x: (x * 2.0 + 1.0).sum(), device=device())
    big(np.ones((1 << 20,), np.float32))
    losses += trained.run(4)
    assert losses == expected
    assert trained.graphs()[0].runs <= 2


def test_what_waits_for_the_device_is_refused_and_launched_as_before() -> None:
    place, machine = device(), device().backend.machine
    x = brim.asarray(np.arange(4, dtype=np.float32), device=place)
    seen: list[int] = []
    calls = [lambda: seen.append(1), lambda: machine.download(x.array), lambda: seen.append(2)]
    graphed = Graphed(calls, machine.capture)
    for _ in range(WARM_RUNS + 2):
        graphed()
    assert graphed.replays == 0
    assert "a copy from the device while a stream is captured" in graphed.reason
    assert graphed.reason in graphed.describe()
    assert seen.count(2) == WARM_RUNS + 2, "every run did everything"
    x2 = brim.asarray(np.ones(3, np.float32), device=place)
    assert (x2 + x2).numpy().tolist() == [2, 2, 2], "nothing of the attempt is left"
    for bad in (lambda: machine.synchronize(0), lambda: machine.allocate(0, 64), lambda: machine.upload(x.array, 0)):
        with pytest.raises(CaptureRefused, match="while a stream is captured"):
            machine.capture([bad])


def test_few_launches_are_no_graph() -> None:
    double = brim.compile(lambda x: x * 2.0, device=device())
    for _ in range(4):
        double(np.ones(3, np.float32))
    assert not any(isinstance(call, Graphed) for call in double._latest().runner._calls)


# ------------------------------------------------------------------------------------------------- the driver's side


@pytest.fixture
def library() -> FakeDriverLibrary:
    return FakeDriverLibrary(device().backend.machine.loader)


def through(library: FakeDriverLibrary) -> Callable[[Any], Any]:
    return lambda calls: capture(Driver(library), 77, calls)


def test_a_training_through_the_drivers_functions(library: FakeDriverLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = Trained(device()).run()
    monkeypatch.setattr(device().backend.machine, "capture", through(library))
    trained = Trained(device())
    assert trained.run() == expected
    assert trained.graphs()[0].replays == RUNS - WARM_RUNS
    changing = len(trained.graphs()[0]._changing)
    assert library.calls.count("cuGraphLaunch") == RUNS - WARM_RUNS
    assert library.calls.count("cuGraphExecKernelNodeSetParams_v2") == changing * (RUNS - WARM_RUNS)
    assert len(library.live) == 2
    del trained
    gc.collect()
    assert not library.live, "graph and executable go with the step"


@pytest.mark.parametrize(
    "name",
    [
        "cuStreamBeginCapture_v2",
        "cuStreamGetCaptureInfo_v2",
        "cuStreamEndCapture",
        "cuGraphInstantiateWithFlags",
        "cuGraphKernelNodeGetParams_v2",
    ],
)
def test_a_driver_that_refuses_leaves_nothing_and_the_training_goes_on(
    library: FakeDriverLibrary, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = Trained(device()).run()
    monkeypatch.setattr(device().backend.machine, "capture", through(library))
    library.fail[name] = 800
    trained = Trained(device())
    assert trained.run() == expected
    (graph,) = trained.graphs()
    assert graph.replays == 0
    assert f"{name}: error 800 of the test (CUresult 800)" in graph.reason
    assert not library.live


def test_a_failed_replay_is_an_error_not_a_wrong_result(
    library: FakeDriverLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device().backend.machine, "capture", through(library))
    trained = Trained(device())
    trained.run(0, WARM_RUNS + 1)
    library.fail["cuGraphLaunch"] = 700
    with pytest.raises(DeviceError, match=r"a step's graph failed on .*error 700"):
        trained.run(WARM_RUNS + 1, WARM_RUNS + 2)


def test_an_interrupt_ends_the_capture_and_passes(library: FakeDriverLibrary) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        capture(Driver(library), 77, [interrupted])
    assert not library.live
    assert device().backend.machine.loader.recording is None
