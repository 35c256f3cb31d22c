"""Trainer(precision=...): trains, plans, is recorded, saved and resumed; the command line; what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import brim
from brim import data, nn, optim
from brim.cli.app import main
from brim.io import list_checkpoints, load_checkpoint, read_json
from brim.precision import float32_products
from brim.program.fit import remedies
from brim.train import Callback, Trainer
from brim.units import format_bytes
from emulated import device as emulated_device

PRECISIONS = ("fp32", "bf16", "fp16", "tf32")
over_precisions = pytest.mark.parametrize("precision", PRECISIONS)


def _data(count: int = 96, scale: float = 1.0) -> data.ArrayDataset:
    rng = np.random.default_rng(0)
    labels = np.arange(count) % 3
    inputs = scale * (rng.normal(size=(count, 6)) + 2 * labels[:, None])
    return data.ArrayDataset(inputs.astype(np.float32), labels.astype(np.int64))


def _trainer(precision: str, adam: bool = False, **settings: Any) -> Trainer:
    brim.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 3))
    optimizer = optim.Adam(model.parameters(), 0.02) if adam else optim.SGD(model.parameters(), 0.1, momentum=0.9)
    return Trainer(model, optimizer, progress=False, precision=precision, **settings)  # type: ignore[arg-type]


def _values(trainer: Trainer) -> dict[str, bytes]:
    found = {name: value.numpy().tobytes() for name, value in trainer.model.state_dict().items()}
    return found | {name: array.tobytes() for name, array in trainer.optimizer.state_arrays().items()}


@over_precisions
def test_it_learns_and_records_its_precision(precision: str, tmp_path: Path) -> None:
    trainer = _trainer(precision)
    history = trainer.fit(_data(), 3, validation=_data(30), batch_size=16, out=tmp_path)
    assert history[-1]["val_accuracy"] > 0.7
    assert {p.dtype.name for p in trainer.model.parameters()} == {"float32"}
    assert read_json(tmp_path / "config.json")["precision"] == precision
    assert trainer.options["precision"] == precision
    outputs = trainer.predict(_data(30).field(0))
    assert outputs.dtype == np.float32
    low = np.array_equal(outputs, brim.asarray(outputs).astype("bfloat16").astype("float32").numpy())
    assert low == (precision == "bf16"), "computed in half width, handed out in float32"
    full = _trainer("fp32")
    expected = full.fit(_data(), 3, validation=_data(30), batch_size=16)
    assert history[-1]["loss"] == pytest.approx(expected[-1]["loss"], rel=0.02)
    assert (history == expected) == (precision in ("fp32", "tf32")), "the CPU has no tensor cores to round for"


@pytest.mark.parametrize("settings", [{}, {"accumulate": 2, "clip_norm": 0.5}], ids=["plain", "accumulate and clip"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_planned_is_eager(precision: str, settings: dict[str, Any]) -> None:
    found = []
    for compile in (True, False):
        trainer = _trainer(precision, adam=True, compile=compile, **settings)
        history = trainer.fit(_data(), 2, batch_size=16)
        found.append(([record["loss"] for record in history], _values(trainer)))
    assert found[0] == found[1]


class _Crash(Callback):
    def __init__(self, at_step: int) -> None:
        self.at_step = at_step

    def on_step_end(self, trainer: Trainer, loss: float) -> None:
        if trainer.step == self.at_step:
            raise RuntimeError("crash")


def _eager_scale(trainer: Trainer, scale: float) -> None:
    assert trainer.scaler is not None
    trainer.scaler.load_state_dict({**trainer.scaler.state_dict(), "scale": scale, "growth_interval": 3})


@pytest.mark.parametrize("crash_at", [2, 7])
@pytest.mark.parametrize("settings", [{}, {"accumulate": 2, "clip_norm": 0.5}], ids=["plain", "accumulate and clip"])
def test_resume_is_bit_for_bit_with_the_loss_scale(tmp_path: Path, crash_at: int, settings: dict[str, Any]) -> None:
    """With a scale so large that the first steps overflow, and an interval in which it grows again."""
    fit: dict[str, Any] = {"epochs": 3, "batch_size": 16, "checkpoint_every": 1, "resume": True}
    whole = _trainer("fp16", adam=True, callbacks=[Callback()], **settings)
    _eager_scale(whole, 2.0**22)
    whole.fit(_data(), out=tmp_path / "whole", **fit)
    crashed = _trainer("fp16", adam=True, callbacks=[_Crash(crash_at)], **settings)
    _eager_scale(crashed, 2.0**22)
    with pytest.raises(RuntimeError, match="crash"):
        crashed.fit(_data(), out=tmp_path / "cut", **fit)
    (saved, *_) = [load_checkpoint(path) for path in reversed(list_checkpoints(tmp_path / "cut", "last"))]
    assert saved.state["scaler"]["scale"] != 2.0**16
    resumed = _trainer("fp16", adam=True, callbacks=[Callback()], **settings)
    resumed.fit(_data(), out=tmp_path / "cut", **fit)
    assert whole.scaler is not None
    assert resumed.scaler is not None
    assert whole.scaler.state_dict() == resumed.scaler.state_dict()
    assert _values(whole) == _values(resumed)
    assert whole.history == resumed.history
    counts = {float(a) for n, a in whole.optimizer.state_arrays().items() if n.endswith(".step")}
    assert 0 < max(counts) < whole.step, "some steps were skipped, and do not count"


def test_another_precision_may_continue_a_run(tmp_path: Path) -> None:
    for precision in ("fp32", "fp16", "bf16", "fp16"):
        trainer = _trainer(precision, adam=True)
        trainer.fit(_data(), 1 + len(trainer.history), batch_size=16, out=tmp_path / "run", resume=True)
        (tmp_path / "run" / "config.json").unlink()
    trainer = _trainer("fp32", adam=True)
    trainer.load(tmp_path / "run")
    assert isinstance(trainer.fit(_data(), 1, batch_size=16), list)
    assert isinstance(trainer.optimizer.state[0]["step"], int)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_micro_batches_and_evaluation_compute_low_too(precision: str) -> None:
    trainer = _trainer(precision, fit="microbatch")
    plan = trainer.plan(data=_data(), batch_size=16)
    half = {"bf16": "bfloat16", "fp16": "float16"}[precision]
    for program in plan.programs:
        dtypes = [i.outs[0].spec.dtype.name for i in program.prepared.program.instructions if i.op.name == "matmul"]
        assert dtypes
        assert set(dtypes) == {half}, program.name
    run: Any = trainer._run
    run.parts = 3
    trainer.fit(_data(), 2, batch_size=16)
    assert trainer.history[-1]["loss"] < trainer.history[0]["loss"]


def test_a_loss_that_is_not_finite_is_found_in_the_precision_of_the_run() -> None:
    trainer = _trainer("fp16")
    big = data.ArrayDataset(np.full((16, 6), 6e4, np.float32), np.zeros(16, np.int64))
    model = nn.Sequential(nn.Linear(6, 16), nn.Linear(16, 3))
    for param in model.parameters():
        param.write(1.0)
    trainer = Trainer(model, optim.SGD(model.parameters(), 0.1), progress=False, precision="fp16", metrics=())
    with pytest.raises(FloatingPointError, match=r"layer 0 \(Linear\)"):
        trainer.fit(big, 1, batch_size=16)
    with brim.no_grad():
        assert np.isfinite(model(brim.asarray(big.field(0))).numpy()).all(), "in float32 it would be"


def test_tf32_holds_for_the_steps_of_that_trainer_alone() -> None:
    def products(trainer: Trainer) -> set[bool]:
        programs = trainer.plan(batch_size=16).programs
        found = [i for p in programs for i in p.prepared.program.instructions if "matmul" in i.op.name]
        assert found
        return {i.params.get("tf32", False) for i in found}

    assert products(_trainer("tf32")) == {True}
    assert products(_trainer("fp32")) == {False}
    assert brim.float32_precision() == "full"
    brim.set_float32_precision("tf32")
    try:
        assert products(_trainer("fp32")) == {True}, "as the process is set"
    finally:
        brim.set_float32_precision("full")


def test_products_of_a_block_are_part_of_a_traced_step() -> None:
    x = np.eye(3, dtype=np.float32)
    step = brim.compile(lambda x: brim.matmul(x, x))
    step(x)
    assert "tf32" not in str(step.program())
    with float32_products("tf32"):
        assert brim.float32_precision() == "tf32"
        step(x)
        assert "tf32=True" in str(step.program())
        step(x)
    step(x)
    assert step.explain().count("traced for") == 2
    with pytest.raises(ValueError, match="'full' or 'tf32'"), float32_products("half"):
        pass


class _Plain(optim.Optimizer):
    def update(self, group: Any, state: Any, param: Any, grad: Any) -> None:
        param.write(param - group["lr"] * grad)


def test_what_does_not_go_together_is_refused() -> None:
    with pytest.raises(ValueError, match="'fp32', 'bf16', 'fp16', 'tf32', got 'half'"):
        _trainer("half")
    for dtype in ("float64", "bfloat16"):
        model = nn.Linear(6, 3, dtype=dtype)
        for precision in ("bf16", "fp16"):
            with pytest.raises(ValueError, match=f"weight is {dtype}"):
                Trainer(model, optim.SGD(model.parameters(), 0.1), precision=precision)  # type: ignore[arg-type]
        Trainer(model, optim.SGD(model.parameters(), 0.1))
    model = nn.Linear(6, 3)
    plain = _Plain(model.parameters(), {"lr": 0.1})
    with pytest.raises(ValueError, match="_Plain cannot"):
        Trainer(model, plain, precision="fp16")
    trainer = Trainer(model, plain, precision="bf16", progress=False)
    assert len(trainer.fit(_data(), 1)) == 1


def test_a_model_without_memory_is_planned_in_every_precision() -> None:
    peaks = {}
    with brim.meta():
        for precision in PRECISIONS:
            layers = [layer for _ in range(16) for layer in (nn.Linear(128, 128), nn.ReLU())]
            model = nn.Sequential(*layers)
            optimizer = optim.Adam(model.parameters())
            trainer = Trainer(model, optimizer, precision=precision)  # type: ignore[arg-type]
            peaks[precision] = trainer.plan(batch_size=4096).peak_bytes
    assert peaks["tf32"] == peaks["fp32"]
    assert max(peaks["bf16"], peaks["fp16"]) < 0.75 * peaks["fp32"]


@pytest.mark.parametrize(("precision", "dtype", "offered"), [
    ("fp32", "float32", True),
    ("tf32", "float32", True),
    ("bf16", "float32", False),
    ("fp16", "float32", False),
    ("fp32", "bfloat16", False),
], ids=["fp32", "tf32", "bf16", "fp16", "bfloat16 parameters"])  # fmt: skip
def test_a_refusal_offers_half_width_where_it_is_something_new(precision: str, dtype: str, offered: bool) -> None:
    def plan(precision: str) -> Any:
        layers = [layer for _ in range(2) for layer in (nn.Linear(32, 32), nn.Tanh())]
        model = nn.Sequential(*layers, nn.Linear(32, 3)).to(dtype)
        return Trainer(model, optim.SGD(model.parameters(), 0.1), progress=False, precision=precision).plan(512)

    whole = plan(precision)
    half = plan("bf16") if dtype == "float32" else whole
    found = {text: make().peak_bytes for text, make in whole.alternatives}
    assert ('precision="bf16"' in found) == offered
    if offered:
        assert half.peak_bytes < whole.peak_bytes
        lines = "\n".join(remedies(whole, half.peak_bytes, time_s=60))
        assert f'precision="bf16" -> {format_bytes(half.peak_bytes)}' in lines
        assert found['precision="bf16"'] == half.peak_bytes, "as a Trainer of that precision plans it"
        lines = "\n".join(remedies(whole, half.peak_bytes - 4096, time_s=60))
        assert 'precision="bf16" ->' not in lines.split("not enough: ")[0]


@pytest.mark.emulated
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_the_cuda_backend_trains_alike(precision: str) -> None:
    here, there = _trainer(precision, clip_norm=0.5), _trainer(precision, clip_norm=0.5, device=emulated_device())
    brim.manual_seed(1)
    expected = [record["loss"] for record in here.fit(_data(), 2, batch_size=16)]
    brim.manual_seed(1)
    found = [record["loss"] for record in there.fit(_data(), 2, batch_size=16)]
    assert found == pytest.approx(expected, rel=0.02)
    assert there.planned is not None
    assert {p.device for p in there.model.parameters()} == {emulated_device()}
    assert (there.scaler is None) == (precision == "bf16")
    if there.scaler is not None and here.scaler is not None:
        assert there.scaler.state_dict() == here.scaler.state_dict()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_the_command_line(precision: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    flags = ["--precision", precision, "--epochs", "1", "--hidden", "32", "--out", str(out)]
    assert main(["train", "digits", *flags]) == 0
    config = read_json(out / "config.json")
    assert config["settings"]["precision"] == config["precision"] == precision
    assert main(["plan", "digits", "--precision", precision, "--search", "0"]) == 0
    assert main(["train", "digits", "--precision", "half"]) == 2
    assert "fp32 or bf16 or fp16 or tf32" in capsys.readouterr().err
