"""`cond`: two recorded branches, of which one is run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

from gpulayers import nest, ops
from gpulayers.dtypes import is_floating
from gpulayers.errors import StructureError, message
from gpulayers.ops.operation import GradientContext, Operation, Spec
from gpulayers.trace.dispatch import as_value
from gpulayers.trace.execute import Plan, execute, replay_node
from gpulayers.trace.graph import FunctionGraph, Node, active_graph, executing_eagerly, new_placeholder
from gpulayers.trace.session import gradients
from gpulayers.trace.stored import StoredValue, assign_stored, read_stored
from gpulayers.trace.tape import GradientTape
from gpulayers.trace.tensor import GraphTensor, RecordedTensor

__all__ = ["BranchGraph", "cond"]


def _captured(branches: Sequence[FunctionGraph]) -> list[GraphTensor]:
    """Return the outer tensors that the branches use, each once."""
    seen: dict[int, GraphTensor] = {}
    for branch in branches:
        for outer in branch.captures:  # type: ignore[attr-defined]
            seen[id(outer)] = outer
    return list(seen.values())


class BranchGraph(FunctionGraph):
    """A branch of `cond`: tensors of the surrounding graph come in as placeholders."""

    def __init__(self, outer: Any) -> None:
        super().__init__()
        self.outer = outer
        self.captures: dict[GraphTensor, GraphTensor] = {}
        self.initializes_variables_in_session = outer.initializes_variables_in_session
        self.scope_state = outer.scope_state  # a branch shares variables and counts names with what surrounds it

    @property
    def owner(self) -> Any:
        """The graph that variables made in this branch belong to."""
        return self.outer.owner

    def as_input(self, name: str, value: Any) -> Any:
        """Bring an outer tensor, or a variable that this branch does not assign, in as a placeholder."""
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
        self.graph = BranchGraph(outer)
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
                outputs = execute(Plan(branch.outputs, list(copies)), copies, replay_node)
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
