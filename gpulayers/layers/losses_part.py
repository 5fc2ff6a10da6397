"""Losses, updates and metrics of a layer."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from gpulayers import nest, ops
from gpulayers.device import is_array
from gpulayers.errors import message
from gpulayers.layers.books import Entry, reachable, unique
from gpulayers.layers.calling import call_context
from gpulayers.layers.hooks import LayerHooks
from gpulayers.metrics import Mean, Metric
from gpulayers.ops.operation import Recordable
from gpulayers.trace import GraphTensor, Node, active_graph, autocast, recording_function

__all__ = ["LossesPart"]


class LossesPart(LayerHooks):
    """The part of a layer that keeps its losses, updates and metrics."""

    _metrics: list[Any]
    _metrics_lock: threading.Lock

    def add_loss(self, losses: Any, inputs: Any = None) -> None:
        """Add one loss or a nested list: tensors, arrays, numbers, functions without arguments, None (skipped).

        `inputs`: None marks them unconditional, anything else as depending on the inputs of a call (see
        `get_losses_for`). A function is evaluated whenever `losses` is read (in a graph: once, now), so that gradients
        reach variables. State written: `losses`; in a graph, a legacy layer's REGULARIZATION_LOSSES.
        """
        for loss in nest.flatten(losses):
            if loss is None or (call_context.probing and self.built):
                continue
            if callable(loss) and not isinstance(loss, Recordable):
                self._add_loss_function(loss, inputs is not None)
                continue
            loss = self._loss_value(loss)
            self._check_loss(loss)
            entry = Entry(loss, inputs is not None)
            if isinstance(loss, GraphTensor) and not recording_function():
                self._loss_book.tensors.append(entry)
            else:
                inside = call_context.depth > 0
                self._loss_book.add_called(entry, call_context.number if inside else None)
                (call_context.root if inside else self)._books_with_losses.append(self._loss_book)
            self._publish_loss(loss)

    def _evaluate_loss(self, function: Callable[[], Any]) -> Any:
        with autocast(None):
            return self._loss_value(function())

    def _loss_value(self, loss: Any) -> Any:
        """Return a loss as `losses` shows it: numbers as float32, and in a graph arrays as tensors."""
        if loss is None or isinstance(loss, Recordable) or (is_array(loss) and active_graph() is None):
            return loss
        if isinstance(loss, str | bytes):
            raise TypeError(message(self._name, "not a loss", "a tensor, array, number, function or None", repr(loss)))
        return ops.constant(loss, None if is_array(loss) else "float32")

    def _loss_entries(self) -> list[Entry]:
        entries = self._loss_book.entries(self._evaluate_loss)
        for child in self._children():
            entries += child._loss_entries()
        return entries

    @property
    def losses(self) -> list[Any]:
        """Losses added by the layer, its activity regularizer and its weights' regularizers, in this order.

        First tensor losses in the order added, then functions and regularizers; then those of tracked sub-layers.
        """
        return [entry.value for entry in self._loss_entries()]

    def add_update(self, updates: Any, inputs: Any = None) -> None:
        """Add an operation to be run with each training step: a node, tensor, or function that returns one.

        `inputs` as in `add_loss`. A function is called now. In eager mode and in `gl.function` the call is ignored, and
        functions are not called: variables are updated on the fly there (TensorFlow 2.15 does call them, against its
        documentation). State written: `updates`.
        """
        symbolic = any(isinstance(update, GraphTensor | Node) for update in nest.flatten(updates))
        if recording_function() or (active_graph() is None and not symbolic):
            return
        for update in nest.flatten(updates):
            if callable(update) and not isinstance(update, Recordable):
                update = update()
            if isinstance(update, GraphTensor | Node):
                self._loss_book.updates.append(Entry(update, inputs is not None))

    def _update_entries(self) -> list[Entry]:
        if not self._trainable and not self.stateful:
            return []
        entries = list(self._loss_book.updates)
        for child in self._children():
            entries += child._update_entries()
        return entries

    @property
    def updates(self) -> list[Any]:
        """Operations to run with each training step of a graph; empty if not trainable (and not `stateful`)."""
        return [entry.value for entry in self._update_entries()]

    def get_losses_for(self, inputs: Any) -> list[Any]:
        """Return the losses that are computed from `inputs`, or for None the unconditional ones.

        `inputs`: a tensor, variable, or list of them. Raises RuntimeError in eager mode for a legacy layer.
        """
        self._require_graph("get_losses_for")
        return _select(self._loss_entries(), inputs)

    def get_updates_for(self, inputs: Any) -> list[Any]:
        """Return the updates that are computed from `inputs`, or for None the unconditional ones; as
        `get_losses_for`.
        """
        self._require_graph("get_updates_for")
        return _select(self._update_entries(), inputs)

    @property
    def metrics(self) -> list[Any]:
        """Metric objects: own first (attributes, then those of `add_metric`), then those of tracked sub-layers."""
        found = self._attribute_metrics() + self._metrics
        for child in self._children():
            found += child.metrics
        return unique(found)

    def add_metric(self, value: Any, name: str | None = None, aggregation: str | None = None, **_: Any) -> None:
        """Follow a value over calls: a `Mean` metric called `name`, updated at each call.

        The result of a metric that is an attribute of the layer needs no name: that metric follows it already.
        Raises ValueError without a name otherwise, for an `aggregation` other than None and ``"mean"``, and in eager
        mode outside `call`, where there is no call to follow.
        """
        if aggregation not in (None, "mean"):
            raise ValueError(message(self._name, "unknown aggregation", "None or 'mean'", repr(aggregation)))
        if call_context.probing:
            return
        if name is None:
            if any(metric.last_result is value for metric in self._attribute_metrics()):
                return
            raise ValueError(
                f"{self._name}: Please provide a name for your metric like `self.add_metric(value, name='x')`."
            )
        if not isinstance(value, GraphTensor) and call_context.depth == 0:
            raise ValueError(
                f"{self._name}: Expected a symbolic Tensor for the metric value, received: {value!r}. "
                "Call add_metric inside `call`, or on a tensor that comes from Input."
            )
        with self._metrics_lock:
            found = next((m for m in self._metrics if m.name == name), None)
            if found is None:
                found = Mean(name=name)
                self._metrics.append(found)
        self._follow_metric(found, value)

    def _attribute_metrics(self) -> list[Any]:
        return [value for value in vars(self).values() if isinstance(value, Metric)]


def _select(entries: list[Entry], inputs: Any) -> list[Any]:
    if inputs is None:
        return [entry.value for entry in entries if not entry.conditional]
    return reachable(entries, nest.flatten(inputs))
