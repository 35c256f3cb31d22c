"""BatchNorm1d and BatchNorm2d."""

from __future__ import annotations

from typing import Any

from brim import ops
from brim.autograd import no_grad
from brim.context import baked, host_scalar
from brim.errors import ShapeError
from brim.nn import init
from brim.nn.linear import new_parameter
from brim.nn.module import Module
from brim.spec import default_float
from brim.tensor import empty

__all__ = ["BatchNorm1d", "BatchNorm2d"]


class _BatchNorm(Module):
    """Zero mean and unit variance per channel over the batch, then ``* weight + bias``.

    Training uses the batch's mean and biased variance and updates the running ones (variance unbiased); evaluation
    uses the running ones.

    Arguments:
        num_features: number of channels C, the second axis.
        eps: added to the variance.
        momentum: share of the new batch in the running statistics; None for the plain average over all batches.
        affine: learn weight and bias.
        track_running_stats: False uses the batch's statistics in evaluation too.
    """

    axes: tuple[int, ...] = ()
    expects = ""

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.num_features, self.eps, self.momentum = num_features, eps, momentum
        self.affine, self.track_running_stats = affine, track_running_stats
        kind = default_float if dtype is None else dtype
        self.register_parameter("weight", new_parameter((num_features,), device, kind) if affine else None)
        self.register_parameter("bias", new_parameter((num_features,), device, kind) if affine else None)
        stats = track_running_stats
        self.register_buffer("running_mean", empty(num_features, dtype=kind, device=device) if stats else None)
        self.register_buffer("running_var", empty(num_features, dtype=kind, device=device) if stats else None)
        self.register_buffer("num_batches_tracked", empty((), dtype="int64", device=device) if stats else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """weight 1, bias 0, running mean 0, running variance 1, no batches."""
        if self.affine:
            init.ones_(self.weight)
            init.zeros_(self.bias)
        if self.track_running_stats:
            init.zeros_(self.running_mean)
            init.ones_(self.running_var)
            init.constant_(self.num_batches_tracked, 0)

    def forward(self, x: Any) -> Any:
        if x.ndim not in self.axes or x.shape[1] != self.num_features:
            raise ShapeError(
                f"{type(self).__name__}({self.num_features}) needs input {self.expects} "
                f"with C = {self.num_features}, got shape {x.shape}"
            )
        if not self.training and self.track_running_stats:
            return ops.batch_norm_inference(
                x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
            )
        out, mean, var = ops.batch_norm(x, self.weight, self.bias, eps=self.eps)
        if self.training and self.track_running_stats:
            self._track(mean, var, x.size // self.num_features)
        return out

    def _track(self, mean: Any, var: Any, count: int) -> None:
        with no_grad():
            seen, shape = self.num_batches_tracked, (self.num_features,)
            average = baked(lambda: self.momentum is None)
            seen.write(seen + 1)
            share: Any = 1.0 / seen.astype("float32") if average else host_scalar(lambda: float(self.momentum or 0.0))
            for running, new in (
                (self.running_mean, mean.detach().reshape(shape)),
                (self.running_var, var.detach().reshape(shape) * (count / (count - 1))),
            ):
                running.write(running * (1.0 - share) + new * share)

    def extra_repr(self) -> str:
        return (
            f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={self.affine}, "
            f"track_running_stats={self.track_running_stats}"
        )


class BatchNorm1d(_BatchNorm):
    __doc__ = f"Input (N, C) or (N, C, L). {_BatchNorm.__doc__}"
    axes, expects = (2, 3), "(N, C) or (N, C, L)"


class BatchNorm2d(_BatchNorm):
    __doc__ = f"Input (N, C, H, W). {_BatchNorm.__doc__}"
    axes, expects = (4,), "(N, C, H, W)"
