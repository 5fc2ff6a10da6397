"""Recorded calls of a layer: `input`, `output`, their shapes and masks."""

from __future__ import annotations

from typing import Any

from gpulayers import nest
from gpulayers.layers.hooks import LayerHooks
from gpulayers.layers.nodes import shape_tuple

__all__ = ["NodesPart"]


class NodesPart(LayerHooks):
    """The part of a layer that answers for its recorded calls."""

    @property
    def input(self) -> Any:
        """Input of the layer's single recorded call. Raises AttributeError if there is none, or more than one."""
        self._require_graph("input")
        return self._node_book.only(self._name, "inputs")

    @property
    def output(self) -> Any:
        """Output of the layer's single recorded call. Raises AttributeError if there is none, or more than one."""
        self._require_graph("output")
        return self._node_book.only(self._name, "outputs")

    @property
    def input_shape(self) -> Any:
        """Input shape of all recorded calls, tuples with None. Raises AttributeError if there is none, or they
        differ.
        """
        self._require_graph("input_shape")
        return self._node_book.only_shape(self._name, "inputs")

    @property
    def output_shape(self) -> Any:
        """Output shape of all recorded calls. Raises AttributeError if there is none, or they differ."""
        self._require_graph("output_shape")
        return self._node_book.only_shape(self._name, "outputs")

    @property
    def input_mask(self) -> Any:
        """Mask of `input`, None where it has none."""
        return self._node_book.masks(self.input)

    @property
    def output_mask(self) -> Any:
        """Mask of `output`, None where it has none."""
        return self._node_book.masks(self.output)

    def get_input_at(self, node_index: int) -> Any:
        """Return the input of recorded call `node_index`.

        Raises RuntimeError if the layer has no recorded call, ValueError if it has fewer.
        """
        self._require_graph("get_input_at")
        return self._node_book.at(node_index, "inputs", "input")

    def get_output_at(self, node_index: int) -> Any:
        """Return the output of recorded call `node_index`; raises as `get_input_at`."""
        self._require_graph("get_output_at")
        return self._node_book.at(node_index, "outputs", "output")

    def get_input_shape_at(self, node_index: int) -> Any:
        """Return the input shape of recorded call `node_index`; raises as `get_input_at`."""
        self._require_graph("get_input_shape_at")
        return _shapes(self._node_book.at(node_index, "inputs", "input shape"))

    def get_output_shape_at(self, node_index: int) -> Any:
        """Return the output shape of recorded call `node_index`; raises as `get_input_at`."""
        self._require_graph("get_output_shape_at")
        return _shapes(self._node_book.at(node_index, "outputs", "output shape"))

    def get_input_mask_at(self, node_index: int) -> Any:
        """Return the mask of the input of recorded call `node_index`."""
        return self._node_book.masks(self.get_input_at(node_index))

    def get_output_mask_at(self, node_index: int) -> Any:
        """Return the mask of the output of recorded call `node_index`."""
        return self._node_book.masks(self.get_output_at(node_index))


def _shapes(structure: Any) -> Any:
    return nest.map_structure(shape_tuple, structure)
