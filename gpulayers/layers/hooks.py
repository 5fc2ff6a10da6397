"""What the parts of a layer share, and the hooks in which the two families differ."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gpulayers.device import Device
from gpulayers.dtypes import Policy
from gpulayers.errors import message
from gpulayers.layers.books import LossBook, WeightBook
from gpulayers.layers.calling import Signature
from gpulayers.layers.naming import snake_case
from gpulayers.layers.nodes import NodeBook

__all__ = ["LayerHooks"]


class LayerHooks:
    """Attributes that `CoreLayer` sets, and hooks that a family fills in."""

    built: bool
    dtype: Any
    compute_dtype: Any
    stateful: bool
    supports_masking: bool
    activity_regularizer: Callable[[Any], Any] | None
    _name: str
    _trainable: bool
    _dynamic: bool
    _autocast: bool
    _device: Device
    _policy: Policy
    _weight_book: WeightBook
    _loss_book: LossBook
    _node_book: NodeBook
    _books_with_losses: list[LossBook]

    def _settle_name(self, name: Any, kwargs: dict[str, Any]) -> None:
        """Set `_name` (and what the family needs for scopes)."""
        self._name = name or snake_case(type(self).__name__)

    def _default_policy(self) -> Policy:
        """Return the policy of a layer that was given no dtype."""
        return Policy("_infer")

    def _around_call(self, signature: Signature, kwargs: dict[str, Any], symbolic: bool) -> Any:
        """Return a context around the call that yields the keywords to use, or None where nothing is needed."""
        return None

    def _add_loss_function(self, function: Callable[[], Any], conditional: bool) -> None:
        """Keep a loss that is a function."""
        self._loss_book.add_function(function, conditional)

    def _makes_trainable(self, trainable: bool) -> bool:
        """Say whether a variable asked for with `trainable` is trainable in this layer as it is now."""
        return trainable

    def _make_variable(self, **settings: Any) -> tuple[Any, bool]:
        """Make or share a variable; return it, and whether it is new."""
        raise TypeError(message(type(self).__name__, "belongs to no family of layers", do="Use a subclass of Layer."))

    def _children(self) -> list[Any]:
        """Return the tracked sub-layers."""
        return []

    def _attribute_variables(self) -> list[Any]:
        """Return variables that were assigned as attributes rather than made with `add_weight`."""
        return []

    def _forget_call_losses(self) -> None:
        """Forget what the last outermost eager call left behind."""
        for book in self._books_with_losses:
            book.forget_call()
        self._books_with_losses.clear()

    def _check_loss(self, loss: Any) -> None:
        """Refuse a loss that the family cannot keep."""

    def _publish_loss(self, loss: Any) -> None:
        """Tell the graph about a loss."""

    def _follow_metric(self, metric: Any, value: Any) -> None:
        """Update a metric at this call."""
        metric(value)

    def _own_outputs(self, inputs: Any, outputs: Any) -> Any:
        """Return outputs that may carry this layer's history."""
        return outputs

    def _shortcut(self, inputs: Any, training: Any) -> Callable[[Any], Any] | None:
        """Return a function that does what the call just made did, for an array like `inputs`; None if there is none.

        It is called where nothing records and nothing carries a mask, and may skip all checks that depend only on the
        kind of array, its shape and dtype, and `training`.
        """
        return None

    def _finish_call(self) -> None:
        """Do what the family does after a call that was recorded."""

    def _require_graph(self, what: str) -> None:
        """Raise where the family refuses `what` in eager mode."""
