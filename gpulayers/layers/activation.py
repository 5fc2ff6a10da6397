"""Activation functions as layers."""

from __future__ import annotations

from typing import Any

from gpulayers import ops
from gpulayers.errors import LayerError, message
from gpulayers.layers.config_part import as_shape_structure
from gpulayers.layers.modern import Layer

__all__ = ["ELU", "Activation", "LeakyReLU", "ReLU", "Softmax"]


class _Elementwise(Layer):
    """A layer whose result has the shape of its input, and its mask."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.supports_masking = True

    def compute_output_shape(self, input_shape: Any) -> Any:
        """Return `input_shape` as a `TensorShape`. Raises TypeError for something that is no shape."""
        return as_shape_structure(input_shape, self._name)


class Activation(_Elementwise):
    """``activation(x)``: ``gl.keras.layers.Activation``.

    `activation`: a name of `gl.keras.activations`, or a function. Raises ValueError for an unknown name.
    Source: ``tf.keras.layers.Activation``.

    >>> import numpy as np, gpulayers as gl
    >>> gl.keras.layers.Activation("relu")(np.array([-1.0, 2.0], "float32"))
    array([0., 2.], dtype=float32)
    """

    def __init__(self, activation: Any, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.activation = ops.activations.get(activation)

    def call(self, inputs: Any) -> Any:
        """Apply the function."""
        return self.activation(inputs)

    def get_config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {**super().get_config(), "activation": ops.activations.serialize(self.activation)}


class ReLU(_Elementwise):
    """``min(x, max_value)`` where ``x >= threshold``, else ``negative_slope * (x - threshold)``.

    Raises ValueError for a negative argument. Source: ``tf.keras.layers.ReLU``.

    >>> import numpy as np, gpulayers as gl
    >>> gl.keras.layers.ReLU(max_value=1.5)(np.array([-1.0, 1.0, 2.0], "float32"))
    array([0. , 1. , 1.5], dtype=float32)
    """

    def __init__(
        self, max_value: float | None = None, negative_slope: float = 0.0, threshold: float = 0.0, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        settings = {"max_value": max_value, "negative_slope": negative_slope, "threshold": threshold}
        for what, value in settings.items():
            if (value is None and what != "max_value") or (value is not None and value < 0):
                raise LayerError(message(self._name, f"{what} cannot be used", "0 or more", value))
        self.max_value, self.negative_slope, self.threshold = max_value, negative_slope, threshold

    def call(self, inputs: Any) -> Any:
        """Apply the function."""
        if not self.negative_slope and not self.threshold:
            rising = ops.relu(inputs)
        else:
            below = ops.multiply(ops.subtract(inputs, self.threshold), self.negative_slope)
            rising = ops.where(ops.greater_equal(inputs, self.threshold), inputs, below)
        return rising if self.max_value is None else ops.minimum(rising, self.max_value)

    def get_config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        own = {"max_value": self.max_value, "negative_slope": self.negative_slope, "threshold": self.threshold}
        return {**super().get_config(), **own}


class LeakyReLU(_Elementwise):
    """``x`` where positive, else ``alpha * x``. Source: ``tf.keras.layers.LeakyReLU``.

    >>> import numpy as np, gpulayers as gl
    >>> gl.keras.layers.LeakyReLU(0.5)(np.array([-1.0, 2.0], "float32"))
    array([-0.5,  2. ], dtype=float32)
    """

    def __init__(self, alpha: float = 0.3, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if alpha is None:
            raise LayerError(message(self._name, "alpha is None", "a number"))
        self.alpha = float(alpha)

    def call(self, inputs: Any) -> Any:
        """Apply the function."""
        return ops.leaky_relu(inputs, self.alpha)

    def get_config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {**super().get_config(), "alpha": self.alpha}


class ELU(_Elementwise):
    """``x`` where positive, else ``alpha * (exp(x) - 1)``. Source: ``tf.keras.layers.ELU``."""

    def __init__(self, alpha: float = 1.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if alpha is None:
            raise LayerError(message(self._name, "alpha is None", "a number"))
        self.alpha = float(alpha)

    def call(self, inputs: Any) -> Any:
        """Apply the function."""
        return ops.elu(inputs, self.alpha)

    def get_config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {**super().get_config(), "alpha": self.alpha}


class Softmax(_Elementwise):
    """``exp(x)`` divided by its sum along `axis`. Source: ``tf.keras.layers.Softmax``.

    >>> import numpy as np, gpulayers as gl
    >>> gl.keras.layers.Softmax()(np.zeros((1, 2), "float32"))
    array([[0.5, 0.5]], dtype=float32)
    """

    def __init__(self, axis: int = -1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.axis = axis

    def call(self, inputs: Any) -> Any:
        """Apply the function."""
        return ops.softmax(inputs, self.axis)

    def get_config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {**super().get_config(), "axis": self.axis}
