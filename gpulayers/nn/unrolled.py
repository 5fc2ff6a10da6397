"""dynamic_rnn and static_rnn: run a legacy or modern cell over sequences, in a variable scope, as ``tf.nn``."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpulayers import nest, ops
from gpulayers.device import is_array
from gpulayers.dtypes import TensorShape
from gpulayers.errors import DTypeError, LayerError, ShapeError, StructureError, message
from gpulayers.nn.building import build_cell
from gpulayers.nn.states import as_tensor, batch_of, check_states, require_cell, require_legacy_floating, starting_state
from gpulayers.nn.unroll import Run, run_cell
from gpulayers.ops.operation import Recordable
from gpulayers.ops.recurrent.operations import length_mask
from gpulayers.scopes import variable_scope

__all__ = ["dynamic_rnn", "static_rnn"]

_NEEDS = ("output_size", "state_size", "zero_state or get_initial_state", "__call__")


def dynamic_rnn(
    cell: Any,
    inputs: Any,
    sequence_length: Any = None,
    initial_state: Any = None,
    dtype: Any = None,
    parallel_iterations: int | None = None,
    swap_memory: bool = False,
    time_major: bool = False,
    scope: Any = None,
) -> tuple[Any, Any]:
    """Run `cell` over `inputs` (N, T, ...); return the outputs (N, T, U) and the last state.

    Parameters

    - `cell`: a cell of either family, wrapped or not; TypeError lists what an object lacks to be one.
    - `sequence_length`: integers (N,), 0 to T. From its length on a row's output is zero and its state is carried.
      Lengths that are on a GPU already are not read back: there one below 0 counts as 0, one beyond T as T.
    - `initial_state`, in the structure of ``cell.state_size``; or `dtype`, for a zero state. ValueError if neither.
    - `time_major`: inputs and outputs are (T, N, ...).
    - `scope`: name of the variable scope, ``"rnn"``.
    - `parallel_iterations` and `swap_memory` have no meaning here.

    Raises ValueError for a `sequence_length` of another rank or size, or on the host beyond T, inputs of rank below 2,
    and states that do not fit. Source: ``tf.compat.v1.nn.dynamic_rnn``.

    >>> import numpy as np, gpulayers as gl
    >>> cell = gl.nn.RNNCellResidualWrapper(gl.keras.layers.GRUCell(3))
    >>> outputs, state = gl.nn.dynamic_rnn(cell, np.ones((2, 4, 3), "float32"), sequence_length=[2, 0], dtype="float32")
    >>> float(abs(outputs[1]).sum()), outputs.shape, state.shape
    (0.0, (2, 4, 3), (2, 3))
    """
    require_cell(cell, "dynamic_rnn", _NEEDS)
    with variable_scope(scope if scope is not None else "rnn"):
        x = nest.map_structure(as_tensor, inputs)
        for leaf in nest.flatten(x):
            rank = TensorShape(leaf.shape).rank
            if rank is not None and rank < 2:
                raise ShapeError(
                    message("dynamic_rnn", "inputs have no time axis", "rank 2 or more", f"shape {leaf.shape}")
                )
        if not time_major:
            x = nest.map_structure(_swapped, x)
        outputs, state = _run(cell, x, sequence_length, initial_state, dtype, "dynamic_rnn")
        if not time_major:
            outputs = nest.map_structure(_swapped, outputs)
    return outputs, state


def static_rnn(
    cell: Any,
    inputs: Any,
    initial_state: Any = None,
    dtype: Any = None,
    sequence_length: Any = None,
    scope: Any = None,
) -> tuple[list[Any], Any]:
    """Run `cell` over a list of inputs (N, D), one for each step; return the list of outputs and the last state.

    Parameters as `dynamic_rnn`. Raises TypeError if `inputs` is no list, ValueError if it is empty.
    Source: ``tf.compat.v1.nn.static_rnn``.

    >>> import numpy as np, gpulayers as gl
    >>> outputs, state = gl.nn.static_rnn(gl.keras.layers.GRUCell(3), [np.ones((2, 3), "float32")] * 4, dtype="float32")
    >>> len(outputs), outputs[0].shape
    (4, (2, 3))
    """
    require_cell(cell, "static_rnn", _NEEDS)
    if not isinstance(inputs, list | tuple):
        raise TypeError(message("static_rnn", "inputs must be a sequence", "a list of tensors", type(inputs).__name__))
    if not inputs:
        raise ValueError(message("static_rnn", "inputs must not be empty"))
    with variable_scope(scope if scope is not None else "rnn"):
        steps = [nest.flatten(nest.map_structure(as_tensor, one)) for one in inputs]
        stacked = [ops.stack(list(column), 0) for column in zip(*steps, strict=True)]
        x = nest.pack_sequence_as(inputs[0], stacked)
        outputs, state = _run(cell, x, sequence_length, initial_state, dtype, "static_rnn")
        columns = [ops.unstack(leaf, 0, len(inputs)) for leaf in nest.flatten(outputs)]
    return [nest.pack_sequence_as(outputs, list(row)) for row in zip(*columns, strict=True)], state


def _run(cell: Any, x: Any, lengths: Any, state: Any, dtype: Any, name: str) -> tuple[Any, Any]:
    """Run over `x`, time first; states and lengths as the caller gave them."""
    first = nest.flatten(x)[0]
    if state is None and dtype is None:
        raise LayerError(message(name, "If there is no initial_state, you must give a dtype"))
    steps = nest.map_structure(lambda leaf: TensorShape(tuple(leaf.shape)[1:]), x)
    require_legacy_floating(name, first)
    mask = None if lengths is None else length_mask(_checked_lengths(lengths, first, name), first)
    batch = batch_of(x, 1)
    if state is None:
        states = nest.flatten(starting_state(cell, None, batch, dtype))
    else:
        _check_structure(cell, state, name)
        states = check_states(name, nest.flatten(state), cell.state_size, batch)
    build_cell(cell, steps, first.dtype)
    outputs, last = run_cell(cell, x, states, Run(mask, zero_output_for_mask=True))
    return outputs, nest.pack_sequence_as(cell.state_size, last)


def _check_structure(cell: Any, state: Any, name: str) -> None:
    if nest.is_nested(state) != nest.is_nested(cell.state_size) and len(nest.flatten(state)) != 1:
        raise StructureError(
            message(name, "the structure of initial_state does not fit", cell.state_size, repr(type(state)))
        )


def _checked_lengths(lengths: Any, x: Any, name: str) -> Any:
    """Return lengths as a tensor, after the checks that need no look at device data."""
    given = lengths
    if not (isinstance(lengths, Recordable) or is_array(lengths)):
        lengths = np.asarray(lengths)
        lengths = lengths if lengths.size else lengths.astype(np.int32)  # an empty list has no dtype
    if lengths.dtype.kind not in "iu":
        raise DTypeError(message(name, "sequence_length is not made of integers", "an integer dtype", lengths.dtype))
    time, batch = tuple(x.shape)[:2]
    shape = TensorShape(lengths.shape)
    if not shape.is_compatible_with((batch,)):
        raise ShapeError(
            message(name, "sequence_length must be a vector of length batch_size", f"shape ({batch},)", tuple(shape))
        )
    if (
        isinstance(lengths, np.ndarray)
        and lengths.size
        and (lengths.min() < 0 or (time is not None and lengths.max() > time))
    ):
        raise ShapeError(message(name, "sequence_length is beyond the time axis", f"0 to {time}", given))
    return as_tensor(lengths)


def _swapped(x: Any) -> Any:
    return ops.swapaxes(x, 0, 1)
