"""Masking: say which time steps hold nothing."""

from __future__ import annotations

from typing import Any

from gpulayers import ops
from gpulayers.dtypes import TensorShape
from gpulayers.layers.kernel import one_shape
from gpulayers.layers.modern import Layer

__all__ = ["Masking"]


class Masking(Layer):
    """Set steps whose features all equal `mask_value` to zero, and mask them: ``gl.keras.layers.Masking``.

    `x`: (n, steps, features). The result carries a mask (n, steps), False for such a step; layers that take a mask, the
    recurrent ones for example, skip it. Source: ``tf.keras.layers.Masking``.

    >>> import numpy as np, gpulayers as gl
    >>> layer = gl.keras.layers.Masking(mask_value=9.0)
    >>> layer(np.array([[[9.0, 9.0], [9.0, 1.0]]], "float32")).tolist()
    [[[0.0, 0.0], [9.0, 1.0]]]
    """

    def __init__(self, mask_value: float = 0.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.mask_value = mask_value
        self.supports_masking = True

    def call(self, inputs: Any) -> Any:
        """Return `inputs` with masked steps zero."""
        kept = ops.any(ops.not_equal(inputs, self.mask_value), -1, keepdims=True)
        return inputs * ops.cast(kept, inputs.dtype)

    def compute_mask(self, inputs: Any, mask: Any = None) -> Any:
        """Return, for each step, whether any feature differs from `mask_value`."""
        return ops.any(ops.not_equal(inputs, self.mask_value), -1)

    def compute_output_shape(self, input_shape: Any) -> TensorShape:
        """Return `input_shape` as a `TensorShape`. Raises TypeError for something that is no shape."""
        return one_shape(self._name, input_shape, range(1, 1 << 30))

    def get_config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {**super().get_config(), "mask_value": self.mask_value}
