"""brim: an array and deep-learning framework whose training steps are planned before they run.

``import brim`` loads NumPy and nothing heavier; devices, data readers and the command line load when used.
"""

from brim import errors, eager as _eager, ops, random
from brim.accounting import budget, empty_cache, memory_report, memory_stats, reset_peak_memory, set_budget
from brim.autograd import backward, enable_grad, grad, no_grad
from brim.device import Device, default_device, device, set_default_device
from brim.errors import BudgetExceeded
from brim.ops import *  # noqa: F403  (every array function under its Array API name)
from brim.random import manual_seed
from brim.spec import DTYPES, Spec
from brim.tensor import Tensor, asarray, empty, from_dlpack

__version__ = "0.1.0"

bool = DTYPES["bool"]
int8, int16, int32, int64 = (DTYPES[f"int{bits}"] for bits in (8, 16, 32, 64))
uint8, uint16, uint32, uint64 = (DTYPES[f"uint{bits}"] for bits in (8, 16, 32, 64))
float16, bfloat16, float32, float64 = (DTYPES[name] for name in ("float16", "bfloat16", "float32", "float64"))
complex64, complex128 = DTYPES["complex64"], DTYPES["complex128"]
