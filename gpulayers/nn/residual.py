"""The residual connection of the wrappers: the default function, and what makes a fused form possible."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gpulayers import nest
from gpulayers.dtypes import TensorShape
from gpulayers.errors import ShapeError
from gpulayers.nn.states import has_attribute, size_of
from gpulayers.ops.residual import residual_add

__all__ = ["add_inputs", "apply_residual", "check_addition", "check_cell_depths", "check_depths"]


def add_inputs(inputs: Any, outputs: Any) -> Any:
    """Return ``inputs + outputs``, leaf by leaf; nothing broadcasts.

    Raises TypeError if the containers differ in type, ValueError if the structures or two shapes differ.

    >>> import numpy as np
    >>> add_inputs([np.ones(2)], [np.ones(2)])
    [array([2., 2.])]
    """
    nest.assert_same_structure(inputs, outputs)
    left, right = nest.flatten(inputs), nest.flatten(outputs)
    for x, y in zip(left, right, strict=True):
        check_depths(x.shape, y.shape)
    return nest.pack_sequence_as(outputs, residual_add(left, right))


def check_depths(inputs: Any, outputs: Any) -> None:
    """Raise ShapeError unless tensors of these shapes can be added without broadcasting. Unknown sizes fit."""
    if not TensorShape(inputs).is_compatible_with(outputs):
        raise ShapeError(
            f"Shapes {TensorShape(inputs)} and {TensorShape(outputs)} are incompatible: the residual connection adds "
            "the cell's inputs to its outputs without broadcasting. Make the cell as wide as its inputs, or pass a "
            "residual_fn that projects, such as lambda inputs, outputs: gl.matmul(inputs, projection) + outputs."
        )


def check_cell_depths(cell: Any, shape: Any) -> None:
    """Raise ShapeError where a residual connection in `cell` cannot add inputs of `shape`: before anything is built."""
    check = getattr(cell, "_check_depths", None)
    if check is not None:
        check(shape)


def check_addition(shape: Any, cell: Any) -> None:
    """Raise ShapeError unless a tensor of `shape` fits the output of `cell`, as far as that is one known tensor."""
    size = cell.output_size if has_attribute(cell, "output_size") else None  # the width of a state would be a guess
    if size is None or nest.is_nested(size) or not isinstance(shape, TensorShape) or not shape.rank:
        return
    width = size_of(size)
    check_depths(shape, (*tuple(shape)[:-1], *width) if len(width) == 1 else (shape[0], *width))


def apply_residual(residual_fn: Callable[[Any, Any], Any] | None, inputs: Any, outputs: Any) -> Any:
    """Return ``residual_fn(inputs, outputs)``, or the sum if there is no function."""
    return add_inputs(inputs, outputs) if residual_fn is None else residual_fn(inputs, outputs)
