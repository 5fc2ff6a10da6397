"""`function`: a Python function that is recorded once for each kind of arguments and replayed afterwards."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

from gpulayers import nest
from gpulayers.device import is_array
from gpulayers.trace.execute import Plan, execute, replay_node
from gpulayers.trace.graph import FunctionGraph, Node, active_graph, eager_mode, executing_eagerly, new_placeholder
from gpulayers.trace.stored import StoredValue, read_stored
from gpulayers.trace.tensor import GraphTensor, RecordedTensor

__all__ = ["Function", "function"]


class _Traced:
    """One recorded body: its graph, input tensors, outputs, and everything in it that has an effect."""

    def __init__(self, body: Callable[..., Any], arguments: Sequence[Any]) -> None:
        self.graph = FunctionGraph()
        self.inputs = [new_placeholder(self.graph, a.dtype, a.shape, "argument") for a in arguments]
        with self.graph.as_default():
            structure = body(*self.inputs)
            self.structure = nest.map_structure(self._as_output, structure)
        self.outputs = [t for t in nest.flatten(self.structure) if isinstance(t, GraphTensor)]
        effects = [n for n in self.graph.nodes if n.operation.stateful and n.operation is not read_stored]
        self.plan = Plan([*self.outputs, *effects], self.inputs)

    def _as_output(self, value: Any) -> Any:
        if isinstance(value, StoredValue):
            return self.graph.as_input("function", value)
        return None if isinstance(value, Node) else value

    def run(self, values: Sequence[Any], call: Callable[[Node, Sequence[Any]], Any]) -> list[Any]:
        """Return the values of the outputs."""
        feeds = dict(zip(self.inputs, values, strict=True))
        with eager_mode() if active_graph() is not None else contextlib.nullcontext():
            return execute(self.plan, feeds, call)[: len(self.outputs)]


class Function:
    """A Python function that is recorded at its first call for each kind of arguments, and replayed afterwards."""

    def __init__(self, body: Callable[..., Any]) -> None:
        self.python_function = body
        self._traced: dict[Any, _Traced] = {}
        functools.update_wrapper(self, body)

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self if instance is None else functools.partial(self, instance)

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        """Call the function: record it for arguments of a new kind, replay it otherwise."""
        if not executing_eagerly() or any(isinstance(v, GraphTensor) for v in nest.flatten([arguments, keywords])):
            return self.python_function(*arguments, **keywords)
        leaves = nest.flatten([arguments, keywords])
        traced = [isinstance(v, RecordedTensor) or is_array(v) for v in leaves]
        values = [v for v, is_input in zip(leaves, traced, strict=True) if is_input]
        key = (
            _outline([arguments, keywords]),
            tuple(
                (tuple(v.shape), v.dtype) if is_input else _constant_key(v)
                for v, is_input in zip(leaves, traced, strict=True)
            ),
        )
        found = self._traced.get(key)
        if found is None:
            found = self._traced[key] = self._trace(arguments, keywords, leaves, traced, values)
        results = iter(found.run(values, replay_node))
        return nest.map_structure(lambda t: next(results) if isinstance(t, GraphTensor) else t, found.structure)

    def _trace(
        self, arguments: Any, keywords: Any, leaves: list[Any], traced: list[bool], values: list[Any]
    ) -> _Traced:
        def body(*inputs: GraphTensor) -> Any:
            remaining = iter(inputs)
            filled = [next(remaining) if is_input else v for v, is_input in zip(leaves, traced, strict=True)]
            inner_arguments, inner_keywords = nest.pack_sequence_as([arguments, keywords], filled)
            return self.python_function(*inner_arguments, **inner_keywords)

        return _Traced(body, values)


def _outline(value: Any) -> Any:
    if isinstance(value, dict):
        return ("dict", tuple((k, _outline(v)) for k, v in value.items()))
    return (type(value).__name__, tuple(_outline(v) for v in value)) if nest.is_nested(value) else None


def _constant_key(value: Any) -> Any:
    try:
        hash(value)
    except TypeError:
        return id(value)
    return (type(value), value)


def function(func: Callable[..., Any] | None = None, **_: Any) -> Any:
    """Decorator: record `func` at its first call with arguments of new shapes, dtypes or Python values; replay it
    after.

    Arrays in, arrays out; Python side effects happen only while recording. Variables may be made in the first call.
    Works under a tape (every recorded operation is replayed onto it). In a graph, `func` is simply called.

    Source: ``tf.function``; keyword arguments of TensorFlow's are accepted and have no meaning here.

    >>> import numpy as np, gpulayers as gl
    >>> @gl.function
    ... def double(x):
    ...     return x * 2.0
    >>> double(np.ones(2))
    array([2., 2.])
    """
    return Function if func is None else Function(func)
