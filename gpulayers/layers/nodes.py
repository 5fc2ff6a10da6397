"""The recorded calls of one layer, and the properties that ask about them."""

from __future__ import annotations

from typing import Any, NamedTuple

from gpulayers import nest
from gpulayers.layers.masks import mask_of

__all__ = ["CallNode", "History", "NodeBook"]


class CallNode(NamedTuple):
    """One call on graph tensors: what went in (first argument, the others) and what came out."""

    inputs: Any
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    outputs: Any


class History(NamedTuple):
    """Which call of which layer made a tensor."""

    layer: Any
    node_index: int
    tensor_index: int


def shape_tuple(tensor: Any) -> Any:
    """Return a shape as a tuple with None for unknown sizes; None for unknown rank."""
    rank = getattr(tensor.shape, "rank", len(tensor.shape) if isinstance(tensor.shape, tuple) else None)
    return None if rank is None else tuple(tensor.shape)


class NodeBook:
    """The calls of one layer, in order. `layer_name` is for messages."""

    def __init__(self) -> None:
        self.nodes: list[CallNode] = []

    def only(self, layer_name: str, what: str) -> Any:
        """Return the input or output of the single call."""
        if not self.nodes:
            text = "is not connected, no input to return." if what == "inputs" else "has no inbound nodes."
            raise AttributeError(f"Layer {layer_name} {text}")
        if len(self.nodes) > 1:
            kind = what[:-1]
            raise AttributeError(
                f'Layer "{layer_name}" has multiple inbound nodes, hence the notion of "layer {kind}" is ill-defined. '
                f"Use `get_{kind}_at(node_index)` instead."
            )
        return getattr(self.nodes[0], what)

    def only_shape(self, layer_name: str, what: str) -> Any:
        """Return the common input or output shape of all calls."""
        kind = what[:-1]
        if not self.nodes:
            if what == "inputs":
                raise AttributeError(
                    f'The layer "{layer_name}" has never been called and thus has no defined input shape. '
                    "Note that the `input_shape` property is only available for layers that have been called."
                )
            raise AttributeError("The layer has never been called and thus has no defined output shape.")
        shapes = [nest.map_structure(shape_tuple, getattr(node, what)) for node in self.nodes]
        if any(shape != shapes[0] for shape in shapes[1:]):
            raise AttributeError(
                f'The layer "{layer_name}" has multiple inbound nodes, with different {kind} shapes. Hence the notion '
                f'of "{kind} shape" is ill-defined for the layer. Use `get_{kind}_shape_at(node_index)` instead.'
            )
        return shapes[0]

    def at(self, index: int, what: str, described: str) -> Any:
        """Return the input or output of call `index`; negative counts from the end."""
        if not self.nodes:
            raise RuntimeError(f"The layer has never been called and thus has no defined {described}.")
        if index >= len(self.nodes):
            raise ValueError(
                f"Asked to get {described} at node {index}, but the layer has only {len(self.nodes)} inbound nodes."
            )
        return getattr(self.nodes[index], what)

    def masks(self, structure: Any) -> Any:
        """Return the masks that tensors carry."""
        return nest.map_structure(mask_of, structure)


