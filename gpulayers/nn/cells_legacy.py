"""Legacy cells: BasicRNNCell, GRUCell, BasicLSTMCell, LSTMCell, MultiRNNCell, as ``tf.nn.rnn_cell``."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np

from gpulayers import initializers, nest, ops
from gpulayers.dtypes import TensorShape
from gpulayers.errors import LayerError, ShapeError, StructureError, message
from gpulayers.layers.books import unique
from gpulayers.layers.legacy import LegacyLayer
from gpulayers.layers.spec import InputSpec
from gpulayers.nn import registry
from gpulayers.nn.building import build_cell
from gpulayers.nn.cells_modern import activation_config, get_activation
from gpulayers.nn.fused import FusedCell, Sequence, is_tanh, keeps
from gpulayers.nn.residual import check_cell_depths
from gpulayers.nn.states import (
    LSTMStateTuple,
    as_tensor,
    batch_and_dtype,
    cast_states,
    cell_output_shape,
    check_states,
    output_and_state,
    require_cell,
    require_legacy_floating,
    size_of,
    starting_state,
    step_batch,
    step_depth,
    zeros_for,
)
from gpulayers.ops.recurrent.operations import recurrent_sequence, recurrent_step
from gpulayers.scopes import variable_scope
from gpulayers.variables import fixed_size_partitioner

__all__ = ["BasicLSTMCell", "BasicRNNCell", "GRUCell", "LSTMCell", "MultiRNNCell", "RNNCell"]


class RNNCell(LegacyLayer):
    """Base class of legacy cells: a legacy layer called with inputs and state, returning output and new state.

    Subclasses give `state_size` and `output_size`, and override `call(inputs, state)`.
    Source: ``tf.nn.rnn_cell.RNNCell``.
    """

    def __call__(self, inputs: Any, state: Any, scope: Any = None, **kwargs: Any) -> Any:
        """Run one step; `scope` names the variables at the first call."""
        if scope is not None:
            kwargs["scope"] = scope
        return super().__call__(inputs, state, **kwargs)

    @property
    def state_size(self) -> Any:
        """Sizes of the state: an int, a shape, or a nested structure of them."""
        raise NotImplementedError(message(self._name, "does not say its state_size"))

    @property
    def output_size(self) -> Any:
        """Size of the output."""
        raise NotImplementedError(message(self._name, "does not say its output_size"))

    def compute_output_shape(self, input_shape: Any) -> Any:
        """Return the shape (N, output_size) for inputs (N, D). TypeError for no shape, ValueError for an unknown D."""
        return cell_output_shape(self._name, input_shape, self.output_size)

    def zero_state(self, batch_size: Any, dtype: Any) -> Any:
        """Return zeros in the structure of `state_size`."""
        return zeros_for(self.state_size, batch_size, dtype)

    def get_initial_state(self, inputs: Any = None, batch_size: Any = None, dtype: Any = None) -> Any:
        """Return `zero_state`, for `inputs` (batch first) or for `batch_size` and `dtype`.

        Raises ValueError if neither says what they are, or if they contradict.
        """
        if inputs is not None:
            first = nest.flatten(inputs)[0]
            static = tuple(first.shape)[0]
            if isinstance(batch_size, int) and static is not None and static != batch_size:
                raise ShapeError(
                    message(self._name, "batch size from input is different from batch_size", static, batch_size)
                )
            if dtype is not None and first.dtype != dtype:
                raise LayerError(message(self._name, "dtype from input is different from dtype", first.dtype, dtype))
        return self.zero_state(*batch_and_dtype(inputs, batch_size, dtype))


def _warn_of_legacy(cell: Any, stacklevel: int) -> None:
    text = f"{type(cell).__name__} is a legacy cell; the modern one is in gl.keras.layers."
    warnings.warn(text, DeprecationWarning, stacklevel=stacklevel)


class _BasicCell(FusedCell, RNNCell):
    """What the single cells share: checks of inputs, fused steps and sequences, one kernel over [inputs, state]."""

    _kind = "lstm"
    kernel: Any
    bias: Any

    def __init__(
        self, num_units: int, activation: Any, reuse: Any, name: Any, dtype: Any, kwargs: dict[str, Any]
    ) -> None:
        _warn_of_legacy(self, stacklevel=4)
        super().__init__(name=name, dtype=dtype, _reuse=reuse, **kwargs)
        self._num_units = int(num_units)
        self._activation = ops.tanh if activation is None else get_activation(activation)
        self.input_spec = InputSpec(ndim=2)

    @property
    def state_size(self) -> Any:
        """Width of the state."""
        return self._num_units

    @property
    def output_size(self) -> Any:
        """Width of the output."""
        return self._num_units

    def _build_for(self, inputs: Any) -> None:
        require_legacy_floating(self._name, inputs)
        super()._build_for(inputs)

    def _settings_fuse(self) -> bool:
        return is_tanh(self._activation)

    def call(self, inputs: Any, state: Any) -> tuple[Any, Any]:
        """Compute one step for `inputs` (N, D) and a state as `state_size` says; return output and new state."""
        return self.advance(inputs, state, None, residual=False)

    def advance(self, inputs: Any, state: Any, training: Any, residual: bool) -> tuple[Any, Any]:  # noqa: D102
        require_legacy_floating(self._name, inputs)
        batch = step_batch(self._name, inputs)
        states = cast_states(check_states(self._name, nest.flatten(state), self.state_size, batch), inputs)
        if self.fuses():
            output, new_states = self._fused(recurrent_step, inputs, states, {"residual": residual})
        else:
            output, new_states = self._compose(inputs, states)
            output = inputs + output if residual else output
        return output, nest.pack_sequence_as(self.state_size, new_states)

    def run_sequence(self, x: Any, states: list[Any], how: Sequence) -> tuple[Any, list[Any]]:  # noqa: D102
        require_legacy_floating(self._name, x)
        return self._fused(recurrent_sequence, x, states, how.settings())

    def _fused(self, run: Any, x: Any, states: list[Any], settings: dict[str, Any]) -> tuple[Any, list[Any]]:
        return run(self._kind, x, states, self.kernel, None, self.bias, **settings)

    def _compose(self, x: Any, states: list[Any]) -> tuple[Any, list[Any]]:
        raise TypeError(message(type(self).__name__, "does not say how to compute a step"))

    def get_config(self) -> dict[str, Any]:  # noqa: D102
        return {
            **super().get_config(),
            "num_units": self._num_units,
            "activation": activation_config(self._activation),
            "reuse": self._reuse,
        }


def _joined(x: Any, h: Any, kernel: Any, bias: Any) -> Any:
    """Return ``[x, h] K + b``."""
    return ops.matmul(ops.concatenate([x, h], -1), kernel) + bias


class BasicRNNCell(_BasicCell):
    """The simplest cell: ``h' = tanh([x, h] K + b)``, the output is h'.

    Parameters: `num_units` U; `activation` (None: tanh); `reuse` of variables; `name`; `dtype`.
    Variables: kernel (D + U, U), bias (U). Source: ``tf.nn.rnn_cell.BasicRNNCell``.
    """

    _kind = "simple_rnn"

    def __init__(
        self,
        num_units: int,
        activation: Any = None,
        reuse: Any = None,
        name: Any = None,
        dtype: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_units, activation, reuse, name, dtype, kwargs)

    def build(self, input_shape: Any) -> None:  # noqa: D102
        depth, units = step_depth(self._name, input_shape), self._num_units
        self.kernel = self.add_variable("kernel", (depth + units, units))
        self.bias = self.add_variable("bias", (units,), initializer="zeros")
        self.built = True

    def _compose(self, x: Any, states: list[Any]) -> tuple[Any, list[Any]]:
        new_h = self._activation(_joined(x, states[0], self.kernel, self.bias))
        return new_h, [new_h]


class GRUCell(_BasicCell):
    """Gated recurrent unit: ``r, u = sigma([x, h] Kg + bg); c = tanh([x, r h] Kc + bc); h' = u h + (1 - u) c``.

    Parameters: `num_units` U; `activation` (None: tanh); `reuse`; `kernel_initializer`; `bias_initializer` (None: ones
    for the gates, zeros for the candidate); `name`; `dtype`.
    Variables: gates/kernel (D + U, 2U), gates/bias (2U), candidate/kernel (D + U, U), candidate/bias (U).
    Source: Cho et al. 2014; ``tf.nn.rnn_cell.GRUCell``.
    """

    _kind = "gru"

    def __init__(
        self,
        num_units: int,
        activation: Any = None,
        reuse: Any = None,
        kernel_initializer: Any = None,
        bias_initializer: Any = None,
        name: Any = None,
        dtype: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_units, activation, reuse, name, dtype, kwargs)
        self._kernel_initializer = initializers.get(kernel_initializer)
        self._bias_initializer = initializers.get(bias_initializer)

    def build(self, input_shape: Any) -> None:  # noqa: D102
        rows, units = step_depth(self._name, input_shape) + self._num_units, self._num_units
        given, gate_bias = self._kernel_initializer, self._bias_initializer or "ones"
        self._gate_kernel = self.add_variable("gates/kernel", (rows, 2 * units), initializer=given)
        self._gate_bias = self.add_variable("gates/bias", (2 * units,), initializer=gate_bias)
        self._candidate_kernel = self.add_variable("candidate/kernel", (rows, units), initializer=given)
        self._candidate_bias = self.add_variable(
            "candidate/bias", (units,), initializer=self._bias_initializer or "zeros"
        )
        self.built = True

    def _fused(self, run: Any, x: Any, states: list[Any], settings: dict[str, Any]) -> tuple[Any, list[Any]]:
        if run is recurrent_step:  # joining the weights would cost more than it saves in one step
            output, new_states = self._compose(x, states)
            return (x + output if settings["residual"] else output), new_states
        reset, update = ops.split(self._gate_kernel, 2, -1)
        reset_bias, update_bias = ops.split(self._gate_bias, 2, -1)
        kernel = ops.concatenate([update, reset, self._candidate_kernel], -1)
        bias = ops.concatenate([update_bias, reset_bias, self._candidate_bias], -1)
        return run("gru", x, states, kernel, None, bias, reset_after=False, **settings)

    def _compose(self, x: Any, states: list[Any]) -> tuple[Any, list[Any]]:
        h = states[0]
        r, u = ops.split(ops.sigmoid(_joined(x, h, self._gate_kernel, self._gate_bias)), 2, -1)
        c = self._activation(_joined(x, r * h, self._candidate_kernel, self._candidate_bias))
        new_h = u * h + (1 - u) * c
        return new_h, [new_h]

    def get_config(self) -> dict[str, Any]:  # noqa: D102
        return {
            **super().get_config(),
            "kernel_initializer": initializers.serialize(self._kernel_initializer),
            "bias_initializer": initializers.serialize(self._bias_initializer),
        }


class _LegacyLSTM(_BasicCell):
    """What the two legacy LSTM cells share: the layout of their state, columns i, j, f, o."""

    _forget_bias: float
    _state_is_tuple: bool

    def _state_sizes(self) -> tuple[int, int]:
        """Widths of c and h."""
        return self._num_units, self._num_units

    @property
    def state_size(self) -> Any:
        """``LSTMStateTuple(c, h)`` of widths, or their sum if the state is one tensor."""
        sizes = self._state_sizes()
        return LSTMStateTuple(*sizes) if self._state_is_tuple else sum(sizes)

    def _apart(self, states: list[Any]) -> tuple[Any, Any]:
        if self._state_is_tuple:
            return states[0], states[1]
        c, h = ops.split(states[0], [self._state_sizes()[0]], -1)
        return c, h

    def _together(self, c: Any, h: Any) -> list[Any]:
        return [c, h] if self._state_is_tuple else [ops.concatenate([c, h], -1)]

    def _fused(self, run: Any, x: Any, states: list[Any], settings: dict[str, Any]) -> tuple[Any, list[Any]]:
        c, h = self._apart(states)
        output, (new_h, new_c) = run(
            "lstm",
            x,
            [h, c],
            self.kernel,
            None,
            self.bias,
            gate_order="ijfo",
            forget_bias=self._forget_bias,
            **settings,
        )
        return output, self._together(new_c, new_h)


class BasicLSTMCell(_LegacyLSTM):
    """LSTM: ``i, j, f, o = [x, h] K + b; c' = c sigma(f + forget_bias) + sigma(i) tanh(j); h' = tanh(c') sigma(o)``.

    Parameters: `num_units` U; `forget_bias`; `state_is_tuple`, False for one state ``[c, h]`` (N, 2U); `activation`
    (None: tanh); `reuse`; `name`; `dtype`. Variables: kernel (D + U, 4U), bias (4U, zeros).
    Source: Zaremba et al. 2014; ``tf.nn.rnn_cell.BasicLSTMCell``.
    """

    def __init__(
        self,
        num_units: int,
        forget_bias: float = 1.0,
        state_is_tuple: bool = True,
        activation: Any = None,
        reuse: Any = None,
        name: Any = None,
        dtype: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_units, activation, reuse, name, dtype, kwargs)
        self._forget_bias, self._state_is_tuple = forget_bias, bool(state_is_tuple)

    def build(self, input_shape: Any) -> None:  # noqa: D102
        depth, units = step_depth(self._name, input_shape), self._num_units
        self.kernel = self.add_variable("kernel", (depth + units, 4 * units))
        self.bias = self.add_variable("bias", (4 * units,), initializer="zeros")
        self.built = True

    def _compose(self, x: Any, states: list[Any]) -> tuple[Any, list[Any]]:
        c, h = self._apart(states)
        i, j, f, o = ops.split(_joined(x, h, self.kernel, self.bias), 4, -1)
        new_c = c * ops.sigmoid(ops.add(f, self._forget_bias)) + ops.sigmoid(i) * self._activation(j)
        new_h = self._activation(new_c) * ops.sigmoid(o)
        return new_h, self._together(new_c, new_h)

    def get_config(self) -> dict[str, Any]:  # noqa: D102
        return {**super().get_config(), "forget_bias": self._forget_bias, "state_is_tuple": self._state_is_tuple}


class LSTMCell(_LegacyLSTM):
    """LSTM with peepholes, clipping and projection.

    ``c' = sigma(f + forget_bias + wf c) c + sigma(i + wi c) tanh(j)``, clipped to `cell_clip`;
    ``h' = sigma(o + wo c') tanh(c')``, times the projection kernel (U, P) and clipped to `proj_clip`.

    Parameters: `num_units` U; `use_peepholes`; `cell_clip`; `initializer` of kernel, peepholes and projection;
    `num_proj` P; `proj_clip`; `num_unit_shards`, `num_proj_shards`: parts of the kernel and the projection kernel;
    `forget_bias`; `state_is_tuple`; `activation` (None: tanh); `reuse`; `name`; `dtype`.
    Variables: kernel (D + P, 4U), bias (4U), w_f_diag, w_i_diag, w_o_diag (U), projection/kernel.
    State: ``LSTMStateTuple(c, h)``, widths U and P. Source: Sak et al. 2014; ``tf.nn.rnn_cell.LSTMCell``.
    """

    def __init__(
        self,
        num_units: int,
        use_peepholes: bool = False,
        cell_clip: float | None = None,
        initializer: Any = None,
        num_proj: int | None = None,
        proj_clip: float | None = None,
        num_unit_shards: int | None = None,
        num_proj_shards: int | None = None,
        forget_bias: float = 1.0,
        state_is_tuple: bool = True,
        activation: Any = None,
        reuse: Any = None,
        name: Any = None,
        dtype: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_units, activation, reuse, name, dtype, kwargs)
        self._forget_bias, self._state_is_tuple = forget_bias, bool(state_is_tuple)
        self._use_peepholes, self._cell_clip = bool(use_peepholes), cell_clip
        self._num_proj, self._proj_clip = num_proj, proj_clip
        self._initializer_given = initializers.get(initializer)
        self._num_unit_shards, self._num_proj_shards = num_unit_shards, num_proj_shards

    def _state_sizes(self) -> tuple[int, int]:
        return self._num_units, self._num_proj or self._num_units

    @property
    def output_size(self) -> Any:
        """Width of the output: `num_proj` if given."""
        return self._num_proj or self._num_units

    def build(self, input_shape: Any) -> None:  # noqa: D102
        depth, units, given = step_depth(self._name, input_shape), self._num_units, self._initializer_given
        self.kernel = self.add_variable(
            "kernel",
            (depth + self.output_size, 4 * units),
            initializer=given,
            partitioner=_shards(self._num_unit_shards),
        )
        self.bias = self.add_variable("bias", (4 * units,), initializer="zeros")
        if self._use_peepholes:
            names = ("w_f_diag", "w_i_diag", "w_o_diag")
            self._w_f, self._w_i, self._w_o = (self.add_variable(n, (units,), initializer=given) for n in names)
        if self._num_proj:
            self._projection = self.add_variable(
                "projection/kernel",
                (units, self._num_proj),
                initializer=given,
                partitioner=_shards(self._num_proj_shards),
            )
        self.built = True

    def _settings_fuse(self) -> bool:
        return super()._settings_fuse() and not (self._use_peepholes or self._cell_clip or self._num_proj)

    def _compose(self, x: Any, states: list[Any]) -> tuple[Any, list[Any]]:
        c, h = self._apart(states)
        i, j, f, o = ops.split(_joined(x, h, self.kernel, self.bias), 4, -1)
        f = ops.add(f, self._forget_bias)  # with `+` a bfloat16 array and a number would make float32
        if self._use_peepholes:
            f, i = f + self._w_f * c, i + self._w_i * c
        new_c = ops.sigmoid(f) * c + ops.sigmoid(i) * self._activation(j)
        if self._cell_clip:
            new_c = ops.clip(new_c, -self._cell_clip, self._cell_clip)
        if self._use_peepholes:
            o = o + self._w_o * new_c
        new_h = ops.sigmoid(o) * self._activation(new_c)
        if self._num_proj:
            new_h = ops.matmul(new_h, self._projection)
            if self._proj_clip:
                new_h = ops.clip(new_h, -self._proj_clip, self._proj_clip)
        return new_h, self._together(new_c, new_h)

    def get_config(self) -> dict[str, Any]:  # noqa: D102
        return {
            **super().get_config(),
            "use_peepholes": self._use_peepholes,
            "cell_clip": self._cell_clip,
            "initializer": initializers.serialize(self._initializer_given),
            "num_proj": self._num_proj,
            "proj_clip": self._proj_clip,
            "num_unit_shards": self._num_unit_shards,
            "num_proj_shards": self._num_proj_shards,
            "forget_bias": self._forget_bias,
            "state_is_tuple": self._state_is_tuple,
        }


def _shards(count: int | None) -> Any:
    return None if count is None else fixed_size_partitioner(count)


class MultiRNNCell(RNNCell):
    """Cells one above the other: the output of each is the input of the next.

    Parameters: `cells`, a list or tuple, not empty; `state_is_tuple`, False for one state with all states side by side.
    `state_size` is the tuple of the cells' (or their sum), `output_size` the last one's. The variables of cell i lie in
    the scope ``cell_<i>``. Raises TypeError if `cells` is no list, ValueError if it is empty or a cell's state is a
    tuple where states are to lie side by side. Source: ``tf.nn.rnn_cell.MultiRNNCell``.
    """

    def __init__(self, cells: Any, state_is_tuple: bool = True, **kwargs: Any) -> None:
        _warn_of_legacy(self, stacklevel=3)
        super().__init__(**kwargs)
        if not isinstance(cells, list | tuple):
            raise TypeError(message(self._name, "cells is not a list", "a list or tuple of cells", repr(cells)))
        if not cells:
            raise ValueError(message(self._name, "Must specify at least one cell for MultiRNNCell"))
        for cell in cells:
            require_cell(cell, self._name, ("output_size", "state_size", "__call__"))
        if not state_is_tuple and any(nest.is_nested(cell.state_size) for cell in cells):
            raise ValueError(message(self._name, "Some cells return tuples of states, but state_is_tuple is not set"))
        self._cells, self._state_is_tuple = cells, bool(state_is_tuple)

    @property
    def cells(self) -> Any:
        """The cells, lowest first."""
        return self._cells

    @property
    def state_size(self) -> Any:
        """Tuple of the cells' sizes, or their sum."""
        if self._state_is_tuple:
            return tuple(cell.state_size for cell in self._cells)
        return sum(cell.state_size for cell in self._cells)

    @property
    def output_size(self) -> Any:
        """The last cell's."""
        return self._cells[-1].output_size

    def _weight_lists(self) -> tuple[list[Any], list[Any]]:
        trainable, fixed = super()._weight_lists()
        for cell in self._cells:  # a legacy layer does not track its sub-layers, but these variables are the stack's
            (trainable if self._trainable else fixed).extend(getattr(cell, "trainable_weights", []))
            fixed.extend(getattr(cell, "non_trainable_weights", []))
        return unique(trainable), unique(fixed)

    def zero_state(self, batch_size: Any, dtype: Any) -> Any:
        """Return the cells' zero states."""
        if self._state_is_tuple:
            return tuple(starting_state(cell, None, batch_size, dtype) for cell in self._cells)
        return super().zero_state(batch_size, dtype)

    def build(self, input_shape: Any) -> None:
        """Build the cells, each in its scope, for the output size of the one below."""
        self._check_depths(input_shape)
        for index, (cell, shape) in enumerate(self._with_shapes(input_shape)):
            with variable_scope(f"cell_{index}"):
                build_cell(cell, shape, np.dtype(self.dtype or "float32"))
        self.built = True

    def _with_shapes(self, input_shape: Any) -> Iterator[tuple[Any, TensorShape]]:
        """Give each cell with the shape of its inputs, lowest first."""
        shape = TensorShape(input_shape)
        for cell in self._cells:
            yield cell, shape
            shape = TensorShape((shape[0] if shape.rank else None, *size_of(cell.output_size)))

    def _check_depths(self, shape: Any) -> None:
        for cell, own in self._with_shapes(shape):
            check_cell_depths(cell, own)

    def _fused_cells(self) -> list[Any] | None:
        """Return the cells, if running each over the whole sequence is the same as calling this one at each step."""
        return list(self._cells) if self._state_is_tuple and keeps(self, "call") else None

    def _split_state(self, state: Any) -> list[Any]:
        if self._state_is_tuple:
            if not isinstance(state, list | tuple):
                wanted = f"a tuple of {len(self._cells)}"
                raise ValueError(message(self._name, "the state is not a tuple", wanted, type(state).__name__))
            if len(state) != len(self._cells):
                raise StructureError(message(self._name, "the number of states differs", len(self._cells), len(state)))
            return list(state)
        sizes = [cell.state_size for cell in self._cells]
        return ops.split(as_tensor(state), list(np.cumsum(sizes)[:-1]), -1)

    def call(self, inputs: Any, state: Any) -> tuple[Any, Any]:
        """Run the cells one after the other; returns the last output and the tuple of new states."""
        current, new_states = inputs, []
        for index, (cell, own) in enumerate(zip(self._cells, self._split_state(state), strict=True)):
            with variable_scope(f"cell_{index}"):
                current, new_state = output_and_state(cell, cell(current, own))
            new_states.append(new_state)
        return current, tuple(new_states) if self._state_is_tuple else ops.concatenate(new_states, 1)

    def get_config(self) -> dict[str, Any]:  # noqa: D102
        return {
            **super().get_config(),
            "cells": [registry.cell_config(cell) for cell in self._cells],
            "state_is_tuple": self._state_is_tuple,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None) -> Any:
        """Make the cells and join them."""
        return cls(**{**config, "cells": [registry.make_cell(one, custom_objects) for one in config["cells"]]})


registry.register_cells(BasicRNNCell, GRUCell, BasicLSTMCell, LSTMCell, MultiRNNCell, legacy=True)
