"""Session: run a graph from the host; and `gradients`, which differentiates a graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gpulayers import nest, ops
from gpulayers.device import asarray, asnumpy, is_array
from gpulayers.errors import DTypeError, GradientError, GraphError, ShapeError, message
from gpulayers.trace.default_session import open_sessions
from gpulayers.trace.execute import Plan, ancestors, execute
from gpulayers.trace.gradients import UnconnectedGradients, backpropagate, seed
from gpulayers.trace.graph import Graph, Node, eager_mode, get_default_graph
from gpulayers.trace.stored import CompositeValue, StoredValue, read_stored
from gpulayers.trace.tensor import GraphTensor, RecordedTensor

__all__ = ["Session", "gradients"]


class Session:
    """Run parts of a graph. A host boundary: it takes NumPy or device arrays and returns NumPy arrays.

    `graph`: the graph to run, the default graph if not given. Variables keep their values with themselves, not with the
    session, so two sessions of one graph see the same values (TensorFlow keeps a copy for each).

    Source: ``tf.compat.v1.Session``.
    """

    def __init__(self, graph: Graph | None = None) -> None:
        self.graph = graph or get_default_graph()
        self._plans: dict[Any, Plan] = {}
        self._closed = False
        self._context: Any = None

    def __enter__(self) -> Session:
        self._context = self.graph.as_default()
        self._context.__enter__()
        open_sessions().append(self)
        return self

    def __exit__(self, *error: Any) -> None:
        open_sessions().remove(self)
        self._context.__exit__(*error)
        self.close()

    def close(self) -> None:
        """Free what the session holds; it cannot run afterwards."""
        self._plans.clear()
        self._closed = True

    def run(self, fetches: Any, feed_dict: Mapping[Any, Any] | None = None) -> Any:
        """Compute `fetches` and return them as NumPy arrays in the same nested structure.

        `fetches`: tensors, variables, nodes (they give None), names of tensors, nested at will. `feed_dict` maps
        placeholders, or any tensor, to the value it takes in this run.

        Only what the fetches need is run, in the order it was recorded. Raises ValueError for a tensor of another
        graph, a missing feed, or a feed whose shape does not fit; TypeError for a fetch or feed of another type.
        """
        if self._closed:
            raise GraphError(message("Session.run", "the session is closed"))
        targets = [self._fetch(value) for value in nest.flatten(fetches)]
        feeds = {self._key(key): value for key, value in (feed_dict or {}).items()}
        feeds = {tensor: _fed(tensor, value) for tensor, value in feeds.items()}
        key = (tuple(id(t) for t in targets), frozenset(id(t) for t in feeds), len(self.graph.nodes))
        plan = self._plans.get(key)
        if plan is None:
            plan = self._plans[key] = Plan([t for t in targets if not isinstance(t, StoredValue)], feeds)
        with eager_mode():
            computed = iter(execute(plan, feeds))
            results = [t if isinstance(t, StoredValue) else next(computed) for t in targets]
            results = [t.read() if isinstance(t, StoredValue) else t for t in results]
        return nest.pack_sequence_as(fetches, [None if r is None else _to_host(r) for r in results])

    def _fetch(self, value: Any) -> Any:
        if isinstance(value, str):
            value = self.graph.get_tensor_by_name(value)
        if isinstance(value, StoredValue):
            return value
        if isinstance(value, CompositeValue):
            with self.graph.as_default():
                value = value.as_tensor()
        if not isinstance(value, GraphTensor | Node):
            raise TypeError(message("Session.run", "cannot be fetched", "a tensor, variable or node", repr(value)))
        if value.graph is not self.graph:
            raise GraphError(
                message("Session.run", f"{value.name!r} is not an element of this graph", do="Use Session(graph=...).")
            )
        return value

    def _key(self, key: Any) -> GraphTensor:
        if isinstance(key, str):
            key = self.graph.get_tensor_by_name(key)
        if not isinstance(key, GraphTensor):
            raise TypeError(message("Session.run", "cannot be fed", "a tensor", repr(key)))
        if key.graph is not self.graph:
            raise GraphError(message("Session.run", f"the fed {key.name!r} is not an element of this graph"))
        return key


def _to_host(value: Any) -> Any:
    return asnumpy(value).copy() if isinstance(value, np.ndarray) else asnumpy(value)


def _fed(tensor: GraphTensor, value: Any) -> Any:
    if isinstance(value, RecordedTensor):
        value = value.value
    elif isinstance(value, StoredValue):
        value = value.read()
    value = np.asarray(value, dtype=tensor.dtype) if not is_array(value) else value
    if value.dtype == object:
        raise DTypeError(message(tensor.name, "the fed value is not numbers", tensor.dtype.name, type(value).__name__))
    value = asarray(value, dtype=tensor.dtype)
    if not tensor.shape.is_compatible_with(value.shape):
        raise ShapeError(message(tensor.name, "the fed value has another shape", tensor.shape, tuple(value.shape)))
    return value


def gradients(
    ys: Any,
    xs: Any,
    grad_ys: Any = None,
    unconnected_gradients: str = UnconnectedGradients.NONE,
    stop_gradients: Any = None,
    name: str = "gradients",
) -> list[Any]:
    """Return, for each of `xs`, the gradient of the sum of `ys` as a tensor of the same graph.

    `xs`: tensors or variables. `grad_ys`: cotangents of `ys`, ones where None. `stop_gradients`: tensors to treat as
    constants. An x that no y depends on gives None, or zeros with ``unconnected_gradients="zero"``.

    Source: ``tf.gradients``.
    """
    targets, sources = nest.flatten(ys), nest.flatten(xs)
    targets = [t for t in targets if isinstance(t, GraphTensor)]
    if not targets:
        raise GradientError(message("gradients", "no target is a graph tensor", "tensors of a graph", repr(ys)))
    graph: Graph = targets[0].graph
    given = nest.flatten(grad_ys) if grad_ys is not None else []
    given = given if len(given) == len(targets) else [None] * len(targets)
    stopped = {id(t) for t in nest.flatten(stop_gradients)} if stop_gradients is not None else set()
    nodes = [n for n in ancestors(targets) if not any(id(o) in stopped for o in n.outputs)]
    wanted = [_reads(source, nodes) for source in sources]
    with graph.as_default(), graph.name_scope(name):
        cotangents: dict[int, Any] = {}
        for target, one in zip(targets, given, strict=True):
            start = seed(target, one, ops.ones_like)
            held = cotangents.get(id(target))
            cotangents[id(target)] = start if held is None else held + start
        backpropagate(nodes, cotangents, {id(t) for tensors in wanted for t in tensors})
        return [_total(s, w, cotangents, unconnected_gradients) for s, w in zip(sources, wanted, strict=True)]


def _reads(source: Any, nodes: Sequence[Node]) -> list[GraphTensor]:
    if isinstance(source, GraphTensor):
        return [source]
    if isinstance(source, StoredValue):
        return [n.outputs[0] for n in nodes if n.operation is read_stored and n.attributes["stored"] is source]
    raise GradientError(message("gradients", "cannot differentiate by this", "a tensor or variable", repr(source)))


def _total(source: Any, tensors: list[GraphTensor], cotangents: dict[int, Any], unconnected: str) -> Any:
    found = [cotangents[id(t)] for t in tensors if id(t) in cotangents]
    if not found:
        return ops.zeros_like(source) if unconnected == UnconnectedGradients.ZERO else None
    total = found[0]
    for one in found[1:]:
        total = total + one
    return total
