"""Modern wrappers of cells: RNNCellResidualWrapper, RNNCellDropoutWrapper, RNNCellDeviceWrapper, as ``tf.nn``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gpulayers import nest, serialization
from gpulayers.device import device as on_device
from gpulayers.device import parse_device
from gpulayers.dtypes import TensorShape
from gpulayers.errors import message
from gpulayers.layers.calling import signature_of
from gpulayers.layers.config_part import as_shape_structure
from gpulayers.layers.core import CoreLayer
from gpulayers.layers.modern import Layer
from gpulayers.layers.naming import unique_layer_name
from gpulayers.nn import registry
from gpulayers.nn.building import build_inside
from gpulayers.nn.dropout_maths import DropoutSettings, default_filter
from gpulayers.nn.fused import FusedCell, keeps
from gpulayers.nn.residual import apply_residual, check_addition, check_cell_depths, check_depths
from gpulayers.nn.states import cell_output_shape, initial_state, on_the_device, output_and_state, output_size_of
from gpulayers.trace import FunctionGraph
from gpulayers.trace.graph import new_placeholder

__all__ = ["RNNCellDeviceWrapper", "RNNCellDropoutWrapper", "RNNCellResidualWrapper"]

_FILTER = "dropout_state_filter_visitor"


class _CellWrapper(Layer):
    """What the modern wrappers share: they call the cell's `call`, and have its sizes and variables."""

    _short_name = "cell_wrapper"

    def __init__(self, cell: Any, *args: Any, **kwargs: Any) -> None:
        if not hasattr(cell, "call"):
            raise AttributeError(
                message(
                    type(self).__name__,
                    f"{type(cell).__name__!r} object has no attribute 'call'",
                    "a recurrent cell",
                    repr(cell),
                )
            )
        super().__init__(*args, **kwargs)
        self.cell = cell
        self._forwards_training = _takes_training(cell)

    def _settle_name(self, name: Any, kwargs: dict[str, Any]) -> None:
        self._name = name or unique_layer_name(self._short_name, zero_based=True)

    @property
    def state_size(self) -> Any:
        """The cell's `state_size`."""
        return self.cell.state_size

    @property
    def output_size(self) -> Any:
        """The cell's `output_size`, whatever the wrapper does to the output."""
        return self.cell.output_size

    def compute_output_shape(self, input_shape: Any) -> Any:
        """Return the shape (N, output_size) for inputs (N, D). TypeError for no shape, ValueError for an unknown D."""
        return cell_output_shape(self._name, input_shape, output_size_of(self.cell))

    def zero_state(self, batch_size: Any, dtype: Any) -> Any:
        """Return the cell's `zero_state`. Raises AttributeError for a modern cell, which has none."""
        return self.cell.zero_state(batch_size, dtype)

    def get_initial_state(self, inputs: Any = None, batch_size: Any = None, dtype: Any = None) -> Any:
        """Return zeros in the structure of `state_size`. Raises ValueError if batch size or dtype is not known."""
        return initial_state(self.state_size, inputs, batch_size, dtype)

    def build(self, input_shape: Any) -> None:
        """Build the cell, unless it is built already: its variables are never made anew."""
        shape = as_shape_structure(input_shape, self._name)
        self._check_depths(shape)
        build_inside(self.cell, shape, self.compute_dtype or "float32")
        self.built = True

    def _check_depths(self, shape: Any) -> None:
        check_cell_depths(self.cell, shape)

    def _run_cell(self, inputs: Any, state: Any, training: Any, keywords: dict[str, Any]) -> tuple[Any, Any]:
        if training is not None and self._forwards_training:
            keywords = {**keywords, "training": training}
        return output_and_state(self.cell, self.cell.call(inputs, on_the_device(state), **keywords))

    def get_config(self) -> dict[str, Any]:  # noqa: D102
        return {**super().get_config(), "cell": registry.cell_config(self.cell)}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None) -> Any:
        """Make a wrapper, and the cell in it, from the dictionary of `get_config`, which is not modified.

        `custom_objects`: classes and functions by name, besides the registered ones. Nothing is imported or executed
        because the dictionary names it. Raises ValueError for an unknown name, TypeError for code in place of a name.
        """
        settings = {**config, "cell": registry.make_cell(config["cell"], custom_objects)}
        return cls(**cls._read_settings(settings, custom_objects))

    @classmethod
    def _read_settings(cls, settings: dict[str, Any], custom_objects: dict[str, Any] | None) -> dict[str, Any]:
        return settings


def _takes_training(cell: Any) -> bool:
    signature = signature_of(cell.call)
    return signature.training or signature.keywords


class RNNCellResidualWrapper(_CellWrapper):
    """Add the inputs of a cell to its outputs: ``output = residual_fn(inputs, cell_output)``; the state is untouched.

    Parameters

    - `cell`: a recurrent cell of either family, or another wrapper.
    - `residual_fn`: function of the inputs and the raw outputs of the cell; None adds them, in any nested structure,
      without broadcasting.
    - others go to `gl.keras.layers.Layer`.

    ``wrapper(inputs, state)`` runs the cell's `call` and returns the output and the cell's new state. The variables
    are the cell's. A cell that is built already keeps its variables (TensorFlow makes them anew).
    `state_size` and `output_size` are the cell's.

    Raises AttributeError for a cell without `call`; at the call TypeError or ValueError if inputs and outputs differ in
    structure or shape, and whatever `residual_fn` raises.

    Source: ``tf.nn.RNNCellResidualWrapper``; Wu et al., Google's Neural Machine Translation System (2016), section 3.1.

    >>> import numpy as np, gpulayers as gl
    >>> wrapper = gl.nn.RNNCellResidualWrapper(gl.keras.layers.SimpleRNNCell(2, kernel_initializer="zeros"))
    >>> x = np.ones((1, 2), "float32")
    >>> wrapper(x, wrapper.get_initial_state(batch_size=1, dtype="float32"))[0]
    array([[1., 1.]], dtype=float32)
    """

    _short_name = "residual_wrapper"

    def __init__(self, cell: Any, residual_fn: Callable[[Any, Any], Any] | None = None, **kwargs: Any) -> None:
        super().__init__(cell, **kwargs)
        self._residual_fn = residual_fn

    def call(self, inputs: Any, state: Any, training: Any = None, **kwargs: Any) -> tuple[Any, Any]:
        """Return ``residual_fn(inputs, output)`` and the new state, of ``cell.call(inputs, state, ...)``."""
        cell = self.cell
        if self._residual_fn is None and not kwargs and isinstance(cell, FusedCell) and cell.fuses():
            if not isinstance(inputs, list | tuple | dict):
                width = cell.output_size  # type: ignore[attr-defined]
                if tuple(inputs.shape)[-1] != width:
                    check_depths(inputs.shape, (*tuple(inputs.shape)[:-1], width))
                return cell.advance(inputs, state, training, residual=True)
        output, new_state = self._run_cell(inputs, state, training, kwargs)
        return apply_residual(self._residual_fn, inputs, output), new_state

    def compute_output_shape(self, input_shape: Any) -> Any:
        """Return the shape of the output for inputs of a shape, or nested structure of shapes. Builds nothing.

        Raises TypeError for something that is no shape, ValueError for an unknown depth, or one that cannot be added.
        """
        shape = super().compute_output_shape(input_shape)
        if self._residual_fn is not None:
            inputs = as_shape_structure(input_shape, self._name)
            return _result_shape(self._residual_fn, inputs, shape, self.compute_dtype or "float32")
        own = as_shape_structure(input_shape, self._name)
        if not isinstance(own, TensorShape):
            return own
        nest.assert_same_structure(own, shape)
        check_depths(own, shape)
        return shape

    def _check_depths(self, shape: Any) -> None:
        super()._check_depths(shape)
        if self._residual_fn is None and keeps(self, "call"):
            check_addition(shape, self.cell)

    def _fused_form(self) -> tuple[Any, bool] | None:
        """Return the cell whose fused sequence computes this wrapper, and True: inputs are added. None if none does."""
        if self._residual_fn is None and keeps(self, "call"):
            if isinstance(self.cell, FusedCell) and self.cell.fuses():
                return self.cell, True
        return None

    def get_config(self) -> dict[str, Any]:
        """Return the configuration: `name`, `trainable`, `dtype`, `cell`, and the residual function if there is one.

        A function registered with `register_serializable` stands there by its name; any other as the object itself,
        which serves within the process and is refused by `serialization.to_json`. Raises ValueError for a
        `residual_fn` that cannot be called.
        """
        config = super().get_config()
        function = self._residual_fn
        if function is None:
            return config
        if not callable(function):
            raise ValueError(message(self._name, "residual_fn is not callable", "a function", repr(function)))
        name = serialization.registered_name(function)
        config["residual_fn"] = name or function
        config["residual_fn_type"] = "function" if name else "object"
        config["residual_fn_module"] = getattr(function, "__module__", None)
        return config

    @classmethod
    def _read_settings(cls, settings: dict[str, Any], custom_objects: dict[str, Any] | None) -> dict[str, Any]:
        settings.pop("residual_fn_module", None)
        kind = settings.pop("residual_fn_type", None)
        function = settings.get("residual_fn")
        if function is None or callable(function):
            return settings
        if kind not in (None, "function") or not isinstance(function, str):
            raise TypeError(
                message(
                    cls.__name__,
                    f"residual_fn of type {kind!r} is not read: code in a configuration is never executed",
                    "the name of a registered function",
                    type(function).__name__,
                    "Register the function with gl.keras.utils.register_serializable and write it again.",
                )
            )
        settings["residual_fn"] = registry.find_function(function, "residual_fn", custom_objects)
        return settings


def _result_shape(function: Callable[[Any, Any], Any], inputs: Any, output: TensorShape, dtype: Any) -> Any:
    """Return the shapes of what a residual function makes of values of these shapes, without any value."""
    graph = FunctionGraph()
    values, raw = nest.map_structure(
        lambda shape: new_placeholder(graph, dtype, shape, "shape_probe"), [inputs, output]
    )
    with graph.as_default():
        result = function(values, raw)
    return nest.map_structure(lambda value: TensorShape(value.shape), result)


class RNNCellDropoutWrapper(_CellWrapper):
    """Drop inputs, new states and outputs of a cell, at every step anew, in training and inference alike.

    Parameters

    - `cell`; `input_keep_prob`, `output_keep_prob`, `state_keep_prob`: probabilities of keeping, 1 drops nothing;
      what is kept is divided by them.
    - `variational_recurrent`: one mask for all steps, drawn at construction; needs `dtype`, and `input_size` if
      inputs are dropped.
    - `seed`; `dropout_state_filter_visitor`: function of a state or part of one, saying what is dropped (default: all
      but `c` of an `LSTMStateTuple`).

    Raises ValueError for a probability outside 0 to 1, missing `dtype` or `input_size`, and for a modern LSTMCell,
    which has dropout of its own; TypeError for a filter that cannot be called.
    Source: ``tf.nn.RNNCellDropoutWrapper``; Gal and Ghahramani 2016 for `variational_recurrent`.

    >>> import gpulayers as gl
    >>> gl.nn.RNNCellDropoutWrapper(gl.keras.layers.GRUCell(2), input_keep_prob=0.5).output_size
    2
    """

    _short_name = "dropout_wrapper"

    def __init__(
        self,
        cell: Any,
        input_keep_prob: Any = 1.0,
        output_keep_prob: Any = 1.0,
        state_keep_prob: Any = 1.0,
        variational_recurrent: bool = False,
        input_size: Any = None,
        dtype: Any = None,
        seed: int | None = None,
        dropout_state_filter_visitor: Callable[[Any], Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(cell, dtype=dtype, **kwargs)
        if registry.is_modern_lstm(cell):
            raise ValueError(
                message(
                    self._name,
                    "a modern LSTMCell does not work with a dropout wrapper",
                    do="Use LSTMCell(dropout=...).",
                )
            )
        self._dropout = DropoutSettings(
            self._name, input_keep_prob, output_keep_prob, state_keep_prob, variational_recurrent, input_size, dtype,
            seed, dropout_state_filter_visitor, cell,
        )  # fmt: skip
        self._variational, self._input_size = bool(variational_recurrent), input_size

    @property
    def wrapped_cell(self) -> Any:
        """The cell."""
        return self.cell

    def call(self, inputs: Any, state: Any, training: Any = None, **kwargs: Any) -> tuple[Any, Any]:
        """Run the cell with dropped inputs; return its dropped output and state."""
        return self._dropout.around(inputs, state, lambda i, s: self._run_cell(i, s, training, kwargs))

    def get_config(self) -> dict[str, Any]:  # noqa: D102
        return {**super().get_config(), **dropout_config(self._dropout, self._variational, self._input_size)}

    @classmethod
    def _read_settings(cls, settings: dict[str, Any], custom_objects: dict[str, Any] | None) -> dict[str, Any]:
        return read_dropout_config(settings, custom_objects)


def dropout_config(settings: DropoutSettings, variational: bool, input_size: Any) -> dict[str, Any]:
    """Return the configuration entries of a dropout wrapper."""
    visitor = settings.state_filter
    config = {f"{kind}_keep_prob": settings.keep[kind] for kind in ("input", "output", "state")}
    config |= {"variational_recurrent": variational, "input_size": input_size, "seed": settings.seed}
    if visitor is not default_filter:
        config[_FILTER] = registry.function_config(visitor)
    return config


def read_dropout_config(settings: dict[str, Any], custom_objects: dict[str, Any] | None) -> dict[str, Any]:
    """Return the constructor's arguments for a dropout wrapper's configuration: the filter's name gives the filter."""
    return {**settings, _FILTER: registry.find_function(settings.get(_FILTER), _FILTER, custom_objects)}


class RNNCellDeviceWrapper(_CellWrapper):
    """Run a cell, and make its zero state, on a device.

    Parameters: `cell`; `device`, as `gl.device` takes it; others go to `Layer`. Nothing moves between devices by
    itself: the inputs have to be there. Source: ``tf.nn.RNNCellDeviceWrapper``.

    >>> import gpulayers as gl
    >>> gl.nn.RNNCellDeviceWrapper(gl.keras.layers.GRUCell(2), "cpu").get_config()["device"]
    'cpu'
    """

    _short_name = "device_wrapper"

    def __init__(self, cell: Any, device: Any, **kwargs: Any) -> None:
        super().__init__(cell, **kwargs)
        self._device_name = device
        if isinstance(cell, CoreLayer):
            self._device = parse_device(device)

    @property
    def device(self) -> Any:
        """The device, as it was given."""
        return self._device_name

    def zero_state(self, batch_size: Any, dtype: Any) -> Any:
        """Return the cell's zero state, on the device."""
        with on_device(self._device_name):
            return self.cell.zero_state(batch_size, dtype)

    def get_initial_state(self, inputs: Any = None, batch_size: Any = None, dtype: Any = None) -> Any:
        """Return zeros in the structure of `state_size`, on the device."""
        with on_device(self._device_name):
            return super().get_initial_state(inputs, batch_size, dtype)

    def call(self, inputs: Any, state: Any, training: Any = None, **kwargs: Any) -> tuple[Any, Any]:
        """Run the cell on the device."""
        with on_device(self._device_name):
            return self._run_cell(inputs, state, training, kwargs)

    def get_config(self) -> dict[str, Any]:  # noqa: D102
        return {**super().get_config(), "device": str(self._device_name)}


registry.register_cells(RNNCellResidualWrapper, RNNCellDropoutWrapper, RNNCellDeviceWrapper)
