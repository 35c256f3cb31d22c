"""GradScaler: dynamic loss scaling, so that small gradients survive float16. All of it happens on the device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from brim import ops
from brim.autocast import suspended
from brim.autograd import no_grad
from brim.context import baked, host_scalars, layer_scope, phase_scope
from brim.creation import full
from brim.errors import DTypeError
from brim.ops.together import all_finite
from brim.optim.optimizer import Optimizer, check_range, layer_of
from brim.tensor import Tensor

__all__ = ["GradScaler"]


class GradScaler:
    """Multiplies the loss so that its gradients fit float16, divides them again, and skips steps that overflowed.

    After a step whose gradients are all finite, the scale grows by ``growth_factor`` once in ``growth_interval`` such
    steps in a row; after any other it shrinks by ``backoff_factor``, and parameters and the optimizer's state stay as
    they were, to the bit. Nothing is read back: a planned step contains all of it. ::

        with brim.autocast("float16"):
            loss = loss_of(model(x), y)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)  # only to clip
        optim.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    Source: P. Micikevicius et al., "Mixed precision training", ICLR 2018, section 3.2; names and defaults are those of
    ``torch.amp.GradScaler``.

    Arguments:
        init_scale: first scale.
        growth_factor: at least 1.
        backoff_factor: above 0 and below 1.
        growth_interval: finite steps in a row before the scale grows.
        enabled: False makes ``scale`` and ``unscale_`` do nothing, and ``step`` the optimizer's own.
        device: of the parameters; the default device when None.

    Raises:
        ValueError: a setting out of range.
    """

    def __init__(
        self,
        init_scale: float = 2.0**16,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
        enabled: bool = True,
        device: Any = None,
    ) -> None:
        self.growth_factor, self.backoff_factor = growth_factor, backoff_factor
        self.growth_interval, self.enabled = growth_interval, enabled
        self._check(init_scale)
        self._scale: Tensor = full((), float(init_scale), dtype="float32", device=device).book_as("optimizer")
        self._good_steps: Tensor = full((), 0, dtype="int32", device=device).book_as("optimizer")
        self._finite: dict[int, Tensor] = {}  # optimizers with unscaled gradients -> whether all of these are finite

    def _check(self, scale: float) -> None:
        check_range("growth_factor", self.growth_factor, 1.0)
        check_range("backoff_factor", self.backoff_factor, 0.0, 1.0)
        check_range("growth_interval", self.growth_interval, 1)
        if not 0.0 < scale < float("inf") or self.backoff_factor == 0.0:
            raise ValueError(f"expected a scale and a backoff_factor above 0, got {scale!r}, {self.backoff_factor!r}")

    def _is_on(self) -> bool:
        return bool(baked(lambda: self.enabled))

    def scale(self, loss: Tensor) -> Tensor:
        """``loss * scale``, in float32 for a loss of half width: what to call ``backward()`` on."""
        return loss * self._scale if self._is_on() else loss

    def unscale_(self, optimizer: Optimizer) -> None:
        """Divide the gradients of an optimizer's parameters by the scale, and note on the device if all are finite.

        Raises:
            RuntimeError: they are unscaled already, or there are none.
            DTypeError: gradients of half width, because the parameters are; keep these in float32.
        """
        if not self._is_on():
            return
        if id(optimizer) in self._finite:
            raise RuntimeError("these gradients are unscaled already; call update() after each step")
        grads = []
        with no_grad(), suspended(), phase_scope("update"):
            inverse = 1.0 / self._scale
            for p in (p for group in optimizer.param_groups for p in group["params"]):
                if (grad := p.grad) is None:
                    continue
                if grad.dtype.itemsize < 4:
                    raise DTypeError(
                        f"a gradient is {grad.dtype}: loss scaling is for float32 parameters, which autocast casts; "
                        "make the model with dtype='float32'"
                    )
                grads.append(grad)
                with layer_scope(layer_of(p)):
                    p.grad = (grad * inverse.astype(grad.dtype)).book_as("grads")
            if not grads:
                raise RuntimeError("the optimizer's parameters have no gradients; call scale(loss).backward() first")
            # Of what they were, times the same factor: the products themselves need not be stored for it.
            self._finite[id(optimizer)] = all_finite(inverse, *grads)

    def step(self, optimizer: Optimizer) -> None:
        """The optimizer's step, with gradients unscaled here or before, without effect where one is not finite.

        Raises:
            TypeError: the optimizer cannot skip steps (``Optimizer.can_skip``).
        """
        if not self._is_on():
            optimizer.step()
            return
        if id(optimizer) not in self._finite:
            self.unscale_(optimizer)
        optimizer.step(self._finite[id(optimizer)])

    def update(self) -> None:
        """Adapt the scale, after the step of each optimizer. Raises RuntimeError if there was none."""
        if not self._is_on():
            return
        if not self._finite:
            raise RuntimeError("nothing was unscaled since the last update(); call step(optimizer) first")
        found, self._finite = list(self._finite.values()), {}
        with no_grad(), suspended(), phase_scope("update"):
            finite = found[0]
            for other in found[1:]:
                finite = ops.logical_and(finite, other)

            def settings() -> tuple[float, float, int]:
                return float(self.growth_factor), float(self.backoff_factor), int(self.growth_interval)

            growth, backoff, interval = host_scalars(settings, (float, float, int))
            scale, good = self._scale, self._good_steps + 1
            grown = scale * growth
            due = good >= interval
            larger = ops.where(ops.logical_and(due, ops.isfinite(grown)), grown, scale)
            self._scale.write(ops.where(finite, larger, scale * backoff))
            self._good_steps.write(ops.where(ops.logical_and(finite, ops.logical_not(due)), good, 0))

    def get_scale(self) -> float:
        """The scale, read from the device; 1 where scaling is off."""
        return float(self._scale.item()) if self.enabled else 1.0

    def state_dict(self) -> dict[str, Any]:
        """Plain values, under PyTorch's names; empty where scaling is off."""
        if not self.enabled:
            return {}
        return {
            "scale": self.get_scale(),
            "growth_factor": self.growth_factor,
            "backoff_factor": self.backoff_factor,
            "growth_interval": self.growth_interval,
            "_growth_tracker": int(self._good_steps.item()),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue where ``state_dict`` was taken; a planned step goes on with it. Raises ValueError if it is empty."""
        if not self.enabled:
            return
        if not state_dict:
            raise ValueError("the state is of a GradScaler with enabled=False; there is no scale to continue with")
        self.growth_factor, self.backoff_factor = state_dict["growth_factor"], state_dict["backoff_factor"]
        self.growth_interval = state_dict["growth_interval"]
        self._check(state_dict["scale"])
        self._scale.write(float(state_dict["scale"]))
        self._good_steps.write(int(state_dict["_growth_tracker"]))

    def __repr__(self) -> str:
        return (
            f"GradScaler(growth_factor={self.growth_factor}, backoff_factor={self.backoff_factor}, "
            f"growth_interval={self.growth_interval}, enabled={self.enabled})"
        )
