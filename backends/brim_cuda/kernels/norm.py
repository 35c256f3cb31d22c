"""Layer norm and batch norm and the gradients of both: one or two launches each, and two more for layer norm's weights.

Batch norm reads and writes images in any order of memory whose pixels lie evenly: (N, C, H, W) and channels-last alike.
A plain norm is one whose formulas hand elements on as they are, so that both have the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from brim.expr import FusedFormula, ScalarStep
from brim.spec import DTYPES, Scalar, Spec
from brim_cuda.cuda_c import arithmetic
from brim_cuda.kernels.rows import INCLUDES, Lines, Steps
from brim_cuda.kernels.softmax import floats
from brim_cuda.launch import BLOCK, Call, In, Out, Param, Scratch, index_dtype, named_kernel, pointer
from brim_cuda.norm_c import Argument, Printed, Side, line_steps, printed
from brim_cuda.registry import Work, kernel

__all__ = ["joins_norms"]

_BUSY_BLOCKS = 512
"""Blocks that keep a large GPU busy."""
_LEAST = 16
"""Units of a piece that a thread should have at least."""
_MAX_PIECES = 128
_MAX_BLOCKS = 32768
_HELD_BYTES = 128
"""What a thread holds of a line, at most: 32 registers."""
_OWN = {"layer_norm": 2, "batch_norm": 2, "layer_norm_grad": 4, "batch_norm_grad": 4}
"""Norm -> its inputs but the first: weight and bias; or x, weight, mean and variance."""
_NAMES = tuple(_OWN)


def _identity(dtype: Any) -> FusedFormula:
    return FusedFormula((ScalarStep("cast", dtype, (("in", 0),), dtype),), (0,))


@kernel(*_NAMES)
def norm(ins: Sequence[Any], outs: Sequence[Spec], *, name: str, **params: Any) -> Work:
    """A norm or a gradient of one by itself."""
    first, result = ins[0], outs[0]
    if not isinstance(first, Spec) or first.shape != result.shape:
        raise KeyError(f"the CUDA backend has no kernel for {name} of an operand that is broadcast")
    count = _OWN[name]
    places = [*range(1, count + 1), 0]
    whole = [ins[n] for n in places]
    return _Norm(
        name, whole, places, outs, _identity(first.dtype), _identity(result.dtype), result.shape, params
    ).work()


@kernel(*(f"{name}_fused" for name in _NAMES))
def fused_norm(
    ins: Sequence[Any],
    outs: Sequence[Spec],
    *,
    name: str,
    before: FusedFormula,
    after: FusedFormula,
    shape: tuple[int, ...],
    **params: Any,
) -> Work:
    """A norm with the formulas before and after it; see ``brim.program.norm_groups``."""
    plain = name.removesuffix("_fused")
    return _Norm(plain, ins, list(range(len(ins))), outs, before, after, shape, params).work()


def joins_norms(name: str, ins: Sequence[Spec | Scalar], outs: Sequence[Spec], params: dict[str, Any]) -> bool:
    """Whether a norm with these formulas is better than the three by themselves."""
    plain, before, after = name.removesuffix("_fused"), params["before"], params["after"]
    own = {k: v for k, v in params.items() if k not in ("before", "after", "shape")}
    try:
        made = _Norm(plain, ins, list(range(len(ins))), outs, before, after, params["shape"], own)
        if any(made.work().contiguous[made.count :]):
            return False  # operands would be copied first
    except KeyError:
        return False
    drawn = [any(step.fn == "uniform" for step in formula.steps) for formula in (before, after)]
    if any(drawn) and not made.shares_draws():
        return False
    # The gradients of layer norm's weights compute what comes before once more.
    return plain != "layer_norm_grad" or (len(before.outputs) == 1 and not drawn[0])


class _Norm:
    """A norm with formulas, on operands of certain specs.

    Arguments:
        ins: the norm's inputs but the first, then those of the formulas.
        places: for each, the number of the op's input.
        outs: results of ``after``, of ``before`` but the first, of the norm but the first.
        params: of the norm.
    """

    def __init__(
        self,
        name: str,
        ins: Sequence[Any],
        places: Sequence[int],
        outs: Sequence[Spec],
        before: FusedFormula,
        after: FusedFormula,
        shape: tuple[int, ...],
        params: dict[str, Any],
    ) -> None:
        self.name, self.ins, self.places, self.outs, self.shape = name, ins, places, outs, shape
        self.before, self.after, self.params = before, after, params
        self.count = _OWN[name]
        self.grad, self.rows = name.endswith("_grad"), name.startswith("layer")
        self.n_made, self.n_kept = len(after.outputs), len(before.outputs) - 1
        first = before.steps[before.outputs[0]].dtype
        self.dtypes = (first, ins[0].dtype if self.grad else first)
        self.own = ins[: self.count]
        self.rest = outs[self.n_made + self.n_kept :]
        floats(name, Spec((), first), *self.own, *self.rest)
        self.compute = arithmetic(first)
        self.size = math.prod(shape)
        ndim = params["ndim"] if self.rows else 0
        axes = range(len(shape))
        self.line_axes = axes[: len(shape) - ndim] if self.rows else axes[1:2]
        self.element_axes = axes[len(shape) - ndim :] if self.rows else [a for a in axes if a != 1]
        self.length = math.prod(shape[a] for a in self.element_axes)
        self._check()
        arrays = [s for s in (*ins, *outs) if isinstance(s, Spec)]
        self.index = index_dtype([*arrays, Spec(shape)])

    def _check(self) -> None:
        weights, size = self.own[1 if self.grad else 0 :], self.length if self.rows else self.shape[1]
        vectors = weights[:1] if self.grad else weights
        if any(isinstance(v, Spec) and v.size != size for v in vectors):
            raise KeyError(f"the CUDA backend has no kernel for {self.name} with weights that are broadcast")
        if self.grad and any(not isinstance(s, Spec) or s.dtype != self.compute for s in self.own[2:]):
            raise KeyError(
                f"the CUDA backend has no kernel for {self.name} with statistics in another dtype than its own"
            )
        if self.size == 0 and any(out.size for out in self.outs):
            raise KeyError("the CUDA backend has no kernel for norms over an empty axis")

    # ------------------------------------------------------------------------------------------ where elements lie

    def steps(self, spec: Spec) -> Steps | None:
        return line_steps(spec, self.shape, self.line_axes, self.element_axes)

    def sides(self) -> tuple[list[Any], Side | None, list[Side], list[Side], list[bool]]:
        """Operands of the formulas, x of a gradient, the results, and which inputs must be row-major."""
        contiguous = [isinstance(x, Spec) for x in self.own]
        own: Side | None = None
        if self.grad:
            own, contiguous[0] = self._side("x", 0)
        others: list[Any] = []
        for n, x in enumerate(self.ins[self.count :], self.count):
            side, copied = self._side(f"i{n}", n) if isinstance(x, Spec) else (x, False)
            others.append(side)
            contiguous.append(copied)
        results = []
        for n, out in enumerate(self.outs[: self.n_made + self.n_kept]):
            if (steps := self.steps(out)) is None:
                raise KeyError(f"the CUDA backend has no kernel for {self.name} into such an order of memory")
            results.append(Side(f"o{n}", out.dtype, steps, Out(n), True))
        return others, own, results[: self.n_made], results[self.n_made :], contiguous

    def _side(self, name: str, n: int) -> tuple[Side, bool]:
        spec = self.ins[n]
        steps = self.steps(spec)
        if steps is not None:
            return Side(name, spec.dtype, steps, In(self.places[n])), False
        steps = self.steps(Spec(spec.shape, spec.dtype))
        assert steps is not None
        return Side(name, spec.dtype, steps, In(self.places[n])), True

    def units(self, main: Steps) -> int:
        """Elements that a thread takes at once: the same with and without formulas, so that sums are the same."""
        return next(
            v for v in (8, 4, 2, 1) if v == 1 or (main.step == 1 and main.part % v == 0 and self.length % v == 0)
        )

    def shares_draws(self) -> bool:
        """Whether the elements of a unit are drawn together, as eight are in one go."""
        logical = self.steps(Spec(self.shape))
        main = self.steps(self.outs[0])
        return logical is not None and main is not None and self.units(main) == 8 and logical.part % 8 == 0

    # --------------------------------------------------------------------------------------------------- launches

    def work(self) -> Work:
        _, _, made, _, contiguous = self.sides()
        flags = [False] * (max(self.places) + 1)
        for place, flag in zip(self.places, contiguous, strict=True):
            flags[place] = flag
        if self.size == 0:
            self.printed(1)  # refuses what has no kernel, whatever the size
            return Work([], contiguous=tuple(flags))
        main = made[0].steps
        v = self.units(main)
        lines = self.size // self.length
        across = not self.rows and lines > 1 and abs(main.line) < abs(main.step)
        dealt = Lines(lines, self.length // v, across)
        launch = _Launches(self, self.printed(v), dealt, v)
        made_of = {
            "layer_norm": launch.layer_norm, "batch_norm": launch.batch_norm,
            "layer_norm_grad": launch.layer_norm_grad, "batch_norm_grad": launch.batch_norm_grad,
        }  # fmt: skip
        calls, scratch = made_of[self.name]()
        return Work(calls, scratch * self.compute.itemsize, tuple(flags), aliasing=True)

    def printed(self, v: int, stores: bool = True) -> Printed:
        others, own, made, kept, _ = self.sides()
        first, *more = self.before.outputs
        logical = self.steps(Spec(self.shape))
        assert logical is not None
        return printed(
            self.before, self.after, others, [In(n) for n in self.places[self.count :]], own, made, kept,
            more.index(first) if first in more else None, self.dtypes, logical, v, self.index, stores,
        )  # fmt: skip

    def array(self, name: str, n: int) -> Argument:
        """One of the norm's own inputs, an array or a number."""
        given = self.own[n]
        place = In(self.places[n])
        return (pointer(name, given.dtype, const=True) if isinstance(given, Spec) else Param(name, self.compute)), place

    def result(self, name: str, n: int) -> Argument:
        """One of the norm's results but the first."""
        return pointer(name, self.rest[n].dtype), Out(n + self.n_made + self.n_kept)


def _pieces(lines: Lines, v: int) -> tuple[int, int]:
    """(number of pieces, elements of each) into which lines are cut so that the GPU is busy."""
    most = min(-(-_BUSY_BLOCKS // lines.tiles), -(-lines.count // (lines.lanes * _LEAST)), _MAX_PIECES)
    chunk = -(-lines.count // max(1, most))
    return -(-lines.count // chunk), chunk * v


class _Launches:
    """The launches of one norm; each of the four gives them and the numbers that it needs in scratch."""

    def __init__(self, of: _Norm, text: Printed, lines: Lines, v: int) -> None:
        self.of, self.text, self.lines, self.v = of, text, lines, v
        compute, index = of.compute, of.index
        self.eps: Argument = (Param("eps", compute), compute.type(of.params["eps"]))
        self.share: Argument = (Param("share", compute), compute.type(1.0 / of.length))
        self.counts: list[Argument] = [
            (Param("lines", index), index.type(lines.lines)), (Param("count", index), index.type(of.length)),
        ]  # fmt: skip
        self.pieces, self.chunk = _pieces(lines, v)
        self.cut = [self.number("chunk", self.chunk), self.number("pieces", self.pieces)]
        self.deal: list[Argument] = [
            (Param("lanes", DTYPES["int32"]), lines.lanes),
            (Param("across", DTYPES["bool"]), lines.across),
        ]

    def number(self, name: str, value: int) -> Argument:
        return Param(name, self.of.index), self.of.index.type(value)

    def parts(self, *, const: bool, offset: int = 0, name: str = "parts") -> Argument:
        """What pieces have in scratch, from element ``offset`` on."""
        return pointer(name, self.of.compute, const=const), Scratch(offset * self.of.compute.itemsize)

    def call(
        self,
        function: str,
        given: str,
        rest: Sequence[Argument],
        carried: int,
        *,
        text: Printed | None = None,
        lines: Lines | None = None,
        lanes: int = 0,
        pieces: int = 1,
        wide: bool = True,
    ) -> Call:
        """A launch of ``function(given, rest..., lanes, across)``; ``wide``: it takes that, too.

        Arguments:
            given: which of the printed functions it takes, with a comma after each.
            carried: numbers that a thread hands to the others.
        """
        of, lines = self.of, lines or self.lines
        text = text or self.text
        lanes = lanes or lines.lanes
        deal = [(self.deal[0][0], lanes), (self.deal[1][0], lines.across)]
        vectors = ""
        if of.rows and self.v > 1 and text is self.text:
            vectors = "".join(
                f" && is_aligned<{param.ctype.removeprefix('const ')}, {self.v}>({param.name})"
                for param, _ in rest
                if param.is_pointer and param.name in ("weight", "bias")
            )
        functions = [name for name in given.split(", ") if name]
        before, inside, operands = text.chosen(functions, vectors) if functions else ("", "", [])
        operands = [*operands, *rest, *deal]
        names = ", ".join([*(param.name for param, _ in (*rest, *deal)), *(["wide"] if wide else [])])
        bounds = f"{BLOCK}, 4" if pieces > 1 else str(BLOCK)  # else the compiler spills to come down to 32 registers
        source = f"""{before}
extern "C" __global__ void __launch_bounds__({bounds}) NAME(PARAMS) {{
    {inside}
    {function}({given}{names});
}}
"""
        made = named_kernel("norm", [p for p, _ in operands], source, (*INCLUDES, "philox.cuh", "norm.cuh"))
        tiles = -(-lines.lines // (BLOCK // lanes))
        blocks = (min(tiles, _MAX_BLOCKS), pieces) if pieces > 1 else (min(tiles, _MAX_BLOCKS),)
        shared = carried * of.compute.itemsize * BLOCK if lanes > 1 else 0
        return Call(made, blocks, tuple(argument for _, argument in operands), shared_bytes=shared)

    def held(self) -> tuple[int, int]:
        """(units that a thread holds of a line, threads that share one); 0 units where it would be too many."""
        each = self.v * self.of.compute.itemsize * (2 if self.of.grad else 1)
        lanes = self.lines.lanes
        most = BLOCK if not self.lines.across else lanes
        while lanes < most and -(-self.lines.count // lanes) * each > _HELD_BYTES:
            lanes *= 2
        units = -(-self.lines.count // lanes)
        return (units, lanes) if units * each <= _HELD_BYTES else (0, self.lines.lanes)

    def whole(self, by_line: bool) -> Call:
        """A forward norm in one launch."""
        held, lanes = self.held()
        rest = [
            self.of.array("weight", 0),
            self.of.array("bias", 1),
            self.of.result("mean", 0),
            self.of.result("var", 1),
        ]
        function = f"norm_lines<{str(by_line).lower()}, {self.v}, {held}>"
        return self.call(function, "first, again, last, ", [*rest, *self.counts, self.eps], 1, lanes=lanes)

    def layer_norm(self) -> tuple[list[Call], int]:
        return [self.whole(False)], 0

    def batch_norm(self) -> tuple[list[Call], int]:
        if self.pieces == 1:
            return [self.whole(True)], 0
        of, n = self.of, self.pieces
        vectors, moments = [of.array("weight", 0), of.array("bias", 1)], [of.result("mean", 0), of.result("var", 1)]
        calls = [
            self.call(
                f"norm_pieces<{self.v}>", "first, again, ", [self.parts(const=False), *self.counts, *self.cut], 1,
                pieces=n, wide=False,
            ),
            self.call(
                f"norm_from_pieces<{self.v}>", "again, last, ",
                [*vectors, self.parts(const=True), *moments, *self.counts, self.eps, *self.cut], 3, pieces=n,
            ),
        ]  # fmt: skip
        return calls, 2 * n * self.lines.lines

    def layer_norm_grad(self) -> tuple[list[Call], int]:
        """The gradients of the weights first, from columns: the results may lie over what they read."""
        of = self.of
        weight, mean, var = of.array("weight", 1), of.array("mean", 2), of.array("var", 3)
        columns = Lines(of.length, self.lines.lines, across=True)
        pieces, chunk = _pieces(columns, 1)
        results = [of.result("second", 0), of.result("first_sum", 1)]
        into = results
        if pieces > 1:
            into = [
                self.parts(const=False, offset=pieces * of.length, name="second"),
                self.parts(const=False, name="first_sum"),
            ]
        counts = [self.number("lines", of.length), self.number("count", self.lines.lines)]
        rest = [mean, var, *into, *counts, self.eps, self.number("chunk", chunk)]
        text = of.printed(1, stores=False)
        calls = [
            self.call(
                "layer_norm_grad_columns", "first, ", rest, 2, text=text,
                lines=columns, pieces=pieces, wide=False,
            )
        ]  # fmt: skip
        if pieces > 1:
            counts = [self.number("lines", of.length), self.number("count", pieces)]
            joining = Lines(of.length, pieces, across=True)
            rest = [self.parts(const=True), *results, *counts]
            calls.append(self.call("norm_grad_join", "", rest, 2, lines=joining, wide=False))
        held, lanes = self.held()
        rest = [weight, mean, var, *self.counts, self.eps, self.share]
        function = f"layer_norm_grad_lines<{self.v}, {held}>"
        calls.append(self.call(function, "first, again, last, ", rest, 2, lanes=lanes))
        return calls, 2 * pieces * of.length if pieces > 1 else 0

    def batch_norm_grad(self) -> tuple[list[Call], int]:
        of, n = self.of, self.pieces
        weight, mean, var = of.array("weight", 1), of.array("mean", 2), of.array("var", 3)
        results = [of.result("second", 0), of.result("first_sum", 1)]
        if n == 1:
            held, lanes = self.held()
            rest = [weight, mean, var, *results, *self.counts, self.eps, self.share]
            function = f"batch_norm_grad_lines<{self.v}, {held}>"
            return [self.call(function, "first, again, last, ", rest, 2, lanes=lanes)], 0
        rest = [mean, var, self.parts(const=False), *self.counts, self.eps, *self.cut]
        calls = [self.call(f"batch_norm_grad_pieces<{self.v}>", "first, ", rest, 2, pieces=n, wide=False)]
        rest = [weight, mean, var, self.parts(const=True), *results, *self.counts, self.eps, self.share, *self.cut]
        calls.append(self.call(f"batch_norm_grad_from_pieces<{self.v}>", "again, last, ", rest, 2, pieces=n))
        return calls, 2 * n * self.lines.lines
