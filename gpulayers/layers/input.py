"""`Input`: where a model's symbolic computation begins."""

from __future__ import annotations

from typing import Any

from gpulayers.dtypes import as_dtype
from gpulayers.errors import LayerError, message
from gpulayers.layers.modern import Layer
from gpulayers.layers.naming import unique_layer_name
from gpulayers.layers.nodes import CallNode, History
from gpulayers.trace import GraphTensor, symbolic_graph
from gpulayers.trace.graph import new_placeholder

__all__ = ["Input", "InputLayer"]


class InputLayer(Layer):
    """The layer behind an `Input` tensor: it has no variables and hands its input on."""

    def __init__(self, batch_input_shape: Any, dtype: Any = None, name: str | None = None, **kwargs: Any) -> None:
        super().__init__(name=name, dtype=dtype, batch_input_shape=batch_input_shape, **kwargs)
        self.built = True

    def _settle_name(self, name: Any, kwargs: dict[str, Any]) -> None:
        if name is None:
            name = unique_layer_name("input", zero_based=False)
        self._name = name


def Input(  # noqa: N802  (TensorFlow's name)
    shape: Any = None,
    batch_size: int | None = None,
    name: str | None = None,
    dtype: Any = None,
    sparse: Any = None,
    tensor: Any = None,
    batch_shape: Any = None,
    **kwargs: Any,
) -> GraphTensor:
    """Return a symbolic tensor to call modern layers on, and to make a `Model` of.

    It belongs to no `Graph`, also inside ``with graph.as_default()``: sessions are fed by `gl.placeholder` (TensorFlow:
    it is a placeholder of the graph in force).

    Parameters: `shape`, without the batch axis; `batch_size`, None if it varies; `batch_shape`, instead of both;
    `dtype`, float32 by default; `name`, ``input_1`` and so on by default.
    Raises ValueError without a shape. Source: ``tf.keras.Input``; `sparse` and `tensor` have no meaning here.

    >>> import gpulayers as gl
    >>> x = gl.keras.Input((4,))
    >>> x.shape, x.dtype
    (TensorShape([None, 4]), dtype('float32'))
    """
    batch_shape = kwargs.get("batch_input_shape", batch_shape)
    if batch_shape is None:
        if shape is None:
            raise LayerError(message("Input", "has no shape", "shape=(...) without the batch axis, or batch_shape"))
        sizes = (shape,) if isinstance(shape, int) else tuple(shape)
        batch_shape = (batch_size, *sizes)
    layer = InputLayer(batch_shape, dtype=as_dtype(dtype or "float32").name, name=name)
    tensor = new_placeholder(symbolic_graph(), dtype or "float32", batch_shape, layer.name)
    layer._node_book.nodes.append(CallNode(tensor, (), {}, tensor))
    tensor._keras_history = History(layer, 0, 0)
    result: GraphTensor = tensor
    return result
