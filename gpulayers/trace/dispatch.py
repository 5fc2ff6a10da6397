"""Where a call of an operation goes: into a graph, onto tapes, or straight to its forward."""

from __future__ import annotations

from typing import Any

from gpulayers.ops.operation import Operation, set_dispatcher
from gpulayers.trace.graph import active_graph
from gpulayers.trace.stored import StoredValue
from gpulayers.trace.tape import active_tapes, record_on_tapes
from gpulayers.trace.tensor import GraphTensor, RecordedTensor

__all__ = ["as_value", "dispatch"]


def dispatch(operation: Operation, inputs: tuple[Any, ...], attributes: dict[str, Any]) -> Any:
    """Record or run one call."""
    for value in inputs:
        if isinstance(value, GraphTensor):
            return (active_graph() or value.graph).record(operation, inputs, attributes)
    graph = active_graph()
    if graph is not None:
        return graph.record(operation, inputs, attributes)
    tapes = active_tapes()
    if tapes:
        return record_on_tapes(tapes, operation, inputs, attributes)
    return operation.run([as_value(value) for value in inputs], attributes)


def as_value(value: Any) -> Any:
    """Return the array of a recorded tensor or variable; anything else as it is."""
    if isinstance(value, RecordedTensor):
        return value._value
    return value.read() if isinstance(value, StoredValue) else value


set_dispatcher(dispatch)
