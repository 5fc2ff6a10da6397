"""The modern family: layers with a dtype policy, casting and tracked sub-layers, as ``tf.keras.layers``."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from gpulayers import nest, ops
from gpulayers.dtypes import Policy, global_policy
from gpulayers.errors import LayerError, message
from gpulayers.layers.calling import Signature, call_context
from gpulayers.layers.core import CoreLayer, children_of, variables_in
from gpulayers.layers.masks import mask_of, set_mask
from gpulayers.layers.naming import snake_case, unique_layer_name
from gpulayers.scopes import initial_value_maker
from gpulayers.trace import GraphTensor, active_graph, symbolic_graph
from gpulayers.trace.graph import check_scope_name
from gpulayers.variables import PartitionedVariable, PartitionInfo, Variable, part_extents, partition_counts

__all__ = ["Layer"]


class Layer(CoreLayer):
    """Base class of layers with a dtype policy: ``gl.keras.layers.Layer``.

    Subclasses override `build(input_shape)`, which makes variables with `add_weight`, and `call(inputs)`; layers and
    variables assigned as attributes are tracked.

    Parameters
    - `trainable`: whether variables are listed as trainable. Settable, and then set on sub-layers too.
    - `name`: None for an automatic one (``dense``, ``dense_1``, ...).
    - `dtype`: a dtype or `Policy`; None takes the global policy (float32). Floating inputs are cast to its compute
      dtype unless ``autocast=False``; variables are read in that dtype inside `call`.
    - `dynamic`: the layer runs Python that cannot be recorded.
    - other keywords of ``tf.keras.layers.Layer``; any else raises TypeError.

    Losses of an eager call last until the next outermost call. Source: ``tf.keras.layers.Layer``.

    >>> import numpy as np, gpulayers as gl
    >>> class Penalised(gl.keras.layers.Layer):
    ...     def call(self, inputs):
    ...         self.add_loss(gl.reduce_mean(inputs))
    ...         return inputs
    >>> layer = Penalised()
    >>> _ = layer(np.ones((2, 2)))
    >>> layer.losses
    [array(1., dtype=float32)]
    """

    _autocast_default = True

    def _settle_name(self, name: Any, kwargs: dict[str, Any]) -> None:
        if name is not None and not isinstance(name, str):
            raise TypeError(message(type(self).__name__, "name is of a wrong type", "a str", repr(name)))
        self._name = name or unique_layer_name(snake_case(type(self).__name__), zero_based=True)

    def _default_policy(self) -> Policy:
        return global_policy()

    def _around_call(self, signature: Signature, kwargs: dict[str, Any], symbolic: bool) -> Any:
        return self._in_name_scope(kwargs) if symbolic else None

    @contextlib.contextmanager
    def _in_name_scope(self, kwargs: dict[str, Any]) -> Iterator[dict[str, Any]]:
        if self._dynamic:
            self._refuse_dynamic()
        check_scope_name(self._name)
        with (active_graph() or symbolic_graph()).name_scope(self._name):
            yield kwargs

    def _refuse_dynamic(self) -> None:
        if type(self).compute_output_shape is CoreLayer.compute_output_shape:
            raise NotImplementedError(
                message(self._name, "a dynamic layer on a symbolic input must implement compute_output_shape")
            )

    def _make_variable(self, **settings: Any) -> tuple[Any, bool]:
        name = f"{call_context.name_prefix}{settings['name'] or 'variable'}"
        shape, dtype = settings["shape"], settings["dtype"]
        if not shape.is_fully_defined():
            raise LayerError(message(name, "Shape of a new variable must be fully defined", got=shape))
        common = {
            "trainable": settings["trainable"],
            "dtype": dtype,
            "constraint": settings["constraint"],
            "collections": settings["collections"],
            "autocast": settings["autocast"],
            "unique_name": False,
        }
        if not settings["partitioner"]:
            initial = initial_value_maker(settings["initializer"], tuple(shape), dtype)
            return Variable(initial, name=name, shape=shape, **common), True
        counts = partition_counts(settings["partitioner"], shape, dtype)
        parts = []
        for index, (part_shape, offset) in enumerate(part_extents(tuple(shape), counts)):
            initial = initial_value_maker(
                settings["initializer"], tuple(part_shape), dtype, PartitionInfo(tuple(shape), offset)
            )
            parts.append(Variable(initial, name=f"{name}/part_{index}", shape=part_shape, **common))
        return PartitionedVariable(name, tuple(shape), dtype, parts, counts), True

    def _children(self) -> list[Any]:
        return children_of(self)

    def _attribute_variables(self) -> list[Any]:
        return variables_in(self)

    def _check_loss(self, loss: Any) -> None:
        if call_context.depth == 0 and not isinstance(loss, GraphTensor):
            raise ValueError(
                f"{self._name}: Expected a symbolic Tensor or a callable for the loss value, outside `call`. "
                "Please wrap your loss computation in a zero argument `lambda`."
            )

    def _own_outputs(self, inputs: Any, outputs: Any) -> Any:
        # An input handed on unchanged would keep the history of the layer that made it, and the model would lose this
        # one.
        if active_graph() is not None:
            return outputs
        return _map_same(inputs, outputs)


def _map_same(inputs: Any, outputs: Any) -> Any:
    """Replace outputs that are inputs by copies that carry the same mask."""
    given = {id(x) for x in nest.flatten(inputs)}

    def one(value: Any) -> Any:
        if id(value) not in given or not isinstance(value, GraphTensor):
            return value
        copy = ops.identity(value)
        set_mask(copy, mask_of(value))
        return copy

    return nest.map_structure(one, outputs)
