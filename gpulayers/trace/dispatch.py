"""Where a call of an operation goes: into a graph, onto tapes, or straight to its forward."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np

from gpulayers.ops.operation import Operation, Recordable, cast_operation, set_dispatcher, state
from gpulayers.trace.graph import active_graph
from gpulayers.trace.stored import CompositeValue, StoredValue, lend_aliased
from gpulayers.trace.tape import active_tapes, record_on_tapes
from gpulayers.trace.tensor import GraphTensor, RecordedTensor

__all__ = ["as_value", "autocast", "autocast_dtype", "dispatch"]


class _Autocast(threading.local):
    dtype: np.dtype | None = None


_autocast = _Autocast()


@contextlib.contextmanager
def autocast(dtype: np.dtype | None) -> Iterator[None]:
    """Read variables made with `autocast` as `dtype` inside the block (None: as they are stored)."""
    before, _autocast.dtype = _autocast.dtype, dtype
    try:
        yield
    finally:
        _autocast.dtype = before


def autocast_dtype() -> np.dtype | None:
    """Return the dtype in which variables made with `autocast` are read now, or None."""
    return _autocast.dtype


def _resolve(value: Any) -> Any:
    """Turn one operand into what is recorded: composite values become one tensor, variables are cast where asked."""
    if isinstance(value, CompositeValue):
        return value.as_tensor()
    if isinstance(value, StoredValue) and value.autocast and _autocast.dtype not in (None, value.static_dtype):
        return cast_operation(value, dtype=_autocast.dtype)
    return value


def dispatch(operation: Operation, inputs: tuple[Any, ...], attributes: dict[str, Any]) -> Any:
    """Record or run one call."""
    if not state.recorders and not any(isinstance(value, GraphTensor) for value in inputs):
        return _run(operation, inputs, attributes)
    if operation is not cast_operation:
        inputs = tuple(_resolve(value) for value in inputs)
    for value in inputs:
        if isinstance(value, GraphTensor):
            return (active_graph() or value.graph).record(operation, inputs, attributes)
    graph = active_graph()
    if graph is not None:
        return graph.record(operation, inputs, attributes)
    tapes = active_tapes()
    if tapes:
        return record_on_tapes(tapes, operation, inputs, attributes)
    return _run(operation, inputs, attributes)


def _run(operation: Operation, inputs: tuple[Any, ...], attributes: dict[str, Any]) -> Any:
    result = operation.run([as_value(value) for value in inputs], attributes)
    lend_aliased(inputs, result)
    return result


def as_value(value: Any) -> Any:
    """Return the array of a recorded tensor or variable, as it is read now; anything else as it is."""
    if not isinstance(value, Recordable):
        return value
    if isinstance(value, StoredValue):
        array = value.read()
        cast = _autocast.dtype if value.autocast else None
        return array if cast is None or cast == array.dtype else array.astype(cast)
    if isinstance(value, RecordedTensor):
        return value._value
    return as_value(value.as_tensor()) if isinstance(value, CompositeValue) else value


set_dispatcher(dispatch)
