"""Run part of a graph: only the nodes that the targets need, in the order they were recorded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from gpulayers import ops
from gpulayers.trace.graph import Node
from gpulayers.trace.stored import read_stored
from gpulayers.trace.tensor import GraphTensor

__all__ = ["Plan", "ancestors", "execute", "replay_node"]


def ancestors(targets: Iterable[Any], stop: Iterable[GraphTensor] = ()) -> list[Node]:
    """Return the nodes that `targets` (tensors or nodes) need, in recorded order; tensors in `stop` are given."""
    given = {id(tensor) for tensor in stop}
    pending = [t for t in targets if isinstance(t, GraphTensor | Node) and id(t) not in given]
    found: dict[int, Node] = {}
    while pending:
        value = pending.pop()
        node = value.node if isinstance(value, GraphTensor) else value
        if id(node) in found:
            continue
        found[id(node)] = node
        pending += [v for v in node.inputs if isinstance(v, GraphTensor) and id(v) not in given]
        pending += node.control_inputs
    return sorted(found.values(), key=lambda node: node.order)


class Plan:
    """The nodes to run for some targets and feeds, and after which of them each value can be dropped."""

    __slots__ = ("last_use", "nodes", "targets")

    def __init__(self, targets: Sequence[Any], feeds: Iterable[GraphTensor]) -> None:
        self.targets = targets
        self.nodes = ancestors(targets, feeds)
        kept = {id(target) for target in targets}
        last: dict[int, int] = {}
        for step, node in enumerate(self.nodes):
            for value in node.inputs:
                if isinstance(value, GraphTensor) and id(value) not in kept:
                    last[id(value)] = step
        self.last_use: list[list[int]] = [[] for _ in self.nodes]
        for identity, step in last.items():
            self.last_use[step].append(identity)


def _run_node(node: Node, inputs: Sequence[Any]) -> Any:
    return node.operation.run(inputs, node.attributes)


def execute(
    plan: Plan, feeds: Mapping[GraphTensor, Any], run: Callable[[Node, Sequence[Any]], Any] = _run_node
) -> list[Any]:
    """Return the values of the plan's targets (None for nodes without output). `run` computes one node."""
    values: dict[int, Any] = {id(tensor): value for tensor, value in feeds.items()}
    for node, done in zip(plan.nodes, plan.last_use, strict=True):
        inputs = [values[id(v)] if isinstance(v, GraphTensor) else v for v in node.inputs]
        result = run(node, inputs)
        if len(node.outputs) == 1 and not isinstance(result, tuple | list):
            result = (result,)
        for output, value in zip(node.outputs, result or (), strict=False):
            if id(output) not in values:  # a fed output of a node that runs for another one keeps its feed
                values[id(output)] = value
        for identity in done:
            values.pop(identity, None)
    return [values[id(t)] if isinstance(t, GraphTensor) else None for t in plan.targets]


def replay_node(node: Node, inputs: Sequence[Any]) -> Any:
    """Run a node through its operation, so that tapes see it."""
    if node.operation is read_stored:
        stored = node.attributes["stored"]
        stored.lend()  # the value read here must survive an assignment that is replayed later
        return ops.identity(stored)  # as an operation, so that tapes watch the variable
    return node.operation(*inputs, **node.attributes)
