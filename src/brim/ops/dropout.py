"""Dropout whose mask is a pure function of (seed, counter), so that it is drawn again in the gradient, never stored."""

from __future__ import annotations

from typing import Any

from brim.op import Op, float_only, primitive
from brim.spec import Scalar, Spec

__all__ = ["dropout"]


def _spec(x: Spec, seed: Spec | Scalar, counter: Spec | Scalar, *, p: float) -> Spec:
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"dropout probability must be in [0, 1], got {p}")
    return Spec(x.shape, float_only("dropout", x.dtype))


_dropout: Op = primitive(
    "dropout",
    _spec,
    vjp=lambda g, _x, seed, counter, _out, *, p: (_dropout(g, seed, counter, p=p), None, None),
    arity=3,
    doc="zero with probability p, else x / (1 - p); the mask is drawn from (seed, counter)",
)


def dropout(x: Any, seed: Any, counter: Any, *, p: float) -> Any:
    """Each element is zero with probability ``p``, else ``x / (1 - p)``.

    Element number i (row-major) is kept where the i-th uniform float32 of the stream ``Philox(counter=[0, 0, counter,
    0], key=[seed, 0])`` is at least ``p``. The stream is that of J. K. Salmon et al., "Parallel random numbers: as
    easy as 1, 2, 3", SC 2011, in NumPy's 4x64 form.

    Arguments:
        x: any shape, float.
        seed, counter: ints that name the draw; ``brim.random.next_counter()`` gives the next one.
        p: probability of zero, in [0, 1].
    """
    return _dropout(x, seed, counter, p=float(p))
