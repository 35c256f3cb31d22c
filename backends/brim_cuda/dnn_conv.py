"""Convolution, its two gradients, and convolution with a bias, a residual and relu, as requests to cuDNN.

The images lie row-major or channels last, each as it is: the library turns what its kernels want otherwise in its own
scratch, weights too (which brim keeps row-major). Channels last is what the tensor cores read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from brim.spec import DTYPES, Scalar, Spec
from brim_cuda.cublaslt import Epilogue
from brim_cuda.dnn import DnnTensor, input_of, output_of
from brim_cuda.gemm_conv import lies
from brim_cuda.gemm_epilogue import Finish, _Matcher, _one, _reads_all, _Terms
from brim_cuda.launch import In, Out, Place

__all__ = ["CONVOLUTIONS", "ConvRequest", "conv_request", "match_conv_epilogue", "turned"]

Pair = tuple[int, int]
_DTYPES = tuple(DTYPES[name] for name in ("float32", "float16", "bfloat16"))
_OPERANDS: dict[str, tuple[str, tuple[In | Out, ...]]] = {  # images of C channels, weight, images of O channels
    "conv2d": ("fprop", (In(0), In(1), Out(0))),
    "conv2d_epilogue": ("fprop", (In(0), In(1), Out(0))),
    "conv2d_grad_input": ("dgrad", (Out(0), In(1), In(0))),
    "conv2d_grad_weight": ("wgrad", (In(1), Out(0), In(0))),
}
CONVOLUTIONS = frozenset(_OPERANDS)


@dataclass(frozen=True, slots=True)
class ConvRequest:
    """One convolution or gradient.

    Attributes:
        kind: "fprop" makes y, "dgrad" x, "wgrad" w, from the other two.
        x, w, y: images (N, C, H, W), weight (O, C/groups, kH, kW), images (N, O, H', W').
        bias, added: (1, O, 1, 1) and an array like y, which fprop adds; None without.
        relu: whether fprop ends with max(., 0).
        tf32: whether float32 may be rounded to 10 bits after the point before it is multiplied.
    """

    kind: str
    x: DnnTensor
    w: DnnTensor
    y: DnnTensor
    stride: Pair
    padding: Pair
    dilation: Pair
    tf32: bool = False
    bias: DnnTensor | None = None
    added: DnnTensor | None = None
    relu: bool = False

    @property
    def title(self) -> str:
        return f"{self.kind} of {self.x.shape} with {self.w.shape} in {self.x.dtype}"

    @property
    def tensors(self) -> tuple[DnnTensor, ...]:
        return (self.x, self.w, self.y, *(t for t in (self.bias, self.added) if t is not None))

    @property
    def forbidden_notes(self) -> tuple[str, ...]:
        notes: tuple[str, ...] = ("NONDETERMINISTIC", "REDUCED_PRECISION_REDUCTION", "DOWN_CONVERT_INPUTS")
        if self.x.dtype == DTYPES["float32"]:
            notes += ("WINOGRAD", "FFT") if self.tf32 else ("WINOGRAD", "FFT", "TENSOR_CORE")
        return notes

    def build(self, cudnn: Any, graph: Any) -> None:
        """The convolution and what follows it, in float32 until it is stored."""
        wide = cudnn.data_type.FLOAT
        how = {
            "pre_padding": list(self.padding), "post_padding": list(self.padding), "stride": list(self.stride),
            "dilation": list(self.dilation), "compute_data_type": wide,
        }  # fmt: skip
        read = {"fprop": (1, 2), "dgrad": (2, 3), "wgrad": (1, 3)}[self.kind]
        given = {n: input_of(cudnn, graph, n, self.tensors[n - 1]) for n in read}
        if self.kind == "dgrad":
            return output_of(cudnn, graph.conv_dgrad(loss=given[3], filter=given[2], **how), 1, self.x)
        if self.kind == "wgrad":
            return output_of(cudnn, graph.conv_wgrad(image=given[1], loss=given[3], **how), 2, self.w)
        made = graph.conv_fprop(image=given[1], weight=given[2], **how)
        number = 4
        for name, tensor in (("bias", self.bias), ("b", self.added)):
            if tensor is not None:
                made.set_data_type(wide)
                more = input_of(cudnn, graph, number, tensor)
                if name == "bias":
                    made = graph.bias(input=made, bias=more, compute_data_type=wide)
                else:
                    made = graph.add(a=made, b=more, compute_data_type=wide)
                number += 1
        if self.relu:
            made.set_data_type(wide)
            made = graph.relu(input=made, compute_data_type=wide)
        return output_of(cudnn, made, 3, self.y)


def conv_request(
    name: str, ins: Sequence[Spec | Scalar], outs: Sequence[Spec], params: dict[str, Any]
) -> tuple[ConvRequest, tuple[Place, ...], tuple[bool, ...]] | None:
    """The request for an op of CONVOLUTIONS, where its tensors are, and which inputs must be copied to row-major order.

    None for what is left to brim's kernels: other dtypes, empty arrays, results of other layouts, other formulas.
    """
    kind, places = _OPERANDS[name]
    specs: list[Any] = [ins[p.index] if isinstance(p, In) else outs[p.index] for p in places]
    if any(not isinstance(s, Spec) or s.ndim != 4 or s.size == 0 or s.dtype != outs[0].dtype for s in specs):
        return None
    if outs[0].dtype not in _DTYPES:
        return None
    x, w, y = specs
    finish = None
    if name == "conv2d_epilogue":
        finish = match_conv_epilogue(ins, outs, params)
        if finish is None:
            return None
    copied = [False] * len(ins)
    tf32 = bool(params.get("tf32", False)) and outs[0].dtype == DTYPES["float32"]
    fast = tf32 or outs[0].dtype.itemsize == 2
    images = [spec for spec in (x, y) if lies(spec, True) != spec.contiguous]
    last = lies(images[0], True) if images else fast
    tensors: list[DnnTensor] = []
    for place, spec, is_image in zip(places, (x, w, y), (True, False, True), strict=True):
        tensor = _tensor(spec, last) if is_image else _tensor(spec, False)
        if tensor is None and isinstance(place, Out):
            return None
        if tensor is None:
            copied[place.index] = True
            tensor = _row_major(spec.shape, spec.dtype)
        tensors.append(tensor)
    how: dict[str, Any] = {key: tuple(params[key]) for key in ("stride", "padding", "dilation")}
    request = ConvRequest(kind, tensors[0], tensors[1], tensors[2], tf32=tf32, **how)
    if finish is None:
        return request, places, tuple(copied)
    return _finished(request, places, finish, ins, last, copied)


def _finished(
    request: ConvRequest, places: tuple[Place, ...], finish: Finish, ins: Sequence[Any], last: bool, copied: list[bool]
) -> tuple[ConvRequest, tuple[Place, ...], tuple[bool, ...]] | None:
    """The request with what follows it."""
    channels, dtype = request.y.shape[1], request.y.dtype
    bias = added = None
    if finish.bias is not None:
        bias = DnnTensor((1, channels, 1, 1), (channels, 1, channels, channels), dtype)
        places = (*places, In(finish.bias))
    if finish.added is not None:
        added = _tensor(ins[finish.added], last)
        if added is None:
            return None
        places = (*places, In(finish.added))
    relu = finish.epilogue in (Epilogue.RELU, Epilogue.RELU_BIAS)
    made = ConvRequest(
        request.kind, request.x, request.w, request.y, request.stride, request.padding, request.dilation,
        request.tf32, bias, added, relu,
    )  # fmt: skip
    return made, places, tuple(copied)


def _tensor(spec: Spec, last: bool) -> DnnTensor | None:
    """Images or a weight as they lie; strides of axes of one element are those of the order. None with gaps."""
    _, c, h, w = spec.shape
    if lies(spec, True) and (last or not spec.contiguous):
        return DnnTensor(spec.shape, (h * w * c, 1, w * c, c), spec.dtype)
    return _row_major(spec.shape, spec.dtype) if spec.contiguous else None


def turned(x: Any) -> Any:
    """Images that lie row-major as they would lie channels last; anything else as it is."""
    if not isinstance(x, Spec) or x.ndim != 4 or not x.contiguous:
        return x
    _, c, h, w = x.shape
    return Spec(x.shape, x.dtype, (h * w * c, 1, w * c, c))


def _row_major(shape: tuple[int, ...], dtype: Any) -> DnnTensor:
    return DnnTensor(shape, Spec(shape).strides, dtype)


def match_conv_epilogue(
    ins: Sequence[Spec | Scalar], outs: Sequence[Spec], params: dict[str, Any]
) -> Finish | None:  # fmt: skip
    """What a ``conv2d_epilogue`` of these specs is, if it is ``relu(y + added + bias)`` or a part of that, else None.

    Arguments:
        ins: (x, w, *others); the formula's input 0 is their convolution.
        outs: one array of its shape.
        params: "formula" and "shape", as in ``brim.program.passes.epilogue``.
    """
    x = ins[0]
    if len(outs) != 1 or not isinstance(x, Spec) or x.dtype not in _DTYPES or outs[0].dtype != x.dtype:
        return None
    shape = outs[0].shape
    if len(shape) != 4 or tuple(params["shape"]) != shape:
        return None
    terms = _Terms()
    roots = terms.formula(params["formula"], (x.dtype, DTYPES["float32"]))
    if roots is None or len(roots) != 1:
        return None
    fits = [_fits(spec, shape, x.dtype) for spec in ins[2:]]
    bias, full = ({n for n, word in enumerate(fits, 1) if word == kind} for kind in ("bias", "full"))
    found = _one(_Matcher(terms, bias, full), roots[0], DTYPES["float32"])
    plain = (Epilogue.DEFAULT, Epilogue.BIAS, Epilogue.RELU, Epilogue.RELU_BIAS)
    if found is None or found.epilogue not in plain or found.alpha != 1.0 or not _reads_all(found, len(ins)):
        return None
    return found if found.beta == (0.0 if found.added is None else 1.0) else None


def _fits(spec: Any, shape: tuple[int, ...], dtype: Any) -> str:
    """ "bias" for a dense vector along the channels, "full" for images of the shape without gaps, else ""."""
    if not isinstance(spec, Spec) or spec.dtype != dtype or not spec.size or spec.ndim > len(shape):
        return ""
    if spec.shape == shape and _tensor(spec, True) is not None:
        return "full"
    lead = len(shape) - spec.ndim
    sizes = [1] * lead + [1 if step == 0 else dim for dim, step in zip(spec.shape, spec.strides, strict=True)]
    if lead > 1 or sizes != [1, shape[1], 1, 1]:
        return ""
    return "bias" if spec.strides[1 - lead] == 1 or shape[1] == 1 else ""
