"""What a layer keeps of its weights, and of its losses and updates with the condition of each."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from gpulayers.trace import GraphTensor, Node, StoredValue, ancestors
from gpulayers.trace.stored import read_stored

__all__ = ["Entry", "LossBook", "WeightBook", "reachable", "unique"]


def unique(values: Iterable[Any]) -> list[Any]:
    """Return each object once, in order."""
    return list({id(value): value for value in values}.values())


class WeightBook:
    """The variables of one layer, in order of creation, as they were made trainable or not."""

    def __init__(self) -> None:
        self.trainable: list[Any] = []
        self.non_trainable: list[Any] = []

    def add(self, variable: Any, trainable: bool) -> None:
        """Note a new or shared variable; it is trainable if it was asked for as such and was made so."""
        (self.trainable if trainable and variable.trainable else self.non_trainable).append(variable)

    def lists(self, layer_trainable: bool) -> tuple[list[Any], list[Any]]:
        """Return (trainable, non-trainable) for a layer that is trainable or not now."""
        if layer_trainable:
            return self.trainable, self.non_trainable
        return [], self.trainable + self.non_trainable


class Entry(NamedTuple):
    """A loss or update, and whether it depends on the inputs of a call."""

    value: Any
    conditional: bool


class LossBook:
    """Losses of one layer: tensors and functions, each with its condition; and its updates.

    `tensors` are symbolic and stay. `called` are the values of the last outermost eager call, the one numbered `call`;
    while there are any they stand in for the symbolic ones.
    """

    def __init__(self) -> None:
        self.tensors: list[Entry] = []
        self.called: list[Entry] = []
        self.call: int | None = None
        self.functions: list[tuple[Callable[[], Any], Entry | None]] = []
        self.updates: list[Entry] = []

    def add_function(self, function: Callable[[], Any], conditional: bool, value: Any = None) -> None:
        """Note a function; `value` is what it gave when it was added, in a graph."""
        self.functions.append((function, None if value is None else Entry(value, conditional)))

    def add_called(self, entry: Entry, call: int | None) -> None:
        """Note a loss of eager call number `call` (None: of no call); those of an earlier call are forgotten."""
        if call is not None and call != self.call:
            self.called.clear()
            self.call = call
        self.called.append(entry)

    def entries(self, evaluate: Callable[[Callable[[], Any]], Any]) -> list[Entry]:
        """Return all losses: first tensors, then functions, each in the order added; a None value is left out."""
        found = list(self.called or self.tensors)
        for function, at_add in self.functions:
            entry = at_add if at_add is not None else Entry(evaluate(function), False)
            if entry.value is not None:
                found.append(entry)
        return found

    def state(self) -> tuple[list[Entry], list[Entry], list[Entry]]:
        """Return what stands here of calls: for `go_back`."""
        return list(self.tensors), list(self.called), list(self.updates)

    def go_back(self, state: tuple[list[Entry], list[Entry], list[Entry]]) -> bool:
        """Forget what calls added since `state` was taken; say whether they added anything."""
        now = self.state()
        self.tensors, self.called, self.updates = map(list, state)
        return [[id(entry) for entry in part] for part in now] != [[id(entry) for entry in part] for part in state]

    def forget_call(self) -> None:
        """Forget the losses of the last eager call."""
        self.called.clear()


def reachable(entries: Iterable[Entry], inputs: list[Any]) -> list[Any]:
    """Return the conditional entries that are computed from any of `inputs` (tensors or variables)."""
    tensors = {id(value) for value in inputs if isinstance(value, GraphTensor)}
    stored = {id(value) for value in inputs if isinstance(value, StoredValue)}

    def depends(value: Any) -> bool:
        if not isinstance(value, GraphTensor | Node):
            return False
        return any(
            any(id(output) in tensors for output in node.outputs)
            or any(id(v) in tensors for v in node.inputs)
            or (node.operation is read_stored and id(node.attributes["stored"]) in stored)
            for node in ancestors([value])
        )

    return [entry.value for entry in entries if entry.conditional and depends(entry.value)]
