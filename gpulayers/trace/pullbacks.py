"""Gradients of a composition inside a gradient rule: by a tape of its own, or in the graph that is being recorded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from gpulayers import ops
from gpulayers.ops.operation import set_differentiator
from gpulayers.trace.gradients import UnconnectedGradients
from gpulayers.trace.graph import active_graph
from gpulayers.trace.session import gradients
from gpulayers.trace.tape import GradientTape
from gpulayers.trace.tensor import GraphTensor, RecordedTensor

__all__ = ["differentiate"]


def differentiate(
    function: Callable[..., Sequence[Any]], inputs: Sequence[Any], cotangents: Sequence[Any]
) -> list[Any]:
    """Return the gradients of ``function(*inputs)`` by its inputs; see `gpulayers.ops.operation.pullback`."""
    if active_graph() is not None or any(isinstance(v, GraphTensor) for v in (*inputs, *cotangents)):
        # Copies: a gradient by an input must not run through another input that depends on it.
        fresh = [ops.identity(value) for value in inputs]
        outputs = function(*fresh)
        arrived = [(y, g) for y, g in zip(outputs, cotangents, strict=True) if g is not None]
        targets, given = [y for y, _ in arrived], [g for _, g in arrived]
        return list(gradients(targets, fresh, given, UnconnectedGradients.ZERO))
    with GradientTape(watch_accessed_variables=False) as tape:
        fresh = [tape.watch(_copy(value)) for value in inputs]
        outputs = function(*fresh)
    arrived = [(y, g) for y, g in zip(outputs, cotangents, strict=True) if g is not None and tape.follows(y)]
    if not arrived:
        return [ops.zeros_like(value) for value in inputs]
    targets, given = [y for y, _ in arrived], [g for _, g in arrived]
    return list(tape.gradient(targets, fresh, given, UnconnectedGradients.ZERO))


def _copy(value: Any) -> RecordedTensor:
    """Return a tensor of its own for a value: the same array may be given for two inputs."""
    copied = ops.identity(value) if isinstance(value, RecordedTensor) else value
    return copied if isinstance(copied, RecordedTensor) else RecordedTensor(copied)


set_differentiator(differentiate)
