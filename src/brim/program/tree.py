"""Nested results and arguments: tuples, lists and dicts of tensors and other things, taken apart and put together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

__all__ = ["rebuild", "take_apart"]


def take_apart(structure: Any, is_leaf: Callable[[Any], bool]) -> tuple[list[Any], Any]:
    """The leaves of a nested structure in order, and a key of everything else.

    Arguments:
        structure: tuples, lists and dicts around leaves and other objects.
        is_leaf: says what a leaf is.

    Returns:
        The leaves, and a hashable key of the rest: two structures with equal keys differ in their leaves only.
    """
    leaves: list[Any] = []
    return leaves, _key(structure, is_leaf, leaves)


def _key(node: Any, is_leaf: Callable[[Any], bool], leaves: list[Any]) -> Any:
    # Functions of the module, not closures: one that calls itself is a cycle, and would keep the leaves alive.
    if is_leaf(node):
        leaves.append(node)
        return ("leaf",)
    if isinstance(node, tuple | list):
        return (type(node), *[_key(part, is_leaf, leaves) for part in node])
    if isinstance(node, dict):
        return (dict, *[(key, _key(value, is_leaf, leaves)) for key, value in node.items()])
    if type(node) is float:  # 0.0 equals -0.0, and NaN not even itself
        return ("object", float, node.hex())
    try:
        hash(node)
    except TypeError:
        return ("object", type(node), id(node))
    return ("object", type(node), node)


def rebuild(structure: Any, is_leaf: Callable[[Any], bool], leaves: list[Any]) -> Any:
    """The same structure with other leaves, taken from the list in order."""
    return _filled(structure, is_leaf, iter(leaves))


def _filled(node: Any, is_leaf: Callable[[Any], bool], leaves: Iterator[Any]) -> Any:
    if is_leaf(node):
        return next(leaves)
    if isinstance(node, tuple):
        parts = [_filled(part, is_leaf, leaves) for part in node]
        return type(node)(*parts) if hasattr(node, "_fields") else tuple(parts)
    if isinstance(node, list):
        return [_filled(part, is_leaf, leaves) for part in node]
    if isinstance(node, dict):
        return {key: _filled(value, is_leaf, leaves) for key, value in node.items()}
    return node
