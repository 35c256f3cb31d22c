"""Formulas after products on CUDA: which ones cuBLASLt computes itself, and that it computes the same as the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import brim
from brim import nn, optim
from brim.expr import FormulaBuilder, FusedFormula
from brim.op import REGISTRY
from brim.program.compile import compile as compile_step
from brim.program.passes.epilogue import MATMUL_EPILOGUE
from brim.spec import DTYPES, Spec
from brim_cuda.cublaslt import Epilogue
from brim_cuda.gemm import plan_matmul
from brim_cuda.gemm_epilogue import Finish, joins_epilogue, match_epilogue, plan_epilogue
from gemm_bench import Bench, close, reference

Array = np.ndarray[Any, Any]
Formula = Callable[[FormulaBuilder, list[Any]], list[Any]]

F32, F64, BF16 = DTYPES["float32"], DTYPES["float64"], DTYPES["bfloat16"]
CPU = brim.device("cpu").backend


def made_of(names: str, ins: list[Any], dtype: Any = F32, outputs: tuple[int, ...] = (-1,)) -> FusedFormula:
    """The formula of ops in a row, as the fusion pass writes it: "add 0 1; relu -1" (inputs by number, -1 the last).

    A word with a point is a constant.
    """
    builder = FormulaBuilder([dtype] * len(ins))
    results: list[Any] = []
    for line in names.split(";"):
        name, *words = line.split()
        operands, specs = [], []
        for word in words:
            if "." in word:
                operands.append(("const", float(word)))
                specs.append(float(word))
            else:
                operands.append(("in", int(word)) if int(word) >= 0 else results[int(word)])
                specs.append(Spec((), dtype))
        results.append(REGISTRY[name].splice(builder, operands, specs, {}, dtype))
    return builder.formula([results[n][1] for n in outputs])


def params_of(formula: FusedFormula, shape: tuple[int, ...]) -> dict[str, Any]:
    return {"formula": formula, "shape": shape}


def run_both(bench: Bench, ins: list[Spec], outs: list[Spec], params: dict[str, Any]) -> Finish:
    """The twin's results are the CPU kernel's, within what half-width steps in between may cost."""
    found = plan_epilogue(ins, outs, params)
    assert found is not None
    plan, finish = found
    arrays = [bench.random(spec, seed) for seed, spec in enumerate(ins)]
    results = [bench.array(spec) for spec in outs]
    places = {
        name: arrays[number]
        for name, number in (("bias", finish.bias), ("added", finish.added), ("aux", finish.aux_in))
        if number is not None
    }
    if finish.aux_out is not None:
        places["aux"] = results[finish.aux_out]
    bench.run(plan, results[finish.out], arrays[0], arrays[1], prepared=True, **places)
    kernel = CPU.bind(MATMUL_EPILOGUE, ins, outs, params)
    want = [np.empty(spec.shape, spec.dtype) for spec in outs]
    scratch = np.empty(kernel.scratch_bytes, np.uint8)
    kernel.run(tuple(want) if len(want) > 1 else want[0], *arrays, scratch=scratch, **params)
    for got, expected in zip(results, want):
        close(got, expected.astype("f8"), ins[0].shape[-1], 4)
    return finish


E = Epilogue
PATTERNS = [
    ("add 0 1", "b", Finish(E.BIAS, bias=2)),
    ("add 1 0", "b", Finish(E.BIAS, bias=2)),
    ("relu 0", "", Finish(E.RELU)),
    ("add 0 1; relu -1", "b", Finish(E.RELU_BIAS, bias=2)),
    ("gelu_tanh 0", "", Finish(E.GELU)),
    ("add 0 1; gelu_tanh -1", "b", Finish(E.GELU_BIAS, bias=2)),
    ("multiply 0 0.125", "", Finish(alpha=0.125)),
    ("multiply 0.3 0", "", Finish(alpha=0.3)),
    ("divide 0 8.0", "", Finish(alpha=0.125)),
    ("negative 0", "", Finish(alpha=-1.0)),
    ("add 0 1", "f", Finish(beta=1.0, added=2)),
    ("subtract 0 1", "f", Finish(beta=-1.0, added=2)),
    ("subtract 1 0", "f", Finish(alpha=-1.0, beta=1.0, added=2)),
    ("multiply 0 0.5; multiply 1 2.0; add -2 -1", "f", Finish(alpha=0.5, beta=2.0, added=2)),
    ("add 0 1; add -1 2", "bf", Finish(E.BIAS, beta=1.0, bias=2, added=3)),
    ("add 0 1; add -1 2; relu -1", "fb", Finish(E.RELU_BIAS, beta=1.0, bias=3, added=2)),
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("text", "others", "want"), PATTERNS, ids=[f"{p[0]} {p[1]}" for p in PATTERNS])
def test_known_formulas(dtype: str, text: str, others: str, want: Finish) -> None:
    bench, kind = Bench(), DTYPES[dtype]
    shape = (2, 5, 8)
    extra = [Spec((8,), kind) if word == "b" else Spec(shape, kind) for word in others]
    ins = [Spec((2, 5, 7), kind), Spec((7, 8), kind), *extra]
    params = params_of(made_of(text, ins[1:], kind), shape)
    assert run_both(bench, ins, [Spec(shape, kind)], params) == want
    assert joins_epilogue("matmul_epilogue", ins, [Spec(shape, kind)], params)
    assert not joins_epilogue("conv2d_epilogue", ins, [Spec(shape, kind)], params)


@pytest.mark.parametrize("bias", ["", "b"])
@pytest.mark.parametrize("order", [(-1, -2), (-2, -1)], ids=str)
def test_what_went_into_gelu_is_stored_beside_it(bench: Bench, bias: str, order: tuple[int, int]) -> None:
    ins = [Spec((3, 5, 7)), Spec((3, 7, 16)), *([Spec((16,))] if bias else [])]
    text = "add 0 1; gelu_tanh -1" if bias else "multiply 0 1.0; gelu_tanh -1"
    params = params_of(made_of(text, ins[1:], outputs=order), (3, 5, 16))
    finish = run_both(bench, ins, [Spec((3, 5, 16))] * 2, params)
    assert finish.epilogue == (E.GELU_AUX_BIAS if bias else E.GELU_AUX)
    assert (finish.out, finish.aux_out) == ((0, 1) if order == (-1, -2) else (1, 0))
    odd = [Spec((5, 7)), Spec((7, 12)), *([Spec((12,))] if bias else [])]
    assert plan_epilogue(odd, [Spec((5, 12))] * 2, params_of(params["formula"], (5, 12))) is None


REFUSED = [
    ("gelu 0", "", F32),  # the exact form: not the library's
    ("sigmoid 0", "", F32),
    ("add 0 1; sigmoid -1", "b", F32),
    ("multiply 0 1", "f", F32),
    ("multiply 0 1", "b", F32),
    ("add 0 0", "", F32),
    ("add 0 1; relu -1; add -1 2", "bf", F32),  # the residual comes after the activation
    ("add 0 1", "c", F32),  # a column: along the other axis
    ("add 0 1; add -1 2", "bb", F32),
    ("add 0 1; relu -1", "b", F64),
    ("divide 0 3.0", "", F32),  # a third is no float
    ("relu 0", "b", F32),  # an input that nothing reads
]


@pytest.mark.parametrize(("text", "others", "dtype"), REFUSED, ids=[f"{r[0]} {r[1]} {r[2]}" for r in REFUSED])
def test_other_formulas_are_left_to_kernels(text: str, others: str, dtype: Any) -> None:
    extra = [Spec({"b": (8,), "f": (5, 8), "c": (5, 1)}[word], dtype) for word in others]
    ins = [Spec((5, 7), dtype), Spec((7, 8), dtype), *extra]
    assert match_epilogue(ins, [Spec((5, 8), dtype)], params_of(made_of(text, ins[1:], dtype), (5, 8))) is None


def test_specs_that_do_not_fit_are_refused() -> None:
    formula = made_of("add 0 1", [0, 1])
    a, b, out = Spec((5, 7)), Spec((7, 8)), Spec((5, 8))
    params = params_of(formula, (5, 8))
    assert plan_epilogue([a, b, Spec((8,))], [out], params)
    assert plan_epilogue([a, b, Spec((1, 8))], [out], params)
    assert not plan_epilogue([a, b, Spec((8,), F32, (2,))], [out], params)
    assert not plan_epilogue([a, b, Spec((8,), BF16)], [out], params)
    assert not plan_epilogue([a, b, 2.0], [out], params)
    assert not plan_epilogue([a, b, Spec((8,))], [Spec((5, 8), F32, (1, 5))], params)
    assert not plan_epilogue([a, b, Spec((40,))], [Spec((40,))], params_of(formula, (40,)))
    empty = [Spec((5, 0)), Spec((0, 8)), Spec((8,))]
    assert not plan_epilogue(empty, [out], params)


def test_float64_has_factors_and_sums_only(bench: Bench) -> None:
    ins = [Spec((5, 7), F64), Spec((7, 8), F64), Spec((5, 8), F64)]
    params = params_of(made_of("multiply 0 0.3; add -1 1", ins[1:], F64), (5, 8))
    assert run_both(bench, ins, [Spec((5, 8), F64)], params) == Finish(alpha=0.3, beta=1.0, added=2)


@pytest.fixture
def bench() -> Bench:
    return Bench()


def traced_epilogues(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """(ins, outs, params) of every matmul_epilogue that a training step of a model offers."""
    offered: list[tuple[Any, ...]] = []

    def wanted(op: Any, ins: Any, outs: Any, params: Any) -> bool:
        if op is MATMUL_EPILOGUE:
            offered.append((list(ins), list(outs), dict(params)))
        return False

    monkeypatch.setattr(CPU, "joins_epilogue", wanted, raising=False)
    sgd = optim.SGD(model.parameters(), lr=0.1)

    def step(x: Any) -> Any:
        loss = model(x).square().mean()
        loss.backward()
        sgd.step()
        sgd.zero_grad()
        return loss

    compile_step(step)(np.random.default_rng(0).standard_normal((4, 16)).astype("f4"))
    return offered


def test_a_real_step_has_gelu_with_its_gradient(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    gelu = nn.GELU(approximate="tanh")
    offered = traced_epilogues(
        nn.Sequential(nn.Linear(16, 24, bias=False), gelu, nn.Linear(24, 8, bias=False)), monkeypatch
    )
    found = [run_both(bench, *one).epilogue for one in offered if plan_epilogue(*one)]
    assert E.GELU_AUX in found
    assert E.DGELU in found


def test_a_real_step_has_bias_and_relu(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    offered = traced_epilogues(nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8)), monkeypatch)
    found = [run_both(bench, *one) for one in offered if plan_epilogue(*one)]
    assert Finish(E.RELU_BIAS, bias=2) in found


# ---- epilogues that no formula asks for: sums of gradients, bits ----


def test_relu_keeps_bits_for_its_gradient(bench: Bench) -> None:
    a, b, out = Spec((3, 5, 7)), Spec((3, 7, 130)), Spec((3, 5, 130))
    forward = plan_matmul(a, b, out, epilogue=E.RELU_AUX)
    assert (forward.aux_ld, forward.aux_stride, forward.aux_bytes) == (256, 256 * 5, 256 * 5 * 3 // 8)
    x, y, made, bits = bench.random(a, 1), bench.random(b, 2), bench.array(out), bench.memory(forward.aux_bytes)
    bench.run(forward, made, x, y, aux=bits)
    product = reference(x, y)
    close(made, np.maximum(product, 0), 7)
    backward = plan_matmul(a, b, out, epilogue=E.DRELU)
    bench.run(backward, made, bench.random(a, 3), y, aux=bits)
    close(made, reference(bench.random(a, 3), y) * (product > 0), 7)


def test_calls_of_a_batch_have_masks_of_their_own(bench: Bench) -> None:
    a, b, out = Spec((2, 3, 5, 7)), Spec((3, 7, 9)), Spec((2, 3, 5, 9))
    for prepared in (False, True):
        forward = plan_matmul(a, b, out, epilogue=E.RELU_AUX)
        assert len(forward.calls) == 2
        x, y, made, bits = bench.random(a, 1), bench.random(b, 2), bench.array(out), bench.memory(forward.aux_bytes)
        bench.run(forward, made, x, y, prepared, aux=bits)
        bench.run(plan_matmul(a, b, out, epilogue=E.DRELU), made, x, y, prepared, aux=bits)
        close(made, np.maximum(reference(x, y), 0), 7)


@pytest.mark.parametrize("epilogue", [E.DGELU_BGRAD, E.DRELU_BGRAD, E.BGRADA, E.BGRADB], ids=lambda e: e.name)
def test_sums_of_gradients(bench: Bench, epilogue: Epilogue) -> None:
    a, b, out = Spec((2, 3, 5)), Spec((5, 8)), Spec((2, 3, 8))
    plan = plan_matmul(a, b, out, epilogue=epilogue)
    x, y, h, made = bench.random(a, 1), bench.random(b, 2), bench.random(out, 3), bench.array(out)
    sums = bench.array(Spec((plan.bias_length,)))
    aux = h
    if epilogue == E.DRELU_BGRAD:
        aux = bench.memory(plan.aux_bytes)
        aux.fill(0xFF)
    bench.run(plan, made, x, y, bias=sums, aux=aux)
    product = reference(x, y)
    if epilogue == E.BGRADA:
        want, total = product, y.sum(0)
    elif epilogue == E.BGRADB:
        want, total = product, x.sum(-1).reshape(-1)
    elif epilogue == E.DRELU_BGRAD:
        want, total = product, product.reshape(-1, 8).sum(0)
    else:
        t = np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h.astype("f8") ** 3))
        want = product * (0.5 * (1 + t) + 0.5 * h * (1 - t * t) * np.sqrt(2 / np.pi) * (1 + 3 * 0.044715 * h**2))
        total = want.reshape(-1, 8).sum(0)
    close(made, want, 5, 4)
    close(sums, total, 30, 4)
