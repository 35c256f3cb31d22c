"""What cuDNN plans for an H100 on a machine without a GPU; a program of its own, run by test_cudnn_plans.py.

cuDNN's engines need the NVIDIA driver's library beside them, and cuBLASLt's. Stand-ins for both are compiled from the
few lines below: they answer every call with an error. Convolutions are planned completely with that. Attention is
written and compiled by the library for the shape at hand, and then loaded by the driver: there it ends ("refusing"),
unless the stand-in says that it has loaded what it was given ("loading").

The stand-ins are found by LD_LIBRARY_PATH, which is read when a process starts; and cuDNN ends a process where a
function of the driver is missing: so all of this happens in a process of its own, which prints JSON.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from brim_cuda.cublaslt import _PROTOTYPES
from brim_cuda.nvrtc import find_nvrtc

__all__ = ["RESNET50", "asked", "why_not"]

_DRIVER = """
cuCtxGetCurrent cuCtxGetDevice cuCtxGetLimit cuCtxPopCurrent cuCtxPushCurrent cuDeviceGet cuDeviceGetAttribute
cuDeviceGetCount cuDevicePrimaryCtxRelease cuDevicePrimaryCtxReset cuDevicePrimaryCtxRetain cuFuncGetAttribute
cuFuncSetAttribute cuGetErrorName cuGetErrorString cuGetProcAddress cuGetProcAddress_v2 cuInit cuKernelGetAttribute
cuKernelGetFunction cuKernelSetAttribute cuLaunchCooperativeKernel cuLaunchKernel cuLaunchKernelEx cuLibraryGetKernel
cuLibraryLoadData cuLibraryLoadFromFile cuLibraryUnload cuLinkAddData cuLinkAddData_v2 cuLinkAddFile_v2 cuLinkComplete
cuLinkCreate cuLinkCreate_v2 cuLinkDestroy cuMemcpyDtoH_v2 cuModuleGetFunction cuModuleGetGlobal_v2 cuModuleLoadData
cuModuleLoadDataEx cuModuleLoadFatBinary cuModuleUnload cuOccupancyMaxActiveBlocksPerMultiprocessor
cuOccupancyMaxPotentialClusterSize cuStreamGetCtx cuStreamGetGreenCtx cuStreamSynchronize cuTensorMapEncodeIm2col
cuTensorMapEncodeTiled
"""
_LOADING = {  # what a driver does with a compiled kernel
    "cuLibraryLoadData": "(void **made) { *made = (void *)64; return 0; }",
    "cuLibraryGetKernel": "(void **made) { *made = (void *)128; return 0; }",
    "cuKernelGetFunction": "(void **made) { *made = (void *)192; return 0; }",
    "cuKernelGetAttribute": "(int *value) { *value = 64; return 0; }",
    "cuKernelSetAttribute": "() { return 0; }",
    "cuFuncSetAttribute": "() { return 0; }",
    "cuLibraryUnload": "() { return 0; }",
}
_NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE
_BLAS = "".join(f"int {name}() {{ return 1; }}\n" for name in (*_PROTOTYPES, "cublasLtGetStatusName"))
_BLAS += "unsigned long cublasLtGetVersion() { return 120903; }\n"

# Channels in and out, size of the images, of the window, step, padding: every kind of convolution of a ResNet-50.
RESNET50 = (
    (3, 64, 224, 7, 2, 3), (64, 64, 56, 1, 1, 0), (64, 64, 56, 3, 1, 1), (64, 256, 56, 1, 1, 0), (256, 64, 56, 1, 1, 0),
    (256, 128, 56, 1, 1, 0), (128, 128, 56, 3, 2, 1), (256, 512, 56, 1, 2, 0), (128, 128, 28, 3, 1, 1),
    (256, 256, 28, 3, 2, 1), (1024, 256, 14, 1, 1, 0), (512, 512, 14, 3, 2, 1), (512, 512, 7, 3, 1, 1),
    (512, 2048, 7, 1, 1, 0),
)  # fmt: skip
BATCH = 8
PRECISIONS = {
    "bf16": ("bfloat16", False),
    "fp16": ("float16", False),
    "tf32": ("float32", True),
    "fp32": ("float32", False),
}
ATTENTIONS = ((2, 8, 1024, 64), (2, 4, 384, 128), (3, 128, 64))


def why_not() -> str:
    """What is missing, or ""."""
    if sys.platform != "linux":
        return "the stand-ins for the driver are made for Linux"
    if shutil.which("gcc") is None:
        return "needs gcc, which was not found"
    for module, package in (("cudnn", "nvidia-cudnn-frontend"), ("nvidia.cudnn", "nvidia-cudnn-cu12")):
        if _missing(module):
            return f"needs {package}, which is not installed"
    return "" if find_nvrtc() else "needs NVRTC, which was not found: pip install nvidia-cuda-nvrtc-cu12"


def _missing(module: str) -> bool:
    try:
        return find_spec(module) is None
    except ModuleNotFoundError:
        return True


def asked(what: str, folder: Path, *, loading: bool) -> Any:
    """What a process of its own says: one of the functions below.

    Arguments:
        folder: where the stand-ins are made.
        loading: whether the driver says that it loads kernels.
    """
    answers = dict.fromkeys(_DRIVER.split(), f"() {{ return {_NO_DEVICE}; }}") | (_LOADING if loading else {})
    text = "".join(f"int {name}{answer}\n" for name, answer in answers.items())
    text += "int cuDriverGetVersion(int *version) { *version = 13000; return 0; }\n"
    for name, source in (("libcuda.so.1", text), ("libcublasLt.so.12", _BLAS), ("libcublasLt.so", _BLAS)):
        (folder / "stub.c").write_text(source, encoding="utf-8")
        command = ["gcc", "-shared", "-fPIC", "-w", f"-Wl,-soname,{name}", "-o", str(folder / name)]
        subprocess.run([*command, str(folder / "stub.c")], check=True)
    paths = [str(folder), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
    environ = {**os.environ, "LD_LIBRARY_PATH": os.pathsep.join(paths), "PYTHONPATH": os.pathsep.join(sys.path)}
    environ.pop("BRIM_CUDNN", None)
    command = [sys.executable, __file__, what]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environ, timeout=240)
    if done.returncode:
        raise AssertionError(f"{what}: exit {done.returncode}\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


# ---- in the other process --------------------------------------------------------------------------------------------


def _library() -> Any:
    import cudnn

    from brim_cuda.dnn import Cudnn
    from brim_cuda.dnn_open import CARDS

    sm_version, properties = CARDS["h100-80gb"]
    described = cudnn.create_device_properties(json.dumps(properties))
    return Cudnn(cudnn, properties=described, sm_version=sm_version)


def _requests(precision: str, last: bool, epilogue: bool = False) -> Any:
    """(kind, sizes, request) of all convolutions of a ResNet-50."""
    from dataclasses import replace

    from brim.spec import DTYPES, Spec
    from brim_cuda.dnn import DnnTensor
    from brim_cuda.dnn_conv import conv_request

    name, tf32 = PRECISIONS[precision]
    dtype = DTYPES[name]

    def images(c: int, size: int) -> Spec:
        strides = (c * size * size, 1, size * c, c) if last else None
        return Spec((BATCH, c, size, size), dtype, strides)

    for sizes in RESNET50:
        c, o, size, window, step, around = sizes
        made = (size + 2 * around - window) // step + 1
        x, w, y = images(c, size), Spec((o, c, window, window), dtype), images(o, made)
        how = {"stride": (step, step), "padding": (around, around), "dilation": (1, 1), "groups": 1, "tf32": tf32}
        ways = {"conv2d": ([x, w], y), "conv2d_grad_input": ([y, w], x), "conv2d_grad_weight": ([y, x], w)}
        for op, (ins, out) in ways.items():
            if epilogue and op != "conv2d":
                continue
            request = conv_request(op, ins, [out], how)[0]
            if epilogue:
                bias = DnnTensor((1, o, 1, 1), (o, 1, o, o), dtype)
                request = replace(request, bias=bias, added=request.y, relu=True)
            yield op, sizes, request


def _planned(library: Any, request: Any) -> dict[str, Any]:
    from brim_cuda.dnn import DnnUnsupported

    try:
        plan = library.plan(request)
    except DnnUnsupported as error:
        return {"refused": str(error)}
    return {"engine": plan.engine, "workspace_bytes": plan.workspace_bytes}


def convolutions() -> Any:
    """Rows of (precision, channels last, op, sizes, plan)."""
    library, rows = _library(), []
    for precision in PRECISIONS:
        for last in (True, False):
            for op, sizes, request in _requests(precision, last):
                rows.append((precision, last, op, sizes, _planned(library, request)))
    return {"version": library.version(), "rows": rows}


def attention(names: tuple[str, ...] = ("bfloat16",), shapes: Any = ATTENTIONS[:1]) -> Any:
    """Rows of (dtype, op, shape, plan)."""
    from brim.spec import DTYPES, Spec
    from brim_cuda.dnn_attention import attention_request

    library, rows = _library(), []
    for name in names:
        for shape in shapes:
            q, logs = Spec(shape, DTYPES[name]), Spec(shape[:-1])
            ways = {"attention": ([q] * 3, [q, logs]), "attention_grad": ([*[q] * 5, logs], [q] * 3)}
            for op, (ins, outs) in ways.items():
                found = attention_request(op, ins, outs, causal=len(shape) == 4, scale=0.125)
                rows.append((name, op, shape, _planned(library, found[0])))
    return rows


def compiled() -> Any:
    """What the library compiles for the shape: attention as above; (precision, with residual, plan) of epilogues."""
    from dataclasses import replace

    library, rows = _library(), []
    for precision in PRECISIONS:
        for _, sizes, request in _requests(precision, True, epilogue=True):
            if sizes == RESNET50[2]:
                rows.append((precision, True, _planned(library, request)))
                rows.append((precision, False, _planned(library, replace(request, added=None))))
    return {"attention": [*attention(shapes=ATTENTIONS), *attention(("float16",))], "epilogues": rows}


def notes() -> Any:
    """Of a few plans, those of the notes that are forbidden to them which the library itself gives them."""
    import cudnn

    library, wide = _library(), cudnn.data_type.FLOAT
    found: dict[str, Any] = {"plans": 0, "carry": [], "excluded": 0}
    for precision in ("bf16", "tf32", "fp32"):
        for op, sizes, request in _requests(precision, True):
            if sizes not in (RESNET50[2], RESNET50[9]):
                continue
            plan = library.plan(request)
            found["plans"] += 1
            for note in request.forbidden_notes:
                graph = cudnn.pygraph(intermediate_data_type=wide, compute_data_type=wide, **library._device)
                request.build(cudnn, graph)
                graph.validate()
                graph.build_operation_graph()
                graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
                graph.select_numeric_notes([getattr(cudnn.numerical_note, note)])  # those without it are excluded
                for index in range(graph.get_execution_plan_count()):
                    try:
                        graph.build_plan_at_index(index)
                    except Exception:
                        continue
                    found["excluded"] += 1
                    if graph.get_plan_name_at_index(index) == plan.engine:
                        found["carry"].append((precision, op, sizes, note))
    return found


def step() -> Any:
    """A small training step in bfloat16 for the profile of an H100: kinds of kernels, scratch, what is said."""
    import brim
    from brim import nn, optim
    from brim.nn import functional as F
    from brim.program.compile import plan, spec
    from brim.program.profiles import library_status
    from brim_cuda.launch import DnnCall
    from brim_cuda.steps import Steps

    model = nn.Sequential(
        nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False), nn.BatchNorm2d(64), nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(),
    )  # fmt: skip
    head = nn.Linear(64, 10)
    optimizer = optim.SGD([*model.parameters(), *head.parameters()], lr=0.1)

    def run(x: Any, y: Any) -> Any:
        with brim.autocast("bfloat16"):
            loss = F.cross_entropy(head(model(x).mean(axis=(2, 3))).astype("float32"), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    made = plan(run, spec((8, 3, 64, 64), "float32"), spec((8,), "int64"), device_profile="h100-80gb")
    kernels = made.programs[0].prepared.kernels
    by_dnn = [
        (kernel.scratch_bytes, [s.plan.workspace_bytes for s in steps.steps if isinstance(s, DnnCall)])
        for kernel in kernels
        if isinstance(steps := getattr(kernel.run, "__self__", None), Steps)
    ]
    return {"status": library_status("h100-80gb"), "by_dnn": [row for row in by_dnn if row[1]]}


if __name__ == "__main__":
    print(json.dumps({f.__name__: f for f in (convolutions, attention, compiled, notes, step)}[sys.argv[1]]()))
