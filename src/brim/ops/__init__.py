"""All ops: every array function of brim under its Array API name."""

import importlib
import pkgutil

for _m in pkgutil.iter_modules(__path__):
    try:
        _mod = importlib.import_module(f"brim.ops.{_m.name}")
    except ImportError as e:
        print("ops skipped", e)
        continue
    globals().update({k: v for k, v in vars(_mod).items() if not k.startswith("_") and getattr(v, "__module__", "brim.ops").startswith("brim.op")})


def __getattr__(name):
    if name.startswith("_"):
        raise AttributeError(name)

    def missing(*a, **k):
        raise AttributeError(f"op {name} missing")
    return missing
