"""A loop over the time axis inside a graph: one operation that runs a recorded body for each step.

The body is recorded once. When a gradient was asked for, the steps are run under a tape, which then gives the gradient
with the same random numbers; otherwise nothing is kept.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

from gpulayers import ops
from gpulayers.dtypes import is_floating
from gpulayers.errors import GradientError, ShapeError, StructureError, message
from gpulayers.ops.operation import GradientContext, Spec, pullback
from gpulayers.ops.recurrent.operations import Keep, Saved, SavingOperation
from gpulayers.trace import (
    GradientTape,
    GraphTensor,
    Plan,
    RecordedTensor,
    active_graph,
    active_tapes,
    eager_mode,
    execute,
    read_stored,
    stop_recording,
)
from gpulayers.trace.branches import BranchGraph
from gpulayers.trace.graph import Node, new_placeholder

__all__ = ["scan"]

Step = Callable[[list[Any], list[Any]], tuple[list[Any], list[Any]]]


class _Body:
    """The recorded step: its inputs, its outputs, and the outer tensors that it uses."""

    def __init__(self, outer: Any, step: Step, sequences: Sequence[Any], states: Sequence[Any]) -> None:
        self.graph = BranchGraph(outer)
        slices = [new_placeholder(self.graph, x.dtype, tuple(x.shape)[1:], "step") for x in sequences]
        carried = [new_placeholder(self.graph, s.dtype, s.shape, "state") for s in states]
        with self.graph.as_default():
            outputs, new_states = step(slices, carried)
            self.outputs = [ops.identity(value) for value in outputs]
            self.states = [self._fitting(new, old) for new, old in zip(new_states, carried, strict=True)]
        self.inputs = [*slices, *carried]
        self.captured = list(self.graph.captures)
        effects = [n for n in self.graph.nodes if n.operation.stateful and n.operation is not read_stored]
        self.draws = bool(effects)
        self.inner = [self.graph.captures[outer_tensor] for outer_tensor in self.captured]
        self.plan = Plan([*self.outputs, *self.states, *effects], [*self.inputs, *self.inner])

    def _fitting(self, new: Any, old: GraphTensor) -> Any:
        if not old.shape.is_compatible_with(new.shape):
            raise ShapeError(
                message("scan", "a state changes its shape from step to step", tuple(old.shape), tuple(new.shape))
            )
        if new.dtype != old.dtype and is_floating(new.dtype) and is_floating(old.dtype):
            return ops.cast(new, old.dtype)  # as in a cell with another policy than the layer around it
        if new.dtype != old.dtype:
            raise StructureError(message("scan", "a state changes its dtype from step to step", old.dtype, new.dtype))
        return ops.identity(new)

    def run(self, slices: Sequence[Any], states: Sequence[Any], captured: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        """Run one step on values; returns outputs and new states."""
        feeds = dict(zip([*self.inputs, *self.inner], [*slices, *states, *captured], strict=True))
        results = execute(self.plan, feeds, _call)
        count = len(self.outputs)
        return results[:count], results[count : count + len(self.states)]


def _call(node: Node, inputs: Sequence[Any]) -> Any:
    if node.operation is read_stored:
        return ops.identity(node.attributes["stored"])
    return node.operation(*inputs, **node.attributes)


def _loop(body: _Body, values: Sequence[Any], sequences: int, reverse: bool) -> list[Any]:
    """Run all steps on values or tensors of a tape; returns stacked outputs and the last states."""
    count = len(body.states)
    slices = [ops.unstack(x, 0) for x in values[:sequences]]
    states, captured = list(values[sequences : sequences + count]), values[sequences + count :]
    collected: list[list[Any]] = []
    time = len(slices[0])
    if not time:
        batch = tuple(values[0].shape)[1]
        return [*(ops.zeros((0, batch, *tuple(o.shape)[1:]), o.dtype) for o in body.outputs), *states]
    for t in range(time - 1, -1, -1) if reverse else range(time):
        outputs, states = body.run([x[t] for x in slices], states, captured)
        collected.append(outputs)
    return [*(ops.stack(list(column), 0) for column in zip(*collected, strict=True)), *states]


def _forward(xp: Any, *values: Any, body: _Body, sequences: int, reverse: bool, keep: Keep) -> tuple[Any, ...]:
    save = keep.wanted or bool(active_tapes())
    with eager_mode() if active_graph() is not None else contextlib.nullcontext(), stop_recording():
        if not save:
            return (*_loop(body, values, sequences, reverse), Saved(()))
        with GradientTape(persistent=True, watch_accessed_variables=False) as tape:
            # identity gives every operand a tensor of its own, even where one array is given twice
            tensors = [ops.identity(tape.watch(v)) if is_floating(v.dtype) else v for v in values]
            results = _loop(body, tensors, sequences, reverse)
        plain = [r.value if isinstance(r, RecordedTensor) else r for r in results]
        return (*plain, Saved((tape, tensors, results)))


def _spec(*specs: Spec, body: _Body, sequences: int, **_: Any) -> tuple[Spec, ...]:
    time = next((s.shape[0] for s in specs[:sequences] if s.shape), None)
    outputs = [Spec(None if t.shape.rank is None else (time, *t.shape), t.dtype) for t in body.outputs]
    states = [Spec(None if t.shape.rank is None else tuple(t.shape), t.dtype) for t in body.states]
    return (*outputs, *states, Spec((), Saved.dtype))


def _gradient(c: GradientContext, *gs: Any) -> tuple[Any, ...]:
    c["keep"].wanted = True
    arrived = tuple(index for index, g in enumerate(gs) if g is not None)
    wanted = tuple(index for index, needed in enumerate(c.needs) if needed)
    operands = [c.inputs[index] for index in range(len(c.needs))]
    settings = {key: c[key] for key in ("body", "sequences", "reverse")}
    found = _scan_gradient(
        *(gs[index] for index in arrived), c.outputs[-1], *operands, arrived=arrived, wanted=wanted, **settings
    )
    result: list[Any] = [None] * len(c.needs)
    for index, gradient in zip(wanted, found, strict=True):
        result[index] = gradient
    return tuple(result)


def _backward(
    xp: Any, *values: Any, arrived: tuple[int, ...], wanted: tuple[int, ...], body: _Body, sequences: int, reverse: bool
) -> tuple[Any, ...]:
    cotangents, saved, operands = values[: len(arrived)], values[len(arrived)], values[len(arrived) + 1 :]
    if not saved.arrays:  # the forward ran before anyone asked for a gradient
        always = Keep()
        always.wanted = True
        saved = _forward(xp, *operands, body=body, sequences=sequences, reverse=reverse, keep=always)[-1]
    tape, tensors, results = saved.arrays
    with eager_mode() if active_graph() is not None else contextlib.nullcontext(), stop_recording():
        pairs = [
            (results[index], g)
            for index, g in zip(arrived, cotangents, strict=True)
            if isinstance(results[index], RecordedTensor)
        ]
        sources = [tensors[index] for index in wanted]
        if not pairs:
            return tuple(ops.zeros_like(source.value) for source in sources)
        return tuple(tape.gradient([r for r, _ in pairs], sources, [g for _, g in pairs], "zero"))


def _backward_spec(*specs: Spec, arrived: tuple[int, ...], wanted: tuple[int, ...], **_: Any) -> tuple[Spec, ...]:
    operands = specs[len(arrived) + 1 :]
    return tuple(operands[index] for index in wanted)


def _second_gradient(c: GradientContext, *gs: Any) -> tuple[Any, ...]:
    """Differentiate the gradients: those of the steps one by one, by operations that have gradients in turn."""
    body, arrived, wanted = c["body"], c["arrived"], c["wanted"]
    first = len(arrived) + 1  # behind the cotangents and what was saved
    operands = [c.inputs[first + index] for index in range(len(c.needs) - first)]
    if body.draws or any(tuple(x.shape)[0] is None for x in operands[: c["sequences"]]):
        wrong = "a loop in a graph that draws random numbers, or of unknown length, has no gradient of its gradient"
        raise GradientError(message("scan", wrong, do="Use unroll=True, or compute eagerly."))
    count = len(arrived)
    free = [index for index in range(len(c.needs)) if c.needs[index] or index < count or index - first in wanted]

    def first_gradients(*values: Any) -> list[Any]:
        named = dict(zip(free, values, strict=True))

        def forward(*replaced: Any) -> list[Any]:
            own = {**named, **{first + index: value for index, value in zip(wanted, replaced, strict=True)}}
            given = [own.get(first + index, value) for index, value in enumerate(operands)]
            results = _loop(body, given, c["sequences"], c["reverse"])
            return [results[index] for index in arrived]

        return pullback(forward, [named[first + index] for index in wanted], values[:count])

    found = dict(zip(free, pullback(first_gradients, [c.inputs[index] for index in free], gs), strict=True))
    return tuple(found.get(index) for index in range(len(c.needs)))


_scan_gradient = SavingOperation(
    "scan_gradient", _backward, spec=_backward_spec, gradient=_second_gradient, doc="Gradients of `scan`."
)
_scan = SavingOperation(
    "scan",
    _forward,
    spec=_spec,
    gradient=_gradient,
    type="While",
    stateful=True,
    doc="Run a recorded body for each step.",
)
_scan.many = _scan_gradient.many = True  # type: ignore[attr-defined]


def scan(
    step: Step, sequences: Sequence[Any], states: Sequence[Any], reverse: bool = False
) -> tuple[list[Any], list[Any]]:
    """Run ``step(slices, states) -> (outputs, new_states)`` over the first axis of `sequences`, inside a graph.

    All are flat lists of tensors. Returns the outputs, stacked along a new first axis in processing order, and the last
    states; a state keeps the floating dtype that it starts with. Raises ValueError if one changes its shape, or its
    dtype otherwise.
    """
    tensors = [v for v in [*sequences, *states] if isinstance(v, GraphTensor)]
    outer = active_graph() or tensors[0].graph
    sequences = [outer.as_input("scan", x) for x in sequences]
    states = [outer.as_input("scan", s) for s in states]
    body = _Body(outer, step, sequences, states)
    attributes = {"body": body, "sequences": len(sequences), "reverse": reverse, "keep": Keep()}
    *results, _ = outer.record(_scan, (*sequences, *states, *body.captured), attributes)
    count = len(body.outputs)
    return list(results[:count]), list(results[count:])
