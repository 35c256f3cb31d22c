"""Files on disk: arrays as safetensors, JSON, JSON lines, and the checkpoints of a run; atomic, checked, never pickled.

Works on NumPy arrays and plain Python values; callers convert Tensors. Knows nothing of models, training or devices.
"""

from brim.io.arrays import load_arrays, save_arrays, verify_arrays
from brim.io.atomic import atomic_write
from brim.io.checkpoint import (
    Checkpoint,
    check_compatible,
    latest_checkpoint,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
)
from brim.io.json_files import append_jsonl, read_json, read_jsonl, truncate_jsonl, write_json

__all__ = [
    "Checkpoint",
    "append_jsonl",
    "atomic_write",
    "check_compatible",
    "latest_checkpoint",
    "list_checkpoints",
    "load_arrays",
    "load_checkpoint",
    "read_json",
    "read_jsonl",
    "save_arrays",
    "save_checkpoint",
    "truncate_jsonl",
    "verify_arrays",
    "write_json",
]
