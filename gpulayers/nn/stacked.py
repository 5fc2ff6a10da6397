"""StackedRNNCells: modern cells one above the other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from gpulayers import nest
from gpulayers.dtypes import TensorShape
from gpulayers.errors import StructureError, message
from gpulayers.layers.calling import signature_of
from gpulayers.layers.config_part import as_shape_structure
from gpulayers.layers.modern import Layer
from gpulayers.nn import registry
from gpulayers.nn.building import build_cell
from gpulayers.nn.fused import keeps
from gpulayers.nn.keywords import takes_keyword
from gpulayers.nn.residual import check_cell_depths
from gpulayers.nn.states import (
    cell_output_shape,
    output_and_state,
    output_size_of,
    require_cell,
    size_of,
    starting_state,
)

__all__ = ["StackedRNNCells"]


class StackedRNNCells(Layer):
    """Cells one above the other, as one cell: the output of each is the input of the next.

    Parameters: `cells`, a list; `reverse_state_order` lists the states of the last cell first. `state_size` is the
    tuple of the cells'; `output_size` the last one's. Raises ValueError for a cell without `call` or `state_size`.
    Source: ``tf.keras.layers.StackedRNNCells``.

    >>> import gpulayers as gl
    >>> gl.keras.layers.StackedRNNCells([gl.keras.layers.GRUCell(2), gl.keras.layers.LSTMCell(3)]).state_size
    (2, [3, 3])
    """

    def __init__(self, cells: Any, reverse_state_order: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not cells:
            raise ValueError(message(self._name, "there are no cells", "at least one"))
        for cell in cells:
            require_cell(cell, self._name, ("call", "state_size"), ValueError)
        self.cells, self.reverse_state_order = list(cells), bool(reverse_state_order)

    @property
    def state_size(self) -> Any:
        """Tuple of the cells' sizes."""
        return tuple(cell.state_size for cell in self._in_state_order())

    @property
    def output_size(self) -> Any:
        """The last cell's."""
        return output_size_of(self.cells[-1])

    def _in_state_order(self) -> list[Any]:
        return self.cells[::-1] if self.reverse_state_order else self.cells

    def compute_output_shape(self, input_shape: Any) -> Any:
        """Return the shape (N, output_size) for inputs (N, D). TypeError for no shape, ValueError for an unknown D."""
        return cell_output_shape(self._name, input_shape, self.output_size)

    def get_initial_state(self, inputs: Any = None, batch_size: Any = None, dtype: Any = None) -> Any:
        """Return the tuple of the cells' initial states."""
        return tuple(starting_state(cell, inputs, batch_size, dtype) for cell in self._in_state_order())

    def build(self, input_shape: Any) -> None:
        """Build each cell for the output size of the one below."""
        self._check_depths(input_shape)
        for cell, shape in self._with_shapes(input_shape):
            build_cell(cell, shape, self.compute_dtype or "float32")
        self.built = True

    def _with_shapes(self, input_shape: Any) -> Iterator[tuple[Any, Any]]:
        """Give each cell with the shape of its inputs, lowest first."""
        shape = nest.flatten(as_shape_structure(input_shape, self._name))[0]
        for cell in self.cells:
            yield cell, shape
            shape = TensorShape((shape[0], *size_of(output_size_of(cell))))

    def _check_depths(self, shape: Any) -> None:
        for cell, own in self._with_shapes(shape):
            check_cell_depths(cell, own)

    def call(
        self, inputs: Any, states: Any, constants: Any = None, training: Any = None, **kwargs: Any
    ) -> tuple[Any, Any]:
        """Run the cells one after the other; return the last output and the new states, as `state_size` has them."""
        leaves = nest.flatten(states)
        if len(leaves) != len(nest.flatten(self.state_size)):
            raise StructureError(message(self._name, "the number of states does not fit", self.state_size, len(leaves)))
        own = list(nest.pack_sequence_as(self.state_size, leaves))
        own = own[::-1] if self.reverse_state_order else own
        current, new_states = inputs, []
        for cell, state in zip(self.cells, own, strict=True):
            nested = nest.is_nested(state)
            result = cell(current, state if nested else [state], **self._keywords(cell, constants, training, kwargs))
            current, new_state = output_and_state(cell, result)
            flat = nest.flatten(new_state)
            new_states.append(nest.pack_sequence_as(cell.state_size, flat))
        return current, tuple(new_states[::-1] if self.reverse_state_order else new_states)

    @staticmethod
    def _keywords(cell: Any, constants: Any, training: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        keywords = dict(kwargs)
        if training is not None and signature_of(getattr(cell, "call", cell)).training:
            keywords["training"] = training
        if constants is not None and takes_keyword(cell, "constants"):
            keywords["constants"] = constants
        return keywords

    def _fused_cells(self) -> list[Any] | None:
        """Return the cells, if running each over the whole sequence is the same as calling this one at each step."""
        plain = keeps(self, "call") and not self.reverse_state_order
        return self.cells if plain else None

    def get_config(self) -> dict[str, Any]:  # noqa: D102
        config = {**super().get_config(), "cells": [registry.cell_config(cell) for cell in self.cells]}
        return {**config, "reverse_state_order": True} if self.reverse_state_order else config

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None) -> Any:
        """Make the cells and stack them."""
        return cls(**{**config, "cells": [registry.make_cell(one, custom_objects) for one in config["cells"]]})


registry.register_cells(StackedRNNCells)
