"""Dense: a matrix product, a bias, an activation."""

from __future__ import annotations

import math
from typing import Any

from gpulayers import initializers, ops
from gpulayers.dtypes import TensorShape
from gpulayers.errors import ShapeError, message
from gpulayers.layers.kernel import KernelMixin, checked_count, one_shape
from gpulayers.layers.legacy import LegacyLayer
from gpulayers.layers.modern import Layer
from gpulayers.layers.spec import InputSpec
from gpulayers.ops.static import static_shape

__all__ = ["Dense", "LegacyDense"]

_RANKS = range(2, 1 << 30)


class DenseMixin(KernelMixin):
    """The maths of a dense layer, for both families."""

    def __init__(self, units: int, activation: Any = None, **kwargs: Any) -> None:
        super().__init__(activation=activation, **kwargs)
        self.units = checked_count(self._name, "units", units)
        self.input_spec = InputSpec(min_ndim=2)
        self.supports_masking = True

    def build(self, input_shape: Any) -> None:
        """Make `kernel` (D, units) and `bias` (units,). Raises ValueError if D, the last size, is unknown."""
        depth = self._depth(one_shape(self._name, input_shape, _RANKS))
        self.input_spec = InputSpec(min_ndim=2, axes={-1: depth})
        self._make_kernel((depth, self.units))
        self.built = True

    def _depth(self, shape: TensorShape) -> int:
        if shape[-1] is None:
            raise ShapeError(
                message(self._name, "The last dimension of the inputs should be defined", "a known size", shape)
            )
        return int(shape[-1])

    def call(self, inputs: Any) -> Any:
        """Return ``activation(inputs @ kernel + bias)``."""
        outputs = _times(self._in_compute_dtype(inputs), self.kernel, self.units)
        if self.bias is not None:
            outputs = ops.bias_add(outputs, self.bias)
        return self._activated(outputs)

    def compute_output_shape(self, input_shape: Any) -> Any:
        """Return the shape with `units` at its end. Raises TypeError for no shape, ValueError if it does not fit."""
        shape = one_shape(self._name, input_shape, _RANKS)
        self._depth(shape)
        return TensorShape([*shape[:-1], self.units])

    def get_config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {**super().get_config(), "units": self.units}


def _times(x: Any, kernel: Any, units: int) -> Any:
    """Contract the last axis of `x`. Further axes are folded into one, so that one large product is computed."""
    shape = static_shape(x)
    if shape is None or len(shape) <= 2 or not shape[-1]:
        return ops.matmul(x, kernel)
    sizes: list[Any] = list(shape[:-1])
    if sizes.count(None) == 1 and 0 not in sizes:
        sizes[sizes.index(None)] = -1
    elif None in sizes:
        dynamic = ops.shape_of(x)
        sizes = [dynamic[axis] if size is None else size for axis, size in enumerate(sizes)]
    rows = -1 if None in shape else math.prod(shape[:-1])  # type: ignore[arg-type]
    return ops.reshape(ops.matmul(ops.reshape(x, (rows, shape[-1])), kernel), (*sizes, units))


class Dense(DenseMixin, Layer):
    """``activation(x @ kernel + bias)``: ``gl.keras.layers.Dense``.

    `x`: (n, ..., D), floating or integer (cast to the compute dtype); returns (n, ..., units).

    Parameters

    - `units`: size of the last axis of the result.
    - `activation`: a name or function; None for none.
    - `use_bias`: whether `bias` is added.
    - `kernel_initializer` (Glorot uniform), `bias_initializer` (zeros); `kernel_regularizer`, `bias_regularizer`,
      `activity_regularizer`; `kernel_constraint`, `bias_constraint`: names, configurations or callables.
    - the keywords of `Layer`.

    Variables: `kernel` (D, units), `bias` (units,). 16-bit products are accumulated in float32. Masks are handed on.
    Raises ValueError for rank 1, an unknown D, or `units` below 1. Source: ``tf.keras.layers.Dense``.

    >>> import numpy as np, gpulayers as gl
    >>> gl.keras.layers.Dense(2, kernel_initializer="ones")(np.ones((1, 3), "float32"))
    array([[3., 3.]], dtype=float32)
    """

    def __init__(
        self,
        units: int,
        activation: Any = None,
        use_bias: bool = True,
        kernel_initializer: Any = "glorot_uniform",
        bias_initializer: Any = "zeros",
        kernel_regularizer: Any = None,
        bias_regularizer: Any = None,
        activity_regularizer: Any = None,
        kernel_constraint: Any = None,
        bias_constraint: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            units,
            activation,
            use_bias=use_bias,
            kernel_initializer=kernel_initializer,
            bias_initializer=bias_initializer,
            kernel_regularizer=kernel_regularizer,
            bias_regularizer=bias_regularizer,
            activity_regularizer=activity_regularizer,
            kernel_constraint=kernel_constraint,
            bias_constraint=bias_constraint,
            **kwargs,
        )


class LegacyDense(DenseMixin, LegacyLayer):
    """``activation(x @ kernel + bias)`` with variable scopes: ``gl.layers.Dense``.

    Arguments and maths are those of `gl.keras.layers.Dense`, in the order of ``tf.layers.Dense``: `trainable` and
    `name` come last. `kernel_initializer` None takes the scope's initializer, or Glorot uniform. The dtype is the first
    input's; an integer one raises TypeError.

    >>> import numpy as np, gpulayers as gl
    >>> layer = gl.layers.Dense(2, kernel_initializer=gl.ones_initializer())
    >>> layer(np.ones((1, 3)))
    array([[3., 3.]])
    """

    def __init__(
        self,
        units: int,
        activation: Any = None,
        use_bias: bool = True,
        kernel_initializer: Any = None,
        bias_initializer: Any = initializers.zeros_initializer(),  # noqa: B008  (it holds nothing but a dtype)
        kernel_regularizer: Any = None,
        bias_regularizer: Any = None,
        activity_regularizer: Any = None,
        kernel_constraint: Any = None,
        bias_constraint: Any = None,
        trainable: bool = True,
        name: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            units,
            activation,
            use_bias=use_bias,
            kernel_initializer=kernel_initializer,
            bias_initializer=bias_initializer,
            kernel_regularizer=kernel_regularizer,
            bias_regularizer=bias_regularizer,
            activity_regularizer=activity_regularizer,
            kernel_constraint=kernel_constraint,
            bias_constraint=bias_constraint,
            trainable=trainable,
            name=name,
            **kwargs,
        )


# Layers are named after their class, and a legacy program's is called Dense.
LegacyDense.__name__ = LegacyDense.__qualname__ = "Dense"
