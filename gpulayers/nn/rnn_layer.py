"""RNN: run a cell, or a list of cells, over the time axis, as ``tf.keras.layers.RNN``."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpulayers import nest, ops
from gpulayers.device import asarray
from gpulayers.dtypes import TensorShape, as_dtype
from gpulayers.errors import LayerError, ShapeError, message
from gpulayers.layers.config_part import as_shape_structure
from gpulayers.layers.legacy import LegacyLayer
from gpulayers.layers.modern import Layer
from gpulayers.layers.spec import InputSpec
from gpulayers.nn import registry
from gpulayers.nn.building import build_cell
from gpulayers.nn.keywords import takes_keyword
from gpulayers.nn.stacked import StackedRNNCells
from gpulayers.nn.states import (
    as_tensor,
    batch_of,
    cell_name,
    on_the_device,
    output_size_of,
    require_cell,
    size_of,
    starting_state,
)
from gpulayers.nn.unroll import Run, is_symbolic, run_cell
from gpulayers.trace import as_value
from gpulayers.variables import Variable

__all__ = ["RNN"]


_FLAGS = (
    "return_sequences",
    "return_state",
    "go_backwards",
    "stateful",
    "unroll",
    "time_major",
    "zero_output_for_mask",
)


class _Kept:
    """The states that a stateful layer keeps between calls: variables that are not weights of the layer."""

    def __init__(self) -> None:
        self.variables: list[Variable] = []


class RNN(Layer):
    """Run a cell over sequences.

    Parameters

    - `cell`: a cell of either family, or a list of cells, which is stacked.
    - `return_sequences`: all outputs (N, T, U) rather than the last one (N, U).
    - `return_state`: return ``[output, state, ...]``.
    - `go_backwards`: read the sequence (and its mask) from the end; outputs come in processing order.
    - `stateful`: start from the states that the last call left, unless a call is given an `initial_state` (TensorFlow
      2.15 takes that only while the kept states are zero); needs a fixed batch size.
    - `unroll`: in a graph, record every step rather than a loop; needs a known time length.
    - `time_major`: the time axis comes first, in inputs, outputs and masks.
    - `zero_output_for_mask`: the output of a step that is masked is zero, not the previous output.
    - those of `Layer`.

    Called with inputs (N, T, ...), `mask` (N, T), `training`, `initial_state` (in the structure of the cell's
    `state_size`, or flat) and `constants`, one or a list, which are handed to the cell as a list. A list of inputs is
    ``[inputs, state, ...]``; nested inputs are a tuple or dictionary. Where the mask is false a row keeps its state and
    repeats its previous output, zeros before its first step. Without steps the outputs are empty, the states as given.

    Cells of this library run as one fused operation over the whole sequence, with or without a residual wrapper; any
    other cell is called step by step. Both give the same numbers.

    Raises ValueError: no `call` or `state_size`, inputs of rank below 3, states or a mask that do not fit, constants
    for a cell that takes none, a stateful layer without a fixed batch size or called with another one, unrolling over
    an unknown length, losses or updates of a cell in a graph's loop of unknown length, no steps where the last output
    is wanted.
    Source: ``tf.keras.layers.RNN``.

    >>> import numpy as np, gpulayers as gl
    >>> layer = gl.keras.layers.RNN(gl.nn.RNNCellResidualWrapper(gl.keras.layers.LSTMCell(3)), return_sequences=True)
    >>> layer(np.zeros((2, 5, 3), "float32")).shape
    (2, 5, 3)
    """

    def __init__(
        self,
        cell: Any,
        return_sequences: bool = False,
        return_state: bool = False,
        go_backwards: bool = False,
        stateful: bool = False,
        unroll: bool = False,
        time_major: bool = False,
        zero_output_for_mask: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if isinstance(cell, list | tuple):
            cell = StackedRNNCells(cell, dtype=self.dtype_policy)
        require_cell(cell, self._name, ("call", "state_size"), ValueError)
        self.cell = cell
        self.return_sequences, self.return_state = bool(return_sequences), bool(return_state)
        self.go_backwards, self.stateful, self.unroll = bool(go_backwards), bool(stateful), bool(unroll)
        self.time_major, self.zero_output_for_mask = bool(time_major), bool(zero_output_for_mask)
        self.supports_masking = True
        self.input_spec = InputSpec(min_ndim=3)
        self._kept = _Kept()

    # --- build --------------------------------------------------------------------------------------------------------

    def build(self, input_shape: Any) -> None:
        """Build the cell for one step of the inputs; a stateful layer makes its states here."""
        input_shape = as_shape_structure(input_shape, self._name)
        first = nest.flatten(input_shape)[0]
        if self.stateful:
            self._check_batch(first)
        steps = nest.map_structure(self._step_shape, input_shape)
        build_cell(self.cell, steps, self.compute_dtype or "float32")
        if self.stateful:
            self._make_states(first)
        self.built = True

    def _step_shape(self, shape: Any) -> TensorShape:
        dims = tuple(TensorShape(shape))
        return TensorShape((dims[1 if self.time_major else 0], *dims[2:]))

    def _check_batch(self, shape: TensorShape) -> None:
        if shape[1 if self.time_major else 0] is None:
            raise ShapeError(
                message(
                    self._name,
                    "If a RNN is stateful, it needs to know its batch size",
                    "a fixed first size of the inputs",
                    shape,
                    "Pass batch_input_shape to the layer, or give the Input a batch_size.",
                )
            )

    def _make_states(self, shape: TensorShape) -> None:
        batch = shape[1 if self.time_major else 0]
        dims: list[int | None] = [None] * len(shape)
        dims[1 if self.time_major else 0] = batch
        self.input_spec = InputSpec(shape=tuple(dims))
        self._kept.variables = [
            Variable(np.zeros((batch, *size_of(size))), trainable=False, name=f"{self._name}/state_{i}",
                     dtype=as_dtype(self.compute_dtype), shape=(batch, *size_of(size)), collections=())
            for i, size in enumerate(nest.flatten(self.cell.state_size))
        ]  # fmt: skip
        for variable in self._kept.variables:
            if not variable.initialized:
                variable.initialize()

    # --- call ---------------------------------------------------------------------------------------------------------

    def __call__(self, inputs: Any, initial_state: Any = None, constants: Any = None, **kwargs: Any) -> Any:
        """Run the layer; a list stands for ``[inputs, state, ...]``, whose inputs may be nested: a tuple is one input.

        Raises ValueError for states in a list and in `initial_state` at once.
        """
        if isinstance(inputs, list):
            inputs, *given = inputs
            if given and initial_state is not None:
                wrong = "the states come twice, in the list of inputs and as initial_state"
                raise LayerError(message(self._name, wrong, do="Give them in one place."))
            initial_state = given or initial_state
        if _is_made_of_numbers(kwargs.get("mask")):
            kwargs["mask"] = as_tensor(kwargs["mask"])
        if nest.is_nested(inputs) and not self.built:
            self.input_spec = nest.map_structure(lambda _: InputSpec(min_ndim=3), inputs)
        if initial_state is not None:
            kwargs["initial_state"] = initial_state
        if constants is not None:
            if not takes_keyword(self.cell, "constants"):
                wrong = f"the cell {cell_name(self.cell)} does not take constants"
                raise LayerError(message(self._name, wrong, "a cell whose call has the argument `constants`"))
            kwargs["constants"] = list(constants) if isinstance(constants, list | tuple) else [constants]
        if not self.built:
            self._check_before_build(inputs, kwargs.get("mask"), initial_state)
        return super().__call__(inputs, **kwargs)

    def _check_before_build(self, inputs: Any, mask: Any, initial_state: Any) -> None:
        """Refuse a mask and states that do not fit while nothing is built and no batch size is kept."""
        first = nest.flatten(inputs)[0]
        rank = TensorShape(getattr(first, "shape", ())).rank
        if rank is None or rank < 3:
            return  # the input spec says it
        self._fitting_mask(mask, inputs)
        if initial_state is not None:
            self._checked(nest.flatten(initial_state), tuple(first.shape)[1 if self.time_major else 0])

    def call(
        self, inputs: Any, mask: Any = None, training: Any = None, initial_state: Any = None, constants: Any = None
    ) -> Any:
        """Run the cell over `inputs`; see the class."""
        if self.unroll and tuple(nest.flatten(inputs)[0].shape)[0 if self.time_major else 1] is None:
            wrong = "Cannot unroll a RNN if the time dimension is undefined"
            raise ShapeError(message(self._name, wrong, do="Use unroll=False."))
        states = self._starting_states(inputs, initial_state)
        run = Run(
            self._time_major_mask(mask, inputs),
            training,
            self.zero_output_for_mask,
            self.go_backwards,
            self.unroll,
            {} if constants is None else {"constants": on_the_device(constants)},
            listed=not isinstance(self.cell, LegacyLayer),
        )
        x = inputs if self.time_major else nest.map_structure(_swapped, inputs)
        outputs, last = run_cell(self.cell, x, states, run)
        if self.stateful:
            self._keep(last)
        return self._result(outputs, last)

    def _result(self, outputs: Any, states: list[Any]) -> Any:
        if not self.return_sequences:
            if tuple(nest.flatten(outputs)[0].shape)[0] == 0:
                wrong = "the time axis is empty, so there is no last output"
                raise ShapeError(message(self._name, wrong, "at least one step", 0, "Use return_sequences=True."))
            result = nest.map_structure(lambda o: o[-1], outputs)
        else:
            result = outputs if self.time_major else nest.map_structure(_swapped, outputs)
        if not self.return_state:
            return result
        packed = nest.pack_sequence_as(self.cell.state_size, states)
        return [result, *(packed if nest.is_nested(packed) else [packed])]

    def _fitting_mask(self, mask: Any, inputs: Any) -> Any:
        """Return the mask as a tensor, None if there is none. Raises ShapeError for one that does not fit."""
        mask = next((m for m in nest.flatten(mask) if m is not None), None)
        if mask is None:
            return None
        mask = as_tensor(mask)
        expected = tuple(nest.flatten(inputs)[0].shape)[:2]
        if not TensorShape(mask.shape).is_compatible_with(expected):
            raise ShapeError(message(self._name, "the mask does not fit the inputs", expected, tuple(mask.shape)))
        return mask

    def _time_major_mask(self, mask: Any, inputs: Any) -> Any:
        mask = self._fitting_mask(mask, inputs)
        if mask is None:
            return None
        mask = mask if mask.dtype == bool else ops.cast(mask, bool)
        return mask if self.time_major else ops.transpose(mask)

    # --- states -------------------------------------------------------------------------------------------------------

    def get_initial_state(self, inputs: Any) -> list[Any]:
        """Return the list of states that the cell starts from, for `inputs` as the layer takes them."""
        batch, dtype = batch_of(inputs, 1 if self.time_major else 0), nest.flatten(inputs)[0].dtype
        state = starting_state(self.cell, None, batch, dtype)
        return list(state) if isinstance(state, list | tuple) else [state]

    def _starting_states(self, inputs: Any, given: Any) -> list[Any]:
        axis = 1 if self.time_major else 0
        if given is not None:
            return self._checked(nest.flatten(given), batch_of(inputs, axis))
        if self.stateful:
            return [v if is_symbolic(inputs) else v.read() for v in self._kept.variables]
        return nest.flatten(self.get_initial_state(inputs))

    def _checked(self, states: list[Any], batch: Any) -> list[Any]:
        sizes = nest.flatten(self.cell.state_size)
        states = [as_tensor(s) for s in on_the_device(states)]
        wanted = [(batch if isinstance(batch, int) else None, *size_of(size)) for size in sizes]
        shapes = [tuple(TensorShape(s.shape)) if TensorShape(s.shape).rank is not None else None for s in states]
        fits = len(states) == len(wanted) and all(
            TensorShape(shape).is_compatible_with(want) for shape, want in zip(shapes, wanted, strict=True)
        )
        if not fits:
            raise LayerError(
                f"{self._name}: An `initial_state` was passed that is not compatible with `cell.state_size`. "
                f"Expected states of shapes {wanted}; got {shapes}."
            )
        return states

    def _keep(self, last: list[Any]) -> None:
        if is_symbolic(last):
            for variable, value in zip(self._kept.variables, last, strict=True):
                self.add_update(variable.assign(value))
        else:
            self._store(last)

    def _store(self, values: list[Any]) -> None:
        """Keep these states: all of them, or none if one does not fit."""
        kept = self._kept.variables
        arrays = [variable.accept(value) for variable, value in zip(kept, values, strict=True)]
        for variable, array in zip(kept, arrays, strict=True):
            variable.store(array)

    @property
    def states(self) -> list[Any]:
        """The kept states of a stateful layer as arrays; None for each state otherwise."""
        if not self.stateful or not self._kept.variables:
            return [None] * len(nest.flatten(self.cell.state_size))
        return [variable.value for variable in self._kept.variables]

    def reset_states(self, states: Any = None) -> None:
        """Set the kept states: to zero, or to the given arrays, in the order of the cell's `state_size`.

        Raises AttributeError if the layer is not stateful, ValueError before it is built, or for another number of
        states or another shape; then no state is changed.
        """
        if not self.stateful:
            raise AttributeError(message(self._name, "Layer must be stateful", do="Make it with stateful=True."))
        kept = self._kept.variables
        if not kept:
            raise LayerError(
                message(self._name, "has no states yet", do="Call the layer, or build it with a batch size.")
            )
        given = [np.zeros(v.shape) for v in kept] if states is None else nest.flatten(states)
        if len(given) != len(kept):
            raise ValueError(
                message(self._name, f"Layer {self._name} expects {len(kept)} states", len(kept), len(given))
            )
        arrays = [asarray(as_value(value), device=self._device) for value in given]
        for index, (variable, array) in enumerate(zip(kept, arrays, strict=True)):
            if tuple(array.shape) != tuple(variable.shape):
                raise ValueError(
                    message(
                        self._name, f"State {index} is incompatible with the layer", tuple(variable.shape), array.shape
                    )
                )
        self._store(arrays)

    # --- shapes, masks, configuration ---------------------------------------------------------------------------------

    def compute_output_shape(self, input_shape: Any) -> Any:
        """Return the output shape, or with `return_state` the list of it and the states' shapes. Builds nothing.

        Raises TypeError for something that is no shape, ValueError for a rank below 3.
        """
        shape = nest.flatten(as_shape_structure(input_shape, self._name))[0]
        if shape.rank is None or shape.rank < 3:
            raise ShapeError(message(self._name, "not the shape of sequences", "rank 3 or more", shape))
        batch, time = (shape[1], shape[0]) if self.time_major else (shape[0], shape[1])
        states = [TensorShape((batch, *size_of(size))) for size in nest.flatten(self.cell.state_size)]
        leading: tuple[Any, ...] = (batch,)
        if self.return_sequences:
            leading = (time, batch) if self.time_major else (batch, time)
        output = nest.map_structure(lambda s: TensorShape((*leading, *size_of(s))), output_size_of(self.cell))
        return [output, *states] if self.return_state else output

    def compute_mask(self, inputs: Any, mask: Any = None) -> Any:
        """Return the mask of the outputs: the inputs' if they are sequences, none otherwise; none for states."""
        mask = next((m for m in nest.flatten(mask) if m is not None), None)
        own = mask if self.return_sequences else None
        return [own, *([None] * len(nest.flatten(self.cell.state_size)))] if self.return_state else own

    def get_config(self) -> dict[str, Any]:  # noqa: D102
        return {**super().get_config(), **self._flags(), "cell": registry.cell_config(self.cell)}

    def _flags(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _FLAGS}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None) -> Any:
        """Make the layer and its cell from the dictionary of `get_config`, which is not modified."""
        return cls(**{**config, "cell": registry.make_cell(config["cell"], custom_objects)})


def _is_made_of_numbers(mask: Any) -> bool:
    """Say whether a mask is lists of numbers, one mask, rather than a structure of masks."""
    leaves = nest.flatten(mask) if nest.is_nested(mask) else []
    return bool(leaves) and all(isinstance(one, bool | int | np.generic) for one in leaves)


def _swapped(x: Any) -> Any:
    return ops.swapaxes(x, 0, 1)
