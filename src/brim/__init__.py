"""brim: an array and deep-learning framework whose training steps are planned before they run.

``import brim`` loads NumPy and nothing heavier; devices, data readers and the command line load when used.
"""

from brim import eager as eager
from brim import errors as errors
from brim import ops as ops
from brim import random as random
from brim.accounting import (
    budget as budget,
)
from brim.accounting import (
    empty_cache as empty_cache,
)
from brim.accounting import (
    memory_report as memory_report,
)
from brim.accounting import (
    memory_stats as memory_stats,
)
from brim.accounting import (
    reset_peak_memory as reset_peak_memory,
)
from brim.accounting import (
    set_budget as set_budget,
)
from brim.autocast import autocast as autocast
from brim.autograd import backward as backward
from brim.autograd import enable_grad as enable_grad
from brim.autograd import grad as grad
from brim.autograd import no_grad as no_grad
from brim.creation import *  # noqa: F403
from brim.device import Device as Device
from brim.device import default_device as default_device
from brim.device import device as device
from brim.device import meta as meta
from brim.device import set_default_device as set_default_device
from brim.errors import BudgetExceeded as BudgetExceeded
from brim.errors import TraceError as TraceError
from brim.ops import *  # noqa: F403
from brim.precision import conv_precision as conv_precision
from brim.precision import float32_precision as float32_precision
from brim.precision import set_conv_precision as set_conv_precision
from brim.precision import set_float32_precision as set_float32_precision
from brim.program.audit import audit as audit
from brim.program.check import assert_fits as assert_fits
from brim.program.compile import compile as compile
from brim.program.compile import plan as plan
from brim.program.compile import spec as spec
from brim.program.plan import Plan as Plan
from brim.random import manual_seed as manual_seed
from brim.spec import DTYPES
from brim.spec import Spec as Spec
from brim.tensor import Tensor as Tensor
from brim.tensor import asarray as asarray
from brim.tensor import from_dlpack as from_dlpack
from brim.threads import get_threads as get_threads
from brim.threads import set_threads as set_threads
from brim.train import Trainer as Trainer

__version__ = "0.1.0"

bool = DTYPES["bool"]
int8, int16, int32, int64 = (DTYPES[f"int{bits}"] for bits in (8, 16, 32, 64))
uint8, uint16, uint32, uint64 = (DTYPES[f"uint{bits}"] for bits in (8, 16, 32, 64))
float16, bfloat16, float32, float64 = (DTYPES[name] for name in ("float16", "bfloat16", "float32", "float64"))
complex64, complex128 = DTYPES["complex64"], DTYPES["complex128"]
