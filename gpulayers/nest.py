"""Nested structures: lists, tuples, named tuples and dictionaries (in key order) with anything else as leaves.

Source: ``tf.nest``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from gpulayers.errors import StructureError, message

__all__ = ["assert_same_structure", "flatten", "is_nested", "map_structure", "pack_sequence_as"]


def is_nested(value: Any) -> bool:
    """Say whether `value` is a container.

    >>> is_nested([1]), is_nested("ab")
    (True, False)
    """
    return isinstance(value, list | tuple | Mapping)


def flatten(structure: Any) -> list[Any]:
    """Return the leaves, left to right; dictionaries in the order of their sorted keys.

    >>> flatten({"b": 1, "a": [2, (3,)]})
    [2, 3, 1]
    """
    if not is_nested(structure):
        return [structure]
    return list(_leaves(structure))


def _children(structure: Any) -> list[Any]:
    return [structure[key] for key in _keys(structure)] if isinstance(structure, Mapping) else list(structure)


def _keys(mapping: Mapping[Any, Any]) -> list[Any]:
    try:
        return sorted(mapping)
    except TypeError:  # keys of several types have no order: the insertion order serves
        return list(mapping)


def _leaves(structure: Any) -> Iterator[Any]:
    for child in _children(structure):
        if is_nested(child):
            yield from _leaves(child)
        else:
            yield child


def _rebuild(like: Any, children: list[Any]) -> Any:
    if isinstance(like, Mapping):
        values = dict(zip(_keys(like), children, strict=True))
        ordered = {key: values[key] for key in like}
        return ordered if type(like) is dict else type(like)(ordered)  # type: ignore[call-arg]
    if isinstance(like, tuple) and hasattr(like, "_fields"):
        return type(like)(*children)
    return type(like)(children)


def map_structure(function: Callable[..., Any], structure: Any, *others: Any) -> Any:
    """Return the structure with `function` applied to each leaf (and the leaves of `others` beside it).

    Raises TypeError or ValueError if the structures differ.

    >>> map_structure(lambda a, b: a + b, {"x": 1}, {"x": 10})
    {'x': 11}
    """
    if not is_nested(structure) and not others:
        return function(structure)
    for other in others:
        assert_same_structure(structure, other)
    return _map(function, structure, others)


def _map(function: Callable[..., Any], structure: Any, others: tuple[Any, ...]) -> Any:
    if not is_nested(structure):
        return function(structure, *others)
    columns = [_children(structure), *(_children(other) for other in others)]
    return _rebuild(structure, [_map(function, row[0], row[1:]) for row in zip(*columns, strict=True)])


def pack_sequence_as(structure: Any, leaves: Any) -> Any:
    """Return `structure` with its leaves replaced by those of the flat sequence. Raises ValueError if too few or many.

    >>> pack_sequence_as({"a": 0, "b": (0, 0)}, [1, 2, 3])
    {'a': 1, 'b': (2, 3)}
    """
    leaves = list(leaves)
    if not is_nested(structure):
        if len(leaves) != 1:
            raise StructureError(message("nest", "the structure is one leaf", 1, len(leaves)))
        return leaves[0]
    count = len(flatten(structure))
    if len(leaves) != count:
        raise StructureError(message("nest", "the number of leaves differs", count, len(leaves)))
    remaining = iter(leaves)

    def build(part: Any) -> Any:
        return _rebuild(part, [build(c) for c in _children(part)]) if is_nested(part) else next(remaining)

    return build(structure)


def assert_same_structure(a: Any, b: Any, check_types: bool = True) -> None:
    """Raise ValueError if the nesting differs, TypeError if only the types of containers do.

    >>> assert_same_structure([1, 2], [3, 4])
    """
    if is_nested(a) != is_nested(b):
        raise StructureError(
            message("nest", "one side is nested and the other a single value", _outline(a), _outline(b))
        )
    if not is_nested(a):
        return
    if isinstance(a, Mapping) != isinstance(b, Mapping) or (
        check_types and type(a) is not type(b) and not (isinstance(a, Mapping) and isinstance(b, Mapping))
    ):
        raise TypeError(message("nest", "the containers differ", type(a).__name__, type(b).__name__))
    if isinstance(a, Mapping) and set(a) != set(b):
        raise StructureError(message("nest", "the keys differ", _keys(a), _keys(b)))
    if len(a) != len(b):
        raise StructureError(message("nest", "the lengths differ", len(a), len(b)))
    for left, right in zip(_children(a), _children(b), strict=True):
        assert_same_structure(left, right, check_types)


def _outline(value: Any) -> str:
    return type(value).__name__ if is_nested(value) else "a single value"
