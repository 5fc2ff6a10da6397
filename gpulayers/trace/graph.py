"""Graphs: operations recorded now and run later, their names, control dependencies and collections."""

from __future__ import annotations

import contextlib
import itertools
import re
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from gpulayers.device import asarray
from gpulayers.dtypes import TensorShape, as_dtype
from gpulayers.errors import GraphError, StateError, message
from gpulayers.ops.operation import Operation, Recordable, Spec, state
from gpulayers.trace.default_session import session_for
from gpulayers.trace.stored import StoredValue, read_stored
from gpulayers.trace.tensor import GraphTensor, RecordedTensor

__all__ = [
    "FunctionGraph",
    "Graph",
    "GraphKeys",
    "Node",
    "active_graph",
    "control_dependencies",
    "eager_mode",
    "executing_eagerly",
    "get_default_graph",
    "group",
    "no_op",
    "placeholder",
    "placeholder_with_default",
    "recording_function",
    "symbolic_graph",
]

_NAME = re.compile(r"^[A-Za-z0-9.][A-Za-z0-9_.\\/>-]*$")
_counter = itertools.count()


class GraphKeys:
    """Names of the standard collections of a graph. Source: ``tf.compat.v1.GraphKeys``."""

    GLOBAL_VARIABLES = "variables"
    TRAINABLE_VARIABLES = "trainable_variables"
    LOCAL_VARIABLES = "local_variables"
    MODEL_VARIABLES = "model_variables"
    UPDATE_OPS = "update_ops"
    REGULARIZATION_LOSSES = "regularization_losses"
    LOSSES = "losses"
    SUMMARIES = "summaries"
    INIT_OP = "init_op"
    TRAIN_OP = "train_op"
    GLOBAL_STEP = "global_step"


class _Stack(threading.local):
    """The graphs that are being built in this thread; None marks a stretch of eager mode inside one."""

    def __init__(self) -> None:
        self.graphs: list[Graph | None] = []


_stack = _Stack()


class Node:
    """One recorded call of an operation.

    `operation`, `inputs` (graph tensors, arrays, numbers), `attributes`, `control_inputs` (nodes that run before),
    `outputs` (graph tensors), `name`, `graph`. `order` grows with creation: nodes run in this order.
    """

    __slots__ = (
        "__weakref__",
        "attributes",
        "control_inputs",
        "graph",
        "inputs",
        "name",
        "operation",
        "order",
        "outputs",
    )

    def __init__(
        self,
        graph: Graph,
        operation: Operation,
        inputs: Sequence[Any],
        attributes: dict[str, Any],
        control_inputs: tuple[Node, ...],
        name: str,
    ) -> None:
        self.graph, self.operation, self.inputs, self.attributes = graph, operation, tuple(inputs), attributes
        self.control_inputs, self.name, self.order = control_inputs, name, next(_counter)
        specs = operation.spec(*(_spec_of(value) for value in inputs), **attributes)
        if specs is None:
            specs = ()
        elif isinstance(specs, Spec):
            specs = (specs,)
        self.outputs = tuple(GraphTensor(self, i, s.shape, s.dtype) for i, s in enumerate(specs))

    @property
    def type(self) -> str:
        """The operation's type, such as ``"MatMul"``."""
        return self.operation.type

    def run(self, feed_dict: dict[Any, Any] | None = None, session: Any = None) -> None:
        """Run the node in the given or the default session."""
        session_for(self.name, session).run(self, feed_dict)

    def __repr__(self) -> str:
        return f"<Node {self.name!r} type={self.type}>"


def _spec_of(value: Any) -> Spec:
    if isinstance(value, GraphTensor):
        shape = value.shape
        return Spec(None if shape.rank is None else tuple(shape), value.dtype)
    if isinstance(value, bool | int | float | complex):
        return Spec((), type(value))  # type: ignore[arg-type]
    return Spec(tuple(value.shape), value.dtype)


class Graph:
    """A recorded computation.

    Inside ``with graph.as_default():`` every operation is recorded instead of run, and variables made there get their
    value when their initializer is run. Source: ``tf.Graph``.

    >>> import gpulayers as gl
    >>> with gl.Graph().as_default():
    ...     x = gl.placeholder(gl.float32, (None, 2))
    ...     y = x * 2.0
    ...     with gl.Session() as session:
    ...         print(session.run(y, {x: [[1.0, 2.0]]}))
    [[2. 4.]]
    """

    initializes_variables_in_session = True
    keeps_nodes = True

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.collections: dict[str, list[Any]] = {}
        self.scope_state: dict[str, Any] = {}  # what `gpulayers.scopes` and layers count for this graph
        self.stored_reads: dict[int, list[GraphTensor]] = {}
        self._names: dict[str, int] = {}
        self._name_scope = ""
        self._control: list[tuple[Node, ...]] = [()]

    @property
    def owner(self) -> Graph:
        """The graph that variables made in this one belong to: itself, but for a branch of `cond`."""
        return self

    @contextlib.contextmanager
    def as_default(self) -> Iterator[Graph]:
        """Record operations here inside the block."""
        _stack.graphs.append(self)
        state.recorders += 1
        try:
            yield self
        finally:
            state.recorders -= 1
            _stack.graphs.pop()

    def record(self, operation: Operation, inputs: Sequence[Any], attributes: dict[str, Any]) -> Any:
        """Record one call and return its output tensor or tensors (the node itself if it has none)."""
        values = [self.as_input(operation.name, value) for value in inputs]
        if all(isinstance(value, bool | int | float | complex) for value in values):
            values = [asarray(value) for value in values]
        name = self.unique_name(operation.type)
        node = Node(self, operation, values, attributes, self._control[-1], name)
        if self.keeps_nodes:
            self.nodes.append(node)
        if not node.outputs:
            return node
        return node.outputs if len(node.outputs) > 1 or operation.__dict__.get("many") else node.outputs[0]

    def as_input(self, name: str, value: Any) -> Any:
        """Turn one operand into what a node takes: a tensor of this graph, an array or a number."""
        if isinstance(value, GraphTensor):
            if value.graph is not self:
                raise GraphError(
                    message(name, f"{value.name!r} belongs to another graph", do="Build everything in one graph.")
                )
            return value
        if isinstance(value, StoredValue):
            tensor = self.record(read_stored, (), {"stored": value})
            self.stored_reads.setdefault(id(value), []).append(tensor)
            return tensor
        if isinstance(value, RecordedTensor):
            return value.value
        if isinstance(value, bool | int | float | complex):
            return value
        return asarray(value) if not hasattr(value, "dtype") else value

    def reads_of(self, stored: StoredValue) -> list[GraphTensor]:
        """Return the tensors that read a variable in this graph."""
        return self.stored_reads.get(id(stored), [])

    def unique_name(self, name: str, mark: bool = True) -> str:
        """Return `name` within the current name scope, with a number behind it if it is taken."""
        full = f"{self._name_scope}{name}"
        key = full.lower()
        taken = self._names.get(key, 0)
        if mark:
            self._names[key] = taken + 1
        if not taken:
            return full
        while f"{key}_{taken}" in self._names:
            taken += 1
        if mark:
            self._names[f"{key}_{taken}"] = 1
            self._names[key] = taken + 1
        return f"{full}_{taken}"

    @contextlib.contextmanager
    def name_scope(self, name: str | None) -> Iterator[str]:
        """Prefix the names of nodes made inside; a name ending in ``/`` re-enters a scope exactly. Yields the
        prefix.
        """
        previous = self._name_scope
        if not name:
            prefix = ""
        elif name.endswith("/"):
            prefix = name
        else:
            check_scope_name(name)
            prefix = self.unique_name(name) + "/"
        self._name_scope = prefix
        try:
            yield prefix
        finally:
            self._name_scope = previous

    @property
    def current_name_scope(self) -> str:
        """The prefix in force, ending in ``/``, or an empty string."""
        return self._name_scope

    @contextlib.contextmanager
    def control_dependencies(self, values: Iterable[Any] | None) -> Iterator[None]:
        """Make nodes recorded inside run after `values` (nodes or tensors); None clears the outer dependencies."""
        if values is None:
            nodes: tuple[Node, ...] = ()
        else:
            nodes = self._control[-1] + tuple(_node_of(v) for v in values if _node_of(v) is not None)  # type: ignore[misc]
        self._control.append(nodes)
        try:
            yield
        finally:
            self._control.pop()

    def get_operations(self) -> list[Node]:
        """Return the nodes in the order they were made."""
        return list(self.nodes)

    def get_tensor_by_name(self, name: str) -> GraphTensor:
        """Return the tensor called ``node:index``. Raises KeyError if there is none."""
        node_name, _, index = name.partition(":")
        for node in self.nodes:
            if node.name == node_name and node.outputs:
                return node.outputs[int(index or 0)]
        raise KeyError(message("Graph", f"there is no tensor named {name!r}"))

    def add_to_collection(self, name: str, value: Any) -> None:
        """Append `value` to the collection `name`."""
        self.collections.setdefault(name, []).append(value)

    def get_collection(self, name: str, scope: str | None = None) -> list[Any]:
        """Return a copy of a collection; with `scope`, only items whose name matches that regular expression."""
        items = self.collections.get(name, [])
        if scope is None:
            return list(items)
        return [item for item in items if hasattr(item, "name") and re.match(scope, item.name)]

    def get_collection_ref(self, name: str) -> list[Any]:
        """Return the collection itself, to be changed in place."""
        return self.collections.setdefault(name, [])

    def clear_collection(self, name: str) -> None:
        """Empty a collection."""
        self.collections.pop(name, None)


class FunctionGraph(Graph):
    """A graph that `function`, `cond` or `Input` records into: variables made meanwhile are ordinary eager ones."""

    initializes_variables_in_session = False


class SymbolicGraph(FunctionGraph):
    """The graph of `Input` tensors. It does not hold on to nodes: they live as long as the tensors that need them."""

    keeps_nodes = False

    def as_input(self, name: str, value: Any) -> Any:
        """Read a variable anew at each use; reads are found by walking back from the tensors that need them."""
        if isinstance(value, StoredValue):
            return self.record(read_stored, (), {"stored": value})
        return super().as_input(name, value)

    def unique_name(self, name: str, mark: bool = True) -> str:
        """Return a name; numbers are not counted per name, since nodes come and go."""
        return f"{self._name_scope}{name}"


_symbolic = SymbolicGraph()
_default = Graph()


def symbolic_graph() -> SymbolicGraph:
    """Return the graph that `Input` tensors belong to."""
    return _symbolic


def check_scope_name(name: str) -> None:
    """Raise ValueError if `name` cannot name a scope."""
    if not isinstance(name, str) or not _NAME.match(name):
        raise GraphError(message(repr(name), "is not a valid scope name", "letters, digits and _.\\/>-"))


def active_graph() -> Graph | None:
    """Return the graph that operations are recorded into, or None in eager mode."""
    return _stack.graphs[-1] if _stack.graphs else None


def executing_eagerly() -> bool:
    """Say whether operations run at once (True), or are recorded into a graph."""
    return active_graph() is None


def recording_function() -> bool:
    """Say whether a `function` (or a shape) is being recorded: what is recorded then must not be kept beyond it."""
    graph = active_graph()
    return isinstance(graph, FunctionGraph) and not graph.initializes_variables_in_session


def get_default_graph() -> Graph:
    """Return the innermost graph, or the process's default graph where none was entered."""
    return active_graph() or _default


def enter_default_graph() -> None:
    """Leave eager mode for good: record into the process's default graph from now on."""
    if not _stack.graphs:
        _stack.graphs.append(_default)
        state.recorders += 1


def leave_default_graph() -> None:
    """Undo `enter_default_graph`."""
    if _stack.graphs == [_default]:
        _stack.graphs.pop()
        state.recorders -= 1


def reset_default_graph() -> None:
    """Replace the process's default graph by an empty one."""
    global _default
    old, _default = _default, Graph()
    _stack.graphs[:] = [_default if graph is old else graph for graph in _stack.graphs]


@contextlib.contextmanager
def eager_mode() -> Iterator[None]:
    """Run operations at once inside the block, even where a graph is being built."""
    _stack.graphs.append(None)
    try:
        yield
    finally:
        _stack.graphs.pop()


def _node_of(value: Any) -> Node | None:
    if isinstance(value, Node):
        return value
    if isinstance(value, GraphTensor):
        node: Node = value.node
        return node
    return None  # eager values have happened already


def control_dependencies(values: Iterable[Any] | None) -> contextlib.AbstractContextManager[None]:
    """Make what is recorded inside the block run after `values`; in eager mode, where order is the program's,
    nothing.
    """
    graph = active_graph()
    return contextlib.nullcontext() if graph is None else graph.control_dependencies(values)


def _missing_feed(xp: Any, *, name: str, **_: Any) -> Any:
    raise GraphError(message(name, "no value was fed", do=f"Pass feed_dict={{{name}: value}} to Session.run."))


placeholder_operation = Operation(
    "placeholder",
    _missing_feed,
    spec=lambda shape, dtype, **_: Spec(None if shape.rank is None else tuple(shape), dtype),
)


def placeholder(dtype: Any, shape: Any = None, name: str | None = None) -> GraphTensor:
    """Return a tensor whose value is given at each `Session.run`.

    Parameters: `dtype`; `shape`, None for unknown rank, None inside for unknown sizes; `name`.
    Raises RuntimeError in eager mode. Source: ``tf.compat.v1.placeholder``.
    """
    graph = active_graph()
    if graph is None:
        raise StateError(
            message("placeholder", "needs a graph, not eager mode", do="Use it inside `with gl.Graph().as_default():`.")
        )
    return new_placeholder(graph, dtype, shape, name)


def new_placeholder(graph: Graph, dtype: Any, shape: Any = None, name: str | None = None) -> GraphTensor:
    """Make a placeholder in `graph`."""
    node_name = graph.unique_name(name or "Placeholder")
    attributes = {"shape": TensorShape(shape), "dtype": as_dtype(dtype), "name": node_name}
    node = Node(graph, placeholder_operation, (), attributes, (), node_name)
    if graph.keeps_nodes:
        graph.nodes.append(node)
    return node.outputs[0]


_default_operation = Operation(
    "placeholder_with_default",
    lambda xp, x, *, shape: x,
    spec=lambda x, shape: Spec(None if shape.rank is None else tuple(shape), x.dtype),
    gradient=(lambda c, g: g,),
    doc="Return `x` where nothing is fed.",
)


def placeholder_with_default(input: Any, shape: Any, name: str | None = None) -> Any:
    """Return a tensor that can be fed, and is `input` where it is not; in eager mode `input` itself, as an array.

    `shape`: its static shape, which `input` must fit. Raises ShapeError if it does not.
    Source: ``tf.compat.v1.placeholder_with_default``.
    """
    graph = active_graph()
    value: Any = input if isinstance(input, Recordable) else asarray(input)
    if graph is None:
        return value
    TensorShape(shape).assert_is_compatible_with(value.shape)
    return graph.record(_default_operation, (value,), {"shape": TensorShape(shape)})


_group = Operation(
    "no_op", lambda xp, *values: None, spec=lambda *specs: None, type="NoOp", stateful=True, doc="Do nothing."
)


def group(*inputs: Any, name: str | None = None) -> Any:
    """Return a node that runs all of `inputs` (nodes, tensors, nested lists of them); None in eager mode."""
    graph = active_graph()
    if graph is None:
        return None
    nodes = [_node_of(value) for value in _flatten(inputs)]
    with graph.control_dependencies([node for node in nodes if node is not None]):
        return graph.record(_group, (), {})


def no_op(name: str | None = None) -> Any:
    """Return a node that does nothing; None in eager mode."""
    return group(name=name)


def _flatten(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, list | tuple):
            yield from _flatten(value)
        elif value is not None:
            yield value
