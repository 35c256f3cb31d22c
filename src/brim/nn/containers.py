"""Sequential, ModuleList, ModuleDict: modules that hold modules."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from brim.context import modes
from brim.nn.module import Module

__all__ = ["ModuleDict", "ModuleList", "Sequential"]


class _Numbered(Module):
    """Modules under the names "0", "1", ..."""

    def _at(self, index: Any) -> str:
        position = operator.index(index)
        if not -len(self) <= position < len(self):
            raise IndexError(f"{type(self).__name__} has {len(self)} modules, index {position} is out of range")
        return list(self._modules)[position]

    def __len__(self) -> int:
        return len(self._modules)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._modules.values())

    def __setitem__(self, index: int, module: Module) -> None:
        self._modules[self._at(index)] = _checked(module)
        modes.changes += 1

    def __delitem__(self, index: int) -> None:
        del self._modules[self._at(index)]
        kept = list(self._modules.values())
        modes.changes += 1
        self._modules.clear()
        self._modules.update({str(i): module for i, module in enumerate(kept)})

    def append(self, module: Module) -> Any:
        """Add a module at the end; returns the container."""
        self.register_module(str(len(self)), _checked(module))
        return self

    def extend(self, modules: Iterable[Module]) -> Any:
        """Add modules at the end; returns the container."""
        for module in modules:
            self.append(module)
        return self


def _checked(module: Any) -> Module:
    if not isinstance(module, Module):
        raise TypeError(f"a container of modules takes nn.Module, got {type(module).__name__}")
    return module


class Sequential(_Numbered):
    """Modules called one after another, each on the result of the one before.

    ``Sequential(a, b)`` names them "0" and "1"; ``Sequential({"first": a})`` takes names from a mapping.
    """

    def __init__(self, *modules: Any) -> None:
        super().__init__()
        named: Mapping[str, Module]
        if len(modules) == 1 and isinstance(modules[0], Mapping):
            named = modules[0]
        else:
            named = {str(i): module for i, module in enumerate(modules)}
        for name, module in named.items():
            self.register_module(name, _checked(module))

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return type(self)(dict(list(self._modules.items())[index]))
        return self._modules[self._at(index)]

    def forward(self, x: Any) -> Any:
        for module in self:
            x = module(x)
        return x


class ModuleList(_Numbered):
    """A list of modules that are registered; call them yourself."""

    def __init__(self, modules: Iterable[Module] = ()) -> None:
        super().__init__()
        self.extend(modules)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return type(self)(list(self)[index])
        return self._modules[self._at(index)]

    def insert(self, index: int, module: Module) -> None:
        """Put a module before position ``index``."""
        kept = list(self)
        kept.insert(index, _checked(module))
        modes.changes += 1
        self._modules.clear()
        self._modules.update({str(i): one for i, one in enumerate(kept)})


class ModuleDict(Module):
    """A dict of modules that are registered, in order of insertion."""

    def __init__(self, modules: Mapping[str, Module] | Iterable[tuple[str, Module]] = ()) -> None:
        super().__init__()
        self.update(modules)

    def __getitem__(self, name: str) -> Any:
        return self._modules[name]

    def __setitem__(self, name: str, module: Module) -> None:
        self.register_module(name, _checked(module))

    def __delitem__(self, name: str) -> None:
        del self._modules[name]
        modes.changes += 1

    def __len__(self) -> int:
        return len(self._modules)

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __contains__(self, name: object) -> bool:
        return name in self._modules

    def update(self, modules: Mapping[str, Module] | Iterable[tuple[str, Module]]) -> None:
        """Add or replace modules."""
        for name, module in dict(modules).items():
            self[name] = module

    def keys(self) -> Any:
        """The names."""
        return self._modules.keys()

    def values(self) -> Any:
        """The modules."""
        return self._modules.values()

    def items(self) -> Any:
        """(name, module) pairs."""
        return self._modules.items()
