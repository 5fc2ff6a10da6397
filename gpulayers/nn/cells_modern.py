"""Modern cells: SimpleRNNCell, GRUCell, LSTMCell, as ``tf.keras.layers``."""

from __future__ import annotations

from typing import Any

from gpulayers import constraints, initializers, nest, ops, regularizers, serialization
from gpulayers.errors import message
from gpulayers.layers.modern import Layer
from gpulayers.nn import registry
from gpulayers.nn.dropout_masks import Masks, draw_masks, held_masks
from gpulayers.nn.fused import FusedCell, Sequence, gate_name, is_tanh
from gpulayers.nn.states import (
    cast_states,
    cell_output_shape,
    check_states,
    initial_state,
    require_floating,
    step_batch,
    step_depth,
)
from gpulayers.ops import activations
from gpulayers.ops.recurrent.composed import composed_step
from gpulayers.ops.recurrent.operations import recurrent_sequence, recurrent_step

__all__ = ["GRUCell", "LSTMCell", "SimpleRNNCell", "activation_config", "get_activation"]

_WEIGHTS = ("kernel", "recurrent", "bias")


def get_activation(identifier: Any) -> Any:
    """Return an activation for its name, a registered name, a function or None."""
    if isinstance(identifier, str) and identifier not in activations._BY_NAME:
        return serialization.find(identifier, table=activations._BY_NAME, what="activation")
    return activations.get(identifier)


def activation_config(activation: Any) -> Any:
    """Return what stands for an activation in a configuration: its name, or the function where it has none."""
    name = activations.serialize(activation)
    if name in activations._BY_NAME and activations._BY_NAME[name] is activation:
        return name
    return serialization.registered_name(activation) or activation


class _ModernCell(FusedCell, Layer):
    """What the three cells share: variables, dropout, states, configuration."""

    _kind: str
    _gates: int
    kernel: Any
    recurrent_kernel: Any

    def __init__(self, units: int, options: dict[str, Any], kwargs: dict[str, Any]) -> None:
        implementation = kwargs.pop("implementation", 2)
        super().__init__(**kwargs)
        if units is None or int(units) <= 0:
            raise ValueError(
                message(self._name, "Received an invalid value for argument `units`", "a positive integer", units)
            )
        self.units = int(units)
        self.activation = get_activation(options["activation"])
        self.recurrent_activation = get_activation(options.get("recurrent_activation", "sigmoid"))
        self.use_bias = bool(options["use_bias"])
        for name in _WEIGHTS:
            setattr(self, f"{name}_initializer", initializers.get(options[f"{name}_initializer"]))
            setattr(self, f"{name}_regularizer", regularizers.get(options[f"{name}_regularizer"]))
            setattr(self, f"{name}_constraint", constraints.get(options[f"{name}_constraint"]))
        self.dropout = min(1.0, max(0.0, float(options["dropout"])))
        self.recurrent_dropout = min(1.0, max(0.0, float(options["recurrent_dropout"])))
        self._composed = implementation == 1  # asked for: plain operations instead of fused ones
        self.implementation = 1 if self.recurrent_dropout else implementation
        self.bias: Any = None

    @property
    def _drops(self) -> bool:
        """Whether it has dropout masks in training."""
        return bool(self.dropout or self.recurrent_dropout)

    def _fused_settings(self) -> dict[str, Any]:
        return {"recurrent_activation": gate_name(self.recurrent_activation)}

    @property
    def state_size(self) -> Any:
        """Width of the state."""
        return self.units

    @property
    def output_size(self) -> int:
        """Width of the output."""
        return self.units

    def build(self, input_shape: Any) -> None:
        """Make kernel (D, gates*U), recurrent_kernel (U, gates*U) and bias. ValueError for an unknown depth D."""
        depth = step_depth(self._name, input_shape)
        columns = self._gates * self.units
        self.kernel = self._weight("kernel", (depth, columns))
        self.recurrent_kernel = self._weight("recurrent_kernel", (self.units, columns))
        if self.use_bias:
            self.bias = self._weight("bias", self._bias_shape(), self._bias_initializer())
        self.built = True

    def _weight(self, name: str, shape: tuple[int, ...], initializer: Any = None) -> Any:
        which = "recurrent" if name == "recurrent_kernel" else name
        return self.add_weight(
            name,
            shape,
            initializer=initializer or getattr(self, f"{which}_initializer"),
            regularizer=getattr(self, f"{which}_regularizer"),
            constraint=getattr(self, f"{which}_constraint"),
        )

    def _bias_shape(self) -> tuple[int, ...]:
        return (self._gates * self.units,)

    def _bias_initializer(self) -> Any:
        return self.bias_initializer  # type: ignore[attr-defined]

    def compute_output_shape(self, input_shape: Any) -> Any:
        """Return the shape (N, output_size) for inputs (N, D). TypeError for no shape, ValueError for an unknown D."""
        return cell_output_shape(self._name, input_shape, self.output_size)

    def get_initial_state(self, inputs: Any = None, batch_size: Any = None, dtype: Any = None) -> Any:
        """Return zeros in the structure of `state_size`, for `inputs` (batch first) or for a batch size and dtype.

        Raises ValueError if neither says what they are.
        """
        return initial_state(self.state_size, inputs, batch_size, dtype)

    # --- one step -----------------------------------------------------------------------------------------------------

    def _settings_fuse(self) -> bool:
        return is_tanh(self.activation) and not self._composed and None not in self._fused_settings().values()

    def call(self, inputs: Any, states: Any, training: Any = None) -> tuple[Any, Any]:
        """Compute one step.

        `inputs` (N, D); `states`: a list of (N, U), or the tensor itself where there is one; `training` lets dropout
        act. Returns the output (N, U) and the new states, a list where a list was given.
        Raises ValueError for another number of states, or for widths that do not fit.
        """
        return self.advance(inputs, states, training, residual=False)

    def advance(self, inputs: Any, state: Any, training: Any, residual: bool) -> tuple[Any, Any]:  # noqa: D102
        require_floating(self._name, inputs)
        nested = nest.is_nested(state)
        flat = list(state) if isinstance(state, list | tuple) else nest.flatten(state)
        batch = step_batch(self._name, inputs)
        states = cast_states(check_states(self._name, flat, self.state_size, batch), inputs)
        masks = held_masks(self, lambda: self.sequence_masks(inputs, states, training)) if self._drops else (None, None)
        if masks[0] is None and masks[1] is None and self.fuses():
            output, states = recurrent_step(
                self._kind,
                inputs,
                states,
                self.kernel,
                self.recurrent_kernel,
                self.bias,
                residual=residual,
                **self._fused_settings(),
            )
        else:
            of_inputs, of_state = (None if m is None else ops.cast(m, inputs.dtype) for m in masks)
            entering = inputs if of_inputs is None else inputs * of_inputs
            output, states = self._compose(entering, states, of_state)
            output = inputs + output if residual else output
        return output, states if nested or len(states) > 1 else states[0]

    def _compose(self, x: Any, states: list[Any], recurrent_mask: Any) -> tuple[Any, list[Any]]:
        """Compute one step by plain operations: any activation."""
        entering = states[0] if recurrent_mask is None else states[0] * recurrent_mask
        options = {name: value for name, value in self._fused_settings().items() if name != "recurrent_activation"}
        new_states = composed_step(
            self._kind, x, states, entering, self.kernel, self.recurrent_kernel, self.bias, self.activation,
            self.recurrent_activation, **options,
        )  # fmt: skip
        return new_states[0], new_states

    # --- whole sequences ----------------------------------------------------------------------------------------------

    def sequence_masks(self, x: Any, states: list[Any], training: Any) -> Masks:  # noqa: D102
        if not self._drops:
            return None, None
        return draw_masks(x, states[0], training, self.dropout, self.recurrent_dropout)

    def run_sequence(self, x: Any, states: list[Any], how: Sequence) -> tuple[Any, list[Any]]:  # noqa: D102
        require_floating(self._name, x)
        settings = {**how.settings(), **self._fused_settings()}
        return recurrent_sequence(self._kind, x, states, self.kernel, self.recurrent_kernel, self.bias, **settings)

    # --- configuration ------------------------------------------------------------------------------------------------

    def get_config(self) -> dict[str, Any]:  # noqa: D102
        config = {**super().get_config(), "units": self.units, "activation": activation_config(self.activation)}
        if self._gates > 1:
            config["recurrent_activation"] = activation_config(self.recurrent_activation)
        config["use_bias"] = self.use_bias
        for kind, module in (("initializer", initializers), ("regularizer", regularizers), ("constraint", constraints)):
            for name in _WEIGHTS:
                config[f"{name}_{kind}"] = module.serialize(getattr(self, f"{name}_{kind}"))
        config.update(dropout=self.dropout, recurrent_dropout=self.recurrent_dropout)
        return {**config, **self._own_config()}

    def _own_config(self) -> dict[str, Any]:
        return {"implementation": self.implementation}


class SimpleRNNCell(_ModernCell):
    """Cell of the simple RNN: ``h' = tanh(x K + b + h R)``, the output is h'.

    Parameters: `units` U; `activation`; `use_bias`; `kernel_*`, `recurrent_*` and `bias_*` initializers, regularizers
    and constraints; `dropout` of the inputs and `recurrent_dropout` of the state, clamped to [0, 1], in training only;
    those of `Layer`. ``implementation=1`` computes by plain operations instead of fused ones.

    Variables: kernel (D, U), recurrent_kernel (U, U), bias (U). State: (N, U).
    Raises ValueError for ``units <= 0``. Source: ``tf.keras.layers.SimpleRNNCell``.

    >>> import numpy as np, gpulayers as gl
    >>> cell = gl.keras.layers.SimpleRNNCell(2, kernel_initializer="ones", recurrent_initializer="zeros")
    >>> output, state = cell(np.zeros((1, 3)), cell.get_initial_state(batch_size=1, dtype="float32"))
    >>> output
    array([[0., 0.]], dtype=float32)
    """

    _kind, _gates = "simple_rnn", 1

    def __init__(
        self,
        units: int,
        activation: Any = "tanh",
        use_bias: bool = True,
        kernel_initializer: Any = "glorot_uniform",
        recurrent_initializer: Any = "orthogonal",
        bias_initializer: Any = "zeros",
        kernel_regularizer: Any = None,
        recurrent_regularizer: Any = None,
        bias_regularizer: Any = None,
        kernel_constraint: Any = None,
        recurrent_constraint: Any = None,
        bias_constraint: Any = None,
        dropout: float = 0.0,
        recurrent_dropout: float = 0.0,
        **kwargs: Any,
    ) -> None:
        options = {key: value for key, value in locals().items() if key not in ("self", "kwargs", "__class__")}
        super().__init__(options.pop("units"), options, kwargs)

    def _fused_settings(self) -> dict[str, Any]:
        return {}


class GRUCell(_ModernCell):
    """Cell of the gated recurrent unit; columns z, r, h.

    With `reset_after` (bias (2, 3U)): ``a = x K + b0; c = h R + b1; z, r = sigma(a + c); n = tanh(a_h + r c_h)``;
    without (bias (3U)): ``n = tanh(a_h + (r h) R_h)``. In both ``h' = z h + (1 - z) n``, the output is h'.

    Parameters as `SimpleRNNCell`, and `recurrent_activation`, `reset_after`. PyTorch has the columns r, z, n and
    ``reset_after=True`` only. Source: Cho et al. 2014; ``tf.keras.layers.GRUCell``.

    >>> import numpy as np, gpulayers as gl
    >>> cell = gl.keras.layers.GRUCell(2, kernel_initializer="zeros", recurrent_initializer="zeros")
    >>> output, state = cell(np.zeros((1, 3)), np.ones((1, 2), "float32"))
    >>> output
    array([[0.5, 0.5]], dtype=float32)
    """

    _kind, _gates = "gru", 3

    def __init__(
        self,
        units: int,
        activation: Any = "tanh",
        recurrent_activation: Any = "sigmoid",
        use_bias: bool = True,
        kernel_initializer: Any = "glorot_uniform",
        recurrent_initializer: Any = "orthogonal",
        bias_initializer: Any = "zeros",
        kernel_regularizer: Any = None,
        recurrent_regularizer: Any = None,
        bias_regularizer: Any = None,
        kernel_constraint: Any = None,
        recurrent_constraint: Any = None,
        bias_constraint: Any = None,
        dropout: float = 0.0,
        recurrent_dropout: float = 0.0,
        reset_after: bool = True,
        **kwargs: Any,
    ) -> None:
        options = {key: value for key, value in locals().items() if key not in ("self", "kwargs", "__class__")}
        self.reset_after = bool(reset_after)
        super().__init__(options.pop("units"), options, kwargs)

    def _fused_settings(self) -> dict[str, Any]:
        return {**super()._fused_settings(), "reset_after": self.reset_after}

    def _bias_shape(self) -> tuple[int, ...]:
        return (2, 3 * self.units) if self.reset_after else (3 * self.units,)

    def _own_config(self) -> dict[str, Any]:
        return {**super()._own_config(), "reset_after": self.reset_after}


class LSTMCell(_ModernCell):
    """Cell of the long short-term memory; columns i, f, c, o.

    ``s = x K + h R + b; c' = sigma(s_f) c + sigma(s_i) tanh(s_c); h' = sigma(s_o) tanh(c')``, the output is h'.

    Parameters as `SimpleRNNCell`, and `recurrent_activation`; `unit_forget_bias` starts the bias of f at one.
    State: the list ``[h, c]``, (N, U) each. Source: Hochreiter and Schmidhuber 1997; ``tf.keras.layers.LSTMCell``.

    >>> import numpy as np, gpulayers as gl
    >>> cell = gl.keras.layers.LSTMCell(2)
    >>> output, (h, c) = cell(np.zeros((1, 3)), cell.get_initial_state(batch_size=1, dtype="float32"))
    >>> cell.bias.numpy()
    array([0., 0., 1., 1., 0., 0., 0., 0.], dtype=float32)
    """

    _kind, _gates = "lstm", 4

    def __init__(
        self,
        units: int,
        activation: Any = "tanh",
        recurrent_activation: Any = "sigmoid",
        use_bias: bool = True,
        kernel_initializer: Any = "glorot_uniform",
        recurrent_initializer: Any = "orthogonal",
        bias_initializer: Any = "zeros",
        unit_forget_bias: bool = True,
        kernel_regularizer: Any = None,
        recurrent_regularizer: Any = None,
        bias_regularizer: Any = None,
        kernel_constraint: Any = None,
        recurrent_constraint: Any = None,
        bias_constraint: Any = None,
        dropout: float = 0.0,
        recurrent_dropout: float = 0.0,
        **kwargs: Any,
    ) -> None:
        options = {key: value for key, value in locals().items() if key not in ("self", "kwargs", "__class__")}
        self.unit_forget_bias = bool(unit_forget_bias)
        super().__init__(options.pop("units"), options, kwargs)

    @property
    def state_size(self) -> Any:
        """Widths of h and c."""
        return [self.units, self.units]

    def _bias_initializer(self) -> Any:
        given, units = self.bias_initializer, self.units  # type: ignore[attr-defined]
        if not self.unit_forget_bias:
            return given

        def with_open_forget_gate(shape: Any, dtype: Any = None, **_: Any) -> Any:
            parts = (
                given((units,), dtype=dtype),
                initializers.Ones()((units,), dtype=dtype),
                given((2 * units,), dtype=dtype),
            )
            return ops.concatenate(parts, 0)

        return with_open_forget_gate

    def _own_config(self) -> dict[str, Any]:
        return {**super()._own_config(), "unit_forget_bias": self.unit_forget_bias}


registry.register_cells(SimpleRNNCell, GRUCell, LSTMCell)
