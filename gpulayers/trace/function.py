"""`function` (trace once, run many times), `cond`, and `custom_gradient`."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

from gpulayers import nest, ops
from gpulayers.device import asarray, is_array
from gpulayers.dtypes import is_floating
from gpulayers.errors import StructureError, message
from gpulayers.ops.operation import GradientContext, Operation, Spec
from gpulayers.trace.dispatch import as_value
from gpulayers.trace.execute import Plan, execute
from gpulayers.trace.graph import FunctionGraph, Node, active_graph, eager_mode, executing_eagerly, new_placeholder
from gpulayers.trace.session import gradients
from gpulayers.trace.stored import StoredValue, assign_stored, read_stored
from gpulayers.trace.tape import GradientTape, stop_recording
from gpulayers.trace.tensor import GraphTensor, RecordedTensor

__all__ = ["Function", "cond", "custom_gradient", "function"]


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


def _call_operation(node: Node, inputs: Sequence[Any]) -> Any:
    """Run a node through its operation, so that tapes see it."""
    if node.operation is read_stored:
        stored = node.attributes["stored"]
        stored.lend()  # the value read here must survive an assignment that is replayed later
        return ops.identity(stored)  # as an operation, so that tapes watch the variable
    return node.operation(*inputs, **node.attributes)


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
        results = iter(found.run(values, _call_operation))
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


# --- cond -------------------------------------------------------------------------------------------------------------


def _captured(branches: Sequence[FunctionGraph]) -> list[GraphTensor]:
    """Return the outer tensors that the branches use, each once."""
    seen: dict[int, GraphTensor] = {}
    for branch in branches:
        for outer in branch.captures:  # type: ignore[attr-defined]
            seen[id(outer)] = outer
    return list(seen.values())


class _BranchGraph(FunctionGraph):
    """A branch of `cond`: tensors of the surrounding graph come in as placeholders."""

    def __init__(self, outer: Any) -> None:
        super().__init__()
        self.outer = outer
        self.captures: dict[GraphTensor, GraphTensor] = {}
        self.initializes_variables_in_session = outer.initializes_variables_in_session

    def as_input(self, name: str, value: Any) -> Any:
        if isinstance(value, StoredValue) and not self._writes(value):
            value = self.outer.as_input(name, value)  # read outside, so that gradients reach it through the capture
        if isinstance(value, GraphTensor) and value.graph is not self:
            value = self.outer.as_input(name, value)  # a branch in a branch captures through its parent
            if value not in self.captures:
                self.captures[value] = new_placeholder(self, value.dtype, value.shape, "capture")
            return self.captures[value]
        return super().as_input(name, value)

    def _writes(self, stored: StoredValue) -> bool:
        """Say whether this branch assigns the variable: then later reads must see that."""
        return any(n.operation is assign_stored and n.attributes["stored"] is stored for n in self.nodes)


class _Branch:
    """One recorded branch and how to run it on the values of all captured tensors."""

    def __init__(self, outer: Any, body: Callable[[], Any]) -> None:
        self.graph = _BranchGraph(outer)
        with self.graph.as_default():
            self.structure = nest.map_structure(self._as_tensor, body())
        self.outputs = [t for t in nest.flatten(self.structure) if t is not None]
        effects = [n for n in self.graph.nodes if n.operation.stateful and n.operation is not read_stored]
        self.targets = [*self.outputs, *effects]

    def _as_tensor(self, value: Any) -> Any:
        if value is None or isinstance(value, Node):
            return None
        return ops.identity(value) if not (isinstance(value, GraphTensor) and value.graph is self.graph) else value

    def run(self, captured: Sequence[GraphTensor], values: Sequence[Any]) -> list[Any]:
        inner = self.graph.captures
        feeds = {inner[t]: v for t, v in zip(captured, values, strict=True) if t in inner}
        return execute(Plan(self.targets, feeds), feeds)[: len(self.outputs)]


def _cond_forward(xp: Any, pred: Any, *values: Any, true: _Branch, false: _Branch, captured: Any) -> Any:
    results = (true if bool(pred) else false).run(captured, values)
    return tuple(results)


def _cond_spec(pred: Spec, *values: Spec, true: _Branch, false: _Branch, captured: Any) -> Any:
    specs = []
    for a, b in zip(true.outputs, false.outputs, strict=True):
        same_rank = a.shape.rank is not None and a.shape.rank == b.shape.rank
        shape = tuple(m if m == n else None for m, n in zip(a.shape, b.shape, strict=True)) if same_rank else None
        specs.append(Spec(shape, a.dtype))
    return tuple(specs)


def _followed(tape: GradientTape, value: Any) -> Any:
    """Return a value of its own for `value`, watched by `tape` if it can be differentiated."""
    copied = ops.identity(value)
    if not is_floating(copied.dtype):
        return copied
    return tape.watch(copied if isinstance(copied, RecordedTensor) else RecordedTensor(copied))


def _cond_gradient(c: GradientContext, *gs: Any) -> tuple[Any, ...]:
    captured, values = c["captured"], c.inputs[1:]
    wanted = [i for i, needed in enumerate(c.needs[1:]) if needed]

    def branch_gradients(branch: _Branch) -> Callable[[], Any]:
        def body() -> list[Any]:
            # The branch is run again on the captured values, then differentiated: nothing is kept between the two.
            inner = {
                branch.graph.captures[t]: v for t, v in zip(captured, values, strict=True) if t in branch.graph.captures
            }
            eager = executing_eagerly()
            tape = GradientTape(watch_accessed_variables=False)
            with tape if eager else contextlib.nullcontext():
                copies = {t: _followed(tape, v) if eager else ops.identity(v) for t, v in inner.items()}
                outputs = execute(Plan(branch.outputs, list(copies)), copies, _call_operation)
            sources = [copies.get(branch.graph.captures.get(captured[i])) for i in wanted]  # type: ignore[arg-type]
            present = [s for s in sources if s is not None]
            pairs = [
                (o, ops.identity(g))
                for o, g in zip(outputs, gs, strict=True)
                if g is not None and (tape.follows(o) if eager else isinstance(o, GraphTensor))
            ]
            if present and pairs:
                differentiate = tape.gradient if eager else gradients
                found = iter(differentiate([o for o, _ in pairs], present, [g for _, g in pairs], "zero"))
            else:
                found = iter([ops.zeros_like(s) for s in present])
            return [
                ops.zeros_like(values[i]) if s is None else next(found) for i, s in zip(wanted, sources, strict=True)
            ]

        return body

    found = cond(c.inputs[0], branch_gradients(c["true"]), branch_gradients(c["false"]))
    result: list[Any] = [None] * len(c.inputs)
    for i, gradient in zip(wanted, found, strict=True):
        result[i + 1] = gradient
    return tuple(result)


_cond = Operation(
    "cond",
    _cond_forward,
    spec=_cond_spec,
    gradient=_cond_gradient,
    type="If",
    stateful=True,
    doc="Run one of two branches.",
)
_cond.many = True  # type: ignore[attr-defined]


def cond(pred: Any, true_fn: Callable[[], Any], false_fn: Callable[[], Any], name: str | None = None) -> Any:
    """Return ``true_fn()`` where the scalar `pred` is true, else ``false_fn()``.

    With a known `pred` (a bool, a number, an array: eager mode) the chosen function is simply called. With a graph
    tensor both are recorded and one is run. Both must then return the same structure, with equal dtypes.
    Raises ValueError if they do not. Source: ``tf.cond``.

    >>> cond(True, lambda: 1, lambda: 2)
    1
    """
    graph = active_graph() or (pred.graph if isinstance(pred, GraphTensor) else None)
    if graph is None or not isinstance(pred, GraphTensor | StoredValue):
        return true_fn() if bool(as_value(pred)) else false_fn()
    true, false = _Branch(graph, true_fn), _Branch(graph, false_fn)
    try:
        nest.assert_same_structure(true.structure, false.structure)
        same = [(a is None) == (b is None) for a, b in _pairs(true.structure, false.structure)]
    except (TypeError, ValueError) as error:
        raise StructureError(message("cond", f"the branches return different structures ({error})")) from error
    for a, b in zip(true.outputs, false.outputs, strict=False):
        if a.dtype != b.dtype:
            raise StructureError(message("cond", "the branches return different dtypes", a.dtype, b.dtype))
    if not all(same):
        raise StructureError(message("cond", "one branch returns nothing where the other returns a tensor"))
    captured = _captured([true.graph, false.graph])
    attributes = {"true": true, "false": false, "captured": captured}
    results = graph.record(_cond, (pred, *captured), attributes)
    if not true.outputs:
        return results
    remaining = iter(results)
    return nest.map_structure(lambda t: None if t is None else next(remaining), true.structure)


def _pairs(a: Any, b: Any) -> list[tuple[Any, Any]]:
    return list(zip(nest.flatten(a), nest.flatten(b), strict=True))


# --- custom gradients -------------------------------------------------------------------------------------------------


def custom_gradient(f: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator for a function ``f(*arrays) -> (result, grad)``, where ``grad(*cotangents)`` gives one for each array.

    What `f` computes inside is not differentiated; `grad` is. Eager, under tapes, and in graphs.
    Source: ``tf.custom_gradient``; `f` must not use trainable variables other than through its arguments.

    >>> import numpy as np, gpulayers as gl
    >>> @gl.custom_gradient
    ... def twice_with_wrong_slope(x):
    ...     return 2 * x, lambda g: 10 * g
    >>> with gl.GradientTape() as tape:
    ...     y = twice_with_wrong_slope(tape.watch(x := np.ones(2)))
    >>> tape.gradient(y, x)
    array([10., 10.])
    """

    @functools.wraps(f)
    def call(*arguments: Any) -> Any:
        values = [as_value(a) for a in arguments]
        symbolic = not executing_eagerly() or any(isinstance(v, GraphTensor) for v in values)
        if not symbolic:
            values = [v if is_array(v) else asarray(v) for v in values]
        with contextlib.nullcontext() if symbolic else stop_recording():
            result, grad = f(*values)
        several = isinstance(result, tuple | list)
        outputs = [as_value(r) for r in (result if several else (result,))]

        def rule(c: GradientContext, *gs: Any) -> tuple[Any, ...]:
            filled = [ops.zeros_like(o) if g is None else g for g, o in zip(gs, c.outputs, strict=True)]
            found = grad(*filled)
            return tuple(found) if isinstance(found, tuple | list) else (found,)

        count = len(arguments)
        tied = _Tie(count, len(outputs), rule)
        tied_outputs = tied(*values_or(arguments, values, symbolic), *outputs)
        return type(result)(tied_outputs) if several else tied_outputs[0]

    return call


def values_or(arguments: Sequence[Any], values: Sequence[Any], symbolic: bool) -> Sequence[Any]:
    """Return the arguments as recorded values where they are, else as arrays."""
    if symbolic:
        return [v if hasattr(v, "dtype") else asarray(v) for v in arguments]
    return [
        a if isinstance(a, RecordedTensor | StoredValue) or is_array(a) else v
        for a, v in zip(arguments, values, strict=True)
    ]


class _Tie(Operation):
    """Pass the last inputs through, with a gradient rule for the first ones: how a custom gradient is recorded."""

    def __init__(self, count: int, outputs: int, rule: Callable[..., Any]) -> None:
        # Not in OPERATIONS: one is made for each call.
        self.name = self.__name__ = "custom_gradient"
        self.type, self.stateful, self.broadcasts, self.kernel = "CustomGradient", False, False, None
        self.__doc__ = self.__class__.__doc__
        self.forward = lambda xp, *values: tuple(values[count:])
        self.spec = lambda *specs: tuple(specs[count:])
        self.gradient = lambda c, *gs: (*rule(c, *gs), *([None] * outputs))
        self.many = True
