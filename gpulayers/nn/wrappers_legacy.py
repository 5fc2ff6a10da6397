"""Legacy wrappers of cells: ResidualWrapper, DropoutWrapper, DeviceWrapper, as ``tf.nn.rnn_cell``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gpulayers.device import device as on_device
from gpulayers.device import parse_device
from gpulayers.dtypes import TensorShape
from gpulayers.errors import message
from gpulayers.layers.config_part import as_shape_structure
from gpulayers.nn import registry
from gpulayers.nn.building import build_cell
from gpulayers.nn.cells_legacy import RNNCell
from gpulayers.nn.dropout_maths import DropoutSettings
from gpulayers.nn.fused import FusedCell, keeps
from gpulayers.nn.residual import apply_residual, check_addition, check_cell_depths
from gpulayers.nn.states import output_and_state, require_cell, starting_state
from gpulayers.nn.wrappers import dropout_config, read_dropout_config

__all__ = ["DeviceWrapper", "DropoutWrapper", "ResidualWrapper"]


class _LegacyWrapper(RNNCell):
    """What the legacy wrappers share: they call the cell itself, own no variables and open no scope."""

    def __init__(self, cell: Any, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        needs = ("output_size", "state_size", "zero_state or get_initial_state", "__call__")
        require_cell(cell, "cell", needs)
        self.cell = cell

    def _build_as_cell(self, shape: Any, dtype: Any) -> None:
        self._check_depths(as_shape_structure(shape, self._name))
        build_cell(self.cell, shape, dtype)

    def _check_depths(self, shape: Any) -> None:
        check_cell_depths(self.cell, shape)

    @property
    def wrapped_cell(self) -> Any:
        """The cell."""
        return self.cell

    @property
    def state_size(self) -> Any:
        """The cell's."""
        return self.cell.state_size

    @property
    def output_size(self) -> Any:
        """The cell's."""
        return self.cell.output_size

    def zero_state(self, batch_size: Any, dtype: Any) -> Any:
        """Return the cell's zero state."""
        return self.cell.zero_state(batch_size, dtype)

    def get_initial_state(self, inputs: Any = None, batch_size: Any = None, dtype: Any = None) -> Any:
        """Return the cell's initial state."""
        return starting_state(self.cell, inputs, batch_size, dtype)

    def __call__(self, inputs: Any, state: Any, scope: Any = None) -> Any:  # type: ignore[override]
        """Run one step; `scope` is handed to the cell."""
        inputs = self._convert(inputs)
        keywords = {} if scope is None else {"scope": scope}
        return self._around_cell(inputs, state, lambda i, s: self.cell(i, s, **keywords))

    def call(self, inputs: Any, state: Any) -> Any:
        """Run one step."""
        return self(inputs, state)

    def _around_cell(self, inputs: Any, state: Any, cell: Callable[[Any, Any], Any]) -> Any:
        """Call `cell` and do what the wrapper is for."""
        return cell(inputs, state)

    def get_config(self) -> dict[str, Any]:  # noqa: D102
        return {**super().get_config(), "cell": registry.cell_config(self.cell)}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None) -> Any:
        """Make a wrapper of a configuration whose ``cell`` was replaced by a live cell. ValueError if it was not.

        `custom_objects`: functions by name, besides the registered ones.
        """
        if isinstance(config.get("cell"), dict):
            raise ValueError(
                message(cls.__name__, "the cell is a configuration", "a live cell", config["cell"].get("class_name"))
            )
        return cls(**cls._read_settings(config, custom_objects))

    @classmethod
    def _read_settings(cls, settings: dict[str, Any], custom_objects: dict[str, Any] | None) -> dict[str, Any]:
        return settings


class ResidualWrapper(_LegacyWrapper):
    """Add the inputs of a cell to its outputs: ``residual_fn(inputs, output)``; None adds, without broadcasting.

    Parameters: `cell`, checked here (TypeError lists what is missing); `residual_fn`. The variables are the cell's, in
    the cell's scope; `weights` of the wrapper is empty. Source: ``tf.nn.rnn_cell.ResidualWrapper``.
    """

    def __init__(self, cell: Any, residual_fn: Callable[[Any, Any], Any] | None = None, **kwargs: Any) -> None:
        super().__init__(cell, **kwargs)
        self._residual_fn = residual_fn

    def _around_cell(self, inputs: Any, state: Any, cell: Callable[[Any, Any], Any]) -> Any:
        if not getattr(self.cell, "built", True) and hasattr(inputs, "shape"):
            self._check_depths(TensorShape(inputs.shape))
        output, new_state = output_and_state(self.cell, cell(inputs, state))
        return apply_residual(self._residual_fn, inputs, output), new_state

    def _check_depths(self, shape: Any) -> None:
        super()._check_depths(shape)
        if self._residual_fn is None and keeps(self, "_around_cell"):
            check_addition(shape, self.cell)

    def _fused_form(self) -> tuple[Any, bool] | None:
        plain = keeps(self, "_around_cell") and self._residual_fn is None
        if plain and isinstance(self.cell, FusedCell) and self.cell.fuses():
            return self.cell, True
        return None

    def get_config(self) -> dict[str, Any]:  # noqa: D102
        config = super().get_config()
        if self._residual_fn is not None:
            config["residual_fn"] = registry.function_config(self._residual_fn)
        return config

    @classmethod
    def _read_settings(cls, settings: dict[str, Any], custom_objects: dict[str, Any] | None) -> dict[str, Any]:
        function = registry.find_function(settings.get("residual_fn"), "residual_fn", custom_objects)
        return {**settings, "residual_fn": function}


class DropoutWrapper(_LegacyWrapper):
    """Drop inputs, new states and outputs of a cell at every step.

    Parameters, errors and meaning as `gl.nn.RNNCellDropoutWrapper`. Source: ``tf.nn.rnn_cell.DropoutWrapper``.
    """

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

    def _around_cell(self, inputs: Any, state: Any, cell: Callable[[Any, Any], Any]) -> Any:
        return self._dropout.around(inputs, state, lambda i, s: output_and_state(self.cell, cell(i, s)))

    def get_config(self) -> dict[str, Any]:  # noqa: D102
        return {**super().get_config(), **dropout_config(self._dropout, self._variational, self._input_size)}

    @classmethod
    def _read_settings(cls, settings: dict[str, Any], custom_objects: dict[str, Any] | None) -> dict[str, Any]:
        return read_dropout_config(settings, custom_objects)


class DeviceWrapper(_LegacyWrapper):
    """Run a cell, and make its zero state, on a device. Source: ``tf.nn.rnn_cell.DeviceWrapper``."""

    def __init__(self, cell: Any, device: Any, **kwargs: Any) -> None:
        super().__init__(cell, **kwargs)
        self._device_name = device
        self._device = parse_device(device)

    def zero_state(self, batch_size: Any, dtype: Any) -> Any:
        """Return the cell's zero state, on the device."""
        with on_device(self._device_name):
            return self.cell.zero_state(batch_size, dtype)

    def get_initial_state(self, inputs: Any = None, batch_size: Any = None, dtype: Any = None) -> Any:
        """Return the cell's initial state, on the device."""
        with on_device(self._device_name):
            return super().get_initial_state(inputs, batch_size, dtype)

    def _around_cell(self, inputs: Any, state: Any, cell: Callable[[Any, Any], Any]) -> Any:
        with on_device(self._device_name):
            return cell(inputs, state)

    def get_config(self) -> dict[str, Any]:  # noqa: D102
        return {**super().get_config(), "device": str(self._device_name)}


registry.register_cells(ResidualWrapper, DropoutWrapper, DeviceWrapper, legacy=True)
