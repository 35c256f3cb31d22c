"""Where a number that is not finite came from: the first layer whose output has one."""

from __future__ import annotations

from typing import Any

import numpy as np

from brim.autograd import no_grad
from brim.tensor import Tensor

__all__ = ["all_finite", "first_non_finite"]


def all_finite(x: Any) -> bool:
    """Whether a tensor has neither NaN nor infinity."""
    host = x.detach().numpy()
    return bool(np.isfinite(host.astype(np.float32) if host.dtype.kind == "V" else host).all())


def first_non_finite(model: Any, inputs: Any) -> str:
    """A sentence that names the parameter, or the first layer whose output, is not finite for these inputs."""
    if not all_finite(inputs):
        return "the inputs of the batch are not finite already"
    for name, param in model.named_parameters():
        if not all_finite(param):
            return f"parameter {name} is not finite: the step before was too large"
    found: list[str] = []

    def watched(path: str, module: Any, forward: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            if not found and isinstance(output, Tensor) and not all_finite(output):
                found.append(f"the first output that is not finite is that of layer {path} ({type(module).__name__})")
            return output

        return run

    leaves = [(path, m) for path, m in model.named_modules() if path and not any(True for _ in m.children())]
    for path, module in leaves:
        object.__setattr__(module, "forward", watched(path, module, module.forward))
    try:
        with no_grad():
            model(inputs)
    finally:
        for _, module in leaves:
            object.__delattr__(module, "forward")
    return found[0] if found else "every layer's output is finite; the loss itself is not"
