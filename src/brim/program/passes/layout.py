"""Layout: images lie channels-last in memory through chains of convolutions, norms and pools, where that is faster.

The shapes in a program stay (N, C, H, W); only the strides of the values change. Whether it pays is the backend's to
say: it names the ops that run faster on such images. Copies between the two orders stand at the ends of a chain only.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import replace

from brim.op import REGISTRY
from brim.program.ir import FUSED, Instruction, Program, Ref, Value
from brim.program.passes.groups import is_fusible
from brim.spec import Spec

__all__ = ["channels_last", "layout"]

_IMAGES = {
    "conv2d": (0,),
    "conv2d_epilogue": (0,),
    "conv2d_grad_input": (0,),
    "conv2d_grad_weight": (0, 1),
    "max_pool2d": (0,),
    "max_pool2d_grad": (0, 1),
    "max_pool2d_pick": (0, 1),
    "avg_pool2d": (0,),
    "avg_pool2d_grad": (0,),
    "batch_norm": (0,),
    "batch_norm_grad": (0, 1),
}
"""Op -> which of its inputs are images; its outputs are images, too, but for the gradient of a weight."""

_READS_ANY_ORDER = frozenset(("sum", "prod", "max", "min", "any", "all"))


def channels_last(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides in elements of dense images (N, C, H, W) whose channels lie side by side."""
    _, c, h, w = shape
    return c * h * w, 1, w * c, c


def layout(
    program: Program, prefers: Collection[str], gains: Callable[[Instruction], bool] | None = None
) -> Program:  # fmt: skip
    """The program with chains of images laid out channels-last.

    A chain are the images that instructions for images and elementwise instructions hand to each other. It is laid out
    anew as a whole, if more bytes go through preferring instructions than are copied at its ends: where an instruction
    of the chain reads an image that is made outside, and where a result, a state or another instruction reads one of
    the chain. Reductions read any order. (On the CPU a convolution of larger windows than one element gains more than
    the time of copying its images.)

    Arguments:
        prefers: names of ops that are faster on channels-last images; the program stays as it is without any.
        gains: which instructions of these ops are; all but those of one-element windows when None.
    """
    if not any(instruction.op.name in prefers for instruction in program.instructions):
        return program
    chains = _Chains(program, prefers, gains)
    chosen = {value for chain in chains.found() if chains.gain(chain) > chains.cost(chain) for value in chain}
    return _Rewriter(program, chosen).run() if chosen else program


def _images(instruction: Instruction) -> list[Ref]:
    """The inputs of an instruction that want the order in memory of its outputs."""
    name = instruction.op.name
    if name in _IMAGES:
        positions = _IMAGES[name]
        found = [x for n, x in enumerate(instruction.ins) if n in positions and isinstance(x, Ref)]
        if name == "conv2d_epilogue":
            found += [x for x in instruction.ins[2:] if isinstance(x, Ref) and _is_full(x, instruction)]
        return found
    if _is_pointwise(instruction):
        return [ref for ref in instruction.refs if _is_full(ref, instruction)]
    return []


def _is_full(ref: Ref, instruction: Instruction) -> bool:
    """True for an operand with an element of its own for each element of the result."""
    expanded = any(step == 0 and dim > 1 for step, dim in zip(ref.spec.strides, ref.spec.shape, strict=True))
    return ref.spec.shape == instruction.outs[0].spec.shape and not expanded


def _is_pointwise(instruction: Instruction) -> bool:
    if not is_fusible(instruction) or len(instruction.outs[0].spec.shape) != 4 or instruction.op.name == "dropout":
        return False
    # Random numbers are drawn in row-major order, whatever lies in memory.
    return instruction.op is not FUSED or all(s.fn != "uniform" for s in instruction.params["formula"].steps)


def _written(instruction: Instruction) -> tuple[Value, ...]:
    """The outputs that may be laid out channels-last."""
    if instruction.op.name == "conv2d_grad_weight":
        return ()
    takes_part = instruction.op.name in _IMAGES or _is_pointwise(instruction)
    return tuple(out for out in instruction.outs if _is_image(out)) if takes_part else ()


def _is_image(value: Value) -> bool:
    shape = value.spec.shape
    return (
        len(shape) == 4
        and value.origin == "temp"
        and value.home is None
        and value.spec.contiguous
        and shape[1] > 1
        and shape[2] * shape[3] > 1
    )


def _reads_in_place(instruction: Instruction, ref: Ref) -> bool:
    """True when an instruction reads a whole image in any order without losing by it."""
    if not ref.whole:
        return False
    if instruction.op.name in _READS_ANY_ORDER:
        return True
    return any(ref is image for image in _images(instruction)) or (_is_pointwise(instruction) and ref.spec.size > 0)


class _Chains:
    """Which values belong together, and what laying them out anew gains and costs."""

    def __init__(
        self, program: Program, prefers: Collection[str], gains: Callable[[Instruction], bool] | None = None
    ) -> None:
        self.program, self.prefers = program, prefers
        self.gains = gains or (lambda instruction: not _is_one_element(instruction))
        self.parent: dict[Value, Value] = {}
        for instruction in program.instructions:
            for out in _written(instruction):
                self.parent[out] = out
        for instruction in program.instructions:
            values = [*_written(instruction), *(ref.value for ref in _images(instruction) if ref.whole)]
            values = [value for value in values if value in self.parent]
            for value in values[1:]:
                self.parent[self.root(value)] = self.root(values[0])

    def root(self, value: Value) -> Value:
        while self.parent[value] is not value:
            self.parent[value] = value = self.parent[self.parent[value]]
        return value

    def found(self) -> list[set[Value]]:
        """The chains, each a set of values."""
        chains: dict[Value, set[Value]] = {}
        for value in self.parent:
            chains.setdefault(self.root(value), set()).add(value)
        return list(chains.values())

    def members(self, chain: set[Value]) -> Iterator[Instruction]:
        """The instructions that hand on images of a chain."""
        for instruction in self.program.instructions:
            if not chain.isdisjoint(_written(instruction)) or any(r.value in chain for r in _images(instruction)):
                yield instruction

    def gain(self, chain: set[Value]) -> int:
        """Bytes of images that pass through instructions which prefer them channels-last."""
        return sum(
            sum(ref.spec.nbytes for ref in _images(i)) + sum(out.nbytes for out in _written(i))
            for i in self.members(chain)
            if i.op.name in self.prefers and self.gains(i)
        )

    def cost(self, chain: set[Value]) -> int:
        """Bytes that are copied at the ends of a chain."""
        entries = {
            (ref.value, ref.spec, ref.offset): ref.spec.nbytes
            for instruction in self.members(chain)
            for ref in _images(instruction)
            if not (ref.whole and ref.value in chain)
        }
        exits = {ref.value for ref in self.program.results if ref.value in chain}
        for instruction in self.program.instructions:
            exits |= {r.value for r in instruction.refs if r.value in chain and not _reads_in_place(instruction, r)}
        return sum(entries.values()) + sum(value.nbytes for value in exits)


def _is_one_element(instruction: Instruction) -> bool:
    """True for windows of one element: a convolution is one matrix product then, in either order."""
    if "kernel" in instruction.params:
        return tuple(instruction.params["kernel"]) == (1, 1)
    weights = [x for x in instruction.ins[1:2] if isinstance(x, Ref)] if "conv" in instruction.op.name else []
    return any(weight.spec.shape[2:] == (1, 1) for weight in weights)


class _Rewriter:
    """Gives the chosen values their new layout, with copies where they come from or go to the other one."""

    def __init__(self, program: Program, chosen: set[Value]) -> None:
        self.program, self.chosen = program, chosen
        self.turned = {value: self.turn(value, value.spec) for value in chosen}
        self.entries: dict[Ref, Value] = {}
        self.exits: set[Value] = set()
        self.out: list[Instruction] = []

    @staticmethod
    def turn(value: Value, spec: Spec) -> Value:
        return replace(value, spec=Spec(spec.shape, spec.dtype, channels_last(spec.shape)), origin="temp", home=None)

    def run(self) -> Program:
        for instruction in self.program.instructions:
            images = _images(instruction)
            takes_part = any(ref.value in self.chosen for ref in images) or not self.chosen.isdisjoint(
                _written(instruction)
            )
            ins = []
            for operand in instruction.ins:
                if not isinstance(operand, Ref):
                    ins.append(operand)
                elif operand.value in self.chosen:
                    ins.append(self.read(instruction, operand))
                elif takes_part and any(operand is image for image in images):
                    ins.append(self.enter(instruction, operand))
                else:
                    ins.append(operand)
            outs = tuple(self.turned.get(out, out) for out in instruction.outs)
            self.out.append(replace(instruction, ins=tuple(ins), outs=outs))
        for ref in self.program.results:
            if ref.value in self.chosen:
                self.leave(ref.value, None)
        return self.program.with_instructions(self.out)

    def read(self, instruction: Instruction, ref: Ref) -> Ref:
        if _reads_in_place(instruction, ref):
            return Ref.of(self.turned[ref.value])
        self.leave(ref.value, instruction)
        return ref

    def leave(self, value: Value, reader: Instruction | None) -> None:
        """The image in row-major order, as a copy that takes the place of the value itself."""
        if value in self.exits:
            return
        self.exits.add(value)
        like = reader or next(i for i in self.out if self.turned[value] in i.outs)
        self.copy(Ref.of(self.turned[value]), value, like)

    def enter(self, instruction: Instruction, ref: Ref) -> Ref:
        """An image from outside, channels-last."""
        if ref.spec.shape[1] == 1 or ref.spec.shape[2] * ref.spec.shape[3] == 1:
            return ref  # both orders are one
        if ref.spec.strides == channels_last(ref.spec.shape):
            return ref
        if ref not in self.entries:
            made = self.turn(Value(ref.spec, op="copy", layer=instruction.layer, site=instruction.site), ref.spec)
            self.entries[ref] = made
            self.copy(ref, made, instruction)
        return Ref.of(self.entries[ref])

    def copy(self, source: Ref, out: Value, like: Instruction) -> None:
        self.out.append(Instruction(REGISTRY["copy"], (source,), (out,), {}, like.layer, like.site, like.phase))
