"""States of cells: their sizes, zeros of those sizes, and checks of what is passed in."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from gpulayers import nest, ops
from gpulayers.device import asarray, current_device, is_array
from gpulayers.dtypes import TensorShape, as_dtype, is_floating
from gpulayers.errors import DTypeError, LayerError, ShapeError, StructureError, message
from gpulayers.layers.config_part import as_shape_structure
from gpulayers.ops.operation import Recordable

__all__ = [
    "LSTMStateTuple",
    "batch_and_dtype",
    "cast_states",
    "cell_name",
    "cell_output_shape",
    "check_states",
    "has_attribute",
    "initial_state",
    "on_the_device",
    "output_and_state",
    "output_size_of",
    "require_cell",
    "require_floating",
    "require_legacy_floating",
    "size_of",
    "starting_state",
    "step_batch",
    "step_depth",
    "zeros_for",
]


class LSTMStateTuple(NamedTuple):
    """State of the legacy LSTM cells: the memory `c` and the output `h`, in this order.

    >>> LSTMStateTuple(c=1, h=2)
    LSTMStateTuple(c=1, h=2)
    """

    c: Any
    h: Any

    @property
    def dtype(self) -> Any:
        """Dtype of both. Raises TypeError if they differ."""
        if self.c.dtype != self.h.dtype:
            raise TypeError(message("LSTMStateTuple", "c and h have different dtypes", self.c.dtype, self.h.dtype))
        return self.c.dtype


def size_of(size: Any) -> tuple[int, ...]:
    """Return one state's shape without the batch axis, for an int or a shape.

    >>> size_of(3), size_of((2, 4))
    ((3,), (2, 4))
    """
    shape = TensorShape(size)
    if not shape.is_fully_defined():
        raise ShapeError(message("state_size", "is not fully known", got=shape))
    return tuple(shape)  # type: ignore[arg-type]


def require_floating(name: str, inputs: Any) -> None:
    """Raise DTypeError unless `inputs` are floating: results of a cell have the dtype of its inputs."""
    dtype = getattr(inputs, "dtype", None)
    if dtype is not None and not is_floating(dtype):
        wrong = "the inputs are not floating"
        raise DTypeError(message(name, wrong, "a floating dtype", dtype, 'Cast them: gl.cast(x, "float32").'))


def require_legacy_floating(name: str, inputs: Any) -> None:
    """Raise ValueError, as legacy cells do, unless `inputs` are floating."""
    dtype = getattr(inputs, "dtype", None)
    if dtype is not None and not is_floating(dtype):
        raise ValueError(f"{name}: RNN cell only supports floating point inputs, but saw dtype: {dtype}.")


def cast_states(states: list[Any], inputs: Any) -> list[Any]:
    """Return the states in the dtype of `inputs`: plain operations would compute in the wider one of the two."""
    dtype = getattr(inputs, "dtype", None)
    if dtype is None:
        return states
    return [s if s.dtype == dtype else ops.cast(s, dtype) for s in states]


def _map_sizes(function: Any, sizes: Any) -> Any:
    """Map over a structure of sizes, whose leaves are ints and shapes."""
    return nest.map_structure(lambda size: function(size_of(size)), sizes)


def zeros_for(state_size: Any, batch_size: Any, dtype: Any) -> Any:
    """Return zeros of shape ``[batch_size] + size`` in the structure of `state_size`. The batch may be a tensor."""
    return _map_sizes(lambda size: ops.zeros((batch_size, *size), as_dtype(dtype)), state_size)


def batch_of(inputs: Any, axis: int = 0) -> Any:
    """Return the size of the batch axis: an int, or a scalar tensor where it is not known yet."""
    first = nest.flatten(inputs)[0]
    static = tuple(first.shape)[axis]
    return ops.shape_of(first)[axis] if static is None else static


def batch_and_dtype(inputs: Any, batch_size: Any, dtype: Any) -> tuple[Any, Any]:
    """Return batch size and dtype of a state, for `inputs` (batch first) or for what is given.

    Raises ValueError if neither says what they are.
    """
    if inputs is not None:
        batch_size = batch_of(inputs)
        dtype = nest.flatten(inputs)[0].dtype
    if batch_size is None or dtype is None:
        raise LayerError(
            "get_initial_state: batch_size and dtype cannot be None while constructing initial state. "
            f"Expected both, or inputs; got batch_size={batch_size}, dtype={dtype}."
        )
    return batch_size, dtype


def initial_state(state_size: Any, inputs: Any = None, batch_size: Any = None, dtype: Any = None) -> Any:
    """Return the zero state of a cell; the arguments and errors of `batch_and_dtype`."""
    return zeros_for(state_size, *batch_and_dtype(inputs, batch_size, dtype))


def starting_state(cell: Any, inputs: Any = None, batch_size: Any = None, dtype: Any = None) -> Any:
    """Return the state that a cell starts from: what it says itself, or zeros in the structure of its `state_size`."""
    if hasattr(cell, "get_initial_state"):
        found = cell.get_initial_state(inputs=inputs, batch_size=batch_size, dtype=dtype)
        if found is not None:
            return found
    elif hasattr(cell, "zero_state"):
        return cell.zero_state(*batch_and_dtype(inputs, batch_size, dtype))
    return initial_state(cell.state_size, inputs, batch_size, dtype)


def as_tensor(value: Any) -> Any:
    """Return an array or tensor as it is, numbers and lists as an array."""
    return value if isinstance(value, Recordable) or is_array(value) else asarray(value)


def on_the_device(values: Any) -> Any:
    """Return a structure with its host arrays copied to the current device, as a layer's inputs are.

    On the host it is returned as it is: nothing is looked at.
    """
    if current_device().kind == "cpu":
        return values
    return nest.map_structure(lambda v: asarray(v) if isinstance(v, np.ndarray | np.generic) else v, values)


def output_size_of(cell: Any) -> Any:
    """Return the sizes of a cell's output: its `output_size`, or the width of its first state where it has none."""
    size = cell.output_size if has_attribute(cell, "output_size") else None
    return nest.flatten(cell.state_size)[0] if size is None else size


def output_and_state(cell: Any, result: Any) -> tuple[Any, Any]:
    """Return what a call of `cell` returned. Raises LayerError unless that is a pair."""
    if not isinstance(result, list | tuple) or len(result) != 2:
        wrong = "the cell did not return its output and its new state"
        raise LayerError(message(cell_name(cell), wrong, "a pair", type(result).__name__))
    return result[0], result[1]


def step_batch(name: str, inputs: Any) -> int | None:
    """Return the batch size of one step's inputs (N, D), None where it is unknown. ShapeError for another rank."""
    shape = getattr(inputs, "shape", None)
    if shape is not None and type(shape) is not tuple:
        shape = TensorShape(shape)
        if shape.rank is None:
            return None
    if shape is None or len(shape) != 2:
        got = type(inputs).__name__ if shape is None else tuple(shape)
        raise ShapeError(message(name, "the inputs are not those of one step", "one tensor (batch, depth)", got))
    return shape[0]


def step_depth(name: str, input_shape: Any) -> int:
    """Return the depth of one step's inputs of a shape (N, D). ShapeError where it is unknown or the rank is lower."""
    shape = TensorShape(input_shape)
    if shape.rank is not None and shape.rank < 2:
        raise ShapeError(message(name, "the inputs are not those of one step", "one tensor (batch, depth)", shape))
    if shape.rank is None or shape[-1] is None:
        wrong = "the depth of the inputs is unknown"
        raise ShapeError(f"{name}: {wrong}. Expected inputs.shape[-1] to be known, saw shape: {shape}.")
    return int(shape[-1])


def cell_output_shape(name: str, input_shape: Any, output_size: Any) -> Any:
    """Return the shape (N, output_size) of a cell's output for inputs of a shape (N, D); nested as `output_size` is.

    Raises TypeError for something that is no shape, ValueError for one without a known depth or of another rank.
    """
    shape = as_shape_structure(input_shape, name)
    if not isinstance(shape, TensorShape):
        shape = nest.flatten(shape)[0]
    if shape.rank is None or shape.rank < 2 or shape[-1] is None:
        raise ShapeError(message(name, "not the shape of one step", "(batch, depth), the depth known", shape))
    return _map_sizes(lambda size: TensorShape((shape[0], *size)), output_size)


def check_states(name: str, states: list[Any], sizes: Any, batch: Any = None) -> list[Any]:
    """Return the flat `states` as tensors, after checking their number and widths against `sizes`.

    Raises StructureError for another number of states, ShapeError for a state of another shape or batch size.
    """
    wanted = sizes if type(sizes) is list else nest.flatten(sizes)
    states = on_the_device(states)
    if len(states) == len(wanted) and all(_plainly_fits(*pair, batch) for pair in zip(states, wanted, strict=True)):
        return states
    if len(states) != len(wanted):
        raise StructureError(
            message(name, "the number of states does not fit", f"{len(wanted)} of sizes {wanted}", len(states))
        )
    states = [as_tensor(value) for value in states]
    for index, (value, size) in enumerate(zip(states, wanted, strict=True)):
        expected = (batch if isinstance(batch, int) else None, *size_of(size))
        shape = TensorShape(value.shape)
        if not shape.is_compatible_with(expected):
            raise ShapeError(message(name, f"the shape of state {index} does not fit", expected, tuple(shape)))
    return states


def _plainly_fits(value: Any, size: Any, batch: Any) -> bool:
    """Say, at the price of a look, that a state is an array or tensor (N, size). A `batch` of None fits any N."""
    if not (isinstance(value, Recordable) or is_array(value)) or type(size) is not int:
        return False
    shape = value.shape
    return type(shape) is tuple and len(shape) == 2 and shape[1] == size and (batch is None or shape[0] == batch)


def cell_name(cell: Any) -> str:
    """Return what to call a cell in a message: its name, or that of its class."""
    return getattr(cell, "name", None) or type(cell).__name__


def require_cell(cell: Any, name: str, needs: tuple[str, ...], error: type[Exception] = TypeError) -> None:
    """Raise `error`, listing what is missing, unless `cell` has all attributes in `needs` (``a or b``: one of them)."""
    missing = [need for need in needs if not any(has_attribute(cell, option) for option in need.split(" or "))]
    if missing:
        raise error(
            message(
                name,
                f"not a recurrent cell: {', '.join(missing)} is missing",
                f"an object with {', '.join(needs)}",
                repr(cell),
            )
        )


def has_attribute(cell: Any, attribute: str) -> bool:
    """Say whether a cell has an attribute; a property that only a base class has, to be filled in, does not count."""
    if attribute == "__call__":
        return callable(cell)
    try:
        return hasattr(cell, attribute)
    except NotImplementedError:
        return False
