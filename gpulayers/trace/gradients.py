"""Reverse accumulation, the same for tapes and graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from gpulayers.dtypes import is_floating
from gpulayers.errors import GradientError, message
from gpulayers.ops.operation import GradientContext, Operation, match

__all__ = ["Record", "UnconnectedGradients", "backpropagate"]


class UnconnectedGradients:
    """What `gradient` gives for a source that the target does not depend on: None, or zeros."""

    NONE = "none"
    ZERO = "zero"


class Record(Protocol):
    """One recorded call: a node of a graph or an entry of a tape."""

    operation: Operation
    inputs: tuple[Any, ...]
    outputs: tuple[Any, ...]
    attributes: dict[str, Any]


def backpropagate(
    records: Sequence[Record],
    cotangents: dict[int, Any],
    sources: set[int],
    view: Callable[[Any], tuple[Sequence[Any], Sequence[Any]]] = lambda record: (record.inputs, record.outputs),
) -> dict[int, Any]:
    """Return cotangents by the identity of tensors, given those of the targets.

    `records` in the order they were made; `cotangents` maps ``id(tensor)`` to its cotangent, and is extended;
    `sources` holds the identities of the tensors wanted: only records between them and the targets are visited.
    `view` gives the inputs and outputs to show a gradient rule.
    """
    on_path = set(sources)
    for record in records:
        if record.operation.gradient is not None and any(id(value) in on_path for value in record.inputs):
            on_path.update(id(output) for output in record.outputs)
    for record in reversed(records):
        arrived = [cotangents.get(id(output)) for output in record.outputs]
        needs = [id(value) in on_path and _differentiable(value) for value in record.inputs]
        if not any(needs) or all(one is None for one in arrived) or record.operation.gradient is None:
            continue
        for output in record.outputs:
            if id(output) not in sources:
                cotangents.pop(id(output), None)
        context = GradientContext(*view(record), record.attributes, needs)
        gradients = record.operation.backward(context, arrived)
        if len(gradients) < len(needs):
            raise GradientError(
                message(record.operation.name, "its gradient rule is short", f"{len(needs)} gradients", len(gradients))
            )
        for value, needed, gradient in zip(record.inputs, needs, gradients, strict=False):
            if needed and gradient is not None:
                held = cotangents.get(id(value))
                cotangents[id(value)] = gradient if held is None else held + gradient
    return cotangents


def _differentiable(value: Any) -> bool:
    dtype = getattr(value, "dtype", None)
    return dtype is not None and is_floating(dtype)


def seed(target: Any, given: Any, ones_like: Callable[[Any], Any]) -> Any:
    """Return the cotangent a target starts with: the one given, in the target's shape and dtype, or ones."""
    if given is None:
        return ones_like(target)
    if tuple(getattr(given, "shape", ())) != tuple(target.shape) and None not in tuple(target.shape):
        raise GradientError(
            message("gradient", "output_gradients has another shape", tuple(target.shape), getattr(given, "shape", ()))
        )
    return match(given, target)
