"""The legacy family: layers named and shared through variable scopes, as ``tf.layers``."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from gpulayers.errors import LayerError, StateError, message
from gpulayers.layers.calling import Signature
from gpulayers.layers.core import CoreLayer
from gpulayers.layers.naming import snake_case, unique_layer_name
from gpulayers.scopes import VariableScope, find_variable, variable_scope
from gpulayers.trace import GraphKeys, active_graph, recording_function

__all__ = ["LegacyLayer"]


class LegacyLayer(CoreLayer):
    """Base class of layers with variable scopes: ``gl.layers.Layer``.

    Subclasses override `build(input_shape)`, which makes variables with `add_variable`, and `call(inputs)`.

    Parameters
    - `trainable`: whether variables are made trainable; setting it later does not make those trainable that are not.
    - `name`: None for an automatic one; a `VariableScope` is taken as the scope's name.
    - `dtype`: of the variables; None takes the dtype of the first input or variable. Inputs are not cast.
    - `activity_regularizer`: function of each output, giving a loss divided by the batch size.
    - other keywords of ``tf.layers.Layer``; any else raises TypeError.

    Variables are named ``scope_name/variable:0``; the scope is settled at the first use and made unique within the
    variable scope in force then. In a graph, updates go to UPDATE_OPS and losses to REGULARIZATION_LOSSES. Sub-layers
    are not tracked. Source: ``tf.layers.Layer``.

    >>> import numpy as np, gpulayers as gl
    >>> class Scale(gl.layers.Layer):
    ...     def build(self, input_shape):
    ...         self.factor = self.add_variable("factor", input_shape[-1:], initializer="ones")
    ...     def call(self, inputs):
    ...         return inputs * self.factor
    >>> layer = Scale(name="scale")
    >>> layer(np.ones((1, 2), "float32"))
    array([[1., 1.]], dtype=float32)
    >>> [v.name for v in layer.variables]
    ['scale/factor:0']
    """

    _takes = frozenset({"_scope", "_reuse"})

    def _settle_name(self, name: Any, kwargs: dict[str, Any]) -> None:
        self._graph = active_graph()
        self._reuse = kwargs.get("_reuse")
        self._scope: VariableScope | None = None
        self._current_scope: VariableScope | None = None
        if isinstance(name, VariableScope):
            base_name, name = name.name, None
        elif name:
            base_name = name
        else:
            base_name, name = snake_case(type(self).__name__), None
        self._base_name = base_name
        self._name = name or unique_layer_name(snake_case(type(self).__name__), zero_based=False)
        scope = kwargs.get("_scope")
        if scope:
            with variable_scope(scope) as captured:
                self._scope = captured

    @property
    def scope_name(self) -> str:
        """Prefix of the variables' names. Raises ValueError before the layer is used for the first time."""
        if self._scope is None:
            raise LayerError(
                f'No name available for layer scope because the layer "{self._name}" has not been used yet. '
                "The scope name is determined the first time the layer instance is called."
            )
        return self._scope.name

    @property
    def graph(self) -> Any:
        """The graph the layer was used in. Raises RuntimeError in eager mode."""
        if self._graph is None:
            raise StateError("Layer.graph not supported when executing eagerly.")
        return self._graph

    def _settle_scope(self, scope: Any = None) -> None:
        if self._scope is not None:
            return
        self._graph = active_graph()
        if self._reuse:
            with variable_scope(scope if scope is not None else self._base_name) as captured:
                self._scope = captured
        else:
            with variable_scope(scope, default_name=self._base_name) as captured:
                self._scope = captured

    @contextlib.contextmanager
    def _opened(self) -> Iterator[VariableScope]:
        """Enter the layer's scope, for variables and for the names of operations."""
        reuse = True if self.built else self._reuse
        with variable_scope(self._scope, reuse=reuse, auxiliary_name_scope=False) as current:
            self._current_scope = current
            graph = active_graph()
            with graph.name_scope(current.original_name_scope) if graph is not None else contextlib.nullcontext():
                yield current

    def _around_call(self, signature: Signature, kwargs: dict[str, Any], symbolic: bool) -> Any:
        if self.built and not symbolic and not signature.scope and self._scope is not None:
            kwargs.pop("scope", None)
            return None  # names and sharing are settled; opening the scope would change nothing
        return self._in_scope(signature, kwargs)

    @contextlib.contextmanager
    def _in_scope(self, signature: Signature, kwargs: dict[str, Any]) -> Iterator[dict[str, Any]]:
        kwargs = dict(kwargs)
        self._settle_scope(kwargs.pop("scope", None))
        with self._opened() as current:
            if signature.scope:
                kwargs["scope"] = current
            yield kwargs

    def add_weight(self, name: str, shape: Any, *arguments: Any, **keywords: Any) -> Any:  # type: ignore[override]  # noqa: D102
        regularizer = keywords.get("regularizer", arguments[2] if len(arguments) > 2 else None)
        partitioner = keywords.get("partitioner", arguments[5] if len(arguments) > 5 else None)
        if partitioner is not None and regularizer is not None and active_graph() is None:
            raise StateError(
                message(self._name, "a partitioned variable with a regularizer cannot be made in eager mode")
            )
        return super().add_weight(name, shape, *arguments, **keywords)

    add_weight.__doc__ = CoreLayer.add_weight.__doc__

    def _makes_trainable(self, trainable: bool) -> bool:
        return trainable and self._trainable

    def _make_variable(self, **settings: Any) -> tuple[Any, bool]:
        self._settle_scope()
        autocast = settings.pop("autocast")
        with self._opened() as current:
            before = find_variable(f"{current.name}/{settings['name']}")
            variable = current.get_variable(**settings, experimental_autocast=autocast)
        return variable, variable is not before

    def _add_loss_function(self, function: Callable[[], Any], conditional: bool) -> None:
        value = None
        if active_graph() is not None and not recording_function():
            value = self._evaluate_loss(function)
            if value is not None:
                self._publish_loss(value)
        self._loss_book.add_function(function, conditional, value)

    def _publish_loss(self, loss: Any) -> None:
        graph = active_graph()
        if graph is not None:
            graph.add_to_collection(GraphKeys.REGULARIZATION_LOSSES, loss)

    def _finish_call(self) -> None:
        graph = active_graph()
        if graph is None:
            return
        collection = graph.get_collection_ref(GraphKeys.UPDATE_OPS)
        known = {id(update) for update in collection}
        collection += [update for update in self.updates if id(update) not in known]

    def _require_graph(self, what: str) -> None:
        if active_graph() is None and not self._node_book.nodes:
            raise StateError(f"Layer.{what} not supported when executing eagerly: layer {self._name}.")


# An automatic name is made of the class's name, and a legacy program's base class is called Layer.
LegacyLayer.__name__ = LegacyLayer.__qualname__ = "Layer"
